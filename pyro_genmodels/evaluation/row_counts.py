"""Counts of rows whose log-likelihoods say less than others, and their moments: what is kept of values that are not held."""

from __future__ import annotations

__all__ = ["RowCounts", "RowTotals"]

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isnan, nan
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.utils.moments import Moments
from pyro_genmodels.utils.pareto import MAX_PARETO_K, MIN_PARETO_DRAWS, count_unreliable, largest_pareto_k


@dataclass(frozen=True)
class RowCounts:
    """Numbers of rows by what is wrong with their values.

    Attributes:
        rows: number of all rows.
        nans: rows whose value is NaN.
        infinite: rows whose value is infinite.
        wrong: rows whose value is NaN, plus infinity, or minus infinity by overflow.
        first_wrong: number of the first of these, or None.
        first_value: its value.
        heavy: rows whose k-hat is above 0.7.
        unknown: rows with a finite value, whose k-hat is NaN.
        largest_k: largest k-hat that is known; NaN if none is.

    Example:
        >>> counts = RowCounts.of(torch.tensor([0.0, torch.nan])) + RowCounts.of(torch.tensor([torch.inf]))
        >>> counts.rows, counts.wrong, counts.first_wrong
        (3, 2, 1)
    """

    rows: int = 0
    nans: int = 0
    infinite: int = 0
    wrong: int = 0
    first_wrong: int | None = None
    first_value: float = nan
    heavy: int = 0
    unknown: int = 0
    largest_k: float = nan

    @classmethod
    def of(cls, values: Tensor, pareto_k: Tensor | None = None, x: Tensor | None = None) -> RowCounts:
        """Return the counts of values and of their k-hats, (n,) each.

        Args:
            values: log-likelihoods.
            pareto_k: their k-hats, or None.
            x: data, with n rows in any dimension. Minus infinity is right for an impossible datum, unless its square is too
                large for the precision of the values.
        """
        overflows = values.isneginf() & bool(x is not None and (x.abs() > torch.finfo(values.dtype).max ** 0.5).any())
        wrong = values.isnan() | values.isposinf() | overflows
        first = int(wrong.nonzero()[0]) if wrong.any() else None
        of_k: dict[str, Any] = {}
        if pareto_k is not None:
            unknown = int((pareto_k.isnan() & values.isfinite()).sum())
            of_k = {"heavy": count_unreliable(pareto_k), "unknown": unknown, "largest_k": largest_pareto_k(pareto_k)}
        counts = int(values.isnan().sum()), int(values.isinf().sum()), int(wrong.sum())
        return cls(len(values), *counts, first, nan if first is None else values[first].item(), **of_k)

    def __add__(self, other: RowCounts) -> RowCounts:
        first, value = self.first_wrong, self.first_value
        if first is None and other.first_wrong is not None:
            first, value = self.rows + other.first_wrong, other.first_value
        known = [k for k in (self.largest_k, other.largest_k) if not isnan(k)]
        return RowCounts(
            self.rows + other.rows,
            self.nans + other.nans,
            self.infinite + other.infinite,
            self.wrong + other.wrong,
            first,
            value,
            self.heavy + other.heavy,
            self.unknown + other.unknown,
            max(known, default=nan),
        )

    def notes(self, num_samples: int) -> list[str]:
        """Return sentences on rows whose values say less than others, given the number of samples behind each value."""
        heavy = f"Pareto k-hat is above {MAX_PARETO_K} (largest {self.largest_k:.2f})"
        unknown = f"Pareto k-hat is unknown, with fewer than {MIN_PARETO_DRAWS} samples,"
        found = {"the value is NaN": self.nans, "the value is infinite": self.infinite, heavy: self.heavy}
        if num_samples < MIN_PARETO_DRAWS:
            found[unknown] = self.unknown
        return [f"{note} in {count} of {self.rows} rows" for note, count in found.items() if count]


@dataclass(frozen=True)
class RowTotals:
    """Counts and moments of the values of rows; by default those of no rows.

    Attributes:
        counts: numbers of rows by what is wrong with them.
        moments: moments of the values, ().
    """

    counts: RowCounts = RowCounts()
    moments: Moments = field(default_factory=Moments)

    @classmethod
    def of(cls, values: Tensor, pareto_k: Tensor | None = None, x: Tensor | None = None) -> RowTotals:
        """Return the totals of values; arguments are as those of `RowCounts.of`."""
        return cls(RowCounts.of(values, pareto_k, x), Moments.of(values))

    def __add__(self, other: RowTotals) -> RowTotals:
        return RowTotals(self.counts + other.counts, self.moments + other.moments)

    def as_record(self) -> dict[str, Any]:
        """Return the totals as JSON."""
        moments = self.moments.total.item(), self.moments.squares.item()
        return {"counts": asdict(self.counts), "moments": [self.moments.count, *moments]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RowTotals:
        """Return the totals in a record."""
        count, *moments = record["moments"]
        return cls(RowCounts(**record["counts"]), Moments(count, *(torch.tensor(m, dtype=torch.float64) for m in moments)))
