"""Readers of `.npy`, `.npz`, `.csv` and `.parquet` files: functions from an open file to a table.

Each looks first at how much the file says it holds, and reads afterwards.
"""

from __future__ import annotations

__all__ = ["READERS"]

import csv
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from typing import IO, TYPE_CHECKING, Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np

from pyro_genmodels.datasets.columns import Columns, Table, check_finite, check_labels, choose_columns
from pyro_genmodels.utils.errors import ArgumentError, import_extra, listed, one_line, unknown_name
from pyro_genmodels.utils.files import check_size

if TYPE_CHECKING:
    from pandas import DataFrame


@contextmanager
def _errors_as_damage() -> Iterator[None]:
    """Turn any exception of a library that reads a file into a ValueError which says that the file is damaged.

    The library's warnings are ignored: what they are about is either refused later or harmless.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ValueError(f"the file is damaged ({type(error).__name__}: {one_line(error, 150)}). Save it again.") from error


def _npy(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int, *, missing: bool) -> Table:
    if columns is not None or labels is not None:
        raise ValueError("a .npy file is one array without names. To choose columns or labels, use .npz, .csv or .parquet.")
    return Table(check_finite(_read_array(file, size), missing=missing))


def _npz(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int, *, missing: bool) -> Table:
    with _errors_as_damage():
        archive = ZipFile(file)
    arrays = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")}
    others = [name for name in arrays if name != labels]
    chosen = columns or (("x",) if "x" in others else others)
    if len(chosen) != 1:
        raise ArgumentError(
            f"x is one array, but columns names {len(columns)} of them. Choose one of {listed(others)}."
            if columns
            else f"it is not known which array is x. Choose one by columns; the arrays are {listed(others)}.",
            argument="columns",
            example="NAME",
        )

    def read(name: str) -> np.ndarray:
        if name not in arrays:
            raise unknown_name("array", name, arrays)
        unpacked = arrays[name].file_size
        check_size(f"the array {one_line(name, 50)}, once unpacked,", unpacked, max_bytes)
        if arrays[name].compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise ValueError("its arrays are packed in another way than that of np.savez_compressed. Save it again.")
        with _errors_as_damage():
            stream = archive.open(arrays[name])
        with stream:
            return _read_array(stream, unpacked)

    x = check_finite(read(chosen[0]), missing=missing)
    return Table(x, None if labels is None else check_labels(read(labels), len(x)))


def _read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """Return the array in a .npy stream of `size` bytes.

    The size that the header claims is compared with the size of the stream before memory is allocated.
    """
    with _errors_as_damage():
        start = BytesIO(stream.read(2**16))  # more than numpy allows a header: the length that one claims is not believed
        version = np.lib.format.read_magic(start)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(start)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects, a pickle, which can run code and is never read. Save it as numbers.")
    if dtype.kind not in "biuf":
        raise ValueError(f"the array holds {dtype}, not real numbers. Convert it and save it again.")
    claimed, held = math.prod(shape) * dtype.itemsize, size - start.tell()
    if claimed != held:
        raise ValueError(f"the array's header claims {claimed} bytes, but {held} follow: it is damaged. Save it again.")
    with _errors_as_damage():
        stream.seek(start.tell())
        return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran_order else "C")


def _csv(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int, *, missing: bool) -> Table:
    import pandas as pd

    _check_lines(file, max_bytes)
    names, rows = _header_and_rows(file)
    check_size("the table, 8 bytes a number,", 8 * len(names) * rows, max_bytes)
    header = None if all(map(_is_number, names)) else 0
    with _errors_as_damage():
        file.seek(0)
        frame = pd.read_csv(file, header=header, index_col=False, skipinitialspace=True, low_memory=False, encoding="utf-8-sig")
        frame.columns = pd.Index(names if header == 0 else map(str, range(len(names))))
    if len(frame) != rows + (header is None):
        raise ValueError("its rows cannot be separated. Write one row per line, without line breaks in fields.")
    return _from_frame(frame, columns, labels, missing=missing)


def _check_lines(file: BinaryIO, max_bytes: int) -> None:
    """Raise an error for a text with bytes of zero, with too long a line, or with too many lines.

    The text is read block by block, since a single line may be as large as the file.
    """
    length = lines = blank = 0
    file.seek(0)
    while block := file.read(2**20):
        if b"\0" in block:
            raise ValueError("this is not UTF-8 text: some of its bytes are zero. Save it as CSV in UTF-8.")
        ends = [position for end in (b"\n", b"\r") for position in (block.find(end), block.rfind(end)) if position >= 0]
        length += min(ends, default=len(block))
        lines += max(block.count(b"\n"), block.count(b"\r"))
        # each pair of ends is counted once, also in a longer row of them
        blank += 2 * sum(map(block.count, (b"\n\n", b"\r\r", b"\r\n\r\n")))
        for found, share, what in ((length, 64, "bytes in a line"), (lines, 32, "lines"), (blank, 1024, "blank lines")):
            if found * share > max_bytes:
                raise ArgumentError(
                    f"it has more than {max_bytes // share:,} {what}. Few tables have. If you trust the file, raise max_bytes.",
                    argument="max_bytes",
                    example=str(10 * max_bytes),
                )
        length = len(block) - max(ends) if ends else length


def _header_and_rows(file: BinaryIO) -> tuple[list[str], int]:
    """Return the first row and the number of rows after it.

    All rows must have the same length. Pandas would fill up rows that are too short without an error.
    """
    file.seek(0)
    text = TextIOWrapper(file, "utf-8-sig", newline="")
    reader = csv.reader(text, strict=True, skipinitialspace=True)
    rows = (row for row in reader if len(row) > 1 or (row and row[0].strip()))
    try:
        first, start, count = next(rows, [""]), reader.line_num, 0
        if first == [""]:
            raise ValueError("the file is empty.")
        if len(first) == 1 and (mark := next((mark for mark in ";\t" if mark in first[0]), None)):
            raise ValueError(f"its fields are separated by {mark!r}. Save it with commas between fields and decimal points.")
        for count, row in enumerate(rows, 1):  # noqa: B007
            if len(row) != len(first):
                found = f"line {reader.line_num} has {len(row)} fields, but line {start} has {len(first)}"
                raise ValueError(f"{found}. Give all lines the same number of fields.")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 text ({error.reason}). Save it as CSV in UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} cannot be read ({error}). Look for a stray quotation mark.") from error
    finally:
        text.detach()
    return [name.strip() for name in first], count


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field


def _from_frame(frame: DataFrame, columns: Columns, labels: str | None, *, missing: bool) -> Table:
    """Return the chosen columns of a data frame of numpy's data types."""
    dtypes = frame.dtypes.to_dict()

    def read(names: Sequence[str]) -> np.ndarray:
        return frame[list(names)].to_numpy(np.result_type(*{dtypes[name] for name in names}))

    return choose_columns(
        list(frame.columns),
        len(frame),
        {name for name, dtype in dtypes.items() if dtype.kind in "biuf"},
        lambda name: _example(name, frame[name]),
        read,
        columns,
        labels,
        missing=missing,
    )


def _example(name: str, column: Any) -> str:
    """Return a text that shows why a column of a data frame is not numeric."""
    import pandas as pd

    present = column.dropna()
    if present.isin([True, False]).all():
        return f"{listed([name])} holds True, False and missing values"
    number = pd.to_numeric(column.astype(str), errors="coerce")
    row = int((number.isna() & column.notna()).to_numpy().argmax())
    found = str(column.iloc[row])
    hint = ""
    if re.fullmatch(r"[-+]?\d+", found):
        hint = ", a whole number beyond 64 bits; write it with a decimal point"
    elif re.fullmatch(r"[-+]?\d[\d.,' ]*", found):
        hint = ", whose numbers want a decimal point and no other marks"
    return f"row {row + 1} of {listed([name])} is {found[:50]!r}{hint}"


def _parquet(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int, *, missing: bool) -> Table:
    parquet = import_extra("pyarrow.parquet", extra="parquet", by="A .parquet file")
    import pyarrow as pa

    with _errors_as_damage():
        # with threads, one could still read the bytes after an error in another has freed them, which crashes the process
        source = parquet.ParquetFile(file, pre_buffer=False)
        schema, rows = source.schema_arrow, source.metadata.num_rows
        index = (schema.pandas_metadata or {}).get("index_columns", [])
        fields = {field.name: field.type for field in schema if field.name not in index}
        names = [name for name in schema.names if name not in index]

    def read(names: Sequence[str]) -> np.ndarray:
        with _errors_as_damage():
            claimed = _unpacked_bytes(source.metadata, set(names))
        check_size("the table, once unpacked,", claimed, max_bytes)
        with _errors_as_damage():
            table = source.read(columns=list(names), use_threads=False)
            parts = [table.column(name) for name in names]
            parts = [part.cast(pa.int8()) if pa.types.is_boolean(part.type) and part.null_count else part for part in parts]
            return np.stack([part.to_numpy() for part in parts], axis=1)

    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    numeric = {name for name, kind in fields.items() if any(is_kind(kind) for is_kind in kinds)}
    return choose_columns(
        names,
        rows,
        numeric,
        lambda name: f"{listed([name])} holds {one_line(fields[name], 50)}",
        read,
        columns,
        labels,
        missing=missing,
    )


def _unpacked_bytes(metadata: Any, names: set[str]) -> int:
    """Return the number of bytes that columns of a parquet file claim to hold, once they are unpacked."""
    chosen = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in names]
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    values = sum(max(group.num_rows, group.column(i).num_values) for group in groups for i in chosen)
    return 8 * max(values, len(names) * metadata.num_rows)


READERS: Mapping[str, Callable[..., Table]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Functions from (file, its size, columns, labels, largest size, missing=) to a table, by suffix."""
