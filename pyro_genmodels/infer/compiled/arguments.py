"""Checks of the model, guide, loss and optimiser that programs are captured of."""

from __future__ import annotations

__all__ = ["check_loss", "check_optim", "check_pair"]

from types import FunctionType
from typing import Any

from pyro.infer import ELBO
from pyro.optim import PyroOptim

from pyro_genmodels.utils.errors import repr_or_class, type_with_article


def check_pair(owner: str, model: Any, guide: Any) -> None:
    """Check that a model and a guide can be called.

    Raises:
        TypeError: if one cannot, or is a class.
    """
    for role, example, found in (("model", "a function or module", model), ("guide", "such as AutoNormal(model)", guide)):
        if isinstance(found, type) or not callable(found):
            raise TypeError(f"{owner} wants a {role}, {example}, but found {repr_or_class(found)}.")


def check_loss(owner: str, loss: Any) -> None:
    """Check that a loss is one of Pyro, or a function.

    Raises:
        TypeError: if it is neither, or a class.
    """
    if isinstance(loss, type):
        raise TypeError(f"{owner} wants a loss, but found the class {loss.__name__}; call it: {loss.__name__}().")
    if not isinstance(loss, ELBO) and not callable(loss):
        raise TypeError(
            f"{owner} wants a loss, which is a pyro.infer.ELBO, such as Trace_ELBO(), or a function of model, guide and "
            f"arguments, but found {loss!r}."
        )


def check_optim(owner: str, optim: Any) -> None:
    """Check that an optimiser is one of Pyro.

    Raises:
        TypeError: if it is not.
    """
    if not isinstance(optim, PyroOptim):
        raise TypeError(
            f"{owner} wants an optimiser of pyro.optim, such as pyro.optim.Adam({{'lr': 0.01}}), but found {_described(optim)}."
        )


def _described(found: Any) -> str:
    """Return the class of an object with its module, or None as None."""
    if found is None:
        return "None"
    if isinstance(found, FunctionType):  # as pyro.optim.Adam is
        return f"a function of {found.__module__}; call it"
    kind = found if isinstance(found, type) else type(found)
    if kind.__module__ == "builtins":
        return type_with_article(found)
    return f"{'the class' if kind is found else 'an object of'} {kind.__module__}.{kind.__qualname__}"
