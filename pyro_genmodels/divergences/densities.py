"""Validation of two distributions, and their log densities at samples of one of them."""

from __future__ import annotations

__all__ = ["check_densities", "check_draws", "check_events", "common_batch", "doubled", "log_densities"]

from collections.abc import Iterable, Iterator
from functools import reduce

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, IndependentTransform, Transform, TransformedDistribution, constraints

from pyro_genmodels.divergences.log_probabilities import log_prob_of
from pyro_genmodels.divergences.measures import COUNTS, is_inside, measure_of, support_of
from pyro_genmodels.utils.distributions import (
    coordinate_support,
    density_of,
    interior,
    map_tensors,
    modules_and_tensors,
    parts_of,
    sum_event,
    unwrap,
)
from pyro_genmodels.utils.errors import type_with_article
from pyro_genmodels.utils.precision import in_doubles

MAX_SHARE_AT_END = 1e-3
"""Largest share of draws that may be rounded to an end of the support."""


def check_events(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise an error unless p and q are distributions with the same event shape and batch shapes that broadcast.

    Args:
        p: distribution.
        q: other distribution.
        by: name of the calling function, for error messages.
    """
    for name, side in (("p", p), ("q", q)):
        if not isinstance(side, Distribution):
            cure = "For samples see wasserstein, sliced_wasserstein and mmd, or divergence_table."
            if isinstance(side, torch.nn.Module):
                cure = f"Call it: {name}()."
            raise TypeError(f"{by} wants distributions, but {name} is {type_with_article(side)}. {cure}")
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"{by} wants two distributions of one event shape, but p has {tuple(p.event_shape)} and q "
            f"{tuple(q.event_shape)}. Use .to_event() on the one with fewer dimensions."
        )
    try:
        torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"{by} wants two batch shapes that broadcast, but p has {tuple(p.batch_shape)} and q {tuple(q.batch_shape)}. Use "
            ".expand() on one of them."
        ) from None


def check_densities(p: Distribution, q: Distribution, *, by: str, normalised: bool = True) -> None:
    """Raise a ValueError unless both distributions have an exact density with respect to some measure.

    Args:
        p: distribution.
        q: other distribution.
        by: name of the calling function, for error messages.
        normalised: True if the densities must be normalised.
    """
    for name, side in (("p", p), ("q", q)):
        density, _ = density_of(side)
        if density != "exact" and normalised:
            raise ValueError(
                f"{by} wants two exact densities, but {name} is {type_with_article(side)}, whose density is: {density}. "
                "Compare samples instead, by c2st or mmd."
            )
        for part in parts_of(side):
            if problem := _problem(part):
                raise ValueError(f"{by} wants two normalised densities, but {name} is or holds {problem}")
        if measure_of(side) is None:
            raise ValueError(
                f"{by} wants probabilities or densities, but {name} is {type_with_article(side)} that mixes both: its log_prob "
                "adds probabilities of points to densities. Compare its parts, or samples, by wasserstein or mmd."
            )


def _problem(part: Distribution) -> str:
    """Return why a distribution with this part has no normalised density, and a way out; an empty text if it may have one."""
    if isinstance(part, MaskedDistribution):
        return f"a masked {type(part.base_dist).__name__}, whose log_prob is 0 where it is masked. Leave .mask() out."
    if isinstance(part, dist.Empirical):
        return "an Empirical, whose log_prob takes one value at a time. Compare its samples, by wasserstein or mmd."
    if (
        isinstance(part, TransformedDistribution)
        and type(part).log_prob is TransformedDistribution.log_prob
        and not all(map(_has_jacobian, _transforms(part.transforms)))
    ):
        found = f"{type_with_article(part)} by a transform that is not one to one, without log_prob"
        return f"{found}. Use dist.FoldedDistribution."
    if isinstance(part, dist.ImproperUniform):
        return "an ImproperUniform, which has no normalised density. Use a proper distribution, such as a wide Normal."
    if isinstance(part, (dist.Delta, dist.Unit)):
        log_factor = part.log_density if isinstance(part, dist.Delta) else part.log_factor
        if bool((torch.as_tensor(log_factor) != 0).any()):
            return f"{type_with_article(part)} with a weight: its log_prob at the point is not 0. Leave the weight out."
    return ""


def _transforms(transforms: Iterable[Transform]) -> Iterator[Transform]:
    """Yield transforms and all transforms inside of them."""
    for transform in transforms:
        yield transform
        yield from _transforms(getattr(transform, "parts", ()))
        if isinstance(transform, IndependentTransform):
            yield from _transforms([transform.base_transform])


def _has_jacobian(transform: Transform) -> bool:
    """Return True if a transform computes the log determinant of its Jacobian."""
    return transform.bijective or type(transform).log_abs_det_jacobian is not Transform.log_abs_det_jacobian


def common_batch(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution]:
    """Return both distributions expanded to their common batch shape."""
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = (side if side.batch_shape == shape else side.expand(shape) for side in (p, q))
    return p, q


def doubled(fn: Distribution) -> tuple[Distribution, torch.dtype | None]:
    """Return a distribution with parameters in double precision, with their gradients, and the dtype that they had.

    In single precision, squares of parameters such as 1e-25 underflow, and rounding hides a divergence of order d^2 between
    distributions that differ by a small d. A distribution with networks, or of another library than torch and Pyro, may hold
    numbers elsewhere: it is returned unchanged, with None as the dtype.
    """
    modules, tensors = modules_and_tensors(fn)
    kinds = [*parts_of(fn), *(transform for part in parts_of(fn) for transform in _transforms(getattr(part, "transforms", ())))]
    if modules or any(type(kind).__module__.partition(".")[0] not in ("torch", "pyro") for kind in kinds):
        return fn, None
    dtypes = [tensor.dtype for tensor in tensors if tensor.is_floating_point()] or [torch.get_default_dtype()]
    return map_tensors(fn, lambda t: in_doubles(t) if t.is_floating_point() else t), reduce(torch.promote_types, dtypes)


def check_draws(p: Distribution, x: Tensor, *, by: str) -> None:
    """Raise a ValueError if many draws of a continuous distribution were rounded to an end of its support.

    The density at a rounded draw is not that at the draw. Half of the draws of a Gamma of concentration 0.001, for example, are
    below the smallest double.

    Args:
        p: distribution.
        x: draws of it, (num_samples, batch..., event...).
        by: name of the calling function, for error messages.
    """
    if measure_of(p) == COUNTS or not x.is_floating_point():
        return
    support = coordinate_support(support_of(p))
    if isinstance(support, type(constraints.simplex)):
        at_end = x.sort(-1).values.diff(dim=-1) == 0  # the smallest coordinates are cut before they are divided by their sum
    else:
        low, high = (interior(torch.full_like(x[:1], end), support) for end in (-torch.inf, torch.inf))
        at_end = (x <= low) | (x >= high)
    share = (sum_event(at_end.float(), len(p.event_shape)) > 0).float().mean(0).max()
    if share > MAX_SHARE_AT_END:
        raise ValueError(
            f"{by} wants draws inside the support, but {float(share):.1%} of those of {type(unwrap(p)).__name__} are rounded "
            f"to its end by {x.dtype}, where the density differs. Use larger concentrations, or compare samples by mmd."
        )


def log_densities(p: Distribution, q: Distribution, num_samples: int, *, by: str) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return the log densities of p and q at samples of p, (num_samples, batch...) each, and the dtype of a result.

    They are computed in doubles if p and q can be. The samples are reparametrised if p allows it. The log density of q is minus
    infinity outside of its support.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event and batch shape.
        num_samples: number of samples per batch element.
        by: name of the calling function, for error messages.

    Raises:
        ValueError: if a log density is NaN, or many samples are rounded to an end of the support of p.

    Example:
        >>> from torch.distributions import Uniform
        >>> log_densities(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 2, by="mine")
        (tensor([0., 0.], dtype=torch.float64), tensor([-inf, -inf], dtype=torch.float64), torch.float32)
    """
    (p, dtype_p), (q, dtype_q) = doubled(p), doubled(q)
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    with torch.no_grad():
        valid = q.sample((num_samples,))  # replaces points outside the support
    check_draws(p, x.detach(), by=by)
    y = x.to(valid.dtype)
    inside = is_inside(q, y)
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = log_prob_of(p, x)
    log_q = log_prob_of(q, torch.where(event, y, valid)).masked_fill(~inside, -torch.inf)
    for side, log_density in ((p, log_p), (q, log_q)):
        if num_nan := int(log_density.isnan().sum()):
            raise ValueError(
                f"{by} wants densities, but log_prob of {type(unwrap(side)).__name__} is NaN at {num_nan} of the "
                f"{log_density.numel()} samples of {type(unwrap(p)).__name__}. Check its parameters."
            )
    return log_p, log_q, torch.promote_types(dtype_p or log_p.dtype, dtype_q or log_q.dtype)
