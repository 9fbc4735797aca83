r"""Laplace's approximation: a normal distribution around a mode of the log density over unconstrained coordinates.

.. math:: q = \mathcal N\bigl(u^*,\ (-\nabla^2 \log p(y, u^*))^{-1}\bigr), \qquad u^* = \operatorname{argmax}_u \log p(y, u).

Tierney and Kadane, *Accurate Approximations for Posterior Moments and Marginal Densities* (1986).
"""

from __future__ import annotations

__all__ = ["Laplace"]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.posteriors.approximations import FullRankGaussian
from pyro_genmodels.posteriors.fits import GuidePosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.pathfinder import climb
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import check_positive_int

MAX_GRADIENT = 0.1
"""Largest norm of the gradient, in standard deviations of the approximation, at which a point is taken for a mode."""


@dataclass(frozen=True, repr=False)
class Laplace(Method):
    """A normal distribution around the highest of the modes that several climbs find.

    Attributes:
        num_starts: number of climbs, each from its own random point.
        max_steps: largest number of steps of the optimiser.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = posterior(model, y, method=Laplace(), progress=False)
        >>> fit.approximation().mean  # that of a normal posterior is exact: 6 / 3.01
        tensor([1.9934])
    """

    num_starts: int = 4
    max_steps: int = 1000

    def __post_init__(self) -> None:
        check_positive_int("Laplace", num_starts=self.num_starts, max_steps=self.max_steps)

    def fit(self, problem: Problem) -> Posterior:
        density = problem.batched
        starts = problem.density.initial_points(self.num_starts)
        ends = torch.stack([climb(density, start, self.max_steps).points[-1] for start in starts]).to(starts)
        values, gradients = density(ends)
        highest = int(values.nan_to_num(nan=-torch.inf).argmax())
        mode, gradient = ends[highest], gradients[highest].double()
        precision = -hessian(problem, mode)
        root, info = torch.linalg.cholesky_ex(precision)
        white = torch.linalg.solve_triangular(root, gradient[:, None], upper=False).norm() if not info else torch.inf
        if info or not white < MAX_GRADIENT:
            raise ValueError(
                "Laplace found no mode: where its climb ended the density is not curved downwards in all directions, or still "
                f"rises (by {float(white):.2g} standard deviations). Such a density grows without bound, as that of a "
                "hierarchical model does where a scale goes to 0, or is flat. Reparametrise the model, or take Pathfinder() or "
                "FlowGuide()."
            )
        scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(root))
        fit = GuidePosterior(problem, self, FullRankGaussian(mode, scale_tril.to(mode)))
        fit.num_gradients = density.num_gradients + 2 * len(mode)
        return fit


def hessian(problem: Problem, z: Tensor) -> Tensor:
    """Return the matrix of second derivatives of the log density at a point, (dim, dim), in float64.

    It is that of central differences of the gradient, of fourth order, with steps of the scale of each coordinate.

    Args:
        problem: the problem.
        z: point, (dim,).
    """
    eps = torch.finfo(min((problem.density.dtype, z.dtype), key=lambda d: -torch.finfo(d).eps)).eps
    steps = eps ** (1 / 5) * (1 + z.abs())
    shifts = torch.diag(steps)
    points = torch.cat([z + k * shifts for k in (-2, -1, 1, 2)])
    _, gradients = problem.batched(points)
    a, b, c, d = gradients.double().reshape(4, len(z), len(z))
    matrix = (a - 8 * b + 8 * c - d) / (12 * steps.double()[:, None])
    return (matrix + matrix.T) / 2
