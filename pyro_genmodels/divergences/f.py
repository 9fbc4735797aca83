r"""f-divergences: means of a convex function of the ratio of two densities.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0)
    = \tfrac12 \mathbb{E}_p\, h(r) + \tfrac12 \mathbb{E}_q\, h(r), \qquad
    h(r) = \frac{2 q f(p / q)}{p + q},\ r = \log p - \log q .

The second form is the mean under the equal mixture of p and q. Samples of the mixture reach the regions where only one of the
two has mass, and h is bounded if f(0) and :math:`f'(\infty)` are finite. Csiszár (1967); Liese and Vajda, *On Divergences and
Informations in Statistics and Information Theory* (2006).
"""

from __future__ import annotations

__all__ = ["f_divergence", "in_closed_form", "js", "tv"]

import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_genmodels.divergences.convex import (
    ConvexFunction,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    ReverseKullbackLeibler,
    TotalVariation,
)
from pyro_genmodels.divergences.densities import (
    check_densities,
    check_events,
    check_num_samples,
    log_densities,
    mean_of,
    support_of,
)
from pyro_genmodels.divergences.kullback_leibler import Divergence


def f_divergence(p: Distribution, q: Distribution, f: ConvexFunction, *, num_samples: int = 10_000) -> Divergence:
    """Return D_f(p || q), in closed form or as a finite sum if possible, and otherwise as a mean over samples of both.

    Closed forms are torch's, for KL, reverse KL and Jeffreys. The sum is used for two discrete distributions of single numbers
    with the same finite support. The value has gradients with respect to the parameters of both distributions, through
    reparametrised samples or, without these, by the score function. It has none through the ends of a support that moves with
    the parameters.

    Args:
        p: distribution with an exact density.
        q: other distribution, of the same event shape.
        f: convex function, such as `JensenShannon()`, or your own in a `Convex`.
        num_samples: number of samples per batch element, at least 4; half of them are from p and half from q.

    Returns:
        Value and standard error (of the two strata together), of the broadcast batch shape. If a sample proves that the value
        is infinite, the value is infinite and its error is 0. If f(0) or the slope at infinity is infinite, the terms may have
        no variance, and the reported error is then too small.

    Raises:
        TypeError: if f is no `ConvexFunction`.
        ValueError: for different event shapes, fewer than 4 samples, a distribution without an exact, normalised density, or a
            continuous against a discrete distribution.

    Example:
        >>> import pyro.distributions as dist
        >>> p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0)
        >>> f_divergence(p, q, Jeffreys())
        Divergence(value=tensor(1.), std_error=tensor(0.))
        >>> f_divergence(dist.Uniform(0.0, 1.0), dist.Uniform(2.0, 3.0), TotalVariation())
        Divergence(value=tensor(1.), std_error=tensor(0.))
    """
    check_events(p, q, by="f_divergence")
    if not isinstance(f, ConvexFunction):
        given = f"the class {f.__name__}; call it" if isinstance(f, type) else repr(f)
        raise TypeError(
            f"f_divergence wants a convex function such as KullbackLeibler(), but found {given}. Wrap your own function: "
            "Convex(function, at_zero=..., slope_at_infinity=...)."
        )
    if (known := in_closed_form(p, q, f)) is not None:
        return Divergence(known[0], torch.zeros_like(known[0].detach()))
    check_num_samples(num_samples, by="f_divergence", least=4)
    check_densities(p, q, by="f_divergence")
    if support_of(p).is_discrete != support_of(q).is_discrete:
        raise ValueError(
            f"f_divergence wants two continuous or two discrete distributions, but p is a {type(p).__name__} over {p.support} "
            f"and q a {type(q).__name__} over {q.support}. Use Dequantized for integers, or compare samples by wasserstein."
        )
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    log_p, log_q = log_densities(p, q, num_samples // 2)
    mean_p, variance_p = mean_of(f.mean_term(log_p - log_q), log_p, p)
    log_q, log_p = log_densities(q, p, num_samples - num_samples // 2)
    mean_q, variance_q = mean_of(f.mean_term(log_p - log_q), log_q, q)
    value, std_error = (mean_p + mean_q) / 2, (variance_p + variance_q).sqrt() / 2
    return Divergence(value, torch.where(value.detach().isinf(), torch.zeros_like(std_error), std_error))


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


def in_closed_form(p: Distribution, q: Distribution, f: ConvexFunction) -> tuple[Tensor, str] | None:
    """Return the value (batch...) and "closed form" or "exact sum"; None if the divergence must be estimated.

    Example:
        >>> import pyro.distributions as dist
        >>> in_closed_form(dist.Bernoulli(0.2), dist.Bernoulli(0.5), JensenShannon())
        (tensor(0.0507), 'exact sum')
    """
    pairs = {KullbackLeibler: [(p, q)], ReverseKullbackLeibler: [(q, p)], Jeffreys: [(p, q), (q, p)]}.get(type(f), [])
    try:
        if pairs:
            return torch.stack([kl_divergence(*pair) for pair in pairs]).sum(0), "closed form"
    except NotImplementedError:
        pass
    total = _finite_sum(p, q, f)
    return None if total is None else (total, "exact sum")


def _finite_sum(p: Distribution, q: Distribution, f: ConvexFunction) -> Tensor | None:
    """Return the sum over the common support of two discrete distributions of numbers, (batch...); None if it is not finite."""
    if p.event_shape or not (p.has_enumerate_support and q.has_enumerate_support):
        return None
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    try:
        x, y = p.enumerate_support(expand=False), q.enumerate_support(expand=False)
    except NotImplementedError:  # the supports differ within a batch
        return None
    if len(x) != len(y) or not torch.equal(x.flatten().double(), y.flatten().double()):
        return None
    log_p, log_q = p.log_prob(x), q.log_prob(y)
    possible = (log_p > -torch.inf) | (log_q > -torch.inf)
    weight = (log_p.exp() + log_q.exp()) / 2
    terms = weight * f.mean_term(torch.where(possible, log_p - log_q, 0.0))
    return terms.sum(0)
