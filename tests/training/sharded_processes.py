"""Runs of two processes with sharded layers, which `test_sharding.py` starts: ``python sharded_processes.py NAME FOLDER``.

Lightning starts this script once more for rank 1. Each rank writes what it found to FOLDER/NAME.RANK.json.
"""

import json
import os
import sys
from pathlib import Path

import pyro
import torch
from lightning import Callback, Trainer

from pyro_genmodels import GAN, VAE, Autoregressive, BernoulliLikelihood, DenoisingScoreMatching, Diffusion, UNet, train
from pyro_genmodels.families import Transformer, VariationalBound
from pyro_genmodels.training import Checkpoint
from pyro_genmodels.training.sharding import ShardedStrategy, is_sharded

RANK = int(os.environ.get("LOCAL_RANK", "0"))


def built(name):
    pyro.set_rng_seed(0)
    if name == "diffusion":
        return Diffusion((4, 4), network=UNet((8, 8), recompute=True), likelihood=VariationalBound(2), standardize="jointly")
    if name == "gan":
        return GAN((16,))
    if name == "vae":
        return VAE((16,), latent_dim=2, hidden=(32,), likelihood=BernoulliLikelihood())
    return Autoregressive((16,), likelihood=BernoulliLikelihood(), network=Transformer(2, 16, 2), context=2)


def data(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (30, 16), generator=generator).double()
    if name == "diffusion":
        return ((x + torch.randn(30, 16, generator=generator, dtype=torch.float64)).reshape(-1, 4, 4),)
    return (x,) if name in ("vae", "gan") else (x, torch.randn(30, 2, generator=generator))


def trainer(strategy, *callbacks, devices=2, **options):
    return Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, callbacks=list(callbacks),
        logger=False, enable_model_summary=False, **options,
    )  # fmt: skip


class Counted(Callback):
    """Numbers of the parameters that this rank holds when training begins."""

    def on_train_start(self, trainer, pl_module):
        parameters = list(pl_module.step.parameters.values())
        self.total = sum(p.numel() for p in parameters)
        self.held = sum(p.to_local().numel() if is_sharded(p) else p.numel() for p in parameters)
        self.sharded = sum(map(is_sharded, parameters))


def fitted(name, strategy, *callbacks, folder=None, epochs=2, resume=False, devices=2, **options):
    """Return the family and its fit."""
    family = built(name)
    checkpoint = None if folder is None else Checkpoint(folder / name, resume=resume)
    objective = DenoisingScoreMatching() if name == "diffusion" else None
    args = data(name)
    fit = train(
        family, args if len(args) > 1 else args[0], objective=objective,
        valid=1 / 3, batch_size=7, epochs=epochs, seed=3, ema_decay=0.9, clip_norm=1.0,
        checkpoint=checkpoint, progress=False, trainer=trainer(strategy, *callbacks, devices=devices, **options),
    )  # fmt: skip
    return family, fit


def difference(a, b):
    """Return the largest difference of the parameters of two families."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((u.double() - v.double()).abs().max()) for u, v in pairs if u.numel())


def losses(fit):
    return [[record["train"], record["valid"]] for record in fit.history]


def fits(folder):
    """Compare runs with sharded layers to those without, which are equal to those of one process."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in ("autoregressive", "vae", "diffusion"):
        for accumulated in (1, 2) if name == "vae" else (1,):
            counted = Counted()
            whole, wanted = fitted(name, "ddp", accumulate_grad_batches=accumulated)
            sharded, fit = fitted(name, ShardedStrategy(min_parameters=300), counted, accumulate_grad_batches=accumulated)
            again = difference(whole, sharded)
            found[f"{name}, {accumulated}"] = {
                "difference": again, "losses": losses(fit), "wanted": losses(wanted), "total": counted.total,
                "held": counted.held, "types": sorted({type(p).__name__ for p in sharded.parameters()}),
                "sample": list(sharded(*([torch.zeros(2, 2)] if name == "autoregressive" else [])).sample().shape),
            }  # fmt: skip
    return found


def checkpoints(folder):
    """Write a checkpoint of a sharded run. `test_sharding.py` continues it in one process."""
    torch.set_default_dtype(torch.float64)
    strategy = ShardedStrategy(min_parameters=300)
    fitted("autoregressive", strategy, folder=folder / "own", epochs=1)
    continued, fit = fitted("autoregressive", ShardedStrategy(min_parameters=300), folder=folder / "own", epochs=2, resume=True)
    straight, wanted = fitted("autoregressive", ShardedStrategy(min_parameters=300), folder=folder / "straight", epochs=2)
    fitted("autoregressive", ShardedStrategy(min_parameters=300), folder=folder / "left", epochs=1)
    return {"difference": difference(continued, straight), "losses": losses(fit), "wanted": losses(wanted)}


def low(folder):
    """Train in mixed precision."""
    family, fit = fitted("diffusion", ShardedStrategy(min_parameters=300), precision="bf16-mixed")
    return {"losses": losses(fit), "types": sorted({str(p.dtype) for p in family.parameters()})}


def one(folder):
    """Compare steps of all rows with those of this process alone."""
    torch.set_default_dtype(torch.float64)
    options = {"batch_size": 30, "epochs": 3, "ema_decay": None, "clip_norm": 1.0, "seed": 3, "progress": False}
    families = [built("autoregressive") for _ in range(2)]
    fits = [
        train(family, data("autoregressive"), trainer=strategy and trainer(strategy), **options)
        for family, strategy in zip(families, (None, ShardedStrategy(min_parameters=300)), strict=True)
    ]
    return {"difference": difference(*families), "losses": [[record["train"] for record in fit.history] for fit in fits]}


def errors(folder):
    found = []
    for name, least in (("vae", 10**9), ("gan", 1)):
        try:
            fitted(name, ShardedStrategy(min_parameters=least))
        except ValueError as error:
            found.append(str(error))
    return {"errors": found}


if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    result = {"fits": fits, "checkpoints": checkpoints, "low": low, "one": one, "errors": errors}[name](folder)
    (folder / f"{name}.{RANK}.json").write_text(json.dumps(result))
