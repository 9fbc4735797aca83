"""Columns of a table: the record of those that were read, their choice, and checks of what they hold."""

from __future__ import annotations

__all__ = ["Columns", "Table", "check_finite", "check_labels", "choose_columns"]

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pyro_genmodels.utils.errors import ArgumentError, listed, unknown_name

Columns = tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        x: booleans, integers or finite floats, (N, *event_shape), with N at least 1; NaN for missing values.
        labels: classes from 0, (N,) int64, or None.
        columns: names of the coordinates of x, which is then (N, len(columns)); None if the file has no names.
    """

    x: np.ndarray
    labels: np.ndarray | None = None
    columns: Columns = None


def choose_columns(
    names: list[str],
    rows: int,
    numeric: set[str],
    example: Callable[[str], str],
    read: Callable[[Sequence[str]], np.ndarray],
    columns: Columns,
    labels: str | None,
    *,
    missing: bool = False,
) -> Table:
    """Return the chosen columns of a table, once they are known to be numbers.

    Args:
        names: names of all columns.
        rows: number of rows.
        numeric: names of the columns that hold numbers.
        example: function from the name of another column to a text that shows what it holds.
        read: function from names of numeric columns to their values, (rows, len(names)), with NaN for missing ones.
        columns: columns that make x, or None for all but the labels.
        labels: column of the labels, or None.
        missing: True to allow missing values in the columns that make x.
    """
    known = set(names)
    if len(known) < len(names):
        repeated = [name for name, times in Counter(names).items() if times > 1]
        raise ValueError(f"several columns have the same name: {listed(repeated)}. Rename them.")
    for name in (*(columns or ()), *(() if labels is None else (labels,))):
        if name not in known:
            raise unknown_name("column", name, names)
    chosen = columns or tuple(name for name in names if name != labels)
    if not rows or not chosen:
        raise ValueError(f"there are {rows} rows of {len(chosen)} columns, but at least one of each is needed.")
    if not all(chosen):
        raise ArgumentError(
            f"a column has no name (an index?). Name it, or choose columns among {listed(names)}.",
            argument="columns",
            example="a,b",
        )

    def describe_text(wanted: Sequence[str]) -> str:
        text = [name for name in wanted if name not in numeric]
        return f"not numeric: {listed(text)} ({example(text[0])})" if text else ""

    if text := describe_text(chosen):
        others = listed(name for name in names if name in numeric and name not in ("", labels))
        raise ArgumentError(f"{text}. Choose columns among those that are: {others}.", argument="columns", example="a,b")
    x = check_finite(read(chosen), chosen, missing=missing)
    if labels is None:
        return Table(x, columns=chosen)
    if text := describe_text([labels]):
        raise ValueError(f"{text}. Number the classes from 0.")
    return Table(x, check_labels(read([labels])[:, 0], len(x)), chosen)


def check_finite(x: np.ndarray, columns: Columns = None, *, missing: bool = False) -> np.ndarray:
    """Return the data in the machine's byte order, once they are known to be finite numbers in at least one row.

    Args:
        x: the data, (N, ...).
        columns: names of the columns, for messages.
        missing: True to allow NaN, for missing values.
    """
    if not x.ndim or not x.size:
        raise ValueError(f"an array of shape {x.shape} holds no rows of numbers. The shape should be (N, ...), N at least 1.")
    with np.errstate(over="ignore"):
        x = x.astype(x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.float64, order="C")
    bad = np.isinf(x) if missing else ~np.isfinite(x)
    if bad.any():
        rows = bad.reshape(len(x), -1)
        first = int(rows.any(1).argmax())
        where = f"row {first + 1}" + (f", column {listed([columns[int(rows[first].argmax())]])}" if columns else "")
        raise ValueError(
            f"{int(rows.any(1).sum())} of {len(x)} rows hold {'' if missing else 'missing or '}infinite values, first {where}. "
            "Drop or fill them."
        )
    return x


def check_labels(y: np.ndarray, rows: int) -> np.ndarray:
    """Return the labels as int64, once they are known to be one whole number from 0 for each row."""
    if y.shape != (rows,):
        raise ValueError(f"the labels have the shape {y.shape}, not ({rows},), one for each row.")
    with np.errstate(invalid="ignore"):
        bad = ~((y >= 0) & (y < 2**31) & (y % 1 == 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"labels should be 0, 1, 2, ..., but the label of row {row + 1} is {y[row]}. Number the classes.")
    return y.astype(np.int64)
