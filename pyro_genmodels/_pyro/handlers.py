"""Handlers of runs of a model: one thread at a time, no side effects, data drawn instead of observed; questions about a run."""

from __future__ import annotations

__all__ = ["draw_observed", "exclusive", "has_enumerated_dims", "latents_without_gradient", "side_effect_free"]

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_genmodels._pyro import modules, sites, traces
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.reparam import MarkComputed, is_reparametrised

_lock = threading.RLock()
_running: list[tuple[str, int]] = []
"""Names of what runs under the lock, and the number of its thread."""


def _after_fork() -> None:
    """Replace, in a forked process, a lock that another thread of its parent may hold, also one not yet or no longer listed."""
    global _lock
    if not any(thread == threading.get_ident() for _, thread in _running[:1]):
        _lock = threading.RLock()
        _running.clear()


if hasattr(os, "register_at_fork"):  # there are no forks on Windows
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive(name: str, *, wait: bool = False) -> Iterator[None]:
    """Run Pyro programs in one thread at a time, since handlers and parameters are global in Pyro. Nested calls are allowed.

    Args:
        name: what runs, for the message.
        wait: True to wait for another thread that is inside.

    Raises:
        RuntimeError: if another thread is inside, and this one does not wait.
    """
    if not _lock.acquire(blocking=wait):
        running = _running[:1]  # once, since the other thread may end in between
        raise RuntimeError(
            f"{name} cannot run while {running[0][0] if running else 'another call'} runs in another thread: Pyro keeps its "
            "handlers and parameters once for all threads. Use processes, such as joblib.Parallel(n_jobs=...), or a lock of "
            "your own around the calls."
        )
    _running.append((name, threading.get_ident()))
    try:
        yield
    finally:
        _running.pop()
        _lock.release()


@contextmanager
def side_effect_free(*parts: Any) -> Iterator[None]:
    """Run a model and guide without gradients and in evaluation mode, and leave no side effect.

    All modules that the parts can call are put into evaluation mode first, and back at the end: see
    `modules.reachable_modules` for how they are found. The param store is restored, and handlers outside see no site. Samples
    advance the random number generator as usual.

    Args:
        parts: the model, the guide and anything else that is run inside: functions, modules or distributions.

    Raises:
        RuntimeError: if another thread trains or evaluates a model; see `exclusive`.
    """
    with exclusive("an evaluation of a model"):
        store, freeze = pyro.get_param_store(), _FrozenParametersMessenger()
        before = store.get_state()
        try:
            evaluation = modules.evaluation_mode(modules.reachable_modules(*parts))
            with without_trace_shapes(), evaluation, torch.no_grad(), poutine.block(), freeze, MarkComputed():
                yield
        finally:
            freeze.restore()
            store.clear()
            store.set_state(before)


class _FrozenParametersMessenger(Messenger):
    """Handler that remembers which parameters had ``requires_grad=False``, since Pyro's param store sets it to True."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: dict[int, Tensor] = {}

    def _pyro_param(self, msg: Any) -> None:
        for value in msg["args"]:
            if isinstance(value, Tensor) and value.is_leaf and not value.requires_grad:
                self.frozen[id(value)] = value

    def restore(self) -> None:
        """Set ``requires_grad`` of the remembered parameters back to False."""
        for value in self.frozen.values():
            value.requires_grad_(False)


class _DrawObservedMessenger(UnconditionMessenger):
    """`UnconditionMessenger` that does not sample computed values anew, because they are not data."""

    def _pyro_sample(self, msg: Any) -> None:
        if not (sites.is_deterministic(msg) or is_reparametrised(msg)):
            super()._pyro_sample(msg)


def draw_observed(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model with its observed sites sampled; `sites.observed_value` still has the observed values.

    The handler wraps a function without arguments, because Pyro's handlers have a keyword `context` of their own.
    """
    return lambda *args, **kwargs: _DrawObservedMessenger()(lambda: model(*args, **kwargs))()


def latents_without_gradient() -> list[str]:
    """Return the latent variables sampled so far in the current run whose samples carry no gradient.

    Estimators weigh these by the log densities that depend on them (score function).
    """
    return [
        name
        for handler in _PYRO_STACK
        if isinstance(handler, TraceMessenger)
        for name, site in traces.sample_sites(handler.trace).items()
        if not (site["is_observed"] or site_is_subsample(site) or site["fn"].has_rsample)
    ]


def has_enumerated_dims(batch_dims: int) -> bool:
    """Return True if a tensor with this many batch dimensions has one over which Pyro enumerates in the current run."""
    enumerates = any(isinstance(handler, EnumMessenger) for handler in _PYRO_STACK)
    return enumerates and any(batch_dims >= -dim for dim in _ENUM_ALLOCATOR.dim_to_id)
