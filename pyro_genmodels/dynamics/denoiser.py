r"""What a network says of noisy data, whatever it was taught to say: an estimate of the data behind it.

.. math:: D(x, t, c) = c_{\mathrm{skip}}\, x + c_{\mathrm{out}}\, F(c_{\mathrm{in}}\, x, t, c)

A *prediction* is a choice of the three coefficients, at each :math:`\alpha` and :math:`\sigma` of the process. With
:math:`r^2 = \alpha^2 + \sigma^2`, networks are given :math:`x / r`, of deviation 1, and

===================  =======================  ====================
F is                 c_skip                   c_out
===================  =======================  ====================
noise                1 / alpha                -sigma / alpha
data                 0                        1
velocity             alpha / r^2              -sigma / r
score                1 / alpha                sigma^2 / alpha
===================  =======================  ====================

`Preconditioned` is EDM's (Karras et al., arXiv 2206.00364). Velocities: Salimans and Ho (arXiv 2202.00512). Guidance without a
classifier: Ho and Salimans (arXiv 2207.12598).
"""

from __future__ import annotations

__all__ = [
    "DataPrediction", "Denoiser", "NoisePrediction", "Preconditioned", "Prediction", "ScorePrediction", "VelocityPrediction",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.dynamics.processes import Process, along


class Prediction(ABC):
    """What the network is taught to say. Alpha and sigma are tensors of one shape."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and of what is said, in the estimate of the data: c_skip and c_out."""

    @abstractmethod
    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and of what is said, in the estimate of the noise: the same, without the difference of what is nearly equal."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """c_in."""
        return 1 / torch.hypot(alpha, sigma)

    def output(self, data: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What the network should say of x (n, ...), if the data behind it are known; alpha and sigma (n,)."""
        skip, out = (along(c, x) for c in self.coefficients(alpha, sigma))
        return (data - skip * x) / out


@dataclass(frozen=True)
class NoisePrediction(Prediction):
    """The noise, of deviation 1."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, -sigma / alpha

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class DataPrediction(Prediction):
    """The data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / sigma, -alpha / sigma


@dataclass(frozen=True)
class VelocityPrediction(Prediction):
    """Where the noise grows and the data fade: (alpha noise - sigma data) / r."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        radius = torch.hypot(alpha, sigma)
        return alpha / radius.square(), -sigma / radius

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        radius = torch.hypot(alpha, sigma)
        return sigma / radius.square(), alpha / radius


@dataclass(frozen=True)
class ScorePrediction(Prediction):
    """The gradient of the log density of noisy data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, sigma.square() / alpha

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), -sigma


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """EDM's: what it takes for inputs and targets of deviation 1, with the least amplification of errors.

    Attributes:
        deviation: of the data; standardised data have 1, and then it is the negative velocity.
    """

    deviation: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.deviation < float("inf"):
            raise ValueError(f"Preconditioned wants a positive deviation, but found {self.deviation}.")

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        spread = self._spread(alpha, sigma)
        return alpha * (self.deviation / spread).square(), sigma * self.deviation / spread

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        spread = self._spread(alpha, sigma)
        return sigma / spread.square(), -alpha * self.deviation / spread

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return 1 / self._spread(alpha, sigma)

    def _spread(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.hypot(alpha * self.deviation, sigma)


@dataclass(frozen=True)
class Denoiser:
    """The estimate of the data behind noisy ones.

    Attributes:
        network: called as network(x, t, context), with x (n, *event_shape), t (n,) and context (n, c) or None.
        process: that made the noise.
        prediction: what the network says.
        clock: whether the network is told log(sigma / alpha) / 4, as EDM's are, instead of the process's time.
        null: the context that stands for none, (c,), where the network has learned one.
        guidance: weight of the context: 1 takes it as it is, 0 does without, and more than 1 exaggerates it.
    """

    network: Callable[..., Tensor]
    process: Process
    prediction: Prediction
    clock: bool = True
    null: Tensor | None = None
    guidance: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimates of the data in x (n, *event_shape) at times t, () or (n,), with context (n, c) or None."""
        return self._estimate(x, t, context, self.prediction.coefficients)

    def noise(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Estimates of the noise in x, in multiples of sigma."""
        return self._estimate(x, t, context, self.prediction.noise_coefficients)

    def guided(self, weight: float) -> Denoiser:
        """The same, with another weight of the context.

        Raises:
            ValueError: where there is no context, or the network knows no absence of it.
        """
        if self.null is None:
            raise ValueError(
                "Guidance wants a network that has also learned to do without its context. Build the family with a context and "
                "drop_context=0.1, say, and train it."
            )
        return replace(self, guidance=float(weight))

    @property
    def plain(self) -> Denoiser:
        """The same, its context taken as it is: what is trained."""
        return replace(self, guidance=1.0)

    def _estimate(self, x: Tensor, t: Tensor, context: Tensor | None, coefficients: Callable[..., Any]) -> Tensor:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        ours, theirs = (along(c, x) for c in coefficients(alpha, sigma))
        told = (-self.process.log_snr(t) / 4 if self.clock else t).expand(len(x))
        return ours * x + theirs * self._said(along(self.prediction.scale(alpha, sigma), x) * x, told, context)

    def _said(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        if self.null is None or context is None or self.guidance == 1.0:
            said = self.network(x, t, context)
        elif self.guidance == 0.0:
            said = self.network(x, t, self.null.expand_as(context))
        else:
            both = torch.cat([self.null.expand_as(context), context])
            without, given = self.network(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
            said = torch.lerp(without, given, self.guidance)
        if said.shape != x.shape:
            raise ValueError(
                f"The network of a diffusion should return {tuple(x.shape)}, as it was given, not {tuple(said.shape)}."
            )
        return said
