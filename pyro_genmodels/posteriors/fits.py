"""Posteriors: what `posterior` returns, and what `to_arviz`, `Predictive` and `compare_posteriors` take."""

from __future__ import annotations

__all__ = ["DrawnPosterior", "GuidePosterior", "Posterior"]

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_genmodels.infer.autoguide import AutoFamily
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.weighted import Psis, psis
from pyro_genmodels.utils.errors import check_positive_int, warn_caller

NUM_SAMPLES = 1000
"""Default number of draws of a guide."""


class Posterior(ABC):
    """A posterior of a model's latent variables, given the model's arguments.

    Args:
        problem: the model with its arguments.
        method: the method that made it.

    Attributes:
        model: the model.
        args: positional arguments of the model, its data among them.
        kwargs: keyword arguments of the model.
        method: the method that made it.
        seconds: seconds that it took, with captures and compilation.
        num_gradients: number of points at which the log density and its gradient were computed.
    """

    def __init__(self, problem: Problem, method: Any) -> None:
        self.problem, self.method = problem, method
        self.model, self.args, self.kwargs = problem.model, problem.args, problem.kwargs
        self.seconds, self.num_gradients = float("nan"), 0

    @abstractmethod
    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:  # noqa: FBT001, FBT002 - as in Pyro
        """Return draws of the continuous latent variables, all of one weight, (draw, ...) by name.

        Args:
            num_samples: number of draws. None returns all, or 1000 of a guide.
            group_by_chain: True for (chain, draw, ...). A guide has one chain.
        """

    def __repr__(self) -> str:
        return f"<{type(self).__name__} by {self.method}: {self.seconds:.3g} s, {self.num_gradients} gradients>"


class GuidePosterior(Posterior):
    """An approximation with a density: its draws are independent, and weights tell how good they are.

    Args:
        problem: the model with its arguments.
        method: the method that made it.
        approximation: module whose call returns a distribution over the unconstrained coordinates.
        losses: minus the evidence lower bound at each step, (steps,), in nats; None if there were no steps.

    Attributes:
        approximation: the module.
        losses: the losses.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, posterior
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> y = torch.tensor([0.5, -1.0, 2.0])
        >>> fit = posterior(model, y, method=Laplace(num_starts=1), progress=False)
        >>> fit.get_samples(200)["scale"].shape
        torch.Size([200])
        >>> fit.guide(y)["scale"] > 0  # a guide of Pyro
        tensor(True)
    """

    def __init__(self, problem: Problem, method: Any, approximation: nn.Module, losses: Tensor | None = None) -> None:
        super().__init__(problem, method)
        self.approximation, self.losses = approximation.eval().requires_grad_(False), losses

    @cached_property
    def guide(self) -> AutoFamily:
        """The approximation as a guide of the model, as `SVI`, `Predictive` and `to_arviz` take it.

        It has no discrete latent variables: the approximation is one with these summed out.
        """
        names = set(self.problem.coordinates.names)

        def hidden(site: Mapping[str, Any]) -> bool:
            return site["type"] == "sample" and not site["is_observed"] and site["name"] not in names

        model = poutine.block(self.model, hide_fn=hidden)
        return AutoFamily(model, lambda n: self.approximation, *self.args, **self.kwargs)

    @torch.no_grad()
    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:  # noqa: FBT001, FBT002 - as in Pyro
        num_samples = NUM_SAMPLES if num_samples is None else num_samples
        check_positive_int("get_samples", num_samples=num_samples)
        draws = self.problem.coordinates.constrain(self.approximation().sample((num_samples,)))
        return {name: x[None] for name, x in draws.items()} if group_by_chain else draws

    @torch.no_grad()
    def psis(self, num_samples: int = NUM_SAMPLES) -> Psis:
        """Return draws of the approximation with their smoothed importance weights.

        Args:
            num_samples: number of draws.
        """
        distribution = self.approximation()
        z = distribution.sample((num_samples,))
        log_p, _ = self.problem.batched(z)
        return psis(self.problem.coordinates.constrain(z), log_p, distribution.log_prob(z))


class DrawnPosterior(Posterior):
    """A posterior that is known by draws of equal weight, as of Markov chains or of resampled particles.

    Args:
        problem: the model with its arguments.
        method: the method that made it.
        z: draws, (chain, draw, dim), in unconstrained coordinates.
        stats: statistics of each draw by ArviZ's names, (chain, draw).
        pareto_k: k-hat of the importance weights that the draws were resampled with; NaN if there were none.
        log_evidence: estimate of the log evidence in nats with its standard error; None if there is none.

    Attributes:
        z: the draws.
        stats: the statistics.
        pareto_k: k-hat.
        log_evidence: the estimate.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> problem = Problem(lambda: pyro.sample("scale", dist.LogNormal(0.0, 1.0)))
        >>> fit = DrawnPosterior(problem, "draws of my own", torch.zeros(2, 50, 1))
        >>> fit.get_samples()["scale"].shape, fit.get_samples(group_by_chain=True)["scale"].shape
        (torch.Size([100]), torch.Size([2, 50]))
        >>> fit.get_samples(1)["scale"]  # in its support
        tensor([1.])
    """

    def __init__(
        self,
        problem: Problem,
        method: Any,
        z: Tensor,
        stats: Mapping[str, Tensor] | None = None,
        *,
        pareto_k: float = float("nan"),
        log_evidence: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(problem, method)
        self.z, self.stats, self.pareto_k, self.log_evidence = z, dict(stats or {}), pareto_k, log_evidence

    @classmethod
    def resampled(
        cls, problem: Problem, method: Any, z: Tensor, log_q: Tensor, num_samples: int, *, instead: str
    ) -> DrawnPosterior:
        """Return draws of an approximation, resampled by their smoothed importance weights, with the evidence.

        Args:
            problem: the model with its arguments.
            method: the method that made them.
            z: draws, (draw, dim), in unconstrained coordinates.
            log_q: their log densities under the approximation, (draw,), in nats.
            num_samples: number of draws of equal weight.
            instead: what to do if the weights do not correct for the approximation, for a warning.

        Warns:
            RuntimeWarning: if k-hat says that they do not.
        """
        weighted = psis({"z": z}, problem.batched(z)[0], log_q)
        if not weighted.is_reliable:
            warn_caller(
                f"{type(method).__name__}: k-hat of the weights is {weighted.pareto_k:.2f}, above 0.7, so that its draws do "
                f"not stand for the posterior. {instead}"
            )
        evidence = weighted.log_evidence
        fit = cls(
            problem,
            method,
            z[weighted.resampled_index(num_samples)][None],
            pareto_k=weighted.pareto_k,
            log_evidence=(float(evidence.value), float(evidence.std_error)),
        )
        fit.num_gradients = problem.batched.num_gradients
        return fit

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:  # noqa: FBT001, FBT002 - as in Pyro
        z = self.z
        if num_samples is not None:
            check_positive_int("get_samples", num_samples=num_samples)
            flat = z.flatten(0, 1)
            z = flat[torch.randint(len(flat), (num_samples,))][None]
        return self.problem.coordinates.constrain(z if group_by_chain else z.flatten(0, 1))
