"""Notes of the command line in a checkpoint: the source of its data, its settings, and rows to evaluate it on."""

from __future__ import annotations

__all__ = ["DataSource", "Notes", "Rows", "read_notes", "rows_of", "saved_run", "source_of"]

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.cli.options import FAMILIES, split_names
from pyro_genmodels.datasets import DATASETS, Dataset, load, load_rows
from pyro_genmodels.training import checkpoints
from pyro_genmodels.utils.errors import unknown_name
from pyro_genmodels.utils.files import MAX_BYTES


@dataclass(frozen=True)
class DataSource:
    """Source of the data, as it is stored in a checkpoint.

    Attributes:
        data: name of a data set, or path of a file.
        columns: columns of the file that make x.
        labels: name of the classes to condition on: a column or array of the file, or "label" for a data set by name.
        levels: number of integer levels in a file.
        seed: seed of a data set's samples and of the split.
    """

    data: str
    columns: list[str] | None = None
    labels: str | None = None
    levels: int | None = None
    seed: int = 0

    def load(self, max_bytes: int = MAX_BYTES) -> Dataset:
        """Return the data set.

        Args:
            max_bytes: largest size of a file and of the numbers in it.

        Raises:
            ValueError: see `pyro_genmodels.datasets.load`.
        """
        is_named = self.data in DATASETS
        if is_named and self.labels not in (None, "label"):
            raise unknown_name(f"labels of {self.data}", str(self.labels), ["label"])
        labels = None if is_named else self.labels
        return load(self.data, seed=self.seed, columns=self.columns, labels=labels, levels=self.levels, max_bytes=max_bytes)


def source_of(data: str, columns: str | None, labels: str | None, levels: int | None, seed: int) -> DataSource:
    """Return the source that the options of a command describe."""
    data = data if data in DATASETS else str(Path(data).resolve())  # a checkpoint finds it from any folder
    return DataSource(data, split_names(columns), labels, levels, seed)


@dataclass(frozen=True)
class Notes:
    """Notes of the command line in a checkpoint.

    Attributes:
        family: name of the family on the command line.
        source: source of the data; None for a checkpoint made in Python.
        columns: names of the coordinates, if they have names.
        levels: number of integer levels; None for real numbers.
        batch_size: number of rows per step.
        learning_rate: learning rate of Adam.
        patience: number of epochs without a better validation loss after which training stops.
        epochs: largest number of epochs.
    """

    family: str
    source: DataSource | None
    columns: list[str] | None
    levels: int | None
    batch_size: int = 256
    learning_rate: float = 1e-3
    patience: int = 25
    epochs: int = 300


def read_notes(record: Mapping[str, Any]) -> Notes | None:
    """Return the notes of the command line in a checkpoint's record, or None if it has others or none."""
    try:
        fields = dict(record["notes"])
        notes = Notes(**fields | {"source": DataSource(**fields["source"])})
    except (KeyError, TypeError, ValueError):  # a user's own notes
        return None
    return notes if _are_possible(notes) else None


def _are_possible(notes: Notes) -> bool:
    """Return True if notes from a file hold values that the command line could have written."""

    def is_whole(value: Any, low: int, high: int = 2**63) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value < high

    def are_texts(value: Any) -> bool:
        return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))

    source, rate = notes.source, notes.learning_rate
    return (
        isinstance(notes.family, str)
        and notes.family in FAMILIES
        and source is not None
        and isinstance(source.data, str)
        and "\0" not in source.data
        and are_texts(source.columns)
        and are_texts(notes.columns)
        and (source.labels is None or isinstance(source.labels, str))
        and (source.levels is None or is_whole(source.levels, 0))
        and (notes.levels is None or is_whole(notes.levels, 2))
        and is_whole(source.seed, 0, 2**32)
        and all(is_whole(number, 1) for number in (notes.batch_size, notes.patience, notes.epochs))
        and isinstance(rate, float | int)
        and not isinstance(rate, bool)
        and 0 < rate < float("inf")
    )


def saved_run(checkpoint: Path, data: str | None) -> tuple[str, DataSource, dict[str, Any], Path, int]:
    """Return the family, data source and settings of a run to continue, its path without suffix, and its number of epochs."""
    path = checkpoints.tensors_of(checkpoint)
    path = path.with_name(path.name.removesuffix(".training.safetensors").removesuffix(".safetensors") + ".safetensors")
    run = path.with_name(path.stem + ".training.safetensors")
    record = checkpoints.read_record(run) if run.is_file() else checkpoints.read(path)[1]
    notes = read_notes(record)
    if notes is None or notes.source is None:
        raise ValueError(
            f"{path} was not written by the command line: continue in Python, by train(..., "
            "checkpoint=Checkpoint(path, resume=True))"
        )
    settings = {name: getattr(notes, name) for name in ("batch_size", "learning_rate", "patience", "epochs")}
    source = notes.source if data is None else replace(notes.source, data=data)
    return notes.family, source, settings, path.with_suffix(""), len(record.get("history", []))


@dataclass(frozen=True)
class Rows:
    """Rows to evaluate a family on.

    Attributes:
        x: the rows, (N, *event_shape).
        labels: their labels, (N,), or None.
        numbers: their numbers in the file or collection that they come from, (N,), counted from 0 and without the header. Rows
            that a data set draws are counted from the first of the split.
        name: name of the data and the split.
    """

    x: Tensor
    labels: Tensor | None
    numbers: Tensor
    name: str


def rows_of(
    notes: Notes,
    *,
    data: str | None,
    columns: list[str] | None,
    labels: str | None,
    split: str | None,
    max_bytes: int = MAX_BYTES,
) -> Rows:
    """Return rows to evaluate a checkpoint on.

    Args:
        notes: notes of the checkpoint.
        data: data set by name, or path of a file; None for the data that the checkpoint was fitted to.
        columns: columns of a file; None for those that the checkpoint was fitted to.
        labels: name of the labels; None for those that the checkpoint was fitted with.
        split: train, valid, test or all. The default is all for another file, and otherwise test.
        max_bytes: largest size of a file and of the numbers in it.

    Raises:
        ValueError: if the rows cannot be read, or have other columns, labels or levels.
    """
    own, wants_labels = notes.source, labels or (notes.source and notes.source.labels)
    if data is None and own is None:
        raise ValueError("the checkpoint was made in Python, so its data are not known: pass --data")
    if own is not None and (data is None or _same_file(data, own.data)):
        source = replace(own, columns=columns or own.columns, labels=labels or own.labels)
        split = split or "test"
    elif data in DATASETS:
        source = DataSource(str(data), columns, "label" if wants_labels else None, seed=own.seed if own else 0)
        split = split or "test"
    else:
        suffix = Path(str(data)).suffix
        if columns is None and suffix in (".csv", ".parquet"):
            columns = notes.columns
        elif columns is None and own is not None and suffix == Path(own.data).suffix == ".npz":
            columns = own.columns
        source = DataSource(str(data), columns, wants_labels or None, notes.levels or 0, seed=own.seed if own else 0)
        split = split or "all"
    name = f"{Path(source.data).name} ({split})"
    if source.data not in DATASETS and split == "all":
        x, y = load_rows(source.data, columns=source.columns, labels=source.labels, levels=notes.levels, max_bytes=max_bytes)
        return Rows(x, y, torch.arange(len(x)), name)
    dataset = source.load(max_bytes)
    names = ("train", "valid", "test")
    parts = [getattr(dataset, part) for part in names]
    wanted = [split in (part, "all") for part in names]
    chosen = torch.cat([torch.full((len(part),), is_wanted) for part, is_wanted in zip(parts, wanted, strict=True)])
    numbers = torch.arange(int(chosen.sum())) if dataset.order is None else dataset.order[chosen]
    y = torch.cat([getattr(dataset, f"{part}_labels") for part in names])[chosen] if source.labels else None
    return Rows(torch.cat(parts)[chosen], y, numbers, name)


def _same_file(a: str, b: str) -> bool:
    """Return True if two names are of the same data set or file."""
    return a == b or (Path(a).exists() and Path(a).resolve() == Path(b).resolve())
