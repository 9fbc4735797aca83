r"""The order of rows in an epoch of a stream, and the part of each of several processes ("ranks") in it.

An order is a sequence of all N rows: the shards in a random order, one after the other, and then each block of B successive
rows shuffled. It is a function of (seed, epoch), and of nothing else. So the rows from any position on are found without
reading those before, apart from the block in which the position lies.

A step of S rows is split over R ranks into parts that differ by one row at most. Each rank takes the rows of all its parts from
an interval of the order of its own, so that ranks read different shards. What S steps leave unseen are intervals again, which
any other number of ranks can share.
"""

from __future__ import annotations

__all__ = ["Interval", "block_order", "rows_left", "shard_order", "shares", "step_sizes"]

from collections.abc import Iterator, Sequence

import numpy as np

Interval = tuple[int, int]
"""Positions in an order, from the first to before the last."""


def shard_order(shards: int, seed: int, epoch: int) -> np.ndarray:
    """Return the random order of shards in an epoch, (shards,)."""
    return np.random.default_rng([seed, epoch]).permutation(shards)


def block_order(rows: int, seed: int, epoch: int, block: int) -> np.ndarray:
    """Return the random order of the rows of a block, given its number in the epoch, (rows,)."""
    return np.random.default_rng([seed, epoch, block + 1]).permutation(rows)


def step_sizes(rows: int, steps: int, rank: int = 0, ranks: int = 1) -> Iterator[int]:
    """Yield the number of rows of a rank in each step. The steps of all ranks together differ by one row at most.

    Example:
        >>> list(step_sizes(11, 4)), list(step_sizes(11, 4, rank=1, ranks=2))
        ([3, 3, 3, 2], [1, 1, 1, 1])
    """
    size, larger = divmod(rows, steps)
    return (_part(size + (step < larger), rank, ranks) for step in range(steps))


def _part(rows: int, rank: int, ranks: int) -> int:
    """Return the number of rows of a rank in one step."""
    return rows // ranks + (rank < rows % ranks)


def _rows_of(rows: int, steps: int, done: int, rank: int, ranks: int) -> int:
    """Return the number of rows of a rank in the first `done` of some steps."""
    size, larger = divmod(rows, steps)
    many = min(done, larger)
    return many * _part(size + 1, rank, ranks) + (done - many) * _part(size, rank, ranks)


def shares(unseen: Sequence[Interval], steps: int, ranks: int) -> list[list[Interval]]:
    """Return the intervals of an epoch's order that each rank reads, one after the other.

    Args:
        unseen: the intervals that are shared.
        steps: number of steps in which they are read.
        ranks: number of ranks.

    Raises:
        ValueError: if a step has fewer rows than there are ranks.

    Example:
        >>> shares([(0, 11)], steps=4, ranks=2)
        [[(0, 7)], [(7, 11)]]
    """
    rows = sum(stop - start for start, stop in unseen)
    if steps and rows // steps < ranks:
        raise ValueError(
            f"A step of {rows // steps} rows cannot be shared by {ranks} processes, each of which wants a row: use larger "
            "batches, or fewer processes."
        )
    rest, parts = list(unseen), []
    for rank in range(ranks):
        mine, rest = _cut(rest, _rows_of(rows, steps, steps, rank, ranks)) if steps else ([], rest)
        parts.append(mine)
    return parts


def rows_left(rows: int, steps: int, done: Sequence[tuple[int, int]]) -> tuple[list[Interval], int]:
    """Return the intervals of an epoch's order that have not been seen, and the number of steps that are left for them.

    Args:
        rows: number of rows of the epoch.
        steps: number of its steps.
        done: the steps that were made, as (number of ranks, number of steps), one pair for each run that took part in the
            epoch.

    Example:
        >>> rows_left(11, 4, [(1, 2)]), rows_left(11, 4, [(2, 1), (1, 1)])
        (([(6, 11)], 2), ([(5, 7), (8, 11)], 2))
    """
    unseen: list[Interval] = [(0, rows)]
    for ranks, number in done:
        total = sum(stop - start for start, stop in unseen)
        parts = shares(unseen, steps, ranks)
        seen = [_rows_of(total, steps, number, rank, ranks) for rank in range(ranks)]
        unseen = [interval for part, n in zip(parts, seen, strict=True) for interval in _cut(part, n)[1]]
        steps -= number
    return unseen, steps


def _cut(intervals: Sequence[Interval], rows: int) -> tuple[list[Interval], list[Interval]]:
    """Return the first rows of some intervals, and the rest of them."""
    first: list[Interval] = []
    for i, (start, stop) in enumerate(intervals):
        if rows < stop - start:
            head = [(start, start + rows)] if rows else []
            return first + head, [(start + rows, stop), *intervals[i + 1 :]]
        first.append((start, stop))
        rows -= stop - start
    return first, []
