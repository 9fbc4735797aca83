r"""Tests of ranks. The rank of a true value among L draws of an exact posterior is uniform on 0, ..., L.

Of N such ranks the number below k is binomial, :math:`C_k \sim \mathrm{Bin}(N, k / (L + 1))`, and the next one is binomial
given this one. So the probability that all of them lie in a band is a product of transition matrices, which is computed without
simulation: the test of the empirical distribution function, and its simultaneous band (Säilynoja, Bürkner and Vehtari,
arXiv 2103.10522). A point's level is the probability of a count as unlikely as that observed; the statistic is the least level.

Normal scores :math:`x = \Phi^{-1}((\mathrm{rank} + U) / (L + 1))`, with U uniform, are independent standard normal numbers, so
their mean and variance have tests in closed form. They also say how large an error is: the mean of x is the bias of a normal
posterior in its deviations, and the deviation of x is the true deviation divided by that of the posterior (after Cook, Gelman
and Rubin, *Validation of Software for Bayesian Models*, 2006).
"""

from __future__ import annotations

__all__ = ["NormalScores", "adjusted_p_values", "ecdf_band", "ecdf_p_value", "normal_scores", "ranks_of"]

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.special import gammaln
from torch import Tensor

MAX_POINTS = 200
"""Largest number of points at which the empirical distribution function is compared."""


def ranks_of(truths: Tensor, draws: Tensor) -> Tensor:
    """Return the number of draws below each true value, (n, ...), ties broken at random.

    Args:
        truths: true values, (n, ...).
        draws: draws for each of them, (n, draw, ...).

    Example:
        >>> ranks_of(torch.tensor([0.5, 2.0]), torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 1.5]]))
        tensor([1, 3])
    """
    truths = truths[:, None]
    below, ties = (draws < truths).sum(1), (draws == truths).sum(1)
    return below + (torch.rand(ties.shape, dtype=torch.float64, device=ties.device) * (ties + 1)).long()


class NormalScores(NamedTuple):
    """Mean and deviation of the normal scores of ranks, with their p-values.

    Attributes:
        mean: their mean: positive if true values are above the draws.
        mean_p: p-value of mean zero, two-sided.
        deviation: their standard deviation: above 1 if true values are farther out than the draws.
        deviation_p: p-value of deviation one, two-sided.
    """

    mean: float
    mean_p: float
    deviation: float
    deviation_p: float


def normal_scores(pit: Tensor) -> NormalScores:
    """Test mean and variance of normal scores: exactly normal, and exactly chi-squared, for uniform values.

    Args:
        pit: values in (0, 1), (n,), n at least 2.

    Example:
        >>> found = normal_scores(torch.linspace(0.005, 0.995, 100))
        >>> abs(found.mean) < 0.01, abs(found.deviation - 1) < 0.01, found.mean_p > 0.9, found.deviation_p > 0.5
        (True, True, True, True)
    """
    x = torch.special.ndtri(pit.double())
    n = len(x)
    mean, variance = float(x.mean()), float(x.var())
    chi2 = stats.chi2(n - 1)
    deviation_p = 2 * min(chi2.cdf((n - 1) * variance), chi2.sf((n - 1) * variance))
    return NormalScores(mean, 2 * float(stats.norm.sf(abs(mean) * n**0.5)), variance**0.5, float(min(deviation_p, 1.0)))


def ecdf_p_value(ranks: Tensor, num_draws: int) -> float:
    """Return the p-value of uniform ranks by their empirical distribution function, without simulation.

    Args:
        ranks: ranks among the draws, (n,), integers from 0 to num_draws.
        num_draws: number of draws.

    Example:
        >>> round(ecdf_p_value(torch.arange(100), 99), 3), ecdf_p_value(torch.arange(100) // 2, 99) < 1e-6
        (1.0, True)
    """
    points = _points(num_draws)
    counts = (ranks[:, None].cpu() < torch.from_numpy(points)).sum(0).numpy()
    levels = _levels(len(ranks), points / (num_draws + 1))
    return 1.0 - _probability_inside(len(ranks), num_draws, float(levels[np.arange(len(points)), counts].min()))


@lru_cache(maxsize=64)
def ecdf_band(num_ranks: int, num_draws: int, probability: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the band that holds the empirical distribution function of uniform ranks everywhere with a probability.

    Args:
        num_ranks: number of ranks.
        num_draws: number of draws that they are ranks among.
        probability: the least probability; that of the band is as near to it as counts allow.

    Returns:
        Points in (0, 1), and the lower and upper share of ranks below each, (points,) each.
    """
    x = _points(num_draws) / (num_draws + 1)
    levels = _levels(num_ranks, x)
    below, above = -30.0, 0.0  # log of the least level that is inside
    for _ in range(40):
        middle = (below + above) / 2
        inside = _probability_inside(num_ranks, num_draws, float(np.exp(middle)))
        below, above = (middle, above) if inside >= probability else (below, middle)
    inside = levels > np.exp(below)
    return x, inside.argmax(1) / num_ranks, (num_ranks - inside[:, ::-1].argmax(1)) / num_ranks


def adjusted_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number, by Holm's method, which needs no independence.

    Example:
        >>> adjusted_p_values([0.01, 0.5, 0.02])
        [0.03, 0.5, 0.04]
    """
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.maximum.accumulate(scaled).clip(max=1.0)
    return adjusted.tolist()


def _points(num_draws: int) -> np.ndarray:
    """Return the ranks k before which ranks are counted, (points,)."""
    return np.unique(np.linspace(1, num_draws, min(num_draws, MAX_POINTS)).round().astype(int))


def _levels(n: int, x: np.ndarray) -> np.ndarray:
    """Return the two-sided level of each count at each point, (points, n + 1)."""
    counts = np.arange(n + 1)
    tails = np.minimum(stats.binom.cdf(counts, n, x[:, None]), stats.binom.sf(counts - 1, n, x[:, None]))
    return np.minimum(2 * tails, 1.0)


@lru_cache(maxsize=4096)
def _probability_inside(n: int, num_draws: int, level: float) -> float:
    """Return the probability that the level of the count is above a number at all points."""
    x = _points(num_draws) / (num_draws + 1)
    inside = _levels(n, x) > level
    log_factorial = gammaln(np.arange(n + 1) + 1.0)
    counts, mass, previous = np.array([0]), np.array([1.0]), 0.0
    for point, row in zip(x, inside, strict=True):
        p = (point - previous) / (1 - previous)
        following = np.flatnonzero(row)
        if not len(following):
            return 0.0
        more, left = following - counts[:, None], n - counts[:, None]
        possible = (more >= 0) & (more <= left)
        more = np.where(possible, more, 0)
        log_p = log_factorial[left] - log_factorial[more] - log_factorial[left - more]
        log_p = log_p + more * np.log(p) + (left - more) * np.log1p(-p)
        mass = mass @ np.where(possible, np.exp(log_p), 0.0)
        counts, previous = following, point
    return float(min(mass.sum(), 1.0))
