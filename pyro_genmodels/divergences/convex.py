r"""Convex functions f of the named f-divergences and of the family of powers.

.. math:: D_f(p \| q) = \mathbb{E}_q\, f(p / q) + f'(\infty)\, P_p(q = 0)

Each class has its limits, its conjugate and its critic in closed form (Nowozin et al., *f-GAN*, arXiv 1606.00709, table 6,
which does not restrict the conjugate to u >= 0). Mean terms are functions of r = log p - log q, so that no density ratio
overflows. See `convexity` for the definitions, and for functions of your own.
"""

from __future__ import annotations

__all__ = [
    "Alpha", "Convex", "ConvexFunction", "Jeffreys", "JensenShannon", "KullbackLeibler", "NeymanChiSquared",
    "PearsonChiSquared", "ReverseKullbackLeibler", "SquaredHellinger", "TotalVariation",
]  # fmt: skip

from dataclasses import dataclass
from math import inf, isfinite, log
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_genmodels.divergences.convexity import Convex, ConvexFunction


class KullbackLeibler(ConvexFunction):
    r""":math:`f(u) = u \log u`: KL(p || q). :math:`f^*(t) = e^{t - 1}`.

    Example:
        >>> KullbackLeibler().conjugate(torch.tensor([1.0]))
        tensor([1.])
    """

    at_zero: ClassVar[float] = 0.0
    slope_at_infinity: ClassVar[float] = inf
    kullback_leibler: ClassVar[tuple[str, ...]] = ("forward",)

    def __call__(self, u: Tensor) -> Tensor:
        return u * u.log()

    def derivative(self, u: Tensor) -> Tensor:
        return u.log() + 1

    def conjugate(self, t: Tensor) -> Tensor:
        return (t - 1).exp()

    def critic(self, v: Tensor) -> Tensor:
        return v + 1

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return v.exp()

    def _mean_term(self, r: Tensor) -> Tensor:
        return 2 * r * r.sigmoid()


class ReverseKullbackLeibler(ConvexFunction):
    r""":math:`f(u) = -\log u`: KL(q || p). :math:`f^*(t) = -1 - \log(-t)` for t < 0."""

    at_zero: ClassVar[float] = inf
    slope_at_infinity: ClassVar[float] = 0.0
    kullback_leibler: ClassVar[tuple[str, ...]] = ("reverse",)

    def __call__(self, u: Tensor) -> Tensor:
        return -u.log()

    def derivative(self, u: Tensor) -> Tensor:
        return -1 / u

    def conjugate(self, t: Tensor) -> Tensor:
        return _infinite_above(0.0, t, -1 - (-_inside(0.0, t)).log())

    def critic(self, v: Tensor) -> Tensor:
        return -(-v).exp()

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return v - 1

    def _mean_term(self, r: Tensor) -> Tensor:
        return -2 * r * (-r).sigmoid()


class Jeffreys(ConvexFunction):
    r""":math:`f(u) = (u - 1) \log u`: the sum of KL(p || q) and KL(q || p).

    :math:`f^*(t) = u - 1 + \log u` with :math:`\log u + 1 - 1/u = t`. Its solution u = 1 / W(exp(1 - t)), with Lambert's
    function W, is found by Newton's iteration.
    """

    at_zero: ClassVar[float] = inf
    slope_at_infinity: ClassVar[float] = inf
    kullback_leibler: ClassVar[tuple[str, ...]] = ("forward", "reverse")

    def __call__(self, u: Tensor) -> Tensor:
        return (u - 1) * u.log()

    def derivative(self, u: Tensor) -> Tensor:
        return u.log() + 1 - 1 / u

    def conjugate(self, t: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.where(t > 0, (t - 1).clamp(min=0), -(-t.clamp(max=0)).log1p())  # left of the root: steps increase
            for _ in range(10):
                y = y - (y - (-y).expm1() - t) / (1 + (-y).exp())
        y = y - (y - (-y).expm1() - t) / (1 + (-y).exp())  # the last step carries the gradient
        return y + y.expm1()

    def critic(self, v: Tensor) -> Tensor:
        return v - (-v).expm1()

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return v + v.expm1()

    def _mean_term(self, r: Tensor) -> Tensor:
        return 2 * r * (r / 2).tanh()


class JensenShannon(ConvexFunction):
    r""":math:`f(u) = \tfrac12 [u \log u - (u + 1) \log \tfrac{u + 1}{2}]`: (KL(p || m) + KL(q || m)) / 2 for m = (p + q) / 2.

    At most log 2. :math:`f^*(t) = -\tfrac12 \log(2 - e^{2t})`, t < log(2) / 2.
    """

    at_zero: ClassVar[float] = log(2) / 2
    slope_at_infinity: ClassVar[float] = log(2) / 2

    def __call__(self, u: Tensor) -> Tensor:
        return (u * u.log() - (u + 1) * ((u + 1) / 2).log()) / 2

    def derivative(self, u: Tensor) -> Tensor:
        return (2 * u / (u + 1)).log() / 2

    def conjugate(self, t: Tensor) -> Tensor:
        return _infinite_above(log(2) / 2, t, -(2 - (2 * _inside(log(2) / 2, t)).exp()).log() / 2)

    def critic(self, v: Tensor) -> Tensor:
        return (log(2) + logsigmoid(v)) / 2

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return -(log(2) + logsigmoid(-v)) / 2

    def _mean_term(self, r: Tensor) -> Tensor:
        return log(2) + r.sigmoid() * logsigmoid(r) + (-r).sigmoid() * logsigmoid(-r)


class TotalVariation(ConvexFunction):
    r""":math:`f(u) = |u - 1| / 2`: the largest difference between the probabilities of an event; at most 1.

    :math:`f^*(t) = \max(t, -\tfrac12)` for :math:`t \le \tfrac{1}{2}`. The optimal critic is half the sign of p - q. It does
    not determine the ratio p/q.
    """

    at_zero: ClassVar[float] = 0.5
    slope_at_infinity: ClassVar[float] = 0.5

    def __call__(self, u: Tensor) -> Tensor:
        return (u - 1).abs() / 2

    def derivative(self, u: Tensor) -> Tensor:
        return (u - 1).sign() / 2

    def conjugate(self, t: Tensor) -> Tensor:
        return _infinite_above(0.5, t, t.clamp(min=-0.5))

    def critic(self, v: Tensor) -> Tensor:
        return v.tanh() / 2

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return v.tanh() / 2

    def log_ratio(self, v: Tensor) -> Tensor:
        raise ValueError(
            "The optimal critic of TotalVariation is the sign of p - q, which does not determine their ratio. Use "
            "JensenShannon, SquaredHellinger or KullbackLeibler."
        )

    def _mean_term(self, r: Tensor) -> Tensor:
        return (r / 2).tanh().abs()


class SquaredHellinger(ConvexFunction):
    r""":math:`f(u) = (\sqrt u - 1)^2 / 2`: half the integral of :math:`(\sqrt p - \sqrt q)^2`; at most 1.

    :math:`f^*(t) = t / (1 - 2t)`, t < 1/2.
    """

    at_zero: ClassVar[float] = 0.5
    slope_at_infinity: ClassVar[float] = 0.5
    power: ClassVar[tuple[float, float] | None] = (0.5, 0.25)

    def __call__(self, u: Tensor) -> Tensor:
        return (u.sqrt() - 1).square() / 2

    def derivative(self, u: Tensor) -> Tensor:
        return (1 - u.rsqrt()) / 2

    def conjugate(self, t: Tensor) -> Tensor:
        below = _inside(0.5, t)
        return _infinite_above(0.5, t, below / (1 - 2 * below))

    def critic(self, v: Tensor) -> Tensor:
        return -(-v / 2).expm1() / 2

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return (v / 2).expm1() / 2

    def _mean_term(self, r: Tensor) -> Tensor:
        return (r / 2).tanh() * (r / 4).tanh()


class PearsonChiSquared(ConvexFunction):
    r""":math:`f(u) = (u - 1)^2`: the integral of :math:`(p - q)^2 / q`. :math:`f^*(t) = t + t^2 / 4` for t > -2, else -1.

    The critic is v itself, which makes its loss a square; its optimum is 2 (p/q - 1). The critic f'(e^v) = 2 (e^v - 1) would
    put e^{2v} into the loss, which needs many samples and gives large steps. The log ratio is log(1 + v / 2), bounded below by
    the log of the dtype's rounding.
    """

    at_zero: ClassVar[float] = 1.0
    slope_at_infinity: ClassVar[float] = inf
    power: ClassVar[tuple[float, float] | None] = (2.0, 2.0)

    def __call__(self, u: Tensor) -> Tensor:
        return (u - 1).square()

    def derivative(self, u: Tensor) -> Tensor:
        return 2 * (u - 1)

    def conjugate(self, t: Tensor) -> Tensor:
        return (t.clamp(min=-2) / 2 + 1).square() - 1

    def critic(self, v: Tensor) -> Tensor:
        return v

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return self.conjugate(v)

    def log_ratio(self, v: Tensor) -> Tensor:
        return (1 + v / 2).clamp(min=torch.finfo(v.dtype).eps).log()

    def _mean_term(self, r: Tensor) -> Tensor:
        return 2 * r.expm1() * (r / 2).tanh()


class NeymanChiSquared(ConvexFunction):
    r""":math:`f(u) = (u - 1)^2 / u`: the integral of :math:`(p - q)^2 / p`.

    :math:`f^*(t) = 2 - 2 \sqrt{1 - t}` for :math:`t \le 1`.
    """

    at_zero: ClassVar[float] = inf
    slope_at_infinity: ClassVar[float] = 1.0
    power: ClassVar[tuple[float, float] | None] = (-1.0, 2.0)

    def __call__(self, u: Tensor) -> Tensor:
        return (u - 1).square() / u

    def derivative(self, u: Tensor) -> Tensor:
        return 1 - u**-2

    def conjugate(self, t: Tensor) -> Tensor:
        return _infinite_above(1.0, t, 2 - 2 * (1 - t.clamp(max=1)).sqrt())

    def critic(self, v: Tensor) -> Tensor:
        return -(-2 * v).expm1()

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return -2 * (-v).expm1()

    def _mean_term(self, r: Tensor) -> Tensor:
        return -2 * (-r).expm1() * (r / 2).tanh()


@dataclass(frozen=True)
class Alpha(ConvexFunction):
    r""":math:`f(u) = (u^\alpha - 1 - \alpha (u - 1)) / (\alpha (\alpha - 1))`: the family of powers.

    :math:`f^*(t) = (u^\alpha - 1) / \alpha` with :math:`u = (1 + (\alpha - 1) t)_+^{1/(\alpha - 1)}`. Twice the divergence of
    alpha = 2 is Pearson's, twice that of -1 is Neyman's, and a quarter of that of 1/2 is the squared Hellinger distance.
    Cressie and Read (1984); Amari's alpha divergences.

    Args:
        alpha: any finite number but 0 and 1, whose limits are KL(q || p) and KL(p || q).

    Raises:
        ValueError: if alpha is 0, 1, or not finite.

    Example:
        >>> Alpha(2.0)(torch.tensor([1.0, 3.0]))
        tensor([0., 2.])
    """

    alpha: float

    def __post_init__(self) -> None:
        if self.alpha in (0, 1) or not isfinite(self.alpha):
            limit = {0.0: "ReverseKullbackLeibler()", 1.0: "KullbackLeibler()"}.get(self.alpha, "a number")
            raise ValueError(f"Alpha wants a finite alpha other than 0 and 1, but found {self.alpha}. Use {limit}.")

    @property
    def power(self) -> tuple[float, float]:
        return self.alpha, 1.0

    @property
    def at_zero(self) -> float:
        return 1 / self.alpha if self.alpha > 0 else inf

    @property
    def slope_at_infinity(self) -> float:
        return 1 / (1 - self.alpha) if self.alpha < 1 else inf

    def __call__(self, u: Tensor) -> Tensor:
        return (u**self.alpha - 1 - self.alpha * (u - 1)) / (self.alpha * (self.alpha - 1))

    def derivative(self, u: Tensor) -> Tensor:
        return (u ** (self.alpha - 1) - 1) / (self.alpha - 1)

    def conjugate(self, t: Tensor) -> Tensor:
        base = 1 + (self.alpha - 1) * _inside(self.slope_at_infinity, t)  # u^(alpha - 1)
        value = (base.clamp(min=0) ** (self.alpha / (self.alpha - 1)) - 1) / self.alpha
        return _infinite_above(self.slope_at_infinity, t, value)

    def critic(self, v: Tensor) -> Tensor:
        return ((self.alpha - 1) * v).expm1() / (self.alpha - 1)

    def conjugate_of_critic(self, v: Tensor) -> Tensor:
        return (self.alpha * v).expm1() / self.alpha

    def _mean_term(self, r: Tensor) -> Tensor:
        power = (self.alpha * r + logsigmoid(-r)).exp()  # q (p/q)^alpha / (p + q)
        linear = (-r).sigmoid() + self.alpha * (r / 2).tanh()
        return 2 * (power - linear) / (self.alpha * (self.alpha - 1))


def _infinite_above(end: float, t: Tensor, value: Tensor) -> Tensor:
    """Return the value for t up to the end of the domain, and infinity beyond."""
    return value if end == inf else torch.where(t > end, inf, value)


def _inside(end: float, t: Tensor) -> Tensor:
    """Return t up to the end of the domain, and a number of the domain beyond, so that no gradient is NaN."""
    return torch.where(t > end, end - 1, t)
