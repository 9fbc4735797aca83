r"""Affine functions of one variable, increasing and with a bounded slope.

.. math:: y = e^a x + b, \qquad a = \frac{s}{1 + |s| / l}, \quad |a| < l .

They are the same functions of the same parameters s and b as zuko's, by half of the operations. Papamakarios et al., *Masked
Autoregressive Flow* (arXiv 1705.07057), have no bound.
"""

from __future__ import annotations

__all__ = ["BoundedAffine"]

from math import log

import torch
from torch import Tensor
from torch.distributions import Transform, constraints


class BoundedAffine(Transform):
    """An affine function of each coordinate.

    Args:
        shift: b above.
        scale: unconstrained scale, s above, of the shape of `shift`.
        slope: smallest slope; the largest is its inverse.

    Example:
        >>> affine = BoundedAffine(torch.tensor(1.0), torch.tensor(0.0))
        >>> affine(torch.tensor(3.0)), affine.inv(torch.tensor(7.0))
        (tensor(4.), tensor(6.))
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(self, shift: Tensor, scale: Tensor, *, slope: float = 1e-3) -> None:
        super().__init__()
        self.shift = shift
        self.log_slope = scale / (1 + scale.abs() * (1 / abs(log(slope))))

    def _call(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.log_slope.exp())

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx, both of the shape of x."""
        return self._call(x), self.log_slope.expand(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-self.log_slope).exp()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log dy/dx, of the shape of x."""
        return self.log_slope.expand(x.shape)
