r"""Splines of which some coordinates are angles: the layers of a flow on circles and lines.

An angle x is rotated, and mapped by a rational-quadratic spline from :math:`[-\pi, \pi)` to itself whose derivatives at both
ends are equal:

.. math:: y = s(x + r \bmod 2 \pi).

So its density is continuous where the ends meet. Networks read :math:`(\cos x, \sin x)` in place of x, so that the
distribution of other coordinates is continuous there too. Coordinates on lines have the splines of `RationalQuadraticSpline`,
which are the identity outside [-5, 5].

Durkan et al., *Neural Spline Flows* (arXiv 1906.04032); Rezende et al., *Normalizing Flows on Tori and Spheres* (arXiv
2002.02428).
"""

from __future__ import annotations

__all__ = ["Circular", "CircularBase", "CircularLayer", "CircularSpline", "wrapped"]

from collections.abc import Sequence
from functools import partial
from math import ceil, log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, biject_to, constraints, transform_to

from pyro_genmodels.nn.splines import RationalQuadraticSpline
from pyro_genmodels.nn.zuko_layers import zuko


class Circular(constraints.half_open_interval):
    r"""The set of angles in :math:`[-\pi, \pi)`, whose ends are one point.

    So :math:`\pi` is in the set too, as `torch.atan2` returns it. For samplers and guides, which want real numbers, the set is
    mapped like the interval.

    Example:
        >>> Circular(), Circular().check(torch.tensor([-3.1, pi, 3.2]))
        (circular, tensor([ True,  True, False]))
    """

    has_ends = False
    if_outside = "Bring angles into the range by torch.remainder(angle + pi, 2 * pi) - pi, degrees by torch.deg2rad before."
    """Advice about numbers that are no angles."""

    def __init__(self) -> None:
        super().__init__(-pi, pi)

    def check(self, value: Tensor) -> Tensor:
        """Return True for each number that is an angle of the set, (...)."""
        return (self.lower_bound <= value) & (value <= self.upper_bound)

    def __repr__(self) -> str:
        return "circular"


@biject_to.register(Circular)
@transform_to.register(Circular)
def _angles_to_reals(support: Circular) -> Transform:
    return biject_to(constraints.half_open_interval(support.lower_bound, support.upper_bound))


def wrapped(angle: Tensor) -> Tensor:
    r"""Return angles in :math:`[-\pi, \pi]` that differ by multiples of :math:`2 \pi`; the upper end is due to rounding.

    Example:
        >>> wrapped(torch.tensor([0.5, 0.5 + 2 * pi]))
        tensor([0.5000, 0.5000])
    """
    return torch.remainder(angle + pi, 2 * pi) - pi


class CircularSpline(RationalQuadraticSpline):
    """A spline of K bins for each coordinate, of which some are angles.

    Args:
        widths: unconstrained widths of the bins, (..., d, K).
        heights: unconstrained heights of the bins, (..., d, K).
        derivatives: unconstrained derivatives at the ends, which only circles have, and at the inner knots, (..., d, K).
        rotation: angle r above, which only circles have, (..., d).
        angles: True for each coordinate that is an angle, (d,).
        bound: largest size of a number that is mapped, (d,): pi for angles.

    Example:
        >>> angles, bound = torch.tensor([True, False]), torch.tensor([pi, 5.0])
        >>> same = torch.zeros(2, 8)  # equal bins: a rotation, and the identity
        >>> spline = CircularSpline(same, same, same, torch.tensor([3.0, 3.0]), angles, bound)
        >>> spline(torch.tensor([1.0, 1.0])), spline(torch.tensor([1.0 + 2 * pi, 7.0]))
        (tensor([-2.2832,  1.0000]), tensor([-2.2832,  7.0000]))
    """

    def __init__(
        self, widths: Tensor, heights: Tensor, derivatives: Tensor, rotation: Tensor, angles: Tensor, bound: Tensor
    ) -> None:
        super().__init__(widths, heights, derivatives[..., 1:], bound=bound)
        ends = derivatives[..., :1] * angles.unsqueeze(-1)
        self.derivatives = torch.cat((ends, derivatives[..., 1:], ends), -1)
        self.rotation, self.angles = rotation, angles

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().call_and_ladj(torch.where(self.angles, wrapped(x + self.rotation), x))

    def _inverse(self, y: Tensor) -> Tensor:
        x = super()._inverse(torch.where(self.angles, wrapped(y), y))
        return torch.where(self.angles, wrapped(x - self.rotation), x)

    def _is_inside(self, values: Tensor) -> Tensor:
        return super()._is_inside(values) | self.angles


class CircularLayer(zuko.lazy.LazyTransform):
    """An autoregressive layer of such splines.

    Args:
        angles: True for each coordinate that is an angle.
        context: length of the context vector, 0 for none.
        order: place of each coordinate in the order, (d,).
        passes: number of network passes of the inverse; None for one per coordinate, 2 for a coupling.
        bins: number of pieces of each spline.
        network: keyword arguments of zuko's masked network.
    """

    univariate = CircularSpline

    def __init__(
        self, angles: Sequence[bool], context: int, *, order: Tensor, passes: int | None, bins: int, **network: Any
    ) -> None:
        super().__init__()
        features = len(angles)
        self.passes, self.sizes = min(features, passes or features), [bins, bins, bins, 1]
        is_angle = torch.tensor([*angles, *[False] * context])
        columns = torch.arange(features + context).repeat_interleave(1 + is_angle.long())
        phase = torch.cat([torch.tensor([0.0, pi / 2][: 1 + int(a)]) for a in is_angle])  # the sine is a shifted cosine
        group = order.div(ceil(features / self.passes), rounding_mode="floor")
        sees = torch.cat((group[:, None] > group, torch.ones(features, context, dtype=torch.bool)), 1)[:, columns]
        for name, buffer in (
            ("angles", is_angle[:features]),
            ("columns", columns),
            ("read_as_angle", is_angle[columns]),
            ("phase", phase),
        ):
            self.register_buffer(name, buffer, persistent=False)
        sees = sees.repeat_interleave(sum(self.sizes), 0)
        self.hyper = zuko.nn.MaskedMLP(sees, **network) if sees.any() else _Constant(len(sees))

    def forward(self, context: Tensor | None = None) -> Transform:
        return zuko.transforms.AutoregressiveTransform(partial(self.splines, context), self.passes)

    def splines(self, context: Tensor | None, x: Tensor) -> Transform:
        """Return the splines of x (..., d) given a context (..., c); the one of a coordinate depends on those before it."""
        inputs = x if context is None else torch.cat(zuko.utils.broadcast(x, context, ignore=1), dim=-1)
        inputs = inputs[..., self.columns]
        inputs = torch.where(self.read_as_angle, (inputs - self.phase).cos(), inputs)
        outputs = self.hyper(inputs).to(x.dtype).unflatten(-1, (len(self.angles), -1))
        widths, heights, derivatives, rotation = outputs.split(self.sizes, -1)
        bound = x.new_full(self.angles.shape, 5.0).masked_fill(self.angles, pi)  # a buffer would be rounded to float32
        spline = CircularSpline(widths, heights, derivatives, rotation.squeeze(-1), self.angles, bound)
        return zuko.transforms.DependentTransform(spline, 1)


class _Constant(nn.Module):
    """The network of coordinates that read nothing, such as a single one without a context."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.outputs.expand(*inputs.shape[:-1], -1)


class CircularBase(dist.TorchDistribution):
    """The base of such flows: angles that are uniform on the circle, and standard normal numbers, all independent.

    Args:
        angles: True for each coordinate that is an angle, of the batch shape.
        like: tensor of the dtype of samples.

    Example:
        >>> base = CircularBase(torch.tensor([True, False]), torch.zeros(()))
        >>> base.log_prob(torch.zeros(2))
        tensor([-1.8379, -0.9189])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = True

    def __init__(self, angles: Tensor, like: Tensor) -> None:
        self.angles, self.like = angles, like.detach().flatten()[:1].sum()
        super().__init__(angles.shape, Size(), validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        if self.angles.all():
            return Circular()
        raise NotImplementedError("The coordinates of this base lie in different sets: angles on circles, others on lines.")

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(self.angles, -log(2 * pi), value * value * -0.5 - log(2 * pi) / 2)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        uniform = torch.rand(shape, dtype=self.like.dtype, device=self.like.device)
        normal = torch.randn(shape, dtype=self.like.dtype, device=self.like.device)
        return torch.where(self.angles, (2 * uniform - 1) * pi, normal)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CircularBase:
        return CircularBase(self.angles.expand(Size(batch_shape)), self.like)
