"""Rows in minibatches, wherever they come from: tensors, or a loader."""

from __future__ import annotations

__all__ = ["Batch", "Batches", "pair_of"]

from collections.abc import Iterator
from hashlib import sha256
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

Batch = tuple[Tensor, Tensor | None]


class Batches:
    """Rows of data in minibatches (x, context), from tensors or from a DataLoader.

    Args:
        data: rows of x, (N, ...), or a DataLoader of x or (x, context).
        context: one per row, (N, ...), or None.
        batch_size: rows in a minibatch, at most; their sizes differ by one at most.
        like: a tensor of the device and precision wanted.

    Raises:
        ValueError: on no rows, or rows of context that do not match.
    """

    def __init__(self, data: Any, context: Any, batch_size: int, like: Tensor) -> None:
        self.device, self.dtype = like.device, like.dtype
        self.loader = data if isinstance(data, DataLoader) else None
        if self.loader is not None:
            if context is not None:
                raise ValueError("With a DataLoader the context comes in its batches, as (x, context): leave context out.")
            self.x: Any = None
            self.context: Any = None
            if not hasattr(data.dataset, "__len__"):
                raise TypeError(
                    f"Training wants to know the number of data, but a {type(data.dataset).__name__} has no length. Use a "
                    "map-style dataset, or SVI with size=."
                )
            self.rows = len(data.dataset)
        else:
            self.x = self.to(torch.as_tensor(data))
            self.context = None if context is None else self.to(torch.as_tensor(context))
            self.rows = len(self.x) if self.x.dim() else 0
        if not self.rows:
            raise ValueError("Training wants data of at least one row, but found none.")
        if self.loader is None and self.context is not None and len(self.context) != self.rows:
            raise ValueError(
                f"There are {self.rows} rows of data but {len(self.context)} of context. Pass one context per row."
            )
        self.count = ceil(self.rows / batch_size)

    def to(self, t: Tensor) -> Tensor:
        """The tensor on the device, and if it is of floats in the precision, of `like`."""
        return t.to(self.device, self.dtype if t.is_floating_point() else t.dtype, non_blocking=True)

    @property
    def digest(self) -> str | None:
        """A checksum of all rows, by which data are known again; None of a DataLoader."""
        if self.loader is not None:
            return None
        parts = [self.x] if self.context is None else [self.x, self.context]
        digest = sha256()
        for t in parts:
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def first(self) -> Batch:
        """The first batch in order."""
        return next(self.in_order())

    def head(self, rows: int) -> Tensor:
        """All rows of x, or of a DataLoader's at least so many, if it has them."""
        if self.loader is None:
            return self.x
        parts: list[Tensor] = []
        for x, _ in self.in_order():
            parts.append(x)
            if sum(map(len, parts)) >= rows:
                break
        return torch.cat(parts)

    def in_order(self) -> Iterator[Batch]:
        """All rows as they stand."""
        return self._by(torch.arange(self.rows))

    def shuffled(self) -> Iterator[Batch]:
        """All rows in a random order (a DataLoader has its own)."""
        return self._by(torch.randperm(self.rows))

    def _by(self, order: Tensor) -> Iterator[Batch]:
        if self.loader is not None:
            for batch in self.loader:
                x, context = pair_of(batch)
                yield self.to(x), None if context is None else self.to(context)
            return
        for rows in order.to(self.device).tensor_split(self.count):
            yield self.x[rows], None if self.context is None else self.context[rows]


def pair_of(batch: Any) -> tuple[Any, Any]:
    """(x, context) of x or of [x] or of [x, context]."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) > 2:
        raise ValueError(f"A batch wants x or (x, context), but found {len(batch)} parts. Put them together in the dataset.")
    return batch[0], batch[1] if len(batch) == 2 else None
