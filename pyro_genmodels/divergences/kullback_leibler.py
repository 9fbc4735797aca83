r"""The Kullback-Leibler divergence between two distributions.

.. math:: \mathrm{KL}(p \| q) = \mathbb{E}_p[\log p(x) - \log q(x)]

It is infinite where p has mass and q has none, and not symmetric: fitted forward, q covers p's modes; in reverse, it picks one.
Kullback and Leibler, *On Information and Sufficiency* (1951).
"""

from __future__ import annotations

__all__ = ["Divergence", "kl", "reverse_kl"]

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_genmodels.divergences.densities import check_densities, check_events, check_number, log_densities, mean_of


class Divergence(NamedTuple):
    """A divergence, in nats unless its function says otherwise, and the standard error of its estimate (0 for a closed form).

    Both are of shape (batch...).
    """

    value: Tensor
    std_error: Tensor


def kl(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """KL(p || q): in closed form where torch knows one, else the mean over draws from p.

    The value carries gradients to the parameters of q, and to those of p by reparametrised draws or, without these, by the
    score function.

    Args:
        p: the distribution that is drawn from.
        q: the other, of the same event shape.
        num_samples: draws per batch element, at least 2.

    Returns:
        Value and standard error, of the two batch shapes broadcast. A draw of p where q has no density makes the value
        infinite, which is certain, and its error 0.

    Raises:
        ValueError: on different event shapes, on fewer than 2 draws, and without two normalised densities.

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
    """KL(q || p); see `kl`.

    Example:
        >>> import pyro.distributions as dist
        >>> reverse_kl(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)) == kl(dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0))
        True
    """
    return kl(q, p, num_samples=num_samples)


def _estimate(p: Distribution, q: Distribution, num_samples: int) -> Divergence:
    check_number(num_samples, by="kl")
    check_densities(p, q, by="kl")
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    log_p, log_q = log_densities(p, q, num_samples)
    value, variance = mean_of(log_p - log_q, log_p, p)
    return Divergence(value, variance.sqrt())
