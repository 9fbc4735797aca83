"""Training runs as tensors and JSON: copied between two epochs, and restored to continue exactly."""

from __future__ import annotations

__all__ = ["capture", "encode_option", "option_groups", "restore", "tensor_groups"]

import copy
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.rebuild import MAX_RECORD_TENSOR_SIZE, decode_tensor, encode_tensor
from pyro_genmodels.training.records import is_number
from pyro_genmodels.utils.errors import one_line


def capture(weights: TrainedWeights, optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy all parameters (current, averaged, best), the state of the optimiser and torch's random state, to the CPU.

    The best parameters are not copied: they never change in place during training.

    Returns:
        Tensors by name, and the options of the optimiser as JSON.
    """
    state = optimiser.state_dict()
    parts = tensor_groups(weights)
    best = {f"best.{i}": t for i, t in enumerate(parts.pop("best"))}
    tensors = {f"{part}.{i}": t for part, group in parts.items() for i, t in enumerate(group)}
    numbers: dict[str, dict[str, Any]] = {}
    for i, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{i}.{name}"] = value
            else:
                numbers.setdefault(str(i), {})[name] = encode_option(
                    value, f"{name!r} in the state of {type(optimiser).__name__}"
                )
    tensors["random"] = torch.get_rng_state()
    if weights.live[0].is_cuda:
        tensors["random.cuda"] = torch.cuda.get_rng_state(weights.live[0].device)
    record = {"optimiser": type(optimiser).__name__, "param_groups": option_groups(optimiser), "numbers": numbers}
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()} | best, record


def restore(weights: TrainedWeights, optimiser: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Restore what `capture` copied. Everything is checked first, so that an error leaves all as it was.

    Raises:
        ValueError: if it was copied from another model or another optimiser, or is damaged.
    """
    own = {f"{part}.{i}": t for part, group in tensor_groups(weights).items() for i, t in enumerate(group)}
    saved = {name: t for name, t in tensors.items() if name.split(".")[0] not in ("optimiser", "random")}
    own_forms, saved_forms = ({name: (t.shape, t.dtype) for name, t in group.items()} for group in (own, saved))
    if own_forms != saved_forms:
        raise ValueError(
            f"The saved training run is of another model: it has {len(saved)} tensors where this one has {len(own)}, or of "
            "other shapes or data types. Build model, guide and averaging as they were."
        )
    if record["optimiser"] != type(optimiser).__name__:
        raise ValueError(
            f"The saved training run was optimised by {one_line(record['optimiser'], 50)}, but this one is optimised by "
            f"{type(optimiser).__name__}. Pass the same optim=."
        )
    state = _optimiser_state(optimiser, tensors, record)
    generators = {"random": torch.Generator()}
    if "random.cuda" in tensors and weights.live[0].is_cuda:
        generators["random.cuda"] = torch.Generator(weights.live[0].device)
    if "random.order" in tensors:
        generators["random.order"] = torch.Generator()
    try:
        for name, generator in generators.items():
            generator.set_state(tensors[name])
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError("The random state of the saved training run is damaged.") from error
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])
    weights.reread()
    optimiser.load_state_dict(state)
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in generators:
        torch.cuda.set_rng_state(tensors["random.cuda"], weights.live[0].device)


def _optimiser_state(optimiser: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state to load into an optimiser, once it is known to have the form of this optimiser's own after a step.

    Raises:
        ValueError: if it has another form.
    """
    damaged = ValueError(f"The state of {type(optimiser).__name__} in the saved training run is damaged, or of other options.")
    state: dict[int, dict[str, Any]] = {}
    for name, t in tensors.items():
        kind, *rest = name.split(".", 2)
        if kind == "optimiser":
            if len(rest) != 2 or not rest[0].isdecimal():
                raise damaged
            state.setdefault(int(rest[0]), {})[rest[1]] = t
    try:
        groups = [{n: _decode(v) for n, v in group.items()} for group in record["param_groups"]]
        for i, values in record["numbers"].items():
            state.setdefault(int(i), {}).update({n: _decode(v) for n, v in values.items()})
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise damaged from error
    expected = _state_after_a_step(optimiser)
    numbers = [[group.get("params") for group in part] for part in (groups, expected["param_groups"])]
    if numbers[0] != numbers[1] or not _have_one_form(groups, expected["param_groups"]):
        raise damaged
    for i, values in state.items():
        if not _have_one_form(values, expected["state"].get(i)):
            raise damaged
    return {"state": state, "param_groups": groups}


def _state_after_a_step(optimiser: Optimizer) -> dict[str, Any]:
    """Return the state of a copy of the optimiser after a step with gradients of zero."""
    memo: dict[int, Any] = {}
    twin = copy.deepcopy(optimiser, memo)
    for own, part in zip(*(getattr(side, "optimisers", [side]) for side in (optimiser, twin)), strict=True):
        for name, value in vars(own).items():  # torch copies an optimiser without the attributes of a class of your own
            if name not in vars(part) and name != "step":  # a scheduler's, which steps the original
                setattr(part, name, copy.deepcopy(value, memo))
        for parameter in (p for group in part.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
        part.step()
    return twin.state_dict()


def _have_one_form(value: Any, like: Any) -> bool:
    """Return True if two values have the same types throughout: tensors of the same shape, and numbers that are finite."""
    like = like.item() if isinstance(like, np.generic) else like
    if isinstance(like, Tensor):
        return isinstance(value, Tensor) and (value.shape, value.dtype) == (like.shape, like.dtype)
    if isinstance(like, Mapping):
        return (
            isinstance(value, Mapping) and value.keys() == like.keys() and all(_have_one_form(value[n], like[n]) for n in like)
        )
    if isinstance(like, Sequence) and not isinstance(like, str):
        same = isinstance(value, list) and len(value) == len(like)
        return same and all(_have_one_form(a, b) for a, b in zip(value, like, strict=True))
    if like is None or isinstance(like, bool):
        return value is None or isinstance(value, bool)
    if isinstance(like, Real):
        return is_number(value) and value - value == 0  # neither NaN nor infinite
    return isinstance(value, type(like))


def encode_option(value: Any, name: str) -> Any:
    """Return an option of the training or its optimiser as JSON: numbers, also of numpy, texts, small tensors, lists of these.

    Raises:
        TypeError: for anything else, by the name of the option.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Tensor) and value.numel() <= MAX_RECORD_TENSOR_SIZE:
        return encode_tensor(value)
    if isinstance(value, (list, tuple)):
        return [encode_option(v, name) for v in value]
    raise TypeError(
        f"A checkpoint of a training run wants options that are numbers, texts, small tensors or lists of these, but {name} is "
        f"a {type(value).__name__}. Pass it in another form, or train without a checkpoint."
    )


def _decode(value: Any) -> Any:
    """Return the option that `encode_option` encoded."""
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return decode_tensor(value) if isinstance(value, dict) else value


def option_groups(optimiser: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of an optimiser's parameters as JSON."""
    kind = type(optimiser).__name__
    return [{n: encode_option(v, f"{n}= of {kind}") for n, v in g.items()} for g in optimiser.state_dict()["param_groups"]]


def tensor_groups(weights: TrainedWeights) -> dict[str, list[Tensor]]:
    """Return the parameters and buffers of a run in groups."""
    average = [] if weights.average is None else list(weights.average.state_dict().values())
    return {"live": list(weights.live), "buffer": weights.buffers, "best": weights.best, "average": average}
