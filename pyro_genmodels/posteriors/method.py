"""Methods: objects that make a posterior of a problem."""

from __future__ import annotations

__all__ = ["Method"]

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from pyro_genmodels.posteriors.fits import Posterior
from pyro_genmodels.posteriors.problem import Problem


@dataclass(frozen=True, repr=False)
class Method(ABC):
    """Base class of ways to a posterior. Its fields are options, all with defaults.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import DrawnPosterior, posterior
        >>> @dataclass(frozen=True, repr=False)
        ... class PointMass(Method):
        ...     '''All draws at one point of the unconstrained coordinates.'''
        ...     value: float = 0.0
        ...     def fit(self, problem):
        ...         return DrawnPosterior(problem, self, torch.full((1, 100, problem.density.dim), self.value))
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale), obs=torch.tensor(1.0))
        >>> fit = posterior(model, method=PointMass(1.0), progress=False)
        >>> fit.method, fit.get_samples()["scale"].mean()
        (PointMass(value=1.0), tensor(2.7183))
    """

    def __repr__(self) -> str:
        """Return the call that builds it, without options that have their default."""
        changed = [f"{f.name}={value!r}" for f in fields(self) if (value := getattr(self, f.name)) is not f.default]
        return f"{type(self).__name__}({', '.join(changed)})"

    @abstractmethod
    def fit(self, problem: Problem) -> Posterior:
        """Return the posterior of a problem.

        Args:
            problem: a model with its arguments.
        """
