r"""The importance-weighted bound of K draws, which rewards approximations that cover the posterior.

.. math:: \mathbb{E}\Bigl[\log \tfrac1K \sum_{k=1}^K \tfrac{p(y, u_k)}{q(u_k)}\Bigr] \le \log p(y), \qquad u_k \sim q.

Its best q is wider than that of the evidence lower bound, since a draw of a large weight costs more than several of small ones.
Draws of q are resampled with their smoothed weights.

Burda, Grosse and Salakhutdinov (arXiv 1509.00519); Domke and Sheldon (arXiv 1808.09034).
"""

from __future__ import annotations

__all__ = ["ImportanceWeighted"]

from dataclasses import dataclass, field

from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.variational import FlowGuide, Variational, start_approximation
from pyro_genmodels.utils.errors import check_positive_int, type_with_article


@dataclass(frozen=True, repr=False)
class ImportanceWeighted(Method):
    """An approximation that maximises the importance-weighted bound, with draws resampled by weights (arXiv 1808.09034).

    Attributes:
        guide: the approximation and how it is trained, such as ``FullRank()``.
        k: number of draws that are weighted against each other; it divides the guide's ``num_draws``.
        num_samples: number of draws that are returned, resampled from k times as many.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import MeanField, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> method = ImportanceWeighted(MeanField(num_steps=20, step_size=0.03), k=4, num_samples=200)
        >>> fit = posterior(model, y, method=method, progress=False)
        >>> fit.get_samples()["loc"].shape, fit.pareto_k < 0.7  # the weights correct for the guide
        (torch.Size([200]), True)
    """

    guide: Variational = field(default_factory=FlowGuide)
    k: int = 8
    num_samples: int = 1000

    def __post_init__(self) -> None:
        check_positive_int("ImportanceWeighted", k=self.k, num_samples=self.num_samples)
        if not isinstance(self.guide, Variational):
            raise TypeError(
                f"ImportanceWeighted wants a guide such as FlowGuide() or FullRank(), but found "
                f"{type_with_article(self.guide)}."
            )
        if self.guide.num_draws % self.k:
            raise ValueError(
                f"ImportanceWeighted wants a k that divides the guide's num_draws, but found k={self.k} and "
                f"num_draws={self.guide.num_draws}."
            )

    def fit(self, problem: Problem) -> Posterior:
        density = problem.batched
        approximation = start_approximation(self.guide, problem)
        self.guide.train(approximation, density, num_weighted=self.k, progress=problem.progress)
        approximation.eval().requires_grad_(False)
        distribution = approximation()
        z = distribution.sample((self.k * self.num_samples,))
        instead = "Take a more flexible guide, more steps, or NoUTurn()."
        log_q = distribution.log_prob(z)
        return DrawnPosterior.resampled(problem, self, z, log_q, self.num_samples, instead=instead)
