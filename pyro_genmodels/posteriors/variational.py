r"""Variational inference over unconstrained coordinates, by the gradient of the log density alone.

A draw :math:`u = T_\phi(\epsilon)` of the approximation q has the gradient

.. math:: \nabla_\phi\, \mathrm{ELBO} = \mathbb{E}\Bigl[\bigl(\nabla_u \log p(y, u) - \nabla_u \log q_\phi(u)\bigr)^T
    \tfrac{\partial T_\phi(\epsilon)}{\partial \phi}\Bigr] :

the derivative of log q in its parameters, whose mean is zero, is left out ("sticking the landing"), so that the gradient has
no noise where q is the posterior. Of K draws with weights :math:`\tilde w_k` that sum to one, the importance-weighted bound has
the same gradient with the factor :math:`\tilde w_k^2` before each draw ("doubly reparametrised").

Roeder, Wu and Duvenaud (arXiv 1703.09194); Tucker et al. (arXiv 1810.04152); Agrawal and Domke (arXiv 2412.08824).
"""

from __future__ import annotations

__all__ = ["FlowGuide", "FullRank", "LowRank", "MeanField"]

from abc import abstractmethod
from copy import deepcopy
from dataclasses import dataclass, field
from math import cos, log, pi
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

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
from pyro_genmodels.posteriors.fits import GuidePosterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.pathfinder import QuasiNewtonNormal, find_start
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import check_positive_int, warn_caller

STEP_SIZES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Step sizes that are tried."""
TRIAL = 0.05
"""Length of a trial of a step size, as a share of the steps."""
MAX_LOST = 0.5
"""Largest share of draws at points without a finite density that a step is made with."""


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

    def fit(self, problem: Problem) -> GuidePosterior:
        density = problem.batched
        approximation = start_approximation(self, problem)
        losses = maximise_bound(approximation, density, self, progress=problem.progress)
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
    return method.build(find_start(problem.batched), like).to(like)


def maximise_bound(
    approximation: Approximation, density: BatchedDensity, method: Variational, *, num_weighted: int = 1, progress: bool
) -> Tensor:
    """Train an approximation, and return minus the bound at each step, (steps,), in nats.

    Args:
        approximation: the approximation, changed in place.
        density: log density.
        method: its options.
        num_weighted: number K of draws that are weighted against each other; 1 for the evidence lower bound.
        progress: True for a progress bar.

    Warns:
        RuntimeWarning: if the density is not finite at many draws.
    """
    first = deepcopy(approximation.state_dict())
    num_trial = max(20, round(TRIAL * method.num_steps))
    sizes = STEP_SIZES if method.step_size is None else (method.step_size,)
    total = method.num_steps + (len(sizes) * num_trial if len(sizes) > 1 else 0)
    with tqdm(total=total, desc=type(method).__name__, unit="step", disable=not progress, mininterval=0.5) as bar:
        if len(sizes) > 1:
            bounds = {}
            for size in sizes:
                approximation.load_state_dict(first)
                losses, _ = _train(approximation, density, num_trial, method.num_draws, size, num_weighted, bar)
                half = losses[num_trial // 2 :]
                bounds[size] = float(half.mean()) if bool(half.isfinite().all()) else float("inf")
            sizes = (min(bounds, key=bounds.__getitem__),)
            approximation.load_state_dict(first)
        losses, num_lost = _train(approximation, density, method.num_steps, method.num_draws, sizes[0], num_weighted, bar)
    if num_lost > MAX_LOST * method.num_steps * method.num_draws:
        warn_caller(
            f"The log density is not finite at {num_lost} of {method.num_steps * method.num_draws} draws, which were left out."
        )
    return losses


def _train(
    approximation: Approximation,
    density: BatchedDensity,
    num_steps: int,
    num_draws: int,
    step_size: float,
    num_weighted: int,
    bar: tqdm,
) -> tuple[Tensor, int]:
    """Make steps of Adam with a step size that falls to zero.

    Returns:
        Minus the bound at each step, (steps,), and the number of draws without a finite density.
    """
    parameters = [p for p in approximation.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=step_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + cos(pi * i / num_steps)) / 2)
    losses, num_lost = [], 0
    for i in range(num_steps):
        optimizer.zero_grad()
        loss, lost = _backward(approximation, density, num_draws, num_weighted)
        losses.append(loss)
        num_lost += lost
        nn.utils.clip_grad_norm_(parameters, 100.0)
        optimizer.step()
        schedule.step()
        bar.update()
        if i % 100 == 99:
            bar.set_postfix_str(f"ELBO {-sum(losses[-100:]) / 100:.5g}", refresh=False)
    return torch.tensor(losses), num_lost


def _backward(approximation: Approximation, density: BatchedDensity, num_draws: int, num_weighted: int) -> tuple[float, int]:
    """Add the gradient of minus the bound, estimated by draws, to that of the parameters.

    Returns:
        Minus the bound in nats, and the number of draws without a finite density, which are left out.
    """
    z = approximation().rsample((num_draws,))
    log_p, score_p = density(z)
    point = z.detach().requires_grad_()
    log_q = approximation().log_prob(point)
    (score_q,) = torch.autograd.grad(log_q.sum(), point)
    log_weight, direction = (log_p - log_q).detach(), score_p - score_q
    finite = log_weight.isfinite() & direction.isfinite().all(1)
    lost = num_draws - int(finite.sum())
    if lost == num_draws:
        return float("nan"), lost
    if num_weighted == 1:
        bound, weights = log_weight[finite].mean(), finite / finite.sum()
    else:
        groups = log_weight.masked_fill(~finite, -torch.inf).reshape(-1, num_weighted)
        bound = (groups.logsumexp(1) - log(num_weighted)).mean()
        weights = groups.softmax(1).nan_to_num().square().flatten() / len(groups)
    direction = torch.where(finite[:, None], direction, 0.0)
    (-(z * (direction * weights.to(z)[:, None])).sum()).backward()
    return -float(bound), lost
