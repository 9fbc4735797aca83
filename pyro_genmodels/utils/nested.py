"""Lists, tuples and dictionaries of arguments, at any depth: their leaves, and copies with other leaves."""

from __future__ import annotations

__all__ = ["is_array", "is_structure", "leaves", "map_nested", "of_type"]

from collections.abc import Callable, Iterator, Mapping
from typing import Any


def map_nested(fn: Callable[[Any], Any], values: Any, is_leaf: Callable[[Any], bool] = lambda value: False) -> Any:
    """Return lists, tuples and dictionaries with a function applied to what they hold, at any depth.

    A container in which the function changes nothing is returned as it is. Named tuples keep their type.

    Args:
        fn: function of one leaf.
        values: container, or leaf.
        is_leaf: function that returns True for a container that is to be taken as a leaf.

    Example:
        >>> map_nested(lambda v: v + 1, {"a": [1, (2, 3)], "b": 4})
        {'a': [2, (3, 4)], 'b': 5}
    """
    if is_leaf(values) or not isinstance(values, (Mapping, list, tuple)):
        return fn(values)
    if isinstance(values, Mapping):
        mapped = {name: map_nested(fn, value, is_leaf) for name, value in values.items()}
        return values if all(mapped[name] is value for name, value in values.items()) else mapped
    items = [map_nested(fn, value, is_leaf) for value in values]
    return values if all(new is old for new, old in zip(items, values, strict=True)) else of_type(values, items)


def of_type(values: list | tuple, items: list) -> Any:
    """Return items in a list or tuple of the type of another; a named tuple has its fields."""
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)


def leaves(values: Any, is_leaf: Callable[[Any], bool] = lambda value: False) -> Iterator[tuple[tuple, Any]]:
    """Yield what lists, tuples and dictionaries hold, at any depth, with the keys and indices that lead there.

    Args:
        values: container, or leaf.
        is_leaf: function that returns True for a container that is to be taken as a leaf.

    Example:
        >>> list(leaves({"a": [1, (2, 3)], "b": 4}))
        [(('a', 0), 1), (('a', 1, 0), 2), (('a', 1, 1), 3), (('b',), 4)]
    """
    if is_leaf(values) or not isinstance(values, (Mapping, list, tuple)):
        yield (), values
        return
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        for keys, leaf in leaves(value, is_leaf):
            yield (key, *keys), leaf


def is_array(value: Any) -> bool:
    """Return True for a tensor, an array, a frame, or a list of numbers.

    Example:
        >>> is_array([[1.0, 2.0], (3.0, 4.0)]), is_array([{"a": 1}]), is_array((1.0, 2.0))
        (True, False, False)
    """
    if isinstance(value, list):
        return not any(map(is_structure, value))
    return hasattr(value, "__array__")


def is_structure(value: Any) -> bool:
    """Return True for arrays and containers of arrays, as opposed to numbers and lists of numbers.

    Example:
        >>> is_structure({"a": 1}), is_structure([[1, 2], [3, 4]])
        (True, False)
    """
    if isinstance(value, (list, tuple)):
        return any(map(is_structure, value))
    return isinstance(value, Mapping) or hasattr(value, "__array__")
