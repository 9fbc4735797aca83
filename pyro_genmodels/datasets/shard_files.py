"""Sources of the rows of a stream in files: row groups of parquet, and `.npy`.

Files are read by ordinary reads, not mapped into memory: a file that is cut short while it is read then gives an error, where a
mapped one ends the process.
"""

from __future__ import annotations

__all__ = ["open_npy", "open_parquet"]

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_genmodels.datasets.shards import PIECE_BYTES, FileState, Piece, Source, row_tensor
from pyro_genmodels.utils.errors import import_extra, one_line, unknown_name

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
            yield self.select((row_tensor(array.reshape(-1, *self.shape[1:])),))


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
        with _errors_as_damage(str(path)), self._opened() as file:
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
        with _errors_as_damage(name):
            file = self._opened()
        with file:
            batches = file.iter_batches(
                batch_size=rows, row_groups=[group], columns=[*self.columns, *self.context], use_threads=False
            )
            while at < stop:
                with _errors_as_damage(name):
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
            return (row_tensor(x),)
        context = _columns(batch, self.context, self.dtypes[1], name)
        return row_tensor(x), row_tensor(context[:, 0] if self.is_label else context)


def _columns(batch: Any, names: Sequence[str], dtype: np.dtype, source: str) -> np.ndarray:
    """Return columns of a record batch side by side, with NaN for missing values."""
    array = np.empty((batch.num_rows, len(names)), dtype)
    for i, name in enumerate(names):
        column = batch.column(name)
        if column.null_count:
            if dtype.kind != "f":
                raise ValueError(
                    f"{source}: the column {name!r} of {column.type} has {column.null_count} missing values, which {dtype} "
                    "cannot hold. Fill them, or save the column as floats."
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
def _errors_as_damage(name: str) -> Iterator[None]:
    """Turn any exception of a library that reads a file into a ValueError which says that this part of it is damaged."""
    try:
        yield
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no such file. Check its name and folder.") from error
    except Exception as error:
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {one_line(error, 150)}). Save it again.") from error
