r"""The tail of Monte Carlo weights: its shape k-hat, and weights smoothed by it.

A mean :math:`\tfrac1n \sum_j w_j` settles down if the w have a variance. Their m largest values, less the next one u, follow a
generalised Pareto law of shape k and scale :math:`\sigma`, whose moments exist up to the order 1 / k:

.. math:: P(w - u > y \mid w > u) = (1 + k y / \sigma)^{-1/k}, \qquad m = \min(n / 5,\ 3 \sqrt n) .

Below k = 1/2 the variance is finite and the error of the mean falls as :math:`1 / \sqrt n`. Above .7 no practical number of
draws makes the mean, or the standard error computed beside it, trustworthy; from k = 1 on there is no mean to estimate.

Rare values of another size, such as squares that are large between two modes, look like a heavy tail, but one that ends: their
own tail is light. So where k-hat is above .7, the largest quarter of the tail is fitted too, and is taken for the tail if its
k-hat is below .7, and lower by three standard errors :math:`(1 + k) / \sqrt{m / 4}`. With k = .8,
one heavy tail in a thousand is mistaken for one that ends.

The fit is that of Zhang and Stephens, *A New and Efficient Estimation Method for the Generalized Pareto Distribution* (2009),
drawn towards 1/2 as by ten further values. Smoothing replaces the m largest weights by quantiles of the fitted law: Vehtari,
Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance Sampling* (arXiv 1507.02646).
"""

from __future__ import annotations

__all__ = [
    "MAX_PARETO_K",
    "MIN_PARETO_DRAWS",
    "are_unreliable",
    "count_unreliable",
    "is_unreliable",
    "largest_pareto_k",
    "pareto_k",
    "smooth_log_weights",
    "tail_length",
]

from math import ceil, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

MAX_PARETO_K = 0.7
"""Largest k-hat of a mean that is called reliable."""
MAX_UNRELIABLE_SHARE = 0.05
"""Largest share of means with a k-hat above `MAX_PARETO_K` that is attributed to chance."""
MIN_DRAWS_FOR_MAX_K = 100
"""Number of draws below which k-hat, of a tail of fewer than 20 values, is too rough to compare with `MAX_PARETO_K`."""
MIN_PARETO_DRAWS = 21
"""Number of values below which there is no tail of five, and k-hat is NaN: unknown."""
MIN_TAIL = 5
"""Smallest number of values that a tail is fitted to."""
INNER_SHARE = 4
"""Number of times that the tail holds the inner tail, which tells rare values of another size from a heavy tail."""
INNER_ERRORS = 3.0
"""Number of standard errors by which k-hat of the inner tail must be lower for that to be the tail."""
LOG_TINY = log(torch.finfo(torch.float64).tiny)
"""Log of the smallest weight relative to the largest that counts as part of a tail."""
PRIOR_VALUES = 10
"""Number of values that the prior of k, at 1/2, counts for."""
MAX_BLOCK = 2**22
"""Largest number of terms of the fit held in memory at once."""


def pareto_k(log_values: Tensor, dim: int = 0) -> Tensor:
    """Return k-hat, the shape of the generalised Pareto law that the upper tail of nonnegative values follows.

    It depends neither on the scale of the values nor on their order, and on the largest only, so that an infinite variance at
    small values is not seen. Where no tail can be fitted:

    - a value of +inf, or no value above zero: inf;
    - else fewer than `MIN_PARETO_DRAWS` values: NaN, for nothing is known;
    - a tail of equal values, such as weights that are all the same or have few levels: -inf, for it is bounded;
    - one to four values above such equal values: inf if one of them outweighs the m values of a tail together, else -inf.

    Args:
        log_values: logs of the values, such as importance weights; -inf for zero.
        dim: dimension of the draws.

    Returns:
        k-hat, of the shape of log_values without that dimension. It carries no gradient.

    Raises:
        TypeError: unless log_values is a tensor of floats.
        ValueError: if a value is NaN, or there are no values.

    Example:
        >>> u = torch.linspace(0.0005, 0.9995, 1000)
        >>> pareto_k(-1.5 * u.log()), pareto_k(-0.1 * u.log())  # u ** -k has the tail index k
        (tensor(1.3650), tensor(0.1500))
    """
    return _fit(_rows(log_values, dim)).k.reshape(_without(log_values, dim)).to(log_values.dtype)


def tail_length(n: int) -> int:
    """Return the number m of values among n that k-hat is fitted to; its standard error is (1 + k) / m^(1/2).

    Example:
        >>> tail_length(100), tail_length(10_000)
        (20, 300)
    """
    return min(ceil(min(n / 5, 3 * sqrt(n))), n - 1)


def smooth_log_weights(log_weights: Tensor, dim: int = 0, *, num_draws: int | None = None) -> tuple[Tensor, Tensor]:
    """Return log weights whose tail is replaced by quantiles of its generalised Pareto law, and k-hat.

    No smoothed weight exceeds the largest raw one. The mean of smoothed weights has less variance than that of raw ones, and a
    small bias downwards: below `MAX_PARETO_K` it has the smaller mean square error. But it is not unbiased, so its logarithm is
    no bound in expectation. Weights whose k-hat is infinite or NaN stay as they are.

    Args:
        log_weights: log weights, not normalised; -inf for zero.
        dim: dimension of the draws.
        num_draws: number of all draws, if these are only the largest of them: more than `tail_length` of that number.

    Returns:
        Log weights of the same shape and scale, not normalised, and k-hat as `pareto_k` returns it. They carry no gradient.

    Raises:
        TypeError: unless log_weights is a tensor of floats.
        ValueError: if a weight is NaN, or there are none.

    Example:
        >>> u = torch.linspace(0.0005, 0.9995, 1000)
        >>> smoothed, k = smooth_log_weights(-0.1 * u.log())
        >>> smoothed.exp().mean(), u.pow(-0.1).mean()  # exactly 1 / 0.9
        (tensor(1.1114), tensor(1.1110))
    """
    rows = _rows(log_weights, dim)
    tail = _fit(rows, num_draws)
    # Quantiles at (i - 1/2) / L of the L values of each tail, which stand at the end of `order`.
    m = tail.order.shape[1]
    place = torch.arange(m, dtype=rows.dtype, device=rows.device) - (m - tail.length)[:, None]
    k, nats = tail.k[:, None], -torch.log1p(-((place + 0.5) / tail.length[:, None]).clamp(min=0.0))
    excess = tail.sigma[:, None] * torch.where(k.abs() < 1e-15, nats, torch.expm1(k * nats) / k)
    smoothed = torch.logaddexp(tail.log_cutoff[:, None], excess.log()).clamp(max=0.0)
    replaced = (place >= 0) & tail.k.isfinite()[:, None] & smoothed.isfinite()
    raw = rows.gather(1, tail.order)
    rows = rows.scatter(1, tail.order, torch.where(replaced, smoothed + tail.log_max[:, None], raw))
    shape = _without(log_weights, dim)
    smoothed = rows.T.reshape(-1, *shape).movedim(0, dim)
    return smoothed.to(log_weights.dtype), tail.k.reshape(shape).to(log_weights.dtype)


def is_unreliable(pareto_k: Tensor, num_draws: int) -> bool:
    r"""Return True if the k-hats of one or more means say that these cannot be trusted.

    That is so if more than one in twenty is above `MAX_PARETO_K`, where there are 100 draws or more; or if one of n draws is
    above :math:`1 + 10 / \sqrt n`, so that there is no mean to estimate even if chance is allowed for. Of many reliable means
    some are above .7: with log-normal weights of deviation 1, one in twenty for 100 draws, and one in 2000 for 1000. A k-hat of
    NaN says nothing.

    Args:
        pareto_k: k-hat of each mean, (...).
        num_draws: number of draws behind each.

    Example:
        >>> is_unreliable(torch.tensor([0.2, 0.8]), 1000), is_unreliable(torch.tensor([0.2] * 200 + [0.8]), 1000)
        (True, False)
        >>> is_unreliable(torch.tensor([0.2, 0.8]), 50)
        False
    """
    return are_unreliable(count_unreliable(pareto_k), pareto_k.numel(), largest_pareto_k(pareto_k), num_draws)


def are_unreliable(heavy: int, number: int, largest: float, num_draws: int) -> bool:
    """Return what `is_unreliable` does, given how many of a number of k-hats are above `MAX_PARETO_K`, and the largest.

    Example:
        >>> are_unreliable(1, 2, 0.8, 1000), are_unreliable(0, 2, float("nan"), 1000)
        (True, False)
    """
    too_many = num_draws >= MIN_DRAWS_FOR_MAX_K and heavy / max(number, 1) > MAX_UNRELIABLE_SHARE
    return too_many or largest > 1 + 10 / sqrt(num_draws)


def count_unreliable(pareto_k: Tensor) -> int:
    """Return the number of k-hats above `MAX_PARETO_K`.

    Example:
        >>> count_unreliable(torch.tensor([0.2, 0.8, torch.inf, torch.nan]))
        2
    """
    return int((pareto_k > MAX_PARETO_K).sum())


def largest_pareto_k(pareto_k: Tensor) -> float:
    """Return the largest k-hat that is known, or NaN if none is.

    Example:
        >>> largest_pareto_k(torch.tensor([0.25, torch.nan]))
        0.25
    """
    known = pareto_k[~pareto_k.isnan()]
    return known.max().item() if known.numel() else float("nan")


class _Tail(NamedTuple):
    """The tail of each row of values, relative to the largest.

    Attributes:
        k: k-hat, (rows,).
        sigma: scale, relative to the largest value, (rows,); NaN without a fit.
        order: indices of the m largest values of each row, ascending, (rows, m).
        length: number of these that belong to the tail, (rows,): the last ones.
        log_max: log of the largest value, (rows,).
        log_cutoff: log of the value that the tail exceeds, relative to the largest, (rows,).
    """

    k: Tensor
    sigma: Tensor
    order: Tensor
    length: Tensor
    log_max: Tensor
    log_cutoff: Tensor


def _rows(log_values: Tensor, dim: int) -> Tensor:
    """Return the values as float64, (rows, draws), without gradient."""
    if not isinstance(log_values, Tensor) or not log_values.is_floating_point():
        found = str(log_values.dtype) if isinstance(log_values, Tensor) else type(log_values).__name__
        raise TypeError(f"k-hat is computed from a torch.Tensor of floats, the logs of values, but found {found}.")
    if not log_values.dim() or not log_values.shape[dim]:
        raise ValueError(f"k-hat wants values along dimension {dim}, but found the shape {tuple(log_values.shape)}.")
    if nans := int(log_values.isnan().sum()):
        raise ValueError(f"k-hat wants the logs of nonnegative values, but found NaN in {nans} of {log_values.numel()}.")
    return log_values.detach().to(torch.float64).movedim(dim, -1).reshape(-1, log_values.shape[dim])


def _without(log_values: Tensor, dim: int) -> torch.Size:
    return log_values.movedim(dim, 0).shape[1:]


def _fit(rows: Tensor, num_draws: int | None = None) -> _Tail:
    """Return the fitted tail of each row of log values, (rows, n), which may be the largest of a number of draws."""
    n = num_draws or rows.shape[1]
    m = tail_length(n)
    top, order = rows.topk(m + 1, dim=1)
    top, order = top.flip(1), order.flip(1)[:, 1:]
    log_max = top[:, -1]
    relative = (top - log_max[:, None]).nan_to_num(nan=-torch.inf)  # -inf - -inf, inf - inf
    log_cutoff, relative = relative[:, 0].clamp(min=LOG_TINY), relative[:, 1:]
    above = relative > log_cutoff[:, None]
    count = above.sum(1)
    outweighs = (count > 0) & (-log_cutoff > log(max(m, 1)))
    k = torch.full_like(log_cutoff, -torch.inf).masked_fill(outweighs, torch.inf)
    sigma = torch.full_like(k, torch.nan)
    long = (count >= MIN_TAIL).nonzero()[:, 0]
    for block in long.split(max(1, MAX_BLOCK // (m * _grid_size(m)))) if len(long) else ():
        k[block], sigma[block] = _generalised_pareto(relative[block], log_cutoff[block], count[block])
        heavy = block[k[block] > MAX_PARETO_K]
        cutoff = relative[heavy, m - 1 - count[heavy] // INNER_SHARE]
        length = (relative[heavy] > cutoff[:, None]).sum(1)
        fits = length >= MIN_TAIL
        heavy, cutoff, length = heavy[fits], cutoff[fits], length[fits]
        if len(heavy):
            inner = _generalised_pareto(relative[heavy], cutoff, length)
            lighter = inner[0] < (k[heavy] - INNER_ERRORS * (1 + k[heavy]) / length.sqrt()).clamp(max=MAX_PARETO_K)
            for whole, part in zip((k, sigma, log_cutoff, count), (*inner, cutoff, length), strict=True):
                whole[heavy[lighter]] = part[lighter]
    if n < MIN_PARETO_DRAWS:
        k.fill_(torch.nan)
    k = k.masked_fill(log_max.isinf(), torch.inf)
    return _Tail(k, sigma, order, count, log_max, log_cutoff)


def _grid_size(count: int) -> int:
    return 30 + int(sqrt(count))


def _generalised_pareto(log_values: Tensor, log_cutoff: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shape and scale of a generalised Pareto law by Zhang and Stephens's posterior mean.

    Args:
        log_values: logs of values, ascending, (rows, m).
        log_cutoff: log of what the last `count` values of each row exceed, (rows,).
        count: number of these values, (rows,), at least 5.

    Returns:
        k with its prior, and sigma, (rows,) each.
    """
    rows, m = log_values.shape
    excess = torch.expm1((log_values - log_cutoff[:, None]).clamp(min=0.0)) * log_cutoff.exp()[:, None]
    largest = excess[:, -1:]
    x = excess / largest
    quartile = x[torch.arange(rows, device=x.device), m - count + (count + 2) // 4 - 1][:, None]
    size = 30 + count.double().sqrt().long()[:, None]
    j = torch.arange(1, _grid_size(m) + 1, dtype=x.dtype, device=x.device) - 0.5
    theta = (1 - (size / j).sqrt()) / (3 * quartile) + 1
    shape = torch.log1p(-theta[..., None] * x[:, None]).sum(-1) / count[:, None]
    log_likelihood = count[:, None] * ((-theta / shape).log() - shape - 1)
    log_likelihood = log_likelihood.masked_fill(log_likelihood.isnan() | (j > size), -torch.inf)
    weights = log_likelihood.softmax(1)
    weights = weights.masked_fill(weights < 10 * torch.finfo(x.dtype).eps, 0.0)
    theta = ((theta * weights).masked_fill(weights == 0, 0.0).sum(1) / weights.sum(1))[:, None]
    k = torch.log1p(-theta * x).sum(1) / count
    sigma = -k / theta[:, 0] * largest[:, 0]
    return (count * k + 0.5 * PRIOR_VALUES) / (count + PRIOR_VALUES), sigma
