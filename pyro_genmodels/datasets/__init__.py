"""Data sets by name, and files of the user's own, split by a seed into rows to train on, to validate on and to judge by."""

from pyro_genmodels.datasets.dataset import Dataset
from pyro_genmodels.datasets.loading import load, rows
from pyro_genmodels.datasets.named import DATASETS, digits
from pyro_genmodels.datasets.plane import checkerboard, grid, moons, pinwheel, ring

__all__ = ["DATASETS", "Dataset", "checkerboard", "digits", "grid", "load", "moons", "pinwheel", "ring", "rows"]
