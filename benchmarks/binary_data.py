"""Data sets of zeros and ones, from files of packed bits that are not part of the package: see --data-dir."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

DataDir = Annotated[Path | None, typer.Option(envvar="PYRO_GENMODELS_DATA", help="Folder with the data sets.")]


def binary(data_dir: Path | None, file: str, prefix: str = "") -> dict[str, Tensor]:
    """Return the rows of train, valid and test from a file of packed bits."""
    path = None if data_dir is None else data_dir / file
    if path is None or not path.exists():
        typer.echo(f"skipped: the file {path or file} does not exist; set --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    z = np.load(path)
    columns = int(z[f"{prefix}d"].item()) if f"{prefix}d" in z else 784
    parts = ("train", "valid", "test")
    return {part: torch.from_numpy(np.unpackbits(z[prefix + part], axis=1)[:, :columns]).float() for part in parts}
