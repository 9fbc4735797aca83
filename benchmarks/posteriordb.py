"""Methods against reference posteriors of posteriordb: python benchmarks/posteriordb.py --data-dir DIR

Each target is written once in Pyro, in float64. For each method the largest error of a mean in standard deviations of the
reference, the largest error of a standard deviation in per cent, a classifier two-sample test against the reference (C2ST), the
smallest effective sample size of chains, k-hat of the importance weights, seconds of processor time with everything, and
gradients of the log density are told. Reference draws are 10,000, so that errors of means below 0.02 cannot be told from none.
Each row is added to a file as soon as it is known, with the method, seed and commit; --report prints the rows of that file.
The data are not part of the package: see --data-dir, a folder of NAME.data.json.zip and NAME-MODEL.draws.json.zip.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.distributions import constraints
from torch import Tensor

from pyro_genmodels.evaluation import c2st
from pyro_genmodels.inference_data.export import chain_diagnostics
from pyro_genmodels.posteriors import (
    SMC,
    FlowGuide,
    FullRank,
    ImportanceWeighted,
    Laplace,
    LowRank,
    MeanField,
    NeuTra,
    NoUTurn,
    Pathfinder,
    posterior,
)

Data = dict[str, Any]
NUM_SAMPLES = 10_000
"""Number of draws of a method without chains."""


METHODS: dict[str, Callable[[NoUTurn], Any]] = {
    "nuts": lambda chains: chains,
    "started_nuts": lambda chains: replace(chains, init=Pathfinder()),
    "low_rank_nuts": lambda chains: replace(chains, low_rank=True),
    "mean_field": lambda _: MeanField(),
    "full_rank": lambda _: FullRank(),
    "low_rank": lambda _: LowRank(),
    "flow": lambda _: FlowGuide(),
    "weighted_flow": lambda _: ImportanceWeighted(num_samples=NUM_SAMPLES),
    "neutra": lambda chains: NeuTra(chains=chains),
    "pathfinder": lambda _: Pathfinder(num_samples=NUM_SAMPLES),
    "laplace": lambda _: Laplace(),
    "smc": lambda _: SMC(),
}
"""Methods by name, as functions of Markov chains."""
COLUMNS = ["target", "method", "mean error", "of", "sd error, %", "c2st", "ess", "k-hat", "cpu seconds", "gradients", "remark"]


@dataclass(frozen=True)
class Target:
    """A reference posterior.

    Attributes:
        data: name of its data.
        draws: name of its reference draws.
        model: its model, a function of the data.
        scalars: function of the values of the model's variables, (draw, ...), to draws by the reference's names.
    """

    data: str
    draws: str
    model: Callable[[Data], None]
    scalars: Callable[[dict[str, Tensor]], dict[str, Tensor]]


def flat(name: str, support: Any = constraints.real, shape: tuple[int, ...] = ()) -> Tensor:
    """Return the value of a variable with a flat density on its support."""
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


def half(name: str, distribution: Any) -> Tensor:
    """Return the value of a positive variable with a density that is cut at zero, up to its factor of 2."""
    value = flat(name, constraints.positive)
    pyro.factor(f"{name}_density", distribution.log_prob(value))
    return value


def numbered(**names: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Return a function to draws by names such as ``beta[1]``; a variable of length 0 is a scalar."""

    def named(draws: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, size in names.items():
            if size:
                found |= {f"{name}[{i + 1}]": draws[name][:, i] for i in range(size)}
            else:
                found[name] = draws[name]
        return found

    return named


def eight_schools(d: Data) -> None:
    """Effects of schools around a mean."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, d["sigma"]), obs=d["y"])


def eight_schools_noncentered(d: Data) -> None:
    """Standardised effects of schools."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, d["sigma"]), obs=d["y"])


def effects(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return effects of schools from standardised ones."""
    theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]
    return numbered(theta=8, mu=0, tau=0)(draws | {"theta": theta})


def observe(loc: Tensor, sigma: Tensor, y: Tensor) -> None:
    """Observe normal data."""
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, sigma), obs=y)


def kidiq(d: Data) -> None:
    """Scores of children by those of their mothers."""
    beta, sigma = flat("beta", constraints.real_vector, (2,)), pyro.sample("sigma", dist.HalfCauchy(2.5))
    observe(beta[0] + beta[1] * d["mom_iq"], sigma, d["kid_score"])


def ar_k(d: Data) -> None:
    """An autoregression of order 5."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    sigma, y = pyro.sample("sigma", dist.HalfCauchy(2.5)), d["y"]
    past = torch.stack([y[5 - k : len(y) - k] for k in range(1, 6)], 1)
    observe(alpha + past @ beta, sigma, y[5:])


def arma(d: Data) -> None:
    """Noise that is remembered for one step. Errors are a linear recursion: a triangular system."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi, theta = pyro.sample("phi", dist.Normal(0.0, 2.0)), pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma, y = pyro.sample("sigma", dist.HalfCauchy(2.5)), d["y"]
    without = y - mu - phi * torch.cat([mu[None], y[:-1]])
    error = recursion(without, -theta)
    with pyro.plate("steps", len(y)):
        pyro.factor("errors", dist.Normal(0.0, sigma).log_prob(error))


def recursion(x: Tensor, factor: Tensor) -> Tensor:
    """Return v with v_t = x_t + factor v_(t-1), (T,), by doubling the number of terms: the power of the factor is squared."""
    shift = 1
    while shift < len(x):
        x = x + factor * torch.cat([torch.zeros_like(x[:shift]), x[:-shift]])
        factor, shift = factor * factor, 2 * shift
    return x


def mixture(d: Data) -> None:
    """Two normal components in order."""
    mu = flat("mu", constraints.ordered_vector, (2,))
    pyro.factor("mu_density", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    parts = dist.Normal(mu, sigma).log_prob(d["y"][:, None])
    pyro.factor("y", torch.logaddexp(theta.log() + parts[:, 0], torch.log1p(-theta) + parts[:, 1]).sum())


def garch(d: Data) -> None:
    """Variances that depend on the last error. Where beta1 ends depends on alpha1: beta1 = (1 - alpha1) share."""
    mu, alpha0 = flat("mu"), flat("alpha0", constraints.positive)
    alpha1, share = flat("alpha1", constraints.unit_interval), flat("share", constraints.unit_interval)
    pyro.factor("jacobian", torch.log1p(-alpha1))
    y = d["y"]
    driven = alpha0 + alpha1 * (y[:-1] - mu).square()
    variance = recursion(torch.cat([d["sigma1"].square()[None], driven]), (1 - alpha1) * share)
    observe(mu, variance.sqrt(), y)


def garch_scalars(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters, beta1 among them."""
    return numbered(mu=0, alpha0=0, alpha1=0, beta1=0)(draws | {"beta1": (1 - draws["alpha1"]) * draws["share"]})


def gp_regr(d: Data) -> None:
    """A Gaussian process with noise."""
    rho, sigma = pyro.sample("rho", dist.Gamma(25.0, 4.0)), pyro.sample("sigma", dist.HalfNormal(1.0))
    alpha, x = pyro.sample("alpha", dist.HalfNormal(2.0)), d["x"]
    distance = (x[:, None] - x).square()
    covariance = alpha.square() * torch.exp(-distance / (2 * rho.square())) + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), covariance), obs=d["y"])


def blr(d: Data) -> None:
    """A regression with strong correlations."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(5), 10.0).to_event(1))
    observe(d["X"] @ beta, pyro.sample("sigma", dist.HalfNormal(10.0)), d["y"])


def hmm(d: Data) -> None:
    """A hidden Markov model of two states, which are summed out: a product of matrices, in a tree."""
    theta1, theta2 = flat("theta1", constraints.simplex, (2,)), flat("theta2", constraints.simplex, (2,))
    mu = flat("mu", constraints.positive_ordered_vector, (2,))
    pyro.factor("mu_density", dist.Normal(torch.tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    emissions = dist.Normal(mu, 1.0).log_prob(d["y"][:, None])
    steps = torch.stack([theta1, theta2]).log() + emissions[1:, None, :]  # (T - 1, from, to)
    while len(steps) > 1:
        rest = steps[2 * (len(steps) // 2) :]
        pairs = torch.logsumexp(steps[0 : len(steps) - 1 : 2, :, :, None] + steps[1::2, None, :, :], 2)
        steps = torch.cat([pairs, rest])
    pyro.factor("y", torch.logsumexp(emissions[0][:, None] + steps[0], (0, 1)) - math.log(2))


def regression(x: Callable[[Data], Tensor], y: Callable[[Data], Tensor]) -> Callable[[Data], None]:
    """Return a regression with flat densities of all parameters."""

    def model(d: Data) -> None:
        features = x(d)
        beta = flat("beta", constraints.real_vector, (features.shape[1],))
        observe(features @ beta, flat("sigma", constraints.positive), y(d))

    return model


def nes_features(d: Data) -> Tensor:
    """Return features of voters."""
    ages = [(d["age_discrete"] == age).double() for age in (2, 3, 4)]
    columns = [torch.ones_like(ages[0]), d["real_ideo"], d["race_adj"], *ages, d["educ1"], d["gender"], d["income"]]
    return torch.stack(columns, 1)


def mesquite_features(d: Data) -> Tensor:
    """Return features of bushes."""
    logs = [d[name].log() for name in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    return torch.stack([torch.ones_like(logs[0]), *logs, d["group"]], 1)


def diamonds(d: Data) -> None:
    """A regression with strong correlations over 5000 diamonds."""
    x = d["X"][:, 1:] - d["X"][:, 1:].mean(0)
    b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    intercept = pyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    observe(intercept + x @ b, half("sigma", dist.StudentT(3.0, 0.0, 10.0)), d["Y"])


SCHOOLS = ("eight_schools", "eight_schools-eight_schools_noncentered")
TARGETS = {
    "eight_schools": Target(*SCHOOLS, eight_schools, numbered(theta=8, mu=0, tau=0)),
    "eight_schools_noncentered": Target(*SCHOOLS, eight_schools_noncentered, effects),
    "kidiq": Target("kidiq", "kidiq-kidscore_momiq", kidiq, numbered(beta=2, sigma=0)),
    "arK": Target("arK", "arK-arK", ar_k, numbered(alpha=0, beta=5, sigma=0)),
    "arma": Target("arma", "arma-arma11", arma, numbered(mu=0, phi=0, theta=0, sigma=0)),
    "mixture": Target("low_dim_gauss_mix", "low_dim_gauss_mix-low_dim_gauss_mix", mixture, numbered(mu=2, sigma=2, theta=0)),
    "garch": Target("garch", "garch-garch11", garch, garch_scalars),
    "gp_regr": Target("gp_pois_regr", "gp_pois_regr-gp_regr", gp_regr, numbered(rho=0, alpha=0, sigma=0)),
    "blr": Target("sblrc", "sblrc-blr", blr, numbered(beta=5, sigma=0)),
    "hmm": Target("hmm_example", "hmm_example-hmm_example", hmm, numbered(theta1=2, theta2=2, mu=2)),
    "nes": Target("nes1980", "nes1980-nes", regression(nes_features, lambda d: d["partyid7"]), numbered(beta=9, sigma=0)),
    "mesquite": Target(
        "mesquite",
        "mesquite-logmesquite",
        regression(mesquite_features, lambda d: d["weight"].log()),
        numbered(beta=7, sigma=0),
    ),
    "diamonds": Target("diamonds", "diamonds-diamonds", diamonds, numbered(b=24, Intercept=0, sigma=0)),
}


def read(path: Path) -> Any:
    """Return the only file of an archive, as JSON."""
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0]))


def commit_of_this_file() -> str:
    """Return the commit that is checked out, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def processor_seconds() -> float:
    """Return the processor time of this process and of those that it started, such as compilers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(target: Target, method: Any, data_dir: Path, *, c2st_draws: int, seed: int) -> dict[str, Any]:
    """Return the figures of a method on a target."""
    data = {
        name: torch.as_tensor(x, dtype=torch.float64) for name, x in read(data_dir / f"{target.data}.data.json.zip").items()
    }
    chains = read(data_dir / f"{target.draws}.draws.json.zip")
    reference = {name: torch.tensor([chain[name] for chain in chains], dtype=torch.float64).flatten() for name in chains[0]}
    pyro.set_rng_seed(seed)
    start = processor_seconds()
    fit = posterior(target.model, data, method=method, progress=False)
    seconds = processor_seconds() - start
    drawn = hasattr(fit, "z")
    found = target.scalars(fit.get_samples(None if drawn else NUM_SAMPLES))
    if missing := set(reference) - set(found):
        raise ValueError(f"{target.draws} has {sorted(missing)}, but the model does not.")
    means = {name: float((found[name].mean() - x.mean()) / x.std()) for name, x in reference.items()}
    deviations = {name: float(found[name].std() / x.std() - 1) for name, x in reference.items()}
    worst = max(means, key=lambda name: abs(means[name]))
    row = {
        "mean error": abs(means[worst]),
        "of": worst,
        "sd error, %": 100 * max(map(abs, deviations.values())),
        "k-hat": fit.pareto_k if drawn else fit.psis(NUM_SAMPLES).pareto_k,
        "seconds": fit.seconds,
        "cpu seconds": seconds,
        "gradients": fit.num_gradients,
    }
    if getattr(fit, "stats", None):
        by_chain = {name: found[name].reshape(len(fit.z), -1) for name in reference}
        row["ess"] = min(figures["ess_bulk"] for figures in chain_diagnostics(by_chain).values())
    if c2st_draws:
        a, b = (torch.stack([draws[name] for name in reference], 1) for draws in (reference, found))
        n = min(len(a), len(b), c2st_draws)
        row["c2st"] = float(c2st(a[torch.randperm(len(a))[:n]], b[torch.randperm(len(b))[:n]]).value)
    return row


def report(file: Path) -> None:
    """Print the last row of each target, method and its settings of a file, as a table in Markdown."""
    rows = pd.read_json(file, lines=True).drop_duplicates(["target", "method", "settings"], keep="last")
    targets, methods = list(TARGETS), list(METHODS)
    order = rows["method"].map(methods.index) + len(methods) * rows["target"].map(targets.index)
    rows = rows.iloc[order.argsort(kind="stable")].reindex(columns=[*COLUMNS, "settings", "commit", "seed"])
    rows = rows.astype({"gradients": "Int64"}).assign(ess=rows["ess"].round().astype("Int64"))
    shown = rows[COLUMNS].dropna(axis=1, how="all").astype(object).where(rows[COLUMNS].notna(), None)
    print(shown.to_markdown(index=False, floatfmt=".3g", intfmt=",", missingval=""))
    for (method, settings, seed), group in rows.groupby(["method", "settings", "seed"], sort=False):
        commits = ", ".join(group["commit"].unique())
        print(f"- {method}: `{settings}`, seed {seed}, {commits}: {', '.join(group['target'])}")


def main(
    data_dir: Annotated[Path, typer.Option(help="folder of data and reference draws")] = Path(),
    only: Annotated[str, typer.Option(help="names of targets, by commas")] = ",".join(TARGETS),
    methods: Annotated[str, typer.Option(help="names of methods, by commas")] = "nuts,mean_field,full_rank,flow,pathfinder",
    draws: Annotated[int, typer.Option(help="draws of each of the four chains of NUTS and NeuTra")] = 4000,
    c2st_draws: Annotated[int, typer.Option(help="draws a side of classifier two-sample tests; 0 for none")] = 0,
    accept: Annotated[float, typer.Option(help="acceptance probability that these chains adapt to")] = 0.8,
    seed: Annotated[int, typer.Option(help="seed of each fit")] = 0,
    out: Annotated[Path, typer.Option(help="folder for the rows")] = Path("out/posteriordb"),
    as_report: Annotated[bool, typer.Option("--report", help="print the rows of earlier runs")] = False,  # noqa: FBT002 - a flag
) -> None:
    """Print a row for each target and method."""
    file = out / "rows.jsonl"
    if as_report:
        report(file)
        return
    torch.set_default_dtype(torch.float64)
    out.mkdir(parents=True, exist_ok=True)
    commit = commit_of_this_file()
    for target in only.split(","):
        for name in methods.split(","):
            method = METHODS[name](NoUTurn(num_samples=draws, target_accept_prob=accept))
            row = {"target": target, "method": name, "settings": repr(method), "seed": seed, "commit": commit}
            try:
                row |= measure(TARGETS[target], method, data_dir, c2st_draws=c2st_draws, seed=seed)
            except ValueError as error:  # the method cannot: told, not hidden
                row["remark"] = str(error)[:80]
            row = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in row.items()}
            with file.open("a") as opened:
                opened.write(json.dumps(row) + "\n")
            print(" ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values()), flush=True)


if __name__ == "__main__":
    typer.run(main)
