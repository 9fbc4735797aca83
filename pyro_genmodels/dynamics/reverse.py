r"""Reverse diffusion: from noise to data, by estimates of the data under noise.

A sampler needs only a *denoiser* :math:`D(x, t) = \mathbb{E}[x_0 \mid x_t = x]` of a process (see
`pyro_genmodels.dynamics.processes`). It determines the noise and the score,

.. math:: \hat\varepsilon = \frac{x - \alpha D}{\sigma}, \qquad \nabla_x \log p_t(x) = -\frac{\hat\varepsilon}{\sigma} .

The first difference cancels where there is little noise. A denoiser may therefore return an `Estimate` of both, in which
:math:`\hat\varepsilon` comes from the network without it.

The samplers are in `pyro_genmodels.dynamics.reverse_sde` and `pyro_genmodels.dynamics.probability_flow`. Each goes from time t
to an earlier time s, along times between the end and the start of the process.
"""

from __future__ import annotations

__all__ = [
    "CountedDenoiser", "Denoise", "GridSampler", "OneStepSampler", "ReverseSampler", "Trajectory", "prior_scale",
    "progress_bar", "simulate_reverse", "to_estimate",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.dynamics.denoiser import Estimate
from pyro_genmodels.dynamics.processes import Process, along
from pyro_genmodels.dynamics.spacing import Spacing, UniformLogSNR, check_num_steps

Denoise = Callable[[Tensor, Tensor], Tensor | Estimate]
"""(x (n, *event_shape), t ()) -> estimates of the data in x, or an `Estimate` of the data and the noise."""

PROGRESS_DELAY = 5.0
"""Seconds after which a progress bar is shown on a terminal."""


@dataclass(frozen=True)
class Trajectory:
    """The result of a simulation from noise to data.

    Attributes:
        x: positions at the end, (n, *event_shape), in the scale of the data.
        evaluations: number of calls of the network, each for all rows at once.
        times: times of the frames, (frames,).
        frames: positions at these times, in the scale of the process, (frames, n, *event_shape). Empty unless asked for.
    """

    x: Tensor
    evaluations: int
    times: Tensor
    frames: Tensor


def to_estimate(found: Tensor | Estimate, x: Tensor, t: Tensor, process: Process) -> Estimate:
    """Return an `Estimate` from what a denoiser has returned for x (n, ...) at times t."""
    if isinstance(found, Estimate):
        return found
    return Estimate(found, (x - along(process.alpha(t), x) * found) / along(process.sigma(t), x))


class CountedDenoiser:
    """A denoiser that counts its evaluations and returns estimates of both the data and the noise.

    Args:
        denoise: (x (n, ...), t ()) -> estimates of the data, (n, ...), or an `Estimate`.
        process: process that adds the noise.
    """

    def __init__(self, denoise: Denoise, process: Process) -> None:
        self.denoise, self.process, self.evaluations = denoise, process, 0

    def __call__(self, x: Tensor, t: Tensor) -> Estimate:
        self.evaluations += 1
        return to_estimate(self.denoise(x, t), x, t, self.process)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the score of noisy x (n, ...) at time t ()."""
        return -self(x, t).noise / self.process.sigma(t)


class ReverseSampler(ABC):
    """Base class of samplers that go from noise to data. Subclasses have an attribute `num_steps`."""

    num_steps: int

    @abstractmethod
    def trajectory(self, denoise: CountedDenoiser, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the time and the positions after each step. The last time is the start of the process.

        Args:
            denoise: estimates of the data and the noise.
            x: positions at the end of the process, (n, *event_shape).
        """

    def with_frames(self, num_frames: int) -> ReverseSampler:
        """Return a sampler whose trajectories have so many frames, if the number of steps may be raised for that."""
        return self


@dataclass(frozen=True)
class GridSampler(ReverseSampler):
    """Base class of samplers that step along a fixed grid of times.

    Attributes:
        num_steps: number of steps.
        spacing: spacing of the times.
    """

    num_steps: int = 100
    spacing: Spacing = field(default_factory=UniformLogSNR)

    def __post_init__(self) -> None:
        check_num_steps(self, self.num_steps)
        if not isinstance(self.spacing, Spacing):
            raise TypeError(f"{type(self).__name__} wants a spacing such as UniformLogSNR(), but found {self.spacing!r}.")


@dataclass(frozen=True)
class OneStepSampler(GridSampler):
    """Base class of samplers whose steps do not depend on earlier steps."""

    def trajectory(self, denoise: CountedDenoiser, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        times = self.spacing(denoise.process, self.num_steps).to(x)
        for t, s in pairwise(times):
            x = self.step(denoise, x, t, s)
            yield s, x

    @abstractmethod
    def step(self, denoise: CountedDenoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return positions at time s from the positions x at time t."""


def prior_scale(process: Process) -> float:
    """Return the standard deviation of noisy standardised data at the end of the process.

    Example:
        >>> from pyro_genmodels.dynamics.processes import Karras
        >>> round(prior_scale(Karras()), 3)
        80.006
    """
    t = torch.tensor(process.end, dtype=torch.float64)
    return torch.hypot(process.alpha(t), process.sigma(t)).item()


def progress_bar(steps: Iterable[Any], total: int, label: str, *, progress: bool | None) -> Iterable[Any]:
    """Return an iterable over steps with a progress bar.

    Args:
        steps: steps to iterate over.
        total: number of steps.
        label: label of the bar.
        progress: True shows the bar, False does not. None shows it on a terminal after `PROGRESS_DELAY` seconds.
    """
    return tqdm(
        steps, total=total, desc=label, unit="step", leave=False,
        delay=0 if progress else PROGRESS_DELAY, disable=None if progress is None else not progress,
    )  # fmt: skip


def simulate_reverse(
    sampler: ReverseSampler,
    denoise: Denoise,
    process: Process,
    noise: Tensor,
    *,
    num_frames: int = 0,
    progress: bool | None = None,
) -> Trajectory:
    """Simulate a reverse process, from noise to data.

    Args:
        sampler: sampler such as ``DPMSolver(20)``.
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x, or an `Estimate` of the data and the noise.
        process: process that adds the noise.
        noise: standard normal noise, (n, *event_shape). It is scaled to the end of the process, where the simulation starts.
        num_frames: number of positions to keep, spread evenly over the steps, including the first and the last. If there are
            fewer steps, frames are repeated, or `ProbabilityFlow` takes more steps. 0 keeps none.
        progress: True shows a progress bar, False does not; None shows it on a terminal after five seconds.

    Returns:
        The samples in the scale of the data, the number of evaluations of the denoiser, and the frames from noise to data in
        the scale of the process.

    Raises:
        TypeError: if `sampler` is not a `ReverseSampler`.
        ValueError: if `num_frames` is 1 or negative.

    Example:
        >>> from pyro_genmodels.dynamics.probability_flow import DPMSolver
        >>> from pyro_genmodels.dynamics.processes import VariancePreserving
        >>> normal = lambda x, t: VariancePreserving().alpha(t) * x  # the denoiser of standard normal data
        >>> simulate_reverse(DPMSolver(20), normal, VariancePreserving(), torch.randn(100, 2)).evaluations
        20
    """
    if not isinstance(sampler, ReverseSampler):
        raise TypeError(f"A diffusion wants a sampler such as DPMSolver(20) or Ancestral(1000), but found {sampler!r}.")
    if num_frames < 0 or num_frames == 1:
        raise ValueError(f"A trajectory wants num_frames of 2 or more, for its start and its end, but found {num_frames}.")
    if not len(noise):  # some networks fail for no rows
        return Trajectory(noise, 0, noise.new_zeros(num_frames), noise.new_zeros(num_frames, *noise.shape))
    sampler = sampler.with_frames(num_frames)
    counted = CountedDenoiser(denoise, process)
    x = noise * prior_scale(process)
    steps = sampler.num_steps
    indices = torch.linspace(0, steps, num_frames).round().long().tolist()
    frames = {0: (x.new_tensor(process.end), x)}
    bar = progress_bar(sampler.trajectory(counted, x), steps, type(sampler).__name__, progress=progress)
    for i, (t, position) in enumerate(bar, 1):
        x = position
        if i in indices:
            frames[i] = (t, x)
    times, positions = zip(*(frames[i] for i in indices), strict=True) if indices else ((), ())
    return Trajectory(
        x / process.alpha(x.new_tensor(process.start)),
        counted.evaluations,
        torch.stack(times) if indices else x.new_zeros(0),
        torch.stack(positions) if indices else x.new_zeros(0, *x.shape),
    )
