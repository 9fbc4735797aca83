"""Sources of the rows of a stream: row groups of parquet files, `.npy` files, arrays that are sliced, and iterables.

A source knows its number of rows without reading them, and yields pieces of them from any row on. Files are read by ordinary
reads, not mapped into memory: a file that is cut short while it is read then gives an error, where a mapped one ends the
process. A file must stay as it was when the stream was opened.
"""

from __future__ import annotations

__all__ = ["ArraySource", "FileState", "IterableSource", "Piece", "Source", "open_npy", "open_parquet"]

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pyro_genmodels.utils.errors import import_extra, listed, one_line, unknown_name
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
                "stay "
                "as they are during training: write new rows to new files, and open the stream anew."
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
            yield self.select(tuple(_tensor(np.array(array[first:last])) for array in self.arrays))


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
                "such "
                "as a loader, or a function that returns a generator."
            )


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array in the machine's byte order as a tensor."""
    return as_tensor(array.astype(array.dtype.newbyteorder("="), copy=False), "A stream")


# Files of numpy.


def open_npy(path: Path, select: Callable[[Piece], Piece]) -> list[Source]:
    """Return the source in a `.npy` file, whose header alone is read.

    Raises:
        ValueError: if the file is damaged, or holds anything but rows of numbers in C order.
    """
    return [_Npy(path, select)]


class _Npy(Source):
    """The rows of a `.npy` file."""

    def __init__(self, path: Path, select: Callable[[Piece], Piece]) -> None:
        self.file, self.name, self.select = FileState.of(path), str(path), select
        with path.open("rb") as file:
            try:
                version = np.lib.format.read_magic(file)
                reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shape, fortran_order, self.dtype = reader(file)
            except Exception as error:
                raise ValueError(f"{path} is damaged: it has no header of a .npy file ({one_line(error, 100)}).") from error
            self.offset = file.tell()
        if self.dtype.kind not in "biuf" or not self.shape:
            raise ValueError(f"{path} holds {self.dtype} of shape {self.shape}, but a stream wants rows of real numbers.")
        if fortran_order and len(self.shape) > 1:
            raise ValueError(
                f"{path} is stored column by column, so that its rows lie all over the file. Save it row by row: np.save(path, "
                "np.ascontiguousarray(x))."
            )
        self.rows = self.shape[0]
        self.row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.form = f"rows of {self.dtype} of shape {self.shape[1:]}"
        if self.offset + self.rows * self.row_bytes != self.file.size:
            raise ValueError(
                f"{path} is cut short or damaged: its header says {self.rows} rows of {self.row_bytes} bytes, but "
                f"{self.file.size - self.offset:,} bytes follow. Save it again."
            )

    def read(self, start: int, stop: int) -> Iterator[Piece]:
        for first, last in self._steps(start, stop):
            self.file.check()  # type: ignore[union-attr]
            count = (last - first) * math.prod(self.shape[1:])
            with open(self.name, "rb") as file:
                file.seek(self.offset + first * self.row_bytes)
                array = np.fromfile(file, self.dtype, count)
            if len(array) < count:
                raise ValueError(f"{self.name} was cut short while it was read. Save it again.")
            yield self.select((_tensor(array.reshape(-1, *self.shape[1:])),))


# Files of parquet.


def open_parquet(path: Path, columns: Sequence[str] | None, context: str | Sequence[str] | None) -> list[Source]:
    """Return the row groups of a parquet file, whose footer alone is read.

    Args:
        path: path of the file.
        columns: columns that make up x, or None for all but those of the context.
        context: column of the context, which is then (N,), or columns that make it up, (N, len(context)); or None.

    Raises:
        ValueError: if the file is damaged, lacks a column, or has one that does not hold numbers.
        ImportError: if pyarrow, of the extra ``parquet``, is missing.
    """
    file = _ParquetFile(path, columns, context)
    return [_RowGroup(file, number, rows) for number, rows in enumerate(file.group_rows) if rows]


class _ParquetFile:
    """A parquet file with the columns that are read from it."""

    def __init__(self, path: Path, columns: Sequence[str] | None, context: str | Sequence[str] | None) -> None:
        pa = import_extra("pyarrow", extra="parquet", by="A stream of parquet files")
        self.parquet = import_extra("pyarrow.parquet", extra="parquet", by="A stream of parquet files")
        self.state = FileState.of(path)
        with errors_as_damage(str(path)), self._opened() as file:
            schema, metadata = file.schema_arrow, file.metadata
            self.group_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            index = (schema.pandas_metadata or {}).get("index_columns", [])
        types = {field.name: field.type for field in schema if field.name not in index}
        self.context = [context] if isinstance(context, str) else list(context or ())
        self.is_label = isinstance(context, str)
        self.columns = [name for name in types if name not in self.context] if columns is None else list(columns)
        for name in (*self.columns, *self.context):
            if name not in types:
                raise ValueError(f"{path}: {unknown_name('column', name, types)}")
            kind = types[name]
            if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
                raise ValueError(
                    f"{path}: the column {name!r} holds {kind}, but a stream wants numbers. Choose others by columns=."
                )
        if not self.columns:
            raise ValueError(f"{path} has no columns for x.")
        self.form = "the columns " + ", ".join(f"{name} ({types[name]})" for name in (*self.columns, *self.context))
        dtypes = [[np.dtype(types[n].to_pandas_dtype()) for n in names] for names in (self.columns, self.context)]
        self.dtypes = [np.result_type(*part) for part in dtypes if part]
        self.row_bytes = sum(len(part) * dtype.itemsize for part, dtype in zip(dtypes, self.dtypes, strict=False))

    def _opened(self) -> Any:
        # With threads, one could still read the bytes after an error in another has freed them, which crashes the process.
        return self.parquet.ParquetFile(self.state.path, pre_buffer=False, page_checksum_verification=True)

    def read(self, group: int, start: int, stop: int) -> Iterator[Piece]:
        """Yield rows of a row group."""
        self.state.check()
        name, at = f"{self.state.path}, row group {group}", 0
        rows = max(1, min(PIECE_BYTES // self.row_bytes, self.group_rows[group]))
        with errors_as_damage(name):
            file = self._opened()
        with file:
            batches = file.iter_batches(
                batch_size=rows, row_groups=[group], columns=[*self.columns, *self.context], use_threads=False
            )
            while at < stop:
                with errors_as_damage(name):
                    batch = next(batches, None)
                if batch is None:
                    raise ValueError(f"{name} is damaged: it ended after {at} of {self.group_rows[group]} rows. Save it again.")
                first, at = at, at + batch.num_rows
                if at > start:
                    yield self._piece(batch.slice(max(start - first, 0), min(at, stop) - max(start, first)), name)

    def _piece(self, batch: Any, name: str) -> Piece:
        """Return rows as tensors."""
        x = _columns(batch, self.columns, self.dtypes[0], name)
        if not self.context:
            return (_tensor(x),)
        context = _columns(batch, self.context, self.dtypes[1], name)
        return _tensor(x), _tensor(context[:, 0] if self.is_label else context)


def _columns(batch: Any, names: Sequence[str], dtype: np.dtype, source: str) -> np.ndarray:
    """Return columns of a record batch side by side, with NaN for missing values."""
    array = np.empty((batch.num_rows, len(names)), dtype)
    for i, name in enumerate(names):
        column = batch.column(name)
        if column.null_count:
            if dtype.kind != "f":
                raise ValueError(
                    f"{source}: the column {name!r} of {column.type} has {column.null_count} missing values, which {dtype} "
                    "cannot "
                    "hold. Fill them, or save the column as floats."
                )
            column = column.cast("float64")
        array[:, i] = column.to_numpy(zero_copy_only=False)
    return array


@dataclass(eq=False)
class _RowGroup(Source):
    """A row group of a parquet file."""

    parquet: _ParquetFile
    number: int
    rows: int
    is_whole = True

    def __post_init__(self) -> None:
        self.file, self.row_bytes, self.form = self.parquet.state, self.parquet.row_bytes, self.parquet.form

    @property
    def name(self) -> str:
        """Path of the file, and number of the row group."""
        return f"{self.parquet.state.path}, row group {self.number}"

    def read(self, start: int, stop: int) -> Iterator[Piece]:
        return self.parquet.read(self.number, start, stop)


@contextmanager
def errors_as_damage(name: str) -> Iterator[None]:
    """Turn any exception of a library that reads a file into a ValueError which says that this part of it is damaged."""
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no such file. Check its name and folder.") from error
    except Exception as error:
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {one_line(error, 150)}). Save it again.") from error
