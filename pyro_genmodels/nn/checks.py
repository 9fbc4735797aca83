"""Checks of the options of networks. They stand here and not in `utils/`, because networks import no other room."""

from __future__ import annotations

__all__ = ["are_positive_integers", "check_count", "check_rate", "check_widths", "is_number"]

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def is_number(value: Any) -> bool:
    """Return True for a real number, of Python or numpy; False for a bool and anything else.

    Example:
        >>> is_number(1.5), is_number(True), is_number("1.5")
        (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def are_positive_integers(values: Any) -> bool:
    """Return True for a sequence of positive integers, of Python or numpy; it may be empty.

    Example:
        >>> are_positive_integers((3, 8)), are_positive_integers([0]), are_positive_integers(3)
        (True, False, False)
    """
    if not isinstance(values, Sequence):
        return False
    return all(_is_integer(n, least=1) for n in values)


def check_count(owner: str, *, least: int = 1, **values: Any) -> None:
    """Raise a ValueError unless every value is an integer of at least `least`, of Python or numpy.

    Example:
        >>> check_count("NSF", transforms=2.5)
        Traceback (most recent call last):
        ValueError: NSF wants an integer transforms of 1 or more, but found 2.5.
    """
    for name, value in values.items():
        if not _is_integer(value, least=least):
            raise ValueError(f"{owner} wants an integer {name} of {least} or more, but found {value!r}.")


def _is_integer(value: Any, *, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


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
