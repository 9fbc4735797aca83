r"""The Fisher divergence between the scores of two distributions.

.. math:: F(p \| q) = \mathbb{E}_p\bigl[|\nabla \log p(x) - \nabla \log q(x)|^2\bigr]

Normalising constants cancel, so that it can be computed for energies. For mixtures of components that are far apart it is
almost blind to the mixture weights. Johnson, *Information Theory and the Central Limit Theorem* (2004); Hyvärinen (JMLR 2005).
"""

from __future__ import annotations

__all__ = ["fisher"]

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_genmodels.divergences.densities import check_densities, check_draws, check_events, common_batch, doubled
from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.means import check_num_samples, mean_of
from pyro_genmodels.divergences.measures import COUNTS, is_inside, measure_of
from pyro_genmodels.utils.distributions import density_of, sum_event
from pyro_genmodels.utils.errors import type_with_article


def fisher(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return F(p || q), the mean over samples of p of the squared distance between the two scores.

    Args:
        p: distribution that is sampled from; an energy is sampled by its sampler.
        q: other distribution, of the same event shape. Neither needs to be normalised.
        num_samples: number of samples per batch element, at least 2.

    Returns:
        Value (inverse squared units of the data) and standard error, of the broadcast batch shape, and k-hat of the squares; a
        RuntimeWarning is issued if it is above 0.7. The value has gradients with respect to the parameters of q. It is infinite
        if a sample of p lies outside of the support of q.

    Raises:
        ValueError: for different event shapes, fewer than 2 samples, a distribution without a density over real numbers, a
            masked distribution, or a score that is NaN.

    Example:
        >>> import pyro.distributions as dist
        >>> fisher(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).value
        tensor(1.)
    """
    check_events(p, q, by="fisher")
    check_num_samples(num_samples, by="fisher")
    for name, dist in (("p", p), ("q", q)):
        density, advice = density_of(dist)
        if density == "none" or dist.support is None or measure_of(dist) == COUNTS:
            raise ValueError(
                f"fisher wants two densities over real numbers, but {name} is {type_with_article(dist)} over {dist.support}. "
                f"{advice or 'Use kl.'}"
            )
    check_densities(p, q, by="fisher", normalised=False)
    p, q = common_batch(p, q)
    (p64, dtype_p), (q64, dtype_q) = doubled(p), doubled(q)
    if dtype_p and dtype_q:
        p, q = p64, q64
    with torch.no_grad():
        x = p.sample((num_samples,))
        check_draws(p, x, by="fisher")
        inside = is_inside(q, x)
        x_valid = x
        if not inside.all():  # samples of q replace points outside of its support
            x_valid = torch.where(inside.reshape(inside.shape + (1,) * len(q.event_shape)), x, q.sample((num_samples,)))
    scores = score_of(p, x).detach(), score_of(q, x_valid)
    dtype = torch.promote_types(dtype_p, dtype_q) if dtype_p and dtype_q else torch.promote_types(*(s.dtype for s in scores))
    difference = scores[0] - scores[1]
    squares = sum_event(difference.square(), len(p.event_shape)).masked_fill(~inside, torch.inf)
    if num_nan := int(squares.detach().isnan().sum()):
        raise ValueError(f"fisher wants scores, but {num_nan} of {squares.numel()} are NaN. Check the parameters of p and q.")
    value, variance, k = mean_of(squares)
    if ((value.to(dtype).isinf() & value.isfinite()) | ((value.to(dtype) == 0) & (value != 0))).any():
        raise ValueError(
            f"fisher returns inverse squared units of the data, but {dtype} does not hold {float(value.detach().max()):.1e}. "
            "Pass parameters in double precision."
        )
    found = Divergence(value.to(dtype), variance.sqrt().to(dtype), k.to(dtype), num_samples)
    return warn_unless_reliable(found, by="fisher")


def score_of(dist: Distribution, x: Tensor) -> Tensor:
    """Return the gradient of the log density with respect to x, of the shape of x, with a graph if gradients are enabled."""
    create_graph = torch.is_grad_enabled() and _unnormalized(dist, x[:1]).requires_grad
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_p = _unnormalized(dist, x).sum()
        if not log_p.requires_grad:  # a constant density
            return torch.zeros_like(x)
        (score,) = torch.autograd.grad(log_p, x, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return score


def _unnormalized(dist: Distribution, x: Tensor) -> Tensor:
    """Return log densities up to a constant, (samples..., *batch_shape), also for an energy inside Pyro's wrappers."""
    if isinstance(dist, Independent):
        return sum_event(_unnormalized(dist.base_dist, x), dist.reinterpreted_batch_ndims)
    if isinstance(dist, ExpandedDistribution):
        return _unnormalized(dist.base_dist, x)
    return getattr(dist, "unnormalized_log_prob", dist.log_prob)(x)
