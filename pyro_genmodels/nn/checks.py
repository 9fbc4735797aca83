"""Checks of the options of networks, at the border: each error says what was found and what is wanted."""

from __future__ import annotations

__all__ = ["are_positive_integers", "check_rate", "check_widths"]

from collections.abc import Sequence
from numbers import Integral
from typing import Any

from pyro_genmodels.utils.errors import is_number


def are_positive_integers(values: Any) -> bool:
    """Return True for a sequence of positive integers, of Python or numpy; it may be empty.

    Example:
        >>> are_positive_integers((3, 8)), are_positive_integers([0]), are_positive_integers(3)
        (True, False, False)
    """
    if not isinstance(values, Sequence):
        return False
    return all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in values)


def check_rate(owner: str, **values: Any) -> None:
    """Raise a ValueError unless every value is a number of at least 0 and less than 1.

    Example:
        >>> check_rate("NSF", dropout=1)
        Traceback (most recent call last):
        ValueError: NSF wants dropout as a number of at least 0 and less than 1, but found 1.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < 1:
            raise ValueError(f"{owner} wants {name} as a number of at least 0 and less than 1, but found {value!r}.")


def check_widths(owner: str, *, empty: bool = False, **values: Any) -> None:
    """Raise a TypeError unless every value is a sequence of positive integers; `empty` allows one without any.

    Example:
        >>> check_widths("NSF", hidden=128)
        Traceback (most recent call last):
        TypeError: NSF wants hidden as a sequence of positive integers, such as (128, 128), but found 128.
    """
    for name, value in values.items():
        if not are_positive_integers(value) or not (value or empty):
            example = (32, 64) if name == "channels" else (128, 128)
            raise TypeError(f"{owner} wants {name} as a sequence of positive integers, such as {example}, but found {value!r}.")
