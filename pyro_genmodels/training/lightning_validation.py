"""Validation by a `lightning.Trainer`: the loss of held-out rows on all ranks, each of which counts once."""

from __future__ import annotations

__all__ = ["JointValidation"]

from contextlib import ExitStack
from typing import Any

from pyro_genmodels._pyro import handlers
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.options import VALIDATION_SEED
from pyro_genmodels.utils.ranks import Ranks
from pyro_genmodels.utils.rng import forked_rng


class JointValidation:
    """The validations of a run, each of the averaged parameters and with the same random numbers.

    Args:
        step: the training step, which computes the losses.
        weights: parameters of the run.
        ranks: processes of the run, which call every method together.
        held_out: all held-out data, or None if they are known batch by batch only.
    """

    def __init__(self, step: Any, weights: TrainedWeights, ranks: Ranks, held_out: Batches | None) -> None:
        self.step, self.weights, self.ranks, self.held_out = step, weights, ranks, held_out
        self._block = ExitStack()
        self._losses: list[tuple[float, int]] = []
        self._batches: list[Batch] = []

    def begin(self) -> None:
        """Begin a validation."""
        self._losses, self._batches = [], []
        self._block.enter_context(self.weights.averaged())
        self._block.enter_context(handlers.side_effect_free(self.step))
        shift = self.ranks.rank if self.step.validates_row_by_row else 0  # each rank validates its own rows
        self._block.enter_context(forked_rng(VALIDATION_SEED + shift))

    def add(self, batch: Batch, rows: int) -> None:
        """Compute the loss of this rank's rows of a batch, out of this number of rows on all ranks."""
        if self.step.validates_row_by_row:
            if not self._losses:
                self.step.prepare_validation(batch)
            self._losses.append((self.step.validation_loss(batch, rows), batch.rows))
        elif self.held_out is None:
            self._batches.append(batch)

    def end(self) -> float:
        """Return the mean loss over the held-out rows of all ranks."""
        with self._block:
            if not self.step.validates_row_by_row:
                held_out: Any = self.held_out or _Collected(self._batches)
                self._losses = [(self.step.validate(held_out), held_out.rows)]
        total, rows = self.ranks.sum(sum(loss * n for loss, n in self._losses), sum(n for _, n in self._losses))
        return total / rows

    def close(self) -> None:
        """End a validation that an error has stopped."""
        self._block.close()


class _Collected:
    """Batches of held-out data that were read one by one."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches, self.rows = batches, sum(batch.rows for batch in batches)

    def in_order(self) -> list[Batch]:
        """Return the batches."""
        return self.batches
