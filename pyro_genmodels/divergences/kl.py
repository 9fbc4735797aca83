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

from pyro_genmodels.distributions.base import density_of


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
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"kl wants two distributions of one event shape, but p has {tuple(p.event_shape)} and q {tuple(q.event_shape)}. "
            "Use .to_event() on the one with fewer dimensions."
        )
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
    if num_samples < 2:
        raise ValueError(f"kl wants at least 2 draws for an error bar, got num_samples={num_samples}.")
    for name, dist in (("p", p), ("q", q)):
        density, _ = density_of(dist)
        if density != "exact":
            raise ValueError(
                f"kl wants two exact densities, but {name} is a {type(dist).__name__}, whose density is: {density}. "
                "Compare draws instead, by c2st or mmd."
            )
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    inside = q.support.check(x)
    with torch.no_grad():
        elsewhere = q.sample((num_samples,))  # any points q can score
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = p.log_prob(x)
    log_q = q.log_prob(torch.where(event, x, elsewhere.to(x.dtype))).masked_fill(~inside, -torch.inf)
    log_ratio = log_p - log_q
    value = log_ratio.mean(0)
    std_error = log_ratio.detach().std(0) / num_samples**0.5
    if not p.has_rsample and log_p.requires_grad:
        weight = torch.where(log_ratio.isfinite(), log_ratio, 0.0).detach()
        surrogate = (weight * log_p).mean(0)
        value = value + surrogate - surrogate.detach()
    return Divergence(value, torch.where(value.detach().isinf(), torch.zeros_like(std_error), std_error))
