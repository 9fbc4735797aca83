"""The record of a data set."""

from __future__ import annotations

__all__ = ["Dataset"]

from dataclasses import dataclass

from pyro.distributions import TorchDistribution
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Rows for training, validation and test.

    Attributes:
        name: name of the data set.
        train: training rows, (N, *event_shape), float32, float64 if float32 would lose digits, or int64 for levels.
        valid: validation rows, likewise.
        test: test rows, likewise.
        train_labels: labels of the training rows, (N,) int64, or None.
        valid_labels: labels of the validation rows, likewise.
        test_labels: labels of the test rows, likewise.
        levels: number of integer levels of one coordinate, 0 .. levels - 1; None for real numbers.
        num_classes: number of classes; labels run from 0 to num_classes - 1.
        columns: names of the coordinates, or None.
        order: number, in the file or collection that the rows come from, of each row for training, then validation, then test,
            counted from 0; None if they were drawn.
        density: distribution that the rows were drawn from, or None if it is not known.
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
    order: Tensor | None = None
    density: TorchDistribution | None = None
