r"""Samplers of the reverse stochastic differential equation, from noise to data.

With a Wiener process :math:`\bar w` in reverse time, :math:`\lambda = \log(\alpha / \sigma)` and new noise z at each step,

.. math:: dx = [f x - g^2 \nabla \log p_t]\,dt + g\,d\bar w \quad\text{(Euler-Maruyama)}, \qquad
    x_s = \alpha_s D + \sqrt{\sigma_s^2 - c^2}\,\hat\varepsilon + c z, \quad
    c = \eta\, \sigma_s \sqrt{1 - e^{2 (\lambda_t - \lambda_s)}} \quad\text{(DDIM; ancestral with } \eta = 1).

Ho et al. (arXiv 2006.11239); Song et al. (arXiv 2010.02502, 2011.13456).
"""

from __future__ import annotations

__all__ = ["DDIM", "Ancestral", "EulerMaruyama", "PredictorCorrector"]

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_genmodels.dynamics.reverse import CountedDenoiser, OneStepSampler


@dataclass(frozen=True)
class EulerMaruyama(OneStepSampler):
    """The Euler-Maruyama method, of first order in distribution.

    Attributes:
        num_steps: number of steps, of one evaluation of the network each.
        spacing: spacing of the times.
    """

    num_steps: int = 1000

    def step(self, denoise: CountedDenoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process, rate = denoise.process, denoise.process.squared_diffusion(t)
        drift = process.drift(t) * x - rate * denoise.score(x, t)
        return x + drift * (s - t) + (rate * (t - s)).sqrt() * torch.randn_like(x)


@dataclass(frozen=True)
class DDIM(OneStepSampler):
    """Denoising diffusion implicit steps (arXiv 2010.02502).

    Attributes:
        num_steps: number of steps, of one evaluation of the network each.
        spacing: spacing of the times.
        eta: amount of new noise, from 0 (deterministic, follows the probability flow) to 1 (ancestral sampling).
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"DDIM wants an eta from 0 to 1, but found {self.eta}.")

    def step(self, denoise: CountedDenoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        process, (data, noise) = denoise.process, denoise(x, t)
        new = self.eta * (-torch.expm1(2 * (process.log_snr(t) - process.log_snr(s)))).sqrt()  # c, in multiples of sigma_s
        x = process.alpha(s) * data + process.sigma(s) * (1 - new.square()).sqrt() * noise
        return x + process.sigma(s) * new * torch.randn_like(x) if self.eta else x


@dataclass(frozen=True)
class Ancestral(DDIM):
    """Ancestral sampling: a draw of the process's conditional given the estimate of the data, DDPM (arXiv 2006.11239).

    Attributes:
        num_steps: number of steps, of one evaluation of the network each.
        spacing: spacing of the times.
        eta: always 1; it cannot be set.
    """

    num_steps: int = 1000
    eta: float = field(default=1.0, init=False)


@dataclass(frozen=True)
class PredictorCorrector(OneStepSampler):
    """Ancestral steps, each followed by Langevin steps at the new noise level (arXiv 2011.13456).

    Attributes:
        num_steps: number of ancestral steps.
        spacing: spacing of the times.
        num_corrections: number of Langevin steps after each.
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

    def step(self, denoise: CountedDenoiser, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        x = Ancestral(1).step(denoise, x, t, s)
        size = 2 * (self.signal_to_noise * denoise.process.sigma(s)).square()
        for _ in range(self.num_corrections):
            x = x + size * denoise.score(x, s) + (2 * size).sqrt() * torch.randn_like(x)
        return x
