"""Posteriors by Markov chains."""

from __future__ import annotations

__all__ = ["NoUTurn"]

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from pyro.infer.autoguide.initialization import init_to_uniform
from torch import Tensor

from pyro_genmodels.infer.compiled import CompiledNUTS
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.separate_fits import fit_from_seeds
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.parallel import check_n_jobs

Chains = tuple[Tensor, dict[str, Tensor], int]
"""Draws (chain, draw, dim) in unconstrained coordinates, their statistics by name, and the number of gradients."""


@dataclass(frozen=True, repr=False)
class NoUTurn(Method):
    """The No-U-Turn sampler over a captured log density, `CompiledNUTS` (Hoffman and Gelman, arXiv 1111.4246).

    Attributes:
        num_chains: number of chains.
        num_warmup: number of draws of each chain during which step size and mass matrix adapt.
        num_samples: number of draws of each chain after these.
        target_accept_prob: mean acceptance probability that the step size adapts to.
        max_tree_depth: largest number of doublings of a trajectory.
        low_rank: True for a mass matrix that also adapts to some correlations.
        init: initial values: a strategy of Pyro's; values by name; a fit; or a method, such as ``Pathfinder()``, at whose draws
            the chains start, where chains from random points do not come to the posterior.
        mode: how the model is captured; None chooses.
        n_jobs: number of processes, as joblib takes it, which each capture the model anew: for chains on a cluster, or where
            processes cannot be forked. Draws do not depend on the number. It needs the extra ``parallel``. None forks processes
            of this machine, as `CompiledNUTS` does.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> method = NoUTurn(num_chains=2, num_warmup=100, num_samples=100, mode=Captured())
        >>> fit = posterior(model, y, method=method, progress=False)
        >>> fit.get_samples(group_by_chain=True)["loc"].shape, "diverging" in fit.stats
        (torch.Size([2, 100]), True)
    """

    num_chains: int = 4
    num_warmup: int = 500
    num_samples: int = 1000
    target_accept_prob: float = 0.8
    max_tree_depth: int = 10
    low_rank: bool = False
    init: Any = init_to_uniform
    mode: Mode | None = None
    n_jobs: int | None = None

    def __post_init__(self) -> None:
        if self.n_jobs is not None:
            check_positive_int("NoUTurn", num_chains=self.num_chains)
            check_n_jobs("NoUTurn", self.n_jobs)

    def fit(self, problem: Problem) -> DrawnPosterior:
        start = self.init.fit(problem) if isinstance(self.init, Method) else None
        method = self if start is None else replace(self, init=start)
        z, stats, num_gradients = method._run(problem) if self.n_jobs is None else method._run_apart(problem, self.n_jobs)
        fit = DrawnPosterior(problem, self, z, stats)
        fit.num_gradients = num_gradients + (0 if start is None else start.num_gradients)
        return fit

    def _run(self, problem: Problem) -> Chains:
        """Run all chains on this machine."""
        options = {name: value for name, value in vars(self).items() if name != "n_jobs"}
        nuts = CompiledNUTS(problem.model, progress=problem.progress, **options)
        plain = self.mode is None  # then the problem's own density, which is captured once however often it is fitted
        nuts.run_on(problem.density if plain else LogDensity(problem.model, problem.args, problem.kwargs, self.mode))
        z = problem.density.unconstrain(nuts.get_samples(group_by_chain=True))
        num_gradients = int(nuts.statistics["n_steps"].sum() + nuts.warmup_statistics["n_steps"].sum())
        return z, {name: _as_tensor(values) for name, values in nuts.statistics.items()}, num_gradients

    def _run_apart(self, problem: Problem, n_jobs: int) -> Chains:
        """Run each chain from its own seed, by joblib."""
        alone = replace(self, num_chains=1, n_jobs=None)
        chains = fit_from_seeds(alone, problem, self.num_chains, _chains_of, n_jobs=n_jobs, description="chains")
        z, stats, num_gradients = zip(*chains, strict=True)
        return torch.cat(z), {name: torch.cat([part[name] for part in stats]) for name in stats[0]}, sum(num_gradients)


def _as_tensor(values: np.ndarray) -> Tensor:
    """Return values as a tensor, unsigned integers as signed ones: torch cannot unpickle the others."""
    return torch.as_tensor(values.astype(np.int64) if values.dtype.kind == "u" else values)


def _chains_of(fit: Posterior) -> Chains:
    return cast(DrawnPosterior, fit).z, cast(DrawnPosterior, fit).stats, fit.num_gradients
