"""The part of an epoch that a run has made, with which a checkpoint in the middle of the epoch is resumed."""

from __future__ import annotations

__all__ = ["EpochPart"]

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class EpochPart:
    """The part of an epoch that was made.

    Attributes:
        steps: number of its steps.
        rows: number of their rows.
        losses: sums of their losses over these rows, by name.
        random: torch's random state at the beginning of the epoch, by which its rows were shuffled.
        first_loss: training losses of the first steps of the epochs after the best one, this one included.
        seconds: seconds since the run began.
    """

    steps: int = 0
    rows: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    random: Tensor = field(default_factory=torch.get_rng_state, repr=False)
    first_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @contextmanager
    def at_beginning(self) -> Iterator[None]:
        """Draw random numbers in a `with` block as at the beginning of the epoch, if that is over."""
        if not self.steps:
            yield
            return
        present = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            torch.set_rng_state(present)

    def add(self, losses: Mapping[str, float], rows: int) -> None:
        """Add a step, with its mean losses over some rows."""
        self.steps += 1
        self.rows += rows
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + loss * rows

    @property
    def means(self) -> dict[str, float]:
        """Mean losses per datum, by name.

        Example:
            >>> part = EpochPart()
            >>> part.add({"train": 1.0}, rows=3)
            >>> part.add({"train": 2.0}, rows=1)
            >>> part.means
            {'train': 1.25}
        """
        return {name: total / self.rows for name, total in self.losses.items()}

    def to_json(self, first_loss: list[float], seconds: float) -> dict[str, Any]:
        """Return the part as JSON, apart from the random state."""
        own = {"steps": self.steps, "rows": self.rows, "losses": dict(self.losses)}
        return {**own, "first_loss": list(first_loss), "seconds": seconds}

    @classmethod
    def from_json(cls, saved: Mapping[str, Any], random: Tensor) -> EpochPart:
        """Return the part that `to_json` returned."""
        losses, first_loss = dict(saved["losses"]), list(saved["first_loss"])
        return cls(saved["steps"], saved["rows"], losses, random, first_loss, saved["seconds"])
