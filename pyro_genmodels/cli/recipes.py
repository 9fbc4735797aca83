"""Recipes of the command line: how each family is built, trained and evaluated on each kind of data."""

from __future__ import annotations

__all__ = ["FAMILIES", "Recipe", "draw", "evaluate", "fit", "load_family", "sample_quality_of", "set_threads"]

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_genmodels.cli.notes import DataSource, Notes, read_notes
from pyro_genmodels.datasets import Dataset
from pyro_genmodels.evaluation import LogLikelihood, SampleQuality, has_likelihood, log_likelihood, no_likelihood
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.sample_quality import sample_quality, split_rows
from pyro_genmodels.families import (
    GAN,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    Contrastive,
    DenseCritic,
    DenseField,
    DenseGenerator,
    Diffusion,
    DiscretizedLogisticLikelihood,
    Dopri5,
    EnergyModel,
    Family,
    Flow,
    FlowDensity,
    Hutchinson,
    Labels,
    Langevin,
    NormalLikelihood,
    ODEFlow,
    ParallelTempering,
    Persistent,
    PixelCNN,
    RestrictedBoltzmannMachine,
    UNet,
    VariationalBound,
)
from pyro_genmodels.infer import (
    Adversarial,
    DenoisingScoreMatching,
    FlowMatching,
    KLWeightedELBO,
    LikelihoodWeighting,
    LinearAnnealing,
    LogNormalWeighting,
    NoiseContrastive,
)
from pyro_genmodels.infer.adversarial import R1, R2, Relativistic
from pyro_genmodels.infer.compiled.modes import Eager, Mode, default_mode
from pyro_genmodels.optim.adapters import Optim
from pyro_genmodels.training import Checkpoint, Fit, checkpoints, train
from pyro_genmodels.utils.files import MAX_BYTES


@dataclass(frozen=True)
class Training:
    """Settings of the training on one kind of data.

    Attributes:
        learning_rate: learning rate of Adam.
        epochs: largest number of epochs.
        batch_size: number of rows per step.
    """

    learning_rate: float = 1e-3
    epochs: int = 300
    batch_size: int = 64


@dataclass(frozen=True)
class Recipe:
    """Settings for a family.

    Attributes:
        build: function (data set, context) -> family.
        integers: training on integers.
        reals: training on real numbers.
        images: training on images of integers; None for that on integers.
        objective: function (data set, family, optimiser) -> objective; None is the family's default.
        ema_decay: decay of the average of the parameters.
    """

    build: Callable[[Dataset, Any], Family]
    integers: Training = Training()
    reals: Training = Training(batch_size=256)
    images: Training | None = None
    objective: Callable[[Dataset, Any, Optim], ELBO | Adversarial | None] = lambda data, family, optim: None
    ema_decay: float = 0.99

    def training(self, data: Dataset) -> Training:
        """Return the settings of the training on a data set."""
        if not data.levels:
            return self.reals
        return self.images if self.images is not None and _is_image(data.train.shape[1:]) else self.integers


def _flow(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        transform = NSF(transforms=2, hidden=(256, 256), dropout=0.2, randperm=True)
        return Flow(event_shape, context=context, levels=data.levels, transform=transform)
    return Flow(event_shape, context=context, transform=NSF(transforms=3, bins=16))


def _vae(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        likelihood = BernoulliLikelihood() if data.levels == 2 else DiscretizedLogisticLikelihood(data.levels, components=3)
        return VAE(event_shape, context=context, latent_dim=16, likelihood=likelihood, hidden=(256, 256), dropout=0.1)
    latent_dim = min(16, max(2, event_shape.numel() // 2))
    return VAE(event_shape, context=context, latent_dim=latent_dim, likelihood=NormalLikelihood(), hidden=(256, 256))


def _autoregressive(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        likelihood = BernoulliLikelihood() if data.levels == 2 else DiscretizedLogisticLikelihood(data.levels)
        if _is_image(event_shape):  # the same weights in all places
            network = PixelCNN(layers=3, channels=32, dropout=0.1)
            return Autoregressive(event_shape, context=context, likelihood=likelihood, network=network)
        return Autoregressive(event_shape, context=context, likelihood=likelihood, hidden=(1024,), dropout=0.5)
    return Autoregressive(event_shape, context=context, likelihood=NormalLikelihood(components=10), hidden=(256, 256))


def _energy(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        support = constraints.boolean if data.levels == 2 else constraints.integer_interval(0, data.levels - 1)
        negatives = Persistent(128, steps=2) if context == 0 else Contrastive(steps=5)
        energy = RestrictedBoltzmannMachine(128)
        return EnergyModel(event_shape, context=context, energy=energy, support=support, negatives=negatives)
    sampler = ParallelTempering(Langevin(), temperatures=6, steps=2)
    return EnergyModel(event_shape, context=context, sampler=sampler, num_steps=250)


def _ode_flow(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    network = UNet((16, 32)) if _can_be_halved(event_shape) else DenseField(128, blocks=2)
    options: dict[str, Any] = {"solver": Dopri5(1e-3, 1e-3), "trace": Hutchinson()} if data.levels else {}
    return ODEFlow(event_shape, context=context, levels=data.levels, network=network, **options)


def _diffusion(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    dense = DenseField(128, blocks=2, octaves=5 if event_shape.numel() <= 4 else 0)
    network = UNet((16, 32), dropout=0.05) if _can_be_halved(event_shape) else dense
    likelihood = VariationalBound() if data.levels else FlowDensity()
    return Diffusion(event_shape, context=context, levels=data.levels, network=network, likelihood=likelihood)


def _gan(data: Dataset, context: Any) -> Family:
    event_shape = data.train.shape[1:]
    if data.levels:
        options: dict[str, Any] = {"generator": DenseGenerator((256, 256)), "critic": DenseCritic((256, 256)), "latent_dim": 32}
        options["standardize"] = "jointly" if _is_image(event_shape) else True
    else:
        octaves = 5 if event_shape.numel() <= 4 else 0
        options = {"generator": DenseGenerator(octaves=3), "critic": DenseCritic(octaves=octaves), "latent_dim": 2}
    return GAN(event_shape, context=context, levels=data.levels, **options)


def _is_image(event_shape: Size) -> bool:
    """Return True for events (height, width) or (channels, height, width)."""
    return len(event_shape) in (2, 3)


def _can_be_halved(event_shape: Size) -> bool:
    """Return True for images that a U-Net can halve: height and width are even."""
    return _is_image(event_shape) and all(n % 2 == 0 for n in event_shape[-2:])


def _noise_contrastive(data: Dataset, *_: Any) -> ELBO | None:
    """Return noise-contrastive estimation for real data of few dimensions; in many, normal noise is too easy to recognise."""
    x = data.train.flatten(1)
    if data.levels or x.shape[1] > 4:
        return None
    covariance = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    covariance = covariance + 1e-3 * covariance.diagonal().clamp(min=1e-12).diag()  # columns may depend on each other
    return NoiseContrastive(dist.MultivariateNormal(x.mean(0), covariance), ratio=8)


def _denoising(data: Dataset, *_: Any) -> ELBO:
    """Return denoising score matching: for integers with the weights of the bound, for reals with more weight on low noise."""
    return DenoisingScoreMatching(weighting=LikelihoodWeighting() if data.levels else LogNormalWeighting(-2.0, 1.5))


def _annealed(data: Dataset, *_: Any) -> ELBO | None:
    """Return the bound with an annealed divergence for integers, so that more coordinates of z stay in use."""
    return KLWeightedELBO(LinearAnnealing(ANNEALED_STEPS)) if data.levels else None


def _adversarial(data: Dataset, family: Any, optim: Any) -> Adversarial:
    """Return adversarial training: for integers with strong penalties against overfitting, for reals with weak ones."""
    gamma = 1.0 if data.levels else 0.003
    optim = partial(optim, betas=(0.0, 0.99))
    return Adversarial(family.model, family.critic, Relativistic(), optim, penalties=(R1(gamma), R2(gamma)))


ANNEALED_STEPS = 1_000
"""Number of steps in which the weight of a VAE's divergence rises to 1."""
SMALL_FAMILY = 1_000_000
"""Number of parameters below which a family is trained and evaluated in one thread, since several would wait for each other."""

FAMILIES: Mapping[str, Recipe] = {
    "flow": Recipe(_flow, Training(2e-3, batch_size=128), Training(2e-3, batch_size=256)),
    "vae": Recipe(_vae, objective=_annealed),
    "autoregressive": Recipe(_autoregressive, images=Training(3e-3, epochs=24, batch_size=32)),
    "energy": Recipe(
        _energy, Training(2e-3, epochs=45, batch_size=128), Training(2e-3, batch_size=256), objective=_noise_contrastive
    ),
    "ode_flow": Recipe(
        _ode_flow,
        Training(2e-3, epochs=90, batch_size=128),
        Training(2e-3, batch_size=256),
        objective=lambda *_: FlowMatching(),
        ema_decay=0.999,
    ),
    "diffusion": Recipe(
        _diffusion,
        Training(2e-3, epochs=90, batch_size=128),
        Training(2e-3, batch_size=256),
        objective=_denoising,
        ema_decay=0.999,
    ),
    "gan": Recipe(_gan, Training(epochs=90), objective=_adversarial, ema_decay=0.999),
}
"""Families by their names on the command line."""


def fit(
    name: str,
    source: DataSource,
    data: Dataset,
    checkpoint: Path,
    *,
    device: str,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    patience: int = 25,
    compiled: bool = False,
    threads: int | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Fit:
    """Build and train a family.

    Args:
        name: name of the family, from `FAMILIES`.
        source: source of the data.
        data: data set from that source.
        checkpoint: path of the checkpoint, without suffix.
        device: torch device.
        epochs: largest number of epochs; None for the recipe's.
        batch_size: number of rows per step; None for the recipe's.
        learning_rate: learning rate of Adam; None for the recipe's.
        patience: number of epochs without a better validation loss after which training stops.
        compiled: True to compile the training step; otherwise `train` chooses.
        threads: number of threads of torch; None is one for a small family, and as many as there are cores for a large one.
        progress: True to show a progress bar.
        resume: True to continue the run of the checkpoint.
    """
    recipe = FAMILIES[name]
    training = recipe.training(data)
    notes = Notes(
        family=name,
        source=source,
        columns=None if data.columns is None else list(data.columns),
        levels=data.levels,
        batch_size=batch_size or training.batch_size,
        learning_rate=learning_rate or training.learning_rate,
        patience=patience,
        epochs=epochs or training.epochs,
    )
    pyro.set_rng_seed(source.seed)
    context = Labels(data.num_classes or 1) if source.labels else 0
    family = recipe.build(data, context)
    family.name = name
    family.to(device)
    if data.train.dtype == torch.float64:  # float32 would lose digits of the data, and of the draws
        family.double()
    optim = partial(torch.optim.Adam, lr=notes.learning_rate)
    objective = recipe.objective(data, family, optim)
    mode: Mode | None = default_mode() if compiled else Eager()  # not chosen: a run that is resumed is that of one piece
    if isinstance(objective, Adversarial):
        objective.mode, mode = mode or Eager(), None
    train_labels, valid_labels = (data.train_labels, data.valid_labels) if source.labels else (None, None)
    return train(
        family,
        (data.train, train_labels),
        valid=(data.valid, valid_labels),
        objective=objective,
        optim=None if isinstance(objective, Adversarial) else optim,
        epochs=notes.epochs,
        batch_size=notes.batch_size,
        patience=patience,
        ema_decay=recipe.ema_decay,
        checkpoint=Checkpoint(checkpoint, resume=resume, notes=asdict(notes)),
        seed=source.seed,
        threads=threads or _suitable_threads(family),
        mode=mode,
        progress=progress,
    )


def _suitable_threads(*families: Family) -> int | None:
    """Return the number of threads that suits families: 1 if all are small, and otherwise None, for torch's own number."""
    return 1 if all(sum(p.numel() for p in family.parameters()) < SMALL_FAMILY for family in families) else None


def set_threads(threads: int | None, *families: Family) -> None:
    """Set torch's number of threads for the rest of the process; None is the number that suits the families."""
    wanted = threads or _suitable_threads(*families)
    if wanted is not None:
        torch.set_num_threads(wanted)


def evaluate(
    family: Any, x: Tensor, labels: Tensor | None, *, num_samples: int | None = None, progress: bool = False
) -> LogLikelihood:
    """Return the log-likelihood of rows, given their labels if the family wants them; of kind "none" if it has none.

    Args:
        family: a family, or a fit of one.
        x: rows, (N, *event_shape).
        labels: labels of the rows, (N,).
        num_samples: samples per row for a bound or an estimate. The default is 512, or 8 for estimates by an ODE.
        progress: True to show a progress bar.

    Raises:
        ValueError: if the rows are not data of this family.
    """
    family = family.family if isinstance(family, Fit) else family
    device = family.loc.device
    family.validate(x.to(device))
    if family.context is not None and labels is None:
        raise ValueError("the model was fitted with labels, but these rows have none: pass --labels, the name of their column")
    context = () if family.context is None or labels is None else (labels.to(device),)
    family.embed(*context or (None,))  # checks the labels
    if not has_likelihood(family, x.to(device), *context):
        return no_likelihood(len(x))
    if num_samples is None:
        fn = family(*(labels[:1] for labels in context))
        by_ode = fn.density == "estimate" and not fn.intractable
        num_samples = 8 if by_ode else 512  # an ODE for each sample is slow, and few samples suffice
    return log_likelihood(family, x.to(device), *context, num_samples=num_samples, progress=progress)


def sample_quality_of(family: Any, x: Tensor, labels: Tensor | None, *, num_samples: int = 500) -> SampleQuality:
    """Return the distances of samples, given the rows' labels, from as many rows of x (half of all at most)."""
    family = family.family if isinstance(family, Fit) else family
    device = family.loc.device
    x = x.to(device)
    context = () if labels is None else (labels.to(device),)
    return sample_quality(family, RowArguments((x, *context), {}), split_rows(x, num_samples))


def draw(family: Any, num_samples: int, labels: Tensor | None = None, *, batch_size: int = 1000) -> Tensor:
    """Return samples, (num_samples, *event_shape), given labels (num_samples,) if the family wants them."""
    family = family.family if isinstance(family, Fit) else family
    parts = []
    with torch.no_grad():
        for start in range(0, num_samples, batch_size):
            count = min(batch_size, num_samples - start)
            context = None if labels is None else labels[start : start + count].to(family.loc.device)
            parts.append(family().sample((count,)) if context is None else family(context).sample())
    rows = torch.cat(parts).cpu()
    return rows.long() if family.data_support.is_discrete else rows


def load_family(path: Path, *, device: str, max_bytes: int = MAX_BYTES) -> tuple[Family, Notes]:
    """Return the family of a checkpoint on a device, and its notes."""
    state, record = checkpoints.read(path, max_bytes=max_bytes)
    family, notes = checkpoints.load_state(state, record, path), read_notes(record)
    support = family.data_support
    levels = int(getattr(support, "upper_bound", 1)) + 1 if support.is_discrete else None
    if notes is None:
        notes = Notes(type(family).__name__.lower(), None, None, levels)
    elif notes.levels != levels:
        raise ValueError(f"{path} is damaged: its notes say {notes.levels} levels, but its family has {levels}.")
    family.name = notes.family
    return family.to(device), notes
