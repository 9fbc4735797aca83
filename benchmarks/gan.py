"""Benchmarks of adversarial training: python benchmarks/gan.py modes

Each command trains, evaluates and prints rows for RESULTS.md.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads free the cores

import time
from functools import partial
from typing import Annotated, Any

import pyro
import pyro.distributions as dist
import torch
import typer
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam as PyroAdam
from torch import Tensor, nn
from torch.optim import SGD, Adam
from tqdm.auto import tqdm

from pyro_genmodels import GAN, Adversarial, AutoFamily, DenseCritic, DenseGenerator
from pyro_genmodels.datasets import load
from pyro_genmodels.divergences import JensenShannon, KullbackLeibler, SquaredHellinger, TotalVariation
from pyro_genmodels.evaluation import c2st, mode_coverage
from pyro_genmodels.infer.adversarial import FGAN, R1, R2, NonSaturating, PosteriorPairing

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
SCALES = {"grid": 0.05, "ring": 0.01}


@app.callback()
def root(threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2) -> None:
    """Run benchmarks of adversarial training."""
    torch.set_num_threads(threads)


@app.command()
def modes(
    seconds: Annotated[float, typer.Option(help="Seconds of training per run.")] = 200,
    runs: int = 10,
    first: Annotated[int, typer.Option(help="Seed of the first run.")] = 0,
    only: Annotated[str, typer.Option(help="grid or ring.")] = "",
    batch_size: int = 256,
) -> None:
    """Count modes and good samples on PacGAN's mixtures: 100,000 points, 2,500 samples."""
    print("| data | seed | modes | high quality | reverse KL | steps | seconds |")
    print("|---" * 7 + "|")
    for name in [only] if only else SCALES:
        results = []
        for seed in range(first, first + runs):
            pyro.set_rng_seed(seed)
            density = load(name).density
            x = density.sample((100_000,))
            gan = GAN((2,), latent_dim=2, generator=DenseGenerator(octaves=3))
            gan.standardize(x)
            optim = partial(Adam, lr=2e-3, betas=(0.0, 0.99))
            trainer = Adversarial(gan.model, gan.critic, optim=optim, ema_decay=0.999)
            steps, start = 0, time.perf_counter()
            while (share := (time.perf_counter() - start) / seconds) < 1:
                gamma = 0.3 * 0.01**share  # first the coarse shape, then the finest features
                trainer.penalties = (R1(gamma), R2(gamma))
                trainer.step(x[torch.randint(len(x), (batch_size,))])
                for optimiser in trainer.optimisers.values():
                    optimiser.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - share))
                steps += 1
            with trainer.averaged():
                coverage = mode_coverage(gan().sample((2500,)), density.component_distribution.base_dist.loc, SCALES[name])
            results.append(coverage)
            print(
                f"| {name} | {seed} | {coverage.covered} of {len(coverage.counts)} | {coverage.high_quality:.1%} | "
                f"{coverage.reverse_kl:.3f} | {steps} | {time.perf_counter() - start:.0f} |",
                flush=True,
            )
        n = len(results)
        print(
            f"| {name} | mean of {n} | {sum(c.covered for c in results) / n:.1f} | "
            f"{sum(c.high_quality for c in results) / n:.1%} | {sum(c.reverse_kl for c in results) / n:.3f} | | |"
        )


class Quadratic(nn.Module):
    """A critic with features x and x squared, linear plus a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.network = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = torch.stack([x, x.square() / 2], -1)
        return (self.linear(features) + self.network(features)).squeeze(-1)


@app.command()
def bounds(steps: int = 4000, draws: int = 1_000_000, seed: int = 0) -> None:
    """Compare the bounds of trained critics with the divergences of two normal distributions."""
    print("| f | true D | bound ± se | share of D | within [.95 D - 2 se, D + 2 se] |")
    print("|---" * 5 + "|")
    p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.5)
    x = torch.linspace(-20, 20, 200_001, dtype=torch.float64)
    for f in (KullbackLeibler(), JensenShannon(), SquaredHellinger(), TotalVariation()):
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()

        def model(data: Tensor) -> None:
            loc = pyro.param("loc", torch.tensor(1.0))
            with pyro.plate("data", len(data)):
                pyro.sample("x", dist.Normal(loc, 1.5), obs=data)

        log_p, log_q = p.log_prob(x), q.log_prob(x)
        truth = torch.trapezoid(log_q.exp() * f((log_p - log_q).exp()), x).item()
        trainer = Adversarial(model, Quadratic(), FGAN(f), (partial(SGD, lr=0.0), partial(Adam, lr=1e-2)))
        for step in tqdm(range(steps), desc=type(f).__name__, mininterval=5):
            trainer.step(p.sample((1024,)))
            trainer.optimisers["critic"].param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        value, error = trainer.divergence(p.sample((draws,)))
        inside = 0.95 * truth - 2 * error <= value <= truth + 2 * error
        print(
            f"| {type(f).__name__} | {truth:.5f} | {value:.5f} ± {error:.5f} | {value / truth:.1%} | "
            f"{'yes' if inside else 'no'} |",
            flush=True,
        )


EFFECTS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERRORS = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    """Eight schools, centred."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=EFFECTS)


def not_centred() -> None:
    """Eight schools, not centred: the same posterior, easier for NUTS."""
    mu, tau = pyro.sample("mu", dist.Normal(0.0, 5.0)), pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(pyro.deterministic("theta", mu + tau * z), ERRORS), obs=EFFECTS)


def banana() -> None:
    """A posterior in which b is near 2 a^2 - 2."""
    a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(b - 2 * a**2 + 2, 0.5), obs=torch.tensor(0.0))


MODELS: dict[str, tuple[Any, Any, tuple[str, ...], int]] = {
    "banana": (banana, banana, ("a", "b"), 2000),
    "eight schools, centred": (schools, not_centred, ("mu", "tau", "theta"), 1200),
}


@app.command()
def posterior(draws: int = 2000, seed: int = 0) -> None:
    """Compare adversarial variational Bayes and AutoNormal with NUTS by a classifier."""
    print("| posterior | guide | C2ST against NUTS | seconds |")
    print("|---" * 4 + "|")
    for name, (model, reference, names, steps) in MODELS.items():
        pyro.set_rng_seed(seed)
        pyro.clear_param_store()

        def joined(samples: dict[str, Tensor], names: tuple[str, ...] = names) -> Tensor:
            parts = [samples[n].log() if n == "tau" else samples[n] for n in names]
            return torch.cat([part.detach().reshape(len(part), -1) for part in parts], 1)

        mcmc = MCMC(NUTS(reference, target_accept_prob=0.95), num_samples=draws, warmup_steps=1000, disable_progbar=True)
        mcmc.run()
        samples = mcmc.get_samples()
        if "z" in samples:
            samples["theta"] = samples["mu"][:, None] + samples["tau"][:, None] * samples["z"]
        truth = joined(samples)

        start, normal = time.perf_counter(), AutoNormal(model)
        svi = SVI(model, normal, PyroAdam({"lr": 0.01}), Trace_ELBO(num_particles=8, vectorize_particles=True))
        for _ in range(4000):
            svi.step()
        samples = Predictive(normal, num_samples=draws)()
        print(
            f"| {name} | AutoNormal | {c2st(truth, joined(samples)).value:.3f} | {time.perf_counter() - start:.0f} |",
            flush=True,
        )

        start = time.perf_counter()
        networks: dict[str, Any] = {"generator": DenseGenerator((64, 64)), "critic": DenseCritic((128, 128))}
        guide = AutoFamily(model, lambda n, networks=networks: GAN((n,), latent_dim=2 * n, standardize=False, **networks))
        guide()
        optim = partial(Adam, lr=3e-4, betas=(0.5, 0.99)), partial(Adam, lr=1e-3, betas=(0.5, 0.99))
        trainer = Adversarial(
            model, guide.family.critic, NonSaturating(), optim, guide=guide, pairing=PosteriorPairing(num_particles=512),
            num_critic_steps=5, ema_decay=0.999,
        )  # fmt: skip
        for step in tqdm(range(steps), desc=name, mininterval=10):
            trainer.step()
            trainer.optimisers["generator"].param_groups[0]["lr"] = 3e-4 * min(1.0, 2 * (1 - step / steps))
        with trainer.averaged():
            samples = Predictive(guide, num_samples=draws)()
        spent = time.perf_counter() - start
        print(f"| {name} | AutoFamily, a GAN | {c2st(truth, joined(samples)).value:.3f} | {spent:.0f} |", flush=True)


if __name__ == "__main__":
    app()
