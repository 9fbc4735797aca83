"""Many runs of one task, each from a seed of its own, in this process, in several, or on a cluster, by joblib.

A run has the same result in whichever process it runs, and after whichever other runs. joblib's backends are the engine:
``with joblib.parallel_config(backend="dask"): ...`` around a call with ``n_jobs=-1`` sends the runs to a cluster.
"""

from __future__ import annotations

__all__ = ["Outcome", "check_n_jobs", "run_all", "run_each", "run_values", "seeded", "spawn_seeds"]

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from pyro_genmodels.utils.errors import one_line, warn_caller
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.workers import Job, stays_here

FAILURES = (ArithmeticError, RuntimeError, ValueError)
"""Errors of a run that other runs may not have, such as of a simulator, or of a matrix without a decomposition."""


@dataclass(frozen=True)
class Outcome:
    """The result of one run, or its error, and its warnings.

    Attributes:
        value: what it returned, or None if it failed.
        error: its error as text, or None.
        caught: texts of its warnings, with their categories.
    """

    value: Any
    error: str | None = None
    caught: tuple[tuple[str, type[Warning]], ...] = field(default=(), repr=False)

    @property
    def warnings(self) -> list[str]:
        """Texts of its warnings, each as one line."""
        return [one_line(text) for text, _ in self.caught]


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


def check_n_jobs(owner: str, n_jobs: Any) -> None:
    """Raise a ValueError unless a number of processes is one that joblib takes.

    Args:
        owner: name of the class or function that takes it.
        n_jobs: the number.

    Example:
        >>> check_n_jobs("reloo", 0)
        Traceback (most recent call last):
        ValueError: reloo wants n_jobs as a number of processes, or -1 for as many as there are cores, but found 0.
    """
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, Integral) or n_jobs == 0:
        raise ValueError(
            f"{owner} wants n_jobs as a number of processes, or -1 for as many as there are cores, but found {n_jobs!r}."
        )


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


def run_values(
    task: Callable[[int], Any], seeds: Iterable[int], *, n_jobs: int = 1, progress: bool = True, description: str
) -> list[Any]:
    """Run a task once for each seed, and return the results in their order. An error of a run is raised; see `run_each`.

    Warns:
        Warning: as the runs do, each text once.

    Example:
        >>> run_values(lambda seed: 2 * seed, [1, 2], progress=False, description="doubles")
        [2, 4]
    """
    found = run_each(task, seeds, n_jobs=n_jobs, progress=progress, description=description, failures=())
    outcomes = list(found)
    for text, category in dict.fromkeys(warned for outcome in outcomes for warned in outcome.caught):
        warn_caller(text, category)
    return [outcome.value for outcome in outcomes]


def run_each(
    task: Callable[[int], Any],
    seeds: Iterable[int],
    *,
    n_jobs: int = 1,
    progress: bool = True,
    description: str,
    failures: tuple[type[Exception], ...] = FAILURES,
) -> Iterator[Outcome]:
    """Run a task once for each seed, and yield each outcome when it and those before it are there.

    The task may keep what it has computed: each process has one copy of it. It should seed itself (`seeded`). If a worker is
    lost, the runs whose outcomes are not there are repeated on others. Runs inside of a run stay in its process, as do all if
    joblib's backend is one of threads, since Pyro's handlers and parameters are global.

    Args:
        task: function of a seed.
        seeds: the seeds.
        n_jobs: number of processes, as joblib takes it: -1 for as many as there are cores, or for all of a cluster.
        progress: True for a progress bar.
        description: words beside the bar.
        failures: kinds of errors that are outcomes; others are raised.

    Yields:
        The outcome of each. Arithmetic errors, RuntimeErrors and ValueErrors are outcomes; others are raised.

    Raises:
        ValueError: if `n_jobs` is no number of processes.
        TypeError: if the task cannot be pickled for other processes.
        RuntimeError: if workers are lost again and again.

    Warns:
        RuntimeWarning: if runs are repeated, because a worker was lost.

    Example:
        >>> next(run_each(lambda seed: 2 * seed, [1, 2], progress=False, description="doubles"))
        Outcome(value=2, error=None)
    """
    check_n_jobs(description, n_jobs)
    seeds = list(seeds)
    with tqdm(total=len(seeds), desc=description, unit="run", disable=not progress, mininterval=0.5) as bar:
        outcome_of = partial(_outcome, task, failures)
        if n_jobs == 1 or stays_here(n_jobs):
            for seed in seeds:
                outcome = outcome_of(seed)
                bar.update()
                yield outcome
        else:
            with Job(outcome_of, description) as job:
                yield from job.results(seeds, n_jobs, bar)


def _outcome(task: Callable[[int], Any], failures: tuple[type[Exception], ...], seed: int) -> Outcome:
    """Return the outcome of one run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, error = None, None
        try:
            value = task(seed)
        except failures as failure:
            error = f"{type(failure).__name__}: {one_line(failure)}"
    return Outcome(value, error, tuple((str(w.message), w.category) for w in caught))
