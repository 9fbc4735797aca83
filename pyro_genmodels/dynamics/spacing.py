r"""Times of the steps of a reverse process, from the noisy end of a process to its start.

Steps are equal in the time of the process, in :math:`\lambda = \log(\alpha / \sigma)`, or in a root of :math:`\sigma / \alpha`
(Karras et al., arXiv 2206.00364).
"""

from __future__ import annotations

__all__ = ["Spacing", "UniformLogSNR", "UniformSigma", "UniformTime", "check_num_steps"]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from pyro_genmodels.dynamics.processes import Process


@dataclass(frozen=True)
class Spacing(ABC):
    """Base class of spacings."""

    @abstractmethod
    def __call__(self, process: Process, steps: int) -> Tensor:
        """Return the times of so many steps in descending order, (steps + 1,), float64."""


@dataclass(frozen=True)
class UniformTime(Spacing):
    """Equal steps of the process's time."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        return torch.linspace(process.end, process.start, steps + 1, dtype=torch.float64)


@dataclass(frozen=True)
class UniformLogSNR(Spacing):
    """Equal steps of the log signal-to-noise ratio."""

    def __call__(self, process: Process, steps: int) -> Tensor:
        return process.time(torch.linspace(*process.log_snr_range, steps + 1, dtype=torch.float64))


@dataclass(frozen=True)
class UniformSigma(Spacing):
    """Equal steps of a root of sigma / alpha, as in EDM (arXiv 2206.00364).

    Attributes:
        rho: order of the root. Large orders give many steps near the data.
    """

    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0 < self.rho < float("inf"):
            raise ValueError(f"UniformSigma wants a positive rho, but found {self.rho}.")

    def __call__(self, process: Process, steps: int) -> Tensor:
        low, high = (-torch.tensor(process.log_snr_range, dtype=torch.float64) / self.rho).exp()
        sigmas = torch.lerp(low, high, torch.linspace(0, 1, steps + 1, dtype=torch.float64)) ** self.rho
        return process.time(-sigmas.log())


def check_num_steps(owner: object, num_steps: int) -> None:
    """Raise a ValueError that names the class of the owner unless the number of steps is a positive integer."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral) or num_steps < 1:
        raise ValueError(f"{type(owner).__name__} wants an integer num_steps of 1 or more, but found {num_steps!r}.")
