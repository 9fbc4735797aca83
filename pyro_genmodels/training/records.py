"""The schema of what a checkpoint holds as JSON, checked wherever a file is written or read.

All entries are optional, and a user may add others of other names.
"""

from __future__ import annotations

__all__ = ["ENTRIES", "check_record", "is_number"]

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from pyro_genmodels.utils.errors import one_line

MAX_NUMBER = 2**53
"""Largest size of an integer: larger ones are not floats."""


def check_record(record: Mapping[str, Any], subject: str) -> None:
    """Raise an error unless the entries of a record have the types of a checkpoint's.

    Args:
        record: the record, as JSON gives it.
        subject: beginning of the error message.

    Raises:
        ValueError: if an entry has another type or impossible contents.

    Example:
        >>> check_record({"class": "Flow", "rows": 10, "mine": None}, "The file is damaged")
        >>> check_record({"class": "Flow", "rows": -1}, "The file is damaged")
        Traceback (most recent call last):
        ValueError: The file is damaged: its entry 'rows' should be a whole number from 1, or null, but found -1.
    """
    for name, (is_valid, wanted) in ENTRIES.items():
        if name in record and not is_valid(record[name]):
            raise ValueError(f"{subject}: its entry {name!r} should be {wanted}, but found {one_line(repr(record[name]), 60)}.")
    if "best" in record and record["best"].get("epoch", 0) > len(record.get("history", ())):
        raise ValueError(f"{subject}: its best epoch, {record['best']['epoch']}, is not in its history.")


def is_number(value: Any) -> bool:
    """Return True for a number, also NaN, that a float can hold."""
    return isinstance(value, float) or (_is_whole(value, -MAX_NUMBER) and value <= MAX_NUMBER)


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_epoch(value: Any) -> bool:
    """Return True for the record of an epoch, a dictionary of numbers."""
    return (
        isinstance(value, dict)
        and all(map(is_number, value.values()))
        and _is_whole(value.get("epoch"), 1)
        and all(isfinite(value.get(name, 0)) for name in ("train", "seconds"))
    )


def _is_history(value: Any) -> bool:
    """Return True for the records of all epochs from the first."""
    return isinstance(value, list) and all(
        _is_epoch(epoch) and epoch["epoch"] == number and {"train", "seconds"} <= epoch.keys()
        for number, epoch in enumerate(value, 1)
    )


def _is_part(value: Any) -> bool:
    """Return True for the part of an epoch that was made."""
    if not isinstance(value, dict) or not all(_is_whole(value.get(name), 1) for name in ("steps", "rows")):
        return False
    losses, first_loss = value.get("losses"), value.get("first_loss")
    if not (isinstance(losses, dict) and "train" in losses and isinstance(first_loss, list) and first_loss):
        return False
    return all(is_number(number) and isfinite(number) for number in (*losses.values(), *first_loss, value.get("seconds")))


def _is_run(value: Any) -> bool:
    """Return True for the identity of a run."""
    texts = isinstance(value, dict) and all(_is_text(value.get(name)) for name in ("id", "begun"))
    return texts and isinstance(value.get("settings"), dict)


def _is_state(value: Any) -> bool:
    """Return True for the options and numbers of an optimiser."""
    return (
        isinstance(value, dict)
        and _is_text(value.get("optimiser"))
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, dict) for group in value["param_groups"])
        and isinstance(value.get("numbers"), dict)
        and all(name.isdecimal() and isinstance(numbers, dict) for name, numbers in value["numbers"].items())
    )


ENTRIES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "pyro_genmodels": (_is_text, "text"),
    "class": (_is_text, "text"),
    "arguments": (lambda value: isinstance(value, dict), "a dictionary"),
    "own": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts"),
    "rows": (lambda value: value is None or _is_whole(value, 1), "a whole number from 1, or null"),
    "data": (lambda value: value is None or _is_text(value), "text or null"),
    "valid": (lambda value: value is None or _is_text(value), "text or null"),
    "history": (_is_history, "a list of one dictionary of numbers for each epoch from 1, with epoch, train and seconds"),
    "best": (lambda value: value == {} or _is_epoch(value), "a dictionary of numbers with the epoch"),
    "part": (_is_part, "a dictionary with steps, rows, losses, first_loss and seconds"),
    "stopped": (_is_text, "text"),
    "units": (lambda value: isinstance(value, dict) and all(map(_is_text, value.values())), "a dictionary of texts"),
    "run": (_is_run, "a dictionary with id, begun and settings"),
    "options": (_is_state, "a dictionary with optimiser, param_groups and numbers"),
}
"""Checks of entries by name: a function that returns True if the value is valid, and a description of valid values."""
