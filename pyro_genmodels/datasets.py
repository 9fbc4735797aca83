"""Named data sets, split once and for all by a seed."""

from __future__ import annotations

__all__ = ["DATASETS", "Dataset", "digits"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Rows for training, for validation and for the final judgement, with their labels.

    Attributes:
        name: the data set's.
        train: (N, *event_shape), like valid and test.
        train_labels: (N,), like valid_labels and test_labels.
        levels: number of integer levels of a coordinate, 0 .. levels - 1.
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    train_labels: Tensor
    valid_labels: Tensor
    test_labels: Tensor
    levels: int


def digits(seed: int = 0) -> Dataset:
    """Scikit-learn's bundled digits: 1797 images of 8 x 8 pixels, 17 levels, labels 0 to 9; 1437 / 180 / 180 rows.

    Args:
        seed: of the permutation that splits them.

    Raises:
        ImportError: without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The digits need scikit-learn: pip install 'pyro-genmodels[eval]'.") from error
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.images))
    x, labels = (torch.as_tensor(a[order]).long() for a in (bunch.images, bunch.target))
    (train, valid, test), labels = x.split([1437, 180, 180]), labels.split([1437, 180, 180])
    return Dataset("digits", train, valid, test, *labels, levels=17)


DATASETS: Mapping[str, Callable[[int], Dataset]] = {"digits": digits}
"""What the command line knows by name: seed -> data set."""
