"""Benchmarks against published values: python benchmarks/published.py rbm --data-dir DIR

Each command trains, evaluates and prints a row for RESULTS.md: protocol, seed, wall time, value and error, published value.
An interrupted run of `rbm`, `mnist`, `mnist_flow`, `binary` or `uci` resumes from its checkpoint. The data are not part of the
package: see --data-dir.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # waiting threads free the cores

import json
import time
from functools import partial
from math import log
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from binarized_mnist import main as binarized_mnist
from binary_data import DataDir, binary
from binary_sets import main as binary_sets
from resumable import resumable
from torch.distributions import constraints
from uci_density import main as uci_density

from pyro_genmodels import (
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    ContrastiveDivergence,
    EnergyModel,
    Flow,
    Persistent,
    RestrictedBoltzmannMachine,
    log_likelihood,
    train,
)
from pyro_genmodels.evaluation import conservative_log_likelihood
from pyro_genmodels.families import Glow
from pyro_genmodels.training import checkpoints

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

Out = Annotated[Path, typer.Option(help="Folder for checkpoints and rows.")]


@app.callback()
def root() -> None:
    """Run benchmarks against published values."""
    torch.set_num_threads(2)


app.command("mnist")(binarized_mnist)
app.command("binary")(binary_sets)
app.command("uci")(uci_density)


@app.command()
def nltcs(data_dir: DataDir = None, out: Out = Path("out/published"), seed: int = 0, epochs: int = 200) -> None:
    """Compare an energy (with exact log Z), an autoregressive model and a VAE on the binary data set nltcs."""
    x = binary(data_dir, "debd.npz", "nltcs.")
    d = x["train"].shape[1]
    families = {
        "energy (RBM, 64 hidden, PCD-5)": EnergyModel(
            (d,), energy=RestrictedBoltzmannMachine(64), support=constraints.boolean, negatives=Persistent(512, steps=5)
        ),
        "autoregressive (MADE, 256 x 256)": Autoregressive((d,), likelihood=BernoulliLikelihood(), dropout=0.2),
        "vae (z 8, 256 x 256)": VAE((d,), latent_dim=8, likelihood=BernoulliLikelihood()),
    }
    for name, family in families.items():
        start = time.perf_counter()
        train(
            family,
            x["train"],
            valid=x["valid"],
            optim=partial(torch.optim.Adam, lr=1e-3),
            epochs=epochs,
            batch_size=128,
            ema_decay=0.999,
            checkpoint=out / f"nltcs-{name.split()[0]}-{seed}",
            seed=seed,
        )
        likelihood = log_likelihood(family, x["test"], num_samples=1000)
        seconds = time.perf_counter() - start
        print(
            f"| nltcs | {name} | {likelihood.mean:.3f} ± {likelihood.mean_std_error:.3f} ({likelihood.kind}) "
            f"| seed {seed}, {seconds:.0f} s | "
            "published -6.00 (HCLT circuit), -6.759 (Chow-Liu) |"
        )


STAGES = ((1e-3, 2, 0.99), (2e-4, 2, 0.9995), (1e-4, 10, 0.9995))
"""Stages of training the RBM: learning rate of Adam, Gibbs sweeps per step, decay of the averaged weights."""


@app.command()
def rbm(
    data_dir: DataDir = None,
    out: Out = Path("out/published"),
    seed: int = 0,
    num_hidden: int = 500,
    epochs: Annotated[int, typer.Option(help="Epochs of each of the three stages.")] = 60,
    num_steps: Annotated[int, typer.Option(help="Number of betas of the annealing path.")] = 20_000,
    test_rows: Annotated[int, typer.Option(help="Number of test rows for the lower bound.")] = 1000,
) -> None:
    """Train a restricted Boltzmann machine on static binarized MNIST by persistent contrastive divergence."""
    x = binary(data_dir, "binarized_mnist.npz")
    start = time.perf_counter()
    path, log = out / f"rbm-{num_hidden}-{seed}", out / f"rbm-{num_hidden}-{seed}-seconds.json"
    out.mkdir(parents=True, exist_ok=True)
    spent = json.loads(log.read_text()) if log.exists() else {}
    machine = EnergyModel(
        (784,),
        energy=RestrictedBoltzmannMachine(num_hidden),
        support=constraints.boolean,
        negatives=Persistent(num_chains=256),
        name="rbm",
    )
    for stage, (lr, sweeps, ema_decay) in enumerate(STAGES):
        checkpoint = path.with_name(f"{path.name}-{stage}")
        fit = train(
            machine,
            x["train"],
            objective=ContrastiveDivergence(steps=sweeps),
            valid=x["valid"],
            optim=partial(torch.optim.Adam, lr=lr),
            epochs=epochs,
            batch_size=128,
            patience=epochs,
            ema_decay=ema_decay,
            checkpoint=resumable(checkpoint),
            seed=seed + stage,
        )
        spent[f"stage {stage}"] = fit.history[-1]["seconds"]
        log.write_text(json.dumps(spent))
        checkpoints.load(checkpoint, machine)
    before = time.perf_counter()
    torch.manual_seed(seed)
    ais = log_likelihood(machine, x["test"], num_samples=512, num_steps=num_steps, progress=True)
    # The rows of the file are sorted by class.
    rows = torch.randperm(len(x["test"]), generator=torch.Generator().manual_seed(seed))[:test_rows]
    bound = conservative_log_likelihood(machine, x["test"][rows], num_steps=num_steps, progress=True)
    spent["evaluation"] = time.perf_counter() - before
    log.write_text(json.dumps(spent))
    training = sum(seconds for name, seconds in spent.items() if "stage" in name) / 60
    evaluation = spent["evaluation"] / 60
    print(f"{ais}; {ais.log_partition}; this call {time.perf_counter() - start:.0f} s")
    print(
        f"| RBM, {num_hidden} hidden; PCD-2, PCD-2, PCD-10 with 256 chains, Adam at 1e-3, 2e-4, 1e-4, {epochs} epochs each, "
        f"averaged weights; binarized MNIST, 50,000 training rows; seed {seed} "
        f"| AIS, 512 chains x {num_steps} betas, all test rows: {-ais.mean:.2f} ± {ais.mean_std_error:.2f} ({ais.kind}) "
        f"| RAISE, {len(rows)} test rows: {-bound.mean:.2f} ± {bound.mean_std_error:.2f}; "
        f"AIS on these: {-ais.values[rows].mean():.2f} "
        f"| training {training:.0f} min, evaluation {evaluation:.0f} min | published 86.34 (CD25, AIS) |"
    )


@app.command("mnist_flow")
def mnist_flow(
    data_dir: DataDir = None,
    out: Out = Path("out/published"),
    seed: int = 0,
    minutes: Annotated[float, typer.Option(help="Time for training, over all calls; the last epoch is finished.")] = 60.0,
    limit: Annotated[int, typer.Option(help="Largest number of images of each part, smaller for a trial.")] = 50_000,
    steps: Annotated[int, typer.Option(help="Steps at each of the two scales.")] = 8,
    channels: Annotated[int, typer.Option(help="Hidden channels of the networks.")] = 96,
    learning_rate: float = 1e-3,
    variational: Annotated[bool, typer.Option(help="Learn the noise between grey levels.")] = False,  # noqa: FBT002 (an option)
) -> None:
    """Train a flow on the grey levels of MNIST until the time is over, and print bits per dimension."""
    path = Path() if data_dir is None else data_dir / "mnist.npz"
    if not path.is_file():
        typer.echo(f"skipped: the file {path} does not exist; set --data-dir or PYRO_GENMODELS_DATA", err=True)
        raise typer.Exit
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    images, test = (torch.from_numpy(np.load(path)[part]).unsqueeze(1).to(device) for part in ("x_train", "x_test"))
    x, valid, test = images[:50_000][:limit], images[50_000:][:limit], test[:limit]
    noise = Glow(levels=1, steps=2, channels=channels // 2, bins=8) if variational else None
    transform = Glow(levels=2, steps=steps, channels=channels)
    flow = Flow((1, 28, 28), transform=transform, levels=256, dequantization=noise, name="mnist").to(device)
    file = out / f"mnist-flow-{steps}-{channels}{'-variational' if variational else ''}-{len(x)}-{seed}"
    history = train(
        flow,
        x,
        valid=valid,
        optim=partial(torch.optim.Adam, lr=learning_rate),
        epochs=100_000,
        batch_size=128,
        patience=1000,
        ema_decay=0.999,
        checkpoint=resumable(file),
        seed=seed,
        max_seconds=60 * minutes,
    ).history
    bits, added = 784 * log(2), "learned" if variational else "uniform"
    likelihood = log_likelihood(flow, test, num_samples=1, batch_size=1000)
    curve = ", ".join(f"{record['epoch']}: {record['valid'] / bits:.3f}" for record in history)
    print(f"bits per dimension of the validation images, by epoch: {curve}")
    print(
        f"| MNIST, 8 bits | Glow of logits, 2 scales of {steps} steps, {channels} channels, {added} noise, Adam at "
        f"{learning_rate:g}, averaged weights; {len(x)} training images; seed {seed} "
        f"| {-likelihood.mean / bits:.3f} ± {likelihood.mean_std_error / bits:.3f} bits per dimension ({likelihood.kind}), "
        f"{len(test)} test images | {len(history)} epochs, {history[-1]['seconds'] / 60:.0f} min on {device} "
        "| published RealNVP 1.06, Glow 1.05, FFJORD 0.99, MAF 1.89 |"
    )


if __name__ == "__main__":
    app()
