"""Checks of the options of networks, at the border: each error says what was found and what is wanted."""

from __future__ import annotations

__all__ = ["check_count", "check_rate", "check_widths"]

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any


def check_count(owner: str, *, least: int = 1, **values: Any) -> None:
    """Raise a ValueError unless every value is an integer of at least `least`, of Python or numpy.

    Example:
        >>> check_count("NSF", transforms=2.5)
        Traceback (most recent call last):
        ValueError: NSF wants an integer transforms of 1 or more, but found 2.5.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{owner} wants an integer {name} of {least} or more, but found {value!r}.")


def check_rate(owner: str, **values: Any) -> None:
    """Raise a ValueError unless every value is a number of at least 0 and less than 1.

    Example:
        >>> check_rate("NSF", dropout=1)
        Traceback (most recent call last):
        ValueError: NSF wants dropout as a number of at least 0 and less than 1, but found 1.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < 1:
            raise ValueError(f"{owner} wants {name} as a number of at least 0 and less than 1, but found {value!r}.")


def check_widths(owner: str, *, empty: bool = False, **values: Any) -> None:
    """Raise a TypeError unless every value is a sequence of positive integers; `empty` allows one without any.

    Example:
        >>> check_widths("NSF", hidden=128)
        Traceback (most recent call last):
        TypeError: NSF wants hidden as a sequence of positive integers, such as (128, 128), but found 128.
    """
    for name, value in values.items():
        widths = value if isinstance(value, Sequence) and (value or empty) else [0]
        if not all(isinstance(width, Integral) and not isinstance(width, bool) and int(width) > 0 for width in widths):
            example = (32, 64) if name == "channels" else (128, 128)
            raise TypeError(f"{owner} wants {name} as a sequence of positive integers, such as {example}, but found {value!r}.")
