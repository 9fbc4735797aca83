"""Names of variables and dimensions, as xarray can hold them.

A variable with the name of a dimension of its group becomes the labels of that dimension, and its values are lost. So names
that clash are refused here.
"""

from __future__ import annotations

__all__ = ["check_dims", "check_names", "xarray_name"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pyro_genmodels.inference_data.arrays import Variables

DRAWS = ("chain", "draw")
"""Dimensions of draws in ArviZ."""


def xarray_name(name: str) -> str:
    """Return the name of a site as a variable's, without slashes, which are paths in the trees of xarray.

    Example:
        >>> xarray_name("encoder/z")
        'encoder.z'
    """
    return name.replace("/", ".")


def check_dims(dims: Any) -> None:
    """Check the option `dims` of `to_arviz`: lists of different names, by the name of a variable.

    Raises:
        TypeError: if it is something else.
        ValueError: if a variable would have two dimensions of one name, its own name, or that of a dimension of draws.

    Example:
        >>> check_dims({"w": ["side", "depth"]})
        >>> check_dims({"w": ["w"]})
        Traceback (most recent call last):
        ValueError: dims gives 'w' a dimension 'w', which is the name of the variable itself. Choose another name.
    """
    if not isinstance(dims, Mapping):
        raise TypeError(f"to_arviz wants dims as a dictionary such as {{'w': ['side']}}, but found {type(dims).__name__}.")
    for variable, names in dims.items():
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"to_arviz wants dims[{variable!r}] as a list of names such as ['side'], but found {names!r}.")
        for i, name in enumerate(names):
            clash = "the name of the variable itself" if name == variable else ""
            clash = clash or ("the name of another of its dimensions" if name in names[:i] else "")
            clash = clash or ("a dimension of draws in ArviZ" if name in DRAWS else "")
            if clash:
                raise ValueError(f"dims gives {variable!r} a dimension {name!r}, which is {clash}. Choose another name.")


def check_names(groups: Mapping[str, Variables], plates: Mapping[str, Any], coords: Mapping[str, Any]) -> None:
    """Check that no two things in a group have one name, and that labels have the lengths of their dimensions.

    Args:
        groups: variables of each group.
        plates: labels of the rows of each plate.
        coords: labels of dimensions, as the user gave them.

    Raises:
        ValueError: naming the first clash.
    """
    for variables in groups.values():
        sizes = _dimension_sizes(variables, plates)
        _check_variables(variables, sizes)
        for dim, (size, _) in sizes.items():
            if dim in coords:
                _check_labels(dim, size, coords[dim])


def _dimension_sizes(variables: Variables, plates: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Return the size of each dimension of a group, and the plate or variable that it is from.

    Raises:
        ValueError: if a variable has two dimensions of one name, or a dimension two sizes.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, dims) in variables.items():
        for dim, size in zip(dims, array.shape, strict=True):
            if dims.count(dim) > 1:
                raise ValueError(
                    f"{name!r} has two dimensions {dim!r}: rename the plate, or the event's dimension by "
                    f"dims={{{name!r}: [...]}}."
                )
            plate = (len(plates[dim]), f"plate {dim}") if dim in plates else (size, name)
            known, owner = sizes.setdefault(dim, plate)
            if known != size:
                raise ValueError(
                    f"The dimension {dim!r} has {known} entries in {owner!r} and {size} in {name!r}: choose another name "
                    f"in dims={{{name!r}: [...]}}."
                )
    return sizes


def _check_variables(names: Iterable[str], sizes: Mapping[str, tuple[int, str]]) -> None:
    """Check that no two variables of a group have one name in ArviZ, and that none is called as one of the dimensions."""
    as_written: dict[str, str] = {}
    for name in names:
        other = as_written.setdefault(xarray_name(name), name)
        if other != name:
            raise ValueError(f"The sites {other!r} and {name!r} have one name in ArviZ, {xarray_name(name)!r}: rename one.")
        if name in DRAWS:
            raise ValueError(f"A variable is called {name!r}, which in ArviZ is a dimension of draws: rename the site.")
        if name in sizes:
            owner = sizes[name][1]
            raise ValueError(
                f"The variable {name!r} has the name of a dimension of {owner!r}, and ArviZ would lose one of them: rename the "
                f"site, or the dimensions by dims={{{owner!r}: [...]}}."
            )


def _check_labels(dim: str, size: int, labels: Any) -> None:
    is_listed = (
        np.ndim(labels) == 1 if hasattr(labels, "ndim") else isinstance(labels, Sequence) and not isinstance(labels, str)
    )
    if not is_listed or len(labels) != size:
        found = str(len(labels)) if is_listed else repr(labels)
        raise ValueError(f"coords wants a list of {size} labels for the dimension {dim!r}, but found {found}.")
