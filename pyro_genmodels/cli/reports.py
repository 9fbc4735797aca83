"""Output files of the command line: samples, plots, tables, and the record of a run.

A file is written completely or not at all.
"""

from __future__ import annotations

__all__ = [
    "check_picture",
    "check_rows",
    "coarse_columns",
    "column_names",
    "label_name",
    "plot_fits",
    "save_figure",
    "save_rows",
    "write",
]

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_genmodels import __version__
from pyro_genmodels.cli.notes import Notes
from pyro_genmodels.cli.recipes import draw, evaluate, sample_quality_of
from pyro_genmodels.datasets import Dataset
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.processes import along
from pyro_genmodels.evaluation import Comparison, LogLikelihood, compare, plots
from pyro_genmodels.families import EnergyModel, Family
from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.training import Fit
from pyro_genmodels.utils.errors import import_extra, listed, unknown_name
from pyro_genmodels.utils.files import atomic_write

FRAMES = 6
"""Number of frames of a trajectory from noise to data."""
SAMPLES_IN_PLANE = 2000
"""Number of plotted samples in the plane."""
SAMPLES_IN_PLANE_OF_CHAINS = 500
"""The same for families that sample by Markov chains, which take longer."""
IMAGES = 100
"""Number of plotted images."""


def check_rows(path: Path) -> None:
    """Raise a ValueError if `save_rows` cannot write a file of that name."""
    if path.suffix not in (".npy", ".npz", ".csv", ".parquet"):
        raise unknown_name("kind of file", path.suffix or path.name, [".npy", ".npz", ".csv", ".parquet"])
    if path.suffix == ".parquet":
        import_extra("pyarrow.parquet", extra="parquet", by="A .parquet file")


def save_rows(path: Path, x: Tensor, labels: Tensor | None, notes: Notes) -> None:
    """Write rows to a .npy, .npz, .csv or .parquet file, with the column names of the data that the family was fitted to.

    Raises:
        ValueError: for another suffix.
        OSError: if the file cannot be written.
    """
    import pandas as pd

    check_rows(path)
    source, label = notes.source, label_name(notes)
    array = x.numpy()
    with atomic_write(path) as part:
        if path.suffix == ".npy":
            np.save(part, array)
        elif path.suffix == ".npz":
            names = source.columns if source is not None and Path(source.data).suffix == ".npz" else None
            arrays: Any = {(names or ["x"])[0]: array} | ({} if labels is None else {label: labels.numpy()})
            np.savez_compressed(part, **arrays)
        else:
            flat = array.reshape(len(array), -1)
            table = pd.DataFrame(flat, columns=column_names(notes, flat.shape[1]))
            if labels is not None:
                table[label] = labels.numpy()
            if path.suffix == ".csv":  # a header of numbers would be read as a row
                table.to_csv(part, index=False, header=not all(str(name).isdecimal() for name in table.columns))
            else:
                table.to_parquet(part, index=False)


def label_name(notes: Notes) -> str:
    """Return the name of the labels that a family was fitted with, or "label"."""
    return "label" if notes.source is None or notes.source.labels is None else notes.source.labels


def column_names(notes: Notes, count: int) -> list[str]:
    """Return the names of the columns that a family was fitted to, or x0, x1, ... if they have no names."""
    return notes.columns if notes.columns and len(notes.columns) == count else [f"x{i}" for i in range(count)]


def coarse_columns(x: Tensor, notes: Notes) -> str:
    """Return a text about columns of numbers so large that float32 rounds them by steps above 1, or "" without any."""
    if x.dtype != torch.float32:
        return ""
    largest = x.abs().reshape(len(x), -1).amax(0)
    steps = (torch.nextafter(largest, largest.new_tensor(torch.inf)) - largest).tolist()
    named = zip(column_names(notes, len(steps)), steps, strict=True)
    found = [f"those of {name} are {step:g} apart" for name, step in named if step > 1]
    return listed(found) if found else ""


# Plots.


def plot_fits(fits: Mapping[str, Fit], data: Dataset, out: Path, *, conditional: bool, seed: int = 0, suffix: str = "") -> None:
    """Plot the training, and for images and points in the plane what the fits have learned.

    Writes ``loss.png``, with a panel for each unit of the losses; ``samples.png``; for points in the plane ``density.png``, and
    ``energy.png`` for energies; and for diffusions and ODE flows ``trajectory.png``, from noise to data. For several fits to
    images, also the samples of each.

    Args:
        fits: name -> fit.
        data: the data that they were fitted to.
        out: folder.
        conditional: True if the fits have labels as context.
        seed: seed of the samples.
        suffix: suffix of the file names.
    """
    histories, units = {name: fit.history for name, fit in fits.items()}, {name: fit.units for name, fit in fits.items()}
    save_figure(plots.loss_curves(histories, units), out / f"loss{suffix}.png")
    pyro.set_rng_seed(seed)
    plane, images = data.train.shape[1:] == (2,) and not data.levels, data.train.dim() == 3
    if not (plane or images):
        return
    samples = {name: _samples(fit, data, conditional=conditional) for name, fit in fits.items()}
    panels = {f"held-out {data.name}": data.test[: SAMPLES_IN_PLANE if plane else IMAGES], **samples}
    if images:
        save_figure(plots.image_grids({name: shown[:40] for name, shown in panels.items()}), out / f"samples{suffix}.png")
        for name in fits if not suffix else ():
            save_figure(plots.image_grids({name: samples[name]}), out / f"samples_{name}.png")
    else:
        save_figure(plots.scatters(panels), out / f"samples{suffix}.png")
    trajectories = {name: _trajectory(fit, 500 if plane else 8, conditional=conditional) for name, fit in fits.items()}
    known = {name: pair for name, pair in trajectories.items() if pair is not None}
    if known and images:
        low, high = data.test.min().item(), data.test.max().item()
        strips = {name: frames.clamp(low, high).transpose(0, 1).flatten(0, 1) for name, (frames, _) in known.items()}
        save_figure(plots.image_grids(strips, columns=FRAMES), out / f"trajectory{suffix}.png")
    elif known:
        panels_of_velocity = {name: panel for name, (_, panel) in known.items()}
        save_figure(plots.velocity_fields(panels_of_velocity), out / f"trajectory{suffix}.png")
    if plane:
        _plot_densities(fits, data, out, conditional=conditional, suffix=suffix)


def _samples(fit: Fit, data: Dataset, *, conditional: bool) -> Tensor:
    """Return samples to plot, given the labels of the held-out data."""
    num_samples = IMAGES if data.train.dim() == 3 else SAMPLES_IN_PLANE
    if data.train.dim() == 2 and isinstance(fit.family, EnergyModel):
        num_samples = SAMPLES_IN_PLANE_OF_CHAINS
    labels = data.test_labels[torch.arange(num_samples) % len(data.test)] if conditional else None  # type: ignore[index]
    return draw(fit, num_samples, labels)


def _plot_densities(fits: Mapping[str, Fit], data: Dataset, out: Path, *, conditional: bool, suffix: str) -> None:
    """Plot the densities over the plane of fits that have one, and the energies of those that have one."""
    low, high = plots.plot_limits(data.test)
    points = plots.lattice(low, high, 100)
    densities = {} if data.density is None else {f"{data.name} itself": data.density.log_prob(points)}
    densities |= {name: _log_density(fit, points, data, conditional=conditional) for name, fit in fits.items()}
    densities = {name: log_p for name, log_p in densities.items() if not log_p.isnan().all()}
    if densities:
        save_figure(plots.densities(densities, low, high), out / f"density{suffix}.png")
    energies = {title: e for name, fit in fits.items() for title, e in _energies(name, fit, points, data).items()}
    if energies:
        save_figure(plots.surfaces(energies, low, high), out / f"energy{suffix}.png")


def check_picture(family: Family, path: Path) -> None:
    """Raise a ValueError if samples of the family cannot be plotted, or not to a file of that name."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise unknown_name("kind of plot", path.suffix or path.name, [".png", ".pdf", ".svg"])
    shape = tuple(family.event_shape)
    if len(shape) != 2 and shape != (2,):
        raise ValueError(f"--picture plots images and points in the plane, but not data of shape {shape}: leave it out")


def _log_density(family: Any, points: Tensor, data: Dataset, *, conditional: bool) -> Tensor:
    """Return the log density at points, (N,), marginal over the labels as frequent as in the data."""
    if not conditional or data.train_labels is None or data.num_classes is None:
        return evaluate(family, points, None, num_samples=128).values.cpu()
    share = torch.bincount(data.train_labels, minlength=data.num_classes) / len(data.train_labels)
    parts = [
        evaluate(family, points, torch.full((len(points),), label), num_samples=128).values.cpu() + share[label].log()
        for label in share.nonzero().flatten().tolist()
    ]
    return torch.stack(parts).logsumexp(0)


def _energies(name: str, fit: Fit, points: Tensor, data: Dataset) -> dict[str, Tensor]:
    """Return title -> energies at points, (N,), for each of the first five labels if there are labels; {} without energies."""
    family = fit.family
    labels = [None] if family.context is None else list(range(min(data.num_classes or 1, 5)))
    points, energies = points.to(family.loc.device), {}
    with torch.no_grad():
        for label in labels:
            dist = family() if label is None else family(torch.full((len(points),), label, device=points.device))
            if dist.intractable:
                title = name if label is None else f"{name}, label {label}"
                energies[title] = -dist.unnormalized_log_prob(points).cpu()
    return energies


def _trajectory(fit: Fit, num_samples: int, *, conditional: bool) -> tuple[Tensor, plots.VelocityPanel] | None:
    """Return samples on their way from noise to data, for families that have a velocity.

    Returns:
        Frames in the units of the data, and the same in those of the network with the velocity. Those of a diffusion are scaled
        as on straight lines from noise to data.
    """
    family = fit.family
    labels = torch.zeros(num_samples, dtype=torch.long, device=family.loc.device) if conditional else None
    dist = family(labels)
    dist = dist.base if dist.is_dequantized else dist
    if not capabilities(dist).has_velocity:
        return None
    trajectory = dist.trajectory(() if conditional else (num_samples,), num_frames=FRAMES)
    times, frames = trajectory.times, trajectory.frames
    if dist.has_noise_error:
        alpha, sigma = dist.denoiser.process.alpha(times), dist.denoiser.process.sigma(times)
        times, frames = alpha / (alpha + sigma), frames / along(alpha + sigma, frames)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        context = None if dist.context is None else dist.context[:1].expand(len(x), -1)
        with torch.no_grad():
            return dist.velocity(x, t, context)

    return dist.pretransform.inv(frames) if dist.pretransform else frames, plots.VelocityPanel(times, frames, velocity)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def write(
    fits: Mapping[str, Fit],
    log_likelihoods: Mapping[str, LogLikelihood],
    data: Dataset,
    out: Path,
    arguments: Mapping[str, Any],
    *,
    conditional: bool,
) -> Comparison:
    """Write the table, plots, ArviZ files and record of a comparison, and return the comparison."""
    comparison = compare(log_likelihoods, data.test)
    if len(data.test) >= 4:
        pyro.set_rng_seed(arguments["seed"])
        labels = data.test_labels if conditional else None
        qualities = {name: sample_quality_of(fit, data.test, labels) for name, fit in fits.items()}
        comparison = replace(comparison, sample_quality=qualities)
    table = comparison.table
    table.index.name = "family"
    table["seconds"] = [round(fits[name].history[-1]["seconds"], 1) for name in table.index]
    table["se"] /= len(data.test)
    columns = ["kind", "num_samples", "nats", "se", "bits_per_dim", "seconds", "elpd", "elpd_diff", "dse", "weight"]
    columns += [name for name in ("pareto_k", "unreliable", "mmd", "mmd_p", "sliced_wasserstein") if name in table]
    with atomic_write(out / "table.csv") as part:
        table[columns].to_csv(part, float_format="%.6g")
    if any(found.kind != "none" for found in log_likelihoods.values()):
        figure: Any = comparison.plot().figure
        save_figure(figure, out / "compare.png")
        import_extra("matplotlib.pyplot", extra="eval", by="A plot").close(figure)
    plot_fits(fits, data, out, conditional=conditional, seed=arguments["seed"])
    for name, fit in fits.items():
        context: dict[str, Any] = {"num_samples": 100}
        if conditional and data.test_labels is not None:
            context = {"num_samples": 10, "context": data.test_labels[:100]}
        samples = to_arviz(fit.family, progress=False, **context)
        with atomic_write(out / f"{name}.nc") as part:
            samples.to_netcdf(str(part), engine="h5netcdf")
    packages = ("pyro-ppl", "torch", "zuko", "arviz", "numpy", "scikit-learn")
    record = {
        "arguments": dict(arguments),
        "versions": {
            "python": platform.python_version(),
            "pyro-genmodels": __version__,
            **{name: version(name) for name in packages if list(distributions(name=name))},
        },
        "threads": torch.get_num_threads(),
        "fits": {name: {"best": fit.best, "stopped": fit.stopped} for name, fit in fits.items()},
    }
    with atomic_write(out / "run.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    return comparison
