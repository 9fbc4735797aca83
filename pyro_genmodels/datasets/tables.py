"""Rows of numbers from `.npy`, `.npz`, `.csv` and `.parquet` files, checked at this border.

Nothing is ever unpickled, for a pickle can run code.
"""

from __future__ import annotations

__all__ = ["Table", "read_table"]

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


@dataclass(frozen=True)
class Table:
    """Rows of numbers.

    Attributes:
        x: (N, *event_shape) of booleans, integers or finite floats, N at least 1.
        labels: (N,) int64, from 0, or None.
        columns: names of the coordinates of x, which is then (N, len(columns)); None where the file names none.
    """

    x: np.ndarray
    labels: np.ndarray | None = None
    columns: Columns = None


def read_table(path: str | Path, *, columns: str | Sequence[str] | None = None, labels: str | None = None) -> Table:
    r"""Reads the rows of a file.

    - `.npy`: one array (N, ...).
    - `.npz`: one of its arrays; another may hold labels.
    - `.csv`: UTF-8, commas between fields, rows of one length. A first row of nothing but numbers is data, and the columns are
      then called "0", "1", ...; else it names them.
    - `.parquet`: through pyarrow.

    Args:
        path: of the file; its suffix says which of these.
        columns: that make x, in this order, by default all but the labels; of a `.npz` the name of one array, by default "x"
            or the only one that is not the labels.
        labels: the column, or the array of a `.npz`, that holds classes as whole numbers from 0.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it is not what its suffix says, is damaged, has no rows or rows of several lengths, has not these
            columns, or holds anything but finite numbers in them. Rows are counted from 1, a header aside.
        ImportError: for a `.parquet` without pyarrow.

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
            raise ValueError(f"columns wants different names, and not that of the labels, but found {listed(names)}.")
        raw = _read_bytes(path)
        return READERS[path.suffix.lower()](raw, names, labels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


FIRST_BYTES = {b"\x93NUMPY": ".npy", b"PK\x03\x04": ".npz", b"PAR1": ".parquet", b"\x80": "a pickle"}
"""What a file is by its first bytes; else it is taken for text."""


def _read_bytes(path: Path) -> bytes:
    """All of the file, if it is one, of a suffix that is known, and begins as such files do."""
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is a folder or a device, but wanted is a file")
        if (suffix := path.suffix.lower()) not in READERS:
            raise ValueError(f"its suffix is {path.suffix!r}, but wanted is one of {listed(READERS)}.")
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file. Check its name and folder.") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read: {error.strerror or error}.") from error
    if not raw:
        raise ValueError("the file is empty, but wanted are rows of numbers.")
    found = next((kind for start, kind in FIRST_BYTES.items() if raw.startswith(start)), ".csv")
    if found == "a pickle":
        raise ValueError("this is a pickle, which can run code and is never read. Save the numbers with np.save or np.savez.")
    if found != suffix:
        found = f"it is {found}" if found != ".csv" else "it is damaged, or something else"
        raise ValueError(f"its first bytes are not those of {suffix}: {found}. Name it by what it is, or save it again.")
    return raw


@contextmanager
def _damage_told() -> Iterator[None]:
    """What a library raises at a damaged file, in our words; what it warns of is either refused later or harmless."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"the file is damaged ({type(error).__name__}: {reason}). Save it again.") from error


def _npy(raw: bytes, columns: Columns, labels: str | None) -> Table:
    if columns is not None or labels is not None:
        raise ValueError("a .npy is one array without names: columns and labels want .npz, .csv or .parquet.")
    return Table(_checked(_array(BytesIO(raw), len(raw))))


def _npz(raw: bytes, columns: Columns, labels: str | None) -> Table:
    with _damage_told():
        archive = ZipFile(BytesIO(raw))
    arrays = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")}
    others = [name for name in arrays if name != labels]
    chosen = columns or (("x",) if "x" in others else others)
    if len(chosen) != 1:
        raise ValueError(f"one array is wanted as x. Choose it by columns (--columns NAME); there are {listed(others)}.")

    def read(name: str) -> np.ndarray:
        if name not in arrays:
            raise unknown_name("array", name, arrays)
        with _damage_told():
            stream = archive.open(arrays[name])
        with stream:
            return _array(stream, arrays[name].file_size)

    x = _checked(read(chosen[0]))
    return Table(x, None if labels is None else _classes(read(labels), len(x)))


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """The array of a .npy stream of so many bytes. What its header claims must be there before memory is taken for it."""
    with _damage_told():
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("the array holds Python objects, a pickle, which can run code and is never read. Save it as numbers.")
    if dtype.kind not in "biuf":
        raise ValueError(f"the array holds {dtype}, but wanted are real numbers. Convert it and save it again.")
    claimed, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if claimed != held:
        raise ValueError(f"the array's header claims {claimed} bytes, but {held} follow: it is damaged. Save it again.")
    with _damage_told():
        return np.frombuffer(stream.read(), dtype).reshape(shape, order="F" if fortran_order else "C")


def _csv(raw: bytes, columns: Columns, labels: str | None) -> Table:
    import pandas as pd

    names, rows = _header_and_rows(raw)
    header = None if all(map(_is_number, names)) else 0
    with _damage_told():
        frame = pd.read_csv(
            BytesIO(raw), header=header, index_col=False, skipinitialspace=True, low_memory=False, encoding="utf-8-sig"
        )
        frame.columns = pd.Index(names if header == 0 else map(str, range(len(names))))
    if len(frame) != rows + (header is None):
        raise ValueError("its rows cannot be told apart. Write one row per line, and no line breaks in a field.")
    return _of_frame(frame, columns, labels)


def _header_and_rows(raw: bytes) -> tuple[list[str], int]:
    """The first row, and how many follow. All must be of one length: pandas would fill up those that are too short."""
    if b"\0" in raw:
        raise ValueError("this is no UTF-8 text, for some of its bytes are zero. Save it as CSV in UTF-8.")
    reader = csv.reader(TextIOWrapper(BytesIO(raw), "utf-8-sig", newline=""), strict=True, skipinitialspace=True)
    rows = (row for row in reader if len(row) > 1 or (row and row[0].strip()))
    try:
        first, start, count = next(rows, [""]), reader.line_num, 0
        if first == [""]:
            raise ValueError("the file is empty, but wanted are rows of numbers.")
        if len(first) == 1 and (mark := next((mark for mark in ";\t" if mark in first[0]), None)):
            raise ValueError(f"its fields are separated by {mark!r}. Save it with commas, and points in numbers.")
        for count, row in enumerate(rows, 1):  # noqa: B007
            if len(row) != len(first):
                found = f"line {reader.line_num} has {len(row)} fields, but line {start} has {len(first)}"
                raise ValueError(f"{found}. Give all lines the same number of fields.")
    except UnicodeDecodeError as error:
        raise ValueError(f"this is no UTF-8 text ({error.reason}). Save it as CSV in UTF-8.") from error
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
    with _damage_told():
        # no thread may read on while an error of damaged bytes lets go of them: that is a fault of memory
        frame = parquet.ParquetFile(BytesIO(raw), pre_buffer=False).read(use_threads=False).to_pandas(use_threads=False)
        frame.columns = pd.Index(map(str, frame.columns))
    return _of_frame(frame, columns, labels)


def _of_frame(frame: DataFrame, columns: Columns, labels: str | None) -> Table:
    names = list(frame.columns)
    twice = frame.columns[frame.columns.duplicated()]
    if len(twice):
        raise ValueError(f"several columns have one name: {listed(twice.unique())}. Rename them.")
    for name in (*(columns or ()), *(() if labels is None else (labels,))):
        if name not in names:
            raise unknown_name("column", name, names)
    chosen = columns or tuple(name for name in names if name != labels)
    if not len(frame) or not chosen:
        raise ValueError(f"there are {len(frame)} rows of {len(chosen)} columns, but wanted is at least one of each.")
    if not all(chosen):
        raise ValueError(f"a column has no name (an index?). Name it, or choose columns (--columns a,b) of {listed(names)}.")
    numeric = listed(name for name, dtype in frame.dtypes.items() if dtype.kind in "biuf" and name not in ("", labels))
    x = _checked(_values(frame, chosen, f"Choose columns (--columns a,b) among those that are: {numeric}."), chosen)
    if labels is None:
        return Table(x, columns=chosen)
    return Table(x, _classes(_values(frame, [labels], "Number the classes from 0.")[:, 0], len(x)), chosen)


def _values(frame: DataFrame, names: Sequence[str], cure: str) -> np.ndarray:
    """Columns side by side, (N, len(names)), with NaN where a value is missing."""
    import pandas as pd

    text = [name for name in names if frame[name].dtype.kind not in "biuf"]
    if text:
        column = frame[text[0]]
        bad = pd.to_numeric(column.astype(str), errors="coerce").isna() & column.notna()
        row = int(bad.to_numpy().argmax())
        example = f"row {row + 1} of {listed(text[:1])} is {str(column.iloc[row])[:50]!r}"
        raise ValueError(f"not numeric: {listed(text)} ({example}). {cure}")
    series = (frame[name] for name in names)
    return np.stack([s.to_numpy(float, na_value=np.nan) if s.isna().any() else s.to_numpy() for s in series], axis=1)


def _checked(x: np.ndarray, columns: Columns = None) -> np.ndarray:
    """The data, finite, in the machine's own byte order."""
    if not x.ndim or not x.size:
        raise ValueError(f"there are no rows of numbers in the shape {x.shape}. Wanted is (N, ...), N at least 1.")
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


def _classes(y: np.ndarray, rows: int) -> np.ndarray:
    if y.shape != (rows,):
        raise ValueError(f"the labels have the shape {y.shape}, but wanted is ({rows},), one for each row.")
    with np.errstate(invalid="ignore"):
        bad = ~((y >= 0) & (y < 2**31) & (y % 1 == 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"labels are whole numbers 0, 1, 2, ..., but that of row {row + 1} is {y[row]}. Number the classes.")
    return y.astype(np.int64)


READERS: Mapping[str, Callable[[bytes, Columns, str | None], Table]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""Suffix -> (bytes, columns, labels) -> table."""
