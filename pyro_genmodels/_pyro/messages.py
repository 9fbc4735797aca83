"""Messages of errors that are raised while a model runs.

Pyro appends the shapes of all sites so far to any `ValueError` or `RuntimeError` of a traced run, once for each trace. After a
message of this package, which says what was found and what to do, they only hide it.
"""

from __future__ import annotations

__all__ = ["is_own", "text_of", "without_trace_shapes"]

import re
from collections.abc import Iterator
from contextlib import contextmanager

_SHAPES = re.compile(r"\n\s*Trace Shapes:.*", re.DOTALL)
_THIS_PACKAGE = __name__.split(".", maxsplit=1)[0]


def text_of(error: BaseException) -> str:
    """Return the text of an error without the shapes that Pyro appends and the full stop."""
    return _SHAPES.sub("", str(error)).rstrip(".\n ")


@contextmanager
def without_trace_shapes() -> Iterator[None]:
    """Remove the shapes that Pyro appends to the errors of this package; the error has them as ``trace_shapes``.

    Errors of the user's own code, of Pyro and of torch keep them, because shapes are often their cause.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        original: BaseException = error
        while original.__cause__ is not None and _SHAPES.search(str(original)):
            original = original.__cause__
        shapes = _SHAPES.search(str(error))
        if shapes is None or not is_own(original):
            raise
        error.args = (_SHAPES.sub("", str(error)),)
        error.trace_shapes = shapes.group().strip("\n")  # type: ignore[union-attr]
        raise error from original.__cause__


def is_own(error: BaseException) -> bool:
    """Return True if an error was raised by a function of this package."""
    if hasattr(error, "trace_shapes"):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == _THIS_PACKAGE
