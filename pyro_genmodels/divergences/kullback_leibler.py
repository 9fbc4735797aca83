r"""The Kullback-Leibler divergence between two distributions.

.. math:: \mathrm{KL}(p \| q) = \mathbb{E}_p[\log p(x) - \log q(x)]

It is infinite if p has mass where q has none, and it is not symmetric: minimising KL(p || q) makes q cover all modes of p,
minimising KL(q || p) makes it pick one.
Kullback and Leibler, *On Information and Sufficiency* (1951).
"""

from __future__ import annotations

__all__ = ["Divergence", "kl", "reverse_kl"]

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_genmodels.divergences.densities import check_densities, check_events, check_num_samples, log_densities, mean_of


class Divergence(NamedTuple):
    """Estimate of a divergence and its standard error.

    Attributes:
        value: divergence, (batch...); in nats unless its function says otherwise.
        std_error: standard error of the value, (batch...); 0 for a closed form.
    """

    value: Tensor
    std_error: Tensor


def kl(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return KL(p || q), in closed form if torch knows one, and otherwise as a mean over samples of p.

    The value has gradients with respect to the parameters of q and of p; for p they come from reparametrised samples or,
    without these, from the score function.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event shape.
        num_samples: number of samples per batch element, at least 2.

    Returns:
        Value and standard error, of the broadcast batch shape. If a sample of p lies outside of the support of q, the value is
        infinite and its error is 0.

    Raises:
        ValueError: for different event shapes, fewer than 2 samples, or a distribution without an exact, normalised density.

    Example:
        >>> import pyro.distributions as dist
        >>> kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).value
        tensor(0.5000)
    """
    check_events(p, q, by="kl")
    try:
        value = kl_divergence(p, q)
        return Divergence(value, torch.zeros_like(value))
    except NotImplementedError:
        return _estimate(p, q, num_samples)


def reverse_kl(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return KL(q || p); see `kl`.

    Example:
        >>> import pyro.distributions as dist
        >>> reverse_kl(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)) == kl(dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0))
        True
    """
    return kl(q, p, num_samples=num_samples)


def _estimate(p: Distribution, q: Distribution, num_samples: int) -> Divergence:
    """Return the Monte Carlo estimate of KL(p || q)."""
    check_num_samples(num_samples, by="kl")
    check_densities(p, q, by="kl")
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    log_p, log_q = log_densities(p, q, num_samples)
    value, variance = mean_of(log_p - log_q, log_p, p)
    return Divergence(value, variance.sqrt())
