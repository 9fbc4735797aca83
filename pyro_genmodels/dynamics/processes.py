r"""Processes that turn data into noise: :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon`.

Each is the solution of :math:`dx = f(t)\, x\, dt + g(t)\, dw`, with

.. math:: f = \frac{d \log \alpha}{dt}, \qquad g^2 = \frac{d\sigma^2}{dt} - 2 f \sigma^2 .

All of them are the same process up to the scale of x and the clock: only the log signal-to-noise ratio
:math:`\lambda = \log(\alpha / \sigma)` matters, which falls with t. Data are assumed to be standardised, with mean 0 and
standard deviation 1.

Song et al., *Score-Based Generative Modeling through SDEs* (arXiv 2011.13456); Kingma et al., *Variational Diffusion Models*
(arXiv 2107.00630).
"""

from __future__ import annotations

__all__ = [
    "CosineVariancePreserving", "Karras", "Process", "SubVariancePreserving", "VarianceExploding", "VariancePreserving",
    "along", "stratified",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import cos, log, pi
from numbers import Real
from typing import ClassVar

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class Process(ABC):
    """Base class of processes. Times are tensors of any shape with values in [`start`, `end`]."""

    is_mostly_noise: ClassVar[bool] = False
    """True if x is almost pure noise at most times, so that uniform times would be wasted in training."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        bad = {name: v for name, v in values.items() if not (isinstance(v, Real) and 0 < float(v) < float("inf"))}
        if bad:
            raise ValueError(f"{type(self).__name__} wants positive numbers, but found {bad}.")
        ordered = [(a, a.replace("min", "max")) for a in values if a.endswith("_min")]
        for low, high in [*ordered, ("start", "end")]:
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{type(self).__name__} wants {low} < {high}, but found {values}.")

    @property
    @abstractmethod
    def start(self) -> float:
        """First time, greater than 0, at which the data have the least noise."""

    @property
    def end(self) -> float:
        """Last time, at which almost nothing of the data is left."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the factor of the data at times t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise at times t."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """Return f at times t, per unit of time."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """Return the times at which the log signal-to-noise ratio has the given values."""

    def squared_diffusion(self, t: Tensor) -> Tensor:
        """Return g^2 at times t, per unit of time."""
        return -2 * self.drift(t) * (self.alpha(t).square() + self.sigma(t).square())  # variance preserving

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha / sigma) at times t."""
        return self.alpha(t).log() - self.sigma(t).log()

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Smallest and largest log(alpha / sigma): at the end and at the start."""
        low, high = self.log_snr(torch.tensor([self.end, self.start], dtype=torch.float64)).tolist()
        return low, high

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t for data x (n, ...), times t (n,) and standard normal noise (n, ...)."""
        return along(self.alpha(t), x) * x + along(self.sigma(t), x) * noise


def along(values: Tensor, x: Tensor) -> Tensor:
    """Return values, () or (n,), in a shape that broadcasts along the rows of x (n, ...)."""
    return values.reshape(*values.shape, *(1 for _ in x.shape[1:])) if values.dim() else values


def stratified(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return stratified uniform numbers in [0, 1), which give means of lower variance than independent ones.

    Each number is uniform, and together they cover the interval evenly.
    """
    n = Size(shape).numel()
    u = (torch.rand((), dtype=like.dtype, device=like.device) + torch.arange(n, dtype=like.dtype, device=like.device) / n) % 1
    return u.reshape(shape)


class _Linear(Process):
    """Base class of processes whose noise rate rises linearly with time."""

    beta_min: float
    beta_max: float

    @property
    def start(self) -> float:
        return 1e-5

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * t * self.beta_min - 0.25 * t.square() * (self.beta_max - self.beta_min)

    def _time(self, log_alpha: Tensor) -> Tensor:
        slope, c = self.beta_max - self.beta_min, -4 * log_alpha
        return c / (self.beta_min + (self.beta_min**2 + slope * c).sqrt())  # root of slope t^2 + 2 beta_min t = c


@dataclass(frozen=True)
class VariancePreserving(_Linear):
    """Process with alpha^2 + sigma^2 = 1 and a linear noise rate: the continuous form of DDPM (arXiv 2006.11239).

    Attributes:
        beta_min: noise rate at time 0, per unit of time.
        beta_max: noise rate at time 1, per unit of time.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time(-0.5 * torch.nn.functional.softplus(-2 * log_snr))


@dataclass(frozen=True)
class SubVariancePreserving(_Linear):
    """Process with the alpha of `VariancePreserving` and less noise at every time: sigma = 1 - alpha^2.

    Attributes:
        beta_min: noise rate at time 0, per unit of time.
        beta_max: noise rate at time 1, per unit of time.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    @property
    def start(self) -> float:
        return 1e-2

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))

    def squared_diffusion(self, t: Tensor) -> Tensor:
        return 2 * self.drift(t) * torch.expm1(4 * self._log_alpha(t))

    def time(self, log_snr: Tensor) -> Tensor:
        half = 0.5 * (-log_snr).exp()  # alpha^2 + 2 half alpha = 1
        return self._time(-torch.asinh(half))


@dataclass(frozen=True)
class CosineVariancePreserving(Process):
    """Process with alpha^2 + sigma^2 = 1 in which alpha is a cosine of time (arXiv 2102.09672).

    Attributes:
        offset: shift of the cosine. It keeps the noise from vanishing too fast near the data.
    """

    offset: float = 0.008

    @property
    def start(self) -> float:
        return 1e-4

    @property
    def end(self) -> float:
        return 0.995

    def _angle(self, t: Tensor) -> Tensor:
        return 0.5 * pi * (t + self.offset) / (1 + self.offset)

    @property
    def _first(self) -> float:
        return cos(0.5 * pi * self.offset / (1 + self.offset))

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t).cos() / self._first

    def sigma(self, t: Tensor) -> Tensor:
        first = torch.zeros_like(t)
        up, down = self._angle(t) + self._angle(first), self._angle(t) - self._angle(first)
        return (up.sin() * down.sin()).sqrt() / self._first  # cos^2 a - cos^2 b = sin(b + a) sin(b - a)

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * pi / (1 + self.offset) * self._angle(t).tan()

    def time(self, log_snr: Tensor) -> Tensor:
        first = self._angle(torch.zeros_like(log_snr))
        # with the angles a at time 0 and b at time t
        difference = self._first**2 * torch.sigmoid(-2 * log_snr)  # sin^2 b - sin^2 a
        sine = (difference + first.sin().square()).sqrt()
        middle = (torch.atan2(sine, self._first * torch.sigmoid(2 * log_snr).sqrt()) + first) / 2
        # sin b - sin a = 2 cos((b + a)/2) sin((b - a)/2)
        half = torch.asin(difference / (sine + first.sin()) / (2 * middle.cos()))
        return half * 4 * (1 + self.offset) / pi


@dataclass(frozen=True)
class VarianceExploding(Process):
    """Process with alpha = 1 and a sigma that grows geometrically with time (arXiv 1907.05600).

    Attributes:
        sigma_min: standard deviation of the noise at time 0.
        sigma_max: standard deviation of the noise at time 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def start(self) -> float:
        return 1e-5

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (t * self._rate).exp()

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def squared_diffusion(self, t: Tensor) -> Tensor:
        return 2 * self._rate * self.sigma(t).square()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr - log(self.sigma_min)) / self._rate

    @property
    def _rate(self) -> float:
        return log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class Karras(Process):
    """Process with alpha = 1 and sigma = t (EDM, arXiv 2206.00364).

    Attributes:
        sigma_min: first time, and standard deviation of the noise there.
        sigma_max: last time, and standard deviation of the noise there.
    """

    is_mostly_noise: ClassVar[bool] = True

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    @property
    def start(self) -> float:
        return self.sigma_min

    @property
    def end(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def squared_diffusion(self, t: Tensor) -> Tensor:
        return 2 * t

    def time(self, log_snr: Tensor) -> Tensor:
        return (-log_snr).exp()
