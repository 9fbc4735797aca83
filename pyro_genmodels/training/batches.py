"""Data in minibatches: from tensors, arrays, frames and nested structures of them, a `Dataset`, a `DataLoader` or a
`RowStream`.

Data are the arguments of a model (see `arguments`). Every tensor in them, at any depth, has one row per datum, and all are cut
alike.
"""

from __future__ import annotations

__all__ = ["Batches"]

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from itertools import chain, islice, repeat
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from pyro_genmodels.datasets.orders import step_sizes
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.datasets.streams import RowStream
from pyro_genmodels.training.arguments import Batch, as_arguments, by_place, first_argument, joined, number_of_rows
from pyro_genmodels.utils.checksums import raw_bytes
from pyro_genmodels.utils.errors import listed, warn_caller
from pyro_genmodels.utils.nested import is_array, map_nested
from pyro_genmodels.utils.ranks import Ranks
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import as_tensor

MAX_ROUNDING = 1e-3
"""Largest change of a column by rounding to the precision of a fit, relative to its range, that goes without a warning."""
EXACT_ROUNDING = 1e-6
"""The same, above which a family is given the unrounded data. It subtracts their mean before it rounds."""


class Batches:
    """Data in minibatches.

    Args:
        data: arguments of the model for all rows: tensors, arrays, lists of numbers or frames, alone, in a tuple of positional
            arguments or in a dictionary of keyword arguments, which may hold lists and dictionaries of them. Or a
            `torch.utils.data.Dataset` with a length, or a `DataLoader`, whose items are such arguments; or a `RowStream`.
        context: second argument of the model, or None.
        batch_size: largest number of rows in a minibatch. The sizes differ by one at most.
        like: tensor with the device and precision for the batches.
        family: name of the family that is trained, which takes x or (x, context); None for a model that takes any arguments.
        exact: number of leading arguments that may be of higher precision, if rounding would change them noticeably.
        arrange: function that returns x with the columns of a data frame in the order of the family, or None.
        model_kwargs: further keyword arguments of the model, the same in every batch.
        seed: seed of the orders of a `RowStream`. Those of other data are drawn.

    Attributes:
        rows: number of rows.
        count: number of minibatches.
        is_whole: True if each batch has all rows, of which the model draws a minibatch itself; see `subsample`.

    Raises:
        ValueError: if there are no rows, or a tensor has another number of rows, or values are too large for the precision.
        TypeError: if the data cannot be converted to tensors, or the number of rows is unknown.
    """

    def __init__(
        self,
        data: Any,
        context: Any,
        batch_size: int,
        like: Tensor,
        *,
        family: str | None = None,
        exact: int = 0,
        arrange: Callable[[Any], Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.seed = seed
        self.device, self.dtype, self.family, self.batch_size = like.device, like.dtype, family, batch_size
        self.model_kwargs, self.exact, self.arrange = dict(model_kwargs or {}), exact, arrange
        self._keeps: dict[int, bool] = {}  # by the place of an argument: True if its precision is kept
        if isinstance(data, TensorDataset):
            data = data.tensors
        self.source = data if isinstance(data, (DataLoader, Dataset, RowStream)) else None
        self.all: Batch | None = None
        if self.source is not None:
            self.rows = self._length(context)
        else:
            self.all = self.as_batch(data if context is None else (*first_argument(data), context))
            self.rows = self.all.rows
        if not self.rows:
            raise ValueError("Training wants data of at least one row, as x and as valid, but found no rows.")
        self.count = ceil(self.rows / batch_size)
        self.is_whole = False

    def _length(self, context: Any) -> int:
        """Return the number of rows of a `Dataset`, `DataLoader` or `RowStream`."""
        if context is not None:
            raise ValueError(f"The {type(self.source).__name__} yields the context, as (x, context): leave context out.")
        dataset: Any = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"Training wants a dataset with a length, but {type(dataset).__name__} has none. Use a map-style dataset, or "
                "say the number of its rows: datasets.stream(loader, rows=...)."
            )
        return len(dataset)

    def to(self, t: Tensor) -> Tensor:
        """Return the tensor on the device of `like`, and in its precision if it holds floats.

        Raises:
            ValueError: if values are too large for that precision.
        """
        if not t.is_floating_point() or t.dtype == self.dtype:
            return t.to(self.device, non_blocking=True)
        new = t.to(self.device, self.dtype, non_blocking=True)
        if torch.finfo(t.dtype).max > torch.finfo(self.dtype).max and not _same_finite(new, t):
            raise ValueError(
                f"Training in {self.dtype} cannot hold data of {t[t.isfinite()].abs().max():.3g}. Divide them by their "
                "size, or train in float64: family.double()."
            )
        return new

    def move(self, device: torch.device) -> None:
        """Move all rows to a device, and those of a `Dataset` or `DataLoader` when they are read."""
        self.device = device
        if self.all is not None:
            args, kwargs = (map_nested(self.to, part, is_array) for part in self.all[:2])
            self.all = Batch(args, kwargs, self.rows)

    @property
    def digest(self) -> str | None:
        """Checksum by which a resumed run recognises its data. None for a `Dataset` or `DataLoader`."""
        if self.all is None:
            return self.source.digest if isinstance(self.source, RowStream) else None
        digest = sha256()
        for t in self.all.tensors.values():
            digest.update(raw_bytes(t))
        return digest.hexdigest()

    @property
    def resumes(self) -> bool:
        """True if `shuffled` can leave out batches that were made already. A `DataLoader` may have another order each time."""
        return not isinstance(self.source, DataLoader)

    def statistics(self, *, progress: bool = False) -> tuple[ColumnStatistics, ...]:
        """Return the statistics of all rows of a `RowStream`, by a pass that is remembered. Other data have none."""
        return self.source.statistics(progress=progress) if isinstance(self.source, RowStream) else ()

    def place_of_nonfinite(self, batch: Batch) -> str:
        """Return a sentence with the file and row of the first NaN or infinite value, if a batch of a `RowStream` has one."""
        if not (isinstance(self.source, RowStream) and batch.nonfinite_rows()):
            return ""
        places = [part.first_nonfinite for part in self.source.statistics() if part.nonfinite]
        return f"In the files the first such row is {places[0]}." if places else ""

    def split(self, share: float, seed: int | None) -> tuple[Batches, Batches, Any]:
        """Return the data without a random share of their rows, this share, and the numbers of its rows.

        The rows depend on nothing but the seed and the number of rows. The random number generator is not used. Of a
        `RowStream` whole shards are held out, and instead of the numbers of their rows a stream of them is returned.

        Raises:
            TypeError: if the data come from a `DataLoader`.
            ValueError: if a part would be empty.
        """
        if isinstance(self.source, DataLoader):
            raise TypeError(
                "train cannot hold out a share of a DataLoader. Split its dataset by torch.utils.data.random_split, and pass a "
                "DataLoader of each part."
            )
        if isinstance(self.source, RowStream):
            rest, held_out_rows = self.source.split(share, 0 if seed is None else seed)
            return self._of(rest), self._of(held_out_rows), held_out_rows
        number = max(round(share * self.rows), 1)
        if number >= self.rows:
            raise ValueError(f"train cannot hold out a share of {share:g} of {self.rows} rows: pass more rows.")
        order = torch.randperm(self.rows, generator=torch.Generator().manual_seed(0 if seed is None else seed))
        held_out, kept = order[:number].sort().values, order[number:].sort().values
        return self._select(kept), self._select(held_out), held_out

    def _select(self, rows: Tensor) -> Batches:
        """Return these rows of the data."""
        part = copy.copy(self)
        part.rows, part.count = len(rows), ceil(len(rows) / self.batch_size)
        if self.all is not None:
            part.all = self._take(rows)
        else:
            part.source = Subset(self.source, rows.tolist())  # type: ignore[arg-type]
        return part

    def _of(self, source: RowStream) -> Batches:
        """Return another stream in batches of the same kind."""
        part = copy.copy(self)
        part.source, part.rows, part.count = source, len(source), ceil(len(source) / self.batch_size)
        return part

    def first(self) -> Batch:
        """Return the first batch in order."""
        return next(self.in_order())

    def take(self, rows: int) -> Batch:
        """Return the first rows, or of data that are not held here the first batch."""
        return self.first() if self.all is None else self._take(torch.arange(min(rows, self.rows)))

    def head(self, rows: int) -> Batch:
        """Return all rows, or of data that are not held here at least this many if there are as many."""
        if self.all is not None:
            return self.all
        if isinstance(self.source, RowStream):
            return self.as_batch(self.source.sample(rows))
        parts: list[Batch] = []
        total = 0
        for part in self.in_order():
            parts.append(part)
            total += part.rows
            if total >= rows:
                break
        args = joined([part.args for part in parts])
        kwargs = joined([{n: v for n, v in part.kwargs.items() if n not in self.model_kwargs} for part in parts])
        return Batch(args, kwargs | self.model_kwargs, total)

    def subsample(self, size: int) -> None:
        """Yield all rows in every batch from now on, for a model that draws a minibatch of this size itself.

        Raises:
            TypeError: if the data come from a `DataLoader` or a `RowStream`.
        """
        if isinstance(self.source, (DataLoader, RowStream)):
            raise TypeError(
                f"The model draws minibatches of {size} rows itself (subsample_size), from all rows. Pass the rows as tensors, "
                f"not in a {type(self.source).__name__}."
            )
        self.all, self.source = self.head(self.rows), None
        self.count, self.is_whole = ceil(self.rows / size), True

    def in_order(self) -> Iterator[Batch]:
        """Return the batches of all rows in order."""
        if isinstance(self.source, RowStream):
            return map(self.as_batch, self.source.batches(self.batch_size))
        return self._in_batches(torch.arange(self.rows))

    def shuffled(self, epoch: int = 1, done: int = 0) -> Iterator[Batch]:
        """Return the batches of all rows, after shuffling the rows. A `DataLoader` shuffles only if it was built to.

        Args:
            epoch: number of the epoch, from 1. The order of a `RowStream` is a function of it and of the seed. Other orders are
                drawn from torch's random numbers when this is called.
            done: number of batches that were made already, and are left out.
        """
        if isinstance(self.source, RowStream):
            made = [(1, done)] if done else []
            return map(self.as_batch, self.source.batches(self.batch_size, epoch=epoch, seed=self.seed, done=made))
        return self._in_batches(torch.randperm(self.rows), done)

    def num_shares(self, ranks: Ranks) -> int:
        """Return the number of batches that `shares` yields."""
        if isinstance(self.source, DataLoader):
            return len(self.source)
        return ceil(self.count / ranks.size) if self.is_whole else self.count

    def shares(self, ranks: Ranks, seed: int | None = None) -> Iterator[tuple[Batch, int]]:
        """Yield this rank's rows of the batches of all rows, and the number of rows of each whole batch.

        A model that draws its minibatches itself is given all rows on every rank.

        Args:
            ranks: the processes among which the rows of a batch are divided.
            seed: seed of the order of all rows, the same on all ranks. With None they are in order, apart from those of a
                `DataLoader` that shuffles.
        """
        if isinstance(self.source, DataLoader):
            loader = iter(self.source)
            with forked_rng(seed):  # a loader that shuffles draws its order now
                first = list(islice(loader, 1))
            for batch in map(self.as_batch, chain(first, loader)):
                places = ranks.part(batch.rows)
                yield self._cut(batch, torch.arange(places.start, places.stop)), batch.rows
        elif isinstance(self.source, RowStream):
            epoch = None if seed is None else 0
            parts = self.source.batches(self.batch_size, epoch=epoch, seed=seed or 0, rank=ranks.rank, ranks=ranks.size)
            yield from zip(map(self.as_batch, parts), step_sizes(self.rows, self.count), strict=True)
        elif self.is_whole:
            yield from repeat((self.all, ranks.size * self.rows), self.num_shares(ranks))
        else:
            generator = torch.Generator().manual_seed(seed or 0)
            order = torch.arange(self.rows) if seed is None else torch.randperm(self.rows, generator=generator)
            for rows in order.tensor_split(self.count):
                yield self._rows(rows[ranks.part(len(rows))]), len(rows)

    def _rows(self, rows: Tensor) -> Batch:
        """Return the rows of these numbers."""
        if self.all is not None:
            return self._take(rows.to(self.device))
        if len(rows):
            return self.as_batch(_fetched(self.source, rows.tolist()))
        return self._cut(self.as_batch(_fetched(self.source, [0])), rows)

    def _in_batches(self, order: Tensor, done: int = 0) -> Iterator[Batch]:
        """Yield the rows of the given numbers in batches, without the first ones."""
        if isinstance(self.source, DataLoader):
            yield from islice(map(self.as_batch, self.source), done, None)
        elif self.all is None:
            yield from map(self._rows, order.tensor_split(self.count)[done:])
        elif self.is_whole:
            yield from repeat(self.all, self.count - done)
        else:
            yield from map(self._take, order.to(self.device).tensor_split(self.count)[done:])

    def _take(self, rows: Tensor) -> Batch:
        """Return rows of the tensors that are held here."""
        return self._cut(self.all, rows)  # type: ignore[arg-type]

    def _cut(self, batch: Batch, rows: Tensor) -> Batch:
        """Return rows of a batch."""
        args, kwargs, _ = batch

        def cut(t: Any) -> Any:
            return t[rows.to(t.device)] if isinstance(t, Tensor) and t.dim() else t

        kwargs = {name: v if name in self.model_kwargs else map_nested(cut, v, is_array) for name, v in kwargs.items()}
        return Batch(map_nested(cut, args, is_array), kwargs, len(rows))

    def as_batch(self, data: Any) -> Batch:
        """Return data as arguments of the model, converted to tensors."""
        args, kwargs = as_arguments(data)
        if self.family is not None:
            args, kwargs = self._arguments_of_family(args, kwargs), {}
            args = args if self.arrange is None else (self.arrange(args[0]), *args[1:])
        for name in kwargs:
            if name in self.model_kwargs:
                raise ValueError(f"The data and model_kwargs both have {name!r}: give it once.")
            if name == "size":
                raise ValueError(
                    "The data have the key 'size', which is the number of all rows that train gives the model. Rename it."
                )
        args = tuple(map_nested(partial(self._converted, place), value, is_array) for place, value in enumerate(args))
        kwargs = map_nested(partial(self._converted, None), kwargs, is_array)
        rows = number_of_rows(by_place(args, kwargs))
        return Batch(args, kwargs | self.model_kwargs, rows)

    def _arguments_of_family(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Return x or (x, context)."""
        if kwargs:
            if "x" not in kwargs or not kwargs.keys() <= {"x", "context"}:
                raise ValueError(f"{self.family} wants data with the keys 'x' and 'context', but found {listed(kwargs)}.")
            args = tuple(kwargs[name] for name in ("x", "context") if name in kwargs)
        args = args[:1] if len(args) == 2 and args[1] is None else args
        if not 1 <= len(args) <= 2:
            raise ValueError(
                f"A batch of {self.family} wants x or (x, context), but found {len(args)} parts. Combine them in the dataset; "
                "rows in a list are joined by torch.stack(rows)."
            )
        return args

    def _converted(self, place: int | None, value: Any) -> Any:
        """Return a value in the argument at this place: an array as a tensor, and anything else unchanged."""
        if not is_array(value):
            return value
        t = as_tensor(value, "train")
        if place is not None and place < self.exact:
            if place not in self._keeps:
                self._keeps[place] = bool((_rounding(t, self.dtype) > EXACT_ROUNDING).any())
            if self._keeps[place]:
                return t.to(self.device, non_blocking=True)
        elif self.source is None and (lost := _rounding(t, self.dtype)).max() > MAX_ROUNDING and lost.isfinite().all():
            warn_caller(
                f"In {self.dtype} the data change by {lost.max():.0%} of their range in column {int(lost.argmax())}. Subtract "
                "an offset from them, or train in float64: model.double(), or torch.set_default_dtype(torch.float64).",
            )
        return self.to(t)


def _rounding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest change of each column by rounding to a precision, relative to the column's range.

    It is 0 for a column that is constant apart from rounding, and infinite if values become infinite.
    """
    if not (t.numel() and t.dim() and t.is_floating_point()) or torch.finfo(t.dtype).eps >= torch.finfo(dtype).eps:
        return torch.zeros(1)
    rows = t.detach().reshape(len(t), -1)
    seen = rows.isfinite()
    known = torch.where(seen, rows, 0.0).sum(0) / seen.sum(0).clamp(min=1)  # missing values must not widen the range
    rows = torch.where(seen, rows, known.where(known.isfinite(), 0.0))
    change = (rows.to(dtype).to(t.dtype) - rows).abs().amax(0)
    spread = rows.amax(0) - rows.amin(0)
    is_constant = spread <= 1e3 * torch.finfo(t.dtype).eps * rows.abs().amax(0)
    return torch.where(is_constant & change.isfinite(), 0.0, change / spread)


def _same_finite(new: Tensor, old: Tensor) -> bool:
    """Return True if rounding made no number infinite."""
    return bool((new.isfinite() == old.isfinite().to(new.device)).all())


def _fetched(dataset: Any, rows: Sequence[int]) -> Any:
    """Return items of a dataset, collated."""
    items = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[i] for i in rows]
    return default_collate(items)
