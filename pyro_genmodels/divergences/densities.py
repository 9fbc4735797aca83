r"""Validation of two distributions, and their log densities at samples of one of them.

A log density is one with respect to a *measure*: counts for discrete distributions and point masses, volumes for continuous
ones, areas for those on a sphere or simplex. Ratios of densities mean something for one and the same measure only.
Distributions with different measures are mutually singular: each has its mass where the other has none.
"""

from __future__ import annotations

__all__ = [
    "COUNTS", "are_singular", "check_densities", "check_events", "check_measures", "check_num_samples", "common_batch",
    "log_densities", "log_prob_of", "mean_of", "measure_of", "score_function", "support_of",
]  # fmt: skip

from collections.abc import Iterator
from math import ceil

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import corr_matrix, sphere
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.constraints import Constraint

from pyro_genmodels.utils.distances import in_doubles
from pyro_genmodels.utils.distributions import density_of, unwrap, without_validation
from pyro_genmodels.utils.pareto import MAX_PARETO_K, pareto_k, smooth_log_weights

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


def check_events(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise an error unless p and q are distributions with the same event shape and batch shapes that broadcast.

    Args:
        p: distribution.
        q: other distribution.
        by: name of the calling function, for error messages.
    """
    for name, side in (("p", p), ("q", q)):
        if not isinstance(side, Distribution):
            raise TypeError(
                f"{by} wants distributions, but {name} is a {type(side).__name__}. For samples see wasserstein, "
                "sliced_wasserstein and mmd, or divergence_table."
            )
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


def check_num_samples(num_samples: int, *, by: str, least: int = 2) -> None:
    """Raise a ValueError if there are too few samples for a standard error."""
    if num_samples < least:
        raise ValueError(f"{by} wants at least {least} samples for a standard error, but found num_samples={num_samples}.")


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
                f"{by} wants two exact densities, but {name} is a {type(side).__name__}, whose density is: {density}. "
                "Compare samples instead, by c2st or mmd."
            )
        for part in _parts(side):
            if problem := _problem(part):
                raise ValueError(f"{by} wants two normalised densities, but {name} is or holds a {problem}")
        if measure_of(side) is None:
            raise ValueError(
                f"{by} wants probabilities or densities, but {name} is a {type(side).__name__} that mixes both: its log_prob "
                "adds probabilities of points to densities. Compare its parts, or samples, by wasserstein or mmd."
            )


def check_measures(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise a ValueError for a continuous against a discrete distribution, but not for one against a point mass."""
    if (discrete := support_of(p).is_discrete) != support_of(q).is_discrete and VOLUMES in (measure_of(p), measure_of(q)):
        names = ("p", "q") if discrete else ("q", "p")
        raise ValueError(
            f"{by} wants two continuous or two discrete distributions, but p is a {type(p).__name__} over {p.support} and q a "
            f"{type(q).__name__} over {q.support}: the probabilities of {names[0]} are no densities of {names[1]}. Use "
            "Dequantized for integers, or compare samples by wasserstein."
        )


def _parts(fn: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and all distributions inside of it."""
    yield fn
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from _parts(part)


def _problem(part: Distribution) -> str:
    """Return what is wrong with a part that makes a density not normalised, and the way out; empty if nothing is."""
    if isinstance(part, MaskedDistribution):
        return f"masked {type(part.base_dist).__name__}, whose log_prob is 0 where it is masked. Leave .mask() out."
    if isinstance(part, dist.Empirical):
        return "Empirical, whose log_prob takes one value at a time. Compare its samples, by wasserstein or mmd."
    if isinstance(part, dist.ImproperUniform):
        return "ImproperUniform, which has no normalised density. Use a proper distribution, such as a wide Normal."
    if isinstance(part, (dist.Delta, dist.Unit)):
        log_factor = part.log_density if isinstance(part, dist.Delta) else part.log_factor
        if bool((torch.as_tensor(log_factor) != 0).any()):
            return f"{type(part).__name__} with a weight: its log_prob at the point is not 0. Leave the weight out."
    return ""


def measure_of(fn: Distribution) -> str | None:
    """Return the name of the measure that a density is one of; None for a mixture of several.

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
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return MANIFOLDS.get(type(support), VOLUMES)


def are_singular(p: Distribution, q: Distribution) -> bool:
    """Return True if the distributions have different measures, so that neither has mass where the other has.

    Example:
        >>> are_singular(dist.Delta(torch.zeros(())), dist.Normal(0.0, 1.0))
        True
    """
    return measure_of(p) != measure_of(q)


def common_batch(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution]:
    """Return both distributions expanded to their common batch shape."""
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = (side if side.batch_shape == shape else side.expand(shape) for side in (p, q))
    return p, q


def log_prob_of(fn: Distribution, x: Tensor) -> Tensor:
    """Return the log density at x, minus infinity for impossible outcomes.

    Distributions of torch that are given probabilities keep log probabilities that are cut at the rounding of their dtype, 1e-7
    or 2e-16, so that an impossible outcome is merely unlikely. Here they are not cut.

    Example:
        >>> fn = dist.Categorical(torch.tensor([1.0, 0.0]))
        >>> fn.log_prob(torch.tensor(1)), log_prob_of(fn, torch.tensor(1))
        (tensor(-15.9424), tensor(-inf))
    """
    if isinstance(fn, ExpandedDistribution):
        return log_prob_of(fn.base_dist, x).expand(x.shape[: x.ndim - len(fn.event_shape)])
    if isinstance(fn, Independent):
        return log_prob_of(fn.base_dist, x).flatten(-fn.reinterpreted_batch_ndims).sum(-1)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        part, x = without_validation(fn.component_distribution), x.unsqueeze(-1 - len(fn.event_shape))
        inside = log_prob_of(part, x).masked_fill(~support_of(part).check(x), -torch.inf)
        mixing = fn.mixture_distribution
        weights = _log(mixing.probs) if "probs" in vars(mixing) else mixing.logits.log_softmax(-1)
        return (inside + weights).logsumexp(-1)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return log_prob_of(next(part for part in _parts(fn) if part is not fn), x.argmax(-1))
    if isinstance(fn, torch.distributions.Bernoulli):
        if "probs" in vars(fn):
            return _log(torch.where(x > 0.5, fn.probs, 1 - fn.probs))
        return torch.nn.functional.logsigmoid(torch.where(x > 0.5, fn.logits, -fn.logits))
    if isinstance(fn, torch.distributions.Categorical) and "probs" in vars(fn):
        probs = fn.probs.expand(torch.broadcast_shapes(x.shape, fn.batch_shape) + fn.probs.shape[-1:])
        return _log(probs.gather(-1, x.long().expand(probs.shape[:-1])[..., None])[..., 0])
    if isinstance(fn, torch.distributions.Binomial) and "probs" in vars(fn):
        n, p = fn.total_count, fn.probs
        ways = torch.lgamma(n + 1.0) - torch.lgamma(x + 1.0) - torch.lgamma(n - x + 1.0)
        parts = (torch.where(count == 0, 0.0, count * _log(share)) for count, share in ((x, p), (n - x, 1 - p)))
        return ways + sum(parts)
    return fn.log_prob(x)


def _log(probs: Tensor) -> Tensor:
    """Return logs, minus infinity at zero with a gradient of zero."""
    impossible = probs == 0
    return torch.where(impossible, 1.0, probs).log().masked_fill(impossible, -torch.inf)


def log_densities(p: Distribution, q: Distribution, num_samples: int, *, by: str) -> tuple[Tensor, Tensor]:
    """Return the log densities of p and q at samples of p, (num_samples, batch...) each.

    The samples are reparametrised if p allows it. The log density of q is minus infinity outside of its support.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event and batch shape.
        num_samples: number of samples per batch element.
        by: name of the calling function, for error messages.

    Raises:
        ValueError: if a log density is NaN.

    Example:
        >>> from torch.distributions import Uniform
        >>> log_densities(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 2, by="mine")
        (tensor([0., 0.]), tensor([-inf, -inf]))
    """
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    with torch.no_grad():
        valid = q.sample((num_samples,))  # replaces points outside the support
    y = x.to(valid.dtype)
    inside = support_of(q).check(y)
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = log_prob_of(p, x)
    log_q = log_prob_of(q, torch.where(event, y, valid)).masked_fill(~inside, -torch.inf)
    for side, log_density in ((p, log_p), (q, log_q)):
        if num_nan := int(log_density.isnan().sum()):
            raise ValueError(
                f"{by} wants densities, but log_prob of {type(unwrap(side)).__name__} is NaN at {num_nan} of the "
                f"{log_density.numel()} samples of {type(unwrap(p)).__name__}. Check its parameters."
            )
    return log_p, log_q


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


def mean_of(*strata: Tensor, bounded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean over samples of equally likely strata, its variance, and k-hat of all terms, (batch...) each, in doubles.

    If no term is negative and k-hat is below 0.7, the largest terms are smoothed by the generalised Pareto law of their tail
    (arXiv 1507.02646); the gradient is that of the plain mean. k-hat is that of absolute values; minus infinity where a term is
    infinite, for the mean is then known. It is fitted to the tail and to the tail of the tail, and the lower one counts: rare
    terms of another size look like a heavy tail, but get lighter further out.

    Args:
        strata: terms at the samples of each stratum, (num_samples, batch...); infinite only if that is certain.
        bounded: True if no term can exceed some bound, so that there is no heavy tail.
    """
    value = torch.stack([in_doubles(terms).mean(0) for terms in strata]).mean(0)
    fixed = in_doubles(torch.cat([terms.detach() for terms in strata]))
    infinite = fixed.isinf().any(0)
    k = torch.full_like(fixed[0], -torch.inf)
    if not bounded:
        logs = fixed.masked_fill(infinite, 0.0).abs().log()
        smoothed, k = smooth_log_weights(logs)
        has_smooth_tail = (k <= MAX_PARETO_K) & (fixed >= 0).all(0) & ~infinite
        fixed = torch.where(has_smooth_tail, smoothed.exp(), fixed)
        k = torch.fmin(k, pareto_k(logs.topk(min(len(logs), 2 * _tail_length(len(logs))), dim=0).values))
        k = k.masked_fill(infinite | (fixed == 0).all(0), -torch.inf)
    parts = fixed.split([len(terms) for terms in strata])
    smooth = torch.stack([part.mean(0) for part in parts]).mean(0)
    value = smooth + torch.where(infinite, 0.0, value - value.detach())
    variance = sum(part.var(0) / len(part) for part in parts) / len(parts) ** 2
    return value, variance.masked_fill(infinite, 0.0), k


def _tail_length(n: int) -> int:
    """Return the number of terms among n that k-hat is fitted to."""
    return ceil(min(n / 5, 3 * n**0.5))


def score_function(terms: Tensor, log_p: Tensor, p: Distribution) -> Tensor | float:
    """Return a zero whose gradient is that of the mean of terms by the score function, (batch...), if p is not reparametrised.

    Args:
        terms: terms at samples of p, (num_samples, batch...).
        log_p: log density of p at the samples, of the same shape.
        p: distribution of the samples.
    """
    if p.has_rsample or not log_p.requires_grad:
        return 0.0
    surrogate = (torch.where(terms.isfinite(), terms, 0.0).detach() * log_p).mean(0)
    return surrogate - surrogate.detach()
