"""Methods: objects that make a posterior of a problem."""

from __future__ import annotations

__all__ = ["Method"]

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

from pyro_genmodels.posteriors.fits import Posterior
from pyro_genmodels.posteriors.problem import Problem


@dataclass(frozen=True, repr=False)
class Method(ABC):
    """Base class of ways to a posterior. Its fields are options, all with defaults."""

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
