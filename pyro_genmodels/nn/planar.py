r"""Planar and radial flows: layers of few parameters, for guides of few coordinates.

From the base to the data a planar layer moves points along one direction, a radial one to or from one centre:

.. math:: x = z + \hat u \tanh(w \cdot z + b), \qquad x = z + \frac{\hat\beta\, (z - z_0)}{\alpha + r}, \quad r = |z - z_0| .

They are invertible where :math:`w \cdot \hat u > -1` and :math:`\hat\beta > -\alpha`. The base point of x is found in one
dimension. For the planar layer :math:`s = w \cdot z` solves :math:`s + (w \cdot \hat u) \tanh(s + b) = w \cdot x`, whose left
side increases; it is bisected, and two steps of Newton then carry the derivatives up to the third. For the radial layer r
solves a quadratic equation.

Rezende and Mohamed, *Variational Inference with Normalizing Flows* (arXiv 1505.05770).
"""

from __future__ import annotations

__all__ = ["Planar", "Radial"]

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log2

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints

from pyro_genmodels.nn.checks import check_count
from pyro_genmodels.nn.transforms import FlowChoice

MARGIN = 1e-3
"""Smallest slope of a layer."""


class _Layer(Transform):
    """A layer as a map from the data to the base. A subclass maps the base to the data, and knows where it comes from."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = Transform.__hash__

    @abstractmethod
    def _inverse(self, y: Tensor) -> Tensor:
        """Return data, (..., d), of points of the base."""

    @abstractmethod
    def _log_det_at(self, z: Tensor) -> Tensor:
        """Return the logarithm of the volume by which the map from the base to the data grows at z, (...)."""

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the volume by which the map from x to y grows."""
        return -self._log_det_at(y)


class PlanarTransform(_Layer):
    """The inverse of a planar layer.

    Args:
        u: unconstrained direction, (..., d).
        w: normal of the plane, (..., d).
        b: offset of the plane, (...).
    """

    def __init__(self, u: Tensor, w: Tensor, b: Tensor) -> None:
        super().__init__()
        along = (w * u).sum(-1)
        self.slope = F.softplus(along) - 1 + MARGIN  # w . u
        size = w.square().sum(-1).clamp(min=torch.finfo(w.dtype).tiny)
        self.u = u + ((self.slope - along) / size).unsqueeze(-1) * w
        self.w, self.b = w, b

    def _call(self, x: Tensor) -> Tensor:
        wanted = (self.w * x).sum(-1)
        with torch.no_grad():
            s = self._search(wanted)
        for _ in range(2):  # after k steps, derivatives up to order 2^k - 1 are right
            tangent = torch.tanh(s + self.b)
            s = s + (wanted - s - self.slope * tangent) / (1 + self.slope * (1 - tangent.square()))
        return x - self.u * torch.tanh(s + self.b).unsqueeze(-1)

    def _search(self, wanted: Tensor) -> Tensor:
        """Return s with s + slope tanh(s + b) = wanted, by bisection: it lies within |slope| of it."""
        low, high = wanted - self.slope.abs(), wanted + self.slope.abs()
        for _ in range(ceil(-log2(torch.finfo(wanted.dtype).eps))):
            middle = (low + high) / 2
            is_below = middle + self.slope * torch.tanh(middle + self.b) < wanted
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (low + high) / 2

    def _inverse(self, y: Tensor) -> Tensor:
        return y + self.u * torch.tanh((self.w * y).sum(-1) + self.b).unsqueeze(-1)

    def _log_det_at(self, z: Tensor) -> Tensor:
        tangent = torch.tanh((self.w * z).sum(-1) + self.b)
        return torch.log1p(self.slope * (1 - tangent.square()))


class RadialTransform(_Layer):
    """The inverse of a radial layer.

    Args:
        centre: centre, (..., d).
        raw_alpha: unconstrained width, (...).
        raw_beta: unconstrained strength, (...).
    """

    def __init__(self, centre: Tensor, raw_alpha: Tensor, raw_beta: Tensor) -> None:
        super().__init__()
        self.centre = centre
        self.alpha = F.softplus(raw_alpha) + MARGIN
        self.beta = self.alpha * (F.softplus(raw_beta) - 1 + MARGIN)

    def _call(self, x: Tensor) -> Tensor:
        distance = x - self.centre
        far = distance.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
        b = far - self.alpha - self.beta
        root = (b.square() + 4 * far * self.alpha).sqrt()
        larger = (torch.where(b > 0, b, -b) + root) / 2  # root of larger size, without cancellation
        near = torch.where(b > 0, larger, far * self.alpha / larger)
        return self.centre + distance / (1 + self.beta / (self.alpha + near)).unsqueeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        distance = y - self.centre
        return y + distance * (self.beta / (self.alpha + self._radius(y))).unsqueeze(-1)

    def _radius(self, z: Tensor) -> Tensor:
        return (z - self.centre).square().sum(-1).clamp(min=torch.finfo(z.dtype).tiny).sqrt()

    def _log_det_at(self, z: Tensor) -> Tensor:
        width = self.alpha + self._radius(z)
        across = (z.shape[-1] - 1) * torch.log1p(self.beta / width)
        return across + torch.log1p(self.alpha * self.beta / width.square())


@dataclass(frozen=True)
class _FewParameters(FlowChoice):
    """A choice of layers of few parameters, which a context moves linearly."""

    transforms: int = 8

    def __post_init__(self) -> None:
        check_count(type(self).__name__, transforms=self.transforms)


class Planar(_FewParameters):
    """Planar layers. A context moves their parameters linearly.

    Args:
        transforms: number of layers.

    Raises:
        ValueError: if it is not a positive integer.

    Example:
        >>> from pyro_genmodels import Flow
        >>> from pyro_genmodels.families import Planar
        >>> Flow((3,), transform=Planar(4))().sample((5,)).shape
        torch.Size([5, 3])
    """

    def build(self, features: int, context: int) -> nn.Module:
        return _Layers(_planar, self.transforms, features, 2 * features + 1, context)


class Radial(_FewParameters):
    """Radial layers. A context moves their parameters linearly.

    Args:
        transforms: number of layers.

    Raises:
        ValueError: if it is not a positive integer.
    """

    def build(self, features: int, context: int) -> nn.Module:
        return _Layers(_radial, self.transforms, features, features + 2, context)


def _planar(parameters: Tensor, features: int) -> Transform:
    u, w, b = parameters.split([features, features, 1], -1)
    return PlanarTransform(u, w, b.squeeze(-1))


def _radial(parameters: Tensor, features: int) -> Transform:
    centre, alpha, beta = parameters.split([features, 1, 1], -1)
    return RadialTransform(centre, alpha.squeeze(-1), beta.squeeze(-1))


class _Layers(nn.Module):
    """The lazy transform: layers whose parameters are numbers, plus a linear function of the context."""

    def __init__(
        self, layer: Callable[[Tensor, int], Transform], transforms: int, features: int, size: int, context: int
    ) -> None:
        super().__init__()
        self.layer, self.features = layer, features
        self.start = nn.Parameter(torch.randn(transforms, size) / features**0.5)
        self.slope = nn.Parameter(torch.zeros(transforms, size, context)) if context else None

    def forward(self, context: Tensor | None = None) -> Transform:
        """Return the map from the data to the base given a context, (..., context)."""
        parameters = list(self.start)
        if context is not None and self.slope is not None:
            moved = torch.einsum("lsc,...c->l...s", self.slope, context).to(self.start.dtype)
            parameters = [p + m for p, m in zip(parameters, moved, strict=True)]
        return ComposeTransform([self.layer(p, self.features) for p in parameters])
