"""Means of terms at samples: their value, variance and k-hat, and the score-function gradient."""

from __future__ import annotations

__all__ = ["check_num_samples", "differ_by_rounding", "mean_of", "score_function", "tail_of_sums"]

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.utils.pareto import MAX_PARETO_K, pareto_k, smooth_log_weights
from pyro_genmodels.utils.precision import in_doubles

MAX_ROUNDING = 1e-9
"""Largest relative difference of two doubles that is taken for rounding."""


def check_num_samples(num_samples: int, *, by: str, least: int = 2) -> None:
    """Raise a ValueError if there are too few samples for a standard error."""
    if num_samples < least:
        raise ValueError(f"{by} wants at least {least} samples for a standard error, but found num_samples={num_samples}.")


def differ_by_rounding(log_p: Tensor, log_q: Tensor) -> bool:
    """Return True if log densities differ by rounding alone, so that their differences have no tail to be fitted."""
    rounding = torch.finfo(log_p.dtype).eps ** 0.6 * (1 + log_p.detach().abs().max())  # 4e-10 of doubles, 7e-5 of floats
    return bool(((log_p - log_q).detach().abs() <= rounding).all())


def mean_of(*strata: Tensor, bounded: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean over samples of equally likely strata, its variance, and k-hat of all terms, (batch...) each, in doubles.

    If no term is negative and k-hat is below 0.7, the largest terms are smoothed by the generalised Pareto law of their tail
    (arXiv 1507.02646); the gradient is that of the plain mean. k-hat is that of the upper tail, or the larger one of both tails
    if there are negative terms. It is minus infinity where a term is infinite, since the mean is then known.

    Args:
        strata: terms at the samples of each stratum, (num_samples, batch...); infinite only if that is certain.
        bounded: True if no term can exceed some bound, so that there is no heavy tail.
    """
    value = torch.stack([in_doubles(terms).mean(0) for terms in strata]).mean(0)
    fixed = in_doubles(torch.cat([terms.detach() for terms in strata]))
    infinite = fixed.isinf().any(0)
    k = torch.full_like(fixed[0], -torch.inf)
    if not bounded:
        finite, negative = fixed.masked_fill(infinite, 0.0), (fixed < 0).any(0)
        smoothed, k = smooth_log_weights(finite.abs().log())
        has_smooth_tail = (k <= MAX_PARETO_K) & ~negative & ~infinite
        fixed = torch.where(has_smooth_tail, smoothed.exp(), fixed)
        if negative.any():
            floor = finite.abs().mean(0)  # makes all values positive, of the size of a usual term or more
            tails = finite - finite.amin(0) + floor, finite.amax(0) - finite + floor
            k = torch.where(negative, torch.maximum(*(pareto_k(tail.log()) for tail in tails)), k)
        k = k.masked_fill(infinite | (fixed == 0).all(0), -torch.inf)
    parts = fixed.split([len(terms) for terms in strata])
    smooth = torch.stack([part.mean(0) for part in parts]).mean(0)
    value = smooth + torch.where(infinite, 0.0, value - value.detach())
    variance = sum(part.var(0) / len(part) for part in parts) / len(parts) ** 2
    return value, variance.masked_fill(infinite, 0.0), k


def tail_of_sums(*parts: Tensor) -> Tensor:
    """Return k-hat, (), of a sum of one mean per set of samples: the larger k-hat of the two.

    Args:
        parts: contributions of the samples of each set, (n,) and (m,). Those that differ by rounding alone have no tail.
    """
    k = torch.full_like(parts[0][0], -torch.inf)
    for part in (part.detach() for part in parts):
        unit = MAX_ROUNDING * part.abs().max().clamp(min=torch.finfo(part.dtype).tiny / MAX_ROUNDING)
        k = torch.fmax(k, mean_of(((part - part.mean()) / unit).round())[2])
    return k


def score_function(terms: Tensor, log_p: Tensor, p: Distribution) -> Tensor | float:
    """Return a zero whose gradient is that of the mean of terms by the score function, (batch...), if p is not reparametrised.

    Args:
        terms: terms at samples of p, (num_samples, batch...).
        log_p: log density of p at the samples, of the same shape.
        p: distribution of the samples.
    """
    if p.has_rsample or not log_p.requires_grad:
        return 0.0
    surrogate = (torch.where(terms.isfinite(), terms, 0.0).detach() * log_p).mean(0)
    return surrogate - surrogate.detach()
