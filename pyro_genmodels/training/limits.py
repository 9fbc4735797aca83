"""Limits of a run of training: epochs, patience and time."""

from __future__ import annotations

__all__ = ["Limits"]

from dataclasses import dataclass

from pyro_genmodels.training.fit import Fit


@dataclass(frozen=True)
class Limits:
    """The limits of a run, of which the first that is reached ends it.

    Attributes:
        epochs: largest number of epochs.
        patience: number of epochs without a better validation loss.
        seconds: time after which no further epoch is begun.
    """

    epochs: int
    patience: int
    seconds: float

    def reached(self, fit: Fit) -> str:
        """Return the limit that a run has reached, in words, or "" if none."""
        if fit.epochs_since_best >= self.patience:
            return f"no better validation loss in {self.patience} epochs"
        if len(fit.history) >= self.epochs:
            return f"{len(fit.history)} epochs"
        if fit.history and fit.history[-1]["seconds"] >= self.seconds:
            return f"{len(fit.history)} epochs in {self.seconds:g} seconds"
        return ""

    def certain_epochs(self, fit: Fit, *, has_patience: bool) -> int:
        """Return how many epochs are to come for certain.

        Args:
            fit: the fit so far.
            has_patience: True if there are held-out data, so that patience can be lost.
        """
        rest = self.epochs - len(fit.history)
        if has_patience:
            rest = min(rest, self.patience - fit.epochs_since_best)
        if fit.history and self.seconds < float("inf"):
            used = fit.history[-1]["seconds"]
            rest = min(rest, int((self.seconds - used) * len(fit.history) / max(used, 1e-9)))
        return max(rest, 1)
