"""Where the rows of a run come from: tensors held in memory, a `Dataset`, a `DataLoader`, or a `RowStream` of files.

Each source knows how its rows are ordered, divided among the processes of a run, held out, and known again by a run that is
resumed.
"""

from __future__ import annotations

__all__ = ["RowSource", "source_of"]

from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import sha256
from itertools import chain, islice
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from pyro_genmodels.datasets.orders import step_sizes
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.datasets.streams import RowStream
from pyro_genmodels.training.arguments import Batch, first_argument
from pyro_genmodels.training.conversion import Conversion
from pyro_genmodels.utils.checksums import raw_bytes
from pyro_genmodels.utils.ranks import Ranks
from pyro_genmodels.utils.rng import forked_rng


class RowSource(ABC):
    """Base of sources of rows.

    Args:
        convert: function that makes data arguments of the model.
        rows: number of rows.

    Attributes:
        held: all rows, if they are held in memory, or None.
        digest: checksum by which a resumed run knows the rows again, or None if there is none.
        resumes: True if `shuffled` gives the same order again, so that batches which were made already can be left out.
    """

    resumes: ClassVar[bool] = True
    held: Batch | None = None

    def __init__(self, convert: Conversion, rows: int) -> None:
        self.convert, self.rows = convert, rows

    @property
    def digest(self) -> str | None:
        """Checksum of the rows, or None."""
        return None

    def count(self, batch_size: int) -> int:
        """Return the number of batches of at most this many rows."""
        return ceil(self.rows / batch_size)

    @abstractmethod
    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Return the batches of all rows in order."""

    @abstractmethod
    def shuffled(self, batch_size: int, *, epoch: int, seed: int, done: int) -> Iterator[Batch]:
        """Return the batches of all rows in another order, apart from the first `done`.

        Args:
            batch_size: largest number of rows of a batch; sizes differ by one at most.
            epoch: number of the epoch.
            seed: seed of the orders of all epochs. Sources that do not need it draw an order from torch's random numbers when
                this is called.
            done: number of batches that were made already.
        """

    @abstractmethod
    def shares(self, batch_size: int, ranks: Ranks, seed: int | None) -> Iterator[tuple[Batch, int]]:
        """Yield one rank's rows of the batches of all rows, and the number of rows of each whole batch.

        Args:
            batch_size: largest number of rows of a whole batch.
            ranks: the processes among which the rows of a batch are divided.
            seed: seed of the order of all rows, the same on all ranks; None for rows in order.
        """

    def num_shares(self, batch_size: int) -> int:
        """Return the number of batches that `shares` yields."""
        return self.count(batch_size)

    @abstractmethod
    def split(self, share: float, seed: int) -> tuple[RowSource, RowSource, Any]:
        """Return the source without a random share of its rows, this share, and what tells which rows these are.

        Raises:
            TypeError: if the rows cannot be split.
            ValueError: if a part would be empty.
        """

    def head(self, rows: int) -> Batch:
        """Return at least this many rows, if there are as many."""
        parts: list[Batch] = []
        for part in self.in_order(rows):
            parts.append(part)
            if sum(part.rows for part in parts) >= rows:
                break
        return self.convert.joined(parts)

    def hold(self, size: int) -> RowSource:
        """Return the rows held in memory, for a model that draws minibatches of this size itself.

        Raises:
            TypeError: if the rows are not read all at once.
        """
        return _Held(self.convert, self.head(self.rows))

    def move(self, device: torch.device) -> None:
        """Move rows that are held to a device, and others when they are read."""
        self.convert.device = device

    def statistics(self, *, progress: bool = False) -> tuple[ColumnStatistics, ...]:
        """Return the statistics of all rows, of x and of the contexts, if the source measures them; otherwise nothing.

        Args:
            progress: True to show the progress of a pass over the rows.
        """
        return ()

    def place_of_nonfinite(self) -> str:
        """Return a sentence with the place of the first NaN or infinite value, if the source knows it, or nothing."""
        return ""


class _Numbered(RowSource):
    """Base of sources whose rows are taken by their numbers."""

    @abstractmethod
    def take(self, rows: Tensor) -> Batch:
        """Return the rows of these numbers."""

    @abstractmethod
    def _select(self, rows: Tensor) -> RowSource:
        """Return a source of the rows of these numbers."""

    def _in_batches(self, order: Tensor, batch_size: int, done: int = 0) -> Iterator[Batch]:
        return map(self.take, order.tensor_split(self.count(batch_size))[done:])

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        return self._in_batches(torch.arange(self.rows), batch_size)

    def shuffled(self, batch_size: int, *, epoch: int, seed: int, done: int) -> Iterator[Batch]:
        return self._in_batches(torch.randperm(self.rows), batch_size, done)

    def shares(self, batch_size: int, ranks: Ranks, seed: int | None) -> Iterator[tuple[Batch, int]]:
        generator = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(self.rows) if seed is None else torch.randperm(self.rows, generator=generator)
        for rows in order.tensor_split(self.count(batch_size)):
            yield self.take(rows[ranks.part(len(rows))]), len(rows)

    def head(self, rows: int) -> Batch:
        return self.take(torch.arange(min(rows, self.rows)))

    def split(self, share: float, seed: int) -> tuple[RowSource, RowSource, Tensor]:
        number = max(round(share * self.rows), 1)
        if number >= self.rows:
            raise ValueError(f"train cannot hold out a share of {share:g} of {self.rows} rows: pass more rows.")
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[:number].sort().values, order[number:].sort().values
        return self._select(kept), self._select(held_out), held_out


class _Held(_Numbered):
    """Tensors that are held in memory."""

    held: Batch

    def __init__(self, convert: Conversion, held: Batch) -> None:
        super().__init__(convert, held.rows)
        self.held = held

    @property
    def digest(self) -> str:
        """Checksum of all rows."""
        digest = sha256()
        for t in self.held.tensors.values():
            digest.update(raw_bytes(t))
        return digest.hexdigest()

    def _in_batches(self, order: Tensor, batch_size: int, done: int = 0) -> Iterator[Batch]:
        return super()._in_batches(order.to(self.convert.device), batch_size, done)

    def take(self, rows: Tensor) -> Batch:
        return self.convert.cut(self.held, rows)

    def _select(self, rows: Tensor) -> RowSource:
        return _Held(self.convert, self.take(rows))

    def head(self, rows: int) -> Batch:
        return self.held

    def move(self, device: torch.device) -> None:
        super().move(device)
        self.held = self.convert.moved(self.held)


class _FromDataset(_Numbered):
    """A `Dataset` with a length, whose items are arguments of the model."""

    def __init__(self, convert: Conversion, dataset: Any) -> None:
        super().__init__(convert, _length(dataset))
        self.dataset = dataset

    def take(self, rows: Tensor) -> Batch:
        if not len(rows):
            return self.convert.cut(self.take(torch.zeros(1, dtype=torch.long)), rows)
        numbers = rows.tolist()
        many = getattr(self.dataset, "__getitems__", None)
        return self.convert(default_collate(many(numbers) if many else [self.dataset[i] for i in numbers]))

    def _select(self, rows: Tensor) -> RowSource:
        return _FromDataset(self.convert, Subset(self.dataset, rows.tolist()))


class _FromLoader(RowSource):
    """A `DataLoader`, which makes batches and orders of its own."""

    resumes = False

    def __init__(self, convert: Conversion, loader: DataLoader) -> None:
        super().__init__(convert, _length(loader.dataset))
        self.loader = loader

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        return map(self.convert, self.loader)

    def shuffled(self, batch_size: int, *, epoch: int, seed: int, done: int) -> Iterator[Batch]:
        return islice(self.in_order(batch_size), done, None)

    def shares(self, batch_size: int, ranks: Ranks, seed: int | None) -> Iterator[tuple[Batch, int]]:
        loader = iter(self.loader)
        with forked_rng(seed):  # a loader that shuffles draws its order now
            first = list(islice(loader, 1))
        for batch in map(self.convert, chain(first, loader)):
            places = ranks.part(batch.rows)
            yield self.convert.cut(batch, torch.arange(places.start, places.stop)), batch.rows

    def num_shares(self, batch_size: int) -> int:
        return len(self.loader)

    def split(self, share: float, seed: int) -> Any:
        raise TypeError(
            "train cannot hold out a share of a DataLoader. Split its dataset by torch.utils.data.random_split, and pass a "
            "DataLoader of each part."
        )

    def hold(self, size: int) -> RowSource:
        raise _draws_itself(size, "DataLoader")


class _FromStream(RowSource):
    """A `RowStream`, whose orders are functions of the seed and the number of the epoch."""

    def __init__(self, convert: Conversion, stream: RowStream) -> None:
        super().__init__(convert, len(stream))
        self.stream = stream

    @property
    def digest(self) -> str:
        """Checksum of parts of the files."""
        return self.stream.digest

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        return map(self.convert, self.stream.batches(batch_size))

    def shuffled(self, batch_size: int, *, epoch: int, seed: int, done: int) -> Iterator[Batch]:
        made = [(1, done)] if done else []
        return map(self.convert, self.stream.batches(batch_size, epoch=epoch, seed=seed, done=made))

    def shares(self, batch_size: int, ranks: Ranks, seed: int | None) -> Iterator[tuple[Batch, int]]:
        order: dict[str, Any] = {"epoch": None if seed is None else 0, "seed": seed or 0}
        parts = self.stream.batches(batch_size, rank=ranks.rank, ranks=ranks.size, **order)
        return zip(map(self.convert, parts), step_sizes(self.rows, self.count(batch_size)), strict=True)

    def split(self, share: float, seed: int) -> tuple[RowSource, RowSource, RowStream]:
        kept, held_out = self.stream.split(share, seed)
        return _FromStream(self.convert, kept), _FromStream(self.convert, held_out), held_out

    def head(self, rows: int) -> Batch:
        return self.convert(self.stream.sample(rows))

    def hold(self, size: int) -> RowSource:
        raise _draws_itself(size, "RowStream")

    def statistics(self, *, progress: bool = False) -> tuple[ColumnStatistics, ...]:
        return self.stream.statistics(progress=progress)

    def place_of_nonfinite(self) -> str:
        places = [part.first_nonfinite for part in self.statistics() if part.nonfinite]
        return f"In the files the first such row is {places[0]}." if places else ""


def source_of(data: Any, context: Any, convert: Conversion) -> RowSource:
    """Return the source of rows of data.

    Args:
        data: arguments of the model for all rows, see `Conversion`; or a `Dataset` with a length, a `DataLoader` or a
            `RowStream` of them.
        context: second argument of the model, or None.
        convert: function that makes data arguments of the model.

    Raises:
        ValueError: if a context is given beside a source that yields it.
        TypeError: if a `Dataset` has no length.
    """
    if isinstance(data, TensorDataset):
        data = data.tensors
    kinds: list[tuple[type, type[Any]]] = [(DataLoader, _FromLoader), (RowStream, _FromStream), (Dataset, _FromDataset)]
    kind = next((source for known, source in kinds if isinstance(data, known)), None)
    if kind is None:
        return _Held(convert, convert(data if context is None else (*first_argument(data), context), warns=True))
    if context is not None:
        raise ValueError(f"The {type(data).__name__} yields the context, as (x, context): leave context out.")
    source: RowSource = kind(convert, data)
    return source


def _length(dataset: Any) -> int:
    """Return the number of rows of a dataset."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"Training wants a dataset with a length, but {type(dataset).__name__} has none. Use a map-style dataset, or say "
            "the number of its rows: datasets.stream(loader, rows=...)."
        )
    return len(dataset)


def _draws_itself(size: int, kind: str) -> TypeError:
    """Return the error of a model that wants all rows at once."""
    return TypeError(
        f"The model draws minibatches of {size} rows itself (subsample_size), from all rows. Pass the rows as tensors, not in "
        f"a {kind}."
    )
