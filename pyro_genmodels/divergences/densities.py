"""Validation of two distributions, and their log densities at samples of one of them."""

from __future__ import annotations

__all__ = ["check_densities", "check_events", "check_num_samples", "log_densities", "mean_of", "support_of"]

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from pyro_genmodels.utils.distributions import density_of


def check_events(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise an error unless p and q are distributions with the same event shape; `by` names the calling function."""
    for name, dist in (("p", p), ("q", q)):
        if not isinstance(dist, Distribution):
            raise TypeError(
                f"{by} wants distributions, but {name} is a {type(dist).__name__}. For samples see wasserstein, "
                "sliced_wasserstein and mmd, or divergence_table."
            )
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"{by} wants two distributions of one event shape, but p has {tuple(p.event_shape)} and q "
            f"{tuple(q.event_shape)}. Use .to_event() on the one with fewer dimensions."
        )


def check_num_samples(num_samples: int, *, by: str, least: int = 2) -> None:
    """Raise a ValueError if there are too few samples for a standard error."""
    if num_samples < least:
        raise ValueError(f"{by} wants at least {least} samples for a standard error, but found num_samples={num_samples}.")


def check_densities(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise a ValueError unless both distributions have a normalised density that is exact."""
    for name, dist in (("p", p), ("q", q)):
        density, _ = density_of(dist)
        if density != "exact":
            raise ValueError(
                f"{by} wants two exact densities, but {name} is a {type(dist).__name__}, whose density is: {density}. "
                "Compare samples instead, by c2st or mmd."
            )


def log_densities(p: Distribution, q: Distribution, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return the log densities of p and q at samples of p, (num_samples, batch...) each.

    The samples are reparametrised if p allows it. The log density of q is minus infinity outside of its support.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event and batch shape.
        num_samples: number of samples per batch element.

    Example:
        >>> from torch.distributions import Uniform
        >>> log_densities(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 2)
        (tensor([0., 0.]), tensor([-inf, -inf]))
    """
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    inside = support_of(q).check(x)
    with torch.no_grad():
        valid = q.sample((num_samples,))  # replaces points outside the support
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = p.log_prob(x)
    return log_p, q.log_prob(torch.where(event, x, valid.to(x.dtype))).masked_fill(~inside, -torch.inf)


def support_of(dist: Distribution) -> Constraint:
    """Return the support of a distribution; raise a ValueError if it has none."""
    if dist.support is None:
        raise ValueError(
            f"{type(dist).__name__} has no support, so that points outside of it cannot be recognised. Give it a support."
        )
    return dist.support


def mean_of(terms: Tensor, log_p: Tensor, p: Distribution) -> tuple[Tensor, Tensor]:
    """Return the mean of terms at samples of p, and the variance of that mean, (batch...) each.

    The mean has gradients with respect to the parameters of p: through reparametrised samples, or else by the score function.

    Args:
        terms: terms at the samples, (num_samples, batch...).
        log_p: log density of p at the samples, of the same shape.
        p: distribution of the samples.
    """
    value, variance = terms.mean(0), terms.detach().var(0) / len(terms)
    if not p.has_rsample and log_p.requires_grad:
        surrogate = (torch.where(terms.isfinite(), terms, 0.0).detach() * log_p).mean(0)
        value = value + surrogate - surrogate.detach()
    return value, torch.where(value.detach().isinf(), torch.zeros_like(variance), variance)
