r"""Training of an approximation over unconstrained coordinates, by the gradient of the log density alone.

A draw :math:`u = T_\phi(\epsilon)` of the approximation q has the gradient

.. math:: \nabla_\phi\, \mathrm{ELBO} = \mathbb{E}\Bigl[\bigl(\nabla_u \log p(y, u) - \nabla_u \log q_\phi(u)\bigr)^T
    \tfrac{\partial T_\phi(\epsilon)}{\partial \phi}\Bigr] :

the derivative of log q in its parameters, whose mean is zero, is left out ("sticking the landing"), so that the gradient has
no noise where q is the posterior. Of K draws with weights :math:`\tilde w_k` that sum to one, the importance-weighted bound has
the same gradient with the factor :math:`\tilde w_k^2` before each draw ("doubly reparametrised").

Roeder, Wu and Duvenaud (arXiv 1703.09194); Tucker et al. (arXiv 1810.04152); Agrawal and Domke (arXiv 2412.08824).
"""

from __future__ import annotations

__all__ = ["MAX_NORM", "maximise_bound", "warn_of_lost_draws"]

from collections.abc import Callable, Sequence
from copy import deepcopy
from math import cos, isfinite, log, pi
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.infer.compiled.functions import CapturedFunction, capture
from pyro_genmodels.infer.compiled.recorder import CaptureError
from pyro_genmodels.posteriors.approximations import Approximation
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.tensors import copied_like

STEP_SIZES = (0.1, 0.03, 0.01, 0.003, 0.001)
"""Step sizes that are tried."""
TRIAL = 0.05
"""Length of a trial of a step size, as a share of the steps."""
MAX_LOST = 0.5
"""Largest share of draws at points without a finite density that goes without a warning."""
WARMUP = 50
"""Number of steps in which the step size rises."""
BLOCK = 25
"""Number of steps after which the bound is looked at."""
MAX_RISE = 100.0
"""Nats by which the median step of a block may be worse than that of the best block; ten quartile ranges, if these are more."""
QUARTILES = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
"""Quantiles of the bounds of a block."""
MAX_NORM = 100.0
"""Norm of the gradient above which it is shortened."""


def maximise_bound(
    approximation: Approximation,
    density: BatchedDensity,
    *,
    num_steps: int,
    num_draws: int,
    step_size: float | None,
    num_weighted: int = 1,
    label: str = "",
    progress: bool,
) -> Tensor:
    """Train an approximation by Adam, and return minus the bound at each step, (steps,), in nats.

    The step size falls to zero as a cosine.

    Args:
        approximation: the approximation, changed in place.
        density: log density.
        num_steps: number of steps.
        num_draws: number of draws for each step.
        step_size: step size at the beginning; None tries those of `STEP_SIZES` and takes the one with the best bound.
        num_weighted: number K of draws that are weighted against each other; 1 for the evidence lower bound.
        label: what the progress bar says.
        progress: True for a progress bar.

    Warns:
        RuntimeWarning: if the density is not finite at many draws.
    """
    first = deepcopy(approximation.state_dict())
    num_trial = max(20, round(TRIAL * num_steps))
    sizes = STEP_SIZES if step_size is None else (step_size,)
    total = num_steps + (len(sizes) * num_trial if len(sizes) > 1 else 0)
    gradient = _BoundGradient(approximation, density, num_draws, num_weighted)
    with tqdm(total=total, desc=label, unit="step", disable=not progress, mininterval=0.5) as bar:
        if len(sizes) > 1:
            bounds = {}
            for size in sizes:
                approximation.load_state_dict(first)
                losses, _ = _train(gradient, num_trial, size, bar)
                half = losses[num_trial // 2 :]
                bounds[size] = float(half.mean()) if bool(half.isfinite().all()) else float("inf")
            sizes = (min(bounds, key=bounds.__getitem__),)
            approximation.load_state_dict(first)
        losses, num_lost = _train(gradient, num_steps, sizes[0], bar)
    warn_of_lost_draws(num_lost, num_steps * num_draws)
    return losses


def warn_of_lost_draws(num_lost: int, num_draws: int) -> None:
    """Warn if many of the draws of a training had no finite density.

    Args:
        num_lost: number of these.
        num_draws: number of all draws.
    """
    if num_lost > MAX_LOST * num_draws:
        warn_caller(f"The log density is not finite at {num_lost} of {num_draws} draws, which were left out.")


def _train(gradient: _BoundGradient, num_steps: int, step_size: float, bar: tqdm) -> tuple[Tensor, int]:
    """Make steps of Adam with a step size that rises at first and then falls to zero.

    A flow may be thrown far away by one step. Then it goes on from the last state that was good, with smaller steps.

    Returns:
        Minus the bound at each step, (steps,), and the number of draws without a finite density.
    """
    good, best, spread, since = deepcopy(gradient.approximation.state_dict()), float("inf"), 0.0, 0
    optimizer = torch.optim.Adam(gradient.parameters, lr=step_size, fused=True)
    losses, num_lost = [], 0
    for i in range(num_steps):
        loss, lost = gradient()
        losses.append(loss)
        num_lost += lost
        if lost < gradient.num_draws:
            nn.utils.clip_grad_norm_(gradient.parameters, MAX_NORM)
            rising = min(1.0, (i - since + 1) / WARMUP)
            optimizer.param_groups[0]["lr"] = step_size * rising * (1 + cos(pi * i / num_steps)) / 2
            optimizer.step()
        if (i - since) % BLOCK == BLOCK - 1:
            low, level, high = torch.tensor(losses[-BLOCK:], dtype=torch.float64).quantile(QUARTILES).tolist()
            if not isfinite(level) or level > best + max(MAX_RISE, 10 * spread):
                gradient.approximation.load_state_dict(good)
                optimizer, step_size, since = torch.optim.Adam(gradient.parameters, fused=True), step_size / 3, i + 1
            elif level <= best:
                good, best, spread = deepcopy(gradient.approximation.state_dict()), level, high - low
        bar.update()
        if i % 100 == 99:
            bar.set_postfix_str(f"ELBO {-sum(losses[-100:]) / 100:.5g}", refresh=False)
    return torch.tensor(losses), num_lost


class _BoundGradient:
    """The gradient of minus the bound, estimated by draws: a graph, if approximation and density can be captured as one.

    Attributes:
        parameters: parameters of the approximation that are trained.
        num_draws: number of draws.

    Args:
        approximation: the approximation.
        density: log density.
        num_draws: number of draws.
        num_weighted: see `maximise_bound`.
    """

    def __init__(self, approximation: Approximation, density: BatchedDensity, num_draws: int, num_weighted: int) -> None:
        self.approximation, self.density = approximation, density
        self.num_draws, self.num_weighted = num_draws, num_weighted
        self.parameters = [p for p in approximation.parameters() if p.requires_grad]
        self._captured = self._capture()

    def __call__(self) -> tuple[float, int]:
        """Set the gradients of the parameters, to zero if no draw has a finite density.

        Returns:
            Minus the bound in nats, and the number of draws without a finite density, which are left out.
        """
        results: tuple[Any, ...] | None = None
        if self._captured is not None:
            try:
                results = self._captured()
            except torch.linalg.LinAlgError:  # at some of the draws
                pass
            else:
                self.density.num_gradients += self.num_draws
        if results is None:
            results = self._compute(self.density)
        bound, num_finite, *gradients = results
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else copied_like(gradient, parameter)
        return -float(bound), self.num_draws - int(num_finite)

    def _capture(self) -> CapturedFunction | None:
        """Return the gradient as a graph, or None if it cannot be one."""
        with torch.no_grad():
            graph = self.density.graph(self.approximation().sample((self.num_draws,)))
        if graph is None:
            return None
        try:
            return capture(lambda: self._compute(graph), mode=self.density.mode)
        except (CaptureError, torch.linalg.LinAlgError):  # such as a transform that searches for its inverse
            return None

    def _compute(self, density: Callable[[Tensor], Sequence[Tensor]]) -> tuple[Any, ...]:
        """Return the bound, the number of draws with a finite density, and the gradients of minus the bound.

        Args:
            density: function that returns log densities (draws,) and their gradients (draws, dim).
        """
        with torch.enable_grad():
            z = self.approximation().rsample((self.num_draws,))
            log_p, score_p = density(z.detach())
            point = z.detach().requires_grad_()
            log_q = self.approximation().log_prob(point)
            (score_q,) = torch.autograd.grad(log_q.sum(), point)
            log_weight, direction = (log_p - log_q).detach(), score_p - score_q
            finite = log_weight.isfinite() & direction.isfinite().all(1)
            if self.num_weighted == 1:
                bound, weights = log_weight.where(finite, 0).sum() / finite.sum(), finite / finite.sum().clamp(min=1)
            else:
                groups = log_weight.masked_fill(~finite, -torch.inf).reshape(-1, self.num_weighted)
                bound = (groups.logsumexp(1) - log(self.num_weighted)).mean()
                weights = groups.softmax(1).nan_to_num().square().flatten() / len(groups)
            direction = torch.where(finite[:, None], direction, 0.0)
            surrogate = -(z * (direction * weights.to(z)[:, None])).sum()
            return bound, finite.sum(), *torch.autograd.grad(surrogate, self.parameters, allow_unused=True)
