"""Data in minibatches: from tensors, arrays, frames and nested structures of them, a `Dataset`, a `DataLoader` or a
`RowStream`.

Data are the arguments of a model (see `arguments`). Every tensor in them, at any depth, has one row per datum, and all are cut
alike.
"""

from __future__ import annotations

__all__ = ["Batches"]

import copy
from collections.abc import Iterator
from itertools import repeat
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.conversion import Conversion
from pyro_genmodels.training.row_sources import RowSource, source_of
from pyro_genmodels.utils.ranks import Ranks


class Batches:
    """Data in minibatches.

    Args:
        data: arguments of the model for all rows: tensors, arrays, lists of numbers or frames, alone, in a tuple of positional
            arguments or in a dictionary of keyword arguments, which may hold lists and dictionaries of them. Or a
            `torch.utils.data.Dataset` with a length, or a `DataLoader`, whose items are such arguments; or a `RowStream`.
        context: second argument of the model, or None.
        batch_size: largest number of rows in a minibatch. The sizes differ by one at most.
        like: tensor with the device and precision for the batches.
        seed: seed of the orders of a `RowStream`. Those of other data are drawn.
        options: options of `Conversion`.

    Attributes:
        source: where the rows come from.
        convert: function that makes data arguments of the model.
        count: number of minibatches.
        is_whole: True if each batch has all rows, of which the model draws a minibatch itself; see `subsample`.

    Raises:
        ValueError: if there are no rows, or a tensor has another number of rows, or values are too large for the precision.
        TypeError: if the data cannot be converted to tensors, or the number of rows is unknown.
    """

    def __init__(self, data: Any, context: Any, batch_size: int, like: Tensor, *, seed: int = 0, **options: Any) -> None:
        self.batch_size, self.seed, self.is_whole = batch_size, seed, False
        self.convert = Conversion(like, **options)
        self.source = source_of(data, context, self.convert)
        if not self.rows:
            raise ValueError("Training wants data of at least one row, as x and as valid, but found no rows.")
        self.count = self.source.count(batch_size)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.source.rows

    @property
    def all(self) -> Batch | None:
        """All rows, if they are held in memory."""
        return self.source.held

    @property
    def digest(self) -> str | None:
        """Checksum by which a resumed run recognises its data. None for a `Dataset` or `DataLoader`."""
        return self.source.digest

    def place_of_nonfinite(self, batch: Batch) -> str:
        """Return a sentence with the file and row of the first NaN or infinite value, if a batch has one and they are known."""
        return self.source.place_of_nonfinite() if batch.nonfinite_rows() else ""

    def split(self, share: float, seed: int | None) -> tuple[Batches, Batches, Any]:
        """Return the data without a random share of their rows, this share, and the numbers of its rows.

        The rows depend on nothing but the seed and the number of rows. The random number generator is not used. Of a
        `RowStream` whole shards are held out, and instead of the numbers of their rows a stream of them is returned.

        Raises:
            TypeError: if the data come from a `DataLoader`.
            ValueError: if a part would be empty.
        """
        kept, held_out, which = self.source.split(share, 0 if seed is None else seed)
        return self._of(kept), self._of(held_out), which

    def _of(self, source: RowSource) -> Batches:
        """Return rows of another source in batches of the same kind."""
        part = copy.copy(self)
        part.source, part.count = source, source.count(self.batch_size)
        return part

    def first(self) -> Batch:
        """Return the first batch in order."""
        return next(self.in_order())

    def take(self, rows: int) -> Batch:
        """Return the first rows, or of data that are not held in memory the first batch."""
        held = self.all
        return self.first() if held is None else self.convert.cut(held, torch.arange(min(rows, self.rows)))

    def head(self, rows: int) -> Batch:
        """Return all rows, or of data that are not held in memory at least this many if there are as many."""
        return self.source.head(rows)

    def subsample(self, size: int) -> None:
        """Yield all rows in every batch from now on, for a model that draws a minibatch of this size itself.

        Raises:
            TypeError: if the data come from a `DataLoader` or a `RowStream`.
        """
        self.source = self.source.hold(size)
        self.count, self.is_whole = ceil(self.rows / size), True

    def in_order(self) -> Iterator[Batch]:
        """Return the batches of all rows in order."""
        return self._whole(self.count) if self.is_whole else self.source.in_order(self.batch_size)

    def shuffled(self, epoch: int = 1, done: int = 0) -> Iterator[Batch]:
        """Return the batches of all rows, after shuffling the rows. A `DataLoader` shuffles only if it was built to.

        Args:
            epoch: number of the epoch, from 1. The order of a `RowStream` is a function of it and of the seed. Other orders are
                drawn from torch's random numbers when this is called.
            done: number of batches that were made already, and are left out.
        """
        if self.is_whole:
            return self._whole(self.count - done)
        return self.source.shuffled(self.batch_size, epoch=epoch, seed=self.seed, done=done)

    def num_shares(self, ranks: Ranks) -> int:
        """Return the number of batches that `shares` yields."""
        return ceil(self.count / ranks.size) if self.is_whole else self.source.num_shares(self.batch_size)

    def shares(self, ranks: Ranks, seed: int | None = None) -> Iterator[tuple[Batch, int]]:
        """Yield this rank's rows of the batches of all rows, and the number of rows of each whole batch.

        A model that draws its minibatches itself is given all rows on every rank.

        Args:
            ranks: the processes among which the rows of a batch are divided.
            seed: seed of the order of all rows, the same on all ranks. With None they are in order, apart from those of a
                `DataLoader` that shuffles.
        """
        if self.is_whole:
            return ((batch, ranks.size * self.rows) for batch in self._whole(self.num_shares(ranks)))
        return self.source.shares(self.batch_size, ranks, seed)

    def _whole(self, number: int) -> Iterator[Batch]:
        """Return all rows, a number of times."""
        return repeat(self.head(self.rows), number)
