"""Tensors from numpy arrays, pandas and polars frames, lists and numbers."""

from __future__ import annotations

__all__ = ["all_finite", "as_tensor", "copied_like", "noting_frames", "with_columns"]

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.utils.errors import listed


def all_finite(x: Tensor) -> bool:
    """Return True if no entry of a tensor of floats is NaN or infinite.

    A finite sum shows this in one pass, because NaN and infinity stay in a sum. Only a sum that is not finite, which large
    entries can have too, is followed by a look at each entry.

    Example:
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([torch.inf, -torch.inf]))
        (True, False)
    """
    x = x.detach()
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def copied_like(x: Tensor, other: Tensor) -> Tensor:
    """Return a copy of a tensor, in the order in memory of another of its shape.

    A gradient wants the order of its parameter: fused optimisers of torch go through the memory of both, side by side, and
    take a step along another gradient if the orders differ.

    Example:
        >>> copied_like(torch.zeros(3, 2).T, torch.zeros(2, 3)).stride()
        (3, 1)
    """
    return torch.empty_like(other).copy_(x)


def as_tensor(values: Any, owner: str, *, floats: torch.dtype = torch.float64) -> Tensor:
    """Return values as a tensor.

    A tensor is returned unchanged, except that unsigned integers of two bytes and more, for which torch lacks most functions,
    become signed ones. Missing values of a data frame become NaN, whatever the data types of its columns.

    Args:
        values: tensor, numpy array, data frame or series (anything with `to_numpy`), list of numbers, or number.
        owner: subject of the error message, such as "train".
        floats: dtype of Python's floats, alone or in lists. Double precision keeps the digits of data with an offset.

    Raises:
        TypeError: if they are not numbers; the message names the columns of a data frame that are not.
        ValueError: if integers are beyond the largest signed one.

    Example:
        >>> import pandas
        >>> as_tensor(pandas.DataFrame({"height": [1.5, 1.75], "age": [31, 40]}), "train")
        tensor([[ 1.5000, 31.0000],
                [ 1.7500, 40.0000]], dtype=torch.float64)
        >>> as_tensor(pandas.DataFrame({"age": [31, 40], "name": ["Ada", "Bo"]}), "train")
        Traceback (most recent call last):
        TypeError: train wants numbers, but the column 'name' holds str. Drop it, or encode it as numbers.
    """
    if isinstance(values, Tensor):
        return _signed(values, owner)
    wanted = f"{owner} wants numbers, as a tensor, a numpy array, a data frame or a list, but found {type(values).__name__}"
    if isinstance(values, (str, bytes, dict, set, type)) or values is None:
        raise TypeError(f"{wanted}.")
    try:
        array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else _without_tensors(values))
    except ValueError as error:  # rows of different lengths
        raise TypeError(f"{wanted}, whose rows differ in shape.") from error
    if array.dtype == object and hasattr(values, "to_numpy"):
        columns, names = (array.T, values.columns) if array.ndim == 2 else ([array], [values.name])
        for name, column in zip(names, columns, strict=True):
            _check_column(owner, name, column)
        array = np.stack([_of_numbers(column) for column in columns], axis=-1).reshape(array.shape)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{wanted} of {array.dtype}.")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))  # a copy: the array may change
    return tensor.to(floats) if tensor.is_floating_point() and _is_python_number(values) else _signed(tensor, owner)


def _signed(x: Tensor, owner: str) -> Tensor:
    """Return unsigned integers of more than a byte as signed ones, and other tensors unchanged."""
    if x.dtype == torch.uint16:
        return x.int()
    if x.dtype not in (torch.uint32, torch.uint64):
        return x
    signed = x.long()
    if x.dtype == torch.uint64 and (signed < 0).any():
        raise ValueError(
            f"{owner} wants integers up to {torch.iinfo(torch.int64).max}, but found larger ones. Subtract an offset."
        )
    return signed


def _of_numbers(column: np.ndarray) -> np.ndarray:
    """Return a column of Python's numbers in the data type that it would have alone in a frame; missing ones become NaN."""
    values = np.array([np.nan if _is_missing(value) else value for value in column])
    return values if values.dtype.kind in "biuf" else values.astype(float)


def _is_python_number(values: Any) -> bool:
    """Return True for a number of Python, and for nested lists that begin with one."""
    while isinstance(values, (list, tuple)) and values:
        values = values[0]
    return isinstance(values, (int, float)) and not isinstance(values, np.generic)


def _without_tensors(values: Any) -> Any:
    """Return nested lists with their tensors as arrays, which numpy stacks."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return [_without_tensors(v) for v in values] if isinstance(values, (list, tuple)) else values


def _check_column(owner: str, name: Any, column: np.ndarray) -> None:
    """Raise a TypeError if a column of a data frame holds anything but numbers and missing values."""
    for value in column:
        if not (isinstance(value, (int, float, Decimal, np.number, np.bool_)) or _is_missing(value)):
            found = type(value).__name__
            raise TypeError(f"{owner} wants numbers, but the column {name!r} holds {found}. Drop it, or encode it as numbers.")


def _is_missing(value: Any) -> bool:
    """Return True for None and for the missing value of nullable columns."""
    return value is None or str(value) == "<NA>"


def with_columns(values: Any, names: Sequence[str], owner: str) -> Any:
    """Return a data frame with its columns in the order of some names.

    Anything else is returned unchanged, as is a frame whose columns have no names but are numbered from 0.

    Args:
        values: the frame.
        names: names of the columns.
        owner: subject of the error message.

    Raises:
        ValueError: if the frame has other columns, or one twice.

    Example:
        >>> import pandas
        >>> with_columns(pandas.DataFrame({"b": [1], "a": [2]}), ["a", "b"], "A family").columns.tolist()
        ['a', 'b']
        >>> with_columns(pandas.DataFrame({"b": [1], "c": [2]}), ["a", "b"], "A family")
        Traceback (most recent call last):
        ValueError: A family wants a data frame with the columns a, b, but found b, c.
    """
    if not (hasattr(values, "columns") and hasattr(values, "to_numpy")):
        return values
    found = list(map(str, values.columns))
    if found == list(names):
        return values
    if sorted(found) != sorted(names):
        if found == list(map(str, range(len(names)))):
            return values
        raise ValueError(f"{owner} wants a data frame with the columns {listed(names)}, but found {listed(found)}.")
    return values[[values.columns[found.index(name)] for name in names]]


@contextmanager
def noting_frames(arguments: Iterable[Any], note: str) -> Iterator[None]:
    """Add a note to an error in a block if one of some arguments is a data frame.

    Example:
        >>> import pandas
        >>> with noting_frames([pandas.DataFrame({"a": [1.0]})], "The model is given frames as tensors."):
        ...     raise KeyError("a")
        Traceback (most recent call last):
        KeyError: 'a'
        The model is given frames as tensors.
    """
    try:
        yield
    except Exception as error:
        if any(hasattr(value, "columns") and hasattr(value, "to_numpy") for value in arguments):
            error.add_note(note)
        raise
