r"""Kernels: similarities of two samples as functions of the distance between them.

With :math:`r = |x - y|` and a bandwidth h in the units of the data,

.. math:: k_{\mathrm{Gauss}} = e^{-r^2 / 2h^2}, \quad k_{\mathrm{Laplace}} = e^{-r / h}, \quad
    k_{\mathrm{RQ}} = \operatorname{mean}_\alpha \Bigl(1 + \frac{r^2}{2 \alpha h^2}\Bigr)^{-\alpha}, \quad
    k_{\mathrm{energy}} = -r .

The first three are characteristic: they tell any two distributions apart. So is the last, for distributions with a finite mean;
it is only conditionally positive definite, which is enough for a discrepancy. A bandwidth of None is the median distance
between two samples (Gretton et al., JMLR 2012).

Bińkowski et al., *Demystifying MMD GANs* (arXiv 1801.01401), for rational quadratics; Sejdinovic et al., *Equivalence of
distance-based and RKHS-based statistics* (arXiv 1207.6076), for the energy distance.
"""

from __future__ import annotations

__all__ = [
    "EnergyKernel", "GaussianKernel", "Kernel", "LaplaceKernel", "RationalQuadraticKernel", "ScaledKernel", "check_kernel",
    "check_kernel_values", "median_distance", "squares_in_bandwidths",
]  # fmt: skip

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_genmodels.utils.distances import distances
from pyro_genmodels.utils.errors import repr_or_class
from pyro_genmodels.utils.precision import common_dtype, in_doubles

MAX_MEDIAN_ROWS = 2000
"""Largest number of rows, evenly spaced among all, whose median distance is computed."""


class Kernel(ABC):
    """Symmetric function of two samples. Subclasses are frozen dataclasses of their options.

    Attributes:
        bounded: True if all values are below some bound, so that a mean of them has no heavy tail.
    """

    bounded: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the kernel matrix (n, m) of samples x (n, d) and y (m, d), with gradients to both."""

    def fitted(self, x: Tensor, y: Tensor | None = None) -> Kernel:
        """Return the kernel with its open options set from samples x (n, d) and, if given, y (m, d)."""
        return self


@dataclass(frozen=True)
class ScaledKernel(Kernel):
    """Kernel with a bandwidth.

    Args:
        bandwidth: h, in the units of the data; None is the median distance.
    """

    bounded: ClassVar[bool] = True
    bandwidth: float | Tensor | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is None or isinstance(self.bandwidth, Tensor):
            return
        if isinstance(self.bandwidth, bool) or not 0 < self.bandwidth < float("inf"):
            raise ValueError(
                f"{type(self).__name__} wants a positive bandwidth, in the units of the data, or None for the median distance, "
                f"but found {self.bandwidth!r}."
            )

    def fitted(self, x: Tensor, y: Tensor | None = None) -> Kernel:
        return self if self.bandwidth is not None else replace(self, bandwidth=median_distance(x, y))

    @property
    def _width(self) -> Any:
        if self.bandwidth is None:
            raise ValueError(
                f"{type(self).__name__} has no bandwidth yet. Pass one, or set it from samples: kernel.fitted(x, y)."
            )
        return self.bandwidth


class GaussianKernel(ScaledKernel):
    """Gaussian kernel.

    Args:
        bandwidth: h, in the units of the data; None is the median distance.

    Example:
        >>> GaussianKernel(bandwidth=1.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.3679]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (squares_in_bandwidths(x, y, self._width) / -2).exp()


class LaplaceKernel(ScaledKernel):
    """Laplace kernel of the Euclidean distance, more sensitive to small differences than the Gaussian.

    Args:
        bandwidth: h, in the units of the data; None is the median distance.

    Example:
        >>> LaplaceKernel(bandwidth=5.0)(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[0.3679]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (distances(x, y) / -self._width).exp()


@dataclass(frozen=True)
class RationalQuadraticKernel(ScaledKernel):
    """Mean of rational quadratic kernels, for training: its gradients do not vanish at large distances.

    Args:
        bandwidth: h, in the units of the data; None is the median distance.
        alphas: positive exponents; smaller ones give larger gradients at large distances.

    Example:
        >>> RationalQuadraticKernel(bandwidth=1.0, alphas=(1.0,))(torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[0.5000]])
    """

    alphas: Sequence[float] = (0.2, 0.5, 1.0, 2.0, 5.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or not all(alpha > 0 and isfinite(alpha) for alpha in self.alphas):
            raise ValueError(
                f"RationalQuadraticKernel wants positive alphas, such as (0.5, 1.0, 2.0), but found {self.alphas!r}."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        squares = squares_in_bandwidths(x, y, self._width) / 2
        parts = [(-alpha * (squares / alpha).log1p()).exp() for alpha in self.alphas]
        return torch.stack(parts).mean(0)


@dataclass(frozen=True)
class EnergyKernel(Kernel):
    r"""Kernel of the energy distance, :math:`-|x - y|`.

    The squared discrepancy is :math:`2 \mathbb{E}|x - y| - \mathbb{E}|x - x'| - \mathbb{E}|y - y'|`, in the units of the data.
    The kernel has no bandwidth, and is sensitive to differences at all scales.

    Example:
        >>> EnergyKernel()(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]))
        tensor([[-5.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return -distances(x, y)


def check_kernel(kernel: Any, *, by: str) -> Kernel:
    """Return the kernel; raise a TypeError for anything else."""
    if not isinstance(kernel, Kernel):
        raise TypeError(f"{by} wants a kernel such as GaussianKernel() or EnergyKernel(), but found {repr_or_class(kernel)}.")
    return kernel


def check_kernel_values(values: Tensor, kernel: Kernel, *, by: str) -> None:
    """Raise a ValueError unless all values computed from a kernel are finite."""
    if not values.detach().isfinite().all():
        raise ValueError(
            f"{by} wants a kernel with finite values, but {kernel!r} returned NaN or infinity. Check its bandwidth."
        )


def median_distance(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return the median distance between two samples of x (n, d) and, if given, y (m, d): a scalar without graph.

    It is the mean distance if most samples are equal, 1 if all are, and NaN if one of them holds NaN.
    """
    with torch.no_grad():
        both = x if y is None else torch.cat([x, y])
        if len(both) > MAX_MEDIAN_ROWS:
            both = both[torch.linspace(0, len(both) - 1, MAX_MEDIAN_ROWS).long().to(both.device)]
        pairs = torch.pdist(in_doubles(both))
        if not len(pairs):
            return both.new_ones(())
        middle, mean = pairs.median(), pairs.mean()
        return torch.where(middle == 0, torch.where(mean == 0, 1.0, mean), middle).to(both.dtype)


def squares_in_bandwidths(x: Tensor, y: Tensor, bandwidth: float | Tensor) -> Tensor:
    """Return squared distances (n, m) of samples x (n, d) and y (m, d) in units of the bandwidth, with gradients of any order.

    They come from a product of matrices, in double precision. Its error is 1e-16 times the square of the distance in bandwidths
    from the median of all samples, so that far samples cost the others no precision.
    """
    dtype = common_dtype(x, y)
    x, y = in_doubles(x), in_doubles(y)
    centre = torch.cat([x.detach(), y.detach()]).median(0).values
    x, y = (x - centre) / bandwidth, (y - centre) / bandwidth
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    below = squares.detach().clamp(max=0)  # by rounding; a clamp would cut derivatives off
    return (squares - below).to(dtype)
