"""Amortised posteriors of simulators against published values: python benchmarks/simulators.py --data-dir DIR

For each task and number of simulations a conditional family is trained once, and its draws for each observation are compared
with reference draws by a classifier two-sample test (10,000 draws a side; 0.5 is perfect). Tasks, reference draws and protocol
are those of Lueckmann et al., *Benchmarking Simulation-Based Inference* (arXiv 2101.04653), whose values of neural posterior
estimation stand beside. The data are not part of the package: see --data-dir.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from math import pi
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from posteriordb import commit_of_this_file, processor_seconds
from torch import Tensor

from pyro_genmodels import Diffusion, ODEFlow
from pyro_genmodels.evaluation import c2st
from pyro_genmodels.posteriors.amortized import AmortizedPosterior, default_flow

PUBLISHED = {
    "two_moons": {1000: (0.725, 0.643), 10_000: (0.606, 0.554)},
    "slcp": {1000: (0.975, 0.965), 10_000: (0.901, 0.845)},
    "gaussian_linear": {1000: (0.694, 0.652), 10_000: (0.552, 0.544)},
    "gaussian_linear_uniform": {1000: (0.696, 0.631), 10_000: (0.553, 0.527)},
}
"""Mean C2ST over ten observations of NPE, and of SNPE, which has a budget for each observation, by number of simulations."""

FAMILIES: dict[str, Callable[..., Any]] = {"flow": default_flow, "ode_flow": ODEFlow, "diffusion": Diffusion}


def two_moons() -> None:
    """Simulate a point on a crescent, shifted by a function of two parameters (T.8)."""
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(2), 1.0).to_event(1))
    batch = theta.shape[:-1]
    angle, radius = pi * (torch.rand(batch) - 0.5), 0.1 + 0.01 * torch.randn(batch)
    first = radius * angle.cos() + 0.25 - theta.sum(-1).abs() / 2**0.5
    second = radius * angle.sin() + (theta[..., 1] - theta[..., 0]) / 2**0.5
    pyro.deterministic("x", torch.stack([first, second], -1))


def slcp() -> None:
    """Simulate four points in the plane, whose mean and covariance are functions of five parameters (T.3)."""
    theta = pyro.sample("theta", dist.Uniform(-3 * torch.ones(5), 3.0).to_event(1))
    first, second, rho = theta[..., 2].square(), theta[..., 3].square(), theta[..., 4].tanh()
    noise = torch.randn(*theta.shape[:-1], 4, 2)
    shape = (*theta.shape[:-1], 1)
    x = theta[..., 0].reshape(shape) + first.reshape(shape) * noise[..., 0]
    mixed = rho.reshape(shape) * noise[..., 0] + (1 - rho.square()).sqrt().reshape(shape) * noise[..., 1]
    y = theta[..., 1].reshape(shape) + second.reshape(shape) * mixed
    pyro.deterministic("x", torch.stack([x, y], -1).flatten(-2))


def gaussian_linear() -> None:
    """Simulate a normal vector whose mean has a normal prior (T.1)."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(10), 0.1**0.5).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


def gaussian_linear_uniform() -> None:
    """Simulate a normal vector whose mean has a uniform prior (T.2)."""
    theta = pyro.sample("theta", dist.Uniform(-torch.ones(10), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(theta, 0.1**0.5).to_event(1))


TASKS: dict[str, Callable[[], None]] = {f.__name__: f for f in (two_moons, slcp, gaussian_linear, gaussian_linear_uniform)}


def table(folder: Path, name: str) -> Tensor:
    """Return the numbers of a file of a task."""
    return torch.from_numpy(pd.read_csv(folder / name).to_numpy(np.float32))


def main(
    data_dir: Annotated[Path | None, typer.Option(envvar="PYRO_GENMODELS_DATA", help="Folder with the data sets.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Tasks; all of them by default.")] = None,
    simulations: Annotated[list[int] | None, typer.Option(help="Numbers of simulations.")] = None,
    observations: Annotated[int, typer.Option(help="Number of observations, of ten.")] = 10,
    family: Annotated[str, typer.Option(help="flow, ode_flow or diffusion.")] = "flow",
    rounds: Annotated[int, typer.Option(help="Rounds of truncated proposals; 0 for an amortised posterior.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the rows.")] = Path("out/simulators"),
    seed: int = 0,
) -> None:
    """Print a row for each task and number of simulations."""
    root = None if data_dir is None else data_dir / "sbibm"
    if root is None or not root.exists():
        typer.echo(f"skipped: the folder {root or 'sbibm'} does not exist; set --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    torch.set_num_threads(1)
    commit = commit_of_this_file()
    typer.echo(
        "| task | simulations | family | C2ST | se | published | observations | CPU s |\n|---|---|---|---|---|---|---|---|"
    )
    for name in task or TASKS:
        for number in simulations or (1000, 10_000):
            pyro.set_rng_seed(seed)
            start = processor_seconds()
            amortized = AmortizedPosterior(TASKS[name], observed=["x"], family=FAMILIES[family])
            first = number // (rounds + 1)
            train = partial(amortized.simulate(first, parallel=True, progress=False).train, progress=False)
            train(first)
            seconds, values = processor_seconds() - start, []
            for i in range(1, observations + 1):
                folder = root / name / f"num_observation_{i}"
                x = table(folder, "observation.csv")[0]
                start, fitted = processor_seconds(), amortized
                if rounds:
                    fitted = amortized.refine(x=x, num_rounds=rounds, num_simulations=first, progress=False)
                draws = fitted.given(x=x).get_samples(10_000)["theta"]
                seconds += processor_seconds() - start
                reference = table(folder, "reference_posterior_samples.csv.bz2")
                values.append(c2st(reference, draws).value)
                row = {"task": name, "simulations": number, "family": family, "rounds": rounds, "observation": i, "seed": seed}
                out.mkdir(parents=True, exist_ok=True)
                with (out / "rows.jsonl").open("a") as file:
                    file.write(json.dumps(row | {"c2st": values[-1], "cpu seconds": seconds, "commit": commit}) + "\n")
            error = f"{stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            published = PUBLISHED[name].get(number, ("", ""))[bool(rounds)]
            typer.echo(
                f"| {name} | {number} | {family}{f', {rounds} rounds' if rounds else ''} | {mean(values):.3f} | {error} | "
                f"{published} | {len(values)} | {seconds:.0f} |"
            )


if __name__ == "__main__":
    typer.run(main)
