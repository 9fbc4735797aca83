r"""The result of training: a fit with its history.

Training has exploded where its loss :math:`L_e` of epoch e is

.. math:: L_e > 10^4 \max\bigl(c, |L_1|, \dots, |L_m|\bigr), \qquad m = \operatorname{argmin}_{i < e} L_i,

over epochs i in which it had not, with c the size of the loss at the first step, and at least 1 for losses that do not depend
on the units of the data. A loss that is large from the beginning (many dimensions, other units) is no explosion, nor is one
that falls. An epoch in which training has exploded is never the best, and three of them in a row end training.
"""

from __future__ import annotations

__all__ = ["Fit"]

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels.datasets.streams import RowStream
from pyro_genmodels.infer.compiled import Eager, Mode
from pyro_genmodels.training.rebuild import describe

EXPLOSION = 1e4
"""Ratio of a training loss to the largest that is usual, above which training has exploded."""
EXPLODED_EPOCHS = 3
"""Number of such epochs in a row that end training."""


@dataclass
class Fit:
    """A trained fit and its history. It can stand wherever a fit is wanted.

    Attributes:
        family: the family, or the pair (model, guide), with its best parameters.
        history: one record per epoch: ``epoch`` (from 1), ``train`` and ``valid`` (per datum, in `units`), ``seconds`` since
            the start. In adversarial training ``train`` is the loss of the generator, ``critic`` that of the critic, and
            ``valid`` the squared energy distance of samples from held-out data.
        best: record of the epoch whose parameters were kept.
        stopped: reason why training ended.
        units: units of the losses by column of the history, such as ``{"train": "nats", "valid": "nats"}``. "nats" stands
            only for a negative log-likelihood or a bound of it; see `Loss.unit`.
        held_out: numbers of the rows that ``valid=share`` held out, (n,); of a stream, a stream of these rows; or None.
        usual_loss: c in the equation above.
        mode: how loss and gradients were computed in the last epoch; see `train`.
    """

    family: Any = field(repr=False)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""
    units: dict[str, str] = field(default_factory=dict)
    held_out: Tensor | RowStream | None = field(default=None, repr=False)
    usual_loss: float = field(default=1.0, repr=False)
    mode: Mode = field(default=Eager(), repr=False)

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

    @property
    def exploded_epochs(self) -> int:
        """Number of epochs at the end of the history in which training has exploded."""
        exploded, usual, largest, lowest = 0, self.usual_loss, 0.0, inf
        for loss in (record["train"] for record in self.history):
            exploded = exploded + 1 if loss > EXPLOSION * usual else 0
            if not exploded:
                largest = max(largest, abs(loss))
                if loss < lowest:
                    lowest, usual = loss, max(usual, largest)
        return exploded

    def append(self, record: dict[str, float]) -> bool:
        """Append the record of an epoch, and return True if it is the best so far.

        The best epoch has the lowest finite validation loss. Without validation it is the last one. An epoch in which training
        exploded is not the best.
        """
        self.history.append(record)
        if self.exploded_epochs:
            return False
        if "valid" in record and (not isfinite(record["valid"]) or record["valid"] >= self.best.get("valid", inf)):
            return False
        self.best = record
        return True

    def record(self) -> dict[str, Any]:
        """Return the entries of a checkpoint's record."""
        return {
            **describe(self.family),
            "best": self.best,
            "history": list(self.history),
            "stopped": self.stopped,
            "units": dict(self.units),
        }
