"""Data as the arguments of a model: tensors in tuples, lists and dictionaries, each with one row per datum.

A tuple holds positional arguments, a dictionary keyword arguments, and anything else is the first argument.
"""

from __future__ import annotations

__all__ = ["Batch", "as_arguments", "by_place", "first_argument", "joined", "number_of_rows"]

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.nested import is_array, is_structure, leaves, of_type


class Batch(NamedTuple):
    """Arguments of a model for some rows of the data.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        rows: number of rows.
    """

    args: tuple
    kwargs: dict[str, Any]
    rows: int

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))

    @property
    def context(self) -> Any:
        """The second positional argument, or None."""
        return self.args[1] if len(self.args) > 1 else None

    @property
    def names(self) -> list[str]:
        """Places and names of the arguments."""
        return [f"argument {place}" for place in range(1, len(self.args) + 1)] + list(self.kwargs)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor with one row per datum, by its place in the arguments."""
        found = leaves(by_place(self.args, self.kwargs), is_array)
        return {_place(keys): t for keys, t in found if isinstance(t, Tensor) and t.dim()}

    def nonfinite_rows(self, *, known: Any = None) -> str:
        """Return a sentence about rows with NaN or infinite values, or nothing if there are none.

        Args:
            known: argument that was checked before.
        """
        for place, t in self.tensors.items():
            if t is not known and t.is_floating_point() and not t.isfinite().all():
                rows = (~t.isfinite()).reshape(len(t), -1).any(1)
                return (
                    f"{int(rows.sum())} of its {self.rows} rows have NaN or infinite values in argument {place}, the first of "
                    f"them row {int(rows.nonzero()[0])} of the batch"
                )
        return ""


def as_arguments(data: Any) -> tuple[tuple, dict[str, Any]]:
    """Return data as positional and keyword arguments of a model."""
    if isinstance(data, Mapping):
        return (), {str(name): value for name, value in data.items()}
    if isinstance(data, tuple) or (isinstance(data, list) and data and all(map(is_structure, data))):
        return tuple(data), {}
    return (data,), {}


def first_argument(data: Any) -> tuple:
    """Return the arguments before a context that is given apart."""
    args, kwargs = as_arguments(data)
    if kwargs or len(args) > 1:
        raise ValueError("The data have more arguments than x: put the context among them, and leave context= out.")
    return args


def by_place(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a model by their place or name."""
    return {**{str(place): value for place, value in enumerate(args, 1)}, **kwargs}


def _place(keys: tuple) -> str:
    """Return the place of a value in the arguments in words: ``x``, ``2``, ``c[0]['mask']``."""
    return str(keys[0]) + "".join(f"[{key!r}]" for key in keys[1:])


def joined(trees: list[Any]) -> Any:
    """Return structures of tensors with their rows one after the other."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: joined([tree[name] for tree in trees]) for name in first}
    if isinstance(first, (list, tuple)):
        return of_type(first, [joined(list(parts)) for parts in zip(*trees, strict=True)])
    return torch.cat(trees) if isinstance(first, Tensor) and first.dim() else first


def number_of_rows(arguments: Any) -> int:
    """Return the number of rows that every tensor in the arguments has."""
    found = [(_place(keys), v) for keys, v in leaves(arguments, is_array)]
    tensors = [(place, t) for place, t in found if isinstance(t, Tensor) and t.dim()]
    if not tensors:
        values = [v for _, v in found]
        if numbers := [v for v in values if isinstance(v, (Tensor, int, float))]:
            raise ValueError(f"Training wants data of at least one row, but found the single number {float(numbers[0]):g}.")
        cure = " Pass its rows, such as data.train." if any(hasattr(v, "train") for v in values) else ""
        raise TypeError(
            "train wants data as tensors, arrays, data frames, a Dataset or a DataLoader, but found "
            f"{listed(type(v).__name__ for v in values)}.{cure}"
        )
    first = tensors[0][1]
    for other, t in tensors[1:]:
        if len(t) != len(first):
            what = "context" if other == "2" else f"argument {other}"
            raise ValueError(
                f"There are {len(first)} rows of data but {len(t)} of {what}. Pass one row per datum. What is the same for all "
                "data goes into model_kwargs."
            )
    return len(first)
