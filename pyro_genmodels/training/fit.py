"""The result of training: a fit with its history."""

from __future__ import annotations

__all__ = ["Fit"]

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from pyro_genmodels._pyro import traces
from pyro_genmodels.training import checkpoints


@dataclass
class Fit:
    """A trained fit and its history. It can stand wherever a fit is wanted.

    Attributes:
        family: the family, or the pair (model, guide), with its best parameters.
        history: one record per epoch: ``epoch`` (from 1), ``train`` and ``valid`` (nats per datum), ``seconds`` since the
            start. In adversarial training ``train`` is the loss of the generator, ``critic`` that of the critic, and ``valid``
            the squared energy distance of samples from held-out data.
        best: record of the epoch whose parameters were kept.
        stopped: reason why training ended.
    """

    family: Any = field(repr=False)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    @property
    def model(self) -> Callable[..., Any]:
        """Model of the fit."""
        return traces.as_pair(self.family)[0]

    @property
    def guide(self) -> Callable[..., Any]:
        """Guide of the fit."""
        return traces.as_pair(self.family)[1]

    @property
    def epochs_since_best(self) -> int:
        """Number of epochs after the best one."""
        return len(self.history) - int(self.best.get("epoch", 0))

    def append(self, record: dict[str, float]) -> bool:
        """Append the record of an epoch, and return True if it is the best so far.

        The best epoch has the lowest validation loss. Without validation it is the last one.
        """
        self.history.append(record)
        if "valid" in record and not record["valid"] < self.best.get("valid", inf):
            return False
        self.best = record
        return True

    def record(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's record."""
        return {
            **checkpoints.describe(self.family),
            "best": self.best,
            "history": list(self.history),
            "stopped": self.stopped,
        }
