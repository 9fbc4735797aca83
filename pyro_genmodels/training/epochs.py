"""Bookkeeping between the epochs of a run: its history, its best parameters, its checkpoint, and its failures.

The loop of `train` and Lightning's both end each epoch here.
"""

from __future__ import annotations

__all__ = ["Epochs"]

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.epoch_part import EpochPart
from pyro_genmodels.training.fit import EXPLODED_EPOCHS, EXPLOSION, Fit
from pyro_genmodels.training.limits import Limits
from pyro_genmodels.training.runs import RunCheckpoint


class Epochs:
    """The epochs of a run.

    Args:
        step: the training step, which tells its mode, its units and the usual size of a loss.
        fit: the fit, with the history so far.
        weights: its parameters.
        run: its checkpoint.
        limits: when the run ends.
        is_validated: True if there are held-out data.

    Attributes:
        first_loss: training losses of the first steps of the epochs after the best one, each by the parameters with which its
            epoch begins.
    """

    def __init__(
        self, step: Any, fit: Fit, weights: TrainedWeights, run: RunCheckpoint, limits: Limits, *, is_validated: bool
    ) -> None:
        self.step, self.fit, self.weights, self.run, self.limits = step, fit, weights, run, limits
        self.is_validated = is_validated
        self._part = run.part
        self.first_loss: list[float] = [] if run.part is None else list(run.part.first_loss)
        before = run.part.seconds if run.part is not None else fit.history[-1]["seconds"] if fit.history else 0.0
        self._begun = time.perf_counter() - before
        self._before: tuple[dict[str, float], list[Tensor]] = {}, weights.best
        fit.usual_loss = max(step.smallest_loss, abs(fit.history[0]["train"]) if fit.history else 0.0)

    def begin(self, steps: int) -> EpochPart:
        """Return the part of the next epoch that was made: a part of it in a run that was resumed, and none otherwise.

        Args:
            steps: number of steps of an epoch.

        Raises:
            ValueError: if the resumed run has made more steps.
        """
        part, self._part = self._part or EpochPart(), None
        if part.steps > steps:
            raise ValueError(f"{self.run.run_path} is damaged: it has made {part.steps} of the {steps} steps of an epoch.")
        return part

    @property
    def number(self) -> int:
        """Number of the next epoch, from 1."""
        return len(self.fit.history) + 1

    @property
    def certain(self) -> int:
        """Number of epochs that are to come for certain."""
        return self.limits.certain_epochs(self.fit, has_patience=self.is_validated)

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self._begun

    @property
    def is_over(self) -> bool:
        """True if a limit is reached."""
        return bool(self.limits.reached(self.fit))

    @property
    def has_exploded(self) -> bool:
        """True if training has exploded for so many epochs that it ends."""
        return self.fit.exploded_epochs >= EXPLODED_EPOCHS

    def add(self, losses: Mapping[str, float], *, seconds: float | None = None) -> dict[str, float]:
        """Append an epoch to the history, keep its parameters if they are the best so far, and write the checkpoint.

        Args:
            losses: the losses per datum by name.
            seconds: seconds since the run began, if they were measured elsewhere.

        Returns:
            The record of the epoch.
        """
        fit, step = self.fit, self.step
        record = {"epoch": self.number, **losses, "seconds": self.seconds if seconds is None else seconds}
        if record["epoch"] == 1:
            fit.usual_loss = max(step.smallest_loss, abs(self.first_loss[0])) or 1.0
        fit.mode = step.mode
        fit.units = {name: unit for name, unit in step.units.items() if name in record}
        last = fit.best, self.weights.best
        if fit.append(record):
            self._before = last
            self.first_loss.clear()
            self.weights.keep_best()
            self.run.write_best()
        self.run.capture()
        return record

    def finish(self, reason: str = "") -> None:
        """End the run at its limit.

        Args:
            reason: why it ends, if it has not reached a limit.

        Raises:
            FloatingPointError: if training has exploded, or no epoch has a finite validation loss.
        """
        if self.fit.exploded_epochs:
            raise FloatingPointError(
                f"the training loss has exploded to {self.fit.history[-1]['train']:.3g}: lower the learning rate, or look for "
                "outliers"
            )
        if not self.fit.best:
            raise FloatingPointError("no epoch has a finite validation loss: look for held-out data that the model rules out")
        self.fit.stopped = self.limits.reached(self.fit) or reason
        self.run.write()

    def keep_last(self) -> None:
        """Keep the last parameters, unless there are better ones, in a run of which no epoch was validated as it should be."""
        fit = self.fit
        if fit.history and not fit.best and not fit.exploded_epochs:
            fit.best = {name: value for name, value in fit.history[-1].items() if name != "valid"}
            self.weights.keep_best()
            self.run.write_best()
            self.run.capture()

    def fail(self) -> None:
        """Go back to the parameters before the best epoch, after a `FloatingPointError`, if those of this epoch are unsound.

        Without validation the best epoch is the last, whose parameters are judged by the first loss after it.
        """
        fit = self.fit
        is_unsound = not self.is_validated and bool(fit.best) and not self._is_usual()
        if is_unsound:
            fit.best, self.weights.best = self._before
        if is_unsound or fit.exploded_epochs:  # a run that is resumed begins with the parameters that are kept
            self.weights.restore_best()
            self.run.capture()

    def _is_usual(self) -> bool:
        """Return True if there was a first step after the best epoch, and its loss was not far above that epoch's."""
        usual = max(self.fit.usual_loss, abs(self.fit.best["train"]))
        return bool(self.first_loss) and self.first_loss[0] <= EXPLOSION * usual
