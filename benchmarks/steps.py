"""Benchmark of one training step against the same step written with zuko or plain Pyro, in milliseconds.

python benchmarks/steps.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_genmodels import NSF, VAE, BernoulliLikelihood, Flow, MaximumLikelihood


def median_milliseconds(
    ours: Callable[[], object], stock: Callable[[], object], rounds: int = 60
) -> tuple[float, float, float]:
    """Return the median milliseconds of both functions and the median of their ratio; the functions alternate."""
    times: list[tuple[float, float]] = []
    for i in range(rounds + 5):
        pair = []
        for step in (ours, stock):
            start = time.perf_counter()
            step()
            pair.append(1e3 * (time.perf_counter() - start))
        if i >= 5:
            times.append((pair[0], pair[1]))
    return median(t[0] for t in times), median(t[1] for t in times), median(t[0] / t[1] for t in times)


def flow_step() -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions that compute loss and gradient of an NSF: 8 features, 5 transforms of 2x128, 8 bins, batch 512."""
    x = torch.randn(512, 8)
    family = Flow((8,), transform=NSF(transforms=5))
    loss = MaximumLikelihood()(family)
    stock = zuko.flows.NSF(8, transforms=5, hidden_features=(128, 128))
    return lambda: loss(x).backward(), lambda: (-stock().log_prob(x).sum()).backward()


def vae_step(batch: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions that run `SVI.step` of a VAE 784-200-200-50: of this package, and as in Pyro's tutorial."""
    x = (torch.rand(batch, 784) > 0.5).float()
    vae = VAE((784,), latent_dim=50, likelihood=BernoulliLikelihood(), hidden=(200, 200))
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    encoder = nn.Sequential(nn.Linear(784, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 100))
    decoder = nn.Sequential(nn.Linear(50, 200), nn.SiLU(), nn.Linear(200, 200), nn.SiLU(), nn.Linear(200, 784))

    def model(x: torch.Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(50), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    stock = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x), lambda: stock.step(x)


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"{'step':34} {'ours':>8} {'stock':>8} {'ratio':>6}   (ms, medians)")
    for name, steps in (
        ("NSF loss and gradient, batch 512", flow_step()),
        ("VAE SVI.step, batch 32", vae_step(32)),
        ("VAE SVI.step, batch 256", vae_step(256)),
    ):
        print("{:34} {:8.1f} {:8.1f} {:6.2f}".format(name, *median_milliseconds(*steps)))
