"""Arguments of a model, whose rows are cut along with the data, or chosen by the model's own plate."""

from __future__ import annotations

__all__ = ["RowArguments", "row_arguments", "with_own_plate", "with_plate_of_pair"]

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
from torch import Tensor

from pyro_genmodels._pyro import subsampling, traces
from pyro_genmodels._pyro.subsampling import RowBlock, SubsampledPlate
from pyro_genmodels.utils.nested import is_array, leaves, map_nested
from pyro_genmodels.utils.tensors import as_tensor


def row_arguments(
    owner: str, x: Any, args: tuple, kwargs: Mapping[str, Any], row_dim: int = 0, *, model: Any = None
) -> RowArguments:
    """Return the arguments of a model, with arrays and data frames as tensors.

    Args:
        owner: function that takes them, for error messages.
        x: data, (N, ...) or with N rows in another dimension: tensor, numpy array, data frame or list of numbers.
        args: other positional arguments.
        kwargs: keyword arguments.
        row_dim: dimension of x that holds the rows.
        model: the model. If it is that of a family with names for its columns, those of a data frame are matched by name.

    Raises:
        TypeError: if x holds no numbers.
        ValueError: if x has no rows in that dimension, or is a data frame of other columns than the family's.
    """
    family = getattr(model, "__self__", None)
    arrange: Any = getattr(family, "arranged", None)
    x = as_tensor(x if arrange is None else arrange(x), owner)
    if isinstance(row_dim, bool) or not isinstance(row_dim, Integral):
        raise TypeError(f"{owner} wants row_dim as an integer, the dimension of x that holds the rows, but found {row_dim!r}.")
    if not -x.dim() <= row_dim < max(x.dim(), 1):
        raise ValueError(f"{owner} wants row_dim as a dimension of x, of the shape {tuple(x.shape)}, but found {row_dim}.")
    if not x.dim() or not x.shape[row_dim]:
        raise ValueError(
            f"{owner} wants one or more rows, (N, ...), but found x of the shape {tuple(x.shape)}. A single datum is x[None]."
        )
    rows = x.shape[row_dim]
    return RowArguments((x, *_as_tensors(args, rows)), dict(_as_tensors(kwargs, rows)), row_dim % x.dim())


@dataclass(frozen=True)
class RowArguments:
    """Arguments of a call of a model.

    Attributes:
        args: positional arguments; the first is the data, (N, ...).
        kwargs: keyword arguments.
        row_dim: dimension of the data that holds the rows.
        plate: plate of the model that chooses rows by itself, so that the arguments are never cut; None cuts them.
        block: rows of that plate that a run sees; None if there is no such plate, or they are all rows.
        constants: names of keyword arguments that are the same for all rows, so that they are never cut.
    """

    args: tuple
    kwargs: dict[str, Any]
    row_dim: int = 0
    plate: SubsampledPlate | None = None
    block: RowBlock | None = None
    constants: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        """Number of rows that a run sees."""
        return self.args[0].shape[self.row_dim] if self.block is None else len(self.block.indices)

    @property
    def new(self) -> slice:
        """Rows of a run that no earlier batch has."""
        return slice(None) if self.block is None else self.block.new

    def fixed_rows(self) -> AbstractContextManager[Any]:
        """Return a context in which the model's own plate takes these rows."""
        indices = {} if self.plate is None or self.block is None else {self.plate.name: self.block.indices}
        return subsampling.fixed_rows(indices)

    def take(self, rows: slice | Tensor) -> RowArguments:
        """Return the arguments with only these rows of every tensor that has N of them, also inside lists and dicts.

        Args:
            rows: slice, or indices (n,).

        Example:
            >>> import torch
            >>> covariates = {"context": torch.zeros(3, 1), "name": "a"}
            >>> RowArguments((torch.arange(3), [torch.tensor([5.0, 6.0])]), covariates).take(slice(0, 1)).kwargs
            {'context': tensor([[0.]]), 'name': 'a'}
        """

        def cut(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dim = next((d for d in (self.row_dim, 0) if value.dim() > d and value.shape[d] == self.num_rows), None)
            return value if dim is None else value[(slice(None),) * dim + (rows,)]

        kwargs = {name: value if name in self.constants else map_nested(cut, value) for name, value in self.kwargs.items()}
        return replace(self, args=map_nested(cut, self.args), kwargs=kwargs)

    def first(self, count: int) -> RowArguments:
        """Return the arguments of at most `count` rows at the beginning, or of the first block of the model's own plate."""
        return self.take(slice(0, count)) if self.plate is None else next(self.batches(count))

    def batches(self, size: int) -> Iterator[RowArguments]:
        """Yield the arguments of consecutive batches of at most `size` rows, or of blocks of the model's own plate."""
        if self.plate is None:
            for start in range(0, self.num_rows, size):
                yield self.take(slice(start, start + size))
        else:
            for block in self.plate.blocks():
                yield replace(self, block=block)


def _as_tensors(values: Any, rows: int) -> Any:
    """Return values with arrays, data frames and lists of a number for each row as tensors, also inside lists and dicts."""

    def has_rows(value: Any) -> bool:
        is_list = isinstance(value, list) and len(value) == rows and is_array(value)
        return is_list and all(isinstance(leaf, (int, float, np.number)) for _, leaf in leaves(value))

    def convert(value: Any) -> Any:
        is_data = isinstance(value, np.ndarray) or (hasattr(value, "to_numpy") and not isinstance(value, Tensor))
        return as_tensor(value, "An argument of the model") if is_data or has_rows(value) else value

    return map_nested(convert, values, has_rows)


def with_own_plate(fn: Any, data: RowArguments) -> RowArguments:
    """Return the arguments with the plate of the data by which a function chooses rows, if there is one.

    Raises:
        ValueError: if other plates choose rows, or the plate has another number of rows than the data.
    """
    plates = [] if traces.is_family(fn) else subsampling.subsampled_plates(fn, data.args, data.kwargs)
    if not plates:
        return data
    found = ", ".join(f"{p.name!r} ({p.count} of {p.size} rows)" for p in plates)
    if len(plates) > 1 or plates[0].size != data.num_rows:
        raise ValueError(
            f"log_likelihood takes a model without subsample_size, or with one in the plate of the {data.num_rows} rows of x, "
            f"but found {found}. Build that plate with the number of rows of x, and others without subsample_size."
        )
    return replace(data, plate=plates[0])


def with_plate_of_pair(model: Any, guide: Any, data: RowArguments) -> RowArguments:
    """Return the arguments with the plate of the data by which the model, or else the guide, chooses rows, if there is one.

    The guide runs on one row first, since a guide that encodes its rows would encode all of them at once.

    Raises:
        ValueError: as `with_own_plate` does.
    """
    data = with_own_plate(model, data)
    if data.plate is not None or traces.is_family(guide):
        return data
    first = data.first(1)
    return with_own_plate(guide, data) if subsampling.plates_with_subsample_size(guide, first.args, first.kwargs) else data
