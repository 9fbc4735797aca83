"""Runs of benchmarks that are resumed from their checkpoints."""

from pathlib import Path

from pyro_genmodels.training import Checkpoint


def resumable(file: Path) -> Checkpoint:
    """Return a checkpoint from which a run is resumed, if there is one already."""
    return Checkpoint(file, resume=file.with_name(f"{file.name}.training.safetensors").exists())
