"""Samples and log-likelihoods that the command line writes to folders, or of rows that it reads batch by batch."""

from __future__ import annotations

__all__ = ["check_folder", "draw_to_folder", "evaluate_stream", "is_folder"]

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_genmodels.cli.notes import Notes
from pyro_genmodels.cli.options import DATA
from pyro_genmodels.cli.reports import coarse_columns, column_names, label_name
from pyro_genmodels.datasets import stream
from pyro_genmodels.evaluation import Output, has_likelihood, log_likelihood
from pyro_genmodels.inference_data import sample_to
from pyro_genmodels.utils.parts import was_written_by_a_run

MAX_IN_ONE_FILE = 1_000_000
"""Largest number of samples that a single .parquet file gets; more go to a folder of such files."""


def is_folder(out: Path, num_samples: int) -> bool:
    """Return True if samples are written to a folder, in bounded memory."""
    return out.suffix == ".zarr" or (out.suffix == ".parquet" and num_samples > MAX_IN_ONE_FILE)


def check_folder(out: Path, *, resume: bool, force: bool) -> None:
    """Raise a ValueError if a folder exists that is neither to be resumed nor to be replaced; remove one that is.

    Only a folder that a run has written is removed.
    """
    if not out.exists() or (resume and out.is_dir()):
        return
    if not force:
        raise ValueError(f"{out} exists: pass --resume to go on with it, --force to replace it, or another name")
    if out.is_file():
        out.unlink()
    elif was_written_by_a_run(out):
        shutil.rmtree(out)
    else:
        raise ValueError(f"{out} is a folder that no run has written, and is not replaced: pass another name")


def draw_to_folder(family: Any, num_samples: int, labels: Tensor | None, out: Output, notes: Notes, *, progress: bool) -> str:
    """Write samples to a folder, and return a text about columns that float32 rounds, or "" without any.

    Args:
        family: the family.
        num_samples: number of samples.
        labels: labels that are taken in turn, or None.
        out: the folder.
        notes: notes of the checkpoint, with the names of the columns.
        progress: True to show a progress bar.
    """
    size = family.event_shape.numel()
    columns = column_names(notes, size) if Path(out.path).suffix == ".parquet" else None
    options: dict[str, Any] = {"columns": columns, "label": label_name(notes), "progress": progress}
    sample_to(family, num_samples, out, context=labels, **options)
    few = family() if labels is None else family(labels[:1].expand(100).to(family.loc.device))
    return coarse_columns(few.sample((100,) if labels is None else ()).detach().cpu(), notes)


def evaluate_stream(
    family: Any,
    notes: Notes,
    data: str | None,
    *,
    columns: list[str] | None,
    labels: str | None,
    split: str | None,
    num_samples: int,
    out: Output | None,
) -> str:
    """Return the log-likelihood of the rows of a file or folder in words; they are read batch by batch.

    Args:
        family: the family.
        notes: notes of its checkpoint.
        data: a .parquet or .npy file, or a folder of them.
        columns: columns of the data; None for those that the checkpoint was fitted to.
        labels: column of labels; None for that which the checkpoint was fitted with.
        split: part of the data, of which there is only "all".
        num_samples: samples per row for a bound or an estimate.
        out: folder for the values, or None.

    Raises:
        ValueError: if there is no such file, it is a split, or the family has no likelihood.
    """
    if data is None or data in DATA:
        raise ValueError("rows are read batch by batch from a .parquet or .npy file, or a folder of them: pass it as --data")
    if split not in (None, "all"):
        raise ValueError(f"rows that are read batch by batch are not split: leave --split {split} out")
    own = notes.source.labels if notes.source is not None else None
    by_name = Path(data).suffix != ".npy" and (columns or notes.columns)
    label = (labels or own) if family.context is not None else None
    rows = stream(data, columns=by_name or None, context=label)
    first = next(rows.batches(1))
    first = first if isinstance(first, tuple) else (first,)
    family.validate(first[0].to(family.loc.device))
    if not has_likelihood(family, *(part.to(family.loc.device) for part in first)):
        raise ValueError("this family has no likelihood, and its samples are compared with rows in memory only")
    found = log_likelihood(family, rows, num_samples=num_samples, out=out, progress=True)
    bits = f"; {found.bits_per_dim(first[0][0].numel()):.3f} bits per dimension" if notes.levels else ""
    return f"{found}{bits}"
