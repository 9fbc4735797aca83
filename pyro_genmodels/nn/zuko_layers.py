r"""Replacements of parts of zuko's flows: numerical inverses, and layers of fewer operations.

This is the only file that imports zuko. The import switches torch's argument validation off for the whole process; the flag is
put back here.

Zuko's bisection looks for the inverse in [-10, 10] and returns an end where it is not there. Here it bisects
:math:`s = \operatorname{arsinh} x`, whose steps are absolute near 0 and relative far out, and so reaches all floats. The
derivatives of an inverse that is searched for, up to the third, are those of the implicit function.
"""

from __future__ import annotations

__all__ = ["flow_options", "lazy_transform", "zuko"]

from collections.abc import Callable, Sequence
from functools import partial
from math import asinh, ceil, log2, pi, prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Distribution

from pyro_genmodels.nn.affine import BoundedAffine
from pyro_genmodels.nn.precision import full_precision
from pyro_genmodels.nn.splines import RationalQuadraticSpline

_validation = Distribution._validate_args
import zuko  # noqa: E402  (the flag above must be read first)

Distribution.set_default_validate_args(_validation)

SEARCHED = {"_shifted_polynomial", "_Bernstein", "_BoundedBernstein"}
"""Names of univariate functions, besides networks, whose inverse is searched for."""
PIECEWISE = {"RationalQuadraticSpline", "CircularSpline", "_circular_spline", "_Bernstein", "_BoundedBernstein"}
"""Names of univariate functions whose derivative has kinks."""


class _Implicit(zuko.transforms.MonotonicTransform):
    r"""An increasing function whose inverse is searched for, with its derivatives of first to third order.

    The inverse x of y has :math:`f_\phi(x) = y`. A step of Newton's method from there,

    .. math:: x + (y - f_\phi(x)) / f_\phi'(x),

    leaves x as it is and has the right first derivatives with respect to y and :math:`\phi`. Like the digits of a root, the
    orders of derivatives that are right double with each step: after n steps they are :math:`2^n - 1`.
    """

    STEPS = 2

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self._search(y)
        if not torch.is_grad_enabled():
            return x
        for _ in range(self.STEPS):
            value, log_slope = self.call_and_ladj(x)
            rest = y - value
            x = x + (rest - rest.detach()) * (-log_slope).exp()
        return x

    def _search(self, y: torch.Tensor) -> torch.Tensor:
        """Return the inverse as zuko finds it."""
        x: torch.Tensor = super()._inverse(y)
        return x


class _Searched(_Implicit):
    """An increasing function whose inverse is searched for among all floats, not in [-10, 10]."""

    def _search(self, y: torch.Tensor) -> torch.Tensor:
        """Return the inverse by bisection of s = arsinh(x)."""
        low, high = (torch.full_like(y, sign * asinh(torch.finfo(y.dtype).max / 4)) for sign in (-1, 1))
        precision = min(self.eps, 4 * torch.finfo(y.dtype).eps)
        for _ in range(ceil(log2(2 * asinh(torch.finfo(y.dtype).max / 4) / precision))):
            middle = (low + high) / 2
            values = self.f(middle.sinh())
            values = torch.where(values.isnan(), middle * torch.inf, values)  # large powers of both signs: inf - inf
            is_below = values < y
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return ((low + high) / 2).sinh()


class _Quadrature(_Searched):
    """An integral from 0 to x by Gauss and Legendre's points, with its derivatives of all orders.

    Zuko's backward pass counts the parameters behind x twice where they are the integrand's own, as in the density of a draw.
    """

    g: Any
    n: int

    @full_precision
    def f(self, x: torch.Tensor) -> torch.Tensor:
        return zuko.utils.GaussLegendre.quadrature(self.g, torch.zeros_like(x), x, self.n)


class _Integral(_Quadrature, zuko.transforms.UnconstrainedMonotonicTransform):
    """Zuko's integral of a positive function."""


class _PolynomialIntegral(_Quadrature, zuko.transforms.SOSPolynomialTransform):
    """Zuko's integral of squared polynomials."""

    @full_precision  # the slope of the integral
    def g(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().g(x)
        return y


class _Bernstein(_Implicit, zuko.transforms.BernsteinTransform):
    """Zuko's Bernstein polynomial, which is linear outside of its bounds."""


class _BoundedBernstein(_Implicit, zuko.transforms.BoundedBernsteinTransform):
    """Zuko's Bernstein polynomial that is the identity outside of its bounds."""


class _InvertibleMNN(zuko.flows.neural.MNN):
    """Zuko's monotonic network with the wide inverse, and gradients of its weights in evaluation mode too."""

    @full_precision  # this network is the bijection itself
    def f(self, signal: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().f(signal, x)
        return y

    def forward(self, signal: torch.Tensor) -> torch.distributions.Transform:
        return _Searched(f=partial(self.f, signal), phi=(signal, *self.parameters()))


class _InvertibleUMNN(zuko.flows.neural.UMNN):
    """Zuko's integrand network with the wide inverse, and gradients of its weights in evaluation mode too."""

    @full_precision
    def g(self, signal: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().g(signal, x)
        return y

    def forward(self, signal: torch.Tensor, constant: torch.Tensor) -> torch.distributions.Transform:
        integral = _Integral(g=partial(self.g, signal), phi=(signal, *self.parameters()))
        return zuko.transforms.ComposedTransform(integral, zuko.transforms.AdditiveTransform(shift=constant))


class _MaskedLinear(zuko.nn.MaskedLinear):
    """Zuko's masked layer; torch multiplies bytes by floats several times faster than truth values by floats."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.mask.view(torch.uint8) * self.weight, self.bias)


class _Conditioned:
    """The part that zuko's two conditional layers share, with the outputs of the network split by fewer operations."""

    hyper: Any
    total: int
    shapes: Sequence[Sequence[int]]
    univariate: Any

    def meta(self, c: torch.Tensor | None, x: torch.Tensor) -> torch.distributions.Transform:
        inputs = x if c is None else torch.cat(zuko.utils.broadcast(x, c, ignore=1), dim=-1)
        phi = self.hyper(inputs).to(x.dtype).unflatten(-1, (-1, self.total))
        return zuko.transforms.DependentTransform(self.univariate(*_unpack(phi, self.shapes)), 1)


class _Autoregressive(_Conditioned, zuko.flows.autoregressive.MaskedAutoregressiveTransform):
    """Zuko's autoregressive layer."""


class _ElementWise(zuko.flows.gaussianization.ElementWiseTransform):
    """Zuko's layer of functions of single coordinates, whose parameters depend on the context."""

    def forward(self, c: torch.Tensor | None = None) -> torch.distributions.Transform:
        if c is None:
            return super().forward(c)
        phi = self.hyper(c).to(c.dtype).unflatten(-1, (-1, self.total))
        return zuko.transforms.DependentTransform(self.univariate(*_unpack(phi, self.shapes)), 1)


class _Coupling(_Conditioned, zuko.flows.coupling.GeneralCouplingTransform):
    """Zuko's coupling layer."""


def _unpack(phi: torch.Tensor, shapes: Sequence[Sequence[int]]) -> Sequence[torch.Tensor]:
    """Return parameters (..., *shape) of each shape, given all of them in one dimension, (..., n)."""
    if not any(shapes):  # numbers
        return phi.unbind(-1)
    parts = zip(phi.split([prod(shape) for shape in shapes], -1), shapes, strict=True)
    return [part if len(shape) == 1 else part.reshape(part.shape[:-1] + tuple(shape)) for part, shape in parts]


def _circular_spline(*phi: torch.Tensor, slope: float = 1e-3) -> torch.distributions.Transform:
    shift = zuko.transforms.CircularShiftTransform(bound=pi)
    return zuko.transforms.ComposedTransform(shift, RationalQuadraticSpline(*phi, bound=pi, slope=slope))


def _shifted_polynomial(a: torch.Tensor, constant: torch.Tensor, slope: float = 1e-3) -> torch.distributions.Transform:
    shift = zuko.transforms.AdditiveTransform(shift=constant)
    return zuko.transforms.ComposedTransform(_PolynomialIntegral(a=a, slope=slope), shift)


def lazy_transform(module: nn.Module) -> nn.Module:
    """Return the lazy transform of a zuko flow, or the module itself if it is one, with some of its parts replaced.

    Numerical inverses search further. Splines, affine functions and masked layers are the same functions of the same
    parameters, but faster.

    Raises:
        ValueError: for a Gaussianization flow, which does not invert.
    """
    lazy = getattr(module, "transform", module)
    for part in lazy.modules():
        univariate = getattr(part, "univariate", None)
        if univariate is zuko.transforms.GaussianizationTransform:
            raise ValueError(
                "Flow cannot use a Gaussianization flow (GF): zuko's does not invert (round-trip error 1.3 at "
                "its own initialisation) and the gradients of its draws are wrong. Use NSF() or MAF()."
            )
        if type(part) in _LAYERS:
            part.__class__ = _LAYERS[type(part)]
        function = getattr(univariate, "func", univariate)
        if function in _FUNCTIONS and not getattr(univariate, "args", ()):
            part.univariate = partial(_FUNCTIONS[function], **getattr(univariate, "keywords", {}))
    return lazy


_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    zuko.flows.neural.MNN: _InvertibleMNN,
    zuko.flows.neural.UMNN: _InvertibleUMNN,
    zuko.nn.MaskedLinear: _MaskedLinear,
    zuko.flows.autoregressive.MaskedAutoregressiveTransform: _Autoregressive,
    zuko.flows.coupling.GeneralCouplingTransform: _Coupling,
    zuko.flows.gaussianization.ElementWiseTransform: _ElementWise,
}
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    zuko.flows.polynomial.ShiftedSOSPTransform: _shifted_polynomial,
    zuko.transforms.BernsteinTransform: _Bernstein,
    zuko.transforms.BoundedBernsteinTransform: _BoundedBernstein,
    zuko.flows.spline.CircularRQSTransform: _circular_spline,
    zuko.transforms.MonotonicAffineTransform: BoundedAffine,
    zuko.transforms.MonotonicRQSTransform: RationalQuadraticSpline,
}


def flow_options(lazy: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments of `NormalizingFlow` that follow from a lazy transform's layers."""
    layers = list(lazy.modules())
    networks = any(isinstance(layer, (zuko.flows.neural.MNN, zuko.flows.neural.UMNN)) for layer in layers)
    searched = networks or any(_name(getattr(layer, "univariate", None)) in SEARCHED for layer in layers)
    return {"smooth": _is_smooth(lazy), "numerical_inverse": searched}


def _is_smooth(lazy: nn.Module) -> bool:
    """Return True if the gradient of the log density has no jumps, such as those of ReLU and of piecewise functions."""
    layers = list(lazy.modules())
    univariate = [getattr(layer, "univariate", None) for layer in layers]
    piecewise = any(_name(function) in PIECEWISE for function in univariate)
    return not piecewise and not any(isinstance(layer, (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)) for layer in layers)


def _name(function: Any) -> str:
    return getattr(getattr(function, "func", function), "__name__", "")
