"""Runs of two processes, by a Trainer, which `test_lightning_processes.py` starts: ``python two_processes.py NAME FOLDER``.

Lightning starts this script once more for rank 1. Each rank writes what it found to FOLDER/NAME.RANK.json.
"""

import copy
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pyro
import pyro.distributions as dist
import torch
from cases import CASES, REPRESENTATIVE
from lightning import Callback, Trainer
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import GAN, EnergyModel, Flow, FlowMatching, NoiseContrastive, Persistent, train
from pyro_genmodels.families import VectorQuantizedVAE
from pyro_genmodels.infer import ImplicitScoreMatching, ImportanceWeightedELBO, KLWeightedELBO, SlicedScoreMatching
from pyro_genmodels.infer.compiled.losses import differentiable_loss
from pyro_genmodels.training import Checkpoint
from pyro_genmodels.utils.ranks import Ranks, joint_seed

ROWS, SEED = 7, 11
RANK = int(os.environ.get("LOCAL_RANK", "0"))
sgd = partial(torch.optim.SGD, lr=1.0)


def trainer(*callbacks, **options):
    options = {"logger": False, "enable_model_summary": False, **options}
    return Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=list(callbacks), **options)


def numbers(module):
    return {name: t.detach().double().clone() for name, t in module.state_dict().items() if t.numel()}


def error(found, wanted):
    """Return the largest difference of two tensors, relative to the largest number."""
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-8))


class Copied(Callback):
    """Copies of the fit and its objective when training begins."""

    def __init__(self, *parts):
        self.parts = parts

    def on_train_start(self, trainer, pl_module):
        self.copies = copy.deepcopy(self.parts)


def gradient_on_one(copies, args, rank, size):
    """Return the gradient that one rank contributes, computed in this process from the rank's rows and seed."""
    fit, objective = copy.deepcopy(copies)
    ranks = Ranks(rank, size)
    pyro.set_rng_seed(ranks.seed(SEED, 1))
    own = tuple(t[ranks.part(len(t))] for t in args)
    fit.train()
    differentiable_loss(objective)(fit.model, fit.guide, *own, size=ROWS).backward()
    weight = size * len(own[0]) / ROWS
    return {n: weight * p.grad / (size * ROWS) for n, p in fit.named_parameters() if p.grad is not None}


OBJECTIVES = {
    "two particles": ("VAE, Normal", lambda: Trace_ELBO(num_particles=2)),
    "importance weights": ("VAE, Normal", lambda: ImportanceWeightedELBO(3)),
    "Renyi": ("VAE, Normal", lambda: RenyiELBO(0.5, num_particles=2)),
    "weighted KL": ("VAE, Normal", lambda: KLWeightedELBO(0.5)),
    "noise-contrastive": ("Energy", lambda: NoiseContrastive(dist.Normal(torch.zeros(3), 2.0).to_event(1))),
    "implicit score": ("Energy", ImplicitScoreMatching),
    "sliced score": ("Energy", SlicedScoreMatching),
    "flow matching": ("ODE flow, Hutchinson", FlowMatching),
}
"""Further objectives that are sums over the data, for rows of the table."""


def gradients():
    """Compare the step of two ranks for twelve rows of the table, and for further objectives."""
    cases = {case.name: case for case in CASES}
    found = {name: gradient(cases[name], cases[name].objective) for name in sorted(REPRESENTATIVE)}
    return found | {name: gradient(cases[row], objective) for name, (row, objective) in OBJECTIVES.items()}


def more_gradients():
    """Compare the step of two ranks for the other rows of the table."""
    return {case.name: gradient(case, case.objective) for case in CASES if case.name not in REPRESENTATIVE}


def gradient(case, make_objective):
    """Compare a step of two ranks with the mean of their gradients, and with the joint batch's, in double precision."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    family, args = case.build(), case.batch(ROWS)
    objective = make_objective()
    copied = Copied(family, objective)
    options = {"clip_norm": None, "ema_decay": None, "epochs": 1, "batch_size": ROWS, "seed": SEED, "progress": False}
    if isinstance(family, GAN):
        train(family, args, trainer=trainer(), **options)
        return {"checksum": checksum(family)}
    train(family, args, objective=objective, optim=sgd, trainer=trainer(copied), **options)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(joint_seed(SEED, 1)))
    rows = tuple(t[order] for t in args)
    before, after = dict(copied.copies[0].named_parameters()), dict(family.named_parameters())
    first, second = (gradient_on_one(copied.copies, rows, rank, 2) for rank in range(2))
    joint = gradient_on_one(copied.copies, rows, 0, 1)
    wanted = {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {*first, *second}}
    size = max(float(t.abs().max()) for t in wanted.values())

    def largest_error(gradients):
        return max(float((before[n] - after[n] - t).detach().abs().max()) / size for n, t in gradients.items())

    others = [n for n, p in before.items() if not torch.equal(p, after[n]) and n not in wanted]
    return {"error": largest_error(wanted), "joint": largest_error(joint), "others": others}


class Regression(PyroModule):
    """A regression with a parameter in a module, one in Pyro's store, and a latent variable of all rows."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x, y=None, *, size=None):
        scale = pyro.param("noise_scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        bias = pyro.sample("bias", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)), poutine.scale(scale=(size or len(x)) / len(x)):
            pyro.sample("y", dist.Normal(self.linear(x)[:, 0] + bias, scale), obs=y)


class Rows(Callback):
    """The first column of the rows of each training batch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.epochs[-1] += batch.batch.x[:, 0].tolist()


def runs():
    """Return what several fits ended with."""
    found = {}
    x = torch.randn(41, 2, generator=torch.Generator().manual_seed(1))
    options = {"seed": SEED, "progress": False, "clip_norm": None}

    # fewer rows than ranks
    try:
        train(Flow((2,), standardize=False), x[:1], epochs=1, trainer=trainer(), **options)
    except ValueError as refusal:
        found["one row"] = str(refusal)

    # a guide that makes its parameters at the first run, and a parameter in Pyro's store
    pyro.clear_param_store()
    model = Regression()
    guide = AutoNormal(model)
    seen = Rows()
    fit = train((model, guide), (x, x[:, 0]), valid=0.2, epochs=4, batch_size=8, trainer=trainer(seen), **options)
    found["regression"] = {
        "history": fit.history,
        "scale": pyro.param("noise_scale").item(),
        "guide": [p.sum().item() for p in guide.parameters()],
        "rows": seen.epochs,
        "kept": sorted(x[[i for i in range(41) if i not in fit.held_out.tolist()], 0].tolist()),
    }

    # every held-out row counts once: the loss of the kept parameters is that of all rows at once
    pyro.set_rng_seed(3)
    flow = Flow((2,))
    fit = train(flow, x[:30], valid=x[30:], epochs=3, batch_size=9, trainer=trainer(), ema_decay=0.9, **options)
    loss = -flow().log_prob(x[30:]).mean().item()
    found["flow"] = {"history": fit.history, "valid": fit.best["valid"], "loss": loss, "sum": checksum(flow)}

    # accumulated gradients are those of the joint rows, also if the batches of a step have other numbers of rows
    pyro.set_rng_seed(3)
    flow = Flow((2,))
    one = copy.deepcopy(flow)
    train(flow, x, epochs=1, batch_size=14, trainer=trainer(accumulate_grad_batches=3), ema_decay=None, optim=sgd, **options)
    train(one, x, epochs=1, batch_size=41, ema_decay=None, optim=sgd, **options)
    found["accumulated"] = max(error(a, b) for a, b in zip(numbers(flow).values(), numbers(one).values(), strict=True))

    # persistent chains differ by rank, log Z and everything else agrees
    pyro.set_rng_seed(4)
    energy = EnergyModel((2,), negatives=Persistent(16))
    fit = train(energy, x[:30], valid=x[30:], epochs=1, batch_size=10, trainer=trainer(), **options)
    found["energy"] = {
        "history": fit.history,
        "chains": [float(b.sum()) for name, b in energy.named_buffers() if name.endswith("chains")],
        "others": [float(b.double().sum()) for name, b in energy.named_buffers() if not name.endswith("chains")],
        "sum": [float(p.detach().sum()) for p in energy.parameters()],
    }

    # a codebook learns from the joint batch
    pyro.set_rng_seed(4)
    coded = VectorQuantizedVAE((2,), codes=8, latent_shape=(2,), code_dim=2, hidden=(8,), restart=0.0).double()
    one = copy.deepcopy(coded)
    for family, by in ((coded, trainer()), (one, None)):
        train(family, x.double(), epochs=3, batch_size=41, trainer=by, ema_decay=None, **options)
    found["codebook"] = max(error(a, b) for a, b in zip(numbers(coded).values(), numbers(one).values(), strict=True))

    # a loader that shuffles shows every row once
    seen = Rows()
    loader = DataLoader(TensorDataset(x), batch_size=11, shuffle=True)
    fit = train(Flow((2,)), loader, epochs=2, trainer=trainer(seen), **options)
    found["loader"] = {"history": fit.history, "rows": seen.epochs}
    found["column"] = x[:, 0].tolist()

    # NaN on one rank ends training on both alike, with the parameters before
    x = x.clone()
    pyro.set_rng_seed(3)
    flow = Flow((2,))
    fit = train(flow, x, epochs=6, batch_size=41, trainer=trainer(Poison(flow, epoch=3)), **options)
    found["poisoned"] = {"stopped": fit.stopped, "epochs": len(fit.history), "sum": checksum(flow)}
    return found


class Poison(Callback):
    """NaN in the gradient of rank 1, in one epoch."""

    def __init__(self, flow, epoch):
        self.flow, self.epoch = flow, epoch

    def on_after_backward(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epoch:
            next(self.flow.parameters()).grad.fill_(float("nan"))


def checksum(module):
    return [float(t.double().sum()) for t in module.state_dict().values()]


class Death(Callback):
    """The end of rank 1, without notice, after some epochs."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if RANK == 1 and trainer.current_epoch == self.epochs and batch_idx == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def data_of_run():
    return torch.randn(60, 2, generator=torch.Generator().manual_seed(2))


def run(folder, name="run", *, epochs, resume=False, **options):
    pyro.set_rng_seed(5)
    flow = Flow((2,))
    checkpoint = Checkpoint(folder / name, resume=resume)
    x = data_of_run()
    return flow, train(
        flow, x[:40], valid=x[40:], epochs=epochs, batch_size=10, seed=SEED, progress=False, checkpoint=checkpoint, **options
    )


def killed(folder):
    run(folder, "whole", epochs=5, trainer=trainer())
    run(folder, "killed", epochs=5, trainer=trainer(Death(3)))


def resumed(folder):
    found = {}
    for name in ("killed", "one"):  # the former was of two processes
        flow, fit = run(folder, name, epochs=6, resume=True, trainer=trainer())
        found[name] = {"history": fit.history, "sum": checksum(flow)}
    return found


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    function = {"gradients": gradients, "more_gradients": more_gradients, "runs": runs, "killed": killed, "resumed": resumed}[
        name
    ]
    found = function(folder) if name in ("killed", "resumed") else function()
    (folder / f"{name}.{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
