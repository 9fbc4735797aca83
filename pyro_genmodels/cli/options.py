"""Options that several commands have, and checks of what they were given.

Nothing heavy is imported with this file, so that ``--help`` is fast.
"""

from __future__ import annotations

__all__ = [
    "DATA",
    "FAMILIES",
    "MAX_SIZE",
    "SPLITS",
    "CheckpointPath",
    "Columns",
    "Compile",
    "Data",
    "Device",
    "Epochs",
    "Force",
    "LabelColumn",
    "Levels",
    "MaxSize",
    "Overwrite",
    "Quiet",
    "Seed",
    "Threads",
    "bytes_of",
    "check_data",
    "check_names",
    "check_no_file",
    "check_unused",
    "complete_names",
    "files_of_runs",
    "is_given",
    "split_names",
]

from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_genmodels.utils.files import MAX_BYTES

FAMILIES = ("flow", "vae", "autoregressive", "energy", "ode_flow", "diffusion", "gan")
DATA = ("digits", "moons", "ring", "grid", "pinwheel", "checkerboard")
SPLITS = ("train", "valid", "test", "all")
MAX_SIZE = MAX_BYTES / 1e9
"""Largest size of a file in GB, by default."""


def complete_names(names: tuple[str, ...]) -> Any:
    """Return a function that completes one of the names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


Data = Annotated[
    str | None,
    typer.Option(
        help=f"A data set ({', '.join(DATA)}), or a .npy, .npz, .csv or .parquet file of rows.",
        autocompletion=complete_names(DATA),
        show_default=False,
    ),
]
Columns = Annotated[
    str | None, typer.Option(help="Columns of the file to model, separated by commas. For .npz: name of the array.")
]
LabelColumn = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="Column of classes 0, 1, ... to condition on. For .npz: name of the array. For a named data set: `label`.",
    ),
]
Levels = Annotated[
    int | None, typer.Option(help="For a file of integers: K for values 0 to K - 1; 0 to model them as real numbers.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the split, of training and of sampling.")]
Device = Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")]
Epochs = Annotated[
    int | None,
    typer.Option(min=1, help="Largest number of passes over the data. Each family has its own default.", show_default=False),
]
MaxSize = Annotated[
    float,
    typer.Option(
        "--max-size",
        min=0,
        help="Largest size of a file that is read, and of the numbers in it, in GB (1e9 bytes).",
        show_default=True,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the training step first, for a minute or two. It pays for runs of more than ten thousand steps, which "
        "then take 0.3 to 0.8 of the time.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of torch. By default 1 for families of less than a million parameters, and one for each core for others.",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an older run in the folder.")]
Overwrite = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no messages about files.")]
CheckpointPath = Annotated[Path, typer.Argument(help="A .safetensors file from `fit` or `compare`.", show_default=False)]


def files_of_runs(out: Path, families: list[str]) -> list[Path]:
    """Return the paths of the checkpoints of families in a folder, and of their runs."""
    return [out / f"{family}{kind}.safetensors" for family in families for kind in ("", ".training")]


def check_unused(paths: list[Path], *, force: bool) -> None:
    """Raise a ValueError if files that a new run would replace exist, unless that is wanted."""
    taken = [path for path in paths if path.exists()]
    if taken and not force:
        runs = [path for path in taken if path.name.endswith(".training.safetensors")]
        cure = f", --resume {runs[0].with_name(runs[0].name.replace('.training.', '.'))} to continue it" if runs else ""
        raise ValueError(f"{taken[0]} is of an older run: pass --force to replace it{cure}, or another folder as --out")


def check_no_file(*paths: Path | None, force: bool) -> None:
    """Raise a ValueError if there is a file that would be overwritten, unless that is wanted."""
    for path in paths:
        if path is not None and path.is_file() and not force:
            raise ValueError(f"{path} exists: pass --force to replace it, or another name")


def bytes_of(max_size: float) -> int:
    """Return a size in GB as a number of bytes."""
    return int(min(max_size * 1e9, 2**62))


def check_data(data: str | None) -> str:
    """Return the name of a data set or the path of a file. Raise a ValueError for anything else."""
    if data is None:
        raise ValueError(f"--data is missing: a data set ({', '.join(DATA)}) or a file of rows, such as --data moons")
    if data not in DATA and not Path(data).suffix and not Path(data).exists():
        check_names("data set", [data], DATA)
    return data


def split_names(columns: str | None) -> list[str] | None:
    """Return the names in a list separated by commas."""
    return None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]


def check_names(kind: str, names: list[str], known: tuple[str, ...]) -> None:
    """Raise a ValueError for a name that is not known."""
    from pyro_genmodels.utils.errors import unknown_name

    for name in names:
        if name not in known:
            raise unknown_name(kind, name, known)


def is_given(context: typer.Context, name: str) -> bool:
    """Return True if the user gave this option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
