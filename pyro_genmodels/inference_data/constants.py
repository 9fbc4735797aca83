"""Constants of a model: the arrays among its arguments that it does not observe, such as covariates."""

from __future__ import annotations

__all__ = ["collect_constants"]

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pyro_genmodels.inference_data.arrays import GroupArrays, same_array, to_numpy
from pyro_genmodels.inference_data.replay import Replay
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.utils.keywords import signature_of
from pyro_genmodels.utils.nested import leaves


def collect_constants(source: DrawSource, replay: Replay, arrays: GroupArrays) -> None:
    """Put the arrays among the model's arguments that it does not observe into the arrays.

    If exactly one plate is as long as an array, the array's first dimension is that plate; but not if an argument has the name
    of the plate, because xarray has no variable that is called as a dimension of its group.
    """
    observed = [array for array, _ in arrays.groups.get("observed_data", {}).values()]
    rows = replay.layout.rows
    lengths = {plate: rows.sizes.get(plate, len(indices)) for plate, indices in rows.coords.items()}
    arguments = _array_arguments(source)
    lengths = {plate: length for plate, length in lengths.items() if plate not in arguments}
    for name, array in arguments.items():
        if any(same_array(array.astype(data.dtype) if _is_rounded(array, data) else array, data) for data in observed):
            continue
        plates = [plate for plate, length in lengths.items() if array.ndim and len(array) == length]
        arrays.put_constant(name, array, plates if len(plates) == 1 else [])


def _is_rounded(array: np.ndarray, data: np.ndarray) -> bool:
    """Return True if the model may have rounded these numbers to the precision of its data."""
    return array.dtype.kind in "biuf" and data.dtype.kind == "f"


def _array_arguments(source: DrawSource) -> dict[str, np.ndarray]:
    """Return the arrays among the model's arguments by their names, also those in lists, dictionaries and frames."""
    signature = signature_of(source.model)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*source.args, **source.kwargs).arguments.items():
        is_keywords = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        named |= dict(_arrays_in(value) if is_keywords else _arrays_in({name: value}))
    return named


def _arrays_in(values: Mapping[Any, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the arrays in a dictionary of arguments; those inside another container are called as it, "_" and their key."""
    for keys, value in leaves(values, _is_list_of_numbers):
        name = "_".join(map(str, keys))
        if isinstance(value, Tensor):
            yield name, to_numpy(value)
        elif hasattr(value, "columns") and hasattr(value, "to_numpy"):  # a frame
            yield from _arrays_in({f"{name}_{column}": value[column].to_numpy() for column in value.columns})
        elif isinstance(value, (np.ndarray, list, tuple)) or hasattr(value, "to_numpy"):
            array = np.asarray(value)
            array = array.astype(str) if array.dtype == object and all(isinstance(text, str) for text in array.flat) else array
            if array.dtype != object:
                yield name, array


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(item, (int, float)) for item in value)
