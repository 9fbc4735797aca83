"""Streams of rows from files, arrays and iterables."""

from __future__ import annotations

__all__ = ["stream"]

import os
from collections.abc import Callable, Iterable, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_genmodels.datasets.shard_files import open_npy, open_parquet
from pyro_genmodels.datasets.shards import ArraySource, IterableSource, Piece, Source
from pyro_genmodels.datasets.streams import RowStream
from pyro_genmodels.utils.errors import check_positive_int, listed

SUFFIXES = (".parquet", ".npy")
MEMORY = ".pyro_genmodels-statistics.json"
"""Name of the file with what was measured of the files beside it. Readers of parquet folders ignore names that begin with a
dot."""


def stream(
    source: Any,
    *,
    columns: Sequence[str] | Sequence[int] | None = None,
    context: str | int | Sequence[str] | Sequence[int] | None = None,
    rows: int | None = None,
    buffer_rows: int | None = None,
    remember: bool | str | Path = True,
) -> RowStream:
    """Open rows of data larger than memory. Nothing is read but the number of rows.

    Args:
        source: a folder of parquet or ``.npy`` files, with those in its folders; a file; a pattern such as
            ``"data/day-*.npy"``; a list of files; or a `pyarrow.dataset.Dataset` of parquet files. Or arrays that are sliced,
            such as those that ``np.load(path, mmap_mode="r")``, h5py and zarr give: x, or (x, context). Or an iterable of
            batches of rows, such as a `DataLoader`, or a function that returns one, with `rows`.
        columns: columns that make up x, by name for parquet, and by number for arrays (N, d); None for all but the context's.
        context: column that is the context, which is then (N,), such as labels; or list of columns, (N, c).
        rows: number of rows of an iterable. Each walk through it must give the same rows in the same order.
        buffer_rows: number of rows that are shuffled together. Memory holds two such buffers. None chooses as many as 32 MB
            hold. The shards that are shuffled are row groups of parquet files, and pieces of arrays of a sixteenth of a buffer.
            An iterable is shuffled in the buffer alone.
        remember: True to write mean and deviation of each file into a hidden JSON file in its folder, if that can be written
            to; path of another JSON file; or False to measure anew each time.

    Raises:
        FileNotFoundError: if there is no such file, or none in the folder.
        ValueError: if there are no rows; if a file is damaged, lacks a column, or has columns of other types than the first
            one; or if columns are not numbers.
        TypeError: if the source is of another kind.
        ImportError: if pyarrow, of the extra ``parquet``, is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from pyro_genmodels import Flow, train
        >>> with TemporaryDirectory() as folder:
        ...     for day in range(3):
        ...         np.save(f"{folder}/day-{day}.npy", np.random.default_rng(day).normal(size=(100, 2)).astype("float32"))
        ...     rows = stream(f"{folder}/day-*.npy")
        ...     fit = train(Flow((2,)), rows, epochs=1, progress=False)
        >>> len(rows), len(fit.history)
        (300, 1)
    """
    options: dict[str, Any] = {"buffer_rows": buffer_rows, "settings": [columns, context]}
    if rows is not None or _is_loader(source):
        if rows is None:
            raise TypeError("A stream of an iterable wants rows=, its number of rows.")
        check_positive_int("stream", rows=rows)
        if columns is not None or context is not None:
            raise ValueError("An iterable yields x, or (x, context): leave columns and context out.")
        return RowStream([IterableSource(source, rows)], **options)
    if (arrays := _arrays(source)) is not None:
        return RowStream([ArraySource(arrays, _selector(columns, context, len(arrays)))], **options)
    paths = _paths(source)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    memory = (root / MEMORY if remember else None) if isinstance(remember, bool) else Path(remember)
    sources = [part for path in paths for part in _opened(path, columns, context)]
    _check_alike(sources)
    return RowStream(sources, **options, root=root, memory=memory)


def _is_loader(source: Any) -> bool:
    """Return True for an iterable that is neither a path, nor an array, nor a sequence of these."""
    known = isinstance(source, (str, os.PathLike, Sequence)) or hasattr(source, "shape") or hasattr(source, "files")
    return not known and (callable(source) or isinstance(source, Iterable))


def _arrays(source: Any) -> list[Any] | None:
    """Return x, or x and context, if these are arrays; else None."""
    parts = list(source) if isinstance(source, tuple) else [source]
    if not parts or not all(hasattr(part, "shape") and hasattr(part, "__getitem__") for part in parts):
        return None
    if len(parts) > 2:
        raise ValueError(f"A stream wants x or (x, context), but found {len(parts)} arrays.")
    for part in parts:
        if isinstance(part, Tensor) or not hasattr(part, "dtype"):
            raise TypeError(
                f"A stream is for rows larger than memory, but found a {type(part).__name__}: pass it to train or "
                "log_likelihood as it is. Arrays on disk are those of np.load(path, mmap_mode='r'), h5py and zarr."
            )
    return parts


def _selector(columns: Any, context: Any, arrays: int = 1) -> Callable[[Piece], Piece]:
    """Return the function that chooses the columns of x and of the context from rows of an array (n, d), by their numbers."""
    if columns is None and context is None:
        return lambda piece: piece
    names = [*(columns or ()), *([] if context is None else [context] if isinstance(context, (int, str)) else context)]
    if arrays > 1 or any(not isinstance(name, int) or isinstance(name, bool) for name in names):
        raise ValueError(
            f"The columns of one array (N, d) are chosen by their numbers, but found columns={columns!r}, context={context!r}"
            + (" and an array of contexts." if arrays > 1 else ".")
        )

    def select(piece: Piece) -> Piece:
        [x] = piece
        if x.dim() != 2 or not all(-x.shape[1] <= name < x.shape[1] for name in names):
            raise ValueError(f"The columns {names} are not among those of rows of shape {tuple(x.shape[1:])}.")
        taken = {context} if isinstance(context, int) else set(context or ())
        others = [i for i in range(x.shape[1]) if i not in taken and i - x.shape[1] not in taken]
        chosen = x[:, others if columns is None else list(columns)]
        return (chosen,) if context is None else (chosen, x[:, context if isinstance(context, int) else list(context)])

    return select


def _paths(source: Any) -> list[Path]:
    """Return the files of a stream, in order."""
    if hasattr(source, "files") and hasattr(source, "get_fragments"):  # a dataset of pyarrow
        source = list(source.files)
    if isinstance(source, Sequence) and not isinstance(source, str) and source:
        if not all(isinstance(path, (str, os.PathLike)) for path in source):
            raise TypeError("A stream wants a list of paths. Pass rows in memory to train as a tensor.")
        found = [Path(path) for path in source]
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not _is_hidden(p.relative_to(path)))
            if not found:
                raise FileNotFoundError(f"{path} holds no {' or '.join(SUFFIXES)} files.")
        else:
            found = [path] if path.exists() else [Path(p) for p in sorted(glob(str(source), recursive=True))]
            if not found:
                raise FileNotFoundError(f"{source}: there is no such file. Check its name and folder.")
    else:
        raise TypeError(
            "stream wants a folder, a file, a pattern, a list of files, arrays that can be sliced, or an iterable with rows=, "
            f"but found {type(source).__name__}."
        )
    if len(kinds := sorted({path.suffix for path in found})) > 1 or kinds[0] not in SUFFIXES:
        raise ValueError(f"A stream wants files that are all {' or all '.join(SUFFIXES)}, but found {listed(kinds)}.")
    return found


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _opened(path: Path, columns: Any, context: Any) -> list[Source]:
    """Return the sources in a file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        if path.suffix == ".npy":
            return open_npy(path, _selector(columns, context))
        return open_parquet(path, columns, context)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such file. Check its name and folder.") from error


def _check_alike(sources: Sequence[Source]) -> None:
    """Raise a ValueError if a file has rows of another form than the first one."""
    for source in sources[1:]:
        if source.form != sources[0].form:
            raise ValueError(
                f"{source.name} holds {source.form}, but {sources[0].name} holds {sources[0].form}. All files of a stream want "
                "rows of one form: save them with the same columns and types."
            )
