"""The arguments of a model that a critic sees beside the data, chosen by name."""

from __future__ import annotations

__all__ = ["check_critic_takes", "check_names", "chosen_arguments"]

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pyro_genmodels.infer.adversarial.pairings import Pairing, RealAndFake
from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.keywords import signature_of


def check_names(model: Callable[..., Any], names: Sequence[str], pairing: Pairing) -> tuple[str, ...]:
    """Return the names of the arguments that a critic shall see.

    Raises:
        TypeError: if they are no names.
        ValueError: if the model has no argument of a name, or the critic of the pairing sees no arguments.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"Adversarial wants the names of arguments as critic_context, such as ('context',), but found {names!r}."
        )
    if not pairing.compares_data:
        raise ValueError(
            f"The critic of {type(pairing).__name__} compares no data, and sees no arguments of the model: leave out "
            "critic_context=."
        )
    parameters = signature_of(model).parameters
    unknown = [name for name in names if name not in parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"critic_context names {listed(unknown)}, but the model's arguments are {listed(parameters)}: choose from them."
        )
    return tuple(names)


def chosen_arguments(
    model: Callable[..., Any], names: Sequence[str], args: tuple, kwargs: Mapping[str, Any], rows: int
) -> tuple[Tensor, ...]:
    """Return the arguments of a call of a model that have these names, (rows, ...) each.

    Raises:
        ValueError: if one is no tensor with one row per datum.
    """
    given = _named_arguments(model, args, kwargs)
    for name in names:
        value = given.get(name)
        if not (isinstance(value, Tensor) and value.dim() and len(value) == rows):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"critic_context names {name!r}, which should be a tensor with one row for each of the {rows} data, but found "
                f"{found}."
            )
    return tuple(given[name] for name in names)


def check_critic_takes(
    critic: nn.Module, inputs: RealAndFake, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
) -> None:
    """Raise a ValueError unless the signature of a critic has room for its inputs."""
    try:
        inspect.signature(critic.forward).bind(*inputs.real, *inputs.context)
    except TypeError as error:
        given = _named_arguments(model, args, kwargs).items()
        names = [name for name, value in given if any(value is part for part in inputs.context)]
        number = len(inputs.real) + len(inputs.context)
        raise ValueError(
            f"The critic is given {number} tensors, of which {len(inputs.context)} are arguments of the model "
            f"({listed(names) or 'none'}), but its forward does not take them: {error}. Name those that it should see, "
            "critic_context=('context',), or critic_context=() for none."
        ) from None


def _named_arguments(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a model by the names of its parameters."""
    bound = signature_of(model).bind(*args, **kwargs)
    bound.apply_defaults()
    return {**bound.arguments, **kwargs}
