r"""Mean and variance of rows that are never all in memory: moments of batches, merged.

With :math:`\delta` the difference of the means of two batches of :math:`n_a` and :math:`n_b` rows, their sums of squared
deviations are merged by

.. math:: S = S_a + S_b + \delta^2 \frac{n_a n_b}{n_a + n_b},

which loses no digits, however far from 0 the values are. Chan, Golub and LeVeque, *Algorithms for Computing the Sample
Variance* (1983).
"""

from __future__ import annotations

__all__ = ["Moments"]

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number of rows, their sum and their squared deviations from the mean, in double precision; by default those of no rows.

    Attributes:
        count: number of rows.
        total: sum over rows, (...).
        squares: sum of squared deviations from the mean, (...).

    Example:
        >>> x = 1e9 + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        >>> merged = Moments.of(x[:1]) + Moments.of(x[1:])
        >>> merged.mean - 1e9, merged.variance == x.var()
        (tensor(2.5000, dtype=torch.float64), tensor(True))
    """

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Return the moments of rows, (n, ...)."""
        values = values.detach().double().cpu()
        total = values.sum(0)
        return cls(len(values), total, (values - total / max(len(values), 1)).square().sum(0))

    @property
    def mean(self) -> Tensor:
        """Mean, (...)."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Unbiased variance, (...); NaN for fewer than two rows."""
        return self.squares / (self.count - 1) if self.count > 1 else torch.full_like(self.squares, torch.nan)

    def __add__(self, other: Moments) -> Moments:
        if not (self.count and other.count):
            return self if self.count else other
        count = self.count + other.count
        between = (other.mean - self.mean).square() * (self.count * other.count / count)
        return Moments(count, self.total + other.total, self.squares + other.squares + between)
