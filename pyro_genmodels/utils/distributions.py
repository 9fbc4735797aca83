"""Questions about any torch distribution, and copies of it with its parts changed."""

from __future__ import annotations

__all__ = [
    "Density",
    "density_of",
    "has_active_dropout",
    "is_real",
    "map_tensors",
    "mean_inside_log",
    "modules_and_tensors",
    "over_events",
    "sum_event",
    "unwrap",
    "without_validation",
]  # fmt: skip

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any, Literal, get_args

from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, IndependentTransform, Transform, constraints
from torch.nn.modules.dropout import _DropoutNd

Density = Literal["exact", "lower bound", "estimate", "unnormalized", "none"]


def map_tensors(
    value: Any,
    fn: Callable[[Tensor], Tensor],
    modules: Callable[[nn.Module], nn.Module] = lambda module: module,
    memo: dict[int, Any] | None = None,
) -> Any:
    """A copy with fn applied to every tensor, and `modules` to every module, in distributions and what they are made of."""
    memo = {} if memo is None else memo
    if id(value) in memo:  # a transform and its inverse hold each other
        return memo[id(value)]
    if isinstance(value, nn.Module):
        return modules(value)
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (Distribution, Transform, constraints.Constraint)) or (
        is_dataclass(value) and not isinstance(value, type)
    ):
        memo[id(value)] = new = value.__class__.__new__(value.__class__)
        new.__dict__.update({name: map_tensors(part, fn, modules, memo) for name, part in vars(value).items()})
        return new
    if isinstance(value, (list, tuple)) and not isinstance(value, Size):
        return type(value)(map_tensors(part, fn, modules, memo) for part in value)
    return value


def over_events(transform: Transform, event_dim: int) -> Transform:
    """A bijection of coordinates as one of whole events, of that many dimensions."""
    missing = event_dim - transform.domain.event_dim
    return IndependentTransform(transform, missing) if missing else transform


def without_validation(fn: Distribution) -> Distribution:
    """A copy of a distribution that does not look at its values, in all its parts."""
    fn = map_tensors(fn, lambda t: t)
    parts = [fn]
    for part in parts:
        part._validate_args = False
        parts.extend(inner for inner in vars(part).values() if isinstance(inner, Distribution))
    return fn


def is_real(support: constraints.Constraint | None) -> bool:
    """Whether every coordinate may be any real number."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def modules_and_tensors(value: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """The modules, and the tensors outside of these, that distributions and what they are made of hold."""
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []

    def note(found: list, part: Any) -> Any:
        found.append(part)
        return part

    map_tensors(value, partial(note, tensors), partial(note, modules))
    return modules, tensors


def density_of(fn: Distribution) -> tuple[Density, str]:
    """What a distribution's `log_prob` returns, the weakest of what it is made of, and advice where that is no density."""
    fn = unwrap(fn)
    parts = (getattr(fn, name, None) for name in ("base_dist", "base", "_component_distribution"))
    within = [density_of(part) for part in parts if isinstance(part, Distribution)]
    own: tuple[Density, str] = getattr(fn, "density", "exact"), getattr(fn, "advice", "")
    return max([own, *within], key=lambda found: get_args(Density).index(found[0]))


def mean_inside_log(fn: Distribution) -> bool:
    """Whether the log of a mean over draws may be taken of a density, and of what it is made of."""
    fn = unwrap(fn)
    base = getattr(fn, "base", None)
    return getattr(fn, "tightens", True) and (not isinstance(base, Distribution) or mean_inside_log(base))


def has_active_dropout(*parts: Any) -> bool:
    """Whether a network, also inside a distribution, drops units at random, so that no two passes are of one function."""
    layers = (m for module in modules_and_tensors(parts)[0] for m in module.modules())
    return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in layers)


def sum_event(values: Tensor, event_dim: int) -> Tensor:
    """The sum over the last event_dim dimensions."""
    return values.flatten(values.dim() - event_dim).sum(-1) if event_dim else values


def unwrap(fn: Distribution) -> Distribution:
    """The distribution inside Pyro's `MaskedDistribution`, `Independent` and `ExpandedDistribution`."""
    while isinstance(fn, (MaskedDistribution, Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn
