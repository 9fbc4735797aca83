"""Names in Pyro's param store: a module's own, one module a name, and the store made to hold the module's own tensors.

Pyro knows a parameter by name alone. Two modules of one name meet there: the second never trains, in silence.
"""

from __future__ import annotations

__all__ = ["claim", "fresh_name", "in_their_own_names", "is_taken", "own_parameters", "take_over"]

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from weakref import WeakValueDictionary

import pyro
from pyro.nn import PyroModule
from torch import nn

_counters: defaultdict[str, count] = defaultdict(lambda: count(1))
_named: WeakValueDictionary[str, PyroModule] = WeakValueDictionary()


def fresh_name(module: PyroModule) -> str:
    """The module's class and a number, which no module that is alive has claimed."""
    stem = type(module).__name__
    return next(name for i in _counters[stem] if (name := f"{stem}_{i}") not in _named)


def claim(module: PyroModule, name: str) -> PyroModule | None:
    """Gives the module the name, and returns the module that had it, which now needs another."""
    other = _named.get(name)
    if _named.get(module._pyro_name) is module:
        del _named[module._pyro_name]
    _named[name] = module
    return None if other is module else other


def is_taken(name: str) -> bool:
    """Whether a module that is alive has claimed the name."""
    return name in _named


def own_parameters(module: PyroModule) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module and what is in it, by the names under which Pyro's store knows them."""
    prefix = module._pyro_name + "." if module._pyro_name else ""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name.removesuffix("_unconstrained"), parameter
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):
            yield from own_parameters(child)
        elif child is not None:
            yield from ((f"{prefix}{name}$$${inner}", parameter) for inner, parameter in child.named_parameters())


def take_over(module: PyroModule) -> None:
    """Drops from the store what stands under the module's names and is not the module's: another's, or moved from elsewhere."""
    store = pyro.get_param_store()
    for name, parameter in own_parameters(module):
        if store._params.get(name, parameter) is not parameter:
            del store[name]


@contextmanager
def in_their_own_names(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The store as if these modules alone had their names; afterwards as it was.

    Of two autoguides of one class that were trained after each other, the store holds the parameters of the second under the
    names of both, and Pyro would put them in the place of the first's.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    for module in modules:
        if isinstance(module, PyroModule):
            take_over(module)
    try:
        yield
    finally:
        store.clear()
        store.set_state(before)
