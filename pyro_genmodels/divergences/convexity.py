r"""Convex functions that define f-divergences and the losses of critics: the base class, and functions of your own.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0), \qquad
    f^*(t) = \sup_{u \ge 0} \{u t - f(u)\}, \qquad f \text{ convex on } u > 0,\ f(1) = 0 .

Since :math:`f = f^{**}`, any function T with values in the domain of :math:`f^*` gives the bound
:math:`D_f \ge \mathbb{E}_p T - \mathbb{E}_q f^*(T)`, which is tight for :math:`T = f'(p / q)`. Csiszár (1967); Liese and Vajda,
*On Divergences and Informations* (2006); Nguyen et al. (arXiv 0809.0853); Nowozin et al., *f-GAN* (arXiv 1606.00709).
"""

from __future__ import annotations

__all__ = ["Convex", "ConvexFunction"]

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from math import inf, isfinite
from typing import ClassVar

import torch
from torch import Tensor

_MAX_LOG_RATIO = 50.0  # largest |log u| at which a function is evaluated
_MAX_CHECKED_LOG_RATIO = 6.0  # largest |log u| on the grid where convexity is checked


@dataclass(frozen=True)
class ConvexFunction(ABC):
    r"""Convex function f of u > 0 with f(1) = 0, with its derivative, its conjugate, and the loss of a critic.

    A subclass defines `__call__`, `conjugate` and the two limits; the other methods have defaults by autograd.

    Attributes:
        at_zero: :math:`f(0+)`, the contribution of points where only q has mass; may be infinite.
        slope_at_infinity: :math:`f'(\infty) = \lim f(u) / u`, the contribution of points where only p has mass; may be
            infinite.
    """

    at_zero: ClassVar[float]
    slope_at_infinity: ClassVar[float]
    power: ClassVar[tuple[float, float] | None] = None
    """(alpha, factor) if f is factor times `Alpha(alpha)`, which has closed forms for normal distributions; None for others."""
    kullback_leibler: ClassVar[tuple[str, ...]] = ()
    """Names of the KL divergences, "forward" and "reverse", whose sum the divergence is; empty for others."""

    @property
    def bounded(self) -> bool:
        """True if both limits are finite; the divergence and all terms of its mean are then bounded."""
        return isfinite(self.at_zero) and isfinite(self.slope_at_infinity)

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """Return f(u), of the shape of u > 0."""

    def derivative(self, u: Tensor) -> Tensor:
        """Return f'(u), of the shape of u > 0, with a graph if gradients are enabled and u requires them."""
        create_graph = torch.is_grad_enabled() and u.requires_grad
        with torch.enable_grad():
            u = u if create_graph else u.detach().requires_grad_()
            value = self(u).sum()
            if not value.requires_grad:
                return torch.zeros_like(u)
            (slope,) = torch.autograd.grad(value, u, create_graph=create_graph, materialize_grads=True)
        return slope

    @property
    def domain(self) -> tuple[float, float]:
        r"""Interval where the conjugate is finite: all numbers up to :math:`f'(\infty)`."""
        return -inf, self.slope_at_infinity

    @abstractmethod
    def conjugate(self, t: Tensor) -> Tensor:
        r"""Return :math:`f^*(t) = \sup_{u \ge 0} \{u t - f(u)\}`, of the shape of t; infinite outside of the domain."""

    def critic(self, v: Tensor) -> Tensor:
        """Return f'(e^v), which maps a network's output v (...) into the domain; the optimal v is then log p/q."""
        slope = self.derivative(_bounded(v.double()).exp())
        return slope.clamp(max=self.slope_at_infinity).to(v)  # rounding may exceed it

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        """Return the conjugate of `critic(v)`, u f'(u) - f(u) at u = e^v, of the shape of v."""
        u = _bounded(v.double()).exp()
        return (u * self.derivative(u) - self(u)).to(v)

    def log_ratio(self, v: Tensor) -> Tensor:
        """Return the log of p/q for which v is the optimal output, of the shape of v.

        Raises:
            ValueError: if the optimal critic does not determine the ratio.
        """
        return v

    def mean_term(self, log_ratio: Tensor) -> Tensor:
        r"""Return h(r) = 2 q f(p/q) / (p + q), whose mean under the equal mixture of p and q is the divergence.

        Args:
            log_ratio: r = log p - log q (...); infinite if one of the two is zero.

        Returns:
            h(r) (...), computed without overflow; :math:`2 f'(\infty)` at infinity and 2 f(0+) at minus infinity. NaN stays
            NaN.
        """
        finite = log_ratio.isfinite()
        inside = self._mean_term(torch.where(finite, log_ratio, 0.0))
        limits = torch.where(log_ratio > 0, 2 * self.slope_at_infinity, 2 * self.at_zero).to(inside)
        return torch.where(finite, inside, torch.where(log_ratio.isnan(), torch.nan, limits))

    def _mean_term(self, r: Tensor) -> Tensor:
        """Return h(r) for finite r."""
        return (2 * self(_bounded(r.double()).exp()) * _bounded(-r.double()).sigmoid()).to(r)


@dataclass(frozen=True)
class Convex(ConvexFunction):
    r"""Convex function of your own.

    The conjugate is found by bisection of f'(u) = t, which works because f' increases. It runs for all elements of t at once,
    between :math:`e^{-50}` and :math:`e^{50}`, in double precision. The gradient of the conjugate is that u. Log ratios beyond
    50 are cut at 50.

    Args:
        function: f, an elementwise function of tensors of torch operations, defined for u > 0.
        at_zero: limit f(0+); may be infinite.
        slope_at_infinity: limit of f'(u); may be infinite.

    Raises:
        ValueError: if f(1) is not 0; if f is not finite and convex on a grid between :math:`e^{-6}` and :math:`e^6`; if a limit
            is lower than a tangent of f allows. A limit that is too high is not detected.

    Example:
        >>> from math import inf
        >>> quarter = Convex(lambda u: (u**4 - 1 - 4 * (u - 1)) / 12, at_zero=0.25, slope_at_infinity=inf)
        >>> quarter.conjugate(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.2500,  0.0000,  1.3374])
        >>> Convex(torch.sqrt, at_zero=0.0, slope_at_infinity=0.0)
        Traceback (most recent call last):
        ValueError: Convex wants f(1) = 0, but found 1. Subtract it from f.
    """

    function: Callable[[Tensor], Tensor]
    _: KW_ONLY
    at_zero: float
    slope_at_infinity: float

    def __post_init__(self) -> None:
        one = float(self(torch.ones((), dtype=torch.float64)))
        if not abs(one) < 1e-6:
            raise ValueError(f"Convex wants f(1) = 0, but found {one:g}. Subtract it from f.")
        u = torch.linspace(-_MAX_CHECKED_LOG_RATIO, _MAX_CHECKED_LOG_RATIO, 601, dtype=torch.float64).exp()
        with torch.no_grad():
            f = self(u)
        if f.shape != u.shape or not f.isfinite().all():
            raise ValueError(
                f"Convex wants a finite number for each u > 0, but for {len(u)} of them found {f.isfinite().sum()} finite "
                f"numbers of shape {tuple(f.shape)}. Use elementwise torch functions."
            )
        chords = f.diff() / u.diff()
        rounding = 1e-12 * (f[1:].abs() + f[:-1].abs() + 1e-3) / u.diff()
        concave = (chords.diff() < -(rounding[1:] + rounding[:-1])).nonzero()
        if len(concave):
            raise ValueError(
                f"Convex wants a function whose slope never falls, but it falls at u = {u[concave[0] + 1].item():.3g}. Check "
                "the sign: -log(u) is convex, log(u) is not."
            )
        slopes = self.derivative(u)
        for name, found, least in (
            ("at_zero", self.at_zero, f - u * slopes),
            ("slope_at_infinity", self.slope_at_infinity, slopes),
        ):
            if not found >= least.max() - 1e-6 * (1 + least.max().abs()):
                raise ValueError(
                    f"Convex wants {name} to be a limit, but found {found}, and a tangent of f shows that it is "
                    f"{least.max():.6g} or more. Compute the limit again."
                )

    def __call__(self, u: Tensor) -> Tensor:
        return self.function(u)

    def conjugate(self, t: Tensor) -> Tensor:
        exact, goal = t.double(), t.detach().double()
        low, high = torch.full_like(goal, -_MAX_LOG_RATIO), torch.full_like(goal, _MAX_LOG_RATIO)
        for _ in range(60):
            middle = (low + high) / 2
            is_below = self.derivative(middle.exp()) < goal
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        u = ((low + high) / 2).exp()
        with torch.no_grad():
            f = self(u)
        value = u * exact - f
        if isfinite(self.at_zero):  # the supremum can be at u = 0
            value = torch.where(high < 1 - _MAX_LOG_RATIO, -self.at_zero, value)
        return torch.where(exact > self.slope_at_infinity, inf, value).to(t.dtype)


def _bounded(v: Tensor) -> Tensor:
    """Return log ratios cut at the largest one at which a function is evaluated."""
    return v.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
