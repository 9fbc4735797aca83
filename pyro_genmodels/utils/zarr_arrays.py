"""Arrays larger than memory in a zarr folder, filled block by block along one dimension, and resumed after the last block.

The folder is of zarr's format 2, which all readers know. A block is one chunk of each array, in a file of its own that is there
completely or not at all, with a checksum. How many blocks are done stands in the attributes of the folder.
"""

from __future__ import annotations

__all__ = ["ZarrArrays"]

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_genmodels.utils.errors import import_extra, one_line
from pyro_genmodels.utils.parts import FORMAT, KEY, Output, check_settings


class ZarrArrays:
    """Arrays in the groups of a zarr folder.

    Args:
        output: where, and if a run is resumed.
        settings: what the arrays are of, of types that JSON has. A resumed run must have the same.
        size: length of the dimension that is filled.
        block: length of a block along it.

    Attributes:
        path: path of the folder.
        state: what else is known of the run, of types that JSON has; saved with each block.
        done: number of blocks that are written.

    Raises:
        FileExistsError: if the path exists, and the run is not resumed.
        ValueError: if the folder is of a run with other settings, or of none.
        ImportError: if zarr, of the extra ``zarr``, is missing.
    """

    def __init__(self, output: Output, settings: Mapping[str, Any], size: int, block: int) -> None:
        self._zarr = import_extra("zarr", extra="zarr", by="A .zarr folder")
        self.path, self._size, self._block = Path(output.path), size, block
        self._settings = json.loads(json.dumps(dict(settings)))
        self.state: dict[str, Any] = {}
        self.done = 0
        self._arrays: dict[tuple[str, str], Any] = {}
        if not output.exists():
            self._root = self._zarr.open_group(self.path, mode="w", zarr_format=2)
            self.save(0)
            return
        try:
            self._root = self._zarr.open_group(self.path, mode="r+", zarr_format=2, use_consolidated=False)
            found: Any = self._root.attrs[KEY]
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}")
            self.done, self.state, saved = int(found["done"]), dict(found["state"]), dict(found["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path} cannot be resumed: it holds no run that this version reads ({one_line(error, 80)}). Choose "
                "another path."
            ) from error
        check_settings(self.path, saved, self._settings)

    @property
    def blocks(self) -> list[slice]:
        """Blocks of the dimension that are not written yet."""
        starts = range(self.done * self._block, self._size, self._block)
        return [slice(start, min(start + self._block, self._size)) for start in starts]

    def put(
        self,
        group: str,
        name: str,
        values: np.ndarray,
        dims: Sequence[str],
        axis: int,
        block: slice,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a block of an array, which is made if it is not there.

        Args:
            group: name of the group; "" is the outermost one.
            name: name of the array.
            values: values of the block.
            dims: names of the dimensions.
            axis: dimension that is filled.
            block: position of the block along it.
            attributes: further attributes of a new array.

        Raises:
            ValueError: if the shape or data type of the values differ from those of earlier blocks.
            OSError: if it cannot be written, as on a full disk. The blocks before it stay as they are.
        """
        shape = (*values.shape[:axis], self._size, *values.shape[axis + 1 :])
        if (group, name) not in self._arrays:
            owner = self._root.require_group(group) if group else self._root
            named = {"_ARRAY_DIMENSIONS": list(dims), **(attributes or {})}
            found = owner[name] if name in owner else self._create(owner, name, values.dtype, shape, axis, named)
            self._arrays[group, name] = found
        array = self._arrays[group, name]
        if array.shape != shape or array.dtype != values.dtype:
            raise ValueError(
                f"{name!r} has the shape {array.shape} and {array.dtype} in earlier blocks of {self.path}, but here {shape} "
                f"and {values.dtype}. All draws of a variable must have one shape."
            )
        array[(slice(None),) * axis + (block,)] = values

    def _create(
        self, owner: Any, name: str, dtype: np.dtype, shape: tuple[int, ...], axis: int, attributes: Mapping[str, Any]
    ) -> Any:
        """Return a new array in a group, without values."""
        codecs = import_extra("numcodecs", extra="zarr", by="A .zarr folder")
        chunks = (*shape[:axis], min(self._block, self._size), *shape[axis + 1 :])
        return owner.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=tuple(max(1, length) for length in chunks),
            filters=[codecs.CRC32()],
            compressors=codecs.Zstd(level=1),
            fill_value=np.nan if dtype.kind == "f" else None,
            attributes=dict(attributes),
        )

    def array(self, group: str, name: str) -> Any:
        """Return an array of the folder, which is read by slices."""
        return self._root[f"{group}/{name}" if group else name]

    def remove(self, path: str) -> None:
        """Remove a group or an array, if it is there."""
        if path in self._root:
            del self._root[path]

    def save(self, done: int) -> None:
        """Say how many blocks are done."""
        self.done = done
        entries = {"format": FORMAT, "settings": self._settings, "done": done, "state": self.state}
        self._root.attrs[KEY] = json.loads(json.dumps(entries))

    def finish(self) -> None:
        """Collect the metadata of all arrays in one file, from which the folder is opened quickly."""
        self._zarr.consolidate_metadata(self.path, zarr_format=2)
