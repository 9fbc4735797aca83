r"""f-divergences: what the ratio of two densities says, weighed by a convex function.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0)
    = \tfrac12 \mathbb{E}_p\, h(r) + \tfrac12 \mathbb{E}_q\, h(r), \qquad
    h(r) = \frac{2 q f(p / q)}{p + q},\ r = \log p - \log q .

The second form is the mean under the equal mixture of p and q. Its draws see where either has mass and the other has none, and
h is bounded if f(0) and :math:`f'(\infty)` are. Csiszár (1967); Liese and Vajda, *On Divergences and Informations in Statistics
and Information Theory* (2006).
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
from pyro_genmodels.divergences.densities import check_densities, check_events, check_number, log_densities, mean_of, support_of
from pyro_genmodels.divergences.kullback_leibler import Divergence


def f_divergence(p: Distribution, q: Distribution, f: ConvexFunction, *, num_samples: int = 10_000) -> Divergence:
    """D_f(p || q): in closed form or as a sum where there is one, else the mean over draws from both.

    The closed forms are torch's, of KL, reverse KL and Jeffreys. A sum is taken for numbers of two discrete distributions with
    the same, finite support. The value carries gradients to the parameters of both by reparametrised draws or, without these,
    by the score function; as everywhere, not through the ends of supports that move with the parameters.

    Args:
        p: a distribution with an exact density.
        q: the other, of the same event shape.
        f: a convex function, such as `JensenShannon()`, or a `Convex` of one's own.
        num_samples: draws per batch element, at least 4: half from p, half from q.

    Returns:
        Value and standard error (of both halves, added as strata are), of the two batch shapes broadcast. A draw that proves it
        infinite makes it so, with error 0. Where f(0) or its slope at infinity are infinite, the mean may be that of a law
        without variance, whose reported error is then too small.

    Raises:
        ValueError: on different event shapes, on fewer than 4 draws, without two normalised densities, and for a density
            against probabilities of integers.

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
            f"f_divergence wants the f of a divergence, such as KullbackLeibler(), but found {given}. Put a function "
            "of your own into Convex(function, at_zero=..., slope_at_infinity=...)."
        )
    if (known := in_closed_form(p, q, f)) is not None:
        return Divergence(known[0], torch.zeros_like(known[0].detach()))
    check_number(num_samples, by="f_divergence", least=4)
    check_densities(p, q, by="f_divergence")
    if support_of(p).is_discrete != support_of(q).is_discrete:
        raise ValueError(
            f"f_divergence wants two densities, or probabilities on both sides, but p is a {type(p).__name__} over {p.support} "
            f"and q a {type(q).__name__} over {q.support}. Spread integers by Dequantized, or compare draws by wasserstein."
        )
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    log_p, log_q = log_densities(p, q, num_samples // 2)
    of_p, variance_of_p = mean_of(f.mean_term(log_p - log_q), log_p, p)
    log_q, log_p = log_densities(q, p, num_samples - num_samples // 2)
    of_q, variance_of_q = mean_of(f.mean_term(log_p - log_q), log_q, q)
    value, std_error = (of_p + of_q) / 2, (variance_of_p + variance_of_q).sqrt() / 2
    return Divergence(value, torch.where(value.detach().isinf(), torch.zeros_like(std_error), std_error))


def js(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """The Jensen-Shannon divergence (KL(p || m) + KL(q || m)) / 2, m = (p + q) / 2, in nats, at most log 2; see `f_divergence`.

    Example:
        >>> import pyro.distributions as dist
        >>> js(dist.Uniform(0.0, 1.0), dist.Uniform(2.0, 3.0)).value  # log 2
        tensor(0.6931)
    """
    return f_divergence(p, q, JensenShannon(), num_samples=num_samples)


def tv(p: Distribution, q: Distribution, *, num_samples: int = 10_000) -> Divergence:
    """The total variation: the most by which p and q differ on the probability of an event, at most 1; see `f_divergence`.

    Example:
        >>> import pyro.distributions as dist
        >>> tv(dist.Bernoulli(0.2), dist.Bernoulli(0.5)).value
        tensor(0.3000)
    """
    return f_divergence(p, q, TotalVariation(), num_samples=num_samples)


def in_closed_form(p: Distribution, q: Distribution, f: ConvexFunction) -> tuple[Tensor, str] | None:
    """The value (batch...) and whether it is of a "closed form" or an "exact sum", if there is one.

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
    return _sum(p, q, f)


def _sum(p: Distribution, q: Distribution, f: ConvexFunction) -> tuple[Tensor, str] | None:
    if p.event_shape or not (p.has_enumerate_support and q.has_enumerate_support):
        return None
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = p.expand(shape), q.expand(shape)
    try:
        x, y = p.enumerate_support(expand=False), q.enumerate_support(expand=False)
    except NotImplementedError:  # elements of a batch differ in their support
        return None
    if len(x) != len(y) or not torch.equal(x.flatten().double(), y.flatten().double()):
        return None
    log_p, log_q = p.log_prob(x), q.log_prob(y)
    somewhere = (log_p > -torch.inf) | (log_q > -torch.inf)
    weight = (log_p.exp() + log_q.exp()) / 2
    terms = weight * f.mean_term(torch.where(somewhere, log_p - log_q, 0.0))
    return terms.sum(0), "exact sum"
