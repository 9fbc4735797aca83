"""Training runs as tensors and JSON: copied between two epochs, written to disk, and restored to continue exactly."""

from __future__ import annotations

__all__ = ["Checkpoint", "RunCheckpoint", "capture", "restore"]

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import checkpoints

if TYPE_CHECKING:
    from pyro_genmodels.training.fit import Fit


@dataclass(frozen=True)
class Checkpoint:
    """The files of a training run.

    Attributes:
        path: path without suffix; its folder is made.
        resume: True to continue the run that the files hold, with the same data and the same arguments apart from the number of
            epochs. It ends as if it had never stopped.
        notes: further entries of the record, of types that JSON has.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from pyro_genmodels import Flow, train
        >>> x = torch.randn(200, 2)
        >>> with TemporaryDirectory() as folder:
        ...     fit = train(Flow((2,)), x, epochs=1, checkpoint=f"{folder}/flow", progress=False)
        ...     fit = train(Flow((2,)), x, epochs=2, checkpoint=Checkpoint(f"{folder}/flow", resume=True), progress=False)
        >>> [record["epoch"] for record in fit.history]
        [1, 2]
    """

    path: str | Path
    resume: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


def capture(weights: TrainedWeights, optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Copy all parameters (current, averaged, best), the state of the optimiser and torch's random state.

    The best parameters are not copied: they never change in place during training.

    Returns:
        Tensors by name, and the options of the optimiser as JSON.
    """
    state = optimiser.state_dict()
    parts = _parts(weights)
    best = {f"best.{i}": t for i, t in enumerate(parts.pop("best"))}
    tensors = {f"{part}.{i}": t for part, group in parts.items() for i, t in enumerate(group)}
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
    groups = [{n: _encode_option(v) for n, v in group.items()} for group in state["param_groups"]]
    record = {"optimiser": type(optimiser).__name__, "param_groups": groups, "numbers": numbers}
    return {name: t.detach().clone() for name, t in tensors.items()} | best, record


def restore(weights: TrainedWeights, optimiser: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Restore what `capture` copied.

    Raises:
        ValueError: if it was copied from another model or another optimiser.
    """
    own = {f"{part}.{i}": t for part, group in _parts(weights).items() for i, t in enumerate(group)}
    saved = {name: t for name, t in tensors.items() if name.split(".")[0] not in ("optimiser", "random")}
    own_shapes, saved_shapes = ({name: tuple(t.shape) for name, t in group.items()} for group in (own, saved))
    if own_shapes != saved_shapes:
        raise ValueError(
            f"The saved training run is of another model: it has {len(saved)} tensors where this one has {len(own)}, or of "
            "other shapes. Build model, guide and averaging as they were."
        )
    if record["optimiser"] != type(optimiser).__name__:
        raise ValueError(
            f"The saved training run was optimised by {record['optimiser']}, but this one is optimised by "
            f"{type(optimiser).__name__}. Pass the same optim=."
        )
    with torch.no_grad():
        for name, t in own.items():
            t.copy_(tensors[name])
    weights.reread()
    state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in record["numbers"].items()}
    for name, t in tensors.items():
        kind, *rest = name.split(".", 2)
        if kind == "optimiser":
            state.setdefault(int(rest[0]), {})[rest[1]] = t
    groups = [{n: _decode_option(v) for n, v in group.items()} for group in record["param_groups"]]
    optimiser.load_state_dict({"state": state, "param_groups": groups})
    torch.set_rng_state(tensors["random"])
    if "random.cuda" in tensors and weights.live[0].is_cuda:
        torch.cuda.set_rng_state(tensors["random.cuda"], weights.live[0].device)


def _encode_option(value: Any) -> Any:
    """Return an option of an optimiser as JSON; a learning rate may be a tensor."""
    return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")} if isinstance(value, Tensor) else value


def _decode_option(value: Any) -> Any:
    """Return the option that `_encode_option` encoded."""
    return torch.tensor(value["tensor"], dtype=checkpoints.DTYPES[value["dtype"]]) if isinstance(value, dict) else value


def _parts(weights: TrainedWeights) -> dict[str, list[Tensor]]:
    """Return the parameters and buffers of a run in groups."""
    average = [] if weights.average is None else list(weights.average.state_dict().values())
    return {"live": list(weights.live), "buffer": weights.buffers, "best": weights.best, "average": average}


class RunCheckpoint:
    """The checkpoint of a run under way: files with the best parameters, and with everything that resuming needs.

    Args:
        checkpoint: the files; None writes nothing.
        fit: the fit, with the history so far.
        weights: its parameters.
        optimiser: their optimiser.
        data: number of rows and checksum of the data, by which resuming knows them again.
    """

    SECONDS = 30.0
    """Seconds between two writes of the run, apart from the last one."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        fit: Fit,
        weights: TrainedWeights,
        optimiser: Optimizer,
        data: Mapping[str, Any],
    ) -> None:
        self.path = None if checkpoint is None else checkpoints.tensors_of(checkpoint.path)
        self.run_path = Path() if self.path is None else self.path.with_name(self.path.stem + ".training.safetensors")
        self.fit, self.weights, self.optimiser = fit, weights, optimiser
        self.data, self.notes = dict(data), {} if checkpoint is None else dict(checkpoint.notes)
        self.epochs = 0
        self._written = time.perf_counter()
        if checkpoint is not None and checkpoint.resume:
            self.restore()
        self.capture()

    def capture(self) -> None:
        """Copy the run after an epoch, and write it if the last write was long ago."""
        if self.path is None:
            return
        tensors, options = capture(self.weights, self.optimiser)
        captured = self.weights.best_state(), self.fit.record(), tensors, options
        self._captured, self.epochs = captured, len(self.fit.history)  # in one statement: Ctrl-C may come at any time
        if time.perf_counter() - self._written > self.SECONDS:
            self.write()

    def restore(self) -> None:
        """Restore the run from its file.

        Raises:
            FileNotFoundError: if there is no run.
            ValueError: if the file is damaged, or holds a run of another fit or on other data.
        """
        tensors, record = checkpoints.read(self.run_path)
        if record.get("rows") != self.data["rows"]:
            raise ValueError(
                f"{self.run_path} was trained on {record.get('rows')} rows of data, but found {self.data['rows']}. "
                "Resume on the same data."
            )
        if record.get("data") != self.data["data"]:
            raise ValueError(f"{self.run_path} was trained on other data with as many rows. Resume on the same data.")
        try:
            restore(self.weights, self.optimiser, tensors, record["options"])
            self.fit.history, self.fit.best = record["history"], record["best"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.run_path} holds no training run to resume.") from error

    def write_best(self) -> None:
        """Write the best parameters."""
        if self.path is not None:
            self._write_parameters(self.path, self.weights.best_state(), self.fit.record())

    def write(self) -> Path | None:
        """Write the best parameters and the run as they were last captured.

        A run without an epoch does not overwrite an older checkpoint.

        Returns:
            The path of the parameters, or None if nothing was written.
        """
        if self.path is None or (self.epochs == 0 and self.path.exists()):
            return None
        state, record, tensors, options = self._captured
        self._write_parameters(self.path, state, record | {"stopped": self.fit.stopped})
        run = {"history": record["history"], "best": record["best"], "options": options, **self.data, "notes": self.notes}
        checkpoints.write(self.run_path, tensors, run, readable=False)
        self._written = time.perf_counter()
        return self.path

    def _write_parameters(self, path: Path, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        checkpoints.write(path, state, {**record, **self.data, "notes": self.notes})
