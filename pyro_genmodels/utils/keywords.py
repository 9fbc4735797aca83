"""Keyword arguments of a function and of the model that it runs, kept apart.

`to_arviz(fit, x, batch_size=8)` has an option of that name, and a model may have one too. Python gives the value to the
function, so the model would silently run with its default.
"""

from __future__ import annotations

__all__ = [
    "check_model_keywords",
    "given_options",
    "joined_keywords",
    "keyword_names",
    "option_names",
    "runs_models",
    "signature_of",
]

import inspect
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from pyro.poutine.messenger import Messenger

P = ParamSpec("P")
T = TypeVar("T")


class _Call(NamedTuple):
    """A running call of a function under `runs_models`.

    Attributes:
        owner: name of the function or class.
        options: names of its options.
        given: names of the options that the call gives.
    """

    owner: str
    options: frozenset[str]
    given: frozenset[str]


_running: ContextVar[_Call] = ContextVar("running")
"""Innermost running call of a function under `runs_models`."""


def runs_models(*forwards_to: Callable[..., Any]) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function, or the constructor of a class, that runs a model of the user's.

    The other functions of this module then know its name, its options and which of them a call gives.

    Args:
        forwards_to: functions to which it passes options that stand in its ``**kwargs``.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        options = frozenset().union(*map(option_names, (function, *forwards_to)))
        owner = function.__qualname__.split(".")[-2] if function.__name__ == "__init__" else function.__name__

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            token = _running.set(_Call(owner, options, frozenset(options & kwargs.keys())))
            try:
                return function(*args, **kwargs)
            finally:
                _running.reset(token)

        return call

    return decorate


def option_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keyword-only options of a function.

    Example:
        >>> sorted(option_names(lambda x, *, batch_size=128, progress=True, **kwargs: None))
        ['batch_size', 'progress']
    """
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY)


def given_options() -> frozenset[str]:
    """Return the names of the options that the running call of a function gives, also with their default value.

    Example:
        >>> @runs_models()
        ... def function(x, *, batch_size=128, progress=True, **kwargs):
        ...     return sorted(given_options())
        >>> function(1, batch_size=128, y=2)
        ['batch_size']
    """
    return _running.get().given


def signature_of(model: Any) -> inspect.Signature:
    """Return the signature of a model: of the function under any handlers of Pyro, or of the `forward` of a module.

    Raises:
        ValueError: if a function that is not written in Python has none.

    Example:
        >>> from pyro import poutine
        >>> str(signature_of(poutine.scale(lambda x, size: None, scale=2.0)))
        '(x, size)'
    """
    return inspect.signature(_called(model))


def _called(model: Any) -> Any:
    """Return the function that a model is under any handlers of Pyro, or the `forward` of a module. A partial is kept."""
    while isinstance(model, partial) and model.args and isinstance(model.args[0], Messenger):
        model = model.args[1]
    return getattr(model, "forward", model)


def keyword_names(model: Any, args: tuple = ()) -> list[str]:
    """Return the parameters of a model that can be given by name, without those that positional arguments fill.

    A handler of Pyro around a function has the parameters of the function, and a module those of its `forward`. Names behind
    ``**kwargs`` are unknown.

    Example:
        >>> keyword_names(lambda x, y=None, *, batch_size=None: None, (1,))
        ['y', 'batch_size']
    """
    try:
        parameters = signature_of(model).parameters.values()
    except (TypeError, ValueError):  # a function without a signature
        return []
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(args)]
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in by_name and p not in by_position]


def check_model_keywords(
    model: Callable[..., Any],
    guide: Callable[..., Any] | None,
    args: tuple,
    kwargs: Mapping[str, Any],
    filled: Collection[str] = (),
) -> None:
    """Check the keywords of the running call before the model runs.

    No option that the call gives may be a keyword of the model too, and model and guide must know all keywords that they are
    given.

    Args:
        model: the model.
        guide: the guide, or None if there is none.
        args: positional arguments of the model; what they fill is no clash.
        kwargs: keyword arguments of model and guide, see `joined_keywords`.
        filled: further keywords of the model that the function fills itself.

    Raises:
        ValueError: naming the first option that is a keyword of the model too, and the ways out.
        TypeError: naming the first keyword that model or guide do not know, and the nearest name that is known.

    Example:
        >>> @runs_models()
        ... def fit(model, x, *, batch_size=100, model_kwargs=None, **kwargs):
        ...     check_model_keywords(model, None, (x,), joined_keywords(kwargs, model_kwargs))
        >>> def model(x, batch_size=None): ...
        >>> fit(model, 1, model_kwargs={"batch_size": 8})
        >>> fit(model, 1, batch_size=8)
        Traceback (most recent call last):
        ValueError: batch_size= is a keyword of fit and of the model. \
Give the model's in model_kwargs={'batch_size': ...}, and batch_size= is that of fit.
        >>> fit(model, 1, batchsize=8)
        Traceback (most recent call last):
        TypeError: fit and the model know no keyword batchsize. Did you mean batch_size?
    """
    owner, options, given = _running.get()
    taken = keyword_names(model, args)
    for name in sorted(given):
        if name in taken and name not in kwargs and name not in filled:
            raise ValueError(
                f"{name}= is a keyword of {owner} and of the model. Give the model's in model_kwargs={{{name!r}: ...}}, and "
                f"{name}= is that of {owner}."
            )
    for name in kwargs:
        if not _takes(model, name):
            near = get_close_matches(name, [*sorted(options), *keyword_names(model)], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise TypeError(f"{owner} and the model know no keyword {name}.{hint}")
        if guide is not None and not _takes(guide, name):
            raise TypeError(
                f"The model has a keyword {name}, but the guide has none. {owner} calls both alike: give the guide {name}, or "
                "**kwargs, too."
            )


def _takes(fn: Any, name: str) -> bool:
    """Return False if a function cannot be given a keyword of this name, nor what it wraps by `functools.wraps`."""
    fn = _called(fn)
    try:
        parameters = inspect.signature(fn, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # a function without a signature
        return True
    if any(p.name == name and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
        return True
    hands_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return hands_on and (not hasattr(fn, "__wrapped__") or _takes(fn.__wrapped__, name))


def joined_keywords(kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments of the model that the running call gives by name and in ``model_kwargs``.

    Raises:
        TypeError: if ``model_kwargs`` is no dictionary with names as keys.
        ValueError: if an argument is given both ways.
    """
    if model_kwargs is None:
        return dict(kwargs)
    owner = _running.get().owner
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(name, str) for name in model_kwargs):
        raise TypeError(f"{owner} wants model_kwargs as a dictionary of the model's keywords, but found {model_kwargs!r}.")
    if twice := [name for name in kwargs if name in model_kwargs]:
        raise ValueError(f"{owner} was given {twice[0]}= and model_kwargs={{{twice[0]!r}: ...}}: give one of them.")
    return {**kwargs, **model_kwargs}
