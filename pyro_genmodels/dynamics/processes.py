r"""Processes that turn data into noise: :math:`x_t = \alpha(t)\, x_0 + \sigma(t)\, \varepsilon`.

Each is the solution of :math:`dx = f(t)\, x\, dt + g(t)\, dw`, with

.. math:: f = \frac{d \log \alpha}{dt}, \qquad g^2 = \frac{d\sigma^2}{dt} - 2 f \sigma^2 .

Up to the scale of x and the clock they are all one process, told by the log of the signal-to-noise ratio
:math:`\lambda = \log(\alpha / \sigma)`, which falls with t. Data are taken to be standardised: of mean 0 and deviation 1.

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

import torch
from torch import Size, Tensor


@dataclass(frozen=True)
class Process(ABC):
    """Base of all processes. Times are tensors of any shape, in [`start`, `end`]."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        bad = {name: v for name, v in values.items() if not (isinstance(v, (int, float)) and 0 < v < float("inf"))}
        if bad:
            raise ValueError(f"{type(self).__name__} wants positive numbers, but found {bad}.")
        ordered = [(a, a.replace("min", "max")) for a in values if a.endswith("_min")]
        for low, high in [*ordered, ("start", "end")]:
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(f"{type(self).__name__} wants {low} < {high}, but found {values}.")

    @property
    @abstractmethod
    def start(self) -> float:
        """The time at which data have the least noise, more than 0."""

    @property
    def end(self) -> float:
        """The time at which nearly nothing of the data is left."""
        return 1.0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """How much of the data is left."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f, per unit of time."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The time of a log signal-to-noise ratio."""

    def squared_diffusion(self, t: Tensor) -> Tensor:
        """g^2, per unit of time."""
        return -2 * self.drift(t) * (self.alpha(t).square() + self.sigma(t).square())  # where the variance is kept

    def log_snr(self, t: Tensor) -> Tensor:
        """The log of alpha / sigma."""
        return self.alpha(t).log() - self.sigma(t).log()

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """Of log alpha / sigma, at the end and at the start."""
        low, high = self.log_snr(torch.tensor([self.end, self.start], dtype=torch.float64)).tolist()
        return low, high

    def noised(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of data x (n, ...) at times t (n,)."""
        return along(self.alpha(t), x) * x + along(self.sigma(t), x) * noise


def along(values: Tensor, x: Tensor) -> Tensor:
    """Numbers, one per row or one for all, to be multiplied with x (n, ...)."""
    return values.reshape(*values.shape, *(1 for _ in x.shape[1:])) if values.dim() else values


def stratified(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform numbers, each by itself, that together cover [0, 1) evenly, so that a mean over them errs less."""
    n = Size(shape).numel()
    u = (torch.rand((), dtype=like.dtype, device=like.device) + torch.arange(n, dtype=like.dtype, device=like.device) / n) % 1
    return u.reshape(shape)


class _Linear(Process):
    """The clock of a noise rate that rises linearly."""

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
        slope, loss = self.beta_max - self.beta_min, -4 * log_alpha
        return loss / (self.beta_min + (self.beta_min**2 + slope * loss).sqrt())


@dataclass(frozen=True)
class VariancePreserving(_Linear):
    """alpha^2 + sigma^2 = 1, with a noise rate that rises linearly: the continuous form of DDPM (arXiv 2006.11239).

    Attributes:
        beta_min: noise rate at time 0.
        beta_max: noise rate at time 1.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time(-0.5 * torch.nn.functional.softplus(-2 * log_snr))


@dataclass(frozen=True)
class SubVariancePreserving(_Linear):
    """The data fade as in `VariancePreserving`, with less noise at every time: sigma = 1 - alpha^2.

    Attributes:
        beta_min: noise rate at time 0.
        beta_max: noise rate at time 1.
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
    """alpha^2 + sigma^2 = 1, with alpha a cosine of time (arXiv 2102.09672).

    Attributes:
        offset: shift of the cosine, so that noise does not vanish too fast near the data.
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
        gone = self._first**2 * torch.sigmoid(-2 * log_snr)  # sin^2 b - sin^2 a, of the angles a at time 0 and b
        sine = (gone + first.sin().square()).sqrt()
        middle = (torch.atan2(sine, self._first * torch.sigmoid(2 * log_snr).sqrt()) + first) / 2
        half = torch.asin(gone / (sine + first.sin()) / (2 * middle.cos()))  # sin b - sin a = 2 cos((b + a)/2) sin((b - a)/2)
        return half * 4 * (1 + self.offset) / pi


@dataclass(frozen=True)
class VarianceExploding(Process):
    """Data stay as they are, under noise that grows geometrically (arXiv 1907.05600).

    Attributes:
        sigma_min: deviation of the noise at time 0.
        sigma_max: at time 1.
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
    """Data stay as they are, and time is the deviation of the noise (EDM, arXiv 2206.00364).

    Attributes:
        sigma_min: the first time.
        sigma_max: the last time.
    """

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
