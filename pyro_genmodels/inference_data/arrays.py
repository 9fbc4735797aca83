"""Arrays of the groups of ArviZ data, filled block by block."""

from __future__ import annotations

__all__ = ["BlockValues", "GroupArrays", "PlateRows", "Variables", "same_array", "to_numpy"]

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Rows = tuple[tuple[int | None, int | None], ...]
"""First row, and the row after the last, of a block in each plate; None for all rows."""

Variables = dict[str, tuple[np.ndarray, list[str]]]
"""Arrays with the names of their dimensions, by name of the variable."""


def to_numpy(value: Tensor) -> np.ndarray:
    """Return a tensor as an array, without gradient and on the CPU; NumPy has no bfloat16."""
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()


def same_array(a: np.ndarray, b: np.ndarray) -> bool:
    """Return True if two arrays have the same shape and values; NaN equals NaN."""
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f")


@dataclass(frozen=True)
class PlateRows:
    """Rows of a plate that a block has.

    Attributes:
        name: name of the plate.
        size: number of rows of the whole plate.
        rows: position of the block's rows among all.
    """

    name: str
    size: int
    rows: slice


@dataclass(frozen=True)
class BlockValues:
    """Values of one variable for a block of draws and rows.

    Attributes:
        values: values, (draws, plates from the left, event).
        draws: position of the draws among all.
        plates: rows of each plate.
    """

    values: Tensor
    draws: slice
    plates: list[PlateRows]

    @property
    def event_dim(self) -> int:
        """Number of dimensions of the event."""
        return self.values.dim() - 1 - len(self.plates)


class GroupArrays:
    """Arrays of all wanted groups, filled block by block.

    Args:
        num_samples: number of draws.
        wanted: names of the groups to fill; the others are ignored.
        dims: names of the event dimensions of a variable, by its name.
    """

    def __init__(self, num_samples: int, wanted: Collection[str], dims: Mapping[str, Sequence[str]]) -> None:
        self.groups: dict[str, Variables] = {}
        self._num_samples, self._wanted, self._dims = num_samples, set(wanted), dims
        self._varying: set[str] = set()
        self._filled: defaultdict[tuple[str, str], Counter[Rows]] = defaultdict(Counter)

    def wants(self, *groups: str) -> bool:
        """Return True if one of these groups is wanted."""
        return not self._wanted.isdisjoint(groups)

    def leave_out(self, *groups: str) -> None:
        """Ignore these groups from now on, and in the result."""
        self._wanted -= set(groups)

    def put_draws(self, group: str, name: str, block: BlockValues) -> None:
        """Put a block of draws of a variable in its place."""
        self._put(group, name, block, self._event_names(name, block.event_dim))

    def put_log_prob(self, group: str, name: str, block: BlockValues) -> None:
        """Put a block of log densities in its place, in double precision, because ArviZ exponentiates them.

        What the model samples outside all plates in one batch has dimensions here too: the first of the variable's own.
        """
        names = list(self._dims.get(name, _default_names(name, block.event_dim)))
        self._put(group, name, block, names[: block.event_dim], np.dtype(float))

    def put_observed(self, name: str, block: BlockValues, *, is_shared: bool) -> None:
        """Put a block of data in its place, unless it is there, and remember if it differs between draws.

        The data are kept even if they are not wanted, because they tell which arguments of the model are constants.

        Args:
            name: name of the observed site.
            block: its values.
            is_shared: True if all draws of the block are known to have the same values.
        """
        if "observed_data" not in self.groups or name not in self.groups["observed_data"]:
            sizes = [plate.size for plate in block.plates]
            names = [plate.name for plate in block.plates] + self._event_names(name, block.event_dim)
            self._add("observed_data", name, np.zeros(sizes + _event_shape(block), _dtype(block)), names)
        array, _ = self.groups["observed_data"][name]
        values, rows = to_numpy(block.values[:1] if is_shared else block.values), tuple(plate.rows for plate in block.plates)
        if not self._filled["observed_data", name][_rows_of(block)]:
            array[rows] = values[0]
        self._filled["observed_data", name][_rows_of(block)] = 1
        if not all(same_array(array[rows], draw) for draw in values):
            self._varying.add(name)

    def drop_varying(self) -> list[str]:
        """Remove what the model observes from the data if it differs between draws, and return the names of these sites."""
        for name in self._varying:
            del self.groups["observed_data"][name], self._filled["observed_data", name]
        return sorted(self._varying)

    def put_all_draws(self, draws: Mapping[str, Tensor]) -> None:
        """Put variables of the posterior whose draws are all known, (draws, ...)."""
        for name, value in draws.items() if self.wants("posterior") else ():
            self._add("posterior", name, to_numpy(value), ["draw", *self._event_names(name, value.dim() - 1)])

    def put_stats(self, stats: Mapping[str, np.ndarray]) -> None:
        """Put statistics of each draw, (draws,), real numbers in double precision."""
        for name, values in stats.items() if self.wants("sample_stats") else ():
            self._add("sample_stats", name, values.astype(float) if values.dtype.kind == "f" else values, ["draw"])

    def put_chain_stat(self, name: str, values: np.ndarray, plates: Sequence[str] = ()) -> None:
        """Put a statistic of each chain, (chain, plates...)."""
        if self.wants("sample_stats"):
            self._add("sample_stats", name, values.astype(float), ["chain", *plates])

    def put_constant(self, name: str, array: np.ndarray, plates: list[str]) -> None:
        """Put a constant, whose first dimensions are these plates."""
        self._add("constant_data", name, array, plates + self._event_names(name, array.ndim - len(plates)))

    def by_chain(self, num_chains: int) -> dict[str, Variables]:
        """Return the wanted groups with the dimensions (chain, draw) in place of (draw).

        Rows that do not have a variable hold NaN, and a log density of 0 nats, as of masked values.

        Raises:
            ValueError: if a variable was only there for some of the draws.
        """
        for (group, name), draws_of_rows in self._filled.items():
            if group not in self._wanted:
                continue
            array, names = self.groups[group][name]
            if any(count != self._num_samples for count in draws_of_rows.values()) and "draw" in names:
                raise ValueError(f"The model has the site {name!r} in some runs only, which ArviZ cannot represent.")
            nothing = 0.0 if group in ("log_likelihood", "log_prior") else np.nan
            self.groups[group][name] = _with_gaps(array, list(draws_of_rows), int("draw" in names), nothing), names
        return {
            group: {
                name: (array.reshape(num_chains, -1, *array.shape[1:]), ["chain", *names])
                if "draw" in names
                else (array, names)
                for name, (array, names) in variables.items()
            }
            for group, variables in self.groups.items()
            if group in self._wanted
        }

    def without_plate(self, plate: str) -> None:
        """Remove the dimension of a plate of one row from all variables."""
        for variables in self.groups.values():
            for name, (array, names) in variables.items():
                if plate in names:
                    axis = names.index(plate)
                    variables[name] = array.squeeze(axis), names[:axis] + names[axis + 1 :]

    def _put(self, group: str, name: str, block: BlockValues, event_names: list[str], dtype: np.dtype | None = None) -> None:
        if group not in self._wanted:
            return
        if name not in self.groups.get(group, {}):
            shape = [self._num_samples, *(plate.size for plate in block.plates), *_event_shape(block)]
            names = ["draw", *(plate.name for plate in block.plates), *event_names]
            self._add(group, name, np.zeros(shape, dtype or _dtype(block)), names)
        array, _ = self.groups[group][name]
        array[(block.draws, *(plate.rows for plate in block.plates))] = to_numpy(block.values)
        self._filled[group, name][_rows_of(block)] += len(block.values)

    def _add(self, group: str, name: str, array: np.ndarray, names: list[str]) -> None:
        self.groups.setdefault(group, {})[name] = (array, names)

    def _event_names(self, name: str, count: int) -> list[str]:
        """Return the names of a variable's event dimensions: the user's, or the default ones."""
        names = list(self._dims.get(name, _default_names(name, count)))
        if len(names) != count:
            raise ValueError(f"dims[{name!r}] names {len(names)} dimensions, but the variable's event has {count}.")
        return names


def _rows_of(block: BlockValues) -> Rows:
    return tuple((plate.rows.start, plate.rows.stop) for plate in block.plates)


def _with_gaps(array: np.ndarray, filled: Sequence[Rows], first: int, nothing: float) -> np.ndarray:
    """Return an array in which the rows that are in no block hold `nothing`; integers become reals, if there is such a row.

    Args:
        array: array whose plates begin at the dimension `first`.
        filled: rows of each plate, (start, stop), of each block.
        first: dimension of the first plate.
        nothing: value of the other rows.
    """
    missing = np.ones(array.shape[first : first + len(filled[0])], bool)
    for block in filled:
        missing[tuple(slice(*rows) for rows in block)] = False
    if not missing.any():
        return array
    array = array if array.dtype.kind == "f" else array.astype(float)
    array[(slice(None),) * first + (missing,)] = nothing
    return array


def _default_names(name: str, count: int) -> list[str]:
    return [f"{name}_dim_{i}" for i in range(count)]


def _event_shape(block: BlockValues) -> list[int]:
    return list(block.values.shape[block.values.dim() - block.event_dim :])


def _dtype(block: BlockValues) -> np.dtype:
    return to_numpy(block.values[:0]).dtype
