"""Training runs on disk: their files, and when these may be resumed.

A run has an identity: its settings, its seed, checksums of its data, and the time at which it began. Both of its files hold it.
So a run is resumed with its own parameters, on its own data, by its own settings, or not at all.

A new run by the name of an older one leaves the older files unchanged until it has something to write. Then it renames the
older run, from ``name.training.safetensors`` to ``name.BEGUN.training.safetensors``, by the time at which it began, such as
``name.20260131T235900Z-c0ffee``. This path resumes it.
"""

from __future__ import annotations

__all__ = ["Checkpoint", "RunCheckpoint", "TrainingInterrupted"]

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torch import Tensor
from torch.optim import Optimizer

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import checkpoints
from pyro_genmodels.training.epoch_part import EpochPart
from pyro_genmodels.training.rebuild import describe
from pyro_genmodels.training.snapshots import capture, encode_option, option_groups, restore, tensor_groups
from pyro_genmodels.utils.errors import listed, one_line, warn_caller
from pyro_genmodels.utils.files import MAX_BYTES

if TYPE_CHECKING:
    from pyro_genmodels.training.fit import Fit

RUN_SUFFIX = ".training.safetensors"
STAMP = r"\d{8}T\d{6}Z(-[0-9a-f]{6})?"
"""Pattern of the time at which an older run began, with the beginning of its id, in the name of its file."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training with a checkpoint, which holds the state after the last full epoch, or later.

    Attributes:
        path: path of the checkpoint.
        epoch: number of the last full epoch.
        steps: number of steps of the next epoch that the checkpoint holds as well.
    """

    def __init__(self, path: Path, epoch: int, steps: int = 0) -> None:
        where = f"after epoch {epoch}" + (f" and {steps} steps of the next" if steps else "")
        super().__init__(f"The state {where} is in {path}. Continue with train(..., checkpoint=Checkpoint(path, resume=True)).")
        self.path, self.epoch, self.steps = path, epoch, steps

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the path and the numbers, from which the message is made."""
        return type(self), (self.path, self.epoch, self.steps)


@dataclass(frozen=True)
class Checkpoint:
    """The files of a training run.

    Attributes:
        path: path without suffix; its folder is made.
        resume: True to continue the run that the files hold, with the same data and the same arguments apart from `epochs`,
            `patience`, `threads` and `progress`. It ends as if it had never stopped, also within an epoch.
        notes: further entries of the record, of types that JSON has. A run that is resumed keeps its own, and takes these
            beside them or in their place.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
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

    Attributes:
        epochs: number of full epochs in the checkpoint.
        steps: number of steps of the next epoch in it.
        part: part of an epoch that a resumed run has made, or None.

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
        self.epochs, self.steps, self._is_written = 0, 0, False
        self.part: EpochPart | None = None
        self._written = time.perf_counter()
        self.path: Path | None = None
        if checkpoint is None:
            return
        self.path = checkpoints.tensors_of(checkpoint.path)
        self.run_path = self.path.with_name(f"{self.path.stem}{RUN_SUFFIX}")
        self.data, self.notes = dict(data()), dict(checkpoint.notes)
        groups = [{n: v for n, v in group.items() if n != "params"} for group in option_groups(optimiser)]
        own = {name: encode_option(value, f"{name}=") for name, value in settings.items()}
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
        self.capture(self.part)

    @property
    def is_due(self) -> bool:
        """True if the run should be written, since the last write was long ago."""
        return self.path is not None and time.perf_counter() - self._written > self.SECONDS

    @property
    def seed(self) -> int | None:
        """Seed of the run, which is that of the run before if one is resumed, or None."""
        return None if self.path is None else self.identity["settings"].get("seed")

    def capture(self, part: EpochPart | None = None, first_loss: list[float] | None = None, seconds: float = 0.0) -> None:
        """Copy the run after an epoch or within it, and write it if the last write was long ago.

        Args:
            part: part of the present epoch that was made, or None after an epoch.
            first_loss: training losses of the first steps of the epochs after the best one, by default those in the part.
            seconds: seconds since the run began, by default those in the part.
        """
        if self.path is None:
            return
        tensors, options = capture(self.weights, self.optimiser)
        record, best = self.fit.record(), self.weights.best_state()
        if part is not None:
            tensors["random.order"] = part.random
            record["part"] = part.to_json(part.first_loss if first_loss is None else first_loss, seconds or part.seconds)
        steps = 0 if part is None else part.steps
        # in one statement, since Ctrl-C may come at any time
        self._captured, self.epochs, self.steps = (best, record, tensors, options), len(self.fit.history), steps
        if (self.fit.best and not self._is_written) or self.is_due:
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
        is_folder = self.run_path.with_name(self.run_path.name.removesuffix(RUN_SUFFIX)).is_dir()  # `read` names a file in it
        if not self.run_path.exists() and not is_folder:
            raise FileNotFoundError(
                f"There is no training run {self.run_path} to resume. To begin one, do not pass resume=True."
            )
        own_bytes = sum(t.nbytes for group in tensor_groups(self.weights).values() for t in group)
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
        if record["history"]:  # else it has no parameters yet, and those beside it may be of an older run
            self._check_beside(record["run"])
        if "part" in record and "random.order" not in tensors:
            raise ValueError(f"{self.run_path} is damaged: it lacks the random state at the beginning of its epoch.")
        try:
            restore(self.weights, self.optimiser, tensors, record["options"])
        except ValueError as error:
            raise ValueError(f"{self.run_path} cannot be resumed. {error}") from error
        self.part = EpochPart.from_json(record["part"], tensors["random.order"]) if "part" in record else None
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
        differences = list(_differences(saved["settings"], settings))
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
            self._write_parameters(self.weights.best_state(), self.fit.record())

    def write(self) -> Path | None:
        """Write the best parameters and the run as they were last captured.

        A run without an epoch does not overwrite older parameters, and one without a step no older checkpoint.

        Returns:
            The path of the parameters, or None if nothing was written.
        """
        if self.path is None or (self.epochs == self.steps == 0 and self.path.exists()):
            return None
        state, record, tensors, options = self._captured
        if self.epochs or not self.steps:
            parameters = {name: value for name, value in record.items() if name != "part"}
            self._write_parameters(state, parameters | {"stopped": self.fit.stopped})
        saved: dict[str, Any] = {name: record[name] for name in ("history", "best", "units", "part") if name in record}
        with self._retired():
            checkpoints.write(self.run_path, tensors, {**saved, "options": options, **self._entries()}, readable=False)
        self._written, self._is_written = time.perf_counter(), True
        return self.path

    def _write_parameters(self, state: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        checkpoints.write(self.path, state, {**record, **self._entries()})  # type: ignore[arg-type]

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
        """Return the path for an older run: by the time at which it began, or else at which it was written."""
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
        pattern = re.compile(rf"{re.escape(self.path.stem)}\.{STAMP}{re.escape(RUN_SUFFIX)}")  # type: ignore[union-attr]
        names = [path.name for path in self.run_path.parent.glob(f"*{RUN_SUFFIX}")]
        return sorted(name.removesuffix(RUN_SUFFIX) for name in names if pattern.fullmatch(name))


def _differences(saved: Any, found: Any, name: str = "") -> Iterator[str]:
    """Yield a text for each place where two values of JSON differ.

    An option that was not saved, as by a version without it, was off: None or False.
    """
    if isinstance(saved, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*saved, *found]):
            if key in saved or found[key] is not False:
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
