r"""Pathfinder: normal approximations along the path of an optimiser, of which the one with the best evidence bound is taken.

L-BFGS climbs from a random point towards the mode. At each of its points :math:`z` the estimate :math:`\Sigma` of the inverse
Hessian, which its last steps give, makes a normal distribution

.. math:: q(\cdot) = \mathcal N\bigl(z + \Sigma \nabla \log p(z),\ \Sigma\bigr).

Far from the mode it covers too little, at the mode of a hierarchical model too little again. The one with the largest evidence
lower bound is near the bulk of the posterior. Draws from several paths are resampled with smoothed importance weights: the
posterior's density over that of the mixture of all paths.

Zhang, Carpenter, Gelman and Vehtari, *Pathfinder: Parallel Quasi-Newton Variational Inference* (arXiv 2108.03782). Gilbert and
Lemarechal, *Some Numerical Experiments with Variable-Storage Quasi-Newton Algorithms* (1989), for the diagonal.
"""

from __future__ import annotations

__all__ = ["Pathfinder", "find_start"]

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.dynamics.resampling import effective_size
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.pareto import MAX_PARETO_K, smooth_log_weights

MIN_COSINE = 1e-12
"""Smallest cosine of a step and the change of gradient that it makes, at which a curvature is learned, in any unit."""
MAX_TRIES = 5
"""Largest number of starts of each path."""
NUM_START_DRAWS = 1000
"""Number of draws of each path that a start of other methods is computed from."""
MIN_DRAWS_PER_COORDINATE = 10
"""Effective number of draws for each coordinate from which a covariance is estimated."""
MIN_HISTORY, MAX_HISTORY = 6, 50
"""Smallest and largest number of steps of the optimiser that an inverse Hessian is estimated from; between them two for each
coordinate. Six are too few where variables are strongly correlated: the path is long, and the correlations are missed."""


class QuasiNewtonNormal(NamedTuple):
    r"""A normal distribution with covariance :math:`D + B \Gamma B^T`, D diagonal, as L-BFGS gives it.

    Attributes:
        loc: mean, (dim,).
        root: square root of the diagonal, (dim,).
        basis: orthonormal columns, (dim, r), of :math:`D^{-1/2} B`.
        inner: Cholesky factor of the covariance in that basis, (r, r).
    """

    loc: Tensor
    root: Tensor
    basis: Tensor
    inner: Tensor

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Return draws, (n, dim), and their log densities, (n,), in nats."""
        noise = torch.randn(n, len(self.loc), dtype=self.loc.dtype)
        return self.loc + self.mapped(noise) * self.root, self.log_prob_of_noise(noise)

    def mapped(self, noise: Tensor) -> Tensor:
        """Return the linear map of standard normal numbers before the scale, (n, dim)."""
        part = noise @ self.basis
        return noise + (part @ self.inner.T - part) @ self.basis.T

    def log_prob_of_noise(self, noise: Tensor) -> Tensor:
        """Return the log density of the draw that standard normal numbers, (n, dim), are mapped to, (n,)."""
        log_det = self.root.log().sum() + self.inner.diagonal().log().sum()
        return -(noise.square().sum(-1) + noise.shape[-1] * log(2 * pi)) / 2 - log_det

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log densities of points, (n, dim), (n,), in nats."""
        white = (z - self.loc) / self.root
        part = white @ self.basis
        solved = torch.linalg.solve_triangular(self.inner, part.T, upper=False).T
        return self.log_prob_of_noise(white + (solved - part) @ self.basis.T)

    @classmethod
    def of_draws(cls, z: Tensor, weights: Tensor) -> QuasiNewtonNormal:
        """Return the normal distribution with the mean and covariance of weighted draws.

        Args:
            z: draws, (n, dim), in float64.
            weights: their weights, (n,), which sum to one.
        """
        loc = weights @ z
        centred = z - loc
        covariance = centred.T @ (centred * weights[:, None])
        root = covariance.diagonal().sqrt()
        correlations = covariance / (root[:, None] * root)
        return cls(loc, root, torch.eye(len(loc), dtype=z.dtype), torch.linalg.cholesky(correlations))

    def covariance(self) -> Tensor:
        """Return the covariance matrix, (dim, dim)."""
        factor = self.mapped(torch.eye(len(self.loc), dtype=self.loc.dtype)).T * self.root[:, None]
        return factor @ factor.T


@dataclass(frozen=True)
class Path:
    """Points of an optimiser with their gradients.

    Attributes:
        points: points in the order of the path, (points, dim), in float64.
        gradients: gradients of the log density, (points, dim).
    """

    points: Tensor
    gradients: Tensor


@dataclass(frozen=True, repr=False)
class Pathfinder(Method):
    """Pathfinder with several paths, whose draws are resampled by Pareto-smoothed importance weights (arXiv 2108.03782).

    Attributes:
        num_paths: number of paths, each from its own random point.
        num_samples: number of draws that are returned.
        max_steps: largest number of steps of the optimiser.
        num_elbo_samples: number of draws for each evidence bound along a path.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> fit = posterior(model, y, method=Pathfinder(num_paths=2, num_samples=500), progress=False)
        >>> fit.get_samples()["loc"].shape, fit.pareto_k < 0.7
        (torch.Size([500]), True)
    """

    num_paths: int = 8
    num_samples: int = 1000
    max_steps: int = 1000
    num_elbo_samples: int = 32

    def __post_init__(self) -> None:
        check_positive_int("Pathfinder", **vars(self))

    def fit(self, problem: Problem) -> Posterior:
        paths = self.normals(problem.batched, progress=problem.progress)
        z = torch.cat([normal.sample(self.num_samples)[0] for normal in paths]).to(problem.density.dtype)
        log_q = _mixture_log_prob(paths, z.double())
        instead = "Use them to start NoUTurn(), or take FlowGuide()."
        return DrawnPosterior.resampled(problem, self, z, log_q, self.num_samples, instead=instead)

    def normals(self, density: BatchedDensity, *, progress: bool = False) -> list[QuasiNewtonNormal]:
        """Return the best normal distribution of each path. Paths without one are replaced, while a few more are tried.

        Args:
            density: log density.
            progress: True for a progress bar.

        Raises:
            ValueError: if no path has one.
        """
        found: list[QuasiNewtonNormal] = []
        with tqdm(total=self.num_paths, desc="Pathfinder", unit="path", disable=not progress, mininterval=0.5) as bar:
            for _ in range(MAX_TRIES):
                for start in density.density.initial_points(self.num_paths - len(found)):
                    if (normal := self.best(density, start)) is not None:
                        found.append(normal)
                        bar.update()
                if len(found) == self.num_paths:
                    break
        if not found:
            raise ValueError(
                "Pathfinder found no normal approximation with a finite evidence bound along its paths. The log density is not "
                "finite around the points that they passed: constrain the variables, or reparametrise the model."
            )
        return found

    def best(self, density: BatchedDensity, start: Tensor) -> QuasiNewtonNormal | None:
        """Return the normal distribution with the largest evidence lower bound along the path from a point.

        Args:
            density: log density.
            start: first point, (dim,).

        Returns:
            The distribution, or None if none along the path has a finite bound, as where the optimiser makes no step.
        """
        path = climb(density, start, self.max_steps)
        best, best_elbo = None, -torch.inf
        for normal in normals_along(path):
            z, log_q = normal.sample(self.num_elbo_samples)
            log_p, _ = density(z.to(density.density.dtype))
            elbo = float((log_p.double() - log_q).mean())
            if elbo > best_elbo:
                best, best_elbo = normal, elbo
        return best


def find_start(density: BatchedDensity, num_paths: int = 4, *, progress: bool = False) -> QuasiNewtonNormal:
    """Return a normal approximation that short paths find: a start for other methods.

    It has the mean and covariance of draws of all paths, weighted by smoothed importance weights, if their k-hat is good and
    they are worth ten draws for each coordinate. Otherwise it is the approximation with the largest evidence lower bound.

    Args:
        density: log density.
        num_paths: number of paths.
        progress: True for a progress bar.

    Raises:
        ValueError: if there is none.
    """
    found = Pathfinder(num_paths=num_paths, num_elbo_samples=64).normals(density, progress=progress)
    z, log_p, log_q = _drawn(density, found, NUM_START_DRAWS)
    log_weight, k = smooth_log_weights(log_p - log_q)
    if k < MAX_PARETO_K and effective_size(log_weight) > MIN_DRAWS_PER_COORDINATE * z.shape[1]:
        return QuasiNewtonNormal.of_draws(z, log_weight.softmax(0))
    elbos = []
    for normal in found:
        z, log_p, log_q = _drawn(density, [normal], NUM_START_DRAWS)
        elbos.append(float((log_p - log_q).mean()))
    return found[int(np.argmax(elbos))]


def _drawn(density: BatchedDensity, normals: Sequence[QuasiNewtonNormal], number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return draws of a mixture of normal distributions, (n, dim), with the log density and that of the mixture, (n,).

    Args:
        density: log density.
        normals: normal distributions, with equal shares.
        number: number of draws of each.
    """
    z = torch.cat([normal.sample(number)[0] for normal in normals])
    log_p, _ = density(z.to(density.density.dtype))
    return z, log_p.double(), _mixture_log_prob(normals, z)


def _mixture_log_prob(normals: Sequence[QuasiNewtonNormal], z: Tensor) -> Tensor:
    """Return the log density of a mixture with equal shares at points, (n, dim), (n,), in nats."""
    return torch.stack([normal.log_prob(z) for normal in normals]).logsumexp(0) - log(len(normals))


def history_length(dim: int) -> int:
    """Return the number of steps of the optimiser that an inverse Hessian is estimated from.

    Args:
        dim: number of coordinates.
    """
    return min(max(2 * dim, MIN_HISTORY), MAX_HISTORY)


def climb(density: BatchedDensity, start: Tensor, max_steps: int) -> Path:
    """Return the path of L-BFGS towards a mode of the log density.

    Args:
        density: log density.
        start: first point, (dim,), of finite density.
        max_steps: largest number of steps.
    """
    evaluated: dict[bytes, np.ndarray] = {}
    points, gradients = [], []

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = density(torch.from_numpy(x)[None].to(start))
        value, gradient = float(value[0]), gradient[0].double().cpu().numpy()
        if not np.isfinite(value) or not np.isfinite(gradient).all():
            return np.inf, np.zeros_like(x)
        evaluated[x.tobytes()] = gradient
        return -value, -gradient

    def keep(x: np.ndarray) -> None:
        if x.tobytes() in evaluated:
            points.append(x.copy())
            gradients.append(evaluated[x.tobytes()])

    first = start.double().cpu().numpy().copy()
    negative(first)
    keep(first)
    options = {"maxiter": max_steps, "maxcor": history_length(len(first))}
    minimize(negative, first, jac=True, method="L-BFGS-B", callback=keep, options=options)
    return Path(torch.from_numpy(np.stack(points)), torch.from_numpy(np.stack(gradients)))


def normals_along(path: Path) -> list[QuasiNewtonNormal]:
    """Return the normal approximation at each point of a path but the first, where an inverse Hessian can be estimated."""
    diagonal, history = torch.ones_like(path.points[0]), history_length(path.points.shape[1])
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    found = []
    for i in range(1, len(path.points)):
        s, y = path.points[i] - path.points[i - 1], path.gradients[i - 1] - path.gradients[i]
        curvature = y @ s
        if curvature > MIN_COSINE * s.norm() * y.norm():
            diagonal = _next_diagonal(diagonal, s, y)
            steps, changes = [*steps, s][-history:], [*changes, y][-history:]
        if not steps:
            continue
        normal = _normal(path.points[i], path.gradients[i], diagonal, torch.stack(steps, 1), torch.stack(changes, 1))
        if normal is not None:
            found.append(normal)
    return found


def _next_diagonal(diagonal: Tensor, s: Tensor, y: Tensor) -> Tensor:
    """Return the diagonal estimate of the inverse Hessian after a step s with the change y of minus the gradient, (dim,)."""
    a, b, c = y @ (diagonal * y), y @ s, s @ (s / diagonal)
    inverse = a / (b * diagonal) + y.square() / b - a * (s / diagonal).square() / (b * c)
    return 1 / inverse.clamp(min=1e-300)


def _normal(z: Tensor, gradient: Tensor, diagonal: Tensor, s: Tensor, y: Tensor) -> QuasiNewtonNormal | None:
    """Return the normal approximation at a point, or None where the estimate is not positive definite.

    Args:
        z: the point, (dim,).
        gradient: gradient of the log density there, (dim,).
        diagonal: diagonal estimate of the inverse Hessian, (dim,).
        s: last steps, (dim, history).
        y: changes of minus the gradient in these, (dim, history).
    """
    products = s.T @ y
    upper = products.triu()
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=z.dtype), upper=True)
    corner = inverse.T @ (products.diagonal().diag() + y.T @ (diagonal[:, None] * y)) @ inverse
    gamma = torch.cat([torch.cat([torch.zeros_like(corner), -inverse], 1), torch.cat([-inverse.T, corner], 1)])
    root = diagonal.sqrt()
    basis, triangle = torch.linalg.qr(torch.cat([root[:, None] * y, s / root[:, None]], 1))
    inner, info = torch.linalg.cholesky_ex(torch.eye(basis.shape[1], dtype=z.dtype) + triangle @ gamma @ triangle.T)
    if info or not inner.isfinite().all():
        return None
    normal = QuasiNewtonNormal(z, root, basis, inner)
    white = gradient * root
    part = white @ basis
    ascent = (white + (part @ inner @ inner.T - part) @ basis.T) * root
    return normal._replace(loc=z + ascent)
