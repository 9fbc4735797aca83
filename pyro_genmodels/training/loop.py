r"""One training loop for every fit: epochs of minibatches, early stopping, averaged weights, checkpoints.

What a step is, `turns` says: of a loss, or of a game. Many devices and machines are lightning's business.

Early stopping: Prechelt (1998).
"""

from __future__ import annotations

__all__ = ["Fit", "train"]

import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from types import EllipsisType
from typing import Any

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
from pyro_genmodels.training import checkpoints
from pyro_genmodels.training.batches import Batches, pair_of
from pyro_genmodels.training.snapshots import RunCheckpoint
from pyro_genmodels.training.steps import AdversarialStep, LossStep, step_of

STANDARDIZE_ROWS = 10_000
"""Rows of a DataLoader that set a family's mean and deviation; of a tensor all do."""


@dataclass
class Fit:
    """What training made.

    Attributes:
        family: what was trained, with its best parameters: the family, or the pair (model, guide).
        history: one record per epoch: ``epoch`` (from 1), ``train`` and ``valid`` (nats per datum), ``seconds`` since the
            start. Of a game ``train`` is what the model loses, ``critic`` what the critic does, and ``valid`` the squared
            energy distance of draws from held-out data.
        best: the record of the epoch whose parameters were kept.
        stopped: why training ended.
    """

    family: Any = field(repr=False)
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    def is_best(self, record: dict[str, float]) -> bool:
        """Whether no earlier epoch has a lower validation loss; without one, the last epoch is the best."""
        return record.get("valid", 0.0) < self.best.get("valid", inf) or "valid" not in record

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {
            **checkpoints.describe(self.family),
            "best": self.best,
            "history": list(self.history),
            "stopped": self.stopped,
        }

    @property
    def model(self) -> Callable[..., Any]:
        """The model, so that a `Fit` is itself a fit."""
        return traces.as_pair(self.family)[0]

    @property
    def guide(self) -> Callable[..., Any]:
        """The guide."""
        return traces.as_pair(self.family)[1]


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
    ema_decay: float | EllipsisType | None = ...,
    clip_norm: float | None = 10.0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    notes: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Fit:
    """Trains a fit in place and leaves it with its best parameters, in evaluation mode.

    Args:
        fit: a family, or a pair (model, guide) called as ``model(x)`` or ``model(x, context)``. If the model takes ``size``, it
            is told the number of all data; one with latent variables shared by all rows must, or these count in every batch.
        data: rows of x, (N, ...), or the pair (x, context), moved to the fit's device and precision; or a `DataLoader` of x or
            (x, context), of which the first 10,000 rows are checked and set a family's mean and deviation.
        context: one per row, (N, ...).
        objective: a Pyro loss; by default `DenoisingScoreMatching` for a fit with a diffusion, `ContrastiveDivergence` for one
            that observes what has a constant out of reach, `Trace_ELBO` for another with latent variables, and
            `MaximumLikelihood` else. Or an `Adversarial`, whose model it then is that trains; for a family with a critic, a
            `GAN`, also a game such as ``Hinge()``, by default `Relativistic`.
        optim: parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``, which is the default; or
            one of Pyro's.
        valid: held-out data in the form of data, or the pair (x, context), for early stopping; None keeps the last parameters.
        epochs: passes over the data, at most.
        batch_size: rows per step.
        patience: epochs without a better validation loss before training stops.
        ema_decay: decay per step of an exponential moving average of the parameters, such as 0.99, which is then what is
            validated and kept (see `moving_average`); None keeps the parameters themselves. By default 0.999 for diffusions,
            `FlowMatching` and games, and none for others.
        clip_norm: largest norm of the gradient (per datum) of a Pyro loss; None does not clip.
        checkpoint: path without suffix. At each best epoch the parameters go to ``.safetensors``, with the history, which
            ``.json`` has in readable form; twice a minute and at the end, also by Ctrl-C, the run goes to
            ``.training.safetensors``. See `checkpoints.load`.
        resume: whether to go on from that run, on the same data, with the same arguments but for the number of epochs; it ends
            as if it had never stopped.
        notes: what else the checkpoint is to say, as JSON can.
        seed: of all random numbers.
        progress: whether to show a progress bar.

    Returns:
        The fit with its history.

    Raises:
        ValueError: on empty data or rows of context that do not match; with resume, if the run is of another fit.
        FileNotFoundError: with resume, if there is no run.
        OSError: if the checkpoint cannot be written.
        FloatingPointError: if the loss is NaN or infinite before there is anything to keep; later, training stops with a
            warning.

    Example:
        >>> from pyro_genmodels import Flow
        >>> x = torch.randn(200, 2)
        >>> train(Flow((2,)), x[:150], valid=x[150:], epochs=2, progress=False).best["epoch"] > 0
        True
    """
    if epochs < 1 or batch_size < 1 or patience < 1:
        raise ValueError(f"epochs, batch_size and patience must be positive, got {epochs}, {batch_size} and {patience}.")
    if seed is not None:
        pyro.set_rng_seed(seed)
    fit = fit.family if isinstance(fit, Fit) else fit
    if context is None:
        data, context = pair_of(data)
    model, guide = traces.as_pair(fit)
    modules = traces.modules_of(model, guide)
    like = next((p for m in modules for p in m.parameters()), torch.empty(0))
    batches = Batches(data, context, batch_size, like)
    held_out = None if valid is None else Batches(*pair_of(valid), max(batch_size, 256), like)
    for module in modules:
        module.train()
    _check_data(model, batches, held_out)
    turns = step_of(fit, objective, optim, batches, clip_norm)
    modules = turns.modules
    for module in modules:
        module.train()
    if ema_decay is ...:
        ema_decay = 0.999 if turns.averages else None
    weights = TrainedWeights(turns.parameters, traces.modules_of(model, guide), ema_decay, turns.aside, turns.others)

    result = Fit(fit)
    run = RunCheckpoint(
        checkpoint, result, weights, turns.optimiser, {"rows": batches.rows, "data": batches.digest, "notes": dict(notes or {})}
    )
    try:
        if resume:
            run.restore()
        run.capture()
    except BaseException:
        for module in modules:
            module.eval()
        raise
    done, start = len(result.history), time.perf_counter() - (result.history[-1]["seconds"] if result.history else 0.0)
    result.stopped = f"{max(epochs, done)} epochs"
    often = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file is not filled
    bar = tqdm(
        total=epochs, initial=done, desc=getattr(fit, "name", "fit"), unit="epoch", disable=not progress, mininterval=often
    )
    try:
        for epoch in range(done + 1, epochs + 1):
            if epoch - 1 - result.best.get("epoch", 0) >= patience:
                break
            record = {"epoch": epoch, **_epoch(turns, batches, weights)}
            if held_out is not None:
                with weights.averaged(), handlers.side_effect_free(), _fixed_noise():
                    record["valid"] = turns.validate(held_out)
            record["seconds"] = time.perf_counter() - start
            result.history.append(record)
            if result.is_best(record):
                weights.keep_best()
                result.best = record
                run.write_best()
            run.capture()
            bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record}, refresh=False)
            bar.update()
        if len(result.history) - result.best.get("epoch", 0) >= patience:
            result.stopped = f"no better validation loss in {patience} epochs"
        if not result.best:
            raise FloatingPointError("no epoch has a finite validation loss: look for held-out data that the model rules out")
        run.write()
    except FloatingPointError as error:
        if not result.best:
            raise
        result.stopped = f"{error} (epoch {epoch}); the state of epoch {result.best['epoch']} is kept"
        run.write()
        warnings.warn(f"Training stopped: {result.stopped}.", RuntimeWarning, stacklevel=2)
    except KeyboardInterrupt as interrupt:
        result.stopped = "interrupted"
        if path := run.write():
            where = f"The state after epoch {run.epochs} is in {path}"
            interrupt.add_note(f"{where}; to go on: train(..., resume=True), or pyro-genmodels fit --resume {path}")
        raise
    finally:
        bar.close()
        weights.restore_best()
        for module in modules:
            module.eval()
    return result


def _epoch(turns: LossStep | AdversarialStep, batches: Batches, weights: TrainedWeights) -> dict[str, float]:
    """One pass over the data; returns the mean of what each step says (nats per datum)."""
    said = []
    for step, batch in enumerate(batches.shuffled(), 1):
        said.append((turns.step(batch, step), len(batch[0])))
        weights.update()
    if not weights.finite:
        raise FloatingPointError("a parameter is not finite after the last step: lower the learning rate")
    rows = sum(n for _, n in said)
    return {name: sum(record[name] * n for record, n in said) / rows for name in said[0][0]}


def _check_data(model: Callable[..., Any], *parts: Batches | None) -> None:
    """Validate the data of a family, and prepare the family by the first part: by all rows, or the first of a DataLoader."""
    family = getattr(model, "__self__", None)
    for part in parts:
        if isinstance(family, Family) and part is not None:
            rows = part.head(STANDARDIZE_ROWS)
            family.validate(rows)
            family.prepare(rows)


@contextmanager
def _fixed_noise() -> Iterator[None]:
    """The same random numbers every time, so that epochs are compared on the same draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0x9E3779B9)  # one that no one draws data from
        yield
