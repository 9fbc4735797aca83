"""What the command line runs: how each family is built, trained and judged on each data set, and what is written down."""

from __future__ import annotations

__all__ = ["RECIPES", "Recipe", "judge", "learn", "load", "write"]

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch

from pyro_genmodels import plots
from pyro_genmodels.datasets import DATASETS, Dataset
from pyro_genmodels.evaluation import Comparison, LogLikelihood, compare, log_likelihood
from pyro_genmodels.families import NSF, VAE, Autoregressive, DiscretizedLogistic, Family, Flow
from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.training import Fit, train


@dataclass(frozen=True)
class Recipe:
    """A family for a data set.

    Attributes:
        build: data set -> family.
        learning_rate: Adam's.
        num_samples: k, the draws behind each held-out log-likelihood that is a bound.
    """

    build: Callable[[Dataset], Family]
    learning_rate: float = 1e-3
    num_samples: int = 512


def _flow(data: Dataset) -> Family:
    transform = NSF(transforms=2, hidden=(256, 256), dropout=0.2, randperm=True)
    return Flow(data.train.shape[1:], levels=data.levels, transform=transform)


def _vae(data: Dataset) -> Family:
    likelihood = DiscretizedLogistic(data.levels, components=3)
    return VAE(data.train.shape[1:], latent_dim=16, likelihood=likelihood, hidden=(256, 256), dropout=0.1)


def _autoregressive(data: Dataset) -> Family:
    likelihood = DiscretizedLogistic(data.levels)
    return Autoregressive(data.train.shape[1:], likelihood=likelihood, hidden=(1024,), dropout=0.5)


RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "digits": {
        "flow": Recipe(_flow, learning_rate=2e-3),
        "vae": Recipe(_vae),
        "autoregressive": Recipe(_autoregressive),
    }
}


def load(name: str, seed: int) -> Dataset:
    """The data set of that name, split by that seed."""
    return DATASETS[name](seed)


def learn(recipe: Recipe, data: Dataset, name: str, out: Path, *, seed: int, device: str, epochs: int, progress: bool) -> Fit:
    """Builds and trains a family, its best state kept in `out`."""
    pyro.set_rng_seed(seed)
    family = recipe.build(data)
    family.name = name
    return train(
        family.to(device),
        data.train,
        valid=data.valid,
        optim=partial(torch.optim.Adam, lr=recipe.learning_rate),
        epochs=epochs,
        batch_size=64,
        patience=25,
        average=0.99,
        checkpoint=out / name,
        seed=seed,
        progress=progress,
    )


def judge(recipe: Recipe, fit: Fit, data: Dataset, *, device: str) -> LogLikelihood:
    """The held-out log-likelihood."""
    return log_likelihood(fit, data.test.to(device), num_samples=recipe.num_samples)


def write(
    data: Dataset, fits: Mapping[str, Fit], judged: Mapping[str, LogLikelihood], out: Path, arguments: Mapping[str, Any]
) -> Comparison:
    """Writes table, pictures, ArviZ files and the record of the run, and returns the comparison."""
    comparison = compare(judged, data.test)
    table = comparison.table
    table.index.name = "family"
    table["seconds"] = [round(fits[name].history[-1]["seconds"], 1) for name in table.index]
    table["se"] /= len(data.test)
    columns = ["kind", "num_samples", "nats", "se", "bits_per_dim", "seconds", "elpd", "elpd_diff", "dse", "weight"]
    table[columns].to_csv(out / "table.csv", float_format="%.6g")
    picture: Any = comparison.plot().figure
    picture.savefig(out / "compare.png", dpi=120)
    plots.loss_curves({name: fit.history for name, fit in fits.items()}).savefig(out / "loss.png", dpi=120)
    panels = {"held-out images": data.test[:40]}
    for name, fit in fits.items():
        draws = to_arviz(fit.family, num_samples=100)
        draws.to_netcdf(str(out / f"{name}.nc"))
        images = torch.as_tensor(draws["posterior_predictive"]["x"].to_numpy()[0])
        plots.image_grids({name: images}).savefig(out / f"samples_{name}.png", dpi=120)
        panels[name] = images[:40]
    plots.image_grids(panels).savefig(out / "samples.png", dpi=120)
    packages = ("pyro-genmodels", "pyro-ppl", "torch", "zuko", "arviz", "numpy", "scikit-learn")
    record = {
        "arguments": dict(arguments),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "threads": torch.get_num_threads(),
        "fits": {name: {"best": fit.best, "stopped": fit.stopped} for name, fit in fits.items()},
    }
    (out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    return comparison
