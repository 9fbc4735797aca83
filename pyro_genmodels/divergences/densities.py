"""Two distributions as densities at the draws of one of them, checked where they come in."""

from __future__ import annotations

__all__ = ["check_densities", "check_events", "check_number", "log_densities", "mean_of", "support_of"]

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_genmodels.utils.distributions import density_of


def check_events(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raises an error, in the name of what asks, unless both are distributions and have one event shape."""
    for name, dist in (("p", p), ("q", q)):
        if not isinstance(dist, Distribution):
            raise TypeError(
                f"{by} wants distributions, but {name} is of {type(dist).__name__}. Between draws see wasserstein, "
                "sliced_wasserstein and mmd, or divergence_table."
            )
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"{by} wants two distributions of one event shape, but p has {tuple(p.event_shape)} and q "
            f"{tuple(q.event_shape)}. Use .to_event() on the one with fewer dimensions."
        )


def check_number(num_samples: int, *, by: str, least: int = 2) -> None:
    """Raises a ValueError for fewer draws than an error bar takes."""
    if num_samples < least:
        raise ValueError(f"{by} wants at least {least} draws for an error bar, got num_samples={num_samples}.")


def check_densities(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raises a ValueError unless both have a normalised density that is exact."""
    for name, dist in (("p", p), ("q", q)):
        density, _ = density_of(dist)
        if density != "exact":
            raise ValueError(
                f"{by} wants two exact densities, but {name} is a {type(dist).__name__}, whose density is: {density}. "
                "Compare draws instead, by c2st or mmd."
            )


def log_densities(p: Distribution, q: Distribution, num_samples: int) -> tuple[Tensor, Tensor]:
    """The log densities of both at draws of p, reparametrised where that is to be had: two of (num_samples, batch...).

    That of q is minus infinity outside of its support.

    Args:
        p: the distribution that is drawn from.
        q: the other, of the same event and batch shape.
        num_samples: draws per batch element.

    Example:
        >>> from torch.distributions import Uniform
        >>> log_densities(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 2)
        (tensor([0., 0.]), tensor([-inf, -inf]))
    """
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    inside = support_of(q).check(x)
    with torch.no_grad():
        elsewhere = q.sample((num_samples,))  # any points q can score
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = p.log_prob(x)
    return log_p, q.log_prob(torch.where(event, x, elsewhere.to(x.dtype))).masked_fill(~inside, -torch.inf)


def support_of(dist: Distribution) -> Constraint:
    """Where a distribution may lie, which is a ValueError for one that does not say."""
    if dist.support is None:
        raise ValueError(
            f"{type(dist).__name__} does not say where it lies, so that its draws cannot be judged. Give it a support."
        )
    return dist.support


def mean_of(terms: Tensor, log_p: Tensor, p: Distribution) -> tuple[Tensor, Tensor]:
    """The mean of terms at draws of p, and the variance of that mean, (batch...) each.

    The mean carries gradients to what p is made of: by the draws, or by the score function where they carry none.

    Args:
        terms: numbers at the draws, (num_samples, batch...).
        log_p: the log density of p there, of the same shape.
        p: the distribution they were drawn from.
    """
    value, variance = terms.mean(0), terms.detach().var(0) / len(terms)
    if not p.has_rsample and log_p.requires_grad:
        surrogate = (torch.where(terms.isfinite(), terms, 0.0).detach() * log_p).mean(0)
        value = value + surrogate - surrogate.detach()
    return value, torch.where(value.detach().isinf(), torch.zeros_like(variance), variance)
