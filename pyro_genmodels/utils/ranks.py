r"""The processes of a run on many devices, of which this is one: its rank r among R, and what all of them compute together.

A joint batch of B rows is divided among them. Rank r has :math:`B_r` rows, with :math:`B/R - 1 < B_r < B/R + 1`. The mean over
the joint batch is the mean over the ranks of :math:`(R B_r / B)` times the mean over the rows of each.
"""

from __future__ import annotations

__all__ = ["Ranks", "current_ranks", "joint_ranks", "joint_seed"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run. Every method is called by all of them, in the same order, and returns the same on all.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: device of what they exchange.
        weight: weight of this rank in means: R B_r / B for means over the rows of a joint batch.

    Example:
        >>> Ranks().sum(1.0, 2.0), Ranks(rank=1, size=3).part(8)
        ([1.0, 2.0], slice(3, 6, None))
    """

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    weight: float = 1.0

    def part(self, rows: int) -> slice:
        """Return the places of this rank's rows among the rows of a joint batch; sizes differ by one at most."""
        each, rest = divmod(rows, self.size)
        first = self.rank * each + min(self.rank, rest)
        return slice(first, first + each + (self.rank < rest))

    def seed(self, *numbers: int) -> int:
        """Return a seed of this rank's own, made of numbers such as a seed and an epoch."""
        return joint_seed(*numbers, self.rank + 1)

    def sum(self, *values: float) -> list[float]:
        """Return the sums of numbers over all ranks."""
        if self.size == 1:
            return list(values)
        t = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(t)
        found: list[float] = t.tolist()
        return found

    def total(self, t: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.size > 1:
            t = t.clone()
            distributed.all_reduce(t)
        return t

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the weighted means of tensors of floats, of any shapes, over all ranks."""
        if self.size == 1:
            return list(tensors)
        means: list[Any] = [None] * len(tensors)
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            places = [i for i, t in enumerate(tensors) if t.dtype == dtype]
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in places]) * (self.weight / self.size)
            distributed.all_reduce(flat)
            for i, part in zip(places, flat.split([tensors[i].numel() for i in places]), strict=True):
                means[i] = part.view(tensors[i].shape)
        return means

    def first(self, t: Tensor) -> Tensor:
        """Return the tensor that rank 0 has."""
        if self.size > 1:
            t = t.contiguous().clone()
            distributed.broadcast(t, src=0)
        return t

    def first_object(self, value: T) -> T:
        """Return the value that rank 0 has."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device(self.device))
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """Return the values of all ranks, in order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def alike(self, function: Callable[[], T]) -> T:
        """Call a function that speaks to no other rank, and raise an error on all ranks if it raises one on any.

        Raises:
            RuntimeError: if it raised an error on another rank only.
        """
        try:
            result, error = function(), None
        except Exception as found:
            error = found
        failures = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise RuntimeError(f"Rank {rank} of the run has failed, and so the others end too. {failure}")
        return result


def joint_seed(*numbers: int) -> int:
    """Return a seed that is the same on all ranks, made of numbers such as a seed and an epoch.

    Example:
        >>> joint_seed(0, 1) == joint_seed(0, 1) != joint_seed(0, 2)
        True
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


_current = Ranks()


def current_ranks() -> Ranks:
    """Return the processes whose rows make one batch at present: those of a block of `joint_ranks`, or this one alone."""
    return _current


@contextmanager
def joint_ranks(ranks: Ranks) -> Iterator[None]:
    """Compute from the joint batch, inside a `with` block, what modules learn from batches, such as means of a codebook."""
    global _current
    before, _current = _current, ranks
    try:
        yield
    finally:
        _current = before
