"""What the command line writes down: draws, pictures, tables, and the record of a run. Every file is whole or not there."""

from __future__ import annotations

__all__ = ["check_picture", "check_rows", "pictures", "save_figure", "save_rows", "write"]

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

from pyro_genmodels.cli.recipes import Notes, draw, evaluate, sample_quality_of
from pyro_genmodels.datasets import Dataset
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.processes import along
from pyro_genmodels.evaluation import Comparison, LogLikelihood, compare, plots
from pyro_genmodels.families import EnergyModel, Family
from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.training import Fit
from pyro_genmodels.utils.errors import import_extra, unknown_name
from pyro_genmodels.utils.files import atomic_write

FRAMES = 6
"""Of a way from noise to data."""


def check_rows(path: Path) -> None:
    """Raises an error if `save_rows` cannot write a file of that name."""
    if path.suffix not in (".npy", ".npz", ".csv", ".parquet"):
        raise unknown_name("kind of file", path.suffix or path.name, [".npy", ".npz", ".csv", ".parquet"])
    if path.suffix == ".parquet":
        import_extra("pyarrow.parquet", extra="parquet", by="A .parquet file")


def save_rows(path: Path, x: Tensor, labels: Tensor | None, notes: Notes) -> None:
    """Writes rows to a .npy, .npz, .csv or .parquet file, under the names of the data the family was fitted to.

    Raises:
        ValueError: if the suffix is none of these.
        OSError: if it cannot be written.
    """
    import pandas as pd

    check_rows(path)
    source = notes.source
    label = "label" if source is None or source.labels is None else source.labels
    array = x.numpy()
    with atomic_write(path) as part:
        if path.suffix == ".npy":
            np.save(part, array)
        elif path.suffix == ".npz":
            own = source.columns if source is not None and Path(source.data).suffix == ".npz" else None
            arrays: Any = {(own or ["x"])[0]: array} | ({} if labels is None else {label: labels.numpy()})
            np.savez_compressed(part, **arrays)
        else:
            flat = array.reshape(len(array), -1)
            named = notes.columns if notes.columns and len(notes.columns) == flat.shape[1] else None
            table = pd.DataFrame(flat, columns=named or [f"x{i}" for i in range(flat.shape[1])])
            if labels is not None:
                table[label] = labels.numpy()
            if path.suffix == ".csv":  # a header of numbers would be read as a row
                table.to_csv(part, index=False, header=not all(str(name).isdecimal() for name in table.columns))
            else:
                table.to_parquet(part, index=False)


# Pictures.


def pictures(fits: Mapping[str, Fit], data: Dataset, out: Path, *, conditional: bool, seed: int = 0, mark: str = "") -> None:
    """Draws pictures of training, and of what can be pictured of the data: images, or points in the plane.

    Writes `loss.png`, `samples.png` and, for points in the plane, `density.png` and of energies `energy.png`; of diffusions and
    ODE flows `way.png`, from noise to data; each with the mark before its suffix. Of images, without a mark, also each family's
    own draws.
    """
    save_figure(plots.loss_curves({name: fit.history for name, fit in fits.items()}), out / f"loss{mark}.png")
    pyro.set_rng_seed(seed)
    plane, images = data.train.shape[1:] == (2,) and not data.levels, data.train.dim() == 3
    if not (plane or images):
        return
    n = 2000 if plane else 100
    labels = data.test_labels[torch.arange(n) % len(data.test)] if conditional and data.test_labels is not None else None
    few = {name: 500 if plane and isinstance(fit.family, EnergyModel) else n for name, fit in fits.items()}  # chains take long
    draws = {name: draw(fit, few[name], None if labels is None else labels[: few[name]]) for name, fit in fits.items()}
    panels = {f"held-out {data.name}": data.test[:n], **draws}
    if images:
        panels = {name: shown[:40] for name, shown in panels.items()}
        for name in fits if not mark else ():
            save_figure(plots.image_grids({name: draws[name]}), out / f"samples_{name}.png")
    save_figure((plots.scatters if plane else plots.image_grids)(panels), out / f"samples{mark}.png")
    ways = {name: _way(fit, 500 if plane else 8, conditional=conditional) for name, fit in fits.items()}
    walked = {name: way for name, way in ways.items() if way is not None}
    if walked and images:
        low, high = data.test.min().item(), data.test.max().item()
        strips = {name: frames.clamp(low, high).transpose(0, 1).flatten(0, 1) for name, (frames, _) in walked.items()}
        save_figure(plots.image_grids(strips, columns=FRAMES), out / f"way{mark}.png")
    elif walked:
        save_figure(plots.velocity_fields({name: way for name, (_, way) in walked.items()}), out / f"way{mark}.png")
    if plane:
        low, high = plots.plot_limits(data.test)
        points = plots.lattice(low, high, 100)
        densities = {} if data.density is None else {f"{data.name} itself": data.density.log_prob(points)}
        densities |= {name: _density(fit, points, data, conditional=conditional) for name, fit in fits.items()}
        densities = {name: log_p for name, log_p in densities.items() if not log_p.isnan().all()}  # some have none
        if densities:
            save_figure(plots.densities(densities, low, high), out / f"density{mark}.png")
        surfaces = {
            name: energies for name, fit in fits.items() for name, energies in _surfaces(name, fit, points, data).items()
        }
        if surfaces:
            save_figure(plots.surfaces(surfaces, low, high), out / f"energy{mark}.png")


def check_picture(family: Family, path: Path) -> None:
    """Raises a ValueError if what a family draws cannot be pictured, or not under that name."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise unknown_name("kind of picture", path.suffix or path.name, [".png", ".pdf", ".svg"])
    shape = tuple(family.event_shape)
    if len(shape) != 2 and shape != (2,):
        raise ValueError(f"images and points in the plane can be pictured, but not data of shape {shape}: leave --picture out")


def _density(family: Any, points: Tensor, data: Dataset, *, conditional: bool) -> Tensor:
    """Log density at points, with labels as frequent as in the data."""
    if not conditional or data.train_labels is None or data.num_classes is None:
        return evaluate(family, points, None, num_samples=128).values.cpu()
    share = torch.bincount(data.train_labels, minlength=data.num_classes) / len(data.train_labels)
    parts = [
        evaluate(family, points, torch.full((len(points),), label), num_samples=128).values.cpu() + share[label].log()
        for label in share.nonzero().flatten().tolist()
    ]
    return torch.stack(parts).logsumexp(0)


def _surfaces(name: str, fit: Any, points: Tensor, data: Dataset) -> dict[str, Tensor]:
    """Title -> the energies of points, given each of the first few labels where there are labels; nothing of other families."""
    family = getattr(fit, "family", fit)
    labels = [None] if family.context is None else list(range(min(data.num_classes or 1, 5)))
    points, found = points.to(family.loc.device), {}
    with torch.no_grad():
        for label in labels:
            made = family() if label is None else family(torch.full((len(points),), label, device=points.device))
            if made.intractable:
                title = name if label is None else f"{name}, label {label}"
                found[title] = -made.unnormalized_log_prob(points).cpu()
    return found


def _way(fit: Any, n: int, *, conditional: bool) -> tuple[Tensor, plots.VelocityPanel] | None:
    """Of a family that carries noise to data: frames in the units of data, and the way in those of the network.

    A diffusion's is that of its sampler, as it looks on straight lines from noise to data.
    """
    family = getattr(fit, "family", fit)
    labels = torch.zeros(n, dtype=torch.long, device=family.loc.device) if conditional else None
    made = family(labels)
    made = made.base if made.is_dequantized else made
    if not capabilities(made).has_velocity:
        return None
    trajectory = made.trajectory(() if conditional else (n,), num_frames=FRAMES)
    times, frames = trajectory.times, trajectory.frames
    if made.has_noise_error:
        alpha, sigma = made.denoiser.process.alpha(times), made.denoiser.process.sigma(times)
        times, frames = alpha / (alpha + sigma), frames / along(alpha + sigma, frames)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        told = None if made.context is None else made.context[:1].expand(len(x), -1)
        with torch.no_grad():
            return made.velocity(x, t, told)

    return made.pretransform.inv(frames) if made.pretransform else frames, plots.VelocityPanel(times, frames, velocity)


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def write(
    fits: Mapping[str, Fit],
    judged: Mapping[str, LogLikelihood],
    data: Dataset,
    out: Path,
    arguments: Mapping[str, Any],
    *,
    conditional: bool,
) -> Comparison:
    """Writes table, pictures, ArviZ files and the record of a comparison, and returns it."""
    comparison = compare(judged, data.test)
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
    columns += [name for name in ("mmd", "mmd_p", "sliced_wasserstein") if name in table]
    with atomic_write(out / "table.csv") as part:
        table[columns].to_csv(part, float_format="%.6g")
    if any(one.kind != "none" for one in judged.values()):
        picture: Any = comparison.plot().figure
        save_figure(picture, out / "compare.png")
        import_extra("matplotlib.pyplot", extra="eval", by="A picture").close(picture)
    pictures(fits, data, out, conditional=conditional, seed=arguments["seed"])
    for name, fit in fits.items():
        context: dict[str, Any] = {"num_samples": 100}
        if conditional and data.test_labels is not None:
            context = {"num_samples": 10, "context": data.test_labels[:100]}
        drawn = to_arviz(fit.family, progress=False, **context)
        with atomic_write(out / f"{name}.nc") as part:
            drawn.to_netcdf(str(part), engine="h5netcdf")
    packages = ("pyro-genmodels", "pyro-ppl", "torch", "zuko", "arviz", "numpy", "scikit-learn")
    record = {
        "arguments": dict(arguments),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages if list(distributions(name=name))},
        },
        "threads": torch.get_num_threads(),
        "fits": {name: {"best": fit.best, "stopped": fit.stopped} for name, fit in fits.items()},
    }
    with atomic_write(out / "run.json") as part:
        part.write_text(json.dumps(record, indent=1) + "\n")
    return comparison
