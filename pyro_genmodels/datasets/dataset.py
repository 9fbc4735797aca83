"""What a data set is to the rest of the house."""

from __future__ import annotations

__all__ = ["Dataset"]

from dataclasses import dataclass

from pyro.distributions import TorchDistribution
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Rows for training, for validation and for the final judgement.

    Attributes:
        name: the data set's.
        train: (N, *event_shape), like valid and test; float32 or, of integer levels, int64.
        train_labels: (N,) int64, like valid_labels and test_labels, or None.
        levels: number of integer levels of a coordinate, 0 .. levels - 1; None for real numbers.
        num_classes: labels are below it.
        columns: names of the coordinates.
        density: that the rows were drawn from, where it is known.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    train_labels: Tensor | None = None
    valid_labels: Tensor | None = None
    test_labels: Tensor | None = None
    levels: int | None = None
    num_classes: int | None = None
    columns: tuple[str, ...] | None = None
    density: TorchDistribution | None = None
