r"""Moment matching: draws moved by an affine map, so that their importance weights for another target can be trusted.

Draws :math:`z_s` of a posterior :math:`p(z \mid y)`, with weights v, are to stand for the posterior without a row,
:math:`\pi(z) \propto p(z, y) / p(y_n \mid z)`. Where k-hat of the weights :math:`v_s \pi(z_s) / p(z_s, y)` is too large, the
draws are moved by :math:`T(z) = A z + b` to the weighted mean; or to the weighted mean and marginal variances; or to the
weighted mean and covariance. The weights of :math:`T(z_s)` are

.. math:: w_s = v_s\, \pi(T(z_s))\, |\det A| \, / \, p(z_s, y) .

A map that lowers k-hat is kept, and the simplest one is tried again from there. As the maps are made from the draws that they
move, the last weights are those of a mixture: half of the draws are moved and half are not, and all are weighted by

.. math:: w(x) \propto \frac{\pi(x)}{p(x, y) + p(T^{-1}(x), y) / |\det A|} ,

which also covers what the predictive density of the row needs. No model is fitted.

Paananen, Piironen, Bürkner and Vehtari, *Implicitly Adaptive Importance Sampling* (arXiv 1906.08850).
"""

from __future__ import annotations

__all__ = ["AffineMap", "MatchedDraws", "match_moments"]

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.utils.pareto import smooth_log_weights

MAX_MAPS = 30
"""Largest number of maps that are tried one after another."""


class AffineMap(NamedTuple):
    """The map z -> A z + b.

    Attributes:
        matrix: A, (dim, dim), lower triangular with a positive diagonal.
        shift: b, (dim,).

    Example:
        >>> double = AffineMap(2 * torch.eye(1), torch.ones(1))
        >>> double(torch.tensor([[1.0], [2.0]])), double.inverse(torch.tensor([[3.0]])), double.log_det
        (tensor([[3.],
                [5.]]), tensor([[1.]]), tensor(0.6931))
    """

    matrix: Tensor
    shift: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        """Return the images, (n, dim), of points, (n, dim)."""
        return z @ self.matrix.T + self.shift

    def inverse(self, x: Tensor) -> Tensor:
        """Return the points, (n, dim), whose images are x, (n, dim)."""
        return torch.linalg.solve_triangular(self.matrix, (x - self.shift).T, upper=False).T

    @property
    def log_det(self) -> Tensor:
        """Log of the determinant of A, ()."""
        return self.matrix.diagonal().log().sum()

    def after(self, first: AffineMap) -> AffineMap:
        """Return the map that applies another one first, and then this one."""
        return AffineMap(self.matrix @ first.matrix, self.shift + self.matrix @ first.shift)


class MatchedDraws(NamedTuple):
    """Draws that stand for a target.

    Attributes:
        z: draws, (draw, dim), of which every other one was moved.
        log_weights: their smoothed log weights, (draw,), not normalised.
        pareto_k: k-hat of the weights.
    """

    z: Tensor
    log_weights: Tensor
    pareto_k: float


def match_moments(
    z: Tensor,
    log_weights: Tensor,
    posterior: Callable[[Tensor], Tensor],
    target: Callable[[Tensor], Tensor],
    max_pareto_k: float,
) -> MatchedDraws | None:
    """Return draws that stand for a target, or None if no map lowers k-hat to the limit.

    Args:
        z: draws, (draw, dim), in unconstrained coordinates and float64.
        log_weights: log weights v with which they stand for the posterior, (draw,); zeros for draws of the posterior itself.
        posterior: log density of the posterior of points, (n, dim) to (n,), in nats, up to a constant.
        target: log density of the target, likewise.
        max_pareto_k: largest k-hat that is trusted.

    Example:
        >>> z = torch.special.ndtri(torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64))[:, None]
        >>> posterior, target = (torch.distributions.Normal(torch.tensor([x]).double(), 1.0) for x in (0.0, 4.0))
        >>> densities = [lambda x, p=p: p.log_prob(x).sum(1) for p in (posterior, target)]
        >>> found = match_moments(z, torch.zeros(1000).double(), *densities, max_pareto_k=0.7)
        >>> found.pareto_k < 0.7, (found.log_weights.softmax(0) @ found.z).round(decimals=1)
        (True, tensor([4.], dtype=torch.float64))
    """
    log_base, log_p = log_weights.log_softmax(0), posterior(z)
    moved = torch.arange(len(z), device=z.device) % 2 == 0
    mass = torch.where(moved, log_base[moved].logsumexp(0), log_base[~moved].logsumexp(0))

    def weigh(affine: AffineMap) -> tuple[Tensor, float]:
        smoothed, k = smooth_log_weights(_weights(log_base, target(affine(z)) - log_p + affine.log_det))
        return smoothed, float(k)

    affine = AffineMap(torch.eye(z.shape[1], dtype=z.dtype, device=z.device), torch.zeros_like(z[0]))
    log_weights, k = weigh(affine)
    steps = list(STEPS)
    for _ in range(MAX_MAPS):
        if not steps or not log_weights.max().isfinite():
            return None
        step = steps.pop(0)(affine(z), log_base.exp(), log_weights.softmax(0))
        if step is None or (found := weigh(step.after(affine)))[1] >= k:
            continue
        affine, (log_weights, k), steps = step.after(affine), found, list(STEPS)
        if k <= max_pareto_k:
            x = torch.where(moved[:, None], affine(z), z)
            mixture = torch.logaddexp(posterior(x), posterior(affine.inverse(x)) - affine.log_det)
            smoothed, k_of_mixture = smooth_log_weights(_weights(log_base - mass, target(x) - mixture))
            if k_of_mixture <= max_pareto_k:
                return MatchedDraws(x, smoothed, float(k_of_mixture))
    return None


def _weights(log_base: Tensor, log_ratio: Tensor) -> Tensor:
    """Return log weights; points at which a density is not a number have none."""
    return (log_base + log_ratio).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _moments(z: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, (dim,), and the covariance, (dim, dim), of weighted draws."""
    mean = weights @ z
    centred = z - mean
    return mean, (weights[:, None] * centred).T @ centred


def _with_mean(z: Tensor, base: Tensor, weights: Tensor) -> AffineMap:
    """Return the map that gives the draws the weighted mean."""
    return AffineMap(torch.eye(z.shape[1], dtype=z.dtype, device=z.device), weights @ z - base @ z)


def _with_variances(z: Tensor, base: Tensor, weights: Tensor) -> AffineMap | None:
    """Return the map that gives the draws the weighted mean and variances; None if a variance is zero."""
    (mean, covariance), (wanted_mean, wanted) = _moments(z, base), _moments(z, weights)
    scale = (wanted.diagonal() / covariance.diagonal()).sqrt()
    return _affine(scale.diag(), mean, wanted_mean) if bool((scale.isfinite() & (scale > 0)).all()) else None


def _with_covariance(z: Tensor, base: Tensor, weights: Tensor) -> AffineMap | None:
    """Return the map that gives the draws the weighted mean and covariance; None if one of the covariances is singular."""
    (mean, covariance), (wanted_mean, wanted) = _moments(z, base), _moments(z, weights)
    (root, failed), (wanted_root, wanted_failed) = map(torch.linalg.cholesky_ex, (covariance, wanted))
    if failed or wanted_failed:
        return None
    return _affine(torch.linalg.solve_triangular(root, wanted_root, upper=False, left=False), mean, wanted_mean)


def _affine(matrix: Tensor, mean: Tensor, wanted_mean: Tensor) -> AffineMap:
    return AffineMap(matrix, wanted_mean - matrix @ mean)


STEPS = (_with_mean, _with_variances, _with_covariance)
"""Maps that are tried, the simplest first."""
