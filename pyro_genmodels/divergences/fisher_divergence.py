r"""The Fisher divergence, between scores instead of densities.

.. math:: F(p \| q) = \mathbb{E}_p\bigl[|\nabla \log p(x) - \nabla \log q(x)|^2\bigr]

No constant of either density matters, so that it holds for energies. Of densities that are mixtures of parts far apart it
hardly sees the weights. Johnson, *Information Theory and the Central Limit Theorem* (2004); Hyvärinen (JMLR 2005).
"""

from __future__ import annotations

__all__ = ["fisher"]

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_genmodels.divergences.densities import check_events, check_number
from pyro_genmodels.divergences.kullback_leibler import Divergence
from pyro_genmodels.utils.distributions import density_of, sum_event


def fisher(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """F(p || q): the mean over draws from p of the squared distance of the two scores.

    Args:
        p: the distribution that is drawn from; an energy by its sampler.
        q: the other, of the same event shape. Neither need be normalised.
        num_samples: draws per batch element, at least 2.

    Returns:
        Value (inverse squared units of the data) and standard error, of the two batch shapes broadcast. The value carries
        gradients to the parameters of q. A draw of p where q has no density makes it infinite.

    Raises:
        ValueError: on different event shapes, on fewer than 2 draws, and without two densities over real numbers.

    Example:
        >>> import pyro.distributions as dist
        >>> fisher(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).value
        tensor(1.)
    """
    check_events(p, q, by="fisher")
    check_number(num_samples, by="fisher")
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
        x_of_q = x
        if not inside.all():  # any points q can score
            x_of_q = torch.where(inside.reshape(inside.shape + (1,) * len(q.event_shape)), x, q.sample((num_samples,)))
    difference = score_of(p, x).detach() - score_of(q, x_of_q)
    squares = sum_event(difference.square(), len(p.event_shape)).masked_fill(~inside, torch.inf)
    value = squares.mean(0)
    std_error = squares.detach().std(0) / num_samples**0.5
    return Divergence(value, torch.where(value.detach().isinf(), torch.zeros_like(std_error), std_error))


def score_of(dist: Distribution, x: Tensor) -> Tensor:
    """The gradient of the log density in x, of the shape of x; with a graph to the parameters where gradients are enabled."""
    create_graph = torch.is_grad_enabled() and _unnormalized(dist, x[:1]).requires_grad
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_p = _unnormalized(dist, x).sum()
        if not log_p.requires_grad:  # a density that is flat
            return torch.zeros_like(x)
        (score,) = torch.autograd.grad(log_p, x, create_graph=create_graph, allow_unused=True, materialize_grads=True)
    return score


def _unnormalized(dist: Distribution, x: Tensor) -> Tensor:
    """Log densities but for constants, also of an energy inside Pyro's wrappers: (draws..., *batch_shape)."""
    if isinstance(dist, Independent):
        return sum_event(_unnormalized(dist.base_dist, x), dist.reinterpreted_batch_ndims)
    if isinstance(dist, ExpandedDistribution):
        return _unnormalized(dist.base_dist, x)
    return getattr(dist, "unnormalized_log_prob", dist.log_prob)(x)
