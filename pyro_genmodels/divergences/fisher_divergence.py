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

from pyro_genmodels.divergences.densities import check_events, check_num_samples
from pyro_genmodels.divergences.kullback_leibler import Divergence
from pyro_genmodels.utils.distributions import density_of, sum_event


def fisher(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return F(p || q), the mean over samples of p of the squared distance between the two scores.

    Args:
        p: distribution that is sampled from; an energy is sampled by its sampler.
        q: other distribution, of the same event shape. Neither needs to be normalised.
        num_samples: number of samples per batch element, at least 2.

    Returns:
        Value (inverse squared units of the data) and standard error, of the broadcast batch shape. The value has gradients with
        respect to the parameters of q. It is infinite if a sample of p lies outside of the support of q.

    Raises:
        ValueError: for different event shapes, fewer than 2 samples, or a distribution without a density over real numbers.

    Example:
        >>> import pyro.distributions as dist
        >>> fisher(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).value
        tensor(1.)
    """
    check_events(p, q, by="fisher")
    check_num_samples(num_samples, by="fisher")
    for name, dist in (("p", p), ("q", q)):
        density, advice = density_of(dist)
        if density == "none" or dist.support is None or dist.support.is_discrete:
            raise ValueError(
                f"fisher wants two densities over real numbers, but {name} is a {type(dist).__name__} over {dist.support}. "
                f"{advice or 'Use kl.'}"
            )
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    with torch.no_grad():
        x = p.sample((num_samples,))
        inside = q.support.check(x)
        x_valid = x
        if not inside.all():  # samples of q replace points outside of its support
            x_valid = torch.where(inside.reshape(inside.shape + (1,) * len(q.event_shape)), x, q.sample((num_samples,)))
    difference = score_of(p, x).detach() - score_of(q, x_valid)
    squares = sum_event(difference.square(), len(p.event_shape)).masked_fill(~inside, torch.inf)
    value = squares.mean(0)
    std_error = squares.detach().std(0) / num_samples**0.5
    return Divergence(value, torch.where(value.detach().isinf(), torch.zeros_like(std_error), std_error))


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
