"""Tables of numbers read from `.npy`, `.npz`, `.csv` and `.parquet` files, with checks of their contents.

Nothing is ever unpickled, because a pickle can run code. Sizes are compared with a limit before anything is read or unpacked: a
few kilobytes of a compressed file can stand for any number of rows.
"""

from __future__ import annotations

__all__ = ["read_table"]

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pyro_genmodels.datasets.columns import Table
from pyro_genmodels.datasets.formats import READERS
from pyro_genmodels.utils.errors import ArgumentError, listed
from pyro_genmodels.utils.files import MAX_BYTES, check_size


def read_table(
    path: str | Path,
    *,
    columns: str | Sequence[str] | None = None,
    labels: str | None = None,
    missing: bool = False,
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
        missing: True to allow missing values in x, which are NaN there: empty fields of a `.csv` file and nulls of a `.parquet`
            file.
        max_bytes: largest size of the file and of the numbers in it, 8 bytes each; by default 1 GB. For a `.csv` file it also
            limits the length of a line, 1/64 of it, and the number of lines, 1/32 of it, or 1/1024 for blank ones.

    Raises:
        OSError: if the file does not exist or cannot be read.
        ValueError: if the file is not of the format of its suffix, is damaged, has no rows or rows of different lengths, lacks
            the columns, or holds anything but finite numbers in them, or missing ones if allowed. Rows are counted from 1,
            without the header.
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
            return READERS[path.suffix.lower()](file, size, names, labels, max_bytes, missing=missing)
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
