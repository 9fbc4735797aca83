"""Data sets by name or from a file: which values are levels and which are real numbers, and which rows are for what."""

from __future__ import annotations

__all__ = ["load", "rows"]

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.datasets.dataset import Dataset
from pyro_genmodels.datasets.named import DATASETS
from pyro_genmodels.datasets.tables import read_table
from pyro_genmodels.utils.errors import unknown_name


def load(
    source: str | Path,
    *,
    seed: int = 0,
    columns: str | Sequence[str] | None = None,
    labels: str | None = None,
    levels: int | None = None,
) -> Dataset:
    """A data set by name, or the rows of a file, shuffled and split 8 to 1 to 1.

    Args:
        source: a name in `DATASETS`, or the path of a .npy, .npz, .csv or .parquet file.
        seed: of the draws or the split.
        columns: of a file, that make x; see `read_table`.
        labels: the column or array of a file that holds classes 0, 1, 2, ...
        levels: of a file: K, where all values are whole numbers from 0 to K - 1, or 0 for real numbers. By default floats are
            real numbers, and the levels of integers are 256 of uint8, 2 of booleans, else one more than the largest, which is
            at most 255.

    Raises:
        OSError: if the file cannot be read.
        ValueError: on an unknown name; columns, labels or levels with a name; and a file with fewer than 10 rows, other values
            than its levels, or any fault that `read_table` finds.
        ImportError: without the library that reads it.

    Example:
        >>> load("ring", seed=1).name
        'ring'
    """
    name = str(source)
    if name in DATASETS:
        if not columns is labels is levels is None:
            raise ValueError(f"the data set {name!r} has its own columns, labels and levels: leave them out.")
        return DATASETS[name](seed)
    path = Path(source)
    if not path.suffix and not path.exists():
        raise unknown_name("data set", name, DATASETS)
    x, y, header, levels = _read(path, columns, labels, levels)
    classes = None if y is None else int(y.max()) + 1
    if len(x) < 10:
        raise ValueError(f"{path}: found {len(x)} rows, but at least 10 are wanted, to split them 8 to 1 to 1.")
    if y is not None and y.min() > 0:
        low = int(y.min())
        raise ValueError(f"{path}: the labels run from {low} to {int(y.max())}, but classes count from 0: subtract {low}.")
    if classes is not None and classes > len(x):
        raise ValueError(f"{path}: the labels run to {classes - 1} in {len(x)} rows. Number the classes 0, 1, 2, ...")
    if not levels and header is not None and (same := [n for n, c in zip(header, x.T, strict=True) if (c == c[0]).all()]):
        raise ValueError(f"{path}: of {', '.join(same)} all rows have one value, where densities have no bound: leave it out.")
    order, tenth = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))), len(x) // 10
    sizes = [len(x) - 2 * tenth, tenth, tenth]
    parts = (None, None, None) if y is None else y[order].split(sizes)
    return Dataset(path.name, *x[order].split(sizes), *parts, levels=levels or None, num_classes=classes, columns=header)


def rows(
    path: str | Path, *, columns: str | Sequence[str] | None = None, labels: str | None = None, levels: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """All rows of a file as they stand, for a model that was fitted to rows like them.

    Args:
        path: of the file.
        columns: that make x; see `read_table`.
        labels: the column or array that holds classes.
        levels: that the model knows; None for real numbers.

    Returns:
        x, (N, *event_shape), int64 with levels and float32 without; and labels, (N,) int64, or None.

    Raises:
        OSError: if the file cannot be read.
        ValueError: on values that are not such levels, or any fault that `read_table` finds.
        ImportError: without the library that reads it.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/x.npy", [[0, 1], [2, 3]])
        ...     rows(f"{folder}/x.npy", levels=4)[0]
        tensor([[0, 1],
                [2, 3]])
    """
    x, y, _, _ = _read(Path(path), columns, labels, levels or 0)
    return x, y


def _read(
    path: Path, columns: str | Sequence[str] | None, labels: str | None, levels: int | None
) -> tuple[Tensor, Tensor | None, tuple[str, ...] | None, int]:
    """x, labels, names of columns, and levels, 0 for real numbers; None finds them out."""
    if levels is not None and (levels < 0 or levels == 1):
        raise ValueError(f"levels wants 2 or more, or 0 for real numbers, but found {levels}.")
    table = read_table(path, columns=columns, labels=labels)
    levels = _levels(path, table.x) if levels is None else levels
    if levels:
        values, bad = table.x, (table.x < 0) | (table.x >= levels) | (table.x % 1 != 0)
        wanted = f"whole numbers from 0 to {levels - 1}"
    else:
        with np.errstate(over="ignore"):
            values = table.x.astype(np.float32)
        bad, wanted = np.isinf(values), "numbers that float32 can hold, up to 3.4e38"
    if bad.any():
        first = np.argwhere(bad)[0]
        raise ValueError(f"{path}: wanted are {wanted}, but row {first[0] + 1} holds {table.x[tuple(first)]}.")
    x = torch.from_numpy(values.astype(np.int64) if levels else values)
    return x, None if table.labels is None else torch.from_numpy(table.labels), table.columns, levels


def _levels(path: Path, x: np.ndarray) -> int:
    if x.dtype.kind == "f":
        return 0
    if x.dtype in (np.bool_, np.uint8):
        return 2 if x.dtype == np.bool_ else 256
    low, high = int(x.min()), int(x.max())
    if low < 0 or high > 255:
        raise ValueError(
            f"{path}: found integers from {low} to {high}, but levels run from 0 to 255. Say levels=0 (--levels 0) to take "
            "them for real numbers, or how many levels there are."
        )
    return max(high + 1, 2)
