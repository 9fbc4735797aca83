r"""The transforms of normalizing flows. This is the only file that imports zuko.

A flow is a bijection :math:`f` from data to a base distribution. Each class here is a *choice*: an immutable record of options
whose ``build(features, context)`` makes zuko's lazy transform, a module that returns :math:`f` given a context. Importing zuko
switches torch's argument validation off for the whole process; this file restores it.

Zuko's bisection looks for the inverse in [-10, 10] and returns an end where it is not there. Here it bisects
:math:`s = \operatorname{arsinh} x`, whose steps are absolute near 0 and relative far out, and so reaches all floats. The
first derivatives of an inverse that is searched for are those of the implicit function; higher ones are wrong.

The table's errors are the largest over 200 rings of points in two dimensions, in float32, for untrained and trained transforms
(`benchmarks/inverses.py`).

==========  ==================  =========================================  ===============================
choice      inverse             measured round-trip error                  paper
==========  ==================  =========================================  ===============================
NICE        one pass            2e-7                                       arXiv 1410.8516
RealNVP     one pass            5e-7                                       arXiv 1605.08803
MAF         one pass per coord  5e-7                                       arXiv 1705.07057
NSF         one pass per coord  3e-6                                       arXiv 1906.04032
NCSF        one pass per coord  3e-6, on :math:`[-\pi, \pi)`               arXiv 2002.02428
NAF         bisection           5e-6                                       arXiv 1804.00779
UNAF        bisection           3e-6                                       arXiv 1908.05164
SOSPF       bisection           2e-6                                       arXiv 1905.02325
BPF         bisection           1e-5                                       arXiv 2004.00464
==========  ==================  =========================================  ===============================
"""

from __future__ import annotations

__all__ = [
    "BPF",
    "GF",
    "MAF",
    "NAF",
    "NCSF",
    "NICE",
    "NSF",
    "SOSPF",
    "UNAF",
    "FlowChoice",
    "FlowTransform",
    "RealNVP",
    "flow_options",
    "lazy_transform",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import asinh, ceil, log, log2, pi, prod
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_genmodels.nn.affine import BoundedAffine
from pyro_genmodels.nn.checks import check_count, check_rate, check_widths
from pyro_genmodels.nn.splines import RationalQuadraticSpline

_validation = Distribution._validate_args
import zuko  # noqa: E402  (the flag above must be read first)

Distribution.set_default_validate_args(_validation)

SEARCHED = {"_shifted_polynomial", "BernsteinTransform", "BoundedBernsteinTransform"}
"""Names of univariate functions, besides networks, whose inverse is searched for."""
PIECEWISE = {"RationalQuadraticSpline", "_circular_spline", "BernsteinTransform", "BoundedBernsteinTransform"}
"""Names of univariate functions whose derivative has kinks."""


class _StandardNormal(dist.Normal):
    """A normal distribution of mean 0 and deviation 1, whose density takes a third of the operations of another one's."""

    def log_prob(self, value: Tensor) -> Tensor:
        return value * value * -0.5 - log(2 * pi) / 2


class FlowChoice(ABC):
    """A choice of a conditional bijection from events to a base distribution."""

    tolerance: ClassVar[float] = 1e-5
    """Largest round-trip error that the tests allow, per coordinate of standardised data in float32."""
    support: ClassVar[constraints.Constraint] = constraints.real
    """Set in which one coordinate of the transform's input lies."""
    standardize: ClassVar[bool | Literal["jointly"]] = True
    """The family's default for its argument `standardize`."""

    @abstractmethod
    def build(self, features: int, context: int) -> nn.Module:
        """Build the lazy transform.

        Args:
            features: number of coordinates.
            context: length of the context vector, 0 for none.

        Returns:
            A module that takes the context (..., context) or None and returns a bijection from data to base, both
            (..., features).
        """

    def build_for(self, event_shape: Size, context: int, *, given_event: bool = False) -> nn.Module:
        """Build the lazy transform for events of a shape, flattened.

        Args:
            event_shape: shape of one datum.
            context: length of the context vector, 0 for none.
            given_event: True for a transform that is conditioned on an event too, flattened and put before the context.
        """
        features = event_shape.numel()
        return self.build(features, context + features * given_event)

    @staticmethod
    def base(like: Tensor) -> dist.TorchDistribution:
        """Return the base distribution of one coordinate, of the dtype and device of `like`: a standard normal."""
        return _StandardNormal(like.new_zeros(()), like.new_ones(()), validate_args=False)


@dataclass(frozen=True)
class FlowTransform(FlowChoice):
    """A choice of a stack of conditional bijections.

    Args:
        transforms: number of layers.
        hidden: widths of the hidden layers of each layer's network.
        randperm: True for random permutations of the coordinates between layers; otherwise they are reversed or alternated.
        dropout: rate at which hidden units are dropped in training. A flow with dropout can be sampled only after ``.eval()``.
        residual: True for residual blocks in place of hidden layers, two layers for each width, as suits deep networks.

    Raises:
        TypeError: if `hidden` is not a sequence of positive integers.
        ValueError: for a number that is not a positive integer, a dropout rate outside [0, 1), or residual blocks without
            hidden layers.
    """

    transforms: int = 3
    hidden: Sequence[int] = (128, 128)
    randperm: bool = False
    dropout: float = 0.0
    residual: bool = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(owner, transforms=self.transforms)
        check_widths(owner, hidden=self.hidden, empty=True)
        check_rate(owner, dropout=self.dropout)
        for name in ("randperm", "residual"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{owner} wants {name} as True or False, but found {value!r}.")
        if self.residual and not self.hidden:
            raise ValueError(f"{owner}(residual=True) wants hidden layers, such as hidden=(64, 64), but found hidden=().")

    def network(self) -> dict[str, Any]:
        """Return zuko's keyword arguments for the network in each layer."""
        options = {"hidden_features": tuple(self.hidden), "activation": partial(_activation, self.dropout)}
        return options | ({"residual": True} if self.residual else {})

    def stack(self, flow: Callable[..., Any], features: int, context: int, **kwargs: Any) -> nn.Module:
        """Return the lazy transform of one of zuko's flows, built with these options and `kwargs`."""
        return flow(features, context, transforms=self.transforms, **self.network(), **kwargs).transform


class _CouplingTransform(FlowTransform):
    """A choice of a stack of coupling layers, whose networks zuko has without residual blocks."""

    def network(self) -> dict[str, Any]:
        return {name: option for name, option in super().network().items() if name != "residual"}

    def with_blocks(self, lazy: nn.Module) -> nn.Module:
        """Return a lazy transform of these layers, with networks of residual blocks if that was chosen."""
        for layer in lazy.modules() if self.residual else ():
            if isinstance(layer, zuko.flows.coupling.GeneralCouplingTransform):
                network: Any = layer.hyper
                layer.hyper = _residual_network(network.in_features, network.out_features, self.hidden, self.dropout)
        return lazy


def _residual_network(inputs: int, outputs: int, hidden: Sequence[int], dropout: float) -> nn.Module:
    """Return a network with one residual block of two layers for each width."""
    layers: list[nn.Module] = []
    for before, width in zip((inputs, *hidden), hidden, strict=False):
        block = [_activation(dropout), nn.Linear(width, width), _activation(dropout), nn.Linear(width, width)]
        layers += [*([] if layers and before == width else [nn.Linear(before, width)]), zuko.nn.Residual(*block)]
    last = [_activation(dropout)] if layers else []
    return nn.Sequential(*layers, *last, nn.Linear((inputs, *hidden)[-1], outputs))


def _activation(dropout: float) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Dropout(dropout)) if dropout else nn.ReLU()


class NICE(_CouplingTransform):
    """Additive coupling layers followed by one learned scale per coordinate, which alone changes the volume."""

    def build(self, features: int, context: int) -> nn.Module:
        couplings = [
            zuko.flows.coupling.GeneralCouplingTransform(
                features,
                context,
                mask=_coupling_mask(features, i, randperm=self.randperm),
                univariate=zuko.transforms.AdditiveTransform,
                shapes=[()],
                **self.network(),
            )
            for i in range(self.transforms)
        ]
        scale = zuko.flows.gaussianization.ElementWiseTransform(features)
        for parameter in scale.parameters():
            nn.init.zeros_(parameter)
        return self.with_blocks(_LastUnconditional(zuko.lazy.LazyComposedTransform(*couplings), scale))


def _coupling_mask(features: int, layer: int, *, randperm: bool) -> torch.Tensor:
    order = torch.randperm(features) if randperm else torch.arange(features)
    return order % 2 == layer % 2


class _LastUnconditional(nn.Module):
    """A conditional transform followed by one that does not depend on the context."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, context: torch.Tensor | None = None) -> torch.distributions.Transform:
        return zuko.transforms.ComposedTransform(self.first(context), self.last(None))


class RealNVP(_CouplingTransform):
    """Affine coupling layers: one network pass in each direction."""

    def build(self, features: int, context: int) -> nn.Module:
        return self.with_blocks(self.stack(zuko.flows.RealNVP, features, context, randmask=self.randperm))


@dataclass(frozen=True)
class MAF(FlowTransform):
    """Affine autoregressive layers.

    Args:
        passes: number of network passes of the inverse; None for one per coordinate (fully autoregressive), 2 for a coupling.
    """

    passes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.passes is not None:
            check_count(type(self).__name__, passes=self.passes)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.MAF, features, context, randperm=self.randperm, passes=self.passes)


@dataclass(frozen=True)
class NSF(MAF):
    """Rational-quadratic spline layers on [-5, 5] that are the identity outside, so that the data should be standardised.

    Args:
        bins: number of pieces of each spline.
    """

    bins: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(type(self).__name__, bins=self.bins, least=2)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NSF, features, context, randperm=self.randperm, passes=self.passes, bins=self.bins)


@dataclass(frozen=True)
class NCSF(NSF):
    r"""Circular spline layers, for angles in :math:`[-\pi, \pi)`; the base is uniform on the torus."""

    support: ClassVar[constraints.Constraint] = constraints.half_open_interval(-pi, pi)

    @staticmethod
    def base(like: Tensor) -> dist.TorchDistribution:
        """Return the uniform distribution of one angle."""
        angle = like.new_full((), pi)
        return dist.Uniform(-angle, angle, validate_args=False)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NCSF, features, context, randperm=self.randperm, passes=self.passes, bins=self.bins)


@dataclass(frozen=True)
class NAF(FlowTransform):
    """Monotonic networks. Bisection inverts them, slowly: use them for densities rather than as guides.

    Args:
        signal: length of the vector that conditions each monotonic network.
    """

    signal: int = 16
    tolerance: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(type(self).__name__, signal=self.signal)

    def build(self, features: int, context: int) -> nn.Module:
        return self._onto(zuko.flows.NAF, features, context)

    def _onto(self, flow: Callable[..., Any], features: int, context: int) -> nn.Module:
        """Return the layers of one of zuko's flows without those between them, which leave only [-11, 11] to be inverted."""
        layers: Any = self.stack(flow, features, context, randperm=self.randperm, signal=self.signal).transforms
        return zuko.lazy.LazyComposedTransform(*(x for x in layers if not isinstance(x, zuko.lazy.UnconditionalTransform)))


class UNAF(NAF):
    """Integrals of positive networks, inverted by bisection. They are ten times slower than `NAF`."""

    def build(self, features: int, context: int) -> nn.Module:
        return self._onto(zuko.flows.UNAF, features, context)


class _Searched(zuko.transforms.MonotonicTransform):
    r"""An increasing function whose inverse is searched for among all floats, not in [-10, 10], with its first derivatives.

    The inverse x of y has :math:`f_\phi(x) = y`, so :math:`dx = (dy - \partial_\phi f \, d\phi) / f'(x)`.
    """

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self._search(y)
        if not torch.is_grad_enabled():
            return x
        place = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.f(place).sum(), place)
        step = (y - self.f(x)) / slope
        return x + (step - step.detach())

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

    def f(self, x: torch.Tensor) -> torch.Tensor:
        return zuko.utils.GaussLegendre.quadrature(self.g, torch.zeros_like(x), x, self.n)


class _Integral(_Quadrature, zuko.transforms.UnconstrainedMonotonicTransform):
    """Zuko's integral of a positive function."""


class _PolynomialIntegral(_Quadrature, zuko.transforms.SOSPolynomialTransform):
    """Zuko's integral of squared polynomials."""


class _InvertibleMNN(zuko.flows.neural.MNN):
    """Zuko's monotonic network with the wide inverse, and gradients of its weights in evaluation mode too."""

    def forward(self, signal: torch.Tensor) -> torch.distributions.Transform:
        return _Searched(f=partial(self.f, signal), phi=(signal, *self.parameters()))


class _InvertibleUMNN(zuko.flows.neural.UMNN):
    """Zuko's integrand network with the wide inverse, and gradients of its weights in evaluation mode too."""

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
        phi = self.hyper(inputs).unflatten(-1, (-1, self.total))
        return zuko.transforms.DependentTransform(self.univariate(*_unpack(phi, self.shapes)), 1)


class _Autoregressive(_Conditioned, zuko.flows.autoregressive.MaskedAutoregressiveTransform):
    """Zuko's autoregressive layer."""


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


@dataclass(frozen=True)
class SOSPF(FlowTransform):
    """Integrals of sums of squared polynomials, inverted by bisection.

    Args:
        degree: degree of each polynomial.
        polynomials: number of polynomials that are squared and summed.
    """

    degree: int = 4
    polynomials: int = 3
    tolerance: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("SOSPF", degree=self.degree, polynomials=self.polynomials)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(
            zuko.flows.SOSPF,
            features,
            context,
            randperm=self.randperm,
            degree=self.degree,
            polynomials=self.polynomials,
        )


@dataclass(frozen=True)
class BPF(FlowTransform):
    """Bernstein polynomials on [-5, 5] that are the identity outside, inverted by bisection.

    Args:
        degree: degree of each polynomial.
    """

    degree: int = 16
    tolerance: ClassVar[float] = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("BPF", degree=self.degree)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.BPF, features, context, randperm=self.randperm, degree=self.degree)


class GF(FlowTransform):
    """Gaussianization flows. `Flow` refuses them, because zuko's do not invert."""

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.GF, features, context)

    def network(self) -> dict[str, Any]:
        return {"hidden_features": tuple(self.hidden)}


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
}
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    zuko.flows.polynomial.ShiftedSOSPTransform: _shifted_polynomial,
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
