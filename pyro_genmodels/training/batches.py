"""Data in minibatches, from tensors or from a `DataLoader`."""

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
    """Data in minibatches (x, context), from tensors or from a `DataLoader`.

    Args:
        data: rows of x, (N, ...), or a `DataLoader` of x or (x, context).
        context: context of each row, (N, ...), or None.
        batch_size: largest number of rows in a minibatch. The sizes differ by one at most.
        like: tensor with the device and precision for the batches.

    Attributes:
        rows: number of rows.
        count: number of minibatches.

    Raises:
        ValueError: if there are no rows, or another number of rows of context.
        TypeError: if the data cannot be converted to a tensor, or the number of rows is unknown.
    """

    def __init__(self, data: Any, context: Any, batch_size: int, like: Tensor) -> None:
        self.device, self.dtype = like.device, like.dtype
        self.loader = data if isinstance(data, DataLoader) else None
        if self.loader is not None:
            if context is not None:
                raise ValueError("A DataLoader yields the context in its batches, as (x, context): leave context out.")
            self.x: Any = None
            self.context: Any = None
            if not hasattr(data.dataset, "__len__"):
                raise TypeError(
                    f"Training wants a dataset with a length, but {type(data.dataset).__name__} has none. Use a map-style "
                    "dataset, or SVI with size=."
                )
            self.rows = len(data.dataset)
        else:
            self.x = self.to(_as_tensor(data))
            self.context = None if context is None else self.to(torch.as_tensor(context))
            self.rows = len(self.x) if self.x.dim() else 0
        if not self.rows:
            found = "no rows" if self.loader is not None or self.x.dim() else f"the single number {self.x.item():g}"
            raise ValueError(f"Training wants data of at least one row, as x and as valid, but found {found}.")
        if self.loader is None and self.context is not None and len(self.context) != self.rows:
            raise ValueError(
                f"There are {self.rows} rows of data but {len(self.context)} of context. Pass one context per row."
            )
        self.count = ceil(self.rows / batch_size)

    def to(self, t: Tensor) -> Tensor:
        """Return the tensor on the device of `like`, and in its precision if it holds floats."""
        return t.to(self.device, self.dtype if t.is_floating_point() else t.dtype, non_blocking=True)

    @property
    def digest(self) -> str | None:
        """Checksum of all rows, by which a resumed run recognises its data. None for a `DataLoader`."""
        if self.loader is not None:
            return None
        parts = [self.x] if self.context is None else [self.x, self.context]
        digest = sha256()
        for t in parts:
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def first(self) -> Batch:
        """Return the first batch in order."""
        return next(self.in_order())

    def head(self, rows: int) -> Tensor:
        """Return all rows of x, or of a `DataLoader` at least this many if it has them."""
        if self.loader is None:
            return self.x
        parts: list[Tensor] = []
        for x, _ in self.in_order():
            parts.append(x)
            if sum(map(len, parts)) >= rows:
                break
        return torch.cat(parts)

    def in_order(self) -> Iterator[Batch]:
        """Return the batches of all rows in order."""
        return self._in_batches(torch.arange(self.rows))

    def shuffled(self) -> Iterator[Batch]:
        """Return the batches of all rows, after shuffling the rows. A `DataLoader` shuffles only if it was built to."""
        return self._in_batches(torch.randperm(self.rows))

    def _in_batches(self, order: Tensor) -> Iterator[Batch]:
        """Yield the rows of the given numbers in batches."""
        if self.loader is not None:
            for batch in self.loader:
                x, context = pair_of(batch)
                yield self.to(x), None if context is None else self.to(context)
            return
        for rows in order.to(self.device).tensor_split(self.count):
            yield self.x[rows], None if self.context is None else self.context[rows]


def _as_tensor(data: Any) -> Tensor:
    """Return rows as a tensor."""
    try:
        return torch.as_tensor(data)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # a data frame raises KeyError
        raise TypeError(
            f"Training wants data as a tensor, an array or a DataLoader, but found {type(data).__name__}. Convert a data frame "
            "with torch.as_tensor(frame.to_numpy())."
        ) from error


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Return (x, context) from x, [x] or [x, context]. The context is None where there is none."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if not 1 <= len(batch) <= 2:
        raise ValueError(f"A batch wants x or (x, context), but found {len(batch)} parts. Combine them in the dataset.")
    return batch[0], batch[1] if len(batch) == 2 else None
