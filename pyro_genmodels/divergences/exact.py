r"""Divergences that are known exactly: of point masses, of mutually singular distributions, as finite sums, and in closed form.

For a point mass at v, with :math:`q_v` the probability of v under q and :math:`h(r) = 2 q f(p/q) / (p + q)`,

.. math:: D_f(\delta_v \| q) = q_v f(1 / q_v) + (1 - q_v) f(0) = \tfrac{1 + q_v}{2} h(-\log q_v) + (1 - q_v) f(0),

and :math:`f(0) + f'(\infty)` if q has a density, or if the two are singular in another way. Between normal distributions

.. math:: \log \int p^\alpha q^{1 - \alpha} = \tfrac12 \log \frac{|\Sigma_p|^{1 - \alpha} |\Sigma_q|^\alpha}{|S|}
    - \frac{\alpha (1 - \alpha)}{2} (\mu_p - \mu_q)^\top S^{-1} (\mu_p - \mu_q), \qquad
    S = \alpha \Sigma_q + (1 - \alpha) \Sigma_p,

infinite unless S is positive definite. Gil, Alajaji and Linder, *Rényi divergence measures for commonly used univariate
continuous distributions* (2013).
"""

from __future__ import annotations

__all__ = ["in_closed_form"]

import torch
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import (
    ContinuousBernoulli,
    Distribution,
    HalfCauchy,
    HalfNormal,
    Independent,
    LowRankMultivariateNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    Uniform,
    kl_divergence,
)

from pyro_genmodels.divergences.convex import ConvexFunction, KullbackLeibler
from pyro_genmodels.divergences.densities import common_batch, doubled
from pyro_genmodels.divergences.log_probabilities import log_prob_of
from pyro_genmodels.divergences.measures import are_singular, is_inside
from pyro_genmodels.utils.distributions import modules_and_tensors, parts_of, sum_event, unwrap, without_validation


def in_closed_form(p: Distribution, q: Distribution, f: ConvexFunction, *, by: str) -> tuple[Tensor, str] | None:
    """Return the value (batch...) and "closed form" or "exact sum"; None if the divergence must be estimated.

    Args:
        p: distribution with a normalised density.
        q: other distribution, of the same event shape.
        f: convex function.
        by: name of the calling function, for error messages.

    Raises:
        ValueError: if the value is NaN, because parameters are.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_genmodels.divergences import JensenShannon, NeymanChiSquared
        >>> in_closed_form(dist.Bernoulli(0.2), dist.Bernoulli(0.5), JensenShannon(), by="mine")
        (tensor(0.0507), 'exact sum')
        >>> in_closed_form(dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0), NeymanChiSquared(), by="mine")
        (tensor(inf), 'closed form')
    """
    (p, dtype_p), (q, dtype_q) = doubled(p), doubled(q)
    known = _known(p, q, f)
    if known is not None and (num_nan := int(known[0].detach().isnan().sum())):
        raise ValueError(
            f"{by} wants densities, but {num_nan} of {known[0].numel()} divergences of {type(unwrap(p)).__name__} and "
            f"{type(unwrap(q)).__name__} are NaN. Check the parameters of both."
        )
    if known is None:
        return None
    value, source = known
    return value.to(torch.promote_types(dtype_p or value.dtype, dtype_q or value.dtype)), source


def _known(p: Distribution, q: Distribution, f: ConvexFunction) -> tuple[Tensor, str] | None:
    """Return the value, which may be NaN, and "closed form" or "exact sum"; None if it must be estimated."""
    if are_singular(p, q):
        shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
        like = [tensor for tensor in modules_and_tensors((p, q))[1] if tensor.is_floating_point()] or [torch.zeros(())]
        return like[0].new_full(shape, f.at_zero + f.slope_at_infinity), "closed form"
    p, q = common_batch(p, q)
    for one, other, limit, sign in ((p, q, f.at_zero, -1), (q, p, f.slope_at_infinity, 1)):
        if isinstance(unwrap(one), Delta):
            v = one.sample()
            log_mass = log_prob_of(without_validation(other), v).masked_fill(~is_inside(other, v), -torch.inf)
            mass = log_mass.exp()
            rest = torch.where(mass == 1, 0.0, (1 - mass) * limit)
            return (1 + mass) / 2 * f.mean_term(sign * log_mass) + rest, "closed form"
    if (total := _finite_sum(p, q, f)) is not None:
        return total, "exact sum"
    value = _of_normals(p, q, f)
    if value is None:
        value = _sum_of_kullback_leibler(p, q, f)
    return None if value is None else (value, "closed form")


def _finite_sum(p: Distribution, q: Distribution, f: ConvexFunction) -> Tensor | None:
    """Return the sum over the outcomes of two discrete distributions of numbers, (batch...); None if it is not finite."""
    if p.event_shape or not (p.has_enumerate_support and q.has_enumerate_support):
        return None
    try:
        x, y = p.enumerate_support(expand=False), q.enumerate_support(expand=False)
    except NotImplementedError:  # the supports differ within a batch
        return None
    if x.numel() != len(x) or y.numel() != len(y):
        return None
    outcomes = torch.cat([x.flatten().double(), y.flatten().double()]).unique()
    logs = []
    for side, values in ((p, x), (q, y)):
        log = log_prob_of(side, values)
        log = log - log.logsumexp(0)  # to the last digit
        places = torch.searchsorted(outcomes, values.flatten().double())
        logs.append(log.new_full((len(outcomes), *log.shape[1:]), -torch.inf).index_copy(0, places, log))
    log_p, log_q = logs
    possible = (log_p > -torch.inf) | (log_q > -torch.inf)
    weight = (log_p.exp() + log_q.exp()) / 2
    terms = f.mean_term(torch.where(possible, log_p, 0.0) - torch.where(possible, log_q, 0.0))
    return torch.where(possible, weight * terms, 0.0).sum(0)


def _of_normals(p: Distribution, q: Distribution, f: ConvexFunction) -> Tensor | None:
    """Return the divergence of two normal distributions for an f that is a power, (batch...); None for others."""
    if f.power is None:
        return None
    alpha, factor = f.power
    one, other = unwrap(p), unwrap(q)
    if isinstance(one, Normal) and isinstance(other, Normal):
        z = (one.loc - other.loc) / one.scale
        growth = (other.scale - one.scale) * (other.scale + one.scale) / one.scale.square()  # of the variance
        spread = 1 + alpha * growth
        diverges = spread <= 0
        log_det = alpha * _log1p(growth, 2 * (other.scale.log() - one.scale.log()))
        log_det = log_det - torch.where(diverges, 0.0, alpha * growth).log1p()
        log_integral = (log_det - alpha * (1 - alpha) * z.square() / torch.where(diverges, 1.0, spread)) / 2
        log_integral = log_integral.masked_fill(diverges, torch.inf).expand(p.batch_shape + p.event_shape)
        log_integral = sum_event(log_integral, len(p.event_shape))
    else:
        moments = [_moments(side) for side in (p, q)]
        if None in moments:
            return None
        (loc_p, cov_p), (loc_q, cov_q) = moments
        factor_s, failed = torch.linalg.cholesky_ex(alpha * cov_q + (1 - alpha) * cov_p)
        diverges = failed > 0
        factor_s = torch.where(diverges[..., None, None], torch.eye(loc_p.shape[-1]).to(loc_p), factor_s)
        log_det = (1 - alpha) * cov_p.logdet() + alpha * cov_q.logdet() - 2 * factor_s.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        white = torch.linalg.solve_triangular(factor_s, (loc_p - loc_q)[..., None], upper=False)
        log_integral = (log_det - alpha * (1 - alpha) * white.square().sum((-2, -1))) / 2
        log_integral = log_integral.masked_fill(diverges, torch.inf)
    return factor * log_integral.expm1() / (alpha * (alpha - 1))


def _log1p(x: Tensor, log: Tensor) -> Tensor:
    """Return log(1 + x) from x if that is small, and otherwise from another expression for it, `log`, which is exact there."""
    small = x.abs() < 0.5
    return torch.where(small, torch.where(small, x, 0.0).log1p(), log)


def _moments(fn: Distribution) -> tuple[Tensor, Tensor] | None:
    """Return the mean and covariance of a normal distribution of vectors; None for any other."""
    base = unwrap(fn)
    if isinstance(base, (MultivariateNormal, LowRankMultivariateNormal)) and len(fn.event_shape) == 1:
        return base.loc, base.covariance_matrix
    if isinstance(base, Normal) and len(fn.event_shape) == 1:
        return base.loc, base.scale.square().diag_embed()
    return None


def _sum_of_kullback_leibler(p: Distribution, q: Distribution, f: ConvexFunction) -> Tensor | None:
    """Return the divergence of an f that is a sum of KL divergences known in closed form, (batch...); None for others."""
    pairs = {"forward": (p, q), "reverse": (q, p)}
    values = [_kullback_leibler(*pairs[name]) for name in f.kullback_leibler]
    known = [value for value in values if value is not None]
    return torch.stack(known).sum(0) if known and len(known) == len(values) else None


def _kullback_leibler(p: Distribution, q: Distribution) -> Tensor | None:
    """Return KL(p || q) as torch knows it, or as a sum over independent coordinates, (batch...); None for others."""
    if isinstance(p, Independent) and isinstance(q, Independent) and p.base_dist.batch_shape == q.base_dist.batch_shape:
        dims = p.reinterpreted_batch_ndims
        if dims == q.reinterpreted_batch_ndims:
            of_coordinates = _kullback_leibler(p.base_dist, q.base_dist)
            return None if of_coordinates is None else sum_event(of_coordinates, dims)
    if (total := _finite_sum(p, q, KullbackLeibler())) is not None:
        return total
    if isinstance(p, ContinuousBernoulli) and isinstance(q, Uniform):  # torch says infinite
        return torch.where((q.low <= 0) & (q.high >= 1), (q.high - q.low).log() - p.entropy(), torch.inf)
    if isinstance(p, Uniform) and isinstance(q, ContinuousBernoulli):  # torch says infinite; log q is linear
        inside = (p.low >= 0) & (p.high <= 1)
        middle = torch.where(inside, (p.low + p.high) / 2, 0.5)
        return torch.where(inside, -(p.high - p.low).log() - q.log_prob(middle), torch.inf)
    is_nothing = isinstance(p, Poisson) and bool((p.rate == 0).any())  # NaN for torch
    if is_nothing or any(_folds(part) for side in (p, q) for part in parts_of(side)):
        return None
    try:
        return kl_divergence(p, q)
    except NotImplementedError:  # torch has no formula for the pair
        return None


def _folds(fn: Distribution) -> bool:
    """Return True for a distribution by a transform that is not one to one.

    Torch returns the divergence of the bases for these too, which is right only for the halves of distributions that are
    symmetric about zero.
    """
    if not isinstance(fn, TransformedDistribution) or isinstance(fn, (HalfCauchy, HalfNormal)):
        return False
    return not all(transform.bijective for transform in fn.transforms)
