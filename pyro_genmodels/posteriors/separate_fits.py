"""Several fits of one method to one problem, each from a seed of its own, in this process, in several, or on a cluster."""

from __future__ import annotations

__all__ = ["fit_from_seeds"]

from collections.abc import Callable
from typing import Generic, TypeVar

from pyro_genmodels.posteriors.fits import Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.parallel import run_values, seeded, spawn_seeds
from pyro_genmodels.utils.rng import forked_rng

T = TypeVar("T")


def fit_from_seeds(
    method: Method, problem: Problem, number: int, result: Callable[[Posterior], T], *, n_jobs: int, description: str
) -> list[T]:
    """Fit a method several times, and return a result of each fit. They follow from torch's seed, whatever the processes.

    Args:
        method: the method.
        problem: the model with its arguments.
        number: number of fits.
        result: function of a fit, whose result pickles.
        n_jobs: number of processes, as joblib takes it.
        description: words beside the progress bar of several processes; one process shows the bars of the method.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace
        >>> problem = Problem(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)), progress=False)
        >>> draws = fit_from_seeds(Laplace(), problem, 2, lambda fit: fit.get_samples(5)["z"], n_jobs=1, description="fits")
        >>> len(draws), draws[0].equal(draws[1])
        (2, False)
    """
    shown, problem.progress = problem.progress, problem.progress and n_jobs == 1
    try:
        task = _FitFromSeed(method, problem, result)
        progress = shown and n_jobs != 1
        return run_values(task, spawn_seeds(None, number), n_jobs=n_jobs, progress=progress, description=description)
    finally:
        problem.progress = shown


class _FitFromSeed(Generic[T]):
    """A fit from a seed. All in a process share one captured log density.

    Args:
        method: the method.
        problem: the model with its arguments.
        result: function of a fit.
    """

    def __init__(self, method: Method, problem: Problem, result: Callable[[Posterior], T]) -> None:
        self.method, self.problem, self.result = method, problem, result

    def __call__(self, seed: int) -> T:
        with forked_rng():
            batched = self.problem.batched  # runs the model the first time, which draws random numbers
        batched.num_gradients = 0
        with seeded(seed):
            return self.result(self.method.fit(self.problem))
