r"""Measures with respect to which densities are defined, and supports.

A density is defined with respect to a *measure*: counts for discrete distributions and point masses, volumes for continuous
ones, areas for those on a sphere or simplex. Ratios of densities mean something only if both have the same measure.
Distributions with different measures are mutually singular: each has its mass where the other has none.
"""

from __future__ import annotations

__all__ = ["COUNTS", "are_singular", "check_measures", "is_inside", "measure_of", "support_of"]

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import corr_matrix, sphere
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.constraints import Constraint

from pyro_genmodels.utils.distributions import coordinate_support, is_real, unwrap
from pyro_genmodels.utils.errors import type_with_article

COUNTS, VOLUMES = "counts", "volumes"
MANIFOLDS: dict[type, str] = {
    type(constraint): name
    for constraint, name in (
        (constraints.simplex, "areas of a simplex"),
        (sphere, "areas of a sphere"),
        (constraints.corr_cholesky, "areas of Cholesky factors of correlations"),
        (corr_matrix, "areas of correlations"),
        (constraints.lower_cholesky, "volumes of triangular matrices"),
        (constraints.positive_definite, "volumes of symmetric matrices"),
    )
}


def measure_of(fn: Distribution) -> str | None:
    """Return the name of the measure of a distribution's density; None for a mixture of several.

    Example:
        >>> measure_of(dist.Delta(torch.zeros(()))), measure_of(dist.Poisson(1.0)), measure_of(dist.Normal(0.0, 1.0))
        ('counts', 'counts', 'volumes')
    """
    fn = unwrap(fn)
    if isinstance(fn, dist.ZeroInflatedDistribution) and measure_of(fn.base_dist) != COUNTS:
        return None
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return measure_of(fn.component_distribution)
    if isinstance(fn, dist.MaskedMixture):
        measures = {measure_of(fn.component0), measure_of(fn.component1)}
        return measures.pop() if len(measures) == 1 else None
    if isinstance(fn, torch.distributions.TransformedDistribution) and measure_of(fn.base_dist) == COUNTS:
        return COUNTS
    support = support_of(fn)
    if isinstance(fn, (dist.Delta, dist.Empirical)) or support.is_discrete:
        return COUNTS
    return MANIFOLDS.get(type(coordinate_support(support)), VOLUMES)


def are_singular(p: Distribution, q: Distribution) -> bool:
    """Return True if the distributions have different measures, so that neither has mass where the other has.

    Example:
        >>> are_singular(dist.Delta(torch.zeros(())), dist.Normal(0.0, 1.0))
        True
    """
    return measure_of(p) != measure_of(q)


def support_of(fn: Distribution) -> Constraint:
    """Return the support of a distribution; raise a ValueError if it has none."""
    try:
        support = fn.support
    except NotImplementedError:
        support = None
    if support is None:
        raise ValueError(
            f"{type(fn).__name__} has no support, so that points outside of it cannot be recognised. Give it a support."
        )
    return support


def is_inside(fn: Distribution, x: Tensor) -> Tensor:
    """Return True for each point in the support, (samples..., batch...), given points (samples..., batch..., event...).

    The support that torch gives for a transformed distribution is all that the last transform can return. Here points are
    mapped back to the base instead, if the transforms are one to one.

    Example:
        >>> shift = torch.distributions.AffineTransform(5.0, 1.0)
        >>> fn = dist.TransformedDistribution(dist.Exponential(1.0), [shift])
        >>> fn.support.check(torch.tensor(4.0)), is_inside(fn, torch.tensor(4.0))
        (tensor(True), tensor(False))
    """
    if isinstance(fn, (ExpandedDistribution, MaskedDistribution)):
        return is_inside(fn.base_dist, x)
    if isinstance(fn, torch.distributions.Independent):
        inside = is_inside(fn.base_dist, x)
        return inside.flatten(-fn.reinterpreted_batch_ndims).all(-1) if fn.reinterpreted_batch_ndims else inside
    inside = support_of(fn).check(x)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        return inside & is_inside(fn.component_distribution, x.unsqueeze(-1 - len(fn.event_shape))).any(-1)
    if not isinstance(fn, torch.distributions.TransformedDistribution) or is_real(support_of(fn.base_dist)):
        return inside
    if not all(transform.bijective for transform in fn.transforms):
        return inside
    dims = x.ndim - len(fn.event_shape)
    for transform in reversed(fn.transforms):
        possible = transform.codomain.check(x)
        inside = inside & (possible.flatten(dims).all(-1) if possible.ndim > dims else possible)
        x = transform.inv(x)
    return inside & is_inside(fn.base_dist, x)


def check_measures(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise a ValueError for a continuous against a discrete distribution, but not for one against a point mass."""
    if support_of(p).is_discrete != support_of(q).is_discrete and VOLUMES in (measure_of(p), measure_of(q)):
        raise ValueError(
            f"{by} wants two continuous or two discrete distributions, but p is {type_with_article(p)} over {p.support} and q "
            f"{type_with_article(q)} over {q.support}. A probability is not comparable with a density. Use "
            "Dequantized for integers, or compare samples by wasserstein."
        )
