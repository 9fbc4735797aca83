"""What is said of a name that nobody knows, of a choice that is none, and of a library that is not there."""

from __future__ import annotations

__all__ = ["check_choice", "import_extra", "listed", "unknown_name"]

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def unknown_name(kind: str, found: str, known: Iterable[str]) -> ValueError:
    """The error to raise for a name that is not known.

    Args:
        kind: of thing, such as "data set".
        found: the name.
        known: the names there are.

    Returns:
        An error that says what was found, what is known, and the nearest name if one is near, whatever its case.

    Example:
        >>> raise unknown_name("data set", "Mons", ["digits", "moons", "ring"])
        Traceback (most recent call last):
        ValueError: unknown data set 'Mons': known are digits, moons, ring. Did you mean moons?
    """
    known = list(known)
    by_case = {name.casefold(): name for name in known}
    near = get_close_matches(found.casefold(), by_case, n=1)
    hint = f" Did you mean {_plain(by_case[near[0]])}?" if near else ""
    return ValueError(f"unknown {kind} {_short(found)!r}: known are {listed(known)}.{hint}")


def listed(names: Iterable[str]) -> str:
    """Names in a line, the first 20 of them.

    Example:
        >>> listed("abc"), listed(map(str, range(22)))[-13:], listed([])
        ('a, b, c', '19 and 2 more', 'none')
    """
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(_plain, names[:20])) + more or "none"


def _plain(name: str) -> str:
    """The name as it stands, or in quotes if it is empty or has characters that do not print."""
    return _short(name) if name.strip() and name.isprintable() else repr(_short(name))


def _short(name: str) -> str:
    return name if len(name) <= 50 else name[:47] + "..."


def import_extra(module: str, *, extra: str, by: str) -> Any:
    """A module of one of the extras.

    Args:
        module: its full name.
        extra: that brings it.
        by: what needs it, as the error says.

    Raises:
        ImportError: with the line that installs it.

    Example:
        >>> import_extra("json", extra="cli", by="A checkpoint").loads("[1]")
        [1]
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = {"ot": "POT", "sklearn": "scikit-learn"}.get(top := module.split(".")[0], top)
        raise ImportError(f"{by} needs {name}: pip install 'pyro-genmodels[{extra}]'.") from error


def check_choice(owner: str, role: str, found: Any, default: Any, wanted: Any) -> Any:
    """A choice, or the default in place of None.

    Raises:
        TypeError: if it is none of those wanted.
    """
    found = default if found is None else found
    if not isinstance(found, wanted):
        given = f"the class {found.__name__}; call it" if isinstance(found, type) else repr(found)
        raise TypeError(f"{owner} wants {'an' if role[0] in 'aeiou' else 'a'} {role} such as {default!r}, but found {given}.")
    return found
