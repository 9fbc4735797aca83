r"""Samplers of the probability flow: the ordinary differential equation whose solutions have the densities of a process.

On the clock :math:`\lambda = \log(\alpha / \sigma)`, with x scaled to :math:`\bar\alpha^2 + \bar\sigma^2 = 1`, and in
:math:`y = x / \alpha`,

.. math:: \frac{d\bar x}{d\lambda} = -\bar\alpha \bar\sigma\,(\bar\alpha\, \hat\varepsilon - \bar\sigma D), \qquad
    \frac{dy}{d(\sigma / \alpha)} = \hat\varepsilon \quad\text{(Heun)}, \qquad
    x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h}) D, \quad h = \lambda_s - \lambda_t \quad\text{(DPM-Solver++)}.

Neither right-hand side cancels at little noise, where x and D are nearly equal, if the denoiser gives
:math:`\hat\varepsilon` itself. Song et al. (arXiv 2011.13456); Karras et al. (arXiv 2206.00364); Lu et al., *DPM-Solver++*
(arXiv 2211.01095).
"""

from __future__ import annotations

__all__ = ["DPMSolver", "Heun", "ProbabilityFlow", "flow_velocity"]

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from pyro_genmodels.dynamics.ode import Dopri5, Solver, Velocity, integrate
from pyro_genmodels.dynamics.processes import Process, along
from pyro_genmodels.dynamics.reverse import CountedDenoiser, Denoise, GridSampler, OneStepSampler, ReverseSampler, to_estimate
from pyro_genmodels.dynamics.spacing import Spacing, UniformSigma, check_num_steps


@dataclass(frozen=True)
class Heun(OneStepSampler):
    """Heun's method for the probability flow, of second order, with optional noise at each step (EDM, arXiv 2206.00364).

    Attributes:
        num_steps: number of steps, of two evaluations of the network each.
        spacing: spacing of the times.
        churn: amount of noise added over all steps, in multiples of the present noise. 0 makes the sampler deterministic.
        churn_range: range of sigma / alpha in which noise is added.
        churn_scale: standard deviation of the noise before scaling. More than 1 makes up for detail that networks lose.
    """

    num_steps: int = 18
    spacing: Spacing = field(default_factory=UniformSigma)
    churn: float = 0.0
    churn_range: tuple[float, float] = (0.0, float("inf"))
    churn_scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.churn >= 0 and self.churn_scale > 0):
            raise ValueError(f"Heun wants churn >= 0 and churn_scale > 0, but found {self.churn} and {self.churn_scale}.")
        pair = isinstance(self.churn_range, tuple) and len(self.churn_range) == 2
        if not (pair and 0 <= self.churn_range[0] < self.churn_range[1]):
            raise ValueError(f"Heun wants a churn_range such as (0.05, 50.0), but found {self.churn_range!r}.")

    def step(self, denoise: CountedDenoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process = denoise.process
        high, low = ((-process.log_snr(time)).exp() for time in (t, s))  # sigma / alpha
        y = x / process.alpha(t)
        if self.churn:
            y, high, t = self._churned(process, y, high, t)
        slope = denoise(process.alpha(t) * y, t).noise
        guess = y + (low - high) * slope
        slope_at_guess = denoise(process.alpha(s) * guess, s).noise
        return process.alpha(s) * (y + (low - high) * (slope + slope_at_guess) / 2)

    def _churned(self, process: Process, y: Tensor, level: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return positions with added noise, their sigma / alpha, and their time."""
        highest = (-process.log_snr(torch.full_like(t, process.end))).exp()
        in_range = (level >= self.churn_range[0]) & (level <= self.churn_range[1])
        raised = torch.minimum(level * (1 + in_range * min(self.churn / self.num_steps, sqrt(2) - 1)), highest)
        added = (raised.square() - level.square()).clamp(min=0).sqrt() * self.churn_scale
        return y + added * torch.randn_like(y), raised, process.time(-raised.log())


@dataclass(frozen=True)
class DPMSolver(GridSampler):
    """DPM-Solver++(2M): exponential steps of second order that reuse the previous estimate (arXiv 2211.01095).

    Attributes:
        num_steps: number of steps, of one evaluation of the network each.
        spacing: spacing of the times.
    """

    num_steps: int = 20

    def trajectory(self, denoise: CountedDenoiser, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        process = denoise.process
        times = self.spacing(process, self.num_steps).to(x)
        log_snr, previous = process.log_snr(times), None
        for i, (t, s) in enumerate(pairwise(times)):
            data = denoise(x, t).data
            h, extrapolated = log_snr[i + 1] - log_snr[i], data
            if previous is not None:
                extrapolated = data + (data - previous) * h / (2 * (log_snr[i] - log_snr[i - 1]))
            x = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * torch.expm1(-h) * extrapolated
            previous = data
            yield s, x


@dataclass(frozen=True)
class ProbabilityFlow(ReverseSampler):
    """The probability flow, solved by an ODE solver such as one with adaptive steps (arXiv 2011.13456).

    Attributes:
        solver: ODE solver, with its tolerances.
        num_steps: number of parts of the trajectory that are solved one after another. It is raised for frames.
    """

    solver: Solver = field(default_factory=Dopri5)
    num_steps: int = 1

    def __post_init__(self) -> None:
        check_num_steps(self, self.num_steps)

    def with_frames(self, num_frames: int) -> ProbabilityFlow:
        return replace(self, num_steps=max(self.num_steps, num_frames - 1))

    def trajectory(self, denoise: CountedDenoiser, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        velocity = flow_velocity(denoise, denoise.process)
        clock = torch.linspace(*denoise.process.log_snr_range, self.num_steps + 1, dtype=torch.float64)
        scales, times = _scale_and_time(denoise.process, clock.to(x))
        scaled = x / scales[0]
        for i, (low, high) in enumerate(pairwise(clock.tolist()), 1):
            scaled = integrate(velocity, scaled, low, high, self.solver).x
            yield times[i], scaled * scales[i]


def flow_velocity(denoise: Denoise, process: Process) -> Velocity:
    r"""Return the velocity of the probability flow on the clock :math:`\lambda`, of x scaled to variance 1.

    Args:
        denoise: (x (n, ...), t) -> estimates of the data in x, or an `Estimate` of the data and the noise.
        process: process that adds the noise.

    Returns:
        Function of :math:`\lambda`, () or (n,), and x (n, ...).

    Example:
        >>> from pyro_genmodels.dynamics.processes import VariancePreserving
        >>> normal = lambda x, t: VariancePreserving().alpha(t) * x  # standard normal data do not move
        >>> flow_velocity(normal, VariancePreserving())(torch.tensor(0.0), torch.ones(1, 2)).abs().max() < 1e-6
        tensor(True)
    """

    def velocity(log_snr: Tensor, x: Tensor) -> Tensor:
        scale, t = _scale_and_time(process, log_snr)
        noisy = x * along(scale, x)
        data, noise = to_estimate(denoise(noisy, t), noisy, t, process)
        alpha, sigma = (along(torch.sigmoid(sign * 2 * log_snr).sqrt(), x) for sign in (1, -1))
        return alpha * sigma * (sigma * data - alpha * noise)

    return velocity


def _scale_and_time(process: Process, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root of alpha^2 + sigma^2, and the time, at a log signal-to-noise ratio."""
    t = process.time(log_snr)
    return torch.hypot(process.alpha(t), process.sigma(t)), t
