r"""One training loop for every fit: epochs of minibatches, early stopping, averaged weights, checkpoints.

The loss it reports is nats per datum: each minibatch of B out of N rows is scaled by N / B by the model's plate and by 1 / N
here. Many devices and machines are lightning's business.

Early stopping: Prechelt (1998). Averaged weights: Polyak and Juditsky (1992), as an exponential moving average.
"""

from __future__ import annotations

__all__ = ["Fit", "train"]

import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from pyro_genmodels import traces
from pyro_genmodels.families.family import Family
from pyro_genmodels.infer.likelihood import MaximumLikelihood

Batch = tuple[Tensor, Tensor | None]


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

    family: Any
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

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
    average: float | None = None,
    clip_norm: float | None = 10.0,
    checkpoint: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Fit:
    """Trains a fit in place and leaves it with its best parameters, in evaluation mode.

    Args:
        fit: a family, or a pair (model, guide) called as ``model(x)`` or ``model(x, context)``. If the model takes ``size``, it
            is told the number of all data; one with latent variables shared by all rows must, or these count in every batch.
        data: rows of x, (N, ...), moved to the fit's device and precision; or a `DataLoader` of x or (x, context).
        context: one per row, (N, ...).
        objective: a Pyro loss; by default `Trace_ELBO` for a fit with latent variables and `MaximumLikelihood` for one without.
        optim: parameters -> torch optimiser, such as ``functools.partial(torch.optim.Adam, lr=1e-3)``, which is the default; or
            one of Pyro's.
        valid: held-out data in the form of data, or the pair (x, context), for early stopping; None keeps the last parameters.
        epochs: passes over the data, at most.
        batch_size: rows per step.
        patience: epochs without a better validation loss before training stops.
        average: decay per step of an exponential moving average of the parameters, such as 0.99, which is then what is
            validated and kept; None keeps the parameters themselves.
        clip_norm: largest norm of the gradient (per datum); None does not clip.
        checkpoint: path without suffix: at each best epoch the state goes to ``.safetensors`` and the history to ``.json``.
        seed: of all random numbers.
        progress: whether to show a progress bar.

    Returns:
        The fit with its history.

    Raises:
        ValueError: on empty data or rows of context that do not match.
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
    model, guide = traces.as_pair(fit)
    modules = traces.owners(model, guide)
    batches = _Batches(data, context, batch_size, modules)
    held_out = None if valid is None else _Batches(*_pair(valid), max(batch_size, 256), modules)
    for module in modules:
        module.train()
    family = getattr(model, "__self__", None)
    if isinstance(family, Family):
        for part in (batches, held_out):
            if part is not None and part.x is not None:
                family.check(part.x)
    loop = _Loop(model, guide, objective or _default_objective(model, guide, batches.first()), batches.rows)
    parameters = loop.parameters(batches.first())
    optimiser = _optimiser(optim, list(parameters.values()))
    weights = _Weights(parameters, modules, average)

    result, start = Fit(fit), time.perf_counter()
    bar = tqdm(total=epochs, desc=getattr(fit, "name", "fit"), unit="epoch", disable=not progress)
    try:
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in batches.shuffled():
                optimiser.zero_grad(set_to_none=True)
                losses.append((loop.step(batch), len(batch[0])))
                if not isfinite(losses[-1][0]):
                    break
                if clip_norm is not None:
                    clip_grad_norm_(parameters.values(), clip_norm, foreach=True)
                optimiser.step()
                weights.update()
            if not isfinite(losses[-1][0]):
                result.stopped = f"the loss is {losses[-1][0]} at step {len(losses)} of epoch {epoch}"
                break
            record = {"epoch": epoch, "train": _mean(losses), "seconds": time.perf_counter() - start}
            if held_out is not None:
                with weights.averaged(), traces.evaluation_mode(model, guide), _fixed_noise():
                    record["valid"] = _mean([(loop.loss(b), len(b[0])) for b in held_out.in_order()])
            result.history.append(record)
            criterion = record.get("valid", -epoch)  # without held-out data the last epoch is the best
            if not result.best or criterion < result.best.get("valid", -result.best["epoch"]):
                result.best = record
                weights.keep()
                if checkpoint is not None:
                    _save(Path(checkpoint), weights.best_state(), result)
            bar.update()
            bar.set_postfix({k: f"{record[k]:.3f}" for k in ("train", "valid") if k in record})
            if epoch - result.best["epoch"] >= patience:
                result.stopped = f"no better validation loss in {patience} epochs"
                break
        result.stopped = result.stopped or f"{epochs} epochs"
    finally:
        bar.close()
        weights.restore()
        for module in modules:
            module.eval()
    if result.stopped.startswith("the loss is"):
        if not result.best:
            raise FloatingPointError(f"Training stopped: {result.stopped}. Lower the learning rate, or look for outliers.")
        warnings.warn(
            f"Training stopped: {result.stopped}. The state of epoch {result.best['epoch']} is kept.",
            RuntimeWarning,
            stacklevel=2,
        )
    return result


class _Loop:
    """The loss of a batch in nats per datum, by whatever Pyro loss."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], objective: Any, rows: int) -> None:
        self.model, self.guide, self.objective, self.rows = model, guide, objective, rows
        self.sized = "size" in inspect.signature(model).parameters

    def step(self, batch: Batch) -> float:
        return self._call(self.objective.loss_and_grads, batch, self.rows)

    def loss(self, batch: Batch) -> float:
        with torch.no_grad():
            return self._call(self.objective.loss, batch, len(batch[0]))

    def _call(self, loss: Callable[..., float], batch: Batch, rows: int) -> float:
        x, context = batch
        args = (x,) if context is None else (x, context)
        kwargs = {"size": rows} if self.sized else {}
        scale = 1 / (rows if self.sized else len(x))
        return loss(poutine.scale(self.model, scale=scale), poutine.scale(self.guide, scale=scale), *args, **kwargs)

    def parameters(self, batch: Batch) -> dict[str, nn.Parameter]:
        """What a step trains: the parameters Pyro sees in one, by its names."""
        with poutine.trace(param_only=True) as capture:
            self.step(batch)
        sites = capture.trace.nodes.items()
        found = {name: site["value"].unconstrained() for name, site in sites}  # type: ignore[union-attr]
        found = {name: p for name, p in found.items() if p.requires_grad}
        if not found:
            raise ValueError(
                "The fit has nothing to train: no parameter that requires a gradient is met in its model and guide."
            )
        return found


class _Batches:
    """Rows of data, from tensors or from a DataLoader."""

    def __init__(self, data: Any, context: Any, batch_size: int, modules: list[nn.Module]) -> None:
        like = next((p for m in modules for p in m.parameters()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype
        self.loader = data if isinstance(data, DataLoader) else None
        if self.loader is not None:
            if context is not None:
                raise ValueError("With a DataLoader the context comes in its batches, as (x, context): leave context out.")
            self.x: Any = None
            self.context: Any = None
            self.rows = len(data.dataset)
        else:
            self.x = self.to(torch.as_tensor(data))
            self.context = None if context is None else self.to(torch.as_tensor(context))
            self.rows = len(self.x) if self.x.dim() else 0
        if not self.rows:
            raise ValueError("Training wants data of at least one row, but found none.")
        if self.loader is None and self.context is not None and len(self.context) != self.rows:
            raise ValueError(
                f"There are {self.rows} rows of data but {len(self.context)} of context. Pass one context per row."
            )
        self.count = ceil(self.rows / batch_size)

    def to(self, t: Tensor) -> Tensor:
        return t.to(self.device, self.dtype if t.is_floating_point() else t.dtype, non_blocking=True)

    def first(self) -> Batch:
        return next(self.in_order())

    def in_order(self) -> Iterator[Batch]:
        return self._by(torch.arange(self.rows))

    def shuffled(self) -> Iterator[Batch]:
        return self._by(torch.randperm(self.rows))

    def _by(self, order: Tensor) -> Iterator[Batch]:
        if self.loader is not None:
            for batch in self.loader:
                x, context = _pair(batch)
                yield self.to(x), None if context is None else self.to(context)
            return
        for rows in order.to(self.device).tensor_split(self.count):  # of sizes that differ by one at most
            yield self.x[rows], None if self.context is None else self.context[rows]


def _pair(batch: Any) -> tuple[Any, Any]:
    """(x, context) of x or of [x] or of [x, context]."""
    if not isinstance(batch, (tuple, list)):
        return batch, None
    if len(batch) > 2:
        raise ValueError(f"A batch wants x or (x, context), but found {len(batch)} parts. Put them together in the dataset.")
    return batch[0], batch[1] if len(batch) == 2 else None


class _Weights:
    """The parameters under training, their moving average, and the best seen."""

    def __init__(self, parameters: dict[str, nn.Parameter], modules: list[nn.Module], decay: float | None) -> None:
        self.names, self.modules = list(parameters), modules
        self.live = nn.ParameterList(parameters.values())
        self.average = None if decay is None else AveragedModel(self.live, multi_avg_fn=get_ema_multi_avg_fn(decay))
        self.buffers = [b for m in modules for b in m.buffers()]
        self.best: list[Tensor] | None = None

    def update(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.live)

    @property
    def kept(self) -> list[Tensor]:
        return [p.detach() for p in (self.live if self.average is None else self.average.module).parameters()]

    def keep(self) -> None:
        self.best = [t.clone() for t in (*self.kept, *self.buffers)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with self._as([] if self.average is None else self.kept):
            yield

    @contextmanager
    def _as(self, values: list[Tensor]) -> Iterator[None]:
        targets = [*(p.data for p in self.live), *self.buffers]
        before = [t.clone() for t in targets[: len(values)]]
        _copy(targets, values)
        try:
            yield
        finally:
            _copy(targets, before)

    def best_state(self) -> dict[str, Tensor]:
        """The best parameters and buffers, by their names in the fit's modules or, without modules, in Pyro's param store."""
        with self._as(self.best or []):
            state = {name: t for m in self.modules for name, t in m.state_dict().items()}
            state = state or dict(zip(self.names, self.live, strict=True))
            return {name: t.detach().clone().contiguous() for name, t in state.items()}

    def restore(self) -> None:
        _copy([*(p.data for p in self.live), *self.buffers], self.best or [])


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=False):
            target.copy_(value)


def _default_objective(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> ELBO:
    """What the fit offers decides: latent variables ask for an ELBO, a density alone for its likelihood."""
    args = (batch[0],) if batch[1] is None else batch
    with torch.no_grad(), poutine.block():
        model_trace, _ = traces.run(model, guide, args, {})
    return Trace_ELBO() if traces.latents(model_trace) else MaximumLikelihood()


def _optimiser(optim: Any, parameters: list[nn.Parameter]) -> Optimizer:
    if optim is None:
        return Adam(parameters, lr=1e-3)
    if isinstance(optim, PyroOptim):
        if callable(optim.pt_optim_args):
            raise ValueError("train wants an optimiser with one set of options, but found a function of the parameter's name.")
        return optim.pt_optim_constructor(parameters, **optim.pt_optim_args)  # type: ignore[operator]
    if not callable(optim) or isinstance(optim, Optimizer):
        raise TypeError(
            f"optim wants a function of the parameters, such as functools.partial(torch.optim.Adam, lr=1e-3), but found a "
            f"{type(optim).__name__}."
        )
    return optim(parameters)


@contextmanager
def _fixed_noise() -> Iterator[None]:
    """The same random numbers every time, so that epochs are compared on the same draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def _save(path: Path, state: dict[str, Tensor], fit: Fit) -> None:
    """Writes state and history, each whole or not at all."""
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("A checkpoint needs safetensors: pip install 'pyro-genmodels[cli]'.") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"family": type(fit.family).__name__, "best": fit.best, "history": fit.history}
    tensors, text = (path.with_name(path.name + suffix) for suffix in (".safetensors", ".json"))
    for target, write in (
        (tensors, lambda p: save_file(state, p)),
        (text, lambda p: p.write_text(json.dumps(record, indent=1) + "\n")),
    ):
        part = target.with_name(target.name + ".part")
        write(part)
        os.replace(part, target)
