"""One training loop for every fit: epochs of minibatches, early stopping, averaged parameters, checkpoints.

`steps` says what one step is. Training on many devices or machines is left to lightning. Early stopping: Prechelt (1998).
"""

from __future__ import annotations

__all__ = ["TrainingInterrupted", "train"]

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import pyro
import torch
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.families.family import Family
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.batches import Batches, pair_of
from pyro_genmodels.training.fit import Fit
from pyro_genmodels.training.snapshots import Checkpoint, RunCheckpoint
from pyro_genmodels.training.steps import AdversarialStep, LossStep, make_step
from pyro_genmodels.utils.errors import check_positive_int

STANDARDIZE_ROWS = 10_000
"""Number of rows of a DataLoader that are validated and set a family's mean and deviation. Of a tensor all rows are used."""
EMA_DECAY = 0.999
"""Default decay of the average, for fits that need one."""
VALIDATION_SEED = 0x9E3779B9
"""Seed of every validation, so that epochs are compared with the same random numbers. No data are drawn from it."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C during training with a checkpoint, which holds the state after the last full epoch.

    Attributes:
        path: path of the checkpoint.
        epoch: number of the last full epoch.
    """

    def __init__(self, path: Path, epoch: int) -> None:
        super().__init__(
            f"The state after epoch {epoch} is in {path}. Continue with train(..., checkpoint=Checkpoint(path, resume=True))."
        )
        self.path, self.epoch = path, epoch


def train(
    fit: Any,
    data: Any,
    *,
    context: Tensor | None = None,
    objective: ELBO | Adversarial | AdversarialLoss | None = None,
    optim: Callable[[Iterable[nn.Parameter]], Optimizer] | PyroOptim | None = None,
    valid: Any = None,
    epochs: int = 100,
    batch_size: int = 128,
    patience: int = 20,
    ema_decay: float | Literal["auto"] | None = "auto",
    clip_norm: float | None = 10.0,
    checkpoint: str | Path | Checkpoint | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Fit:
    """Train a fit in place. It ends with its best parameters, in evaluation mode.

    Args:
        fit: a family, or a pair (model, guide) that is called as ``model(x)`` or ``model(x, context)``. If the model takes
            ``size``, it gets the number of all data. A model with latent variables shared by all rows must take it; otherwise
            these variables count in every batch.
        data: rows of x, (N, ...), or the pair (x, context). They are moved to the fit's device and precision. Or a
            `DataLoader` of x or (x, context), whose first 10,000 rows are validated and set a family's mean and deviation.
        context: context of each row, (N, ...).
        objective: a Pyro loss. The default is `DenoisingScoreMatching` for a fit with a diffusion, `ContrastiveDivergence` if
            an observed distribution has an intractable constant, `Trace_ELBO` if there are latent variables, and otherwise
            `MaximumLikelihood`. Or an `Adversarial`, which then trains its own model. For a family with a critic, such as
            `GAN`, also an adversarial loss such as ``Hinge()``; the default is `Relativistic`.
        optim: function parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``, which is the
            default; or one of Pyro's optimisers.
        valid: held-out data for early stopping, in any form that data can have. None keeps the last parameters.
        epochs: largest number of passes over the data.
        batch_size: largest number of rows per step.
        patience: number of epochs without a better validation loss after which training stops.
        ema_decay: decay per step of an exponential moving average of the parameters, such as 0.99, which is then validated and
            kept (see `moving_average`). None keeps the parameters themselves. "auto" is 0.999 for diffusions, `FlowMatching`
            and adversarial losses, and None for others.
        clip_norm: largest norm of the gradient (per datum) of a Pyro loss. None does not clip.
        checkpoint: path without suffix, or a `Checkpoint` to resume a run or to add notes. At each best epoch the parameters
            are written to ``.safetensors``, with the history, and the history to ``.json`` for reading. Twice a minute and at
            the end, also after Ctrl-C, the run is written to ``.training.safetensors``. See `checkpoints.load`.
        seed: seed of all random numbers.
        progress: True to show a progress bar.

    Returns:
        The fit with its history.

    Raises:
        ValueError: if data are empty or context has another number of rows, or if a run to resume is of another fit.
        FileNotFoundError: if there is no run to resume.
        OSError: if the checkpoint cannot be written.
        FloatingPointError: if the loss becomes NaN or infinite before there are parameters to keep. Later, training stops with
            a warning.
        TrainingInterrupted: after Ctrl-C, if there is a checkpoint.

    Example:
        >>> from pyro_genmodels import Flow
        >>> x = torch.randn(200, 2)
        >>> fit = train(Flow((2,)), x[:150], valid=x[150:], epochs=2, progress=False)
        >>> [sorted(record) for record in fit.history]
        [['epoch', 'seconds', 'train', 'valid'], ['epoch', 'seconds', 'train', 'valid']]
    """
    check_positive_int("train", epochs=epochs, batch_size=batch_size, patience=patience)
    if not (clip_norm is None or (isinstance(clip_norm, Real) and clip_norm > 0)):
        raise ValueError(f"train wants a positive number as clip_norm, or None not to clip, but found {clip_norm!r}.")
    if not (checkpoint is None or isinstance(checkpoint, str | Path | Checkpoint)):
        raise TypeError(f"train wants a path or a Checkpoint(path) as checkpoint, but found {checkpoint!r}.")
    if seed is not None:
        pyro.set_rng_seed(seed)
    fit = fit.family if isinstance(fit, Fit) else fit
    model, guide = traces.as_pair(fit)
    modules = traces.modules_of(model, guide)
    batches, held_out = _load(data, context, valid, batch_size, modules)
    result = Fit(fit)
    with _training_mode([*modules, *traces.modules_of(getattr(objective, "critic", None))]):
        _prepare_family(model, batches, held_out)
        step = make_step(fit, objective, optim, batches, clip_norm)
        if ema_decay == "auto":
            ema_decay = EMA_DECAY if step.wants_average else None
        weights = TrainedWeights(step.parameters, modules, ema_decay, step.excluded, step.extra_modules)
        checkpoint = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
        run = RunCheckpoint(checkpoint, result, weights, step.optimiser, {"rows": batches.rows, "data": batches.digest})
        begun = time.perf_counter() - (result.history[-1]["seconds"] if result.history else 0.0)
        try:
            with _progress_bar(result, epochs, disable=not progress) as bar:
                for epoch in range(len(result.history) + 1, epochs + 1):
                    if result.epochs_since_best >= patience:
                        break
                    record = {"epoch": epoch, **_train_epoch(step, batches, weights)}
                    if held_out is not None:
                        record["valid"] = _validate(step, held_out, weights)
                    record["seconds"] = time.perf_counter() - begun
                    if result.append(record):
                        weights.keep_best()
                        run.write_best()
                    run.capture()
                    bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record}, refresh=False)
                    bar.update()
            lost_patience = result.epochs_since_best >= patience
            result.stopped = (
                f"no better validation loss in {patience} epochs" if lost_patience else f"{len(result.history)} epochs"
            )
            if not result.best:
                raise FloatingPointError(
                    "no epoch has a finite validation loss: look for held-out data that the model rules out"
                )
            run.write()
        except FloatingPointError as error:
            if not result.best:
                raise
            epoch = len(result.history) + 1
            result.stopped = f"{error} (epoch {epoch}); the state of epoch {result.best['epoch']} is kept"
            run.write()
            warnings.warn(f"Training stopped: {result.stopped}.", RuntimeWarning, stacklevel=2)
        except KeyboardInterrupt as interrupt:
            result.stopped = "interrupted"
            if path := run.write():
                raise TrainingInterrupted(path, run.epochs) from interrupt
            raise
        finally:
            weights.restore_best()
    return result


def _load(
    data: Any, context: Tensor | None, valid: Any, batch_size: int, modules: list[nn.Module]
) -> tuple[Batches, Batches | None]:
    """Return the data and the held-out data in batches, on the device and in the precision of the modules."""
    if context is None:
        data, context = pair_of(data)
    like = next((p for m in modules for p in m.parameters()), torch.empty(0))
    held_out = None if valid is None else Batches(*pair_of(valid), max(batch_size, 256), like)
    return Batches(data, context, batch_size, like), held_out


@contextmanager
def _training_mode(modules: list[nn.Module]) -> Iterator[None]:
    """Put modules in training mode, and in evaluation mode at the end, also after an error."""
    for module in modules:
        module.train()
    try:
        yield
    finally:
        for module in modules:
            module.eval()


def _prepare_family(model: Callable[..., Any], batches: Batches, held_out: Batches | None) -> None:
    """Validate the data of a family, and set its mean and deviation by those to train on."""
    family = getattr(model, "__self__", None)
    if not isinstance(family, Family):
        return
    rows = batches.head(STANDARDIZE_ROWS)
    family.validate(rows)
    family.prepare(rows)
    if held_out is not None:
        family.validate(held_out.head(STANDARDIZE_ROWS))


def _progress_bar(fit: Fit, epochs: int, *, disable: bool) -> tqdm:
    """Return a progress bar of epochs, which updates seldom where it would fill a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    name = getattr(fit.family, "name", "fit")
    return tqdm(total=epochs, initial=len(fit.history), desc=name, unit="epoch", disable=disable, mininterval=interval)


def _train_epoch(step: LossStep | AdversarialStep, batches: Batches, weights: TrainedWeights) -> dict[str, float]:
    """Train on all data once, and return the mean losses by name (nats per datum)."""
    losses = []
    for number, batch in enumerate(batches.shuffled(), 1):
        losses.append((step.step(batch, number), len(batch[0])))
        weights.update()
    if not weights.finite:
        raise FloatingPointError("a parameter is not finite after the last step: lower the learning rate")
    rows = sum(n for _, n in losses)
    return {name: sum(loss[name] * n for loss, n in losses) / rows for name in losses[0][0]}


def _validate(step: LossStep | AdversarialStep, held_out: Batches, weights: TrainedWeights) -> float:
    """Return the loss of held-out data by the averaged parameters, always with the same random numbers."""
    with weights.averaged(), handlers.side_effect_free(step), torch.random.fork_rng():
        torch.manual_seed(VALIDATION_SEED)
        return step.validate(held_out)
