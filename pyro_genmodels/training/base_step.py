"""The base of steps of training: the arguments of the model, and its first run."""

from __future__ import annotations

__all__ = ["Step", "mean_loss"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from pyro_genmodels._pyro import handlers, subsampling, traces
from pyro_genmodels.infer.compiled import Mode
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.utils.keywords import keyword_names
from pyro_genmodels.utils.rng import forked_rng

MANY_ROWS, MANY_BYTES = 10_000, 2**26
"""Largest number of rows, and of their bytes, of the run that shows if a model draws its minibatches itself."""
T = TypeVar("T")


class Step(ABC):
    """Base of both steps: the arguments of the model, and its first run.

    Args:
        model: the model.
        rows: number of rows of all data.

    Attributes:
        takes_size: True if the model takes the number of all rows as ``size``.
        validates_row_by_row: True if the validation loss is a mean over rows, of which each of several processes can take some:
            by `prepare_validation` and `validation_loss`. Otherwise it compares all rows at once.
    """

    validates_row_by_row: ClassVar[bool]

    def __init__(self, model: Callable[..., Any], rows: int) -> None:
        self.model, self.rows = model, rows
        self.takes_size = "size" in keyword_names(model)

    @property
    @abstractmethod
    def mode(self) -> Mode:
        """Present mode of computing loss and gradients: eager, captured or compiled."""

    @abstractmethod
    def plan(self, num_steps: int, report: Callable[[str], None]) -> None:
        """Choose how loss and gradients are computed in the next epoch, if that is left open.

        Args:
            num_steps: number of steps that will be made for certain.
            report: function of a text, called while a graph is built.
        """

    def _kwargs(self, batch: Batch, rows: int) -> dict[str, Any]:
        """Return the keyword arguments of the model for a batch out of this many rows."""
        return batch.kwargs | ({"size": rows} if self.takes_size else {})

    def _with_first_batch(self, batches: Batches, run: Callable[[Batch], T]) -> T:
        """Call a function with the first batch, or with all rows if the model draws its minibatches itself."""
        batch = batches.first()
        row_bytes = max(sum(t.nbytes for t in batch.tensors.values()) // batch.rows, 1)
        many = batches.take(max(batch.rows, min(MANY_ROWS, MANY_BYTES // row_bytes)))
        drawn = None if traces.is_family(self.model) else self._subsample_size(many)
        fixed = drawn == batch.rows and self._subsample_size(batch) == drawn
        if drawn in (None, many.rows) or fixed:  # a plate of fixed sizes may be meant for this batch
            try:
                return run(batch)
            except IndexError:
                if not fixed:
                    raise
        batches.subsample(drawn)  # type: ignore[arg-type]
        return run(batches.first())

    def _subsample_size(self, batch: Batch) -> int | None:
        """Return how many rows a plate over all rows, or over those of the batch, draws by itself, or None."""
        with handlers.side_effect_free(self.model), forked_rng():
            plates = subsampling.subsampled_plates(self.model, batch.args, self._kwargs(batch, self.rows))
        return next((plate.count for plate in plates if plate.size in (batch.rows, self.rows)), None)


def mean_loss(losses: list[tuple[float, int]]) -> float:
    """Return the mean of (loss, rows) pairs, weighted by rows."""
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
