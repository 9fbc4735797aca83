"""Training runs as tensors and JSON: copied between two epochs, written to disk, and restored to continue exactly.

A run has an identity: its settings, its seed, checksums of its data, and the time at which it began. Both of its files hold it.
So a run is resumed with its own parameters, on its own data, by its own settings, or not at all.

A new run by the name of an older one leaves the older files as they are until it has something to write. Then it renames the
older run, from ``name.training.safetensors`` to ``name.BEGUN.training.safetensors``, by the time at which it began, such as
``name.20260131T235900Z-c0ffee``. This path resumes it.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "RunCheckpoint", "capture", "restore"]

import copy
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import checkpoints
from pyro_genmodels.training.rebuild import MAX_RECORD_TENSOR_SIZE, decode_tensor, describe, encode_tensor
from pyro_genmodels.training.records import is_number
from pyro_genmodels.utils.errors import listed, one_line, warn_caller
from pyro_genmodels.utils.files import MAX_BYTES

if TYPE_CHECKING:
    from pyro_genmodels.training.fit import Fit


RUN_SUFFIX = ".training.safetensors"
MAY_CHANGE = ("patience",)
"""Settings in files of earlier versions by which a run may be resumed with other values."""
STAMP = r"\d{8}T\d{6}Z(-[0-9a-f]{6})?"
"""Pattern of the time at which an older run began, with the beginning of its id, in the name of its file."""


@dataclass(frozen=True)
class Checkpoint:
    """The files of a training run.

    Attributes:
        path: path without suffix; its folder is made.
        resume: True to continue the run that the files hold, with the same data and the same arguments apart from `epochs`,
            `patience`, `threads` and `progress`. It ends as if it had never stopped.
        notes: further entries of the record, of types that JSON has. A run that is resumed keeps its own, and takes these
            beside them or in their place.

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
                numbers.setdefault(str(i), {})[name] = _encode(value, f"{name!r} in the state of {type(optimiser).__name__}")
    tensors["random"] = torch.get_rng_state()
    if weights.live[0].is_cuda:
        tensors["random.cuda"] = torch.cuda.get_rng_state(weights.live[0].device)
    record = {"optimiser": type(optimiser).__name__, "param_groups": _groups(optimiser), "numbers": numbers}
    return {name: t.detach().clone() for name, t in tensors.items()} | best, record


def restore(weights: TrainedWeights, optimiser: Optimizer, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Restore what `capture` copied. Everything is checked first, so that an error leaves all as it was.

    Raises:
        ValueError: if it was copied from another model or another optimiser, or is damaged.
    """
    own = {f"{part}.{i}": t for part, group in _parts(weights).items() for i, t in enumerate(group)}
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


def _encode(value: Any, name: str) -> Any:
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
        return [_encode(v, name) for v in value]
    raise TypeError(
        f"A checkpoint of a training run wants options that are numbers, texts, small tensors or lists of these, but {name} is "
        f"a {type(value).__name__}. Pass it in another form, or train without a checkpoint."
    )


def _decode(value: Any) -> Any:
    """Return the option that `_encode` encoded."""
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return decode_tensor(value) if isinstance(value, dict) else value


def _groups(optimiser: Optimizer) -> list[dict[str, Any]]:
    """Return the options of each group of an optimiser's parameters as JSON."""
    kind = type(optimiser).__name__
    return [{n: _encode(v, f"{n}= of {kind}") for n, v in g.items()} for g in optimiser.state_dict()["param_groups"]]


def _differences(saved: Any, found: Any, name: str = "") -> Iterator[str]:
    """Yield a text for each place where two values of JSON differ."""
    if isinstance(saved, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*saved, *found]):
            yield from _differences(saved.get(key), found.get(key), f"{name} {key}".lstrip())
    elif isinstance(saved, list) and isinstance(found, list) and len(saved) == len(found) and _holds_groups([*saved, *found]):
        for a, b in zip(saved, found, strict=True):
            yield from _differences(a, b, name)
    elif saved != found:
        yield f"{one_line(name, 60)} was {one_line(json.dumps(saved), 60)} and is {one_line(json.dumps(found), 60)}"


def _holds_groups(values: list[Any]) -> bool:
    """Return True if one of some values of JSON is a list or a dictionary; others are compared all at once."""
    return any(isinstance(value, (list, dict)) for value in values)


def _named(run: Mapping[str, Any]) -> str:
    """Return words for a run, by its identity."""
    return f"the run that began at {one_line(run['begun'], 40)}"


def _stamp(time: datetime) -> str:
    """Return a time as a part of a file's name."""
    return f"{time.astimezone(UTC):%Y%m%dT%H%M%SZ}"


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
        data: function that returns the number of rows, and checksums of data and held-out data, by which resuming knows them
            again. It is called only if there is a checkpoint.
        settings: arguments of the training. A run can be resumed by the same ones only, apart from a `seed` of None. "valid" is
            the share of the data that is held out, or None.

    Raises:
        TypeError: if a setting, or an option of the optimiser, cannot be written to the checkpoint.
    """

    SECONDS = 30.0
    """Seconds between two writes of the run, apart from the first, after the first good epoch, and the last."""

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        fit: Fit,
        weights: TrainedWeights,
        optimiser: Optimizer,
        data: Callable[[], Mapping[str, Any]],
        settings: Mapping[str, Any],
    ) -> None:
        self.fit, self.weights, self.optimiser = fit, weights, optimiser
        self.epochs, self._is_written = 0, False
        self._written = time.perf_counter()
        self.path: Path | None = None
        if checkpoint is None:
            return
        self.path = checkpoints.tensors_of(checkpoint.path)
        self.run_path = self.path.with_name(f"{self.path.stem}{RUN_SUFFIX}")
        self.data, self.notes = dict(data()), dict(checkpoint.notes)
        groups = [{n: v for n, v in group.items() if n != "params"} for group in _groups(optimiser)]
        own = {name: _encode(value, f"{name}=") for name, value in settings.items()}
        own |= {"optim": [type(optimiser).__name__, *groups], "fit": describe(fit.family)}
        begun = datetime.now(UTC).isoformat(timespec="seconds")
        self.identity: dict[str, Any] = {"id": uuid4().hex, "begun": begun, "settings": own}
        if checkpoint.resume:
            self.restore()
        elif self.run_path.is_file():
            older = self._path_of_older().name.removesuffix(RUN_SUFFIX)
            warn_caller(
                f"{self.path.with_suffix('')} holds another run, which is called {older} once this one is written. To continue "
                "the former, pass Checkpoint(path, resume=True).",
                UserWarning,
            )
        self.capture()

    def capture(self) -> None:
        """Copy the run after an epoch, and write it if the last write was long ago."""
        if self.path is None:
            return
        tensors, options = capture(self.weights, self.optimiser)
        captured = self.weights.best_state(), self.fit.record(), tensors, options
        self._captured, self.epochs = captured, len(self.fit.history)  # in one statement: Ctrl-C may come at any time
        if (self.fit.best and not self._is_written) or time.perf_counter() - self._written > self.SECONDS:
            self.write()

    def restore(self) -> None:
        """Restore the run from its file.

        Raises:
            FileNotFoundError: if there is no run.
            ValueError: if the file is damaged, or holds a run of another fit, on other data, by other settings, or another run
                than that of the parameters.
        """
        if not self.run_path.is_file() and (older := self._older_runs()):
            raise FileNotFoundError(
                f"There is no training run {self.run_path}. Older ones are beside it: {listed(older)}. Resume one of them by "
                f"its path, such as {self.run_path.with_name(older[-1])}."
            )
        own_bytes = sum(t.nbytes for group in _parts(self.weights).values() for t in group)
        tensors, record = checkpoints.read(self.run_path, max_bytes=max(MAX_BYTES, 16 * own_bytes))
        if "options" in record and "run" not in record:
            raise ValueError(
                f"{self.run_path} was written before 0.2, which saved no identity of the run: start anew, without resume. Its "
                f"best parameters are in {self.path.name if self.path else ''}, as before."
            )
        if not {"options", "history", "best", "run"} <= record.keys():
            raise ValueError(f"{self.run_path} holds no training run to resume.")
        self._check_settings(record["run"])
        self._check_data(record)
        self._check_beside(record["run"])
        try:
            restore(self.weights, self.optimiser, tensors, record["options"])
        except ValueError as error:
            raise ValueError(f"{self.run_path} cannot be resumed. {error}") from error
        history = record["history"]
        self.fit.history, self.fit.units = history, record.get("units", {})
        self.fit.best = history[record["best"]["epoch"] - 1] if record["best"] else {}
        self.identity, self._is_written = record["run"], True
        saved = record.get("notes")
        self.notes = {**(saved if isinstance(saved, dict) else {}), **self.notes}

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        """Raise an error if the saved run has other settings than this one."""
        settings = dict(self.identity["settings"])
        if settings.get("seed") is None:  # the saved random state is what counts
            settings["seed"] = saved["settings"].get("seed")
        differences = list(_differences({n: v for n, v in saved["settings"].items() if n not in MAY_CHANGE}, settings))
        if (share := settings.get("valid")) is not None:
            held_out = f", so that valid={share:g} held out other rows"
            differences = [text + held_out * text.startswith("seed was") for text in differences]
        if differences:
            raise ValueError(
                f"{self.run_path} holds {_named(saved)}, which is another run than this one: {'; '.join(differences[:4])}. "
                "Resume it with its own settings, or start anew without resume."
            )

    def _check_beside(self, saved: Mapping[str, Any]) -> None:
        """Raise an error if the saved run is another one than that of the parameters beside it."""
        if self.path is None or not self.path.is_file():
            return
        beside = checkpoints.read_record(self.path).get("run")
        if beside is not None and beside["id"] != saved["id"]:
            differences = list(_differences(saved["settings"], beside["settings"])) or ["by the same settings"]
            raise ValueError(
                f"{self.run_path} holds {_named(saved)}, but {self.path.name} is of {_named(beside)} "
                f"({'; '.join(differences[:4])}), which was stopped before it was written. "
                f"To resume the former, move {self.path.name} away first; to repeat the latter, start anew without resume."
            )

    def _check_data(self, record: Mapping[str, Any]) -> None:
        """Raise an error if the saved run was of other data, or of other held-out data."""
        settings, seed = self.identity["settings"], record["run"]["settings"].get("seed")
        if record.get("rows") != self.data["rows"]:
            raise ValueError(
                f"{self.run_path} was trained on {record.get('rows')} rows of data, but found {self.data['rows']}. "
                "Resume on the same data."
            )
        cure = "Resume on the same data."
        if settings.get("valid") is not None and settings.get("seed") is None and seed:
            cure = f"Its seed drew the rows that valid= holds out: pass seed={one_line(seed, 20)}. {cure}"
        if record.get("data") != self.data["data"]:
            raise ValueError(f"{self.run_path} was trained on other data with as many rows. {cure}")
        if record.get("valid") != self.data.get("valid"):
            raise ValueError(f"{self.run_path} was validated on other data. Resume with the same held-out data.")

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
        saved: dict[str, Any] = {name: record[name] for name in ("history", "best", "units") if name in record}
        with self._retired():
            checkpoints.write(self.run_path, tensors, {**saved, "options": options, **self._entries()}, readable=False)
        self._written, self._is_written = time.perf_counter(), True
        return self.path

    def _write_parameters(self, path: Path, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        checkpoints.write(path, state, {**record, **self._entries()})

    def _entries(self) -> dict[str, Any]:
        """Return the entries of both files."""
        return {**self.data, "run": self.identity, "notes": self.notes}

    @contextmanager
    def _retired(self) -> Iterator[None]:
        """Rename an older run before the block first writes this one, and rename it back if the block fails."""
        if self._is_written or not self.run_path.is_file():
            yield
            return
        retired = self._path_of_older()
        os.replace(self.run_path, retired)
        try:
            yield
        except BaseException:
            if not self.run_path.exists():
                os.replace(retired, self.run_path)
            raise

    def _path_of_older(self) -> Path:
        """Return the path for an older run: by the time at which it began, or was written if it does not say."""
        try:
            run = checkpoints.read_record(self.run_path)["run"]
            stamp = f"{_stamp(datetime.fromisoformat(run['begun']))}-{run['id'][:6]}"
        except (KeyError, ValueError, OverflowError):  # it is damaged, or was written before 0.2
            stamp = ""
        if not re.fullmatch(STAMP, stamp):
            stamp = _stamp(datetime.fromtimestamp(self.run_path.stat().st_mtime, UTC))
        return self.run_path.with_name(f"{self.path.stem}.{stamp}{RUN_SUFFIX}")  # type: ignore[union-attr]

    def _older_runs(self) -> list[str]:
        """Return the names of older runs beside this one, without suffix and in order."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}\.({STAMP}|old){re.escape(RUN_SUFFIX)}")  # type: ignore[union-attr]
        names = [path.name for path in self.run_path.parent.glob(f"*{RUN_SUFFIX}")]
        return sorted(name.removesuffix(RUN_SUFFIX) for name in names if pattern.fullmatch(name))
