"""Rows of data larger than memory, read from files in batches: in order, or in another random order in each epoch.

Shards are shuffled, and rows within a buffer (see `orders`). Memory holds two buffers: one that is trained on, and the next,
which a thread reads meanwhile.
"""

from __future__ import annotations

__all__ = ["RowStream"]

import copy
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_genmodels.datasets.buffers import Rows, made_ahead
from pyro_genmodels.datasets.orders import Interval, block_order, rows_left, shard_order, shares, step_sizes
from pyro_genmodels.datasets.shards import Piece, Source
from pyro_genmodels.datasets.statistics import ColumnStatistics, Memory, merged
from pyro_genmodels.utils.errors import check_positive_int

BUFFER_BYTES, BUFFER_ROWS = 2**25, 2**16
"""Default size of the buffer in which rows are shuffled: in bytes, and in rows where a row's size is not known."""
SPANS_OF_BUFFER = 16
"""Number of places in a file from which the rows of a buffer come, if the file can be read anywhere."""
SAMPLED_SPANS = 64
"""Largest number of shards from which a sample is drawn."""


class Span(NamedTuple):
    """Successive rows of a source, which are read together: a shard, or a part of one."""

    source: Source
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


class RowStream:
    """Rows of data larger than memory, for `train`, `log_likelihood` and others. `stream` opens one.

    Args:
        sources: where the rows are.
        buffer_rows: number of rows that are shuffled together; None for as many as 32 MB hold.
        root: folder of the files, by which they are told apart; None if there are none.
        settings: choice of columns, which is part of what is remembered of files.
        memory: path of a JSON file for what is measured, or None.

    Attributes:
        spans: the shards.
        buffer_rows: number of rows that are shuffled together.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        buffer_rows: int | None = None,
        root: Path | None = None,
        settings: Any = None,
        memory: Path | None = None,
    ) -> None:
        if buffer_rows is not None:
            check_positive_int("stream", buffer_rows=buffer_rows)
        sources = [source for source in sources if source.rows]
        if not sources:
            raise ValueError("A stream wants at least one row, but its files hold none.")
        row_bytes = max(source.row_bytes for source in sources)
        self.buffer_rows = int(buffer_rows or (max(1, BUFFER_BYTES // row_bytes) if row_bytes else BUFFER_ROWS))
        self.spans = [span for source in sources for span in _spans(source, max(1, self.buffer_rows // SPANS_OF_BUFFER))]
        self._root, self._settings, self._memory = root, settings, memory
        self._statistics: tuple[ColumnStatistics, ...] | None = None

    def __len__(self) -> int:
        """Return the number of rows, which are not read."""
        return sum(span.rows for span in self.spans)

    def __repr__(self) -> str:
        """Return the number of rows and of shards."""
        return f"RowStream({len(self):,} rows in {len(self.spans):,} shards)"

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        done: Sequence[tuple[int, int]] = (),
    ) -> Iterator[Any]:
        """Yield all rows once in batches: x, (n, *event_shape), or (x, context) if there is a context.

        With several ranks each gets other rows, and a part of each of the same number of batches.

        Args:
            batch_size: largest number of rows of a batch, over all ranks. Sizes differ by one at most.
            epoch: number of the epoch, whose order is a function of it and of the seed; None for the order of the files.
            seed: seed of the orders of all epochs.
            rank: number of this process, from 0.
            ranks: number of processes.
            done: batches of this epoch that were made already, as (number of ranks, number of batches) of each run that took
                part in it. Their rows are not given again, nor read, apart from those of the last buffer.

        Raises:
            ValueError: if a batch has fewer rows than there are ranks; or while rows are read, if a file is damaged or has
                changed.
            FileNotFoundError: if a file is gone.

        Example:
            >>> from pyro_genmodels.datasets import stream
            >>> rows = stream(torch.arange(10.0)[:, None].numpy(), buffer_rows=4)
            >>> [x.flatten().tolist() for x in rows.batches(4)]
            [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]
            >>> seen = [int(x) for rank in (0, 1) for batch in rows.batches(4, epoch=1, rank=rank, ranks=2) for x in batch]
            >>> sorted(seen) == list(range(10))
            True
        """
        check_positive_int("batches", batch_size=batch_size)
        unseen, steps = rows_left(len(self), ceil(len(self) / batch_size), done)
        intervals = shares(unseen, steps, ranks)[rank]
        rows = sum(stop - start for start, stop in unseen)
        return self._batches(intervals, step_sizes(rows, steps, rank, ranks) if steps else iter(()), epoch, seed)

    def _batches(self, intervals: Sequence[Interval], sizes: Iterator[int], epoch: int | None, seed: int) -> Iterator[Any]:
        """Yield the rows of some intervals of an order in batches of the given sizes."""
        pieces = self._in_order(intervals) if epoch is None else made_ahead(self._shuffled(intervals, epoch, seed))
        rows = Rows(pieces)
        try:
            for size in sizes:
                parts = rows.take(size)
                batch = parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))
                yield batch[0] if len(batch) == 1 else batch
        finally:
            pieces.close()

    def _in_order(self, intervals: Sequence[Interval]) -> Any:
        """Yield the rows of some intervals of the order of the files, in pieces."""
        for start, stop in intervals:
            rows = Rows(self._pieces(self.spans, start))
            while start < stop:
                piece = rows.next(stop - start)
                start += len(piece[0])
                yield piece

    def _shuffled(self, intervals: Sequence[Interval], epoch: int, seed: int) -> Any:
        """Yield the rows of some intervals of an epoch's order, a block at a time."""
        spans = [self.spans[i] for i in shard_order(len(self.spans), seed, epoch)]
        total = len(self)
        for start, stop in intervals:
            first = start // self.buffer_rows
            rows = Rows(self._pieces(spans, first * self.buffer_rows))
            for block in range(first, ceil(stop / self.buffer_rows)):
                begin = block * self.buffer_rows
                size = min(self.buffer_rows, total - begin)
                shuffled = rows.take_to(torch.from_numpy(block_order(size, seed, epoch, block)))
                yield tuple(t[max(start - begin, 0) : stop - begin] for t in shuffled)

    @staticmethod
    def _pieces(spans: Sequence[Span], first: int) -> Iterator[Piece]:
        """Yield the rows of spans, one after the other, from the row of number `first` on."""
        for span in spans:
            if first < span.rows:
                yield from span.source.read(span.start + first, span.stop)
            first = max(first - span.rows, 0)

    def sample(self, rows: int) -> Any:
        """Return about this many rows, or all if there are fewer, from shards all over the data; always the same ones.

        Returns:
            x, (n, *event_shape), or (x, context).
        """
        if len(self) <= rows:
            return next(self.batches(len(self)))
        number = min(SAMPLED_SPANS, len(self.spans), rows)
        chosen = sorted(np.random.default_rng(0).choice(len(self.spans), number, replace=False))
        parts: list[Piece] = []
        missing = rows
        for left, i in zip(range(number, 0, -1), chosen, strict=True):
            span = self.spans[i]
            for piece in span.source.read(span.start, min(span.start + ceil(max(missing, 0) / left), span.stop)):
                parts.append(piece)
                missing -= len(piece[0])
        found = tuple(map(torch.cat, zip(*parts, strict=True)))
        return found[0] if len(found) == 1 else found

    def split(self, share: float, seed: int = 0) -> tuple[RowStream, RowStream]:
        """Return the stream without a share of its rows, and this share: random shards, of which the last is cut in two.

        Nothing is read. The rows are like the others only if there are many shards, or the rows are in no particular order.

        Raises:
            ValueError: if a part would be empty.
            TypeError: if the rows come from an iterable, which can only be read as a whole.
        """
        if any(span.source.is_sequential for span in self.spans):
            raise TypeError("A stream of an iterable cannot be split without reading it. Pass a stream of other rows.")
        number = max(round(share * len(self)), 1)
        if number >= len(self):
            raise ValueError(f"A share of {share:g} of {len(self)} rows cannot be held out: pass more rows.")
        held_out: dict[int, int] = {}
        for i in np.random.default_rng(seed).permutation(len(self.spans)).tolist():
            if number:
                held_out[i] = min(number, self.spans[i].rows)
                number -= held_out[i]
        rest = [Span(s.source, s.start, s.stop - held_out.get(i, 0)) for i, s in enumerate(self.spans)]
        taken = [Span(s.source, s.stop - held_out[i], s.stop) for i, s in enumerate(self.spans) if i in held_out]
        return self._select([span for span in rest if span.rows]), self._select(taken)

    def _select(self, spans: list[Span]) -> RowStream:
        part = copy.copy(self)
        part.spans, part._statistics = spans, None
        return part

    @property
    def digest(self) -> str:
        """Checksum by which a resumed run recognises the rows and their orders. It reads parts of the files only."""
        parts = []
        for source, spans in self._by_source():
            known = source.file.digest() if source.file is not None else source.name
            parts.append(f"{known} {[(span.start, span.stop) for span in spans]}")
        return sha256(f"{self.buffer_rows} {self._settings} {parts}".encode()).hexdigest()

    def _by_source(self) -> Iterator[tuple[Source, list[Span]]]:
        return ((source, list(spans)) for source, spans in groupby(self.spans, lambda span: span.source))

    def statistics(self, *, progress: bool = False) -> tuple[ColumnStatistics, ...]:
        """Return mean, deviation and number of missing values of all rows: of x, and of the contexts if there are any.

        All rows are read once. What is measured of each file is written as JSON beside it, and not measured again.

        Args:
            progress: True to show a progress bar.

        Raises:
            ValueError: if a file is damaged or has changed.
            FileNotFoundError: if a file is gone.

        Example:
            >>> from pyro_genmodels.datasets import stream
            >>> [found] = stream(torch.tensor([[1e9], [1e9 + 1], [1e9 + 2]], dtype=torch.float64).numpy()).statistics()
            >>> found.mean - 1e9, found.deviation
            (tensor([1.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
        """
        if self._statistics is None:
            memory, found = Memory(self._memory), []
            files = groupby(self.spans, lambda span: span.source.file)
            with tqdm(total=len(self), desc="statistics", unit="row", unit_scale=True, disable=not progress) as bar:
                try:
                    for file, group in files:
                        spans = list(group)
                        key, state = self._memory_key(spans), None if file is None else [file.size, file.modified]
                        known = None if file is None else memory.get(key, state)
                        if known is None:
                            known = merged(map(_measured, spans))
                            if file is not None:
                                file.check()
                                memory.put(key, state, known)
                        found.append(known)
                        bar.update(sum(span.rows for span in spans))
                finally:
                    memory.write()
            self._statistics = merged(found)
        return self._statistics

    def _memory_key(self, spans: Sequence[Span]) -> str:
        """Return the key of the statistics of some rows of a file: its name, and a checksum of what is read of it."""
        file = spans[0].source.file
        if file is None:
            return ""
        name = file.path.relative_to(self._root).as_posix() if self._root else str(file.path)
        read = [(span.source.name, span.start, span.stop) for span in _joined(spans)]
        text = f"{self._settings} {[(source.removeprefix(str(file.path)), *ends) for source, *ends in read]}"
        return f"{name} {sha256(text.encode()).hexdigest()[:16]}"


def _measured(span: Span) -> tuple[ColumnStatistics, ...]:
    """Return the statistics of the rows of a span."""

    def parts() -> Iterator[tuple[ColumnStatistics, ...]]:
        first = span.start
        for piece in span.source.read(span.start, span.stop):
            yield tuple(ColumnStatistics.of(t, span.source.name, first) for t in piece)
            first += len(piece[0])

    return merged(parts())


def _spans(source: Source, rows: int) -> list[Span]:
    """Return a source in shards: blocks of rows if it can be read anywhere, else the whole source."""
    step = source.rows if source.is_whole else rows
    return [Span(source, start, min(start + step, source.rows)) for start in range(0, source.rows, step)]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return spans with those that follow one another in a source as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].source is span.source and joined[-1].stop == span.start:
            joined[-1] = Span(span.source, joined[-1].start, span.stop)
        else:
            joined.append(span)
    return joined
