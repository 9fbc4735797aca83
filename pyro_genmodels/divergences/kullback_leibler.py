r"""The Kullback-Leibler divergence between two distributions.

.. math:: \mathrm{KL}(p \| q) = \mathbb{E}_p[\log p(x) - \log q(x)]

It is infinite if p has mass where q has none, and it is not symmetric: minimising KL(p || q) makes q cover all modes of p,
minimising KL(q || p) makes it pick one.
Kullback and Leibler, *On Information and Sufficiency* (1951).
"""

from __future__ import annotations

__all__ = ["kl", "reverse_kl"]

import torch
from torch.distributions import Distribution

from pyro_genmodels.divergences.convex import KullbackLeibler
from pyro_genmodels.divergences.densities import check_densities, check_events, common_batch, log_densities
from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.exact import in_closed_form
from pyro_genmodels.divergences.means import check_num_samples, differ_by_rounding, mean_of, score_function
from pyro_genmodels.divergences.measures import check_measures


def kl(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return KL(p || q), in closed form or as a finite sum if possible, and otherwise as a mean over samples of p.

    The value has gradients with respect to the parameters of q and of p; for p they come from reparametrised samples or,
    without these, from the score function.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event shape.
        num_samples: number of samples per batch element, at least 2.

    Returns:
        Value and standard error, of the broadcast batch shape, and k-hat of the log ratios; a RuntimeWarning is issued if it is
        above 0.7. If a sample of p lies outside of the support of q, or one of the two is a point mass and the other has a
        density, the value is infinite and its error is 0.

    Raises:
        TypeError: for anything but distributions.
        ValueError: for different event shapes, fewer than 2 samples, a distribution without an exact, normalised density (such
            as a masked one), a continuous against a discrete distribution, a log density that is NaN, or many draws that are
            rounded to an end of their support.

    Example:
        >>> import pyro.distributions as dist
        >>> kl(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)).value
        tensor(0.5000)
    """
    check_events(p, q, by="kl")
    check_densities(p, q, by="kl")
    check_measures(p, q, by="kl")
    known = in_closed_form(p, q, KullbackLeibler(), by="kl")
    if known is not None:
        return Divergence(known[0], torch.zeros_like(known[0].detach()))
    check_num_samples(num_samples, by="kl")
    p, q = common_batch(p, q)
    log_p, log_q, dtype = log_densities(p, q, num_samples, by="kl")
    terms = log_p - log_q
    value, variance, k = mean_of(terms, bounded=differ_by_rounding(log_p, log_q))
    value = value + score_function(terms, log_p, p)
    found = Divergence(value.to(dtype), variance.sqrt().to(dtype), k.to(dtype), num_samples)
    return warn_unless_reliable(found, by="kl")


def reverse_kl(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return KL(q || p); see `kl`.

    Example:
        >>> import pyro.distributions as dist
        >>> reverse_kl(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0)) == kl(dist.Normal(0.0, 2.0), dist.Normal(0.0, 1.0))
        True
    """
    return kl(q, p, num_samples=num_samples)
