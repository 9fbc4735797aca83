"""Results larger than memory, written part by part: each is in its file completely or not at all, and found again on resume.

A `PartFolder` is a folder of parquet files, ``part-00000.parquet`` and so on, which pandas, polars and pyarrow read as one
table. Its file ``_manifest.json`` says what the parts are of: a run with other settings, or of another fit, refuses to go on
with them. Random numbers of a part are a function of the seed and of the part's number, so that the files do not depend on
where a run was interrupted.
"""

from __future__ import annotations

__all__ = [
    "MAX_ROWS_OF_PART",
    "Output",
    "PartFolder",
    "as_output",
    "check_settings",
    "flat_columns",
    "part_seed",
    "read_parts",
    "rows_of_part",
    "was_written_by_a_run",
]

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyro_genmodels.utils.errors import check_positive_int, import_extra, one_line
from pyro_genmodels.utils.files import atomic_write

MAX_ROWS_OF_PART = 100_000
"""Default of the largest number of rows of a part."""
MAX_NUMBERS_OF_PART = 10_000_000
"""Default of the largest number of numbers in a part, which bounds memory where rows are long."""
MANIFEST = "_manifest.json"
"""Name of the file with the settings. Readers of parquet folders ignore names that begin with an underscore."""
KEY = "pyro_genmodels"
"""Key of what belongs to a run: of the record in the metadata of a part, and of an attribute of a zarr folder."""
FORMAT = 1
"""Version of the manifest and of the records."""


@dataclass(frozen=True)
class Output:
    """Place and form of a result that is larger than memory.

    Attributes:
        path: path of the folder. Its suffix is ``.parquet`` for a folder of parquet files, or ``.zarr``.
        resume: True to go on where an interrupted run with the same settings stopped; if there is none, it begins. False
            refuses a path that exists.
        seed: seed of the random numbers. Those of part n are a function of the seed and of n.
        rows: number of rows, or draws, of a part: what an interruption can lose, and what is held in memory. None chooses at
            most 100,000, so that a part has at most ten million numbers. Random results depend on it.

    Raises:
        ValueError: if seed or rows is no such integer.

    Example:
        >>> Output("scores.parquet", resume=True).seed
        0
    """

    path: str | Path
    resume: bool = False
    seed: int = 0
    rows: int | None = None

    def __post_init__(self) -> None:
        check_positive_int("Output", least=0, seed=self.seed)
        if self.rows is not None:
            check_positive_int("Output", rows=self.rows)

    def exists(self) -> bool:
        """Return True if there is a run to resume.

        Raises:
            FileExistsError: if the path exists, and the run is not resumed.
        """
        found = Path(self.path).exists()
        if found and not self.resume:
            raise FileExistsError(
                f"{self.path} exists. To go on with an interrupted run pass Output({str(self.path)!r}, resume=True); else "
                "choose another path, or delete it."
            )
        return found


def as_output(owner: str, out: Any, suffixes: tuple[str, ...]) -> Output:
    """Return an `Output`, given one or its path, after a look at its suffix.

    Raises:
        TypeError: if it is neither.
        ValueError: for another suffix.
    """
    if not isinstance(out, (str, Path, Output)):
        raise TypeError(f"{owner} wants out as a path or an Output(path, resume=True), but found {one_line(repr(out), 60)}.")
    out = out if isinstance(out, Output) else Output(out)
    if Path(out.path).suffix not in suffixes:
        wanted = " or ".join(f"'name{suffix}'" for suffix in suffixes)
        raise ValueError(f"{owner} writes a folder called {wanted}, but found out={str(out.path)!r}.")
    return out


def rows_of_part(output: Output, numbers_per_row: int) -> int:
    """Return the number of rows of a part, given the number of numbers in a row.

    Example:
        >>> rows_of_part(Output("a.parquet"), 2), rows_of_part(Output("a.parquet"), 1000)
        (100000, 10000)
    """
    return output.rows or max(1, min(MAX_ROWS_OF_PART, MAX_NUMBERS_OF_PART // max(numbers_per_row, 1)))


def part_seed(seed: int, *numbers: int) -> int:
    """Return the seed of a part of a run, given the run's seed and the part's number, as 63 bits.

    Example:
        >>> part_seed(0, 1) == part_seed(0, 1), part_seed(0, 1) == part_seed(1, 0)
        (True, False)
    """
    return int(np.random.SeedSequence(seed, spawn_key=numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_settings(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise a ValueError, naming the first difference, unless an interrupted run had the same settings.

    Example:
        >>> check_settings(Path("a.parquet"), {"fit": "e3b0", "seed": 0}, {"fit": "e3b0", "seed": 1})
        Traceback (most recent call last):
        ValueError: a.parquet holds a run with different seed (0, and now 1), which cannot be resumed. Resume with the same \
fit, data and settings, or write to another path.
    """
    for name in dict.fromkeys([*saved, *settings]):
        was, now = saved.get(name), settings.get(name)
        if was != now:
            values = f" ({one_line(json.dumps(was), 60)}, and now {one_line(json.dumps(now), 60)})"
            raise ValueError(
                f"{path} holds a run with different {one_line(name, 30).replace('_', ' ')}"
                f"{'' if name in ('fit', 'data') else values}, which cannot be resumed. Resume with the same fit, data and "
                "settings, or write to another path."
            )


def flat_columns(values: np.ndarray, names: list[str] | None = None) -> dict[str, np.ndarray]:
    """Return the columns of rows, (n, ...), by name: those given, ``x`` for numbers, or ``x0``, ``x1`` and so on.

    Example:
        >>> list(flat_columns(np.zeros((2, 3))))
        ['x0', 'x1', 'x2']
    """
    if values.ndim == 1:
        return {(names or ["x"])[0]: values}
    flat = values.reshape(len(values), math.prod(values.shape[1:]))
    return {name: flat[:, i] for i, name in enumerate(names or [f"x{i}" for i in range(flat.shape[1])])}


def was_written_by_a_run(path: Path) -> bool:
    """Return True if a folder of parquet files, or a zarr folder, has the settings of a run in it."""
    manifest, attributes = path / MANIFEST, path / ".zattrs"
    try:
        if manifest.is_file():
            return "settings" in json.loads(manifest.read_text())
        return attributes.is_file() and KEY in json.loads(attributes.read_text())
    except (OSError, ValueError):
        return False


def read_parts(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """Yield the columns of each part of a folder, in order.

    Raises:
        ValueError: if there is no whole run in the folder, or a part is damaged.
    """
    manifest = json.loads((path / MANIFEST).read_text()) if (path / MANIFEST).is_file() else {}
    folder = PartFolder(Output(path, resume=True), manifest.get("settings", {})) if manifest else None
    if folder is None or not manifest.get("complete"):
        raise ValueError(f"{path} holds no run that is complete. Resume it first.")
    number = 0
    while folder.part(number).is_file():
        yield folder.columns(number)
        number += 1


class PartFolder:
    """A folder of parquet files, one for each part.

    Args:
        output: where, and if a run is resumed.
        settings: what the parts are of, of types that JSON has. A resumed run must have the same.

    Raises:
        FileExistsError: if the path exists, and the run is not resumed.
        ValueError: if the folder is of a run with other settings, or holds no manifest.
        ImportError: if pyarrow, of the extra ``parquet``, is missing.
    """

    def __init__(self, output: Output, settings: Mapping[str, Any]) -> None:
        self._parquet = import_extra("pyarrow.parquet", extra="parquet", by="A folder of parquet files")
        self.path = Path(output.path)
        self._settings = json.loads(json.dumps(dict(settings)))
        if output.exists():
            check_settings(self.path, self._read_manifest()["settings"], self._settings)
        else:
            self._write_manifest({})

    def finish(self, **results: Any) -> None:
        """Say in the manifest that all parts are there, with the results of the run."""
        self._write_manifest({"complete": True, **results})

    def part(self, number: int) -> Path:
        """Return the path of a part."""
        return self.path / f"part-{number:05d}.parquet"

    def write(self, number: int, columns: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Write a part, with its record.

        Raises:
            OSError: if it cannot be written, as on a full disk. The parts before it stay as they are.
        """
        pa = import_extra("pyarrow", extra="parquet", by="A folder of parquet files")
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        table = table.replace_schema_metadata({KEY: json.dumps(dict(record))})
        with atomic_write(self.part(number)) as temporary:
            self._parquet.write_table(table, temporary, write_page_checksum=True, compression="zstd")

    def record(self, number: int) -> dict[str, Any] | None:
        """Return the record of a part after reading it whole against its checksums, or None if there is no such part.

        Raises:
            ValueError: if it is damaged.
        """
        if not self.part(number).is_file():
            return None
        return json.loads(self._read(number).schema.metadata[KEY.encode()])

    def columns(self, number: int) -> dict[str, np.ndarray]:
        """Return the columns of a part."""
        table = self._read(number)
        return {name: table.column(name).to_numpy() for name in table.column_names}

    def _read(self, number: int) -> Any:
        path = self.part(number)
        try:
            table = self._parquet.read_table(path, page_checksum_verification=True, partitioning=None)
            json.loads(table.schema.metadata[KEY.encode()])
        except Exception as error:  # pyarrow raises OSError and ArrowInvalid, and others where a length is wrong
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {one_line(error, 100)}). Delete this one file and resume: it "
                "alone is made again."
            ) from error
        return table

    def _read_manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] != FORMAT or not isinstance(manifest["settings"], dict):
                raise ValueError(f"format {manifest['format']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} cannot be resumed: it has no {MANIFEST} that this version reads ({one_line(error, 80)}). Choose "
                "another path."
            ) from error
        return manifest

    def _write_manifest(self, entries: Mapping[str, Any]) -> None:
        with atomic_write(self.path / MANIFEST) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, "settings": self._settings, **entries}, indent=1) + "\n")
