"""The comparisons of `python -m benchmarks.speed`: one function each, with the target of each pair beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import torch
import zuko
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Distribution

from benchmarks.peers import data
from benchmarks.peers.data import FLOW_BATCH, FLOW_BINS, FLOW_FEATURES, FLOW_HIDDEN, FLOW_TRANSFORMS
from benchmarks.speed import programs
from benchmarks.speed.measure import AtMost, Bench, Here, Target, There
from benchmarks.speed.programs import Program
from pyro_genmodels import MAF, NSF, VAE, BernoulliLikelihood, Flow, MaximumLikelihood
from pyro_genmodels.infer.compiled import CapturedLoss, CompiledSVI, captured_target
from pyro_genmodels.samplers import Langevin, run
from pyro_genmodels.samplers.target import check_target

RUN_STEPS = {"eight schools": 2048, "hierarchical": 1024, "logistic": 640}
"""Steps of one `run`."""

UNROLL = {"eight schools": 64, "hierarchical": 64, "logistic": 64}
"""Steps in one graph, as a long run would choose."""

RESTARTS = 64

BLOCK = 1000
"""Chains that a captured energy takes at once."""


def adam() -> Any:
    return pyro.optim.Adam({"lr": 1e-3})


def stock(program: Program, name: str = "stock SVI") -> Here:
    """Return a step of Pyro's SVI."""
    svi = SVI(program.model, program.guide, adam(), program.loss)
    return Here(name, lambda: svi.step(*program.args))


def compiled(program: Program, name: str = "CompiledSVI.step", **options: Any) -> Here:
    """Return a step of CompiledSVI."""
    svi = CompiledSVI(program.model, program.guide, adam(), program.loss, **options)
    svi.step(*program.args)  # the first step is Pyro's own
    return Here(name, lambda: svi.step(*program.args))


def compiled_run(name: str, label: str = "CompiledSVI.run", **options: Any) -> Here:
    """Return a run of CompiledSVI."""
    program, steps = programs.with_normal_guide(name), RUN_STEPS[name]
    svi = CompiledSVI(program.model, program.guide, adam(), program.loss, **options)
    for _ in range(2):  # the first step is Pyro's own, the second compiles
        svi.step(*program.args)
    return Here(label, lambda: svi.run(steps, *program.args, unroll=UNROLL[name], progress=False), steps)


def svi_step(bench: Bench) -> None:
    """Measure a step of small models."""
    for name, limit in (("eight schools", 0.03), ("hierarchical", 0.03), ("logistic", 0.08)):
        numpyro = There("NumPyro, jitted update", bench.peers, "numpyro_programs", "svi_step", {"name": name})
        make = programs.with_normal_guide
        bench.compare(f"{name}, step", compiled(make(name)), [(stock(make(name)), AtMost(limit)), (numpyro, None)])


def svi_run(bench: Bench) -> None:
    """Measure a step inside a run of small models."""
    targets: dict[str, tuple[Target | None, Target]] = {
        "eight schools": (AtMost(0.01), AtMost(2)),
        "hierarchical": (AtMost(0.01), AtMost(2)),
        "logistic": (None, AtMost(1.5)),
    }
    for name, (stock_target, numpyro_target) in targets.items():
        steps = RUN_STEPS[name]
        arguments = {"name": name, "num_steps": steps}
        numpyro = There("NumPyro, SVI.run", bench.peers, "numpyro_programs", "svi_run", arguments, steps)
        make = programs.with_normal_guide
        others = [(stock(make(name)), stock_target), (numpyro, numpyro_target)]
        bench.compare(f"{name}, a step of a run", compiled_run(name), others)
        bench.compare(f"{name}, the same without audits", compiled_run(name, audit=False), [(numpyro, None)])


def restarts(bench: Bench) -> None:
    """Measure a step of many restarts against as many steps."""
    program, one = programs.with_normal_guide("eight schools"), compiled(programs.with_normal_guide("eight schools"))
    many = compiled(program, f"CompiledSVI.step, {RESTARTS} restarts", num_restarts=RESTARTS)

    def steps() -> None:
        for _ in range(RESTARTS):
            one.function()

    bench.compare("eight schools, restarts", many, [(Here(f"{RESTARTS} x CompiledSVI.step", steps), AtMost(0.03))])


def enumeration(bench: Bench) -> None:
    """Measure a step of models whose discrete sites are summed out."""
    for name in ("GMM", "HMM"):
        make = programs.enumerated
        bench.compare(f"{name} by TraceEnum_ELBO, step", compiled(make(name)), [(stock(make(name)), AtMost(0.05))])


def vae(bench: Bench) -> None:
    """Measure a step of a VAE."""
    for batch, limit in ((32, 0.30), (128, 0.40), (256, 0.50)):
        others: list[tuple[Here, Target | None]] = [
            (stock(programs.vae(batch)), AtMost(limit)),
            (Here("PyTorch by hand", programs.vae_by_hand(batch, compiled=False)), AtMost(0.75)),
            (Here("the same, torch.compile", programs.vae_by_hand(batch, compiled=True)), AtMost(1.0)),
        ]
        bench.compare(f"VAE, batch {batch}, step", compiled(programs.vae(batch)), others)


CHOICES = {"NSF": (NSF, zuko.flows.NSF, {"bins": FLOW_BINS}), "MAF": (MAF, zuko.flows.MAF, {})}


def flow_pair(name: str, batch: int) -> tuple[Flow, nn.Module, Tensor]:
    """Return a flow of this package, the same of zuko, and data."""
    choice, theirs, options = CHOICES[name]
    hidden = (FLOW_HIDDEN, FLOW_HIDDEN)
    flow = Flow((FLOW_FEATURES,), transform=choice(transforms=FLOW_TRANSFORMS, hidden=hidden, **options))
    bare = theirs(FLOW_FEATURES, transforms=FLOW_TRANSFORMS, hidden_features=hidden, **options)
    return flow, bare, torch.randn(batch, FLOW_FEATURES)


def flow_program() -> Program:
    """Return the NSF with its objective as a program for SVI."""
    ours, _, x = flow_pair("NSF", FLOW_BATCH)
    return Program(ours.model, ours.guide, MaximumLikelihood(), (x,))


def gradient(name: str, loss: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> Here:
    """Return a loss and its gradient."""
    parameters = list(module.parameters())
    return Here(name, lambda: torch.autograd.grad(loss(x), parameters))


def zuko_loss(flow: nn.Module, x: Tensor) -> Here:
    """Return loss and gradient of a flow of zuko, without torch's checks of values, which importing zuko switches off."""

    def loss(x: Tensor) -> Tensor:
        before = Distribution._validate_args
        Distribution.set_default_validate_args(False)
        try:
            return -flow().log_prob(x).sum()
        finally:
            Distribution.set_default_validate_args(before)

    return gradient("zuko", loss, x, flow)


def flow(bench: Bench) -> None:
    """Measure loss and gradient of flows."""
    for name in CHOICES:
        ours, bare, x = flow_pair(name, FLOW_BATCH)
        loss = CapturedLoss(ours.model, ours.guide, MaximumLikelihood())
        others: list[tuple[Here | There, Target | None]] = [(zuko_loss(bare, x), AtMost(0.45))]
        for peer in ("nflows", "normflows"):
            others.append((There(peer, bench.peers, "torch_programs", peer, {"name": name}), AtMost(0.40)))
        bench.compare(f"{name}, loss and gradient, batch {FLOW_BATCH}", Here("CapturedLoss", partial(loss, x)), others)


def flow_eager(bench: Bench) -> None:
    """Measure what this package adds to zuko, without a capture."""
    for name in CHOICES:
        for batch in (32, FLOW_BATCH):
            ours, bare, x = flow_pair(name, batch)
            eager = gradient("Flow, MaximumLikelihood", MaximumLikelihood()(ours), x, ours)
            bench.compare(f"{name}, eager, batch {batch}", eager, [(zuko_loss(bare, x), AtMost(1.05))])


def vae_eager(bench: Bench) -> None:
    """Measure what this package adds to a VAE written in Pyro, without a capture."""
    for batch in (32, 256):
        widths, x = (programs.VAE_HIDDEN,) * 2, programs.images(batch)
        ours = VAE((programs.VAE_PIXELS,), latent_dim=programs.VAE_LATENT, likelihood=BernoulliLikelihood(), hidden=widths)
        svi = SVI(ours.model, ours.guide, adam(), Trace_ELBO())
        eager = Here("VAE, SVI.step", partial(svi.step, x))
        bench.compare(f"VAE, eager, batch {batch}", eager, [(stock(programs.vae(batch)), AtMost(1.05))])


def langevin(bench: Bench) -> None:
    """Measure Langevin chains on an energy of two layers; ratios are of rates."""
    for name, (chains, dims, steps) in data.LANGEVIN.items():
        width = data.LANGEVIN_HIDDEN
        layers = [nn.Linear(dims, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)]
        target, size = check_target(nn.Sequential(*layers, nn.Flatten(0)), 1), torch.tensor(data.LANGEVIN_STEP_SIZE)
        sampler, x = Langevin(data.LANGEVIN_STEP_SIZE, adjusted=False), torch.randn(chains, dims)
        theirs = There("torchebm", bench.peers, "torch_programs", "torchebm", {"name": name}, steps)
        captured = captured_target(target, x, block=BLOCK if chains > BLOCK else None)
        eager = Here("Langevin", partial(run, sampler, target, x, steps, step_size=size), steps)
        ours = Here("Langevin, captured", partial(run, sampler, captured, x, steps, step_size=size), steps)
        bench.compare(f"Langevin, {name}, a step of all chains", ours, [(theirs, AtMost(1 / 1.5)), (eager, None)])
