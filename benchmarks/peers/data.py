"""Data and sizes of the benchmarks, made by NumPy alone, so that both processes of `benchmarks/speed` have the same."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

FLOW_FEATURES, FLOW_TRANSFORMS, FLOW_HIDDEN, FLOW_BINS, FLOW_BATCH = 8, 5, 128, 8, 512
LANGEVIN = {"10,000 in 2-D": (10_000, 2, 10), "200 in 2-D": (200, 2, 50), "64 in 784-D": (64, 784, 50)}
LANGEVIN_HIDDEN, LANGEVIN_STEP_SIZE = 128, 0.01
GROUPS = 50


def eight_schools() -> tuple[Array, Array]:
    """Return the effects and their standard errors of the eight schools (Rubin 1981), (8,) each."""
    effects = np.array([28, 8, -3, 7, -1, 1, 18, 12], np.float32)
    return effects, np.array([15, 10, 16, 11, 9, 11, 10, 18], np.float32)


def hierarchical(rows: int = 1000) -> tuple[Array, NDArray[np.int64], Array]:
    """Return a covariate, the group of each row and the outcome, (rows,) each: an intercept and a slope for each group."""
    random = np.random.default_rng(0)
    group = np.arange(rows) % GROUPS
    x = random.normal(size=rows)
    intercept, slope = random.normal(1, 0.5, GROUPS), random.normal(-1, 0.3, GROUPS)
    y = intercept[group] + slope[group] * x + random.normal(0, 0.5, rows)
    return x.astype(np.float32), group, y.astype(np.float32)


def logistic(rows: int = 10_000, columns: int = 20) -> tuple[Array, Array]:
    """Return covariates (rows, columns) and binary outcomes (rows,)."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, columns))
    chance = 1 / (1 + np.exp(-x @ random.normal(size=columns) / columns**0.5))
    return x.astype(np.float32), (random.random(rows) < chance).astype(np.float32)


def gaussian_process() -> tuple[Array, Array]:
    """Return inputs and outputs, (11,) each, of `gp_pois_regr-gp_regr` of posteriordb.

    Raises:
        FileNotFoundError: The folder PYRO_GENMODELS_DATA does not hold them; they are not part of the package.
    """
    folder = os.environ.get("PYRO_GENMODELS_DATA")
    path = Path(folder or "") / "posteriordb" / "gp_pois_regr.data.json.zip"
    if folder is None or not path.exists():
        raise FileNotFoundError(
            f"{path if folder else 'gp_pois_regr.data.json.zip of posteriordb'} does not exist; "
            "set --data-dir or PYRO_GENMODELS_DATA to the folder that holds posteriordb/"
        )
    with zipfile.ZipFile(path) as file:
        data = json.loads(file.read(file.namelist()[0]))
    return np.array(data["x"], np.float32), np.array(data["y"], np.float32)
