"""Tables of numbers read from `.npy`, `.npz`, `.csv` and `.parquet` files, with checks of their contents.

Nothing is ever unpickled, because a pickle can run code. Sizes are compared with a limit before anything is read or unpacked: a
few kilobytes of a compressed file can stand for any number of rows.
"""

from __future__ import annotations

__all__ = ["Table", "read_table"]

import csv
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np

from pyro_genmodels.utils.errors import ArgumentError, import_extra, listed, one_line, unknown_name
from pyro_genmodels.utils.files import MAX_BYTES, check_size

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = tuple[str, ...] | None


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        x: booleans, integers or finite floats, (N, *event_shape), with N at least 1.
        labels: classes from 0, (N,) int64, or None.
        columns: names of the coordinates of x, which is then (N, len(columns)); None if the file has no names.
    """

    x: np.ndarray
    labels: np.ndarray | None = None
    columns: Columns = None


def read_table(
    path: str | Path,
    *,
    columns: str | Sequence[str] | None = None,
    labels: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Table:
    r"""Read the rows of a file.

    - `.npy`: one array (N, ...).
    - `.npz`: one of its arrays; another may hold labels.
    - `.csv`: UTF-8 text with commas between fields and rows of equal length. A first row that holds only numbers is data, and
      the columns are then called "0", "1", ...; any other first row holds the names of the columns.
    - `.parquet`: a table, read by pyarrow.

    Args:
        path: path of the file; its suffix gives the format.
        columns: columns that make up x, in this order; by default all but the labels. For a `.npz` file, name of one array, by
            default "x" or the only array that is not the labels.
        labels: column, or array of a `.npz` file, that holds classes as whole numbers from 0.
        max_bytes: largest size of the file and of the numbers in it, 8 bytes each; by default 1 GB. For a `.csv` file it also
            limits the length of a line, 1/64 of it, and the number of lines, 1/32 of it, or 1/1024 for blank ones.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if the file is not of the format of its suffix, is damaged, has no rows or rows of different lengths, lacks
            the columns, or holds anything but finite numbers in them. Rows are counted from 1, without the header.
        ArgumentError: if the file can be read with other columns or a larger `max_bytes`; this is a ValueError too.
        ImportError: for a `.parquet` file without pyarrow.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "flowers.csv")
        ...     _ = path.write_text("length,width,kind\n5.1,3.5,0\n6.2,2.9,1\n")
        ...     table = read_table(path, labels="kind")
        >>> table.columns, table.x.shape, table.labels.tolist()
        (('length', 'width'), (2, 2), [0, 1])
    """
    path = Path(path)
    names = (columns,) if isinstance(columns, str) else columns if columns is None else tuple(columns)
    try:
        if names is not None and (not names or len(set(names)) < len(names) or labels in names):
            raise ValueError(f"columns wants different names, without that of the labels, but found {listed(names)}.")
        with _opened(path, max_bytes) as (file, size):
            return READERS[path.suffix.lower()](file, size, names, labels, max_bytes)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}", argument=error.argument, example=error.example) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


FIRST_BYTES = {
    b"\x93NUMPY": ".npy",
    b"PK\x03\x04": ".npz",
    b"PAR1": ".parquet",
    b"\x80": "a pickle",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
}
"""Format by the first bytes of a file. Other files are text."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zip", ".zst")
"""Suffixes of compressed files."""


@contextmanager
def _opened(path: Path, max_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file whose suffix is known and agrees with its first bytes, and which is not too large. Yield it and its size."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device, not a file")
        if (suffix := path.suffix.lower()) not in READERS:
            cure = "It is compressed: unpack it first." if suffix in COMPRESSED else "Save the rows in one of these formats."
            raise ValueError(f"its suffix {path.suffix!r} is not one of {listed(READERS)}. {cure}")
        with path.open("rb") as file:
            size = path.stat().st_size
            if not size:
                raise ValueError("the file is empty.")
            check_size("the file", size, max_bytes)
            start = file.read(8)
            file.seek(0)
            found = next((kind for first, kind in FIRST_BYTES.items() if start.startswith(first)), ".csv")
            if found == "a pickle":
                raise ValueError(
                    "this is a pickle, which can run code and is never read. Save the numbers by np.save or np.savez."
                )
            if found != suffix:
                found = f"it is {found}" if found != ".csv" else "it is damaged or of another format"
                raise ValueError(f"its first bytes are not those of {suffix}: {found}. Correct its suffix, or save it again.")
            yield file, size
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file. Check its name and folder.") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}.") from error


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


def _npy(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int) -> Table:
    if columns is not None or labels is not None:
        raise ValueError("a .npy file is one array without names. To choose columns or labels, use .npz, .csv or .parquet.")
    return Table(_check_finite(_read_array(file, size)))


def _npz(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int) -> Table:
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

    x = _check_finite(read(chosen[0]))
    return Table(x, None if labels is None else _check_labels(read(labels), len(x)))


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


def _csv(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int) -> Table:
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
    return _from_frame(frame, columns, labels)


def _check_lines(file: BinaryIO, max_bytes: int) -> None:
    """Raise an error for a text of zero bytes, of lines without end, or of too many lines. Read it block by block."""
    length = lines = blank = 0
    file.seek(0)
    while block := file.read(2**20):
        if b"\0" in block:
            raise ValueError("this is not UTF-8 text: some of its bytes are zero. Save it as CSV in UTF-8.")
        ends = [position for end in (b"\n", b"\r") for position in (block.find(end), block.rfind(end)) if position >= 0]
        length += min(ends, default=len(block))
        lines += max(block.count(b"\n"), block.count(b"\r"))
        blank += 2 * sum(map(block.count, (b"\n\n", b"\r\r", b"\r\n\r\n")))
        for found, share, what in ((length, 64, "bytes in a line"), (lines, 32, "lines"), (blank, 1024, "blank lines")):
            if found * share > max_bytes:
                raise ArgumentError(
                    f"it has more than {max_bytes // share:,} {what}, as no table should. If you trust it, raise max_bytes.",
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


def _from_frame(frame: DataFrame, columns: Columns, labels: str | None) -> Table:
    """Return the chosen columns of a data frame of numpy's data types."""
    dtypes = dict(zip(frame.columns, frame.dtypes, strict=False))

    def read(names: Sequence[str]) -> np.ndarray:
        return frame[list(names)].to_numpy(np.result_type(*{dtypes[name] for name in names}))

    return _table(
        list(frame.columns),
        len(frame),
        {name for name, dtype in dtypes.items() if dtype.kind in "biuf"},
        lambda name: _example(name, frame[name]),
        read,
        columns,
        labels,
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


def _parquet(file: BinaryIO, size: int, columns: Columns, labels: str | None, max_bytes: int) -> Table:
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
    return _table(
        names, rows, numeric, lambda name: f"{listed([name])} holds {one_line(fields[name], 50)}", read, columns, labels
    )


def _unpacked_bytes(metadata: Any, names: set[str]) -> int:
    """Return the number of bytes that columns of a parquet file claim to hold, once they are unpacked."""
    chosen = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path in names]
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    values = sum(max(group.num_rows, group.column(i).num_values) for group in groups for i in chosen)
    return 8 * max(values, len(names) * metadata.num_rows)


def _table(
    names: list[str],
    rows: int,
    numeric: set[str],
    example: Callable[[str], str],
    read: Callable[[Sequence[str]], np.ndarray],
    columns: Columns,
    labels: str | None,
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

    def check_numeric(wanted: Sequence[str]) -> str:
        text = [name for name in wanted if name not in numeric]
        return f"not numeric: {listed(text)} ({example(text[0])})" if text else ""

    if text := check_numeric(chosen):
        others = listed(name for name in names if name in numeric and name not in ("", labels))
        raise ArgumentError(f"{text}. Choose columns among those that are: {others}.", argument="columns", example="a,b")
    x = _check_finite(read(chosen), chosen)
    if labels is None:
        return Table(x, columns=chosen)
    if text := check_numeric([labels]):
        raise ValueError(f"{text}. Number the classes from 0.")
    return Table(x, _check_labels(read([labels])[:, 0], len(x)), chosen)


def _check_finite(x: np.ndarray, columns: Columns = None) -> np.ndarray:
    """Return the data in the machine's byte order, once they are known to be finite numbers in at least one row."""
    if not x.ndim or not x.size:
        raise ValueError(f"an array of shape {x.shape} holds no rows of numbers. The shape should be (N, ...), N at least 1.")
    with np.errstate(over="ignore"):
        x = x.astype(x.dtype.newbyteorder("=") if x.dtype.itemsize <= 8 else np.float64, order="C")
    bad = ~np.isfinite(x)
    if bad.any():
        rows = bad.reshape(len(x), -1)
        first = int(rows.any(1).argmax())
        where = f"row {first + 1}" + (f", column {listed([columns[int(rows[first].argmax())]])}" if columns else "")
        raise ValueError(
            f"{int(rows.any(1).sum())} of {len(x)} rows hold missing or infinite values, first {where}. Drop or fill them."
        )
    return x


def _check_labels(y: np.ndarray, rows: int) -> np.ndarray:
    """Return the labels as int64, once they are known to be one whole number from 0 for each row."""
    if y.shape != (rows,):
        raise ValueError(f"the labels have the shape {y.shape}, not ({rows},), one for each row.")
    with np.errstate(invalid="ignore"):
        bad = ~((y >= 0) & (y < 2**31) & (y % 1 == 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"labels should be 0, 1, 2, ..., but the label of row {row + 1} is {y[row]}. Number the classes.")
    return y.astype(np.int64)


READERS: Mapping[str, Callable[[BinaryIO, int, Columns, str | None, int], Table]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Functions from (file, its size, columns, labels, largest size) to a table, by suffix."""
