"""What the command line runs: how each family is built, trained and judged on each kind of data."""

from __future__ import annotations

__all__ = ["FAMILIES", "Recipe", "Source", "draw", "evaluate", "fit", "notes_of", "restored", "rows_of"]

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_genmodels import checkpoints
from pyro_genmodels.datasets import DATASETS, Dataset, load, rows
from pyro_genmodels.errors import unknown
from pyro_genmodels.evaluation import LogLikelihood, log_likelihood
from pyro_genmodels.families import NSF, VAE, Autoregressive, Bernoulli, DiscretizedLogistic, Family, Flow, Labels, Normal
from pyro_genmodels.training import Fit, train


@dataclass(frozen=True)
class Recipe:
    """A family for a kind of data.

    Attributes:
        build: data set, context -> family.
        learning_rate: Adam's.
    """

    build: Callable[[Dataset, Any], Family]
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Source:
    """Where data come from, as a checkpoint remembers it.

    Attributes:
        data: name of a data set, or path of a file.
        columns: of a file, that make x.
        labels: of classes to condition on: a column or array of a file; "label" of a named data set.
        levels: of the integers of a file.
        seed: of the draws or the split.
    """

    data: str
    columns: list[str] | None = None
    labels: str | None = None
    levels: int | None = None
    seed: int = 0

    def load(self) -> Dataset:
        """The data set.

        Raises:
            ValueError: see `pyro_genmodels.datasets.load`.
        """
        named = self.data in DATASETS
        if named and self.labels not in (None, "label"):
            raise unknown(f"labels of {self.data}", str(self.labels), ["label"])
        labels = None if named else self.labels
        return load(self.data, seed=self.seed, columns=self.columns, labels=labels, levels=self.levels)


def _flow(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        transform = NSF(transforms=2, hidden=(256, 256), dropout=0.2, randperm=True)
        return Flow(event_shape, context=context, levels=data.levels, transform=transform)
    return Flow(event_shape, context=context, transform=NSF(transforms=3, bins=16))


def _vae(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        likelihood = Bernoulli() if data.levels == 2 else DiscretizedLogistic(data.levels, components=3)
        return VAE(event_shape, context=context, latent_dim=16, likelihood=likelihood, hidden=(256, 256), dropout=0.1)
    latent_dim = min(16, max(2, event_shape.numel() // 2))
    return VAE(event_shape, context=context, latent_dim=latent_dim, likelihood=Normal(), hidden=(256, 256))


def _autoregressive(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        likelihood = Bernoulli() if data.levels == 2 else DiscretizedLogistic(data.levels)
        return Autoregressive(event_shape, context=context, likelihood=likelihood, hidden=(1024,), dropout=0.5)
    return Autoregressive(event_shape, context=context, likelihood=Normal(components=10), hidden=(256, 256))


FAMILIES: Mapping[str, Recipe] = {
    "flow": Recipe(_flow, learning_rate=2e-3),
    "vae": Recipe(_vae),
    "autoregressive": Recipe(_autoregressive),
}
"""What the command line knows by name."""


def fit(
    name: str,
    source: Source,
    data: Dataset,
    checkpoint: Path,
    *,
    device: str,
    epochs: int,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    patience: int = 25,
    progress: bool = True,
    resume: bool = False,
) -> Fit:
    """Builds and trains the family of that name, its best state kept at `checkpoint`."""
    recipe, discrete = FAMILIES[name], bool(data.levels)
    settings: dict[str, Any] = {
        "batch_size": batch_size or (64 if discrete else 256),
        "learning_rate": learning_rate or recipe.learning_rate,
        "patience": patience,
    }
    notes = {"family": name, "source": asdict(source), "columns": data.columns, "levels": data.levels, **settings}
    pyro.set_rng_seed(source.seed)
    context = Labels(data.num_classes or 1) if source.labels else 0
    family = recipe.build(data, context)
    family.name = name
    train_labels, valid_labels = (data.train_labels, data.valid_labels) if source.labels else (None, None)
    return train(
        family.to(device),
        (data.train, train_labels),
        valid=(data.valid, valid_labels),
        optim=partial(torch.optim.Adam, lr=settings["learning_rate"]),
        epochs=epochs,
        batch_size=settings["batch_size"],
        patience=patience,
        average=0.99,
        checkpoint=checkpoint,
        resume=resume,
        notes=notes,
        seed=source.seed,
        progress=progress,
    )


def evaluate(family: Any, x: Tensor, labels: Tensor | None, *, num_samples: int = 512) -> LogLikelihood:
    """The log-likelihood of rows, given their labels if the family wants them.

    Raises:
        ValueError: if the rows are not data of this family.
    """
    family = family.family if isinstance(family, Fit) else family
    device = family.loc.device
    family.check(x.to(device))
    if family.context is not None and labels is None:
        raise ValueError("the model was fitted with labels, but these rows have none: say --labels, the name of their column")
    context = () if family.context is None or labels is None else (labels.to(device),)
    return log_likelihood(family, x.to(device), *context, num_samples=num_samples)


def rows_of(source: Source, notes: Mapping[str, Any], split: str | None) -> tuple[Tensor, Tensor | None, str]:
    """Rows to judge a checkpoint by, their labels, and a name for them.

    Args:
        source: of the rows.
        notes: of the checkpoint.
        split: train, valid, test or all; by default test of the checkpoint's own data, and all of other data.

    Raises:
        ValueError: if the source cannot be read or is of other labels or levels.
    """
    own = source.data == notes["source"]["data"]
    split = split or ("test" if own or source.data in DATASETS else "all")
    name = f"{Path(source.data).name} ({split})"
    if source.data not in DATASETS and split == "all":
        x, y = rows(source.data, columns=source.columns, labels=source.labels, levels=notes["levels"])
        return x, y, name
    data = source.load()
    parts = ("train", "valid", "test") if split == "all" else (split,)
    x = torch.cat([getattr(data, part) for part in parts])
    return x, torch.cat([getattr(data, f"{part}_labels") for part in parts]) if source.labels else None, name


def draw(family: Any, n: int, labels: Tensor | None = None, *, at_once: int = 1000) -> Tensor:
    """Draws, (n, *event_shape), given labels (n,) if the family wants them."""
    family = family.family if isinstance(family, Fit) else family
    parts = []
    with torch.no_grad():
        for start in range(0, n, at_once):
            count = min(at_once, n - start)
            context = None if labels is None else labels[start : start + count].to(family.loc.device)
            parts.append(family().sample((count,)) if context is None else family(context).sample())
    return torch.cat(parts).cpu()


def notes_of(record: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """What `fit` wrote beside the parameters.

    Raises:
        ValueError: if the checkpoint is not of the command line.
    """
    notes = record.get("notes")
    if not isinstance(notes, Mapping) or "source" not in notes:
        raise ValueError(f"{path} was not written by the command line, so its data are not known. Say --data.")
    return notes


def restored(path: Path, *, device: str) -> tuple[Family, Mapping[str, Any]]:
    """The family of a checkpoint on a device, and its record."""
    _, record = checkpoints.read(path)
    return checkpoints.load(path).to(device), record
