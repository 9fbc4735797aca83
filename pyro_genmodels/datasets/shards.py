"""Sources of the rows of a stream: arrays that are sliced, and iterables. Those in files are in `shard_files`.

A source knows its number of rows without reading them, and yields pieces of them from any row on. A file must stay as it was
when the stream was opened.
"""

from __future__ import annotations

__all__ = ["PIECE_BYTES", "ArraySource", "FileState", "IterableSource", "Piece", "Source", "row_tensor"]

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.tensors import as_tensor

Piece = tuple[Tensor, ...]
"""Rows of x, (n, *event_shape), and their contexts, (n, ...), if there are any."""

PIECE_BYTES = 2**23
"""Size of the pieces that are read at once."""
PROBES, PROBE_BYTES = 16, 4096
"""Number and size of the parts of a file by which it is known again."""


@dataclass(frozen=True)
class FileState:
    """A file as it was when the stream was opened.

    Attributes:
        path: its path.
        size: its size in bytes.
        modified: time of its last change, in nanoseconds.
    """

    path: Path
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the present state of a file."""
        found = os.stat(path)
        return cls(path, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Raise an error if the file is gone, or has changed.

        Raises:
            FileNotFoundError: if it is gone.
            ValueError: if it has changed.
        """
        try:
            now = FileState.of(self.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{self.path} has disappeared since the stream was opened. Put it back, or open the stream anew."
            ) from error
        if now != self:
            raise ValueError(
                f"{self.path} has changed since the stream was opened ({self.size:,} bytes then, {now.size:,} now). Rows must "
                "stay as they are during training: write new rows to new files, and open the stream anew."
            )

    def digest(self) -> str:
        """Return a checksum of the file's size and of parts of its contents, which does not depend on its folder and dates."""
        digest = sha256(f"{self.path.name} {self.size}".encode())
        with self.path.open("rb") as file:
            for place in range(PROBES):
                file.seek(max(0, self.size - PROBE_BYTES) * place // (PROBES - 1))
                digest.update(file.read(PROBE_BYTES))
        return digest.hexdigest()


class Source(ABC):
    """Base of sources.

    Attributes:
        rows: number of rows.
        name: name for messages, such as "day-3.parquet, row group 2".
        row_bytes: size of a row in memory.
        form: shape and types of a row, in words.
        file: the file that holds the rows, or None.
        is_whole: True if it is read as one shard, since reading begins at its first row.
        is_sequential: True if all rows must be read to find any.
    """

    rows: int
    name: str
    row_bytes: int
    form = ""
    file: FileState | None = None
    is_whole = False
    is_sequential = False

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[Piece]:
        """Yield the rows from `start` to before `stop`, in pieces of at most some megabytes."""

    def _steps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ends of the pieces of some rows."""
        step = max(1, PIECE_BYTES // max(self.row_bytes, 1))
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


class ArraySource(Source):
    """Arrays that are sliced: memory-mapped ones, or those of h5py or zarr.

    Args:
        arrays: x, (N, *event_shape), and the contexts, (N, ...), if there are any.
        select: function that chooses columns of a piece.

    Raises:
        ValueError: if the arrays have different numbers of rows.
    """

    def __init__(self, arrays: Sequence[Any], select: Callable[[Piece], Piece]) -> None:
        lengths = [int(array.shape[0]) for array in arrays]
        if len(set(lengths)) > 1:
            raise ValueError(f"A stream wants one context for each row, but found {lengths[0]} rows and {lengths[1]} contexts.")
        self.arrays, self.select = arrays, select
        self.rows, self.name = lengths[0], f"an array of {lengths[0]} rows"
        self.row_bytes = sum(math.prod(array.shape[1:]) * np.dtype(array.dtype).itemsize for array in arrays)

    def read(self, start: int, stop: int) -> Iterator[Piece]:
        for first, last in self._steps(start, stop):
            yield self.select(tuple(row_tensor(np.array(array[first:last])) for array in self.arrays))


class IterableSource(Source):
    """An iterable of batches of rows: x, or (x, context). Each walk through it must give the same rows in the same order.

    Args:
        batches: the iterable, or a function that returns it.
        rows: number of rows of one walk.
    """

    is_whole = is_sequential = True

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]], rows: int) -> None:
        self.batches, self.rows = batches, rows
        self.name = f"the {type(batches).__name__} of {rows} rows"
        self.row_bytes = 0

    def read(self, start: int, stop: int) -> Iterator[Piece]:
        seen = 0
        for item in self.batches() if callable(self.batches) else self.batches:
            piece = tuple(as_tensor(part, "A stream") for part in (item if isinstance(item, (tuple, list)) else (item,)))
            if not piece or any(not t.dim() or len(t) != len(piece[0]) for t in piece):
                shapes = listed(str(tuple(t.shape)) for t in piece)
                raise ValueError(
                    f"{self.name} wants to yield batches of rows, as x or (x, context), but one has shapes {shapes}."
                )
            first, seen = seen, seen + len(piece[0])
            if seen > self.rows:
                raise ValueError(f"{self.name} yields more rows than rows={self.rows}. Give their number.")
            if first < stop and seen > start:
                yield tuple(t[max(start - first, 0) : stop - first] for t in piece)
            if seen >= stop < self.rows:
                return
        if seen < stop:
            raise ValueError(
                f"{self.name} ended after {seen} rows. Give their number as rows=, and an iterable that begins anew each time, "
                "such as a loader, or a function that returns a generator."
            )


def row_tensor(array: np.ndarray) -> Tensor:
    """Return an array in the machine's byte order as a tensor."""
    return as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False), "A stream")
