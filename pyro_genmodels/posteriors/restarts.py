"""Restarts: several fits of one method from different starts, whose disagreement tells what one fit hides."""

from __future__ import annotations

__all__ = ["Restarts"]

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.separate_fits import fit_from_seeds
from pyro_genmodels.posteriors.variational import MeanField
from pyro_genmodels.utils.errors import check_positive_int, type_with_article
from pyro_genmodels.utils.parallel import check_n_jobs


@dataclass(frozen=True, repr=False)
class Restarts(Method):
    """Several fits of a method from different starts. They are the chains of the posterior, so R-hat tells if they disagree.

    Attributes:
        method: the method, which starts from random points, such as ``MeanField()``.
        n: number of fits.
        num_samples: number of draws of each.
        n_jobs: number of processes; the extra ``parallel`` runs more than one, by joblib. Draws do not depend on it.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = posterior(model, y, method=Restarts(Laplace(num_starts=1), n=3, num_samples=200), progress=False)
        >>> fit.get_samples(group_by_chain=True)["loc"].shape  # each fit is a chain
        torch.Size([3, 200])
    """

    method: Method = field(default_factory=MeanField)
    n: int = 4
    num_samples: int = 1000
    n_jobs: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"Restarts wants a method such as MeanField(), an object, but found {type_with_article(self.method)}."
            )
        check_positive_int("Restarts", n=self.n, num_samples=self.num_samples)
        check_n_jobs("Restarts", self.n_jobs)

    def fit(self, problem: Problem) -> Posterior:
        fits = fit_from_seeds(self.method, problem, self.n, self._draws, n_jobs=self.n_jobs, description="restarts")
        restarted = DrawnPosterior(problem, self, torch.stack([z for z, _ in fits]))
        restarted.num_gradients = sum(num_gradients for _, num_gradients in fits)
        return restarted

    def _draws(self, fit: Posterior) -> tuple[Tensor, int]:
        """Return draws of a fit in unconstrained coordinates, and the number of its gradients."""
        return fit.problem.coordinates.unconstrain(fit.get_samples(self.num_samples)), fit.num_gradients
