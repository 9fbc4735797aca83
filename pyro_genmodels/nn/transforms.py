r"""The transforms of normalizing flows.

A flow is a bijection :math:`f` from data to a base distribution. Each class here is a *choice*: an immutable record of options
whose ``build(features, context)`` makes zuko's lazy transform, a module that returns :math:`f` given a context.

The table's errors are the largest over 200 rings of points in two dimensions, in float32, for untrained and trained transforms
(`benchmarks/inverses.py`).

==========  ==================  =========================================  ===============================
choice      inverse             measured round-trip error                  paper
==========  ==================  =========================================  ===============================
NICE        one pass            2e-7                                       arXiv 1410.8516
RealNVP     one pass            5e-7                                       arXiv 1605.08803
MAF         one pass per coord  5e-7                                       arXiv 1705.07057
NSF         one pass per coord  2e-6                                       arXiv 1906.04032
NCSF        one pass per coord  2e-6, on :math:`[-\pi, \pi)`               arXiv 2002.02428
NAF         bisection           3e-6                                       arXiv 1804.00779
UNAF        bisection           1e-6                                       arXiv 1908.05164
SOSPF       bisection           2e-6                                       arXiv 1905.02325
BPF         bisection           8e-6                                       arXiv 2004.00464
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
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log, pi
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.nn.checks import check_count, check_rate, check_widths
from pyro_genmodels.nn.circular_splines import Circular, CircularBase, CircularLayer
from pyro_genmodels.nn.zuko_layers import zuko


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

    def build_circular(self, angles: Sequence[bool], context: int) -> nn.Module:
        """Build the lazy transform of coordinates of which some are angles, which it maps to angles.

        Args:
            angles: True for each coordinate that is an angle.
            context: length of the context vector, 0 for none.

        Raises:
            ValueError: by default.
        """
        raise ValueError(f"{type(self).__name__} has no circular layers, as coordinates that are angles want. Use NSF().")

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

    Coordinates whose support is `circular` have circular splines, as in `NCSF`.

    Args:
        bins: number of pieces of each spline.
    """

    bins: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(type(self).__name__, bins=self.bins, least=2)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NSF, features, context, randperm=self.randperm, passes=self.passes, bins=self.bins)

    def build_circular(self, angles: Sequence[bool], context: int) -> nn.Module:
        options = {"passes": self.passes, "bins": self.bins, **self.network()}
        orders = (self._order(len(angles), layer) for layer in range(self.transforms))
        return zuko.lazy.LazyComposedTransform(*(CircularLayer(angles, context, order=order, **options) for order in orders))

    def _order(self, features: int, layer: int) -> Tensor:
        """Return the place of each coordinate in the order of a layer, (features,)."""
        order = torch.randperm(features) if self.randperm else torch.arange(features)
        return order if self.randperm or layer % 2 == 0 else order.flip(0)


@dataclass(frozen=True)
class NCSF(NSF):
    r"""Circular spline layers, for angles in :math:`[-\pi, \pi)`; the base is uniform on the torus.

    They are those of `NSF`, for coordinates that are all angles.
    """

    support: ClassVar[constraints.Constraint] = Circular()

    @staticmethod
    def base(like: Tensor) -> dist.TorchDistribution:
        """Return the uniform distribution of one angle."""
        return CircularBase(torch.ones((), dtype=torch.bool, device=like.device), like)

    def build(self, features: int, context: int) -> nn.Module:
        return self.build_circular([True] * features, context)


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
