r"""Rational-quadratic splines: increasing functions of one variable, piecewise and invertible in closed form.

On bin k, of width :math:`w` and height :math:`h` with slope :math:`s = h / w`, with derivatives :math:`d_0, d_1` at its ends
and :math:`z = (x - x_k) / w` in [0, 1],

.. math::

    y = y_k + h \, \frac{s z^2 + d_0 z (1 - z)}{s + (d_0 + d_1 - 2 s) z (1 - z)}, \qquad
    \frac{dy}{dx} = s^2 \, \frac{d_1 z^2 + 2 s z (1 - z) + d_0 (1 - z)^2}{(s + (d_0 + d_1 - 2 s) z (1 - z))^2} .

The spline maps [-b, b] to itself, with derivative 1 at both ends, and is the identity outside. It is the same function of the
same parameters as zuko's, by a third of the operations: widths and heights are normalised together, the knots beside a value
are read at once, and derivatives are computed at these knots only.

Durkan et al., *Neural Spline Flows* (arXiv 1906.04032).
"""

from __future__ import annotations

__all__ = ["RationalQuadraticSpline"]

from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Transform, constraints

_X, _Y = 0, 1


class RationalQuadraticSpline(Transform):
    """A spline of K bins for each coordinate.

    Args:
        widths: unconstrained widths of the bins, (..., K).
        heights: unconstrained heights of the bins, (..., K).
        derivatives: unconstrained derivatives at the inner knots, (..., K - 1).
        bound: b above, or one for each coordinate.
        slope: smallest slope between two knots if all bins were alike.

    Example:
        >>> spline = RationalQuadraticSpline(torch.zeros(8), torch.zeros(8), torch.zeros(7))  # equal bins: the identity
        >>> spline(torch.tensor(1.5)), spline.inv(torch.tensor(7.0))
        (tensor(1.5000), tensor(7.))
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = +1

    def __init__(
        self, widths: Tensor, heights: Tensor, derivatives: Tensor, *, bound: float | Tensor = 5.0, slope: float = 1e-3
    ) -> None:
        super().__init__()
        self.bound: Any = bound
        self.limit = abs(log(slope))
        self.bounds = bound.unsqueeze(-1) if isinstance(bound, Tensor) else bound  # on both axes
        sizes = torch.stack((widths, heights), -2)
        sizes = (sizes / (1 + sizes.abs() * (2 / self.limit))).exp()  # at most slope ** -0.5: nothing overflows
        self.sums = F.pad(sizes, (1, 0)).cumsum(-1)  # (..., 2, K + 1): the knots in a unit of their own, from 0 on
        self.derivatives = F.pad(derivatives, (1, 1))  # (..., K + 1); 0 stands for a derivative of 1

    @property
    def bins(self) -> int:
        """Number of bins."""
        return self.derivatives.shape[-1] - 1

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log dy/dx, of the shape of x."""
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and log dy/dx, both of the shape of x."""
        x0, y0, width, height, d0, d1 = self._bin(x, _X)
        z = (x.clamp(-self.bound, self.bound) - x0) / width
        slope, rest = height / width, 1 - z
        middle = z * rest
        denominator = slope + (d0 + d1 - 2 * slope) * middle
        y = y0 + height * (slope * z * z + d0 * middle) / denominator
        numerator = d1 * z * z + 2 * slope * middle + d0 * rest * rest
        ladj = ((slope / denominator).square() * numerator).log()
        inside = self._is_inside(x)
        return torch.where(inside, y, x), torch.where(inside, ladj, 0.0)

    def _inverse(self, y: Tensor) -> Tensor:
        x0, y0, width, height, d0, d1 = self._bin(y, _Y)
        slope, rise = height / width, (y.clamp(-self.bound, self.bound) - y0) / height
        curve = rise * (d0 + d1 - 2 * slope)
        a, b, c = slope - d0 + curve, d0 - curve, -slope * rise
        z = 2 * c / (-b - (b * b - 4 * a * c).clamp(min=0).sqrt())  # rounding may make it negative
        return torch.where(self._is_inside(y), x0 + z * width, y)

    def _is_inside(self, values: Tensor) -> Tensor:
        """Return True for each x, or y, at which the spline is not the identity."""
        return values.abs() < self.bound

    def _bin(self, values: Tensor, axis: int) -> tuple[Tensor, ...]:
        """Return the bin of each value: its corner and size on both axes and its derivatives, six tensors of their shape.

        Values outside of the spline get the nearest bin.

        Args:
            values: x, or y.
            axis: 0 for x, 1 for y.
        """
        unit = 2 * self.bounds / self.sums[..., -1]  # (..., 2)
        found = (values + self.bound) / unit[..., axis]
        left = (self.sums[..., axis, 1:-1] < found.unsqueeze(-1)).sum(-1, keepdim=True)
        both = torch.cat((left, left + 1), -1)  # (..., 2)
        start, end = self._at(self.sums, both.unsqueeze(-2), (*both.shape[:-1], 2)).unbind(-1)
        corner, size = start * unit - self.bounds, (end - start) * unit
        raw = self._at(self.derivatives, both, both.shape[:-1])
        derivatives = (raw / (1 + raw.abs() / self.limit)).exp()
        return *corner.unbind(-1), *size.unbind(-1), *derivatives.unbind(-1)

    @staticmethod
    def _at(table: Tensor, index: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Return the two entries of a table (..., K + 1) at an index (..., 2), for one batch shape: (*batch, 2)."""
        return table.expand(*batch, table.shape[-1]).gather(-1, index.expand(*batch, 2))
