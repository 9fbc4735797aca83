"""Posteriors by Markov chains."""

from __future__ import annotations

__all__ = ["NoUTurn"]

from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_uniform

from pyro_genmodels.infer.compiled import CompiledNUTS
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.posteriors.fits import DrawnPosterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem


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

    def fit(self, problem: Problem) -> DrawnPosterior:
        start = self.init.fit(problem) if isinstance(self.init, Method) else None
        options = vars(self) if start is None else vars(self) | {"init": start}
        nuts = CompiledNUTS(problem.model, progress=problem.progress, **options)
        plain = self.mode is None  # then the problem's own density, which is captured once however often it is fitted
        nuts.run_on(problem.density if plain else LogDensity(problem.model, problem.args, problem.kwargs, self.mode))
        fit = DrawnPosterior(
            problem,
            self,
            problem.density.unconstrain(nuts.get_samples(group_by_chain=True)),
            {name: torch.as_tensor(values) for name, values in nuts.statistics.items()},
        )
        fit.num_gradients = int(nuts.statistics["n_steps"].sum() + nuts.warmup_statistics["n_steps"].sum())
        if start is not None:
            fit.num_gradients += start.num_gradients
        return fit
