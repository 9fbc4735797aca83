"""The arguments of a model that a critic sees beside the data, chosen by name."""

from __future__ import annotations

__all__ = ["check_critic_takes", "check_names", "chosen_arguments", "warning_of_inputs"]

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pyro_genmodels.infer.adversarial.pairings import Pairing, RealAndFake
from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.errors import listed, warn_caller
from pyro_genmodels.utils.inputs import out_of_range
from pyro_genmodels.utils.keywords import signature_of


def check_names(model: Callable[..., Any], names: Sequence[str], pairing: Pairing) -> tuple[str, ...]:
    """Return the names of the arguments that a critic sees, after checking them.

    Raises:
        TypeError: if they are not names.
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
        ValueError: if one is not a tensor with one row per datum.
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


@contextmanager
def warning_of_inputs(critic: nn.Module) -> Iterator[None]:
    """Warn if the first layer of a critic that runs, on data, is linear and sees inputs far from where networks bend."""
    layers = [m for m in critic.modules() if next(m.parameters(recurse=False), None) is not None]
    linear = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    seen: list[tuple[nn.Module, Any]] = []
    hooks = [m.register_forward_pre_hook(lambda m, args: None if seen else seen.append((m, args))) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not seen or not isinstance(seen[0][0], linear):
        return
    layer, (x, *_) = seen[0]
    if x.is_floating_point() and x.numel() and can_be_read(x):
        found = out_of_range(x.detach().reshape(-1, x.shape[-1] if isinstance(layer, nn.Linear) else 1))
        if found:
            warn_caller(
                f"Adversarial: the critic sees inputs {found}, but bends where these are about 1, so that it cannot learn. "
                "Build the model in units of the data's deviation, or let the critic subtract their mean and divide by their "
                "deviation first.",
                UserWarning,
            )


def _named_arguments(model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of a model by the names of its parameters."""
    bound = signature_of(model).bind(*args, **kwargs)
    bound.apply_defaults()
    return {**bound.arguments, **kwargs}
