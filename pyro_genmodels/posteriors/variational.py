"""Methods that fit an approximation over unconstrained coordinates by variational inference: Gaussians and flows."""

from __future__ import annotations

__all__ = ["FlowGuide", "FullRank", "LowRank", "MeanField"]

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.families import Flow
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.posteriors.approximations import (
    Approximation,
    FullRankGaussian,
    LowRankGaussian,
    MeanFieldGaussian,
    Whitened,
)
from pyro_genmodels.posteriors.autoguides import default_transform
from pyro_genmodels.posteriors.bound import maximise_bound
from pyro_genmodels.posteriors.fits import GuidePosterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.pathfinder import QuasiNewtonNormal, find_start
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import check_positive_int


@dataclass(frozen=True, repr=False)
class Variational(Method):
    """Base class of methods that maximise the evidence lower bound of an approximation.

    Attributes:
        num_steps: number of steps of Adam.
        num_draws: number of draws for each step.
        step_size: step size at the beginning, from which it falls to zero as a cosine; None tries five from 0.001 to 0.1.
    """

    num_steps: int = field(default=2000, kw_only=True)
    num_draws: int = field(default=64, kw_only=True)
    step_size: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_positive_int(type(self).__name__, num_steps=self.num_steps, num_draws=self.num_draws)
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"{type(self).__name__} wants a positive step_size, but found {self.step_size!r}.")

    @abstractmethod
    def build(self, start: QuasiNewtonNormal, like: Tensor) -> Approximation:
        """Return the approximation before the first step.

        Args:
            start: a normal approximation of the posterior.
            like: tensor of the dtype and device of the coordinates.
        """

    def train(self, approximation: Approximation, density: BatchedDensity, *, num_weighted: int = 1, progress: bool) -> Tensor:
        """Train an approximation in place, and return minus the bound at each step, (steps,), in nats.

        Args:
            approximation: see `maximise_bound`.
            density: see `maximise_bound`.
            num_weighted: see `maximise_bound`.
            progress: True for a progress bar.
        """
        return maximise_bound(
            approximation,
            density,
            num_steps=self.num_steps,
            num_draws=self.num_draws,
            step_size=self.step_size,
            num_weighted=num_weighted,
            label=type(self).__name__,
            progress=progress,
        )

    def fit(self, problem: Problem) -> GuidePosterior:
        density = problem.batched
        approximation = start_approximation(self, problem)
        losses = self.train(approximation, density, progress=problem.progress)
        fit = GuidePosterior(problem, self, approximation, losses)
        fit.num_gradients = density.num_gradients
        return fit


@dataclass(frozen=True, repr=False)
class MeanField(Variational):
    """Independent normal distributions of all unconstrained coordinates, by variational inference (arXiv 1603.00788).

    It is fast, and its standard deviations are too small where variables depend on each other.

    Attributes:
        num_steps: see `Variational`.
        num_draws: see `Variational`.
        step_size: see `Variational`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> fit = posterior(model, torch.tensor([1.0, 2.0, 3.0]), method=MeanField(num_steps=20), progress=False)
        >>> fit.get_samples(500)["loc"].shape
        torch.Size([500])
    """

    def build(self, start: QuasiNewtonNormal, like: Tensor) -> Approximation:
        return MeanFieldGaussian(start.loc.to(like), start.covariance().diagonal().sqrt().to(like))


@dataclass(frozen=True, repr=False)
class FullRank(Variational):
    """A multivariate normal distribution over all unconstrained coordinates, by variational inference (arXiv 1603.00788).

    Attributes:
        num_steps: see `Variational`.
        num_draws: see `Variational`.
        step_size: see `Variational`.

    Example:
        >>> method = FullRank(num_steps=500)  # for posterior(model, *args, method=method)
        >>> method
        FullRank(num_steps=500)
    """

    def build(self, start: QuasiNewtonNormal, like: Tensor) -> Approximation:
        return FullRankGaussian(start.loc.to(like), torch.linalg.cholesky(start.covariance()).to(like))


@dataclass(frozen=True, repr=False)
class LowRank(Variational):
    """A normal distribution whose covariance is diagonal plus a matrix of low rank: correlations for many coordinates.

    Attributes:
        rank: rank of that matrix.
        num_steps: see `Variational`.
        num_draws: see `Variational`.
        step_size: see `Variational`.

    Example:
        >>> method = LowRank(3, num_steps=500)  # for posterior(model, *args, method=method)
        >>> method
        LowRank(num_steps=500, rank=3)
    """

    rank: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("LowRank", rank=self.rank)

    def build(self, start: QuasiNewtonNormal, like: Tensor) -> Approximation:
        return LowRankGaussian(
            start.loc.to(like), start.covariance().diagonal().sqrt().to(like), min(self.rank, len(start.loc))
        )


@dataclass(frozen=True, repr=False)
class FlowGuide(Variational):
    """A normalizing flow over all unconstrained coordinates, by variational inference (arXiv 2412.08824).

    The flow follows a linear map that a normal approximation of the posterior gives, so that it starts near it.

    Attributes:
        transform: layers of the flow, such as ``RealNVP(transforms=6)``; by default eight affine coupling layers.
        num_steps: see `Variational`.
        num_draws: see `Variational`.
        step_size: see `Variational`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> from pyro_genmodels import RealNVP
        >>> method = FlowGuide(transform=RealNVP(transforms=2), num_steps=20, step_size=0.01)
        >>> fit = posterior(model, torch.tensor([1.0, 2.0, 3.0]), method=method, progress=False)
        >>> fit.get_samples(500)["loc"].shape
        torch.Size([500])
    """

    transform: Any = None
    num_draws: int = field(default=256, kw_only=True)

    def build(self, start: QuasiNewtonNormal, like: Tensor) -> Approximation:
        n = len(start.loc)
        flow = Flow((n,), transform=default_transform(n) if self.transform is None else self.transform, standardize=False)
        return Whitened(flow, start.loc.to(like), torch.linalg.cholesky(start.covariance()).to(like))


def start_approximation(method: Variational, problem: Problem) -> Approximation:
    """Return the approximation of a method before its first step, near the posterior.

    Args:
        method: the method.
        problem: a model with its arguments.
    """
    like = torch.zeros(0, dtype=problem.density.dtype, device=problem.density.device)
    return method.build(find_start(problem.batched, progress=problem.progress), like).to(like)
