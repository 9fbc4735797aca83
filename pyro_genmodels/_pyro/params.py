"""Names of modules and parameters in Pyro's param store.

Pyro finds a parameter by its name alone. If two modules have the same name, the store holds the parameters of one of them,
and the other never trains, without an error. So each family registers a name of its own here.
"""

from __future__ import annotations

__all__ = [
    "as_module_parameter",
    "clear_name",
    "is_registered",
    "is_stored",
    "isolated_param_store",
    "named_parameters",
    "pyro_name",
    "random_parameters",
    "register_name",
    "remove_foreign_parameters",
    "unconstrained",
    "unused_name",
]  # fmt: skip

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import pyro
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn

_counters: defaultdict[str, count] = defaultdict(lambda: count(1))
_registered: WeakValueDictionary[str, PyroModule] = WeakValueDictionary()


def pyro_name(module: PyroModule) -> str:
    """Return the name under which Pyro stores the parameters of a module."""
    return module._pyro_name


def clear_name(module: PyroModule) -> None:
    """Remove the name of a module. A copy or an unpickled module still carries the name of the module it was made from.

    Submodules keep their names until `register_name` changes them.
    """
    module._pyro_name = ""


def unused_name(module: PyroModule) -> str:
    """Return the class name of a module followed by a number, such that no living module is registered under it."""
    stem = type(module).__name__
    return next(name for i in _counters[stem] if (name := f"{stem}_{i}") not in _registered)


def is_registered(name: str) -> bool:
    """Return True if a living module is registered under this name."""
    return name in _registered


def register_name(module: PyroModule, name: str) -> PyroModule | None:
    """Name a module and its submodules, and register it under this name.

    Returns:
        The other module that was registered under the name, which now needs another one; or None.
    """
    previous = _registered.get(name)
    if _registered.get(module._pyro_name) is module:
        del _registered[module._pyro_name]
    _registered[name] = module
    module._pyro_context.used = False  # otherwise Pyro refuses to rename the submodules
    module._pyro_set_supermodule(name, module._pyro_context)
    return None if previous is module else previous


def named_parameters(module: PyroModule) -> list[tuple[str, nn.Parameter]]:
    """Return (name in the param store, parameter) for all parameters of a module and its submodules.

    A parameter that several submodules share is listed under each of their names. Every call of a family reads this list, so
    that it is made by plain loops.
    """
    prefix = module._pyro_name + "." if module._pyro_name else ""
    found = [(prefix + name.removesuffix("_unconstrained"), p) for name, p in module._parameters.items() if p is not None]
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            found += named_parameters(child)
        elif child is not None:
            _append_parameters(child, f"{prefix}{name}$$$", found)
    return found


def _append_parameters(module: nn.Module, prefix: str, found: list[tuple[str, nn.Parameter]]) -> None:
    """Append the parameters of a plain module, as `pyro.module` names them."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found.append((prefix + name, parameter))
    for name, child in module._modules.items():
        if child is not None and (child._parameters or child._modules):
            _append_parameters(child, f"{prefix}{name}.", found)


def random_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (submodule, attribute) for the random parameters, Pyro's `PyroSample`, of a module and its submodules."""
    for part in module.modules():
        yield from ((part, name) for name in getattr(part, "_pyro_samples", ()))


def remove_foreign_parameters(module: PyroModule) -> None:
    """Remove entries of the param store that carry this module's names but hold other tensors.

    Such entries belong to another module, or to this one before its tensors were replaced (moved to another device).
    """
    store = pyro.get_param_store()
    for name, parameter in named_parameters(module):
        if store._params.get(name, parameter) is not parameter:
            del store[name]


def as_module_parameter(name: str) -> nn.Parameter:
    """Return a parameter of the param store, unconstrained, as an `nn.Parameter`, which replaces another kind of tensor there.

    A module can then hold it too. It shares the memory of the former tensor.
    """
    store: Any = pyro.get_param_store()
    before = store._params[name]
    if isinstance(before, nn.Parameter):
        return before
    parameter = nn.Parameter(before.detach(), requires_grad=before.requires_grad)
    del store._param_to_name[before]
    store._params[name], store._param_to_name[parameter] = parameter, name
    return parameter


def is_stored(module: PyroModule, name: str) -> bool:
    """Return True if Pyro's statements for the parameters of a plain submodule, made whenever it is read, have no effect.

    That is, the param store holds these parameters already, and no active handler acts on such statements.
    """
    child = module._modules.get(name)
    if child is None or isinstance(child, PyroModule) or any(map(_acts_on_parameters, _PYRO_STACK)):
        return False
    store, found = pyro.get_param_store()._params, list[tuple[str, nn.Parameter]]()
    _append_parameters(child, f"{module._pyro_name}.{name}$$$" if module._pyro_name else f"{name}$$$", found)
    return all(store.get(key) is p and p.requires_grad for key, p in found)


def _acts_on_parameters(handler: Any) -> bool:
    """Return True if a handler may act on a statement of a parameter, or record it."""
    for name in ("_process_message", "_postprocess_message"):
        if getattr(getattr(handler, name), "__func__", None) is not getattr(Messenger, name):  # of its class, or its own
            return True
    names = ("_pyro_param", "_pyro_post_param")
    if type(handler) is ReplayMessenger and vars(handler).keys().isdisjoint(names):
        return bool(handler.params)
    return any(getattr(handler, name, None) is not None for name in names)


def unconstrained(name: str) -> Tensor | None:
    """Return the unconstrained parameter of a name in Pyro's param store, by identity, or None if there is none."""
    return pyro.get_param_store()._params.get(name)


@contextmanager
def isolated_param_store(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Remove foreign parameters under the names of these modules, and restore the store afterwards.

    After two autoguides of one class were trained one after the other, the store holds the parameters of the second under
    the names of both. Pyro would use these in place of the parameters of the first.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    for module in modules:
        if isinstance(module, PyroModule):
            remove_foreign_parameters(module)
    try:
        yield
    finally:
        store.clear()
        store.set_state(before)
