"""Many runs of one task, each from a seed of its own, in this process or in several by joblib.

A run has the same result in whichever process it runs, and after whichever other runs. joblib also runs on a cluster:
``with joblib.parallel_backend("dask"): ...`` around a call sends the runs there.
"""

from __future__ import annotations

__all__ = ["Outcome", "run_all", "run_each", "seeded", "spawn_seeds"]

import pickle
import random
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.util import is_validation_enabled
from tqdm.auto import tqdm

from pyro_genmodels.utils.errors import import_extra, one_line
from pyro_genmodels.utils.rng import forked_rng

FAILURES = (ArithmeticError, RuntimeError, ValueError)
"""Errors of a run that other runs may not have, such as of a simulator, or of a matrix without a decomposition."""


@dataclass(frozen=True)
class Outcome:
    """The result of one run, or its error, and its warnings.

    Attributes:
        value: what it returned, or None if it failed.
        error: its error as text, or None.
        warnings: texts of its warnings.
    """

    value: Any
    error: str | None = None
    warnings: tuple[str, ...] = field(default=(), repr=False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the random numbers of torch, numpy and Python in a block, and restore them at its end.

    Args:
        seed: the seed, of at most 32 bits.

    Example:
        >>> with seeded(1):
        ...     a = torch.rand(()), np.random.rand(), random.random()
        >>> with seeded(1):
        ...     (torch.rand(()), np.random.rand(), random.random()) == a
        True
    """
    states = random.getstate(), np.random.get_state()
    with forked_rng(seed):
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def spawn_seeds(seed: int | None, number: int) -> list[int]:
    """Return seeds of 32 bits, one for each of many runs.

    Args:
        seed: seed of all of them; None takes one from torch's random numbers.
        number: how many.

    Example:
        >>> spawn_seeds(0, 2) == spawn_seeds(0, 3)[:2]
        True
    """
    entropy = int(torch.randint(2**62, ())) if seed is None else seed
    return [int(x) for x in np.random.SeedSequence(entropy).generate_state(number)]


def run_all(
    task: Callable[[int], Any], seeds: Iterable[int], *, n_jobs: int = 1, progress: bool = True, description: str
) -> list[Outcome]:
    """Run a task once for each seed, and return the outcomes in their order: see `run_each`.

    Example:
        >>> def inverse(seed):
        ...     return 1 / seed
        >>> run_all(inverse, [2, 0], progress=False, description="inverses")
        [Outcome(value=0.5, error=None), Outcome(value=None, error='ZeroDivisionError: division by zero')]
    """
    return list(run_each(task, seeds, n_jobs=n_jobs, progress=progress, description=description))


def run_each(
    task: Callable[[int], Any], seeds: Iterable[int], *, n_jobs: int = 1, progress: bool = True, description: str
) -> Iterator[Outcome]:
    """Run a task once for each seed, and yield each outcome when it and those before it are there.

    The task may keep what it has computed: each process has one copy of it. It should seed itself (`seeded`).

    Args:
        task: function of a seed.
        seeds: the seeds.
        n_jobs: number of processes, as joblib takes it: -1 for as many as there are cores.
        progress: True for a progress bar.
        description: words beside the bar.

    Yields:
        The outcome of each. Arithmetic errors, RuntimeErrors and ValueErrors are outcomes; others are raised.

    Example:
        >>> next(run_each(lambda seed: 2 * seed, [1, 2], progress=False, description="doubles"))
        Outcome(value=2, error=None)
    """
    seeds = list(seeds)
    if n_jobs == 1:
        found: Iterable[Outcome] = (_outcome(task, seed) for seed in seeds)
    else:
        joblib = import_extra("joblib", extra="parallel", by=f"n_jobs={n_jobs}")
        cloudpickle = import_extra("cloudpickle", extra="parallel", by=f"n_jobs={n_jobs}")
        job = _Job(uuid.uuid4().hex, cloudpickle.dumps((task, _Settings.here())))
        found = joblib.Parallel(n_jobs=n_jobs, return_as="generator")(joblib.delayed(job.run)(seed) for seed in seeds)
    yield from tqdm(found, total=len(seeds), desc=description, unit="run", disable=not progress, mininterval=0.5)


def _outcome(task: Callable[[int], Any], seed: int) -> Outcome:
    """Return the outcome of one run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, error = None, None
        try:
            value = task(seed)
        except FAILURES as failure:
            error = f"{type(failure).__name__}: {one_line(failure)}"
    return Outcome(value, error, tuple(one_line(w.message) for w in caught))


@dataclass(frozen=True)
class _Settings:
    """The state that a model may depend on beside its arguments: parameters and global flags."""

    dtype: torch.dtype
    validates: bool
    params: Any

    @classmethod
    def here(cls) -> _Settings:
        """Return those of this process."""
        return cls(torch.get_default_dtype(), is_validation_enabled(), pyro.get_param_store().get_state())

    def apply(self) -> None:
        """Make them those of this process."""
        torch.set_default_dtype(self.dtype)
        pyro.enable_validation(self.validates)
        pyro.get_param_store().set_state(self.params)


@dataclass(frozen=True)
class _Job:
    """A task on its way to other processes, each of which unpickles it once.

    Attributes:
        key: name that no other job has.
        pickled: the task and the settings.
    """

    key: str
    pickled: bytes

    def run(self, seed: int) -> Outcome:
        """Run the task in the process that this is."""
        if self.key not in _tasks:
            _tasks.clear()
            task, settings = pickle.loads(self.pickled)
            settings.apply()
            torch.set_num_threads(1)
            _tasks[self.key] = task
        return _outcome(_tasks[self.key], seed)


_tasks: dict[str, Callable[[int], Any]] = {}
"""The last task of this process, by the key of its job."""
