r"""Denoisers: estimates of the data and of the noise in noisy data, from a network of any parametrisation.

.. math:: D(x, t, c) = c_{\mathrm{skip}}\, x + c_{\mathrm{out}}\, F(c_{\mathrm{in}}\, x, t, c), \qquad
    \hat\varepsilon(x, t, c) = \frac{x - \alpha D}{\sigma}

A *prediction* sets the coefficients from the process's :math:`\alpha` and :math:`\sigma`. With
:math:`r^2 = \alpha^2 + \sigma^2`, the network's input is :math:`x / r`, of standard deviation 1, and

===================  =======================  ====================
F predicts           c_skip                   c_out
===================  =======================  ====================
noise                1 / alpha                -sigma / alpha
data                 0                        1
velocity             alpha / r^2              -sigma / r
score                1 / alpha                sigma^2 / alpha
===================  =======================  ====================

With little noise :math:`x - \alpha D` is a difference of nearly equal numbers. The estimate of the noise therefore has
coefficients of its own, in which the difference is taken on paper. In single precision its relative error is then about 1e-6
instead of 1e-4.

`Preconditioned` is EDM's (Karras et al., arXiv 2206.00364). Velocities: Salimans and Ho (arXiv 2202.00512). Classifier-free
guidance: Ho and Salimans (arXiv 2207.12598).
"""

from __future__ import annotations

__all__ = [
    "DataPrediction", "Denoiser", "Estimate", "NoisePrediction", "Preconditioned", "Prediction", "ScorePrediction",
    "VelocityPrediction",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.dynamics.processes import Process, along


class Estimate(NamedTuple):
    """Estimates of the data and of the noise in noisy data.

    Attributes:
        data: estimate of the data, (n, *event_shape).
        noise: estimate of the noise, of standard deviation 1, (n, *event_shape).
    """

    data: Tensor
    noise: Tensor


class Prediction(ABC):
    """Base class of parametrisations: the meaning of a network's output. Alpha and sigma are tensors of one shape."""

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_skip and c_out: the coefficients of x and of the output in the estimate of the data."""

    @abstractmethod
    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of x and of the output in the estimate of the noise, without cancellation."""

    def scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return c_in, the factor of the network's input."""
        return 1 / torch.hypot(alpha, sigma)

    def output(self, data: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the output that the network should have for noisy x (n, ...) of known data, with alpha and sigma (n,)."""
        skip, out = (along(c, x) for c in self.coefficients(alpha, sigma))
        return (data - skip * x) / out


@dataclass(frozen=True)
class NoisePrediction(Prediction):
    """Prediction of the noise, of standard deviation 1."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, -sigma / alpha

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)


@dataclass(frozen=True)
class DataPrediction(Prediction):
    """Prediction of the data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / sigma, -alpha / sigma


@dataclass(frozen=True)
class VelocityPrediction(Prediction):
    """Prediction of the velocity (alpha noise - sigma data) / r, the direction from data to noise."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        radius = torch.hypot(alpha, sigma)
        return alpha / radius.square(), -sigma / radius

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        radius = torch.hypot(alpha, sigma)
        return sigma / radius.square(), alpha / radius


@dataclass(frozen=True)
class ScorePrediction(Prediction):
    """Prediction of the score, the gradient of the log density of noisy data."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, sigma.square() / alpha

    def noise_coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), -sigma


@dataclass(frozen=True)
class Preconditioned(Prediction):
    """Prediction of EDM: inputs and targets of standard deviation 1, with the least amplification of errors.

    Attributes:
        deviation: standard deviation of the data. With 1, as of standardised data, the output is the negative velocity.
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
    """Estimates of the data and the noise in noisy data, by a network.

    Attributes:
        network: function network(x, t, context) of x (n, *event_shape), t (n,) and context (n, c) or None.
        process: process that adds the noise.
        prediction: meaning of the network's output.
        clock: True if the network's time is log(sigma / alpha) / 4, as in EDM, instead of the process's time.
        null: embedding that stands for "no context", (c,), or None if the network has not learned one.
        guidance: weight of the context. 1 uses it as it is, 0 ignores it, and more than 1 exaggerates it.
    """

    network: Callable[..., Tensor]
    process: Process
    prediction: Prediction
    clock: bool = True
    null: Tensor | None = None
    guidance: float = 1.0

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return estimates of the data in x (n, *event_shape) at times t, () or (n,), with context (n, c) or None."""
        return self._estimates(x, t, context, self.prediction.coefficients)[0]

    def noise(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return estimates of the noise in x, in multiples of sigma."""
        return self._estimates(x, t, context, self.prediction.noise_coefficients)[0]

    def estimate(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Estimate:
        """Return estimates of the data and of the noise, from one call of the network. See `__call__`."""
        return Estimate(*self._estimates(x, t, context, self.prediction.coefficients, self.prediction.noise_coefficients))

    def guided(self, weight: float) -> Denoiser:
        """Return a copy with another weight of the context.

        Raises:
            ValueError: if there is no context, or the network has not learned to do without it.
        """
        if self.null is None:
            raise ValueError(
                "Guidance wants a network that has also learned to do without its context. Build the family with a context and "
                "drop_context=0.1, for example, and train it."
            )
        return replace(self, guidance=float(weight))

    @property
    def plain(self) -> Denoiser:
        """Copy without guidance, as it is trained."""
        return replace(self, guidance=1.0)

    def _estimates(self, x: Tensor, t: Tensor, context: Tensor | None, *coefficients: Callable[..., Any]) -> list[Tensor]:
        """Return the linear combination of x and the network's output for each pair of coefficients."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        time = (-self.process.log_snr(t) / 4 if self.clock else t).expand(len(x))
        output = self._output(along(self.prediction.scale(alpha, sigma), x) * x, time, context)
        pairs = [pair(alpha, sigma) for pair in coefficients]
        return [along(skip, x) * x + along(out, x) * output for skip, out in pairs]

    def _output(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Return the network's output for scaled x (n, *event_shape), with guidance."""
        if self.null is None or context is None or self.guidance == 1.0:
            output = self.network(x, t, context)
        elif self.guidance == 0.0:
            output = self.network(x, t, self.null.expand_as(context))
        else:
            contexts = torch.cat([self.null.expand_as(context), context])
            without, with_context = self.network(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
            output = torch.lerp(without, with_context, self.guidance)
        if output.shape != x.shape:
            raise ValueError(
                f"The network of a diffusion should return {tuple(x.shape)}, the shape of its input, not {tuple(output.shape)}."
            )
        return output.to(torch.promote_types(output.dtype, x.dtype))  # which `torch.autocast` may have rounded
