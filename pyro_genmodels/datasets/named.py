"""The data sets that are known by name."""

from __future__ import annotations

__all__ = ["DATASETS", "digits"]

from collections.abc import Callable, Mapping

import numpy as np
import torch

from pyro_genmodels.datasets.dataset import Dataset
from pyro_genmodels.datasets.plane import checkerboard, grid, moons, pinwheel, ring
from pyro_genmodels.utils.errors import import_extra


def digits(seed: int = 0) -> Dataset:
    """Return scikit-learn's digits: 1797 images of 8 x 8 pixels in 17 levels, labels 0 to 9; 1437 / 180 / 180 rows.

    Args:
        seed: seed of the permutation that splits the rows.

    Raises:
        ImportError: without scikit-learn.
    """
    load_digits = import_extra("sklearn.datasets", extra="eval", by="The data set of digits").load_digits
    bunch = load_digits()
    order = np.random.default_rng(seed).permutation(len(bunch.images))
    x, labels = (torch.as_tensor(a[order]).long() for a in (bunch.images, bunch.target))
    sizes = [1437, 180, 180]
    parts = *x.split(sizes), *labels.split(sizes)
    return Dataset("digits", *parts, levels=17, num_classes=10, order=torch.from_numpy(order))


DATASETS: Mapping[str, Callable[[int], Dataset]] = {
    "digits": digits,
    "moons": moons,
    "ring": ring,
    "grid": grid,
    "pinwheel": pinwheel,
    "checkerboard": checkerboard,
}
"""Functions from a seed to a data set, by the name of the data set."""
