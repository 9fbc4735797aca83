"""Diffusions and ODE flows, measured: python benchmarks/diffusion.py mixtures

Each command trains, judges and prints rows for RESULTS.md. The images are not part of the package: see --data-dir.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads that wait leave the cores to others

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Annotated

import numpy as np
import pyro
import torch
import typer
from pyro.infer import ELBO
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from pyro_genmodels import (
    DenoisingScoreMatching,
    DenseField,
    Diffusion,
    Dopri5,
    DPMSolver,
    FlowDensity,
    FlowMatching,
    Hutchinson,
    MaximumLikelihood,
    ODEFlow,
    UNet,
    log_likelihood,
    train,
)
from pyro_genmodels.datasets import Dataset, load
from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.evaluation import c2st
from pyro_genmodels.families import Ancestral, Family
from pyro_genmodels.infer import LikelihoodWeighting, LogNormalWeighting
from pyro_genmodels.optim.averaging import moving_average
from pyro_genmodels.training import Checkpoint, checkpoints

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

DataDir = Annotated[Path | None, typer.Option(envvar="PYRO_GENMODELS_DATA", help="Folder with the data sets.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.")]
Seconds = Annotated[float, typer.Option(help="Of training.")]


@app.callback()
def root(threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 2) -> None:
    """Diffusions and ODE flows, measured."""
    torch.set_num_threads(threads)


def steps(
    family: Family, objective: ELBO, x: Tensor, seconds: float, *, rate: float = 2e-3, batch_size: int = 1024, fall: bool = True
) -> Iterator[tuple[float, AveragedModel]]:
    """Steps of Adam for so long, the rate falling to zero if so told: seconds spent and the averaged network, after each."""
    family.train()
    family.standardize(x)
    loss = objective(family)
    optimiser = torch.optim.Adam(loss.parameters(), lr=rate)
    averaged = AveragedModel(family.network, multi_avg_fn=moving_average(0.999))
    spent = 0.0
    schedule = LambdaLR(optimiser, lambda step: min(1.0, step / 100) * (1 - min(1.0, spent / seconds) if fall else 1.0))
    while spent < seconds:
        start = time.perf_counter()
        batch = x[torch.randint(len(x), (batch_size,))]
        optimiser.zero_grad()
        (loss(batch) / batch_size).backward()
        torch.nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
        optimiser.step()
        averaged.update_parameters(family.network)
        schedule.step()
        spent += time.perf_counter() - start
        yield spent, averaged


@app.command()
def mixtures(seconds: Seconds = 240, seed: Seed = 0, only: Annotated[str, typer.Option(help="grid or ring.")] = "") -> None:
    """KL from the truth to a diffusion, modes covered and share of good draws, on the two mixtures of PacGAN."""
    scales = {"grid": (0.05, 25), "ring": (0.01, 8)}
    print("| data | KL(data, model), nats | modes | high quality | reverse steps | training, s | judging, s |")
    print("|---" * 7 + "|")
    for name in [only] if only else scales:
        pyro.set_rng_seed(seed)
        (sd, modes), density = scales[name], load(name).density
        x, test = density.sample((100_000,)), density.sample((20_000,))
        diffusion = Diffusion((2,), network=DenseField(128, blocks=2, octaves=5))
        objective = DenoisingScoreMatching(weighting=LogNormalWeighting(-2.0, 1.5))
        for spent, averaged in tqdm(steps(diffusion, objective, x, seconds), desc=name, unit="step", mininterval=10):
            trained = spent, averaged
        diffusion.network.load_state_dict(trained[1].module.state_dict())
        diffusion.eval()
        start = time.perf_counter()
        with torch.no_grad():
            gap = density.log_prob(test) - diffusion().log_prob(test)
        draws = diffusion().with_sampler(DPMSolver(50)).trajectory((2500,))
        centres = density.component_distribution.base_dist.loc
        distance, nearest = torch.cdist(draws.x, centres).min(1)
        good = distance < 3 * sd
        print(
            f"| {name} | {gap.mean():.4f} ± {gap.std() / len(gap) ** 0.5:.4f} | {len(nearest[good].unique())} of {modes} | "
            f"{good.float().mean():.1%} | {draws.evaluations} | {trained[0]:.0f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )


@app.command()
def cost(
    seconds: Seconds = 120,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Of the draws.")] = 5,
    draws: Annotated[int, typer.Option(help="In each.")] = 10_000,
) -> None:
    """What few steps cost: sliced Wasserstein distances of draws to all digits, by 20 evaluations and by 1,000.

    The floor is the distance of the images from themselves, of two halves, brought to these sizes: its square falls with
    1 / n + 1 / m.
    """
    pyro.set_rng_seed(seed)
    data = load("digits")
    real = torch.cat([data.train, data.valid, data.test])
    diffusion = Diffusion((8, 8), levels=data.levels, network=DenseField(256, 3, dropout=0.1))
    objective = DenoisingScoreMatching(weighting=LikelihoodWeighting())
    for _, averaged in tqdm(steps(diffusion, objective, data.train, seconds, batch_size=256), unit="step", mininterval=10):
        best = averaged
    diffusion.network.load_state_dict(best.module.state_dict())
    diffusion.eval()
    samplers = (DPMSolver(20), Ancestral(1000))
    found: dict[str, list[float]] = {}
    for repeat in range(repeats):
        halves = real[torch.randperm(len(real))].chunk(2)
        sizes = (1 / draws + 1 / len(real)) / sum(1 / len(half) for half in halves)
        floor = sliced_wasserstein(*halves, seed=repeat).value.item() * sizes**0.5
        found.setdefault("floor", []).append(floor)
        for sampler in samplers:
            start = time.perf_counter()
            drawn = diffusion().with_sampler(sampler).sample((draws,))
            spent = time.perf_counter() - start
            distance = sliced_wasserstein(drawn, real, seed=repeat).value.item()
            name = f"{type(sampler).__name__}({sampler.num_steps})"
            found.setdefault(name, []).append(distance)
            found.setdefault(f"{name} - floor", []).append(distance - floor)
            print(f"{repeat}: {name} {distance:.4f}, floor {floor:.4f}, {spent:.0f} s", flush=True)
    for name, values in found.items():
        several = torch.tensor(values)
        print(f"{name:24} {several.mean():.4f} ± {several.std() / repeats**0.5:.4f}")
    few, many = (torch.tensor(found[f"{type(s).__name__}({s.num_steps}) - floor"]).mean() for s in samplers)
    print(f"excess of 20 evaluations over that of 1,000: {few / many:.3f}")


@app.command()
def matching(
    seconds: Seconds = 660, seed: Seed = 0, only: Annotated[str, typer.Option(help="moons or pinwheel.")] = ""
) -> None:
    """When flow matching first reaches what maximum likelihood with early stopping comes to, the network being the same."""
    print("| data | maximum likelihood, nats | of training, s | flow matching there after, s | share | flow matching's best |")
    print("|---" * 6 + "|", flush=True)
    for name in [only] if only else ["moons", "pinwheel"]:
        pyro.set_rng_seed(seed)
        flow, data = ODEFlow((2,), network=DenseField(128, blocks=2)), load(name)
        twin = deepcopy(flow)
        likelihood = list(curve(flow, MaximumLikelihood(), data, seconds, every=seconds / 20))
        target = min(likelihood, key=lambda record: record[1])[2]  # of the best on the rows for validation
        matched = list(curve(twin, FlowMatching(), data, seconds / 5, every=seconds / 150))
        reached = next((spent for spent, _, nats in matched if nats <= target), float("inf"))
        best = min(matched, key=lambda record: record[1])
        print(
            f"| {name} | {target:.3f} | {likelihood[-1][0]:.0f} | {reached:.1f} | 1 / {likelihood[-1][0] / reached:.0f} | "
            f"{best[2]:.3f} after {best[0]:.0f} s |",
            flush=True,
        )


def curve(family: Family, objective: ELBO, data: Dataset, seconds: float, every: float) -> Iterator[tuple[float, float, float]]:
    """Seconds of training, and then nats per point of the averaged network, on rows for validation and on test rows."""
    judged, due, rows = deepcopy(family), every, 1000
    taken = steps(family, objective, data.train, seconds, batch_size=256, fall=False)
    bar = tqdm(taken, desc=type(objective).__name__, mininterval=10)
    for spent, averaged in bar:
        if spent >= due:
            judged.load_state_dict(family.state_dict())
            judged.network.load_state_dict(averaged.module.state_dict())
            judged.eval()
            with torch.no_grad():
                valid, test = (-judged().log_prob(part[:rows]).mean().item() for part in (data.valid, data.test))
            bar.set_postfix(valid=valid)
            yield spent, valid, test
            due += every


@app.command()
def images(
    name: Annotated[str, typer.Argument(help="mnist or fashion_mnist.")] = "mnist",
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("out/diffusion"),
    seed: Seed = 0,
    rows: Annotated[int, typer.Option(help="To train on.")] = 10_000,
    epochs: Annotated[int, typer.Option(help="Of training.")] = 40,
    test_rows: Annotated[int, typer.Option(help="Whose density is computed.")] = 1000,
    draws: Annotated[int, typer.Option(help="To tell from as many test images.")] = 5000,
) -> None:
    """Bits per dimension by the probability flow and a classifier's two-sample test, on 28 x 28 images of 8 bits."""
    path = None if data_dir is None else data_dir / f"{name}.npz"
    if path is None or not path.exists():
        typer.echo(f"skipped: there is no {path or name}; say --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    pyro.set_rng_seed(seed)
    z = np.load(path)
    x, test = (torch.from_numpy(z[f"x_{part}"]).long()[torch.randperm(len(z[f"x_{part}"]))] for part in ("train", "test"))
    likelihood = FlowDensity(Dopri5(1e-3, 1e-3), Hutchinson())
    diffusion = Diffusion((28, 28), levels=256, network=UNet((16, 32, 64)), likelihood=likelihood)
    fit = train(
        diffusion,
        x[:rows],
        objective=DenoisingScoreMatching(weighting=LikelihoodWeighting()),
        epochs=epochs,
        checkpoint=Checkpoint(out / name, resume=(out / f"{name}.training.safetensors").exists()),
        seed=seed,
    )
    trained = fit.history[-1]["seconds"]
    print(f"{name}: {rows} images, {epochs} epochs, {trained:.0f} s of training", flush=True)
    checkpoints.load(out / name, diffusion)
    start = time.perf_counter()
    dims = 28 * 28
    drawn = torch.cat([diffusion().sample((1000,)) for _ in range(-(-draws // 1000))])[:draws]
    for side, others in (("draws", drawn), ("training images", x[-draws:])):
        found = c2st(test[:draws], others, hidden=(256, 256), progress=True)
        print(f"{name}: {side} told from test images: {found}", flush=True)
    found = log_likelihood(diffusion, test[:test_rows], num_samples=1, batch_size=250)
    bits = found.bits_per_dim(dims), found.mean_std_error / (dims * np.log(2))
    print(f"{name}: {bits[0]:.3f} ± {bits[1]:.3f} bits per dimension ({found}); judged in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    app()
