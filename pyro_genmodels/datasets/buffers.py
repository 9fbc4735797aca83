"""Rows in pieces of any size, taken in other sizes, in another order, and ahead of time."""

from __future__ import annotations

__all__ = ["Rows", "made_ahead"]

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from pyro_genmodels.datasets.shards import Piece


class Rows:
    """Rows that are taken from pieces of any size."""

    def __init__(self, pieces: Iterator[Piece]) -> None:
        self._pieces = pieces
        self._held: Piece | None = None

    def next(self, rows: int) -> Piece:
        """Return some of the next rows, at most this many."""
        held = next(self._pieces) if self._held is None else self._held
        size = len(held[0])
        self._held = tuple(t[rows:] for t in held) if rows < size else None
        return tuple(t[:rows] for t in held) if rows < size else held

    def take(self, rows: int) -> list[Piece]:
        """Return the next rows, in pieces."""
        parts = []
        while rows:
            parts.append(self.next(rows))
            rows -= len(parts[-1][0])
        return parts

    def take_to(self, places: Tensor) -> Piece:
        """Return the next rows, each at the place that is given for it."""
        taken: Piece = ()
        done = 0
        while done < len(places):
            piece = self.next(len(places) - done)
            taken = taken or tuple(t.new_empty((len(places), *t.shape[1:])) for t in piece)
            here = places[done : done + len(piece[0])]
            for target, t in zip(taken, piece, strict=True):
                target[here] = t
            done += len(here)
        return taken


def made_ahead(items: Any) -> Any:
    """Yield the items of a generator, while a thread makes the next one."""
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as pool:
        try:
            following = pool.submit(next, items, None)
            while (item := following.result()) is not None:
                following = pool.submit(next, items, None)
                yield item
        finally:
            following.cancel()
            pool.shutdown(wait=True)
            items.close()
