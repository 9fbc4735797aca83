"""Pyro programs of the benchmarks. The NumPyro twins of the first four stand in `benchmarks/peers/numpyro_programs.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_uniform
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from benchmarks.peers import data

Model = Callable[..., Any]


@dataclass(frozen=True)
class Program:
    """A Pyro program: model, guide, loss and the model's arguments."""

    model: Model
    guide: Model
    loss: ELBO
    args: tuple[Tensor, ...] = ()


names = count()


def own_name(guide: type[nn.Module], model: Model, **options: Any) -> nn.Module:
    """Return an autoguide under a name of its own in the param store, so that no two of them share parameters."""
    return type(f"{guide.__name__}{next(names)}", (guide,), {})(model, **options)


def eight_schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def hierarchical(x: Tensor, group: Tensor, y: Tensor) -> None:
    loc_a, loc_b = pyro.sample("loc_a", dist.Normal(0.0, 5.0)), pyro.sample("loc_b", dist.Normal(0.0, 5.0))
    scale_a, scale_b = pyro.sample("scale_a", dist.HalfNormal(1.0)), pyro.sample("scale_b", dist.HalfNormal(1.0))
    with pyro.plate("groups", data.GROUPS):
        a, b = pyro.sample("a", dist.Normal(loc_a, scale_a)), pyro.sample("b", dist.Normal(loc_b, scale_b))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(a[group] + b[group] * x, sigma), obs=y)


def logistic(x: Tensor, y: Tensor) -> None:
    bias = pyro.sample("bias", dist.Normal(0.0, 5.0))
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=x @ weight + bias), obs=y)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = pyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * torch.exp(-(distance**2) / 2) + sigma * torch.eye(len(x))
    pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), covariance), obs=y)


@config_enumerate
def mixture(x: Tensor) -> None:
    """Run a mixture of three normals over the plane."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(Vindex(loc)[k], Vindex(scale)[k][..., None]).to_event(1), obs=x)


@config_enumerate
def markov_chain(y: Tensor) -> None:
    """Run a hidden Markov model of three states over 20 times, for a batch of sequences (times, sequences)."""
    rows = pyro.sample("rows", dist.Dirichlet(0.9 * torch.eye(3) + 0.1).to_event(1))
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 1.0).to_event(1))
    with pyro.plate("sequences", y.shape[1], dim=-1):
        state: Any = 0
        for t in pyro.markov(range(len(y))):
            state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(rows)[state]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[state], 1.0), obs=y[t])


def named(name: str) -> tuple[Model, tuple[Tensor, ...]]:
    """Return a model that NumPyro has too, and its arguments."""
    if name == "eight schools":
        y, sigma = data.eight_schools()
        return eight_schools, (torch.from_numpy(sigma), torch.from_numpy(y))
    models: dict[str, Model] = {"hierarchical": hierarchical, "logistic": logistic, "gaussian process": gaussian_process}
    arrays: dict[str, Callable[[], tuple[Any, ...]]] = {
        "hierarchical": data.hierarchical,
        "logistic": data.logistic,
        "gaussian process": data.gaussian_process,
    }
    return models[name], tuple(torch.from_numpy(array) for array in arrays[name]())


def with_normal_guide(name: str) -> Program:
    """Return a model that NumPyro has too, with AutoNormal, whose means start at random."""
    model, args = named(name)
    return Program(model, own_name(AutoNormal, model, init_loc_fn=init_to_uniform), Trace_ELBO(), args)


def enumerated(name: str) -> Program:
    """Return the mixture or the hidden Markov model, with a guide over its parameters."""
    model, x = {"GMM": (mixture, torch.randn(200, 2)), "HMM": (markov_chain, torch.randn(20, 8))}[name]
    visible = pyro.poutine.block(model, hide_fn=lambda site: site["name"].startswith(("k", "state")))
    guide = own_name(AutoNormal if name == "GMM" else AutoDelta, visible)
    return Program(model, guide, TraceEnum_ELBO(max_plate_nesting=1), (x,))


VAE_LATENT, VAE_PIXELS, VAE_HIDDEN = 50, 784, 200


class Networks(nn.Module):
    """Encoder and decoder of a VAE 784-200-200-50."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self._network(VAE_PIXELS, 2 * VAE_LATENT)
        self.decoder = self._network(VAE_LATENT, VAE_PIXELS)

    def _network(self, inputs: int, outputs: int) -> nn.Module:
        h = VAE_HIDDEN
        return nn.Sequential(nn.Linear(inputs, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU(), nn.Linear(h, outputs))


def images(batch: int) -> Tensor:
    """Return binary images (batch, 784)."""
    return (torch.rand(batch, VAE_PIXELS) > 0.5).float()


def vae(batch: int) -> Program:
    """Return a VAE as in Pyro's tutorial."""
    networks, name = Networks(), f"vae{next(names)}"

    def model(x: Tensor) -> None:
        pyro.module(f"{name}_decoder", networks.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(VAE_LATENT), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=networks.decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name}_encoder", networks.encoder)
        with pyro.plate("data", len(x)):
            loc, raw = networks.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, nn.functional.softplus(raw)).to_event(1))

    return Program(model, guide, Trace_ELBO(), (images(batch),))


def vae_by_hand(batch: int, *, compiled: bool) -> Callable[[], object]:
    """Return a training step of the same VAE in PyTorch alone, with the closed form of the KL divergence.

    Compiled, the loss is under `torch.compile` and Adam is fused.
    """
    networks, x = Networks(), images(batch)

    def loss_of(x: Tensor) -> Tensor:
        loc, raw = networks.encoder(x).chunk(2, -1)
        scale = nn.functional.softplus(raw)
        logits = networks.decoder(loc + scale * torch.randn_like(loc))
        kl = (scale.square() + loc.square() - 1 - 2 * scale.log()).sum() / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl

    run: Callable[[Tensor], Tensor] = torch.compile(loss_of) if compiled else loss_of
    optim = torch.optim.Adam(networks.parameters(), lr=1e-3, fused=compiled or None)

    def step() -> float:
        optim.zero_grad()
        loss = run(x)
        loss.backward()
        optim.step()
        return loss.item()

    return step


def chain_of_sites(num_sites: int) -> Program:
    """Return a model of so many latent sites, each one number, and one observed site."""

    def model(y: Tensor) -> None:
        total: Any = 0.0
        for i in range(num_sites):
            total = total + pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(total, 1.0), obs=y)

    return Program(model, own_name(AutoNormal, model), Trace_ELBO(), (torch.randn(10),))


def nested_plates(levels: int) -> Program:
    """Return a model of so many plates of two, one inside the other, with a latent site at each level."""

    def model(y: Tensor) -> None:
        def level(i: int, loc: Any) -> None:
            if i == levels:
                pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
                return
            with pyro.plate(f"plate_{i}", 2, dim=i - levels):
                level(i + 1, pyro.sample(f"z_{i}", dist.Normal(loc, 1.0)))

        level(0, torch.zeros(()))

    return Program(model, own_name(AutoNormal, model), Trace_ELBO(), (torch.randn([2] * levels),))


def logistic_of(rows: int, columns: int) -> Program:
    """Return the logistic regression of so many rows and columns."""
    args = tuple(torch.from_numpy(array) for array in data.logistic(rows, columns))
    return Program(logistic, own_name(AutoNormal, logistic), Trace_ELBO(), args)
