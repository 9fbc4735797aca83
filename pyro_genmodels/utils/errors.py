"""Checks of arguments, errors for unknown names, wrong choices and missing libraries, and warnings that name the caller."""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "check_choice",
    "check_positive_int",
    "import_extra",
    "listed",
    "one_line",
    "repr_or_class",
    "suggest_names",
    "type_with_article",
    "unknown_attribute",
    "unknown_name",
    "warn_caller",
]

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from numbers import Integral
from typing import Any, NoReturn


class ArgumentError(ValueError):
    """An error of an input that another value of an argument would avoid.

    Args:
        message: text of the error.
        argument: name of that argument, such as "columns".
        example: value that the argument could have, as text.
    """

    def __init__(self, message: str, *, argument: str, example: str) -> None:
        super().__init__(message)
        self.argument, self.example = argument, example

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the error with its fields, so that it reaches the user from a worker process."""
        return partial(type(self), argument=self.argument, example=self.example), self.args


_INNER = {"pyro_genmodels", "pyro", "torch", "contextlib"}
"""Packages that lie between a user's call and a warning of this library."""


def check_positive_int(owner: str, *, least: int = 1, **values: Any) -> None:
    """Raise an error unless every value is a positive integer, of Python or numpy.

    Args:
        owner: name of the class or function that takes the arguments.
        least: smallest value.
        values: the arguments, by name.

    Raises:
        ValueError: if a value is a bool, is no integer, or is less than `least`.

    Example:
        >>> check_positive_int("Euler", num_steps=10)
        >>> check_positive_int("Euler", num_steps=0)
        Traceback (most recent call last):
        ValueError: Euler wants an integer num_steps of 1 or more, but found 0.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{owner} wants an integer {name} of {least} or more, but found {value!r}.")


def check_choice(owner: str, role: str, found: Any, default: Any, wanted: Any) -> Any:
    """Return a choice, or the default if it is None.

    Args:
        owner: name of the class or function that takes the choice.
        role: noun for the choice, such as "coupling".
        found: the value to check.
        default: the value to use for None; the error names it as an example.
        wanted: allowed class, or a tuple or union of classes.

    Raises:
        TypeError: if the value is not an instance of an allowed class.

    Example:
        >>> check_choice("round", "number", None, 2, int)
        2
        >>> check_choice("round", "number", int, 2, int)
        Traceback (most recent call last):
        TypeError: round wants a number such as 2, but found the class int; call it.
    """
    found = default if found is None else found
    if not isinstance(found, wanted):
        article = "an" if role[0] in "aeiou" else "a"
        raise TypeError(f"{owner} wants {article} {role} such as {default!r}, but found {repr_or_class(found)}.")
    return found


def repr_or_class(found: Any) -> str:
    """Return the repr of a value, for a message; for a class, a hint to call it.

    Example:
        >>> repr_or_class(1), repr_or_class(int)
        ('1', 'the class int; call it')
    """
    return f"the class {found.__name__}; call it" if isinstance(found, type) else repr(found)


def import_extra(module: str, *, extra: str, by: str) -> Any:
    """Import and return a module of an optional dependency.

    Args:
        module: full name of the module.
        extra: name of the extra that installs it.
        by: subject of the error message: what needs the module.

    Raises:
        ImportError: if the module is not installed. The message has the line that installs it.

    Example:
        >>> import_extra("json", extra="cli", by="A checkpoint").loads("[1]")
        [1]
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = {"ot": "POT", "sklearn": "scikit-learn"}.get(top := module.split(".")[0], top)
        raise ImportError(f"{by} needs {name}: pip install 'pyro-genmodels[{extra}]'.") from error


def unknown_name(kind: str, found: str, known: Iterable[str]) -> ValueError:
    """Build the error to raise for an unknown name.

    Args:
        kind: kind of thing that is named, such as "data set".
        found: the unknown name.
        known: the known names.

    Returns:
        An error that lists the known names and suggests the nearest one, ignoring case, if one is near.

    Example:
        >>> raise unknown_name("data set", "Mons", ["digits", "moons", "ring"])
        Traceback (most recent call last):
        ValueError: unknown data set 'Mons': choose from digits, moons, ring. Did you mean moons?
    """
    known = list(known)
    near = _nearest(found, known)
    hint = f" Did you mean {_printable(near)}?" if near else ""
    return ValueError(f"unknown {kind} {_shortened(found)!r}: choose from {listed(known)}.{hint}")


def unknown_attribute(module: str, found: str, known: Iterable[str]) -> AttributeError:
    """Build the error to raise for a name that a module does not have.

    Args:
        module: name of the module.
        found: the name.
        known: names that the module has.

    Returns:
        An error that suggests the nearest name, ignoring case, if one is near. An `AttributeError`, so that `hasattr` works.

    Example:
        >>> raise unknown_attribute("pyro_genmodels", "Flwo", ["Flow", "GAN"])
        Traceback (most recent call last):
        AttributeError: module 'pyro_genmodels' has no attribute 'Flwo'. Did you mean Flow?
    """
    near = None if found.startswith("_") else _nearest(found, known)
    hint = f". Did you mean {near}?" if near else ""
    return AttributeError(f"module {module!r} has no attribute {found!r}{hint}")


def _nearest(found: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like another, ignoring case, or None if none is."""
    by_case = {name.casefold(): name for name in known}
    near = get_close_matches(found.casefold(), by_case, n=1)
    return by_case[near[0]] if near else None


def suggest_names(module: str) -> None:
    """Make the errors for names that a module does not have suggest the nearest name of its `__all__`.

    The module gets a ``__getattr__`` at run time only, so that type checkers still know which names it has.

    Args:
        module: name of the module.
    """
    owner = sys.modules[module]

    def fail(name: str) -> NoReturn:
        raise unknown_attribute(module, name, owner.__all__)

    vars(owner)["__getattr__"] = fail


def warn_caller(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the line of the user's code from which this library was called, be it directly or by Pyro or torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def listed(names: Iterable[str]) -> str:
    """Join names with commas, at most 20 of them.

    Example:
        >>> listed("abc"), listed(map(str, range(22)))[-13:], listed([])
        ('a, b, c', '19 and 2 more', 'none')
    """
    names = list(names)
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(map(_printable, names[:20])) + more or "none"


def type_with_article(value: object) -> str:
    """Return the name of a value's type with its article, or that of a class.

    Example:
        >>> type_with_article({}), type_with_article(1), type_with_article(dict)
        ('a dict', 'an int', 'the class dict')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    spelt_out = name[:2].isupper() or name.startswith("x")
    vowel = name[0] in "AEFHILMNORSX" if spelt_out else name[0].lower() in "aeiou" and not name.startswith(("Uni", "One"))
    return f"{'an' if vowel else 'a'} {name}"


def one_line(text: object, limit: int = 200) -> str:
    r"""Return a text from elsewhere as one line for a message: without control characters, cut to a length.

    White space becomes single blanks. Characters that do not print, such as the escape that begins a terminal's commands or a
    mark that turns the direction of writing, are written as Python escapes.

    Args:
        text: the text, or any object whose text to take.
        limit: largest number of characters.

    Example:
        >>> one_line("a\tb\nc\x1b[31m"), one_line("word " * 100, 12)
        ('a b c\\x1b[31m', 'word word...')
    """
    text = str(text)
    beginning = text[: 10 * limit]  # a text of any length costs little
    words = " ".join(beginning.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    if len(line) <= limit and len(text) <= len(beginning):
        return line
    return line[: limit - 3].rstrip() + "..."


def _printable(name: str) -> str:
    """Return the name, in quotes and escaped if it is empty or has characters that do not print."""
    return _shortened(name) if name.strip() and name.isprintable() else repr(_shortened(name))


def _shortened(name: str) -> str:
    return name if len(name) <= 50 else name[:47] + "..."
