"""Tables of numbers read from `.npy`, `.npz`, `.csv` and `.parquet` files, with checks of their contents.

Nothing is ever unpickled, because a pickle can run code.
"""

from __future__ import annotations

__all__ = ["ArgumentError", "Table", "read_table"]

import csv
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO, TYPE_CHECKING
from zipfile import ZipFile

import numpy as np

from pyro_genmodels.utils.errors import import_extra, listed, unknown_name

if TYPE_CHECKING:
    from pandas import DataFrame

Columns = tuple[str, ...] | None


class ArgumentError(ValueError):
    """A fault of a file that another value of an argument would avoid.

    Args:
        message: text of the error.
        argument: name of that argument, such as "columns".
        example: value that the argument could have, as text.
    """

    def __init__(self, message: str, *, argument: str, example: str) -> None:
        super().__init__(message)
        self.argument, self.example = argument, example


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


def read_table(path: str | Path, *, columns: str | Sequence[str] | None = None, labels: str | None = None) -> Table:
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

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if the file is not of the format of its suffix, is damaged, has no rows or rows of different lengths, lacks
            the columns, or holds anything but finite numbers in them. Rows are counted from 1, without the header.
        ArgumentError: if the file can be read with other columns; this is a ValueError too.
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
        raw = _read_bytes(path)
        return READERS[path.suffix.lower()](raw, names, labels)
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}", argument=error.argument, example=error.example) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


FIRST_BYTES = {b"\x93NUMPY": ".npy", b"PK\x03\x04": ".npz", b"PAR1": ".parquet", b"\x80": "a pickle"}
"""Format by the first bytes of a file. Other files are text."""


def _read_bytes(path: Path) -> bytes:
    """Return the contents of a file whose suffix is known and agrees with its first bytes."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device, not a file")
        if (suffix := path.suffix.lower()) not in READERS:
            raise ValueError(f"its suffix {path.suffix!r} is not one of {listed(READERS)}.")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file. Check its name and folder.") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}.") from error
    if not raw:
        raise ValueError("the file is empty.")
    found = next((kind for start, kind in FIRST_BYTES.items() if raw.startswith(start)), ".csv")
    if found == "a pickle":
        raise ValueError("this is a pickle, which can run code and is never read. Save the numbers by np.save or np.savez.")
    if found != suffix:
        found = f"it is {found}" if found != ".csv" else "it is damaged or of another format"
        raise ValueError(f"its first bytes are not those of {suffix}: {found}. Correct its suffix, or save it again.")
    return raw


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
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"the file is damaged ({type(error).__name__}: {reason}). Save it again.") from error


def _npy(raw: bytes, columns: Columns, labels: str | None) -> Table:
    if columns is not None or labels is not None:
        raise ValueError("a .npy file is one array without names. To choose columns or labels, use .npz, .csv or .parquet.")
    return Table(_check_finite(_read_array(BytesIO(raw), len(raw))))


def _npz(raw: bytes, columns: Columns, labels: str | None) -> Table:
    with _errors_as_damage():
        archive = ZipFile(BytesIO(raw))
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
        with _errors_as_damage():
            stream = archive.open(arrays[name])
        with stream:
            return _read_array(stream, arrays[name].file_size)

    x = _check_finite(read(chosen[0]))
    return Table(x, None if labels is None else _check_labels(read(labels), len(x)))


def _read_array(stream: IO[bytes], size: int) -> np.ndarray:
    """Return the array in a .npy stream of `size` bytes.

    The size that the header claims is compared with the size of the stream before memory is allocated.
    """
    with _errors_as_damage():
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects, a pickle, which can run code and is never read. Save it as numbers.")
    if dtype.kind not in "biuf":
        raise ValueError(f"the array holds {dtype}, not real numbers. Convert it and save it again.")
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if claimed != held:
        raise ValueError(f"the array's header claims {claimed} bytes, but {held} follow: it is damaged. Save it again.")
    with _errors_as_damage():
        return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran_order else "C")


def _csv(raw: bytes, columns: Columns, labels: str | None) -> Table:
    import pandas as pd

    names, rows = _header_and_rows(raw)
    header = None if all(map(_is_number, names)) else 0
    with _errors_as_damage():
        frame = pd.read_csv(
            BytesIO(raw), header=header, index_col=False, skipinitialspace=True, low_memory=False, encoding="utf-8-sig"
        )
        frame.columns = pd.Index(names if header == 0 else map(str, range(len(names))))
    if len(frame) != rows + (header is None):
        raise ValueError("its rows cannot be separated. Write one row per line, without line breaks in fields.")
    return _from_frame(frame, columns, labels)


def _header_and_rows(raw: bytes) -> tuple[list[str], int]:
    """Return the first row and the number of rows after it.

    All rows must have the same length. Pandas would fill up rows that are too short without an error.
    """
    if b"\0" in raw:
        raise ValueError("this is not UTF-8 text: some of its bytes are zero. Save it as CSV in UTF-8.")
    reader = csv.reader(TextIOWrapper(BytesIO(raw), "utf-8-sig", newline=""), strict=True, skipinitialspace=True)
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
    return [name.strip() for name in first], count


def _is_number(field: str) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return "_" not in field


def _parquet(raw: bytes, columns: Columns, labels: str | None) -> Table:
    import pandas as pd

    parquet = import_extra("pyarrow.parquet", extra="parquet", by="A .parquet file")
    with _errors_as_damage():
        # with threads, one could still read the bytes after an error in another has freed them, which crashes the process
        frame = parquet.ParquetFile(BytesIO(raw), pre_buffer=False).read(use_threads=False).to_pandas(use_threads=False)
        frame.columns = pd.Index(map(str, frame.columns))
    return _from_frame(frame, columns, labels)


def _from_frame(frame: DataFrame, columns: Columns, labels: str | None) -> Table:
    names = list(frame.columns)
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"several columns have the same name: {listed(repeated.unique())}. Rename them.")
    for name in (*(columns or ()), *(() if labels is None else (labels,))):
        if name not in names:
            raise unknown_name("column", name, names)
    chosen = columns or tuple(name for name in names if name != labels)
    if not len(frame) or not chosen:
        raise ValueError(f"there are {len(frame)} rows of {len(chosen)} columns, but at least one of each is needed.")
    if not all(chosen):
        raise ArgumentError(
            f"a column has no name (an index?). Name it, or choose columns among {listed(names)}.",
            argument="columns",
            example="a,b",
        )
    if text := _not_numeric(frame, chosen):
        numeric = listed(name for name in names if name not in ("", labels) and not _not_numeric(frame, [name]))
        raise ArgumentError(f"{text}. Choose columns among those that are: {numeric}.", argument="columns", example="a,b")
    x = _check_finite(_values(frame, chosen), chosen)
    if labels is None:
        return Table(x, columns=chosen)
    if text := _not_numeric(frame, [labels]):
        raise ValueError(f"{text}. Number the classes from 0.")
    return Table(x, _check_labels(_values(frame, [labels])[:, 0], len(x)), chosen)


def _not_numeric(frame: DataFrame, names: Sequence[str]) -> str:
    """Return a text about the columns that are not numeric, with an example, or "" if all are."""
    import pandas as pd

    text = [name for name in names if frame[name].dtype.kind not in "biuf"]
    if not text:
        return ""
    column = frame[text[0]]
    bad = pd.to_numeric(column.astype(str), errors="coerce").isna() & column.notna()
    row = int(bad.to_numpy().argmax())
    return f"not numeric: {listed(text)} (row {row + 1} of {listed(text[:1])} is {str(column.iloc[row])[:50]!r})"


def _values(frame: DataFrame, names: Sequence[str]) -> np.ndarray:
    """Return numeric columns side by side, (N, len(names)), with NaN for missing values."""
    series = (frame[name] for name in names)
    return np.stack([s.to_numpy(float, na_value=np.nan) if s.isna().any() else s.to_numpy() for s in series], axis=1)


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


READERS: Mapping[str, Callable[[bytes, Columns, str | None], Table]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Functions from (contents of a file, columns, labels) to a table, by suffix."""
