r"""Times to step on, from the noisy end of a process to its start.

Equal steps of the process's own time, of :math:`\lambda = \log(\alpha / \sigma)`, or of a root of :math:`\sigma / \alpha`
(Karras et al., arXiv 2206.00364).
"""

from __future__ import annotations

__all__ = ["Spacing", "UniformLogSNR", "UniformSigma", "UniformTime"]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.dynamics.processes import Process


@dataclass(frozen=True)
class UniformTime:
    """Equal steps of the process's own time."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        """(steps + 1,), descending, float64."""
        return torch.linspace(process.end, process.start, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformLogSNR:
    """Equal steps of the log of the signal-to-noise ratio."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        """(steps + 1,), descending, float64."""
        return process.time(torch.linspace(*process.log_snr_range, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class UniformSigma:
    """Equal steps of a root of sigma / alpha, as in EDM (arXiv 2206.00364).

    Attributes:
        rho: which root; large ones dwell near the data.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise ValueError(f"UniformSigma wants a positive rho, but found {self.rho}.")

    def __call__(self, process: Process, steps: int) -> Tensor:
        """(steps + 1,), descending, float64."""
        low, high = (-torch.tensor(process.log_snr_range, dtype=torch.float64) / self.rho).exp()
        sigmas = torch.lerp(low, high, torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** self.rho
        return process.time(-sigmas.log())


Spacing = UniformTime | UniformLogSNR | UniformSigma
