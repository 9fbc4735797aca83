"""Keys of arguments, for each of which there is a graph, and when another capture pays."""

from __future__ import annotations

__all__ = ["Captures", "key_of"]

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro.tracing import tree_flatten
from pyro_genmodels.infer.compiled.recorder import WAY_OUT, CaptureError
from pyro_genmodels.utils.errors import one_line, warn_caller
from pyro_genmodels.utils.keywords import signature_of

MANY_CAPTURES = 8
"""Number of captures for one cause after which a warning says that capturing again and again is slow."""

WAIT = 500
"""Number of steps that Pyro then makes before the next capture, which takes about as long."""


class Captures:
    """Counts of captures by cause: new shapes, arguments that are no tensors, or what was bound anew.

    After many captures for one of the latter two, another one does not pay until the same program is asked for many times.

    Args:
        model: the model, for the names of its arguments.
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        self._model = model
        self._counts: Counter[Any] = Counter({"changed": 1})  # before anything can change there is a capture
        self._constants: dict[Any, list[dict[str, str]]] = {}
        self._waited: dict[Any, tuple[Any, int]] = {}

    def pays(self, key: Any, changed: str | None) -> bool:
        """Return True if a program is to be captured now, and False if Pyro is to make the step.

        Args:
            key: key of the arguments, and whether gradients are asked for.
            changed: what was bound anew, or None for new arguments.
        """
        cause, form = self._cause(key, changed), _form_of(key)
        if cause == "shapes" or self._counts[cause] < MANY_CAPTURES:
            return True
        last, waited = self._waited.get(form, (None, 0))
        waited = waited + 1 if key == last else 1
        self._waited[form] = key, waited
        return waited > WAIT

    def add(self, key: Any, changed: str | None, args: Sequence[Any], kwargs: Mapping[str, Any], *, pauses: bool) -> None:
        """Count a capture.

        Args:
            key: key of the arguments, and whether gradients are asked for.
            changed: what was bound anew, or None for new arguments.
            args: positional arguments of the model.
            kwargs: its keyword arguments.
            pauses: True if `pays` is asked before each capture.

        Warns:
            RuntimeWarning: at the eighth for one cause.
        """
        cause, form = self._cause(key, changed), _form_of(key)
        self._counts[cause] += 1
        if cause == "shapes":
            self._counts[form] += 1  # the first of its form
        self._waited.pop(form, None)
        found = self._constants.setdefault(form, [])
        if len(found) < MANY_CAPTURES:
            found.append(_named_constants(self._model, args, kwargs))
        if self._counts[cause] != MANY_CAPTURES:
            return
        reason = f"{changed} was bound anew" if changed else _differences(found) or "the arguments had so many shapes"
        pause = (
            ""
            if cause == "shapes" or not pauses
            else f" From now on Pyro makes the steps after a change, until {WAIT} are alike."
        )
        warn_caller(
            f"The program was captured {MANY_CAPTURES} times: {reason}. Capturing takes much longer than a step.{pause} Pass "
            "what changes as a tensor, and batches of one size."
        )

    def _cause(self, key: Any, changed: str | None) -> Any:
        if changed is not None:
            return "changed"
        return _form_of(key) if _form_of(key) in self._constants else "shapes"


def _form_of(key: Any) -> Any:
    """Return a key without the values of what is no tensor."""
    gradients, parts = key
    return gradients, tuple(
        type(part) if isinstance(part, _Same) else part[:1] if _is_constant(part) else part for part in parts
    )


def _is_constant(part: Any) -> bool:
    return type(part) is tuple and len(part) == 2 and part[0] is not bool


def _named_constants(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Return texts of those arguments of a model that are no tensors, by the names or the places of the arguments."""
    try:
        named = dict(signature_of(model).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):  # the model has other arguments, as the loss may, or no signature
        named = {str(i + 1): x for i, x in enumerate(args)} | dict(kwargs)
    constants = {}
    for name, value in named.items():
        leaves, _ = tree_flatten(value)
        for i, x in enumerate(leaves):
            if not isinstance(x, Tensor | bool):
                constants[name if len(leaves) == 1 else f"{name} (entry {i + 1} of it)"] = one_line(repr(x), 20)
    return constants


def _differences(found: Sequence[Mapping[str, str]]) -> str:
    """Return a text about the arguments that differ between captures, or an empty one."""
    values = {name: list(dict.fromkeys(constants.get(name, "missing") for constants in found)) for name in found[-1]}
    texts = [f"the argument {name} was {', '.join(v[:3])}, ..." for name, v in values.items() if len(v) > 1]
    return " and ".join(texts)


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return the shape and structure of arguments, and the tensors among them."""
    dtype = torch.get_default_dtype()
    if not kwargs and all(type(x) is Tensor for x in args):
        inputs = list(args)
        return (dtype, *map(_layout, inputs)), inputs
    leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    parts = tuple(_layout(x) if isinstance(x, Tensor) else _constant(x) for x in leaves)
    return (dtype, structure, *parts), inputs


def _layout(x: Tensor) -> tuple[Any, ...]:
    """Return what a compiled graph takes for granted of an argument; the strides are among it.

    Raises:
        CaptureError: if it is sparse.
    """
    if x.layout != torch.strided:
        raise CaptureError(f"an argument of shape {tuple(x.shape)} is sparse. Pass x.to_dense(). {WAY_OUT}")
    return x.shape, x.stride(), x.dtype, x.device


def _constant(x: Any) -> Any:
    """Return something that is equal for equal arguments that are no tensors."""
    if isinstance(x, float | complex) and x != x:
        return type(x), "nan"
    if isinstance(x, bool | int | float | complex | str | bytes | type(None) | torch.Size | torch.dtype | torch.device):
        return type(x), x
    return _Same(x)


class _Same:
    """An object that is equal to itself alone, and is kept alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
