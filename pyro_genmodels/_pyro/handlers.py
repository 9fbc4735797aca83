"""Handlers: running a model without a trace of it left, and having it draw what it observes."""

from __future__ import annotations

__all__ = ["drawing_observed", "drawn_without_gradient", "is_enumerated", "map_inner", "side_effect_free", "unobserving"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_genmodels._pyro import traces


@contextmanager
def side_effect_free() -> Iterator[None]:
    """No gradients, every module that runs in evaluation mode, and nothing left behind: no mode, no parameter, no site."""
    switched: list[nn.Module] = []

    def switch(module: nn.Module, _: Any) -> None:
        if module.training:
            switched.append(module)
            module.training = False

    store, frozen = pyro.get_param_store(), _Frozen()
    before = store.get_state()
    hook = register_module_forward_pre_hook(switch)
    try:
        with torch.no_grad(), poutine.block(), frozen:
            yield
    finally:
        hook.remove()
        for module in switched:
            module.training = True
        frozen.restore()
        store.clear()
        store.set_state(before)


class _Frozen(Messenger):
    """Remembers which parameters want no gradient, for Pyro's store makes every one want it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        for value in msg["args"]:
            if isinstance(value, Tensor) and value.is_leaf and not value.requires_grad:
                self.found[id(value)] = value

    def restore(self) -> None:
        for value in self.found.values():
            value.requires_grad_(False)


class unobserving(UnconditionMessenger):  # noqa: N801 (a handler, as Pyro names them)
    """Has a model draw what it observes; values of `pyro.deterministic` stay what they are computed to be."""

    def _pyro_sample(self, msg: Any) -> None:
        if not traces.is_deterministic(msg):
            super()._pyro_sample(msg)


def drawing_observed(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as it draws what it observes, also if it has a keyword `context`, as Pyro's handlers have."""
    return lambda *args, **kwargs: unobserving()(lambda: model(*args, **kwargs))()


def drawn_without_gradient() -> list[str]:
    """The latent variables of this run so far whose draws carry no gradient, and so are weighed by what depends on them."""
    return [
        name
        for handler in _PYRO_STACK
        if isinstance(handler, TraceMessenger)
        for name, site in traces.sample_sites(handler.trace).items()
        if not (site["is_observed"] or site_is_subsample(site) or site["fn"].has_rsample)
    ]


def is_enumerated(batch_dims: int) -> bool:
    """Whether a tensor of so many batch dimensions reaches into those over which Pyro enumerates in this run."""
    enumerates = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
    return enumerates and any(batch_dims >= -dim for dim in _ENUM_ALLOCATOR.dim_to_id)


def map_inner(fn: Any, change: Callable[[Any], Distribution]) -> Any:
    """A distribution with what `unwrap` finds in it changed, in the same wrappers."""
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(map_inner(fn.base_dist, change), fn._mask)
    if isinstance(fn, Independent):
        return map_inner(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return map_inner(fn.base_dist, change).expand(fn.batch_shape)
    return change(fn)
