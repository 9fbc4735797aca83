"""Arguments of a model. Those with one row per datum are cut along with the data."""

from __future__ import annotations

__all__ = ["RowArguments"]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RowArguments:
    """Arguments of a call of a model.

    Attributes:
        args: positional arguments; the first is the data, (N, ...).
        kwargs: keyword arguments.
    """

    args: tuple
    kwargs: dict[str, Any]

    @property
    def num_rows(self) -> int:
        """N, the number of rows of the data."""
        return len(self.args[0])

    def take(self, rows: slice | Tensor) -> RowArguments:
        """Return the arguments with only these rows of every tensor that has N of them.

        Args:
            rows: slice, or indices (n,).

        Example:
            >>> import torch
            >>> RowArguments((torch.arange(3), torch.tensor([5.0, 6.0])), {"context": torch.zeros(3, 1)}).take(slice(0, 1))
            RowArguments(args=(tensor([0]), tensor([5., 6.])), kwargs={'context': tensor([[0.]])})
        """

        def cut(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == self.num_rows else value

        return RowArguments(tuple(map(cut, self.args)), {name: cut(value) for name, value in self.kwargs.items()})

    def batches(self, size: int) -> Iterator[RowArguments]:
        """Yield the arguments of consecutive batches of at most `size` rows."""
        for start in range(0, self.num_rows, size):
            yield self.take(slice(start, start + size))
