"""A training run as tensors and data: taken between two epochs, kept on disk, put back to go on as if nothing had been."""

from __future__ import annotations

__all__ = ["RunCheckpoint", "capture", "restore"]

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import checkpoints


def capture(weights: TrainedWeights, optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copies of all parameters (live, averaged, best), of the optimiser's state and of torch's random state; and its options.

    Returns:
        Tensors by name, and what JSON can say.
    """
    state = optimiser.state_dict()
    tensors = {f"{part}.{i}": t for part, group in _parts(weights).items() for i, t in enumerate(group)}
    numbers: dict[str, dict[str, Any]] = {}
    for i, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimiser.{i}.{name}"] = value
            else:
                numbers.setdefault(str(i), {})[name] = value
    tensors["random"] = torch.get_rng_state()
    if weights.live[0].is_cuda:
        tensors["random.cuda"] = torch.cuda.get_rng_state(weights.live[0].device)
    groups = [{n: _said(v) for n, v in group.items()} for group in state["param_groups"]]
    record = {"optimiser": type(optimiser).__name__, "param_groups": groups, "numbers": numbers}
    return {name: t.detach().clone() for name, t in tensors.items()}, record


def restore(weights: TrainedWeights, optimiser: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Puts back what was taken.

    Raises:
        ValueError: if it was taken from another model or another optimiser.
    """
    wanted = {f"{part}.{i}": t for part, group in _parts(weights).items() for i, t in enumerate(group)}
    found = {name: t for name, t in tensors.items() if name.split(".")[0] not in ("optimiser", "random")}
    shapes, others = ({name: tuple(t.shape) for name, t in ts.items()} for ts in (wanted, found))
    if shapes != others:
        raise ValueError(
            f"The saved training run is of another model: it has {len(others)} tensors where this one has {len(shapes)}, or of "
            "other shapes. Build model, guide and averaging as they were."
        )
    if record["optimiser"] != type(optimiser).__name__:
        raise ValueError(f"The saved training run is by {record['optimiser']}, but this one is by {type(optimiser).__name__}.")
    with torch.no_grad():
        for name, t in wanted.items():
            t.copy_(tensors[name])
    weights.reread()
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in record["numbers"].items()}
    for name, t in tensors.items():
        kind, *rest = name.split(".", 2)
        if kind == "optimiser":
            state.setdefault(int(rest[0]), {})[rest[1]] = t
    groups = [{n: _unsaid(v) for n, v in group.items()} for group in record["param_groups"]]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors and weights.live[0].is_cuda:
        torch.cuda.set_rng_state(tensors["random.cuda"], weights.live[0].device)


def _said(value: Any) -> Any:
    """An option as JSON: a learning rate may be a tensor."""
    return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")} if isinstance(value, Tensor) else value


def _unsaid(value: Any) -> Any:
    return torch.tensor(value["tensor"], dtype=checkpoints.DTYPES[value["dtype"]]) if isinstance(value, dict) else value


def _parts(weights: TrainedWeights) -> dict[str, list[Tensor]]:
    average = [] if weights.average is None else list(weights.average.state_dict().values())
    return {"live": list(weights.live), "buffer": weights.buffers, "best": weights.best, "average": average}


class RunCheckpoint:
    """Keeps a run on disk: the best parameters, and all that going on takes."""

    SECONDS = 30.0
    """Between two times that a run is written unasked."""

    def __init__(
        self, path: str | Path | None, result: Any, weights: TrainedWeights, optimiser: Optimizer, record: Mapping[str, Any]
    ) -> None:
        self.path = None if path is None else checkpoints.tensors_of(path)
        self.result, self.weights, self.optimiser, self.record = result, weights, optimiser, record
        self.epochs = 0
        self.written = time.perf_counter()

    @property
    def run(self) -> Path:
        """Where the run is."""
        if self.path is None:
            raise ValueError("resume goes on from a checkpoint: pass checkpoint=, the path it was written to.")
        return self.path.with_name(self.path.stem + ".training.safetensors")

    def capture(self) -> None:
        """Copies the run as it is after an epoch, and writes it if that was long ago."""
        if self.path is None:
            return
        tensors, options = capture(self.weights, self.optimiser)
        taken = self.weights.best_state(), self.result.record(), tensors, options
        self.taken, self.epochs = taken, len(self.result.history)  # at once, for Ctrl-C may come at any time
        if time.perf_counter() - self.written > self.SECONDS:
            self.write()

    def restore(self) -> None:
        """Puts the run back."""
        tensors, record = checkpoints.read(self.run)
        if record.get("rows") != self.record["rows"]:
            raise ValueError(f"{self.run} is of {record.get('rows')} rows of data, but there are {self.record['rows']} here.")
        if record.get("data") != self.record["data"]:
            raise ValueError(f"{self.run} is of as many rows of data, but of others than these. Resume on the same data.")
        try:
            restore(self.weights, self.optimiser, tensors, record["options"])
            self.result.history, self.result.best = record["history"], record["best"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.run} holds no training run to go on from.") from error

    def write_best(self) -> None:
        """Writes the best parameters."""
        if self.path is not None:
            checkpoints.write(self.path, self.weights.best_state(), {**self.result.record(), **self.record})

    def write(self) -> Path | None:
        """Writes the best parameters and the run, as they were when last taken; returns the path of the parameters.

        A run that has not got anywhere replaces nothing.
        """
        if self.path is None or (self.epochs == 0 and self.path.exists()):
            return None
        state, said, tensors, options = self.taken
        said |= {"stopped": self.result.stopped}
        checkpoints.write(self.path, state, {**said, **self.record})
        run = {"history": said["history"], "best": said["best"], "options": options, **self.record}
        checkpoints.write(self.run, tensors, run, readable=False)
        self.written = time.perf_counter()
        return self.path
