r"""Reverse diffusion: from noise to data, by what is known of the data under noise.

All that is asked is the *denoiser* :math:`D(x, t) = \mathbb{E}[x_0 \mid x_t = x]` of a process (see
`pyro_genmodels.dynamics.processes`), which is a score in other words:

.. math:: \hat\varepsilon = \frac{x - \alpha D}{\sigma}, \qquad \nabla_x \log p_t(x) = -\frac{\hat\varepsilon}{\sigma} .

A choice of sampler walks from time t to an earlier time s, along times between the end and the start of the process:

.. math:: dx = [f x - g^2 \nabla \log p_t]\,dt + g\,d\bar w \quad\text{(Euler-Maruyama)}, \qquad
    x_s = \alpha_s D + \sqrt{\sigma_s^2 - c^2}\,\hat\varepsilon + c z \quad\text{(DDIM; ancestral with the largest c)}.

Ho et al. (arXiv 2006.11239); Song et al. (arXiv 2010.02502, 2011.13456); Karras et al. (arXiv 2206.00364); Lu et al.,
*DPM-Solver++* (arXiv 2211.01095).
"""

from __future__ import annotations

__all__ = [
    "DDIM", "Ancestral", "DPMSolver", "Denoised", "EulerMaruyama", "Heun", "PredictorCorrector", "ProbabilityFlow",
    "ReverseSampler", "Trajectory", "flow_velocity", "prior_scale", "reverse",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.dynamics.ode import Dopri5, Solver, integrate
from pyro_genmodels.dynamics.processes import Process, along
from pyro_genmodels.dynamics.spacing import Spacing, UniformLogSNR, UniformSigma

PROGRESS_DELAY = 5.0
"""Seconds after which a walk shows its progress, where there is a terminal."""


@dataclass(frozen=True)
class Trajectory:
    """Where a walk from noise to data came out.

    Attributes:
        x: positions at its end, (n, *event_shape), in the scale of data.
        evaluations: how often the network was asked, for all rows at once.
        times: of the frames, (frames,).
        frames: positions on the way, in the scale of the process, (frames, n, *event_shape); empty unless asked for.
    """

    x: Tensor
    evaluations: int
    times: Tensor
    frames: Tensor


class Denoised:
    """A denoiser, counted, with what else is the same knowledge.

    Args:
        denoise: (x (n, ...), t ()) -> estimates of x_0, (n, ...).
        process: of the noise.
    """

    def __init__(self, denoise: Callable[[Tensor, Tensor], Tensor], process: Process) -> None:
        self.denoise, self.process, self.evaluations = denoise, process, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += 1
        return self.denoise(x, t)

    def noise(self, x: Tensor, t: Tensor, data: Tensor | None = None) -> Tensor:
        """The estimate of the noise in x; data is that of x_0, if it has been asked for."""
        data = self(x, t) if data is None else data
        return (x - self.process.alpha(t) * data) / self.process.sigma(t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return -self.noise(x, t) / self.process.sigma(t)


class ReverseSampler(ABC):
    """Base of what walks from noise to data."""

    @abstractmethod
    def walk(self, denoised: Denoised, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Times and positions after each step, the last of them at the start of the process."""


def _check_steps(sampler: Any) -> None:
    steps = sampler.num_steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{type(sampler).__name__} wants num_steps of 1 or more, but found {steps!r}.")


@dataclass(frozen=True)
class _OnGrid(ReverseSampler):
    """Steps along given times.

    Attributes:
        num_steps: of the walk.
        spacing: of the times.
    """

    num_steps: int = 100
    spacing: Spacing = field(default_factory=UniformLogSNR)

    def __post_init__(self) -> None:
        _check_steps(self)
        if not isinstance(self.spacing, Spacing):
            raise TypeError(f"{type(self).__name__} wants a spacing such as UniformLogSNR(), but found {self.spacing!r}.")


@dataclass(frozen=True)
class _OneStep(_OnGrid):
    """Steps that know nothing of those before."""

    def walk(self, denoised: Denoised, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        times = self.spacing(denoised.process, self.num_steps).to(x)
        for t, s in pairwise(times):
            x = self.step(denoised, x, t, s)
            yield s, x

    @abstractmethod
    def step(self, denoised: Denoised, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Positions at s, from those at t."""


@dataclass(frozen=True)
class EulerMaruyama(_OneStep):
    """The reverse SDE by Euler-Maruyama: of first order in distribution.

    Attributes:
        num_steps: evaluations of the network.
        spacing: of the times.
    """

    num_steps: int = 1000

    def step(self, denoised: Denoised, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process, rate = denoised.process, denoised.process.squared_diffusion(t)
        drift = process.drift(t) * x - rate * denoised.score(x, t)
        return x + drift * (s - t) + (rate * (t - s)).sqrt() * torch.randn_like(x)


@dataclass(frozen=True)
class DDIM(_OneStep):
    """Denoising diffusion implicit steps (arXiv 2010.02502).

    Attributes:
        num_steps: evaluations of the network.
        spacing: of the times.
        eta: how random: 0 follows the probability flow, 1 is ancestral.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM wants an eta from 0 to 1, but found {self.eta}.")

    def step(self, denoised: Denoised, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process, data = denoised.process, denoised(x, t)
        ratio = (2 * (process.log_snr(t) - process.log_snr(s))).exp()
        spread = self.eta * process.sigma(s) * (1 - ratio).sqrt()
        noise = denoised.noise(x, t, data)
        x = process.alpha(s) * data + (process.sigma(s).square() - spread.square()).sqrt() * noise
        return x + spread * torch.randn_like(x) if self.eta else x


@dataclass(frozen=True)
class Ancestral(DDIM):
    """Each step draws from what the process leaves open, given the estimate of the data: DDPM (arXiv 2006.11239).

    Attributes:
        num_steps: evaluations of the network.
        spacing: of the times.
        eta: 1, and cannot be set.
    """

    num_steps: int = 1000
    eta: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class Heun(_OneStep):
    """The probability flow by Heun's method, of second order, with noise thrown in on the way (EDM, arXiv 2206.00364).

    Attributes:
        num_steps: of two evaluations of the network each.
        spacing: of the times.
        churn: noise that is added, over all steps, in multiples of the noise that is there; 0 draws nothing.
        churn_range: of sigma / alpha, in which it is.
        churn_scale: deviation of what is added, by which EDM makes up for what networks lose.
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

    def step(self, denoised: Denoised, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process = denoised.process
        high, low = ((-process.log_snr(time)).exp() for time in (t, s))  # sigma / alpha
        y = x / process.alpha(t)
        if self.churn:
            most = (-process.log_snr(torch.full_like(t, process.end))).exp()
            within = (high >= self.churn_range[0]) & (high <= self.churn_range[1])
            more = torch.minimum(high * (1 + within * min(self.churn / self.num_steps, sqrt(2) - 1)), most)
            added = (more.square() - high.square()).clamp(min=0).sqrt() * self.churn_scale
            y, high, t = y + added * torch.randn_like(y), more, process.time(-more.log())
        slope = (y - denoised(process.alpha(t) * y, t)) / high
        guess = y + (low - high) * slope
        again = (guess - denoised(process.alpha(s) * guess, s)) / low
        return process.alpha(s) * (y + (low - high) * (slope + again) / 2)


@dataclass(frozen=True)
class DPMSolver(_OnGrid):
    """DPM-Solver++(2M): exponential steps of the probability flow, of second order by the estimate before (arXiv 2211.01095).

    Attributes:
        num_steps: evaluations of the network.
        spacing: of the times.
    """

    num_steps: int = 20

    def walk(self, denoised: Denoised, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        process = denoised.process
        times = self.spacing(process, self.num_steps).to(x)
        log_snr, before = process.log_snr(times), None
        for i, (t, s) in enumerate(pairwise(times)):
            data = denoised(x, t)
            h, ahead = log_snr[i + 1] - log_snr[i], data
            if before is not None:
                ahead = data + (data - before) * h / (2 * (log_snr[i] - log_snr[i - 1]))
            x = process.sigma(s) / process.sigma(t) * x - process.alpha(s) * torch.expm1(-h) * ahead
            before = data
            yield s, x


@dataclass(frozen=True)
class PredictorCorrector(_OneStep):
    """Ancestral steps, each followed by Langevin steps at the new level of noise (arXiv 2011.13456).

    Attributes:
        num_steps: of the predictor.
        spacing: of the times.
        num_corrections: Langevin steps after each.
        signal_to_noise: size of a Langevin step, as the ratio of its drift to its noise.
    """

    num_steps: int = 500
    num_corrections: int = 1
    signal_to_noise: float = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.num_corrections >= 0 and self.signal_to_noise > 0):
            raise ValueError(
                "PredictorCorrector wants num_corrections >= 0 and signal_to_noise > 0, but found "
                f"{self.num_corrections} and {self.signal_to_noise}."
            )

    def step(self, denoised: Denoised, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x = Ancestral(1).step(denoised, x, t, s)
        size = 2 * (self.signal_to_noise * denoised.process.sigma(s)).square()
        for _ in range(self.num_corrections):
            x = x + size * denoised.score(x, s) + (2 * size).sqrt() * torch.randn_like(x)
        return x


@dataclass(frozen=True)
class ProbabilityFlow(ReverseSampler):
    """The ordinary differential equation that has the densities of the process, by adaptive steps (arXiv 2011.13456).

    Attributes:
        solver: with its tolerances.
        num_steps: parts of the way, each solved by itself; frames want as many.
    """

    solver: Solver = field(default_factory=Dopri5)
    num_steps: int = 1

    def __post_init__(self) -> None:
        _check_steps(self)

    def walk(self, denoised: Denoised, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        velocity = flow_velocity(denoised, denoised.process)
        clock = torch.linspace(*denoised.process.log_snr_range, self.num_steps + 1, dtype=torch.float64)
        scales, times = _scale(denoised.process, clock.to(x))
        at = x / scales[0]
        for i, (low, high) in enumerate(pairwise(clock.tolist()), 1):
            at = integrate(velocity, at, low, high, self.solver).x
            yield times[i], at * scales[i]


def flow_velocity(denoise: Callable[[Tensor, Tensor], Tensor], process: Process) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The probability flow on the clock :math:`\lambda`, of x scaled to :math:`\bar\alpha^2 + \bar\sigma^2 = 1`.

    .. math:: \frac{d\bar x}{d\lambda} = \bar\alpha\,(D - \bar\alpha \bar x)
    """

    def velocity(log_snr: Tensor, x: Tensor) -> Tensor:
        """At a clock () or (n,), of x (n, ...)."""
        scale, t = _scale(process, log_snr)
        alpha = along(torch.sigmoid(2 * log_snr).sqrt(), x)
        return alpha * (denoise(x * along(scale, x), t) - alpha * x)

    return velocity


def _scale(process: Process, log_snr: Tensor) -> tuple[Tensor, Tensor]:
    """The root of alpha^2 + sigma^2, and the time."""
    t = process.time(log_snr)
    return torch.hypot(process.alpha(t), process.sigma(t)), t


def prior_scale(process: Process) -> float:
    """Standard deviation, at the end of the process, of standardised data."""
    t = torch.tensor(process.end, dtype=torch.float64)
    return torch.hypot(process.alpha(t), process.sigma(t)).item()


def reverse(
    sampler: ReverseSampler,
    denoise: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    noise: Tensor,
    *,
    num_frames: int = 0,
    progress: bool | None = None,
) -> Trajectory:
    """Walks from noise to data.

    Args:
        sampler: how.
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x.
        process: that made noise of data.
        noise: standard normal, (n, *event_shape).
        num_frames: positions to keep on the way, evenly among the steps, the first and the last included, one several times
            where steps are fewer; 0 keeps none.
        progress: whether to show a progress bar; None where it takes longer than five seconds.

    Returns:
        Positions, evaluations of the denoiser, and the frames.

    Raises:
        TypeError: of what is no sampler.
        ValueError: for one frame, or less than none.

    Example:
        >>> from pyro_genmodels.dynamics.processes import VariancePreserving
        >>> normal = lambda x, t: VariancePreserving().alpha(t) * x  # the denoiser of standard normal data
        >>> reverse(DPMSolver(20), normal, VariancePreserving(), torch.randn(100, 2)).evaluations
        20
    """
    if not isinstance(sampler, ReverseSampler):
        raise TypeError(f"A diffusion is drawn by a choice such as DPMSolver(20) or Ancestral(1000), but found {sampler!r}.")
    if num_frames < 0 or num_frames == 1:
        raise ValueError(f"A walk wants num_frames of 2 or more, its start and its end, but found {num_frames}.")
    if isinstance(sampler, ProbabilityFlow) and sampler.num_steps < num_frames - 1:
        sampler = replace(sampler, num_steps=num_frames - 1)
    if not len(noise):  # which not every network takes
        return Trajectory(noise, 0, noise.new_zeros(num_frames), noise.new_zeros(num_frames, *noise.shape))
    denoised = Denoised(denoise, process)
    x = noise * prior_scale(process)
    steps = getattr(sampler, "num_steps", 1)
    kept = torch.linspace(0, steps, num_frames).round().long().tolist()
    frames = {0: (x.new_tensor(process.end), x)}
    bar = tqdm(
        sampler.walk(denoised, x), total=steps, desc=type(sampler).__name__, unit="step", leave=False,
        delay=0 if progress else PROGRESS_DELAY, disable=None if progress is None else not progress,
    )  # fmt: skip
    for i, (t, position) in enumerate(bar, 1):
        x = position
        if i in kept:
            frames[i] = (t, x)
    times, positions = zip(*(frames[i] for i in kept), strict=True) if kept else ((), ())
    return Trajectory(
        x / process.alpha(x.new_tensor(process.start)),
        denoised.evaluations,
        torch.stack(times) if kept else x.new_zeros(0),
        torch.stack(positions) if kept else x.new_zeros(0, *x.shape),
    )
