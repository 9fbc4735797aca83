"""Rows of data in a model's arguments: which belong to the rows of its plates, and what a network is given of them."""

from __future__ import annotations

__all__ = ["RowFeatures", "RowPlate", "placed", "rows_of"]

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn


class RowPlate(NamedTuple):
    """A plate over rows of data, as the first run of a model shows it.

    Attributes:
        name: name of the plate.
        dim: its batch dimension, negative.
        full_size: number of its rows.
        size: number of rows that the first run saw.
        chooses: True if it has a ``subsample_size``.
        given: path among the arguments to the indices that are given to it, or None.
        has_all: True if the features of the first run had all rows, of which the plate chose some.
    """

    name: str
    dim: int
    full_size: int
    size: int
    chooses: bool
    given: tuple | None = None
    has_all: bool = False

    def build(self, num_rows: int, leaves: Mapping[tuple, Any]) -> pyro.plate:
        """Return the plate for features of this many rows.

        Args:
            num_rows: number of rows of the features.
            leaves: arguments of the model by their paths.

        Raises:
            ValueError: if there are more rows than the plate has, or fewer than it chooses from.
        """
        if self.given is not None:
            return pyro.plate(self.name, self.full_size, subsample=leaves[self.given], dim=self.dim)
        if not self.chooses:
            return pyro.plate(self.name, num_rows, dim=self.dim)
        if num_rows > self.full_size or (self.has_all and num_rows != self.full_size):
            raise ValueError(
                f"The plate {self.name!r} had {self.full_size} rows when this guide was built, but the features have "
                f"{num_rows}. Build another guide for a plate of another size, and copy its parameters by load_state_dict."
            )
        return pyro.plate(self.name, self.full_size, subsample_size=self.size if self.has_all else num_rows, dim=self.dim)


def rows_of(x: Tensor, plates: Sequence[RowPlate], indices: Sequence[Tensor]) -> Tensor:
    """Return the rows of a tensor that the plates choose.

    Args:
        x: tensor whose first dimensions are the rows of the plates: all of them, or those chosen.
        plates: plates, the outermost first.
        indices: rows that each plate chooses.
    """
    for axis, (plate, index) in enumerate(zip(plates, indices, strict=True)):
        if x.shape[axis] == plate.full_size and (plate.chooses or plate.given is not None):
            x = x if len(index) == plate.full_size and plate.given is None else x.index_select(axis, index.to(x.device))
    return x


def placed(x: Tensor, plates: Sequence[RowPlate]) -> Tensor:
    """Return a tensor, (rows..., ...), with the rows in the batch dimensions of the plates, and with 1 in others between.

    Example:
        >>> placed(torch.zeros(5, 3), [RowPlate("groups", -2, 5, 5, False)]).shape
        torch.Size([5, 1, 3])
    """
    shape = [1] * max((-plate.dim for plate in plates), default=0)
    for axis, plate in enumerate(plates):
        shape[plate.dim] = x.shape[axis]
    return x.reshape(*shape, *x.shape[len(plates) :])


class RowFeatures(nn.Module):
    """Features of rows: standardised, 0 for a missing value, NaN, and an indicator of these for columns that had some.

    Args:
        parts: tensors whose first dimensions are rows, of which mean and deviation are taken.
        num_plates: number of these dimensions.
        like: tensor of the dtype and device of the features.

    Attributes:
        out_features: number of features.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [3.0, float("nan")], [5.0, 2.0]])
        >>> features = RowFeatures([x], 1, torch.zeros(()))
        >>> features([x])
        tensor([[-1.2247, -1.0000,  0.0000],
                [ 0.0000,  0.0000,  1.0000],
                [ 1.2247,  1.0000,  0.0000]])
    """

    loc: Tensor
    scale: Tensor
    incomplete: Tensor

    def __init__(self, parts: Sequence[Tensor], num_plates: int, like: Tensor) -> None:
        super().__init__()
        self.num_plates = num_plates
        x = self._flat(parts, like).flatten(0, num_plates - 1)
        self.register_buffer("loc", x.nanmean(0).nan_to_num())
        scale = (x - self.loc).square().nanmean(0).sqrt().nan_to_num()
        self.register_buffer("scale", torch.where(scale > 0, scale, 1.0))
        self.register_buffer("incomplete", x.isnan().any(0).nonzero()[:, 0])
        self.out_features = x.shape[1] + len(self.incomplete)

    def _flat(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """Return tensors side by side, (rows..., columns)."""
        return torch.cat([part.to(like).flatten(self.num_plates) if part.dim() > self.num_plates else part.to(like)[..., None]
                          for part in parts], -1)  # fmt: skip

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the features of rows, (rows..., out_features)."""
        x = self._flat(parts, self.loc)
        missing = x.isnan()
        values = ((torch.where(missing, self.loc, x)) - self.loc) / self.scale
        return torch.cat([values, missing[..., self.incomplete].to(values)], -1)
