r"""f-divergences: means of a convex function of the ratio of two densities.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0)
    = \tfrac12 \mathbb{E}_p\, h(r) + \tfrac12 \mathbb{E}_q\, h(r), \qquad
    h(r) = \frac{2 q f(p / q)}{p + q},\ r = \log p - \log q .

The second form is the mean under the equal mixture of p and q. Samples of the mixture reach the regions where only one of the
two has mass, and h is bounded if f(0) and :math:`f'(\infty)` are finite. Csiszár (1967); Liese and Vajda, *On Divergences and
Informations in Statistics and Information Theory* (2006).
"""

from __future__ import annotations

__all__ = ["f_divergence", "js", "tv"]

import torch
from torch.distributions import Distribution

from pyro_genmodels.divergences.convex import ConvexFunction, JensenShannon, TotalVariation
from pyro_genmodels.divergences.densities import check_densities, check_events, common_batch, log_densities
from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.exact import in_closed_form
from pyro_genmodels.divergences.means import check_num_samples, differ_by_rounding, mean_of, score_function
from pyro_genmodels.divergences.measures import check_measures
from pyro_genmodels.utils.errors import repr_or_class
from pyro_genmodels.utils.precision import in_doubles


def f_divergence(p: Distribution, q: Distribution, f: ConvexFunction, *, num_samples: int = 10_000) -> Divergence:
    """Return D_f(p || q), in closed form or as a finite sum if possible, and otherwise as a mean over samples of both.

    Closed forms are torch's for KL, reverse KL and Jeffreys, and those of normal distributions for powers: Pearson, Neyman,
    squared Hellinger and `Alpha`. Point masses are exact against anything, and share no mass with a density. The sum is that
    over the outcomes of two discrete distributions of single numbers with finite supports. The value has gradients with respect
    to the parameters of both, through reparametrised samples or, without these, by the score function. It has none
    through the ends of a support that moves with the parameters.

    Args:
        p: distribution with an exact density.
        q: other distribution, of the same event shape.
        f: convex function, such as `JensenShannon()`, or your own in a `Convex`.
        num_samples: number of samples per batch element, at least 4; half of them are from p and half from q.

    Returns:
        Value and standard error (of the two strata together), of the broadcast batch shape, and k-hat of the terms. If a sample
        proves that the value is infinite, the value is infinite and its error is 0. If f(0) or the slope at infinity is
        infinite, the terms may have no variance, or the divergence may be infinite without a sample that proves it: k-hat above
        0.7 says so, and a RuntimeWarning. The largest terms are smoothed by their Pareto tail where no term is negative.

    Raises:
        TypeError: if f is no `ConvexFunction`.
        ValueError: for different event shapes, fewer than 4 samples, a distribution without an exact, normalised density (such
            as a masked one), a continuous against a discrete distribution, a log density that is NaN, or many draws that are
            rounded to an end of their support.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_genmodels.divergences import Jeffreys
        >>> p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)
        >>> f_divergence(p, q, Jeffreys())
        Divergence(value=tensor(1.), std_error=tensor(0.))
        >>> f_divergence(dist.Uniform(0.0, 1.0), dist.Uniform(2.0, 3.0), TotalVariation())
        Divergence(value=tensor(1.), std_error=tensor(0.))
    """
    check_events(p, q, by="f_divergence")
    if not isinstance(f, ConvexFunction):
        raise TypeError(
            f"f_divergence wants a convex function such as KullbackLeibler(), but found {repr_or_class(f)}. Wrap your own "
            "function: Convex(function, at_zero=..., slope_at_infinity=...)."
        )
    check_densities(p, q, by="f_divergence")
    check_measures(p, q, by="f_divergence")
    if (known := in_closed_form(p, q, f, by="f_divergence")) is not None:
        return Divergence(known[0], torch.zeros_like(known[0].detach()))
    check_num_samples(num_samples, by="f_divergence", least=4)
    p, q = common_batch(p, q)
    strata, gradient, bounded = [], 0.0, True
    for one, other, sign, size in ((p, q, 1, num_samples // 2), (q, p, -1, num_samples - num_samples // 2)):
        log_one, log_other, dtype = log_densities(one, other, size, by="f_divergence")
        terms = f.mean_term(sign * in_doubles(log_one - log_other))
        strata.append(terms)
        bounded = bounded and differ_by_rounding(log_one, log_other)
        gradient = gradient + score_function(terms, log_one, one) / 2
    value, variance, k = mean_of(*strata, bounded=bounded or f.bounded)
    found = Divergence((value + gradient).to(dtype), variance.sqrt().to(dtype), k.to(dtype), num_samples)
    return warn_unless_reliable(found, by="f_divergence")


def js(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return the Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, in nats, at most log 2.

    See `f_divergence`.

    Example:
        >>> import pyro.distributions as dist
        >>> js(dist.Uniform(0.0, 1.0), dist.Uniform(2.0, 3.0)).value  # log 2
        tensor(0.6931)
    """
    return f_divergence(p, q, JensenShannon(), num_samples=num_samples)


def tv(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """Return the total variation distance, the largest difference between the probabilities of an event, at most 1.

    See `f_divergence`.

    Example:
        >>> import pyro.distributions as dist
        >>> tv(dist.Bernoulli(0.2), dist.Bernoulli(0.5)).value
        tensor(0.3000)
    """
    return f_divergence(p, q, TotalVariation(), num_samples=num_samples)
