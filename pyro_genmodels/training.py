r"""One training loop for every fit: epochs of minibatches, early stopping, averaged weights, checkpoints.

The loss it reports is nats per datum, and so is the gradient: each minibatch of B out of N rows is scaled by N / B by the
model's plate, and the sum divided by N here. Many devices and machines are lightning's business.

Early stopping: Prechelt (1998).
"""

from __future__ import annotations

__all__ = ["Fit", "train"]

import inspect
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf, isfinite
from pathlib import Path
from types import EllipsisType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm.auto import tqdm

from pyro_genmodels import checkpoints, traces
from pyro_genmodels.batches import Batch, Batches, pair_of
from pyro_genmodels.distributions.base import unwrap
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.families.family import Family
from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import DenoisingScoreMatching, is_diffusion
from pyro_genmodels.infer.flow_matching import FlowMatching
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.optimisers import make
from pyro_genmodels.partition import quick_log_partition
from pyro_genmodels.snapshots import Keeper
from pyro_genmodels.weights import Weights

STANDARDIZE_ROWS = 10_000
"""Rows of a DataLoader that set a family's mean and deviation; of a tensor all do."""


@dataclass
class Fit:
    """What training made.

    Attributes:
        family: what was trained, with its best parameters: the family, or the pair (model, guide).
        history: one record per epoch: ``epoch`` (from 1), ``train`` and ``valid`` (nats per datum), ``seconds`` since
            the start.
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
    objective: ELBO | None = None,
    optim: Callable[[Iterable[nn.Parameter]], Optimizer] | PyroOptim | None = None,
    valid: Any = None,
    epochs: int = 100,
    batch_size: int = 128,
    patience: int = 20,
    average: float | EllipsisType | None = ...,
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
            `MaximumLikelihood` else.
        optim: parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``, which is the default; or
            one of Pyro's.
        valid: held-out data in the form of data, or the pair (x, context), for early stopping; None keeps the last parameters.
        epochs: passes over the data, at most.
        batch_size: rows per step.
        patience: epochs without a better validation loss before training stops.
        average: decay per step of an exponential moving average of the parameters, such as 0.99, which is then what is
            validated and kept (see `moving_average`); None keeps the parameters themselves. By default 0.999 for diffusions and
            `FlowMatching`, and none for others.
        clip_norm: largest norm of the gradient (per datum); None does not clip.
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
    if objective is not None and not isinstance(objective, ELBO):
        found = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"objective wants a Pyro loss, an object such as MaximumLikelihood(), but found {found}.")
    if context is None:
        data, context = pair_of(data)
    model, guide = traces.as_pair(fit)
    modules = traces.owners(model, guide)
    like = next((p for m in modules for p in m.parameters()), torch.empty(0))
    batches = Batches(data, context, batch_size, like)
    held_out = None if valid is None else Batches(*pair_of(valid), max(batch_size, 256), like)
    for module in modules:
        module.train()
    _check_data(model, batches, held_out)
    loop = _Loop(model, guide, objective or _default_objective(model, guide, batches.first()), batches.rows)
    if average is ...:
        average = 0.999 if loop.needs_average(batches.first()) else None
    loop.parameters = loop.find_parameters(batches.first())
    optimiser = make(optim, list(loop.parameters.values()))
    weights = Weights(loop.parameters, modules, average, getattr(loop.objective, "own", ()))

    result = Fit(fit)
    keeper = Keeper(
        checkpoint, result, weights, optimiser, {"rows": batches.rows, "data": batches.digest, "notes": dict(notes or {})}
    )
    try:
        if resume:
            keeper.put_back()
        keeper.take()
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
            record = {"epoch": epoch, "train": _epoch(loop, batches, optimiser, weights, clip_norm)}
            if held_out is not None:
                with weights.averaged(), traces.looking_on(), _fixed_noise():
                    loop.know_constants(held_out.first())
                    record["valid"] = _mean([(loop.loss(batch, held_out.rows), len(batch[0])) for batch in held_out.in_order()])
            record["seconds"] = time.perf_counter() - start
            result.history.append(record)
            if result.is_best(record):
                weights.keep()
                result.best = record
                keeper.write_best()
            keeper.take()
            bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record}, refresh=False)
            bar.update()
        if len(result.history) - result.best.get("epoch", 0) >= patience:
            result.stopped = f"no better validation loss in {patience} epochs"
        if not result.best:
            raise FloatingPointError("no epoch has a finite validation loss: look for held-out data that the model rules out")
        keeper.write()
    except FloatingPointError as error:
        if not result.best:
            raise
        result.stopped = f"{error} (epoch {epoch}); the state of epoch {result.best['epoch']} is kept"
        keeper.write()
        warnings.warn(f"Training stopped: {result.stopped}.", RuntimeWarning, stacklevel=2)
    except KeyboardInterrupt as interrupt:
        result.stopped = "interrupted"
        if path := keeper.write():
            where = f"The state after epoch {keeper.epochs} is in {path}"
            interrupt.add_note(f"{where}; to go on: train(..., resume=True), or pyro-genmodels fit --resume {path}")
        raise
    finally:
        bar.close()
        weights.restore()
        for module in modules:
            module.eval()
    return result


def _epoch(loop: _Loop, batches: Batches, optimiser: Optimizer, weights: Weights, clip_norm: float | None) -> float:
    """One pass over the data; returns the mean loss (nats per datum)."""
    losses = []
    for step, batch in enumerate(batches.shuffled(), 1):
        loss = loop.step(batch)
        norm = clip_grad_norm_(weights.live, inf if clip_norm is None else clip_norm, foreach=True).item()
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not isfinite(value):
                raise FloatingPointError(f"the {name} is {value} at step {step}: lower the learning rate, or look for outliers")
        optimiser.step()
        weights.update()
        losses.append((loss, len(batch[0])))
    if not weights.finite:
        raise FloatingPointError("a parameter is not finite after the last step: lower the learning rate")
    return _mean(losses)


def _check_data(model: Callable[..., Any], *parts: Batches | None) -> None:
    """A family's data are checked here, and set its mean and deviation: all of them, or the first rows of a DataLoader."""
    family = getattr(model, "__self__", None)
    for part in parts:
        if isinstance(family, Family) and part is not None:
            family.check(part.head(STANDARDIZE_ROWS))


class _Loop:
    """The loss of a batch in nats per datum, by whatever Pyro loss."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], objective: Any, rows: int) -> None:
        self.model, self.guide, self.objective, self.rows = model, guide, objective, rows
        self.sized = "size" in inspect.signature(model).parameters
        self.parameters: dict[str, nn.Parameter] = {}
        self.warned = False

    def step(self, batch: Batch) -> float:
        """The loss, its gradient left in the parameters; infinite or NaN where a distribution refused what it was given."""
        for p in self.parameters.values():
            p.grad = None
        loss = self._guarded(self.objective.loss_and_grads, batch, self.rows)
        rows = self.rows if self.sized else len(batch[0])
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.div_(rows)
        return loss

    def loss(self, batch: Batch, rows: int) -> float:
        """The loss of a batch out of so many rows."""
        with torch.no_grad():
            return self._guarded(self.objective.loss, batch, rows)

    def know_constants(self, batch: Batch) -> None:
        """Has the energies in the model know their log Z, or losses of different parameters could not be compared."""
        with pyro.validation_enabled(is_validate=False):  # what is not finite shows in the loss
            dists = _distributions(self.model, self.guide, batch)
            for dist in dists:
                if isinstance(dist, Energy) and dist.context is None and dist.sampler is not None:
                    quick_log_partition(dist)
        known = isinstance(self.objective, (ContrastiveDivergence, NoiseContrastive))
        if not (known or self.warned) and any(isinstance(d, Energy) and d.context is not None for d in dists):
            self.warned = True
            warnings.warn(
                "The validation losses of energies with a context lack log Z of each, which changes with the parameters, so "
                "that early stopping cannot rely on them. Use ContrastiveDivergence(), or leave valid out.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _guarded(self, loss: Callable[..., float], batch: Batch, rows: int) -> float:
        try:
            return self._call(loss, batch, rows)
        except ValueError:  # NaN parameters of a distribution are refused before the loss can be NaN
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                value = self._call(self.objective.loss, batch, rows)
            if isfinite(value):
                raise
            return value

    def _call(self, loss: Callable[..., float], batch: Batch, rows: int) -> float:
        x, context = batch
        args = (x,) if context is None else (x, context)
        kwargs = {"size": rows} if self.sized else {}
        return loss(self.model, self.guide, *args, **kwargs) / (rows if self.sized else len(x))

    def needs_average(self, batch: Batch) -> bool:
        """Whether the loss is of networks that are drawn from by many steps, which last weights alone serve badly."""
        if not isinstance(self.objective, DenoisingScoreMatching):
            return isinstance(self.objective, FlowMatching)
        return any(map(is_diffusion, _distributions(self.model, self.guide, batch)))

    def find_parameters(self, batch: Batch) -> dict[str, nn.Parameter]:
        """What a step trains: the parameters Pyro sees in one, by its names."""
        with poutine.trace(param_only=True) as capture:
            self._call(self.objective.loss_and_grads, batch, self.rows)
        sites = capture.trace.nodes.items()
        values: dict[str, Any] = {name: site["value"] for name, site in sites}
        found = {name: v.unconstrained() if hasattr(v, "unconstrained") else v for name, v in values.items()}
        found = {name: p for name, p in found.items() if p.requires_grad}
        if not found:
            raise ValueError(
                "The fit has nothing to train: no parameter that requires a gradient is met in its model and guide."
            )
        return found


def _distributions(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> list[Any]:
    """Out of Pyro's wrappers, those at the sites of model and guide."""
    args = (batch[0],) if batch[1] is None else batch
    with torch.no_grad(), poutine.block():
        pair: Any = traces.run(model, guide, args, {})
    return [unwrap(site["fn"]) for trace in pair for site in traces.samples(trace).values()]


def _default_objective(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> ELBO:
    """What the fit offers decides: energies, diffusions, latent variables, or a density alone."""
    args = (batch[0],) if batch[1] is None else batch
    with torch.no_grad(), poutine.block():
        model_trace, _ = traces.run(model, guide, args, {})
    sites: Any = traces.samples(model_trace)
    if any(is_diffusion(site["fn"]) for site in sites.values()):
        return DenoisingScoreMatching()
    if any(getattr(unwrap(sites[name]["fn"]), "intractable", False) for name in traces.observed(model_trace)):
        return ContrastiveDivergence()
    return Trace_ELBO() if traces.latents(model_trace) else MaximumLikelihood()


@contextmanager
def _fixed_noise() -> Iterator[None]:
    """The same random numbers every time, so that epochs are compared on the same draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0x9E3779B9)  # one that no one draws data from
        yield


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
