"""Keyword arguments of a function and of the model that it runs, kept apart.

`to_arviz(fit, x, batch_size=8)` has an option of that name, and a model may have one too. Python gives the value to the
function, so the model would silently run with its default.
"""

from __future__ import annotations

__all__ = [
    "check_keywords",
    "check_known_keywords",
    "given_keywords",
    "joined_keywords",
    "keyword_names",
    "option_names",
    "remember_keywords",
    "signature_of",
]

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from pyro.poutine.messenger import Messenger

P = ParamSpec("P")
T = TypeVar("T")
_given: ContextVar[frozenset[str]] = ContextVar("given", default=frozenset())
"""Options given by the innermost running call of a function under `remember_keywords`."""


def remember_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, in whose calls `given_keywords` knows the options that were given, also with their default value."""
    options = option_names(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _given.set(frozenset(options & kwargs.keys()))
        try:
            return function(*args, **kwargs)
        finally:
            _given.reset(token)

    return call


def option_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keyword-only options of a function.

    Example:
        >>> sorted(option_names(lambda x, *, batch_size=128, progress=True, **kwargs: None))
        ['batch_size', 'progress']
    """
    return frozenset(name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY)


def given_keywords() -> frozenset[str]:
    """Return the names of the keyword-only options that the running call of a function gives.

    Example:
        >>> @remember_keywords
        ... def function(x, *, batch_size=128, progress=True, **kwargs):
        ...     return sorted(given_keywords())
        >>> function(1, batch_size=128, y=2)
        ['batch_size']
    """
    return _given.get()


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


def check_keywords(
    owner: str,
    model: Callable[..., Any] | None,
    own_names: Iterable[str],
    args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Check that no keyword of a call can be meant for the function as well as for the model that it runs.

    Args:
        owner: name of the function that runs the model.
        model: the model, or None if there is none.
        own_names: keywords of the function that the call gives, see `given_keywords`. Those left out are no clash.
        args: positional arguments of the model; what they fill is no clash.
        model_kwargs: keyword arguments that are for the model without doubt; what they fill is no clash.

    Raises:
        ValueError: naming the first clash and the ways out.

    Example:
        >>> def model(x, batch_size=None): ...
        >>> check_keywords("to_arviz", model, ["batch_size"], (1,), {"batch_size": 8})
        >>> check_keywords("to_arviz", model, ["batch_size"], (1,))
        Traceback (most recent call last):
        ValueError: batch_size= is a keyword of to_arviz and of the model. \
Give the model's in model_kwargs={'batch_size': ...}, and batch_size= is that of to_arviz.
    """
    if model is None:
        return
    known = model_kwargs or {}
    taken = keyword_names(model, args)
    for name in own_names:
        if name in taken and name not in known:
            raise ValueError(
                f"{name}= is a keyword of {owner} and of the model. Give the model's in model_kwargs={{{name!r}: ...}}, and "
                f"{name}= is that of {owner}."
            )


def check_known_keywords(owner: str, options: Iterable[str], kwargs: Mapping[str, Any], model: Any, guide: Any = None) -> None:
    """Check that model and guide take the keywords that they will be given, before they run.

    Args:
        owner: name of the function that runs them.
        options: names of its own options, one of which may be meant.
        kwargs: keyword arguments of model and guide.
        model: the model.
        guide: the guide, or None if there is none.

    Raises:
        TypeError: naming the first keyword that one of them does not know, and the nearest name that is known.

    Example:
        >>> def model(x, y=None): ...
        >>> check_known_keywords("to_arviz", ["num_samples"], {"y": 1}, model)
        >>> check_known_keywords("to_arviz", ["num_samples"], {"num_sample": 10}, model)
        Traceback (most recent call last):
        TypeError: to_arviz and the model know no keyword num_sample. Did you mean num_samples?
    """
    for name in kwargs:
        if not _takes(model, name):
            near = get_close_matches(name, [*options, *keyword_names(model)], n=1)
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


def joined_keywords(owner: str, kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the keyword arguments of a model, of which some are given by name and some as ``model_kwargs``.

    Raises:
        TypeError: if ``model_kwargs`` is no dictionary with names as keys.
        ValueError: if an argument is given both ways.

    Example:
        >>> joined_keywords("to_arviz", {"y": 1}, {"batch_size": 8})
        {'y': 1, 'batch_size': 8}
    """
    if model_kwargs is None:
        return dict(kwargs)
    if not isinstance(model_kwargs, Mapping) or not all(isinstance(name, str) for name in model_kwargs):
        raise TypeError(f"{owner} wants model_kwargs as a dictionary of the model's keywords, but found {model_kwargs!r}.")
    if twice := [name for name in kwargs if name in model_kwargs]:
        raise ValueError(f"{owner} was given {twice[0]}= and model_kwargs={{{twice[0]!r}: ...}}: give one of them.")
    return {**kwargs, **model_kwargs}
