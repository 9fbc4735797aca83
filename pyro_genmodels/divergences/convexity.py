r"""What a convex function is, from which divergences and critics are made, and how to bring one's own.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0), \qquad
    f^*(t) = \sup_{u \ge 0} \{u t - f(u)\}, \qquad f \text{ convex on } u > 0,\ f(1) = 0 .

Since :math:`f = f^{**}`, a function T with values where :math:`f^*` is finite gives the bound
:math:`D_f \ge \mathbb{E}_p T - \mathbb{E}_q f^*(T)`, which is tight at :math:`T = f'(p / q)`. Csiszár (1967); Liese and Vajda,
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

_REACH = 50.0  # the largest |log u| that a function of the user's own is asked at
_MANY = 6.0  # of the log ratios on whose grid it is checked


@dataclass(frozen=True)
class ConvexFunction(ABC):
    r"""A convex f over u > 0 with f(1) = 0, its derivative, its conjugate, and its part as the loss of a critic.

    A new one says `__call__` and the two limits; what else is here has defaults, by autograd.

    Attributes:
        at_zero: :math:`f(0+)`, may be infinite: what a point costs that only q has.
        slope_at_infinity: :math:`f'(\infty) = \lim f(u) / u`, may be infinite: what a point costs that only p has.
    """

    at_zero: ClassVar[float]
    slope_at_infinity: ClassVar[float]

    @abstractmethod
    def __call__(self, u: Tensor) -> Tensor:
        """f(u), of the shape of u > 0."""

    def derivative(self, u: Tensor) -> Tensor:
        """f'(u), of the shape of u > 0; with a graph where gradients are enabled and u asks for them."""
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
        r"""Between what the conjugate is finite: all numbers up to :math:`f'(\infty)`."""
        return -inf, self.slope_at_infinity

    @abstractmethod
    def conjugate(self, t: Tensor) -> Tensor:
        r""":math:`f^*(t) = \sup_{u \ge 0} \{u t - f(u)\}`, of the shape of t; infinite outside of the domain."""

    def critic(self, v: Tensor) -> Tensor:
        """What a network puts out, any v (...), as numbers in the domain: f'(e^v), so that v is log p/q at best."""
        slope = self.derivative(_bounded(v.double()).exp())
        return slope.clamp(max=self.slope_at_infinity).to(v)  # which rounding may pass

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        """The conjugate of `critic(v)`, of the shape of v: u f'(u) - f(u) at u = e^v."""
        u = _bounded(v.double()).exp()
        return (u * self.derivative(u) - self(u)).to(v)

    def log_ratio(self, v: Tensor) -> Tensor:
        """The log of p/q that the output v of a critic stands for, of the shape of v.

        Raises:
            ValueError: where the best critic does not tell it.
        """
        return v

    def mean_term(self, log_ratio: Tensor) -> Tensor:
        r"""What has the divergence as its mean under the equal mixture of p and q: h(r) = 2 q f(p/q) / (p + q).

        Args:
            log_ratio: r = log p - log q (...); infinite where one of the two is zero.

        Returns:
            h(r) (...): stable, and :math:`2 f'(\infty)` at infinity and 2 f(0+) at minus infinity. NaN stays NaN.
        """
        finite = log_ratio.isfinite()
        inside = self._mean_term(torch.where(finite, log_ratio, 0.0))
        limits = torch.where(log_ratio > 0, 2 * self.slope_at_infinity, 2 * self.at_zero).to(inside)
        return torch.where(finite, inside, torch.where(log_ratio.isnan(), torch.nan, limits))

    def _mean_term(self, r: Tensor) -> Tensor:
        return (2 * self(_bounded(r.double()).exp()) * _bounded(-r.double()).sigmoid()).to(r)


@dataclass(frozen=True)
class Convex(ConvexFunction):
    r"""A convex function of the user's own.

    The conjugate is found by bisection: since f' rises, the u at which it passes t is halved in on, for every element of t at
    once, between :math:`e^{-50}` and :math:`e^{50}`, in double precision. Its gradient is that
    u. Log ratios beyond 50 count as 50.

    Args:
        function: f, of tensors, element by element, made of torch's operations; defined for u > 0.
        at_zero: the limit f(0+), which may be infinite.
        slope_at_infinity: the limit of f'(u), which may be infinite.

    Raises:
        ValueError: if f(1) is not 0; if f is not finite and convex on a grid between :math:`e^{-6}` and :math:`e^6`; if a limit
            is below what a tangent of f says. A limit that is too high is not noticed.

    Example:
        >>> from math import inf
        >>> quarter = Convex(lambda u: (u**4 - 1 - 4 * (u - 1)) / 12, at_zero=0.25, slope_at_infinity=inf)
        >>> quarter.conjugate(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.2500,  0.0000,  1.3374])
        >>> Convex(torch.sqrt, at_zero=0.0, slope_at_infinity=0.0)
        Traceback (most recent call last):
        ValueError: Convex wants f(1) = 0, but found 1. Subtract it from f: a constant makes no divergence.
    """

    function: Callable[[Tensor], Tensor]
    _: KW_ONLY
    at_zero: float
    slope_at_infinity: float

    def __post_init__(self) -> None:
        one = float(self(torch.ones((), dtype=torch.float64)))
        if not abs(one) < 1e-6:
            raise ValueError(f"Convex wants f(1) = 0, but found {one:g}. Subtract it from f: a constant makes no divergence.")
        u = torch.linspace(-_MANY, _MANY, 601, dtype=torch.float64).exp()
        with torch.no_grad():
            f = self(u)
        if f.shape != u.shape or not f.isfinite().all():
            raise ValueError(
                f"Convex wants a finite number for each u > 0, but for {len(u)} of them found {f.isfinite().sum()} finite "
                f"numbers of shape {tuple(f.shape)}. Use torch's functions of single elements."
            )
        chords = f.diff() / u.diff()
        rounding = 1e-12 * (f[1:].abs() + f[:-1].abs() + 1e-3) / u.diff()
        bent = (chords.diff() < -(rounding[1:] + rounding[:-1])).nonzero()
        if len(bent):
            raise ValueError(
                f"Convex wants a function whose slope never falls, but at u = {u[bent[0] + 1].item():.3g} it does. See "
                "whether its sign is right: -log(u) is convex, log(u) is not."
            )
        slopes = self.derivative(u)
        for name, found, least in (
            ("at_zero", self.at_zero, f - u * slopes),
            ("slope_at_infinity", self.slope_at_infinity, slopes),
        ):
            if not found >= least.max() - 1e-6 * (1 + least.max().abs()):
                raise ValueError(
                    f"Convex wants {name} to be a limit, but found {found}, and a tangent says {least.max():.6g} or more."
                )

    def __call__(self, u: Tensor) -> Tensor:
        return self.function(u)

    def conjugate(self, t: Tensor) -> Tensor:
        exact, goal = t.double(), t.detach().double()
        low, high = torch.full_like(goal, -_REACH), torch.full_like(goal, _REACH)
        for _ in range(60):
            middle = (low + high) / 2
            rises = self.derivative(middle.exp()) < goal
            low, high = torch.where(rises, middle, low), torch.where(rises, high, middle)
        u = ((low + high) / 2).exp()
        with torch.no_grad():
            f = self(u)
        value = u * exact - f
        if isfinite(self.at_zero):  # where the supremum is there
            value = torch.where(high < 1 - _REACH, -self.at_zero, value)
        return torch.where(exact > self.slope_at_infinity, inf, value).to(t.dtype)


def _bounded(v: Tensor) -> Tensor:
    return v.clamp(-_REACH, _REACH)
