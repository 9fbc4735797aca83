r"""One rank's rows of the batches of all rows, with the weight of their mean loss.

With gradients accumulated over k batches of :math:`B_1, \dots, B_k` rows, Lightning takes the mean over ranks r and batches b
of :math:`w_{rb} L_{rb}`. It is the mean over all rows for :math:`w_{rb} = R k B_{rb} / \sum_b B_b`, with :math:`B_{rb}` rows
on rank r.
"""

from __future__ import annotations

__all__ = ["Share", "Shares", "check_divisible"]

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.utils.ranks import Ranks


class Share(NamedTuple):
    """Rows of a batch, and the weight of their mean loss.

    Attributes:
        batch: arguments of the model.
        weight: weight of the mean loss over these rows, the w above.
    """

    batch: Batch
    weight: float = 1.0


class Shares:
    """An iterable over one rank's rows of all batches, for each epoch. Lightning leaves it unchanged: it is no `DataLoader`.

    Args:
        batches: the data.
        ranks: function that returns the ranks of the run.
        epoch: function that returns the number of the next epoch.
        order: function that returns the seed of its order of rows, the same on all ranks. None shuffles by the random numbers
            of this rank, which must be the only one.
        accumulated: function that returns the number of batches over which gradients are accumulated.
        is_shuffled: False for batches in order.

    Raises:
        ValueError: in an epoch, if a batch that is shuffled has fewer rows than there are ranks.
    """

    def __init__(
        self,
        batches: Batches,
        ranks: Callable[[], Ranks],
        *,
        epoch: Callable[[], int] = lambda: 1,
        order: Callable[[], int | None] = lambda: None,
        accumulated: Callable[[], int] = lambda: 1,
        is_shuffled: bool = True,
    ) -> None:
        self.batches, self.ranks, self.accumulated = batches, ranks, accumulated
        self.epoch, self.order, self.is_shuffled = epoch, order, is_shuffled

    def __len__(self) -> int:
        return self.batches.num_shares(self.ranks())

    def __iter__(self) -> Iterator[Share]:
        ranks, seed, number = self.ranks(), self.order() if self.is_shuffled else None, self.accumulated()
        if self.is_shuffled and seed is None:
            found = ((batch, batch.rows) for batch in self.batches.shuffled(self.epoch()))
        else:
            found = self.batches.shares(ranks, seed)
        while window := list(islice(found, number)):
            mean_rows = sum(rows for _, rows in window) / (ranks.size * number)
            for batch, rows in window:
                if self.is_shuffled:
                    check_divisible(rows, ranks)
                yield Share(batch, batch.rows / mean_rows)


def check_divisible(rows: int, ranks: Ranks) -> None:
    """Raise a ValueError if a batch has fewer rows than there are ranks."""
    if rows < ranks.size:
        raise ValueError(
            f"A batch of {rows} rows cannot be divided among {ranks.size} devices: pass a larger batch_size, which is the "
            "number of rows of a step over all devices, more rows, or a DataLoader with drop_last=True."
        )
