r"""Mean and deviation of all rows of a stream, by a first pass that is remembered.

Pieces are measured in double precision and merged. With :math:`\delta` the difference of the means of two parts of :math:`n_a`
and :math:`n_b` values, the mean and the sum of squared deviations of both are

.. math:: m = m_a + \delta \frac{n_b}{n_a + n_b}, \qquad S = S_a + S_b + \delta^2 \frac{n_a n_b}{n_a + n_b},

which loses no digits, however far from 0 the values are. The root of S is held, and computed without squares of values, so that
any unit will do. Chan, Golub and LeVeque, *Algorithms for Computing the Sample
Variance* (1983). What was measured of a file is written as JSON, and read again as long as the file stays as it is.
"""

from __future__ import annotations

__all__ = ["ColumnStatistics", "Memory", "merged"]

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.utils.files import atomic_write

VERSION = 2


@dataclass(frozen=True)
class ColumnStatistics:
    """Statistics of the finite values in each coordinate of many rows.

    Attributes:
        rows: number of rows.
        count: number of finite values, (*event_shape), in double precision like all that follow.
        mean: their mean.
        spread: root of the sum of their squared deviations from the mean; 0 where all are equal.
        low: smallest of them.
        high: largest of them.
        dtype: data type of the values.
        nonfinite: number of rows with NaN or infinite values.
        first_nonfinite: place of the first such row in words, or "".

    Example:
        >>> x = torch.tensor([[1.0], [2.0], [torch.nan], [6.0]])
        >>> found = ColumnStatistics.of(x, "x.npy", 0)
        >>> found.mean, found.deviation, found.nonfinite, found.first_nonfinite
        (tensor([3.], dtype=torch.float64), tensor([2.6458], dtype=torch.float64), 1, 'x.npy, row 2')
    """

    rows: int
    count: Tensor
    mean: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor
    dtype: torch.dtype
    nonfinite: int = 0
    first_nonfinite: str = ""

    @classmethod
    def of(cls, rows: Tensor, name: str, first: int) -> ColumnStatistics:
        """Return the statistics of rows, (n, *event_shape).

        Args:
            rows: the rows, n at least 1.
            name: name of their source.
            first: number of the first of them in the source.
        """
        values, shape = rows.detach().cpu().double().reshape(len(rows), -1), rows.shape[1:]
        seen = values.isfinite()
        bad = (~seen).any(1).nonzero().flatten()
        if len(bad):
            count = seen.sum(0).double()
            known = torch.where(seen, values, 0.0)
            low, high = (torch.where(seen, values, end).aminmax(dim=0)[i] for i, end in enumerate((torch.inf, -torch.inf)))
        else:
            count = torch.full((values.shape[1],), float(len(values)), dtype=torch.float64)
            known, (low, high) = values, values.aminmax(dim=0)
        mean = known.sum(0) / count.clamp(min=1)
        centred = torch.where(seen, values - mean, 0.0) if len(bad) else values - mean
        least, most = centred.aminmax(dim=0)
        unit = torch.maximum(-least, most)  # neither squares nor their sums overflow or vanish
        centred = centred / torch.where(unit == 0, 1.0, unit)
        squares = centred.square().sum(0) - centred.sum(0).square() / count.clamp(min=1)
        spread = torch.where(low < high, unit * squares.clamp(min=0).sqrt(), 0.0)
        count, mean, spread, low, high = (part.reshape(shape) for part in (count, mean, spread, low, high))
        place = f"{name}, row {first + int(bad[0])}" if len(bad) else ""
        return cls(len(rows), count, mean, spread, low, high, rows.dtype, len(bad), place)

    @property
    def deviation(self) -> Tensor:
        """Unbiased standard deviation; NaN for fewer than two values."""
        return self.spread / (self.count - 1).sqrt()

    def __add__(self, other: ColumnStatistics) -> ColumnStatistics:
        """Return the statistics of the rows of both, those of `other` after those of this one."""
        count = self.count + other.count
        share = other.count / count.clamp(min=1)
        step = other.mean - self.mean
        return ColumnStatistics(
            self.rows + other.rows,
            count,
            self.mean + step * share,
            torch.hypot(torch.hypot(self.spread, other.spread), step * (self.count * share).sqrt()),
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.dtype,
            self.nonfinite + other.nonfinite,
            self.first_nonfinite or other.first_nonfinite,
        )

    def with_noise(self, mean: float, variance: float) -> ColumnStatistics:
        """Return the statistics of the values with independent noise of that mean and variance added, apart from their ends."""
        return replace(self, mean=self.mean + mean, spread=torch.hypot(self.spread, (variance * self.count).sqrt()))

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON."""
        parts = {name: getattr(self, name) for name in ("count", "mean", "spread", "low", "high")}
        return {
            "rows": self.rows,
            "shape": list(self.mean.shape),
            **{name: t.flatten().tolist() for name, t in parts.items()},
            "dtype": str(self.dtype).removeprefix("torch."),
            "nonfinite": self.nonfinite,
            "first_nonfinite": self.first_nonfinite,
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> ColumnStatistics:
        """Return the statistics that `to_json` returned."""
        count, mean, spread, low, high = (
            torch.tensor(saved[name], dtype=torch.float64).reshape(saved["shape"])
            for name in ("count", "mean", "spread", "low", "high")
        )
        dtype, nonfinite, first = getattr(torch, saved["dtype"]), saved["nonfinite"], saved["first_nonfinite"]
        return cls(saved["rows"], count, mean, spread, low, high, dtype, nonfinite, first)


def merged(parts: Iterable[tuple[ColumnStatistics, ...]]) -> tuple[ColumnStatistics, ...]:
    """Return the statistics of x, and of the contexts if there are any, of several parts of the rows."""
    return reduce(lambda a, b: tuple(left + right for left, right in zip(a, b, strict=True)), parts)


class Memory:
    """A JSON file with what was measured of other files.

    Args:
        path: its path; None remembers nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self._is_new = path, False
        self.entries: dict[str, Any] = {}
        if path is not None:
            with suppress(OSError, ValueError, AttributeError):
                saved = json.loads(path.read_text())
                self.entries = dict(saved["entries"]) if saved.get("version") == VERSION else {}

    def get(self, key: str, state: Any) -> tuple[ColumnStatistics, ...] | None:
        """Return what was measured under a key, if it was of a file in this state."""
        entry = self.entries.get(key)
        try:
            if entry is not None and entry["state"] == state:
                return tuple(map(ColumnStatistics.from_json, entry["statistics"]))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # a file that someone else has written
            pass
        return None

    def put(self, key: str, state: Any, statistics: tuple[ColumnStatistics, ...]) -> None:
        """Note what was measured of a file in this state, in place of that of other states."""
        self._is_new = True
        self.entries[key] = {"state": state, "statistics": [part.to_json() for part in statistics]}

    def write(self) -> None:
        """Write the file, if there is something new in it and its folder allows it."""
        if self.path is not None and self._is_new:
            with suppress(OSError), atomic_write(self.path) as part:
                part.write_text(json.dumps({"version": VERSION, "entries": self.entries}) + "\n")
