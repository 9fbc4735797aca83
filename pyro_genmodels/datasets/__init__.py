"""Data sets by name or from files, split at random into rows for training, validation and test."""

from pyro_genmodels.datasets.columns import Table
from pyro_genmodels.datasets.dataset import Dataset
from pyro_genmodels.datasets.loading import load, load_rows
from pyro_genmodels.datasets.named import DATASETS, digits
from pyro_genmodels.datasets.opening import stream
from pyro_genmodels.datasets.plane import checkerboard, grid, moons, pinwheel, ring
from pyro_genmodels.datasets.streams import RowStream
from pyro_genmodels.datasets.tables import read_table
from pyro_genmodels.utils.errors import suggest_names

__all__ = [
    "DATASETS",
    "Dataset",
    "RowStream",
    "Table",
    "checkerboard",
    "digits",
    "grid",
    "load",
    "load_rows",
    "moons",
    "pinwheel",
    "read_table",
    "ring",
    "stream",
]  # fmt: skip

suggest_names(__name__)
