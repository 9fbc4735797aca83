"""One run of `train` by a `lightning.Trainer`: its limits, its callbacks and its errors in the words of `train`."""

from __future__ import annotations

__all__ = ["train_by"]

import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed

from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.fit import Fit
from pyro_genmodels.training.lightning import LightningFit
from pyro_genmodels.training.limits import Limits
from pyro_genmodels.training.runs import TrainingInterrupted
from pyro_genmodels.training.shares import Shares
from pyro_genmodels.utils.errors import import_extra, one_line, warn_caller

NOT_FOR_USERS = (
    ".*smaller than the logging interval.*",
    ".*does not have many workers.*",
    ".*have no `val_dataloader`.*",
    ".*in eval mode at the start of training.*",
    ".*LeafSpec.*",
)
"""Warnings of Lightning about what `train` has chosen, or that are torch's own."""


def train_by(
    trainer: Any,
    result: Fit,
    options: dict[str, Any],
    batches: Batches,
    held_out: Batches | None,
    limits: Limits,
    settings: dict[str, Any],
    *,
    progress: bool,
) -> Fit:
    """Train a fit by a Trainer, and return it with its history.

    Args:
        trainer: the Trainer. Its own limits hold too, apart from a `max_epochs` of None.
        result: the fit.
        options: keyword arguments of `LightningFit`.
        batches: the data.
        held_out: held-out data, or None.
        limits: when the run ends.
        settings: further settings by which a run is resumed.
        progress: False to show no progress bar, whatever the Trainer says.

    Raises:
        FloatingPointError: if training has failed before there are parameters to keep.
        RuntimeError: if another process of the run has ended.
        TrainingInterrupted: after Ctrl-C, if there is a checkpoint.
    """
    module = LightningFit(result.family, **options)
    module.result, module.limits, module.settings = result, limits, settings
    module.prepare(batches, held_out, progress=progress)
    shares = Shares(
        batches,
        lambda: module.ranks,
        epoch=lambda: module.epochs.number,
        order=lambda: module.order,
        accumulated=lambda: trainer.accumulate_grad_batches,
    )
    device = next(module.parameters()).device
    held_out_shares = None if held_out is None else Shares(held_out, lambda: module.ranks, is_shuffled=False)
    try:
        with _limited(trainer, limits.epochs), _without_default_checkpoint(trainer), _quiet(trainer, progress=progress):
            trainer.fit(module, shares, held_out_shares)
        if not module.has_ended:
            module.put_back()
            result.stopped = "the Trainer made no step"
            warn_caller("The Trainer made no step, by limits of its own such as max_steps=0: the fit is as it was.")
    except FloatingPointError:
        if not result.best:
            raise
        warn_caller(f"Training stopped: {result.stopped}.")
    except (KeyboardInterrupt, SystemExit) as exit_:  # Lightning turns the former into the latter
        if not isinstance(exit_, KeyboardInterrupt) and not isinstance(exit_.__context__, KeyboardInterrupt):
            raise
        if path := module.written_path:
            raise TrainingInterrupted(path, len(result.history)) from exit_
        raise KeyboardInterrupt from exit_
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise RuntimeError(_of_lost_process(module, error)) from error
    finally:
        module.to(device)  # Lightning leaves it on the CPU
        module.eval()
    return result


@contextmanager
def _limited(trainer: Any, epochs: int) -> Iterator[None]:
    """Limit the number of epochs inside a `with` block."""
    loop = trainer.fit_loop
    before = loop.max_epochs
    loop.max_epochs = epochs if before is None or before < 0 else min(epochs, before)
    try:
        yield
    finally:
        loop.max_epochs = before


@contextmanager
def _without_default_checkpoint(trainer: Any) -> Iterator[None]:
    """Take the ModelCheckpoint that Lightning adds by itself out of a Trainer, and add no callback for longer, in a block."""
    own = import_extra("lightning", extra="lightning", by="trainer=").pytorch.callbacks.ModelCheckpoint
    before, default = trainer.callbacks, own().state_key
    trainer.callbacks = [c for c in before if not (type(c) is own and c.state_key == default and c.dirpath is None)]
    try:
        yield
    finally:
        trainer.callbacks = before


@contextmanager
def _quiet(trainer: Any, *, progress: bool) -> Iterator[None]:
    """Hide the warnings that are not for users, and the progress bar if wanted; put the handler of Ctrl-C back."""
    bar = trainer.progress_bar_callback
    handler = signal.getsignal(signal.SIGINT)
    if bar is not None and not progress:
        bar.disable()
    with warnings.catch_warnings():
        for text in NOT_FOR_USERS:
            warnings.filterwarnings("ignore", text)
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread() and handler is not None:
                signal.signal(signal.SIGINT, handler)
            if bar is not None and not progress:
                bar.enable()


def _is_lost(error: BaseException) -> bool:
    """Return True if an error says that another process can no longer be reached."""
    texts = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "gloo")
    kinds: Any = getattr(distributed, "DistError", ())
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def _of_lost_process(module: LightningFit, error: BaseException) -> str:
    """Return the message about a process that is lost."""
    path = module.written_path
    cure = (
        "Start again; with checkpoint= a run can be continued."
        if path is None
        else f"The state after epoch {len(module.result.history)} is in {path}. Continue with train(..., "
        "checkpoint=Checkpoint(path, resume=True)), on any number of devices."
    )
    return f"Another process of this run has ended or cannot be reached ({one_line(error, 120)}). {cure}"
