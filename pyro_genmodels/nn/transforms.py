r"""The transforms of normalizing flows, by name: the only file that imports zuko.

A flow is a bijection :math:`f` that carries data to a base distribution. Each class here is a *choice*: an immutable
record of options whose ``build(features, context)`` makes zuko's lazy transform, a module that given a context returns
:math:`f`. Zuko switches torch's argument validation off for the whole process on import; here it is put back.
The errors are the largest of 200 rings of points in two dimensions, in float32, fresh and trained (`benchmarks/inverses.py`).

==========  ==================  =========================================  ===============================
choice      inverse             measured round-trip error                  paper
==========  ==================  =========================================  ===============================
NICE        one pass            2e-7                                       arXiv 1410.8516
RealNVP     one pass            5e-7                                       arXiv 1605.08803
MAF         one pass per coord  5e-7                                       arXiv 1705.07057
NSF         one pass per coord  3e-6                                       arXiv 1906.04032
NCSF        one pass per coord  3e-6, on :math:`[-\pi, \pi)`               arXiv 2002.02428
NAF         bisection           5e-6, data inside [-10, 10]                arXiv 1804.00779
UNAF        bisection           3e-6, data inside [-10, 10]                arXiv 1908.05164
SOSPF       bisection           2e-6, data inside [-10, 10]                arXiv 1905.02325
BPF         bisection           1e-5                                       arXiv 2004.00464
==========  ==================  =========================================  ===============================
"""

from __future__ import annotations

__all__ = ["BPF", "GF", "MAF", "NAF", "NCSF", "NICE", "NSF", "SOSPF", "UNAF", "FlowTransform", "RealNVP", "adopt"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import pi
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributions import Distribution, constraints

_validation = Distribution._validate_args
import zuko  # noqa: E402  (the flag above must be read first)

Distribution.set_default_validate_args(_validation)


@dataclass(frozen=True)
class FlowTransform(ABC):
    """A stack of conditional bijections, to be built for a number of features and of context features.

    Args:
        transforms: how many layers.
        hidden: widths of each layer's network.
        randperm: whether coordinates are permuted at random between layers, else reversed (or alternated).
        dropout: rate at which hidden units are dropped in training. Such a flow draws only in ``.eval()``.
    """

    transforms: int = 3
    hidden: Sequence[int] = (128, 128)
    randperm: bool = False
    dropout: float = 0.0

    tolerance: ClassVar[float] = 1e-5
    """Largest round-trip error in float32, per coordinate of standardised data, that the tests allow."""
    support: ClassVar[constraints.Constraint] = constraints.real
    """Where one coordinate of the data may lie."""

    def __post_init__(self) -> None:
        if isinstance(self.hidden, int):
            raise TypeError(
                f"{type(self).__name__} wants the widths of its hidden layers, hidden=({self.hidden},), not a number."
            )
        if self.transforms < 1:
            raise ValueError(f"{type(self).__name__} needs at least one transform, got transforms={self.transforms}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{type(self).__name__} needs 0 <= dropout < 1, got {self.dropout}.")

    @abstractmethod
    def build(self, features: int, context: int) -> nn.Module:
        """The lazy transform: a module, context (..., context) or None -> bijection from data to base, both (..., features)."""

    def network(self) -> dict[str, Any]:
        """Zuko's keyword arguments for the network inside each layer."""
        return {"hidden_features": tuple(self.hidden), "activation": partial(_activation, self.dropout)}

    def stack(self, flow: Callable[..., Any], features: int, context: int, **kwargs: Any) -> nn.Module:
        return flow(features, context, transforms=self.transforms, **self.network(), **kwargs).transform


def _activation(dropout: float) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Dropout(dropout)) if dropout else nn.ReLU()


class NICE(FlowTransform):
    """Additive coupling layers, then one learned scale per coordinate: the volume changes only there."""

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
        return _LastUnconditional(zuko.lazy.LazyComposedTransform(*couplings), scale)


def _coupling_mask(features: int, layer: int, *, randperm: bool) -> torch.Tensor:
    order = torch.randperm(features) if randperm else torch.arange(features)
    return order % 2 == layer % 2


class _LastUnconditional(nn.Module):
    """A conditional transform, then one that knows no context."""

    def __init__(self, first: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, last

    def forward(self, context: torch.Tensor | None = None) -> torch.distributions.Transform:
        return zuko.transforms.ComposedTransform(self.first(context), self.last(None))


class RealNVP(FlowTransform):
    """Affine coupling layers: one network pass each way."""

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.RealNVP, features, context, randmask=self.randperm)


@dataclass(frozen=True)
class MAF(FlowTransform):
    """Affine autoregressive layers.

    Args:
        passes: network passes of the inverse; None is one per coordinate (fully autoregressive), 2 is a coupling.
    """

    passes: int | None = None

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.MAF, features, context, randperm=self.randperm, passes=self.passes)


@dataclass(frozen=True)
class NSF(MAF):
    """Rational-quadratic spline layers on [-5, 5], the identity outside: give it standardised data.

    Args:
        bins: pieces of each spline.
    """

    bins: int = 8

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NSF, features, context, randperm=self.randperm, passes=self.passes, bins=self.bins)


@dataclass(frozen=True)
class NCSF(NSF):
    r"""Circular spline layers, for angles in :math:`[-\pi, \pi)`; the base is uniform on the torus."""

    support: ClassVar[constraints.Constraint] = constraints.half_open_interval(-pi, pi)

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NCSF, features, context, randperm=self.randperm, passes=self.passes, bins=self.bins)


@dataclass(frozen=True)
class NAF(FlowTransform):
    """Monotonic networks, inverted by bisection, slowly and within [-10, 10]: for densities, not for guides.

    Zuko's gradients of its draws are wrong, so there are none.

    Args:
        signal: length of the vector that steers each monotonic network.
    """

    signal: int = 16
    tolerance: ClassVar[float] = 1e-4

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.NAF, features, context, randperm=self.randperm, signal=self.signal)


class UNAF(NAF):
    """Integrals of positive networks, inverted by bisection, ten times slower than `NAF`'s, with the same limits."""

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.UNAF, features, context, randperm=self.randperm, signal=self.signal)


class _TrainableUMNN(zuko.flows.neural.UMNN):
    """Zuko's integrand network, which outside training mode forgets the gradients of its own weights."""

    def forward(self, signal: torch.Tensor, constant: torch.Tensor) -> torch.distributions.Transform:
        weights = [p for p in self.parameters() if p.requires_grad]
        integral = zuko.transforms.UnconstrainedMonotonicTransform(g=partial(self.g, signal), phi=(signal, *weights))
        return zuko.transforms.ComposedTransform(integral, zuko.transforms.AdditiveTransform(shift=constant))


@dataclass(frozen=True)
class SOSPF(FlowTransform):
    """Integrals of sums of squared polynomials, inverted by bisection.

    Args:
        degree: degree of each polynomial.
        polynomials: how many are squared and summed.
    """

    degree: int = 4
    polynomials: int = 3
    tolerance: ClassVar[float] = 1e-4

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
    """Bernstein polynomials on [-5, 5], the identity outside, inverted by bisection.

    Args:
        degree: degree of each polynomial.
    """

    degree: int = 16
    tolerance: ClassVar[float] = 1e-4

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.BPF, features, context, randperm=self.randperm, degree=self.degree)


class GF(FlowTransform):
    """Gaussianization flows, refused: see the error."""

    def build(self, features: int, context: int) -> nn.Module:
        return self.stack(zuko.flows.GF, features, context)

    def network(self) -> dict[str, Any]:
        return {"hidden_features": tuple(self.hidden)}


def adopt(module: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The lazy transform of a zuko flow, or the module itself, and what `NormalizingFlow` must be told of it.

    Raises:
        ValueError: for a transform that does not invert.
    """
    lazy = getattr(module, "transform", module)
    for part in lazy.modules():
        if getattr(part, "univariate", None) is zuko.transforms.GaussianizationTransform:
            raise ValueError(
                "Flow got a Gaussianization flow (GF), a transform that cannot be used: zuko's does not invert (round-trip "
                "error 1.3 at its own initialisation) and the gradients of its draws are wrong. Use NSF() or MAF()."
            )
        if type(part) is zuko.flows.neural.UMNN:
            part.__class__ = _TrainableUMNN
    networks = zuko.flows.neural.MNN, zuko.flows.neural.UMNN
    bisected = any(isinstance(part, networks) for part in lazy.modules())
    return lazy, {"smooth": _is_smooth(lazy)} | ({"has_rsample": False, "bound": 10.0} if bisected else {})


def _is_smooth(lazy: nn.Module) -> bool:
    """Whether the gradient of its log density is without jumps, as those of ReLU and of pieces put together are not."""
    parts = [(part, getattr(part, "univariate", None)) for part in lazy.modules()]
    names = [getattr(getattr(univariate, "func", univariate), "__name__", "") for _, univariate in parts]
    pieces = any("RQS" in name or "Bernstein" in name for name in names)
    return not pieces and not any(isinstance(part, (nn.ReLU, nn.LeakyReLU, nn.Hardtanh)) for part, _ in parts)
