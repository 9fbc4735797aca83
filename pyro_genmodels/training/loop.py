"""One training loop for every fit: epochs of minibatches, early stopping, averaged parameters, checkpoints.

A single step is in `steps`, the test for an explosion in `fit`. Training on many devices or machines is left to lightning.
Early stopping: Prechelt (1998).
"""

from __future__ import annotations

__all__ = ["train"]

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import inf
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import pyro
from pyro.infer import ELBO
from pyro.optim import PyroOptim
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.infer.compiled import Mode
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training.adversarial_steps import AdversarialStep
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.epochs import Epochs
from pyro_genmodels.training.fit import Fit
from pyro_genmodels.training.lightning_checks import check_trainer
from pyro_genmodels.training.limits import Limits
from pyro_genmodels.training.options import (
    EMA_DECAY,
    VALIDATION_SEED,
    check_options,
    identity_of,
    load_data,
    prepare_family,
    statistics_restored_on_error,
    subsample_held_out,
    torch_threads,
)
from pyro_genmodels.training.runs import Checkpoint, RunCheckpoint, TrainingInterrupted
from pyro_genmodels.training.steps import LossStep, make_step
from pyro_genmodels.utils.checksums import arguments_digest
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.rng import forked_rng

SHOWN_SECONDS = 2.0
"""Seconds within an epoch after which the progress bar shows how much of it is done."""


@runs_models()
def train(
    fit: Any,
    data: Any,
    *,
    context: Any = None,
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
    threads: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
    max_seconds: float | None = None,
    trainer: Any = None,
    progress: bool = True,
) -> Fit:
    """Train a fit in place. It ends with its best parameters, in evaluation mode.

    Args:
        fit: a family, or a pair (model, guide). If the model takes ``size``, it gets the number of all data. A model with
            latent variables shared by all rows must take it, or draw its minibatches itself; otherwise these variables count
            in every batch.
        data: rows of x, (N, ...): a tensor, an array, a data frame or a list of numbers. They are moved to the fit's device and
            precision. Or the arguments of the model: a tuple such as (x, context) is given as ``model(*data)``, a dictionary as
            ``model(**data)``. Tensors in lists and dictionaries inside them are cut into minibatches too, and each has one row
            per datum. Or a `torch.utils.data.Dataset` or `DataLoader` of such arguments, of which the first 10,000 rows are
            validated and set a family's mean and deviation. Or a `datasets.stream` of rows larger than memory, all of which set
            them. A model with a plate over all rows that has a ``subsample_size`` is given all rows at every step. Families
            refuse rows with NaN; a model of your own gets them.
        context: context of each row, (N, ...), the second argument of the model.
        objective: a Pyro loss. The default is `DenoisingScoreMatching` for a fit with a diffusion, `ContrastiveDivergence` if
            an observed distribution has an intractable constant, `Trace_ELBO` if there are latent variables, and otherwise
            `MaximumLikelihood`. Or an `Adversarial`, which then trains its own model. For a family with a critic, such as
            `GAN`, also an adversarial loss such as ``Hinge()``; the default is `Relativistic`.
        optim: function parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``, which is the
            default; or one of Pyro's optimisers.
        valid: held-out data for early stopping, in any form that data can have, or a share of the data such as 0.1, whose
            rows are drawn by the seed and are in `Fit.held_out`; of a stream, whole shards. None keeps the last parameters.
        epochs: largest number of passes over the data.
        batch_size: largest number of rows per step.
        patience: number of epochs without a better validation loss after which training stops.
        ema_decay: decay per step of an exponential moving average of the parameters, such as 0.99, which is then validated and
            kept (see `moving_average`). None keeps the parameters themselves. "auto" is 0.999 for diffusions, `FlowMatching`
            and adversarial losses, and None for others.
        clip_norm: largest norm of the gradient (per datum) of a Pyro loss. None does not clip.
        checkpoint: path without suffix, or a `Checkpoint` to resume a run or to add notes. At each best epoch the parameters
            are written to ``.safetensors``, with the history, and the history to ``.json`` for reading. Twice a minute, within
            an epoch too, and at the end, also after Ctrl-C, the run is written to ``.training.safetensors``. See
            `checkpoints.load`.
        seed: seed of all random numbers of the training. The initial parameters of a fit are drawn when it is built; call
            ``pyro.set_rng_seed`` before that to fix them too.
        threads: number of threads of torch during training. Small networks train two to five times faster with one thread where
            other programs use the same cores. None does not change torch's number.
        model_kwargs: further keyword arguments of model and guide, which are the same at every step and are not cut into rows.
        mode: how loss and gradients are computed: `Eager()`; `Captured()`, as a graph that saves the time of Pyro and Python;
            or `Compiled()`, which is faster still, but is compiled first, for a minute or so. Numbers are those of eager steps
            to rounding. A graph does not validate values: Pyro then does so for the first batch of each size only. None
            chooses, for families on a CPU and from the second epoch on, by the number of steps that will be made for certain:
            captured from 2,000 steps on, compiled from 50,000 on.
        max_seconds: time after which no further epoch is begun, with that of the run before if one is resumed; None for no
            limit.
        trainer: a `lightning.Trainer`, which trains on its devices and machines, with its precision, loggers and callbacks;
            see `LightningFit`. `batch_size` is then the number of rows of a step over all devices. Its `max_epochs` and
            other limits hold too. Steps are eager.
        progress: True to show a progress bar.

    Returns:
        The fit with its history.

    Raises:
        ValueError: if data are empty, arguments have different numbers of rows, or values are not of the fit's data; if an
            argument here is a keyword of the model as well; or if a run to resume is of another fit.
        TypeError: if an argument is of the wrong type.
        FileNotFoundError: if there is no run to resume.
        OSError: if the checkpoint cannot be written.
        FloatingPointError: if the loss becomes NaN or infinite, or explodes (see `training.fit`), before there are parameters
            to keep. Later, training stops with a warning, and the last parameters with a usual loss are kept.
        RuntimeError: if another thread trains or evaluates a fit at the same time.
        CaptureError: if the fit cannot be captured as a graph, and the mode asks for one.
        TrainingInterrupted: after Ctrl-C, if there is a checkpoint.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow
        >>> x = torch.randn(200, 2)
        >>> fit = train(Flow((2,)), x[:150], valid=x[150:], epochs=2, progress=False)
        >>> [sorted(record) for record in fit.history]
        [['epoch', 'seconds', 'train', 'valid'], ['epoch', 'seconds', 'train', 'valid']]
    """
    check_options(epochs, batch_size, patience, ema_decay, clip_norm, checkpoint, seed, threads, mode, max_seconds)
    if trainer is not None:
        check_trainer(trainer, mode)
    fit = fit.family if isinstance(fit, Fit) else fit
    model, guide = traces.as_pair(fit)
    model_kwargs = joined_keywords({}, model_kwargs)
    filled = {"context", *(data if isinstance(data, Mapping) else ())}
    check_model_keywords(model, guide, data if isinstance(data, tuple) else (), model_kwargs, filled)
    with handlers.exclusive("train"), torch_threads(threads):
        if seed is not None:
            pyro.set_rng_seed(int(seed))
        modules, result = traces.modules_of(model, guide), Fit(fit)
        batches, held_out, result.held_out = load_data(data, context, valid, batch_size, seed, model, modules, model_kwargs)
        settings: dict[str, Any] = {"batch_size": batch_size, "valid": float(valid) if isinstance(valid, Real) else None}
        settings["model_kwargs"] = arguments_digest(model_kwargs) if model_kwargs else None
        limits = Limits(epochs, patience, inf if max_seconds is None else float(max_seconds))
        if trainer is not None:
            from pyro_genmodels.training import lightning_run  # which takes seconds

            options: dict[str, Any] = {"objective": objective, "optim": optim, "checkpoint": checkpoint, "seed": seed}
            options |= {"ema_decay": ema_decay, "clip_norm": clip_norm, "model_kwargs": model_kwargs}
            return lightning_run.train_by(trainer, result, options, batches, held_out, limits, settings, progress=progress)
        with _training_mode([*modules, *traces.modules_of(getattr(objective, "critic", None))]):
            with statistics_restored_on_error(model):
                prepare_family(model, batches, held_out, progress=progress)
                step = make_step(fit, objective, optim, batches, clip_norm, mode)
                if held_out is not None and batches.is_whole:
                    subsample_held_out(step, batches, held_out)
                if ema_decay == "auto":
                    ema_decay = EMA_DECAY if step.wants_average else None
                weights = TrainedWeights(step.parameters, modules, ema_decay, step.excluded, step.extra_modules)
                checkpoint = Checkpoint(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint
                settings |= {
                    "seed": seed,
                    "objective": type(step.objective).__name__,
                    "ema_decay": ema_decay,
                    "clip_norm": clip_norm,
                }
                data_of_run = partial(identity_of, batches, held_out)
                run = RunCheckpoint(checkpoint, result, weights, step.optimiser, data_of_run, settings)
                batches.seed = run.seed or batches.seed
            stopped = ""
            try:
                epochs_of_run = Epochs(step, result, weights, run, limits, is_validated=held_out is not None)
                _train(step, batches, held_out, epochs_of_run, progress=progress)
            except FloatingPointError as error:
                epoch = len(result.history) + (not result.exploded_epochs)
                if not result.best:
                    raise
                stopped = f"{error} (epoch {epoch}); the state of epoch {result.best['epoch']} is kept"
                result.stopped = stopped
                run.write()
            except KeyboardInterrupt as interrupt:
                result.stopped = "interrupted"
                if path := run.write():
                    raise TrainingInterrupted(path, run.epochs, run.steps) from interrupt
                raise
            finally:
                weights.restore_best()
    if stopped:
        warn_caller(f"Training stopped: {stopped}.")
    return result


def _train(
    step: LossStep | AdversarialStep,
    batches: Batches,
    held_out: Batches | None,
    epochs: Epochs,
    *,
    progress: bool,
) -> None:
    """Train epoch by epoch, and keep the best parameters.

    Raises:
        FloatingPointError: if a loss is not finite, or training explodes. The best parameters are then of an epoch before.
    """
    fit, weights = epochs.fit, epochs.weights
    try:
        with _progress_bar(fit, epochs.limits.epochs, disable=not progress) as bar:
            while not epochs.is_over:
                step.plan(epochs.certain * batches.count, bar.set_postfix_str)
                losses = _train_epoch(step, batches, epochs, bar)
                if held_out is not None:
                    losses["valid"] = _validate(step, held_out, weights)
                record = epochs.add(losses)
                bar.set_postfix_str(_postfix(record, fit.units), refresh=False)
                bar.update()
                if epochs.has_exploded:
                    break
        epochs.finish()
    except FloatingPointError:
        epochs.fail()
        raise


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


def _progress_bar(fit: Fit, epochs: int, *, disable: bool) -> tqdm:
    """Return a progress bar of epochs, which updates seldom where it would fill a log file."""
    interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds
    name = getattr(fit.family, "name", "fit")
    return tqdm(total=epochs, initial=len(fit.history), desc=name, unit="epoch", disable=disable, mininterval=interval)


def _postfix(record: Mapping[str, float], units: Mapping[str, str]) -> str:
    """Return the losses of an epoch with their units, for the progress bar."""
    last = {unit: name for name, unit in units.items()}  # the unit stands after the last loss that has it
    return ", ".join(f"{name}={record[name]:.4g}" + (f" {unit}" if last[unit] == name else "") for name, unit in units.items())


def _train_epoch(step: LossStep | AdversarialStep, batches: Batches, epochs: Epochs, bar: tqdm) -> dict[str, float]:
    """Train on all data once, or on what is left of them in a run that was resumed; return the mean losses per datum by name.

    Append the training loss of the first step to `epochs.first_loss`: that of the parameters with which the epoch begins.
    """
    run, weights, part = epochs.run, epochs.weights, epochs.begin(batches.count)
    with part.at_beginning():
        rest = batches.shuffled(epochs.number, part.steps)
    shown = time.perf_counter()
    for number, batch in enumerate(rest, part.steps + 1):
        try:
            losses = step.step(batch, number)
        except FloatingPointError as error:
            if number == 1 and batch.nonfinite_rows():
                epochs.first_loss.append(0.0)  # the parameters are not to blame
            if place := batches.place_of_nonfinite(batch):
                raise FloatingPointError(f"{error}. {place}") from error
            raise
        weights.update()
        part.add(losses, batch.rows)
        if number == 1:
            epochs.first_loss.append(losses["train"])
        if run.is_due and batches.source.resumes:
            run.capture(part, epochs.first_loss, epochs.seconds)
        if not bar.disable and time.perf_counter() - shown > max(SHOWN_SECONDS, bar.mininterval):
            shown = time.perf_counter()
            bar.set_postfix_str(f"{number / batches.count:.0%} of epoch {epochs.number}, train={part.means['train']:.4g}")
    if not weights.finite:
        raise FloatingPointError("a parameter is not finite after the last step: lower the learning rate")
    return part.means


def _validate(step: LossStep | AdversarialStep, held_out: Batches, weights: TrainedWeights) -> float:
    """Return the loss of held-out data by the averaged parameters, always with the same random numbers."""
    with weights.averaged(), handlers.side_effect_free(step), forked_rng(VALIDATION_SEED):
        return step.validate(held_out)
