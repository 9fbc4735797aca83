"""The modules behind a model and its guide, and evaluation mode for all of them."""

from __future__ import annotations

__all__ = ["evaluation_mode", "output_without_view", "reachable_modules", "with_versions"]

import sys
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

from pyro.distributions import ConditionalDistribution, ConditionalTransform
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

_LIBRARIES = sys.stdlib_module_names | {"numpy", "pyro", "torch", "pytest", "_pytest", "pluggy"}
"""Packages whose objects are not searched for modules, nor the globals of their functions.

pytest rewrites the assert statements of a model in a test, and so refers it to all that pytest holds.
"""

_THIS_PACKAGE = __name__.split(".", maxsplit=1)[0]
"""This package, whose functions refer to no module by a global."""

_SEARCHED = (Distribution, Transform, ConditionalDistribution, ConditionalTransform, Messenger)
"""Classes of libraries whose objects are searched."""


def reachable_modules(*parts: Any) -> list[nn.Module]:
    """Return the modules that running these callables can call, submodules included.

    The search covers modules; bound methods; the attributes of modules, of distributions and of the user's own objects;
    handlers and `functools.partial`; containers; of a function its closure, its defaults, and the globals and attributes that
    its code names; and of the user's own classes the methods and attributes that the searched code names. A module that is only
    reached another way (by `getattr` with a computed name, or built in the run) is not found.
    """
    modules: list[nn.Module] = []
    seen: dict[int, Any] = {}  # keeps its objects alive, so that no id is used twice
    classes: dict[type, None] = {}  # in order
    names = {"__call__", "forward"}
    queue = list(parts)
    while queue:
        part = queue.pop()
        if id(part) not in seen:
            seen[id(part)] = part
            if isinstance(part, nn.Module):
                modules.append(part)
            if isinstance(part, FunctionType) and not _is_library(part):
                names |= _names_in(part.__code__)
            for cls in (part if isinstance(part, type) else type(part)).__mro__:
                if not _is_library(cls):
                    classes[cls] = None
            queue.extend(_parts_of(part))
        if not queue:
            named = (value for cls in classes for name, value in vars(cls).items() if name in names)
            queue.extend(value for value in named if id(value) not in seen)
    return modules


@contextmanager
def evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules into evaluation mode, and those that were in training mode back at the end."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def output_without_view(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Return a layer's output as a tensor of its own, as a forward hook.

    A view that is changed in place would lose the gradient of a layer that is sharded.
    """
    return out if out._base is None else out.clone()


def _parts_of(part: Any) -> Iterable[Any]:
    """Return what a function, container or object refers to, as far as `reachable_modules` searches it."""
    if isinstance(part, CellType):
        try:
            return [part.cell_contents]
        except ValueError:  # a variable that is not assigned yet
            return []
    if isinstance(part, FunctionType):
        return _parts_of_function(part)
    if isinstance(part, (MethodType, staticmethod, classmethod)):
        return [getattr(part, "__self__", None), part.__func__]
    if isinstance(part, (property, cached_property)):
        return [getattr(part, "fget", None), getattr(part, "func", None)]
    if isinstance(part, partial):  # also one of Pyro's handlers around a function
        return [getattr(part, "func", None), part.args, part.keywords]
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, (list, tuple, set, frozenset, deque)):
        return part
    if isinstance(part, type):
        return []
    if isinstance(part, (nn.Module, *_SEARCHED)) or not _is_library(type(part)):
        return [getattr(part, "__dict__", {}), *_slots_of(part)]
    wrapped = getattr(part, "__wrapped__", None)  # of functools.lru_cache
    return [wrapped] if isinstance(wrapped, FunctionType) else []


def _parts_of_function(fn: FunctionType) -> list[Any]:
    held = [fn.__closure__, fn.__defaults__, fn.__kwdefaults__]
    if _is_library(fn):
        return held
    names = _names_in(fn.__code__)
    named = [fn.__globals__[name] for name in names if name in fn.__globals__]
    imported = [module for module in named if isinstance(module, ModuleType) and not _is_library(module)]
    attributes = [vars(module)[name] for module in imported for name in names if name in vars(module)]
    return [*held, *named, *attributes]


def _slots_of(part: Any) -> list[Any]:
    """Return the attributes of an object that its classes store in slots."""
    slots = [value for cls in type(part).__mro__ for value in vars(cls).values() if isinstance(value, MemberDescriptorType)]
    return [getattr(part, slot.__name__, None) for slot in slots]


def _names_in(code: CodeType) -> set[str]:
    """Return the global names and attributes in a function's code, and in the functions defined inside it."""
    return set(code.co_names).union(*(_names_in(const) for const in code.co_consts if isinstance(const, CodeType)))


def _is_library(part: Any) -> bool:
    name = part.__name__ if isinstance(part, ModuleType) else part.__module__
    package = (name or "").split(".")[0]
    return package in _LIBRARIES or (package == _THIS_PACKAGE and not isinstance(part, type))


def with_versions(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return a state that says it is of the present versions of a module and its parts, as `module.state_dict()` does."""
    marked: Any = OrderedDict(state)
    marked._metadata = module.state_dict()._metadata  # type: ignore[attr-defined]
    found: dict[str, Tensor] = marked
    return found
