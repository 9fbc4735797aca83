"""Benchmarks of diffusions and ODE flows: python benchmarks/diffusion.py mixtures

Each command trains, evaluates and prints rows for RESULTS.md. The images are not part of the package: see --data-dir.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads free the cores

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
from resumable import resumable
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
    VariancePreserving,
    log_likelihood,
    train,
)
from pyro_genmodels.datasets import Dataset, load
from pyro_genmodels.distributions.diffusion import ReverseDiffusion
from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.dynamics.denoiser import DataPrediction, Denoiser
from pyro_genmodels.dynamics.reverse import ReverseSampler
from pyro_genmodels.evaluation import c2st
from pyro_genmodels.families import DDIM, Ancestral, EulerMaruyama, Family, Heun, ProbabilityFlow
from pyro_genmodels.infer import LikelihoodWeighting, LogNormalWeighting
from pyro_genmodels.optim.averaging import moving_average
from pyro_genmodels.training import checkpoints

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

DataDir = Annotated[Path | None, typer.Option(envvar="PYRO_GENMODELS_DATA", help="Folder with the data sets.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Seconds = Annotated[float, typer.Option(help="Seconds of training.")]


@app.callback()
def root(threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2) -> None:
    """Run benchmarks of diffusions and ODE flows."""
    torch.set_num_threads(threads)


def steps(
    family: Family, objective: ELBO, x: Tensor, seconds: float, *, lr: float = 2e-3, batch_size: int = 1024, decay: bool = True
) -> Iterator[tuple[float, AveragedModel]]:
    """Train by Adam for a number of seconds; after each step, yield the seconds spent and the averaged network.

    The learning rate decays linearly to zero if `decay` is true.
    """
    family.train()
    family.standardize(x)
    loss = objective(family)
    optimiser = torch.optim.Adam(loss.parameters(), lr=lr)
    averaged = AveragedModel(family.network, multi_avg_fn=moving_average(0.999))
    spent = 0.0
    schedule = LambdaLR(optimiser, lambda step: min(1.0, step / 100) * (1 - min(1.0, spent / seconds) if decay else 1.0))
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
    """Measure the KL divergence to a diffusion, covered modes and good samples on the two mixtures of PacGAN."""
    scales = {"grid": (0.05, 25), "ring": (0.01, 8)}
    print("| data | KL(data, model), nats | modes | high quality | reverse steps | training, s | evaluation, s |")
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


MIXTURES = {"wide": ([0.3, 0.7], [-1.4, 0.6], [0.5, 0.35]), "narrow": ([0.3, 0.3, 0.4], [-1.2, 0.0, 1.1], [0.05, 0.1, 0.2])}
"""Weights, means and deviations of mixtures of normals."""


def ideal_diffusion(name: str, sampler: ReverseSampler) -> ReverseDiffusion:
    """Return the diffusion of two independent coordinates of a mixture, whose mean of the data given noise is known."""
    process = VariancePreserving()
    weights, loc, scale = map(torch.tensor, MIXTURES[name])

    def mean_of_data(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        alpha, sigma = (part[:, None, None] for part in (process.alpha(t), process.sigma(t)))
        variance = (alpha * scale) ** 2 + sigma**2
        residual = x[..., None] * torch.hypot(alpha, sigma) - alpha * loc
        posterior = (weights.log() - variance.log() / 2 - residual**2 / (2 * variance)).softmax(-1)
        return (posterior * (loc + alpha * scale**2 / variance * residual)).sum(-1)

    return ReverseDiffusion(Denoiser(mean_of_data, process, DataPrediction(), clock=False), (2,), sampler=sampler)


@app.command()
def gaps(num_samples: int = 2000, seed: Seed = 0) -> None:
    """Measure how far each sampler's draws are from the density, for mixtures of normals whose score is known."""
    samplers = [DPMSolver(20), DPMSolver(71), DPMSolver(200), Heun(18), Heun(50), DDIM(100), DDIM(400)]
    samplers += [Ancestral(200), Ancestral(1000), EulerMaruyama(1000), ProbabilityFlow()]
    print("| sampler | evaluations | gap (nats), wide modes | gap (nats), narrow modes |")
    print("|---" * 4 + "|")
    for sampler in samplers:
        pyro.set_rng_seed(seed)
        found = [ideal_diffusion(name, sampler).sampler_gap(num_samples) for name in MIXTURES]
        evaluations = sorted({gap.evaluations for gap in found})
        cells = " | ".join(f"{gap.value:.3f} ± {gap.std_error:.3f}" for gap in found)
        name = f"{type(sampler).__name__}({getattr(sampler, 'num_steps', '')})"
        print(f"| `{name}` | {' to '.join(map(str, evaluations))} | {cells} |", flush=True)


@app.command()
def cost(
    seconds: Seconds = 120,
    seed: Seed = 0,
    repeats: Annotated[int, typer.Option(help="Number of repetitions.")] = 5,
    draws: Annotated[int, typer.Option(help="Samples per repetition.")] = 10_000,
) -> None:
    """Compare samples of a diffusion by 20 and by 1,000 evaluations: sliced Wasserstein distances to all digits.

    The baseline is the distance between two halves of the images, scaled to these sample sizes: its square is proportional
    to 1 / n + 1 / m.
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
    distances: dict[str, list[float]] = {}
    for repeat in range(repeats):
        halves = real[torch.randperm(len(real))].chunk(2)
        sizes = (1 / draws + 1 / len(real)) / sum(1 / len(half) for half in halves)
        baseline = sliced_wasserstein(*halves, seed=repeat).value.item() * sizes**0.5
        distances.setdefault("baseline", []).append(baseline)
        for sampler in samplers:
            start = time.perf_counter()
            samples = diffusion().with_sampler(sampler).sample((draws,))
            spent = time.perf_counter() - start
            distance = sliced_wasserstein(samples, real, seed=repeat).value.item()
            name = f"{type(sampler).__name__}({sampler.num_steps})"
            distances.setdefault(name, []).append(distance)
            distances.setdefault(f"{name} - baseline", []).append(distance - baseline)
            print(f"{repeat}: {name} {distance:.4f}, baseline {baseline:.4f}, {spent:.0f} s", flush=True)
    for name, values in distances.items():
        repeated = torch.tensor(values)
        print(f"{name:27} {repeated.mean():.4f} ± {repeated.std() / repeats**0.5:.4f}")
    fast, slow = (torch.tensor(distances[f"{type(s).__name__}({s.num_steps}) - baseline"]).mean() for s in samplers)
    print(f"ratio of the excess distances, 20 to 1,000 evaluations: {fast / slow:.3f}")


@app.command()
def matching(
    seconds: Seconds = 660, seed: Seed = 0, only: Annotated[str, typer.Option(help="moons or pinwheel.")] = ""
) -> None:
    """Measure when flow matching reaches the result of maximum likelihood with early stopping, with the same network."""
    print(
        "| data | maximum likelihood, nats | training, s | flow matching reaches it after, s | ratio | best of flow matching |"
    )
    print("|---" * 6 + "|", flush=True)
    for name in [only] if only else ["moons", "pinwheel"]:
        pyro.set_rng_seed(seed)
        flow, data = ODEFlow((2,), network=DenseField(128, blocks=2)), load(name)
        twin = deepcopy(flow)
        likelihood = list(curve(flow, MaximumLikelihood(), data, seconds, every=seconds / 20))
        target = min(likelihood, key=lambda record: record[1])[2]  # test rows, at the best state on validation rows
        matched = list(curve(twin, FlowMatching(), data, seconds / 5, every=seconds / 150))
        reached = next((spent for spent, _, nats in matched if nats <= target), float("inf"))
        best = min(matched, key=lambda record: record[1])
        print(
            f"| {name} | {target:.3f} | {likelihood[-1][0]:.0f} | {reached:.1f} | 1 / {likelihood[-1][0] / reached:.0f} | "
            f"{best[2]:.3f} after {best[0]:.0f} s |",
            flush=True,
        )


def curve(family: Family, objective: ELBO, data: Dataset, seconds: float, every: float) -> Iterator[tuple[float, float, float]]:
    """Yield seconds of training and nats per point of the averaged network, on validation rows and on test rows."""
    evaluated, due, rows = deepcopy(family), every, 1000
    training = steps(family, objective, data.train, seconds, batch_size=256, decay=False)
    bar = tqdm(training, desc=type(objective).__name__, mininterval=10)
    for spent, averaged in bar:
        if spent >= due:
            evaluated.load_state_dict(family.state_dict())
            evaluated.network.load_state_dict(averaged.module.state_dict())
            evaluated.eval()
            with torch.no_grad():
                valid, test = (-evaluated().log_prob(part[:rows]).mean().item() for part in (data.valid, data.test))
            bar.set_postfix(valid=valid)
            yield spent, valid, test
            due += every


@app.command()
def images(
    name: Annotated[str, typer.Argument(help="mnist or fashion_mnist.")] = "mnist",
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint.")] = Path("out/diffusion"),
    seed: Seed = 0,
    rows: Annotated[int, typer.Option(help="Number of training images.")] = 10_000,
    epochs: Annotated[int, typer.Option(help="Epochs of training.")] = 40,
    test_rows: Annotated[int, typer.Option(help="Number of test images whose density is computed.")] = 1000,
    draws: Annotated[int, typer.Option(help="Number of samples and of test images in the classifier test.")] = 5000,
) -> None:
    """Measure bits per dimension by the probability flow, and a classifier two-sample test, on 28 x 28 images of 8 bits."""
    path = None if data_dir is None else data_dir / f"{name}.npz"
    if path is None or not path.exists():
        typer.echo(f"skipped: the file {path or name} does not exist; set --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    pyro.set_rng_seed(seed)
    z = np.load(path)
    x, test = (torch.from_numpy(z[f"x_{part}"]).long()[torch.randperm(len(z[f"x_{part}"]))] for part in ("train", "test"))
    density = FlowDensity(Dopri5(1e-3, 1e-3), Hutchinson())
    diffusion = Diffusion((28, 28), levels=256, network=UNet((16, 32, 64)), likelihood=density)
    fit = train(
        diffusion,
        x[:rows],
        objective=DenoisingScoreMatching(weighting=LikelihoodWeighting()),
        epochs=epochs,
        checkpoint=resumable(out / name),
        seed=seed,
    )
    trained = fit.history[-1]["seconds"]
    print(f"{name}: {rows} images, {epochs} epochs, {trained:.0f} s of training", flush=True)
    checkpoints.load(out / name, diffusion)
    start = time.perf_counter()
    dims = 28 * 28
    samples = torch.cat([diffusion().sample((1000,)) for _ in range(-(-draws // 1000))])[:draws]
    for title, compared in (("samples", samples), ("training images", x[-draws:])):
        accuracy = c2st(test[:draws], compared, hidden=(256, 256), progress=True)
        print(f"{name}: C2ST of {title} against test images: {accuracy}", flush=True)
    likelihood = log_likelihood(diffusion, test[:test_rows], num_samples=1, batch_size=250)
    bits, error = likelihood.bits_per_dim(dims), likelihood.mean_std_error / (dims * np.log(2))
    seconds = time.perf_counter() - start
    print(f"{name}: {bits:.3f} ± {error:.3f} bits per dimension ({likelihood}); evaluated in {seconds:.0f} s")


if __name__ == "__main__":
    app()
