"""Questions about any torch distribution, and copies of it with its parts changed."""

from __future__ import annotations

__all__ = [
    "Density",
    "check_exact_density",
    "coordinate_support",
    "density_of",
    "has_active_dropout",
    "interior",
    "is_real",
    "map_tensors",
    "mean_in_data",
    "mean_inside_log",
    "modules_and_tensors",
    "over_events",
    "parts_of",
    "sum_event",
    "unwrap",
    "without_validation",
]  # fmt: skip

from collections.abc import Callable, Iterator, Sequence
from dataclasses import is_dataclass
from functools import partial
from math import inf
from typing import Any, Literal, get_args

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Independent, IndependentTransform, Transform, constraints

from pyro_genmodels.utils.errors import repr_or_class

Density = Literal["exact", "lower bound", "estimate", "unnormalized", "none"]
"""Kind of density that a `log_prob` computes, from the strongest to the weakest."""

DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def map_tensors(
    value: Any,
    fn: Callable[[Tensor], Tensor],
    modules: Callable[[nn.Module], nn.Module] = lambda module: module,
    memo: dict[int, Any] | None = None,
) -> Any:
    """Return a copy of a distribution, transform, constraint or dataclass with all its tensors mapped.

    Args:
        value: the object to copy. Lists, tuples and parts are copied recursively; anything else is returned as it is.
        fn: function applied to every tensor.
        modules: function applied to every module; the tensors inside modules are left alone.
        memo: copies made so far, by the id of the original.
    """
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
    """Return the transform as one of whole events, which have `event_dim` dimensions."""
    missing = event_dim - transform.domain.event_dim
    return IndependentTransform(transform, missing) if missing else transform


def without_validation(fn: Distribution) -> Distribution:
    """Return a copy of a distribution that validates no arguments, also in its parts."""
    fn = map_tensors(fn, lambda t: t)
    for part in parts_of(fn):
        part._validate_args = False
    return fn


def parts_of(fn: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and all distributions inside of it."""
    yield fn
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from parts_of(part)


def coordinate_support(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support inside of ``constraints.independent``: that of one coordinate, if there is one."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_real(support: constraints.Constraint | None) -> bool:
    """Return True if the support is all real numbers, in every coordinate."""
    return support is not None and isinstance(coordinate_support(support), type(constraints.real))


def interior(x: Tensor, support: constraints.Constraint | None) -> Tensor:
    """Return values with those at or beyond an end of the support moved to the nearest float inside.

    Near 100, for example, float32 has 1.3e5 numbers per unit: 100 + 1e-6 is 100, which ``greater_than(100.0)`` excludes.

    Args:
        x: values, (..., *event_shape).
        support: support of one coordinate or of a whole event. The ends of intervals and rays are known, also inside of
            ``constraints.stack``; other supports and discrete ones leave x as it is.

    Example:
        >>> x = interior(torch.tensor([100.0, 101.0]), constraints.greater_than(100.0))
        >>> constraints.greater_than(100.0).check(x).tolist(), x[1]
        ([True, True], tensor(101.))
    """
    if support is None:
        return x
    support = coordinate_support(support)
    if isinstance(support, constraints.stack):
        parts = zip(x.unbind(support.dim), support.cseq, strict=True)
        return torch.stack([interior(part, each) for part, each in parts], support.dim)
    if support.is_discrete:
        return x
    for name, direction in (("lower_bound", inf), ("upper_bound", -inf)):
        if (end := getattr(support, name, None)) is None:
            continue
        end = torch.as_tensor(end, dtype=x.dtype, device=x.device)
        beside = torch.nextafter(end, torch.full_like(end, direction))
        smallest = torch.full_like(end, torch.finfo(x.dtype).tiny).copysign(beside)  # smaller ones may be rounded to 0
        beside = torch.where(end == 0, smallest, beside)
        x = torch.maximum(x, beside) if direction > 0 else torch.minimum(x, beside)
    return x


def modules_and_tensors(value: Any) -> tuple[list[nn.Module], list[Tensor]]:
    """Return all modules in a distribution and its parts, and all tensors outside of these modules."""
    modules: list[nn.Module] = []
    tensors: list[Tensor] = []

    def collect(parts: list, part: Any) -> Any:
        parts.append(part)
        return part

    map_tensors(value, partial(collect, tensors), partial(collect, modules))
    return modules, tensors


def density_of(fn: Distribution) -> tuple[Density, str]:
    """Return the kind of density that `log_prob` computes, and advice if it is not exact.

    A distribution made of others, such as a mixture, has the weakest kind of its parts.
    """
    fn = unwrap(fn)
    parts = (getattr(fn, name, None) for name in ("base_dist", "base", "_component_distribution"))
    inner = [density_of(part) for part in parts if isinstance(part, Distribution)]
    own: tuple[Density, str] = getattr(fn, "density", "exact"), getattr(fn, "advice", "")
    return max([own, *inner], key=lambda pair: get_args(Density).index(pair[0]))


def check_exact_density(owner: str, role: str, found: Any, event_shape: Sequence[int] | None = None) -> Distribution:
    """Return a distribution over one event whose density is exact, given that or a function that returns it.

    Args:
        owner: name of the class or function that takes the argument.
        role: noun for the argument, such as "base".
        found: distribution, or function without arguments that returns one, such as a family without a context.
        event_shape: event shape that the distribution must have; None allows any.

    Raises:
        TypeError: if it is not a distribution.
        ValueError: if it has a batch shape, another event shape, or no exact density.

    Example:
        >>> from pyro.distributions import Normal
        >>> check_exact_density("NoiseContrastive", "noise", Normal(0.0, 1.0).expand((2,)))
        Traceback (most recent call last):
        ValueError: NoiseContrastive wants its noise over one event, but found batch shape (2,) and event shape (). Use ...
    """
    made = found() if callable(found) and not isinstance(found, (Distribution, type)) else found
    if not isinstance(made, Distribution):
        raise TypeError(f"{owner} wants a Pyro distribution or a family as its {role}, but found {repr_or_class(found)}.")
    batch, event = tuple(made.batch_shape), tuple(made.event_shape)
    wanted = event if event_shape is None else tuple(event_shape)
    if batch or event != wanted:
        events = "one event" if event_shape is None else f"one event of shape {wanted}"
        is_cured = batch and (event_shape is None or batch + event == wanted)
        cure = f" Use .to_event({len(batch)})." if is_cured else ""
        raise ValueError(
            f"{owner} wants its {role} over {events}, but found batch shape {batch} and event shape {event}.{cure}"
        )
    density, advice = density_of(made)
    if density != "exact":
        kind = "no density" if density == "none" else f"a density of kind {density!r}"
        message = f"{owner} wants an exact density as its {role}, but {type(made).__name__} has {kind}. {advice}"
        raise ValueError(message.rstrip())
    return made


def mean_in_data(mean: Tensor, to_model: Transform | None) -> Tensor:
    """Return the mean of data from the mean of what a bijection makes of them.

    Args:
        mean: mean of the transformed data, (..., *event_shape).
        to_model: transform of the data, which says that it is affine by an attribute `is_affine`; None is the identity.

    Raises:
        NotImplementedError: if it is not affine, so that it does not map means to means.
    """
    if to_model is None:
        return mean
    if not getattr(to_model, "is_affine", False):
        raise NotImplementedError(f"The mean under the transform {type(to_model).__name__} is not known.")
    return to_model.inv(mean)


def mean_inside_log(fn: Distribution) -> bool:
    """Return True if averaging exp(log_prob) over calls gives a tighter bound, for the distribution and its base."""
    fn = unwrap(fn)
    base = getattr(fn, "base", None)
    return getattr(fn, "mean_inside_log", True) and (not isinstance(base, Distribution) or mean_inside_log(base))


def has_active_dropout(*parts: Any) -> bool:
    """Return True if a network, also one inside a distribution, has a dropout layer in training mode."""
    layers = (m for module in modules_and_tensors(parts)[0] for m in module.modules())
    return any(isinstance(m, DROPOUT_LAYERS) and m.training and m.p > 0 for m in layers)


def sum_event(values: Tensor, event_dim: int) -> Tensor:
    """Return the sum over the last `event_dim` dimensions."""
    return values.flatten(values.dim() - event_dim).sum(-1) if event_dim else values


def unwrap(fn: Distribution) -> Distribution:
    """Return the distribution inside Pyro's `MaskedDistribution`, `Independent` and `ExpandedDistribution`."""
    while isinstance(fn, (MaskedDistribution, Independent, ExpandedDistribution)):
        fn = fn.base_dist
    return fn
