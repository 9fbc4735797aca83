"""Vectors of different lengths for each coordinate, such as the outputs for columns of a table, padded to one length."""

from __future__ import annotations

__all__ = ["Padding"]

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Padding(nn.Module):
    """The map between the vectors of d coordinates one after another and the same ones padded with zeros.

    Args:
        lengths: length of the vector of each coordinate.

    Attributes:
        total: sum of the lengths.
        longest: largest length.

    Example:
        >>> padding = Padding([1, 2])
        >>> padding.pad(torch.tensor([5.0, 6.0, 7.0]))
        tensor([[5., 0.],
                [6., 7.]])
        >>> padding.join(torch.tensor([[5.0, 0.0], [6.0, 7.0]]))
        tensor([5., 6., 7.])
    """

    places: Tensor

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__()
        self.lengths, self.total, self.longest = tuple(lengths), sum(lengths), max(lengths)
        self.is_needed = self.total < len(self.lengths) * self.longest
        rows = enumerate(self.lengths) if self.is_needed else ()
        places = [self.longest * i + j for i, length in rows for j in range(length)]
        self.register_buffer("places", torch.tensor(places, dtype=torch.long), persistent=False)

    def pad(self, joined: Tensor) -> Tensor:
        """Return vectors (..., d, longest) of those that are joined, (..., total)."""
        if self.is_needed:
            empty = joined.new_zeros(*joined.shape[:-1], len(self.lengths) * self.longest)
            joined = empty.index_copy(-1, self.places, joined)
        return joined.unflatten(-1, (len(self.lengths), self.longest))

    def join(self, padded: Tensor) -> Tensor:
        """Return the joined vectors (..., total) of those that are padded, (..., d, longest)."""
        flat = padded.flatten(-2)
        return flat.index_select(-1, self.places) if self.is_needed else flat
