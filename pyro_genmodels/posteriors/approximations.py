r"""Distributions over unconstrained coordinates that variational inference fits: Gaussians, and flows after a linear map."""

from __future__ import annotations

__all__ = ["Approximation", "FullRankGaussian", "LowRankGaussian", "MeanFieldGaussian", "Whitened"]

from abc import abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints


class Approximation(nn.Module):
    """Base class: a module over (dim,), without a context, whose call returns a Pyro distribution.

    Args:
        dim: number of coordinates.
    """

    context = None

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.event_shape = torch.Size([dim])

    @abstractmethod
    def forward(self) -> dist.TorchDistribution:
        """Return the distribution."""


class MeanFieldGaussian(Approximation):
    """Independent normal coordinates.

    The means are trained in deviations of the start, so that steps have one size in all units.

    Args:
        loc: means, (dim,).
        scale: standard deviations, (dim,).
    """

    start_loc: Tensor
    start_scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(len(loc))
        self.register_buffer("start_loc", loc.clone())
        self.register_buffer("start_scale", scale.clone())
        self.loc, self.log_scale = nn.Parameter(torch.zeros_like(loc)), nn.Parameter(torch.zeros_like(loc))

    def forward(self) -> dist.TorchDistribution:
        loc, scale = self.start_loc + self.start_scale * self.loc, self.start_scale * self.log_scale.exp()
        return dist.Normal(loc, scale, validate_args=False).to_event(1)


class FullRankGaussian(Approximation):
    """A multivariate normal distribution.

    Its Cholesky factor is that of the start times a lower triangular matrix, which is trained, so that steps have one size in
    all directions.

    Args:
        loc: means, (dim,).
        scale_tril: Cholesky factor of the covariance, (dim, dim).
    """

    start_loc: Tensor
    start_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(len(loc))
        self.register_buffer("start_loc", loc.clone())
        self.register_buffer("start_tril", scale_tril.clone())
        self.loc, self.log_diagonal = nn.Parameter(torch.zeros_like(loc)), nn.Parameter(torch.zeros_like(loc))
        self.lower = nn.Parameter(torch.zeros_like(scale_tril))

    def forward(self) -> dist.TorchDistribution:
        tril = self.start_tril @ (self.lower.tril(-1) + self.log_diagonal.exp().diag())
        return dist.MultivariateNormal(self.start_loc + self.start_tril @ self.loc, scale_tril=tril, validate_args=False)


class LowRankGaussian(Approximation):
    """A normal distribution whose covariance is diagonal plus a matrix of low rank.

    The means are trained in deviations of the start, so that steps have one size in all units.

    Args:
        loc: means, (dim,).
        scale: standard deviations of the diagonal part, (dim,).
        rank: rank of the other part.
    """

    start_loc: Tensor
    start_scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor, rank: int) -> None:
        super().__init__(len(loc))
        self.register_buffer("start_loc", loc.clone())
        self.register_buffer("start_scale", scale.clone())
        self.loc, self.log_scale = nn.Parameter(torch.zeros_like(loc)), nn.Parameter(torch.zeros_like(loc))
        self.factor = nn.Parameter(0.01 * torch.randn(len(loc), rank, dtype=loc.dtype, device=loc.device))

    def forward(self) -> dist.TorchDistribution:
        loc, scale = self.start_loc + self.start_scale * self.loc, self.start_scale * self.log_scale.exp()
        return dist.LowRankMultivariateNormal(loc, scale[:, None] * self.factor, scale.square(), validate_args=False)


class _LinearMap(Transform):
    """A lower triangular linear map with a constant term: matrix products over all points at once.

    Args:
        loc: constant term, (dim,).
        scale_tril: lower triangular matrix with a positive diagonal, (dim, dim).
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.loc, self.scale_tril = loc, scale_tril

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + x @ self.scale_tril.mT

    def _inverse(self, y: Tensor) -> Tensor:
        rows = (y - self.loc).reshape(-1, y.shape[-1])
        return torch.linalg.solve_triangular(self.scale_tril.mT, rows, upper=True, left=False).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scale_tril.diagonal().log().sum().expand(x.shape[:-1])


class Whitened(Approximation):
    """A family's distribution after a linear map, so that the family starts near the posterior.

    Args:
        family: module over (dim,) whose call returns a distribution near the standard normal one.
        loc: constant term of the map, (dim,).
        scale_tril: linear part of the map, lower triangular, (dim, dim).
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, family: nn.Module, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(len(loc))
        self.family = family.to(loc)
        self.register_buffer("loc", loc.clone())
        self.register_buffer("scale_tril", scale_tril.clone())

    def forward(self) -> dist.TorchDistribution:
        return dist.TransformedDistribution(self.family(), [_LinearMap(self.loc, self.scale_tril)], validate_args=False)

    def transport(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a point of the flow's base is mapped to, (..., dim), and the log of the map's determinant, (...).

        Args:
            e: point, (..., dim).
        """
        flow = self.family()
        to_family = flow.transform(flow.context).inv
        u = to_family(e)
        log_det = to_family.log_abs_det_jacobian(e, u) + self.scale_tril.diagonal().log().sum()
        return self.loc + u @ self.scale_tril.mT, log_det
