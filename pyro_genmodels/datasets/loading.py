"""Loading of data sets by name or from a file: integer levels or real numbers, and the split of the rows."""

from __future__ import annotations

__all__ = ["load", "load_rows"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.datasets.columns import Table
from pyro_genmodels.datasets.dataset import Dataset
from pyro_genmodels.datasets.named import DATASETS
from pyro_genmodels.datasets.tables import read_table
from pyro_genmodels.utils.errors import ArgumentError, listed, unknown_name, warn_caller
from pyro_genmodels.utils.files import MAX_BYTES

MAX_LEVEL = 255
"""Largest integer that is a level, unless the number of levels is given."""
MIN_ROWS = 10
"""Smallest number of rows that can be split 8 : 1 : 1."""
MAX_ROUNDING = 1e-3
"""Largest change of a column by rounding to float32, relative to its range. Where it is larger, x is float64."""


def load(
    source: str | Path,
    *,
    seed: int = 0,
    columns: str | Sequence[str] | None = None,
    labels: str | None = None,
    levels: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> Dataset:
    """Return a data set by name, or the rows of a file, shuffled and split 8 : 1 : 1.

    Args:
        source: name of a data set in `DATASETS`, or path of a .npy, .npz, .csv or .parquet file.
        seed: seed of the draws of a named data set, or of the split.
        columns: columns of a file that make up x; see `read_table`.
        labels: column or array of a file that holds classes 0, 1, 2, ...
        levels: number K of levels of a file whose values are whole numbers from 0 to K - 1, or 0 for real numbers. By default
            floats are real numbers, uint8 has 256 levels and booleans have 2; other integers have one level more than the
            largest, which may be at most 255.
        max_bytes: largest size of a file and of the numbers in it; see `read_table`.

    Returns:
        The data set, with x as float32, or as float64 if float32 would lose digits (such as Unix times, whose float32 are two
        minutes apart), or as int64 if it has levels.

    Warns:
        UserWarning: if all rows have the same label. Also if coordinates are read as real numbers, but hold only whole numbers,
            or one value in more than a twentieth of the rows: a density of real numbers is unbounded on them. With levels=0
            only columns that stand beside integers beyond 255 are warned of, since such a file can be read in no other way.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the name is unknown, or columns, labels or levels are given with a name; if the file has fewer than 10
            rows, values outside its levels, or columns with the same value in all rows; or for any other fault that
            `read_table` finds.
        ImportError: if the library that reads the file is missing.

    Example:
        >>> data = load("ring", seed=1)
        >>> data.name, data.train.shape
        ('ring', torch.Size([10000, 2]))
    """
    name = str(source)
    if name in DATASETS:
        if not columns is labels is levels is None:
            raise ValueError(f"the data set {name!r} has its own columns, labels and levels. Leave these arguments out.")
        return DATASETS[name](seed)
    path = Path(source)
    if not path.suffix and not path.exists():
        raise unknown_name("data set", name, DATASETS)
    table, x, found_levels = _read(path, columns, labels, levels, max_bytes)
    y = None if table.labels is None else torch.from_numpy(table.labels)
    classes = None if y is None else int(y.max()) + 1
    if len(x) < MIN_ROWS:
        raise ValueError(f"{path}: found {len(x)} rows, but the split 8 : 1 : 1 needs at least {MIN_ROWS}.")
    if y is not None:
        _check_classes(path, str(labels), y)
    if not found_levels:
        _check_reals(path, table, meant=levels == 0)
    order, tenth = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))), len(x) // 10
    sizes = [len(x) - 2 * tenth, tenth, tenth]
    parts = *x[order].split(sizes), *((None, None, None) if y is None else y[order].split(sizes))
    return Dataset(path.name, *parts, levels=found_levels or None, num_classes=classes, columns=table.columns, order=order)


def load_rows(
    path: str | Path,
    *,
    columns: str | Sequence[str] | None = None,
    labels: str | None = None,
    levels: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> tuple[Tensor, Tensor | None]:
    """Return all rows of a file in their order, for a model that was fitted to such rows.

    Args:
        path: path of the file.
        columns: columns that make up x; see `read_table`.
        labels: column or array that holds classes.
        levels: number of levels of the model; None for real numbers.
        max_bytes: largest size of the file and of the numbers in it; see `read_table`.

    Returns:
        x, (N, *event_shape), int64 with levels and without as in `load`; and labels, (N,) int64, or None.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if values are outside the levels, or for any other fault that `read_table` finds.
        ImportError: if the library that reads the file is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", [[0, 1], [2, 3]])
        ...     load_rows(f"{folder}/x.npy", levels=4)[0]
        tensor([[0, 1],
                [2, 3]])
    """
    table, x, _ = _read(Path(path), columns, labels, levels or 0, max_bytes)
    return x, None if table.labels is None else torch.from_numpy(table.labels)


def _read(
    path: Path, columns: str | Sequence[str] | None, labels: str | None, levels: int | None, max_bytes: int
) -> tuple[Table, Tensor, int]:
    """Return the table in a file, its x as a tensor, and the number of levels (0 for real numbers).

    With levels=None the number of levels follows from the file's dtype and values.
    """
    if levels is not None and (levels < 0 or levels == 1):
        raise ValueError(f"levels wants 2 or more, or 0 for real numbers, but found {levels}.")
    table = read_table(path, columns=columns, labels=labels, max_bytes=max_bytes)
    levels = _levels(path, table.x) if levels is None else levels
    if levels:
        values, bad = table.x, (table.x < 0) | (table.x >= levels) | (table.x % 1 != 0)
        wanted = f"{levels} levels are whole numbers from 0 to {levels - 1}"
    else:
        with np.errstate(over="ignore"):
            values = table.x.astype(np.float32)
        bad, wanted = np.isinf(values), "float32 holds numbers up to 3.4e38"
        values = table.x.astype(np.float64) if not bad.any() and _loses_digits(table.x, values) else values
    if bad.any():
        first = np.argwhere(bad)[0]
        raise ValueError(f"{path}: {wanted}, but row {first[0] + 1} holds {table.x[tuple(first)]}.")
    return table, torch.from_numpy(values.astype(np.int64) if levels else values), levels


def _loses_digits(x: np.ndarray, rounded: np.ndarray) -> bool:
    """Return True if rounding changes a column of x, (N, ...), by more than MAX_ROUNDING of its range.

    The range of a single row is 0, so that any change of it counts.
    """
    x = x.astype(np.float64)
    return bool((np.abs(rounded - x).max(0) > MAX_ROUNDING * (x.max(0) - x.min(0))).any())


def _check_classes(path: Path, name: str, y: Tensor) -> None:
    """Check that labels (N,) are classes 0, 1, 2, ..., and warn if all are of one class."""
    found, low, high = len(y.unique()), int(y.min()), int(y.max())
    if found > len(y) / 2 and high > len(y):
        raise ValueError(
            f"{path}: {listed([name])} is no column of classes: {len(y)} rows hold {found} different values, up to {high}. "
            "Labels are 0, 1, 2, ..., each in many rows."
        )
    if low > 0:
        raise ValueError(f"{path}: the labels run from {low} to {high}, but must start at 0. Subtract {low}.")
    if high >= len(y):
        raise ValueError(f"{path}: the labels run to {high}, but there are {len(y)} rows. Use classes 0, 1, 2, ...")
    if found == 1:
        warn_caller(
            f"{path}: all rows have the same label, {high}, which tells a model nothing. Leave the labels out, or choose "
            "another column.",
            UserWarning,
        )


def _check_reals(path: Path, table: Table, *, meant: bool) -> None:
    """Check that coordinates suit a density of real numbers.

    Args:
        path: path of the file.
        table: the table in it.
        meant: True if real numbers were asked for. Repeated values and whole numbers then raise no warning, unless other
            columns hold integers beyond 255: such a file can be read in no other way.
    """
    x = table.x.reshape(len(table.x), -1)
    names = table.columns or tuple(f"number {i}" for i in range(x.shape[1]))
    ordered = np.sort(x, axis=0)
    before = 1 + (ordered[1:] != ordered[:-1]).sum(0)  # distinct values
    if table.columns is not None and (same := [name for name, n in zip(names, before, strict=True) if n == 1]):
        raise ValueError(
            f"{path}: each of these columns has the same value in all rows: {listed(same)}. A density of real numbers would be "
            "unbounded there. Leave them out."
        )
    share = max(len(x) // 20, 2)
    repeated = (ordered[share:] == ordered[:-share]).any(0)
    whole = (x % 1 == 0).all(0) & (before < len(x) / 2)
    odd = repeated | whole
    if meant:
        narrow = (ordered[0] >= 0) & (ordered[-1] <= MAX_LEVEL)
        odd &= narrow & (not narrow.all() and x.dtype.kind != "f")
    if odd.any():
        shown = [f"{name} ({n} values)" for name, n, is_odd in zip(names, before, odd, strict=True) if is_odd]
        where = listed(shown) if table.columns else f"{len(shown)} of {len(names)} coordinates"
        warn_caller(
            f"{path}: read as real numbers, but holding only whole numbers, or one value in more than a twentieth of the rows: "
            f"{where}. A density of real numbers is unbounded on them. Leave them out, condition on one as labels, or save "
            "only whole numbers from 0 to model them as levels."
            + ("" if meant else " Give levels=0 if real numbers are meant."),
            UserWarning,
        )


def _levels(path: Path, x: np.ndarray) -> int:
    """Return the number of levels that an array's dtype and values suggest, 0 for real numbers."""
    if x.dtype.kind == "f":
        return 0
    if x.dtype in (np.bool_, np.uint8):
        return 2 if x.dtype == np.bool_ else 256
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > MAX_LEVEL:
        raise ArgumentError(
            f"{path}: found integers from {low} to {high}, but levels run from 0 to {MAX_LEVEL}. Give the number of levels, "
            "or 0 to read the integers as real numbers.",
            argument="levels",
            example="0",
        )
    return max(high + 1, 2)
