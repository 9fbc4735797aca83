"""Likelihoods of static binarized MNIST: python benchmarks/published.py mnist vae --minutes 60 --data-dir DIR

Each model is trained on the first part of the data with early stopping by the second, until a time is over. An interrupted run
resumes from its checkpoint. Its value is
that of the test images: exact, or a bound of many draws for each. Masked networks have a command of their own, `binary mnist`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from binary_data import DataDir, binary
from resumable import resumable

from pyro_genmodels import MAF, NSF, VAE, Autoregressive, BernoulliLikelihood, Flow, log_likelihood, train
from pyro_genmodels.families import FlowPosterior, PixelCNN, Transformer, VampPrior
from pyro_genmodels.infer import ImportanceWeightedELBO, KLWeightedELBO, LinearAnnealing
from pyro_genmodels.infer.compiled.modes import default_mode

ANNEALED_STEPS = 20_000
"""Number of steps in which the weight of a divergence rises to 1."""


def annealed() -> KLWeightedELBO:
    """Return the bound whose divergence is annealed."""
    return KLWeightedELBO(LinearAnnealing(ANNEALED_STEPS))


def vae(**options: Any) -> VAE:
    """Return a VAE with one latent variable of 50 coordinates and networks of two layers of 200 units."""
    return VAE((784,), latent_dim=50, hidden=(200, 200), likelihood=BernoulliLikelihood(), name="mnist", **options)


def vae_of_flows() -> VAE:
    """Return the same VAE with a flow as its guide and a flow as its prior."""
    posterior = FlowPosterior(NSF(transforms=2, hidden=(100,), passes=2), num_features=50)
    prior = Flow((50,), transform=MAF(transforms=3, hidden=(200,)), standardize=False)
    return vae(posterior=posterior, prior=prior)


def autoregressive(**options: Any) -> Autoregressive:
    """Return a product of conditionals."""
    return Autoregressive((28, 28), likelihood=BernoulliLikelihood(), name="mnist", **options)


@dataclass(frozen=True)
class Model:
    """A model and how it is trained.

    Attributes:
        build: function that returns the family.
        words: words for the table.
        published: the published value.
        objective: function that returns the loss; None is the family's own.
        learning_rate: step size of Adam.
        batch_size: number of images for each step.
    """

    build: Callable[[], Any]
    words: str
    published: str
    objective: Callable[[], Any] | None = None
    learning_rate: float = 1e-3
    batch_size: int = 100


MODELS = {
    "vae": Model(vae, "VAE, z 50, 2 x 200, annealed", "89.8", annealed),
    "iwae": Model(vae, "IWAE, k = 50, z 50, 2 x 200", "86.8 to 87.1", partial(ImportanceWeightedELBO, 50)),
    "vae_vamp": Model(partial(vae, prior=VampPrior(500)), "the same VAE, VampPrior of 500", "85.6 to 85.8", annealed),
    "vae_flow": Model(vae_of_flows, "the same VAE, flows as guide and prior", "-", annealed),
    "transformer": Model(
        partial(autoregressive, network=Transformer(layers=4, width=128)), "transformer, 4 layers of width 128", "79.2 to 81.3"
    ),
    "pixelcnn": Model(
        partial(autoregressive, network=PixelCNN(layers=6, channels=16)),
        "gated PixelCNN, 6 layers of 16 channels",
        "81.3",
        learning_rate=2e-3,
        batch_size=50,
    ),
}


def main(
    name: Annotated[str, typer.Argument(help=f"one of {', '.join(MODELS)}")],
    data_dir: DataDir = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("out/published"),
    seed: int = 0,
    minutes: Annotated[float, typer.Option(help="Time for training, over all calls; the last epoch is finished.")] = 60.0,
    patience: Annotated[int, typer.Option(help="Epochs without a better validation loss.")] = 50,
    samples: Annotated[int, typer.Option(help="Draws for each test image.")] = 5000,
    test_rows: Annotated[int, typer.Option(help="Number of test images of the bound by many draws.")] = 1000,
    threads: int = 2,
) -> None:
    """Train a model of binarized MNIST, and print its row."""
    torch.set_num_threads(threads)
    parts, model = binary(data_dir, "binarized_mnist.npz"), MODELS[name]
    order = torch.randperm(len(parts["test"]), generator=torch.Generator().manual_seed(0))
    parts["test"] = parts["test"][order]  # the file has them by class
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    family = model.build().to(device)
    parts = {part: x.reshape(-1, *family.event_shape).to(device) for part, x in parts.items()}
    file = out / f"mnist-{name}-{seed}"
    fit = train(
        family,
        parts["train"],
        valid=parts["valid"],
        objective=None if model.objective is None else model.objective(),
        optim=partial(torch.optim.Adam, lr=model.learning_rate),
        epochs=100_000,
        batch_size=model.batch_size,
        patience=patience,
        ema_decay=0.999,
        checkpoint=resumable(file),
        seed=seed,
        mode=default_mode(),
        max_seconds=60 * minutes,
    )
    step = max(1, len(fit.history) // 20)
    curve = ", ".join(f"{record['epoch']}: {record['valid']:.2f}" for record in fit.history[::step])
    print(f"loss of the validation images by epoch: {curve}; {fit.stopped}")
    is_bound = isinstance(family, VAE)
    start, x = time.perf_counter(), parts["test"][: test_rows if is_bound else None]
    value = log_likelihood(family, x, num_samples=samples if is_bound else 1)
    how = f"{value.kind}, k = {samples}, {len(x)} test images" if is_bound else f"{value.kind}, all test images"
    if is_bound:
        elbo = log_likelihood(family, parts["test"], num_samples=1)
        how += f"; ELBO of all {-elbo.mean:.2f}"
    print(
        f"| {model.words}; Adam at {model.learning_rate:g}, batches of {model.batch_size}, averaged weights, seed {seed} "
        f"| {how} | {-value.mean:.2f} ± {value.mean_std_error:.2f} | training {fit.history[-1]['seconds'] / 60:.0f} min "
        f"({len(fit.history)} epochs) on {device}, evaluation {(time.perf_counter() - start) / 60:.0f} | {model.published} |"
    )
