"""Tensors from what people hold their data in: numpy arrays, pandas and polars frames, lists and numbers."""

from __future__ import annotations

__all__ = ["as_tensor"]

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(values: Any, owner: str, *, floats: torch.dtype = torch.float64) -> Tensor:
    """Return values as a tensor. A tensor is returned as it is.

    Args:
        values: tensor, numpy array, data frame or series (anything with `to_numpy`), list of numbers, or number.
        owner: subject of the error message, such as "train".
        floats: dtype of Python's floats, alone or in lists. Double precision keeps the digits of data with an offset.

    Raises:
        TypeError: if they are not numbers; the message names the columns of a data frame that are not.

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
        return values
    wanted = f"{owner} wants numbers, as a tensor, a numpy array, a data frame or a list, but found {type(values).__name__}"
    if isinstance(values, (str, bytes, dict, set, type)) or values is None:
        raise TypeError(f"{wanted}.")
    try:
        array = np.asarray(values.to_numpy() if hasattr(values, "to_numpy") else _without_tensors(values))
    except ValueError as error:  # rows of different lengths
        raise TypeError(f"{wanted}, whose rows differ in shape.") from error
    if array.dtype == object and hasattr(values, "columns"):
        for name, column in zip(values.columns, array.T, strict=True):
            _check_column(owner, name, column)
        array = array.astype(float)  # columns of several types of number
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{wanted} of {array.dtype}.")
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))  # a copy: the array may change
    return tensor.to(floats) if tensor.is_floating_point() and _is_python_number(values) else tensor


def _is_python_number(values: Any) -> bool:
    """Return True for a number that is not numpy's, and for nested lists that begin with one."""
    while isinstance(values, (list, tuple)) and values:
        values = values[0]
    return isinstance(values, (int, float)) and not isinstance(values, np.generic)


def _without_tensors(values: Any) -> Any:
    """Return nested lists with their tensors as arrays, which numpy stacks."""
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return [_without_tensors(v) for v in values] if isinstance(values, (list, tuple)) else values


def _check_column(owner: str, name: Any, column: np.ndarray) -> None:
    wrong = [value for value in column if not isinstance(value, (int, float, np.number, np.bool_))]
    if wrong:
        raise TypeError(
            f"{owner} wants numbers, but the column {name!r} holds {type(wrong[0]).__name__}. Drop it, or encode it as numbers."
        )
