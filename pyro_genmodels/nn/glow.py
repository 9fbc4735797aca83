r"""Glow: a flow of images at several scales.

A level squeezes blocks of 2 x 2 pixels into channels and then takes K steps. A step mixes the channels by an invertible matrix
and moves half of them by functions whose parameters a network reads from the other half. At the end of a level, half of the
channels leave as latent variables, normal given those that stay:

.. math::

    y = W (e^{s} \odot x) + b, \qquad z_2 = g\bigl(y_2; \operatorname{NN}(y_1, c)\bigr), \quad z_1 = y_1, \qquad
    u = \bigl(z_\text{leaves} - \mu(z_\text{stays})\bigr) / \sigma(z_\text{stays}) .

W is orthogonal at the start and kept as PLU, so that log \|det W\| is a sum and the inverse takes two triangular solves. The
scale s and the shift b of the channels (*actnorm*) start at the identity instead of from a first batch, as suits standardised
data. The functions g are affine with a bounded scale, or splines; they too are the identity at the start. Each direction is
one pass. Kingma & Dhariwal (arXiv 1807.03039), Dinh et al. (arXiv 1605.08803).
"""

from __future__ import annotations

__all__ = ["Glow"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_genmodels.nn.affine import BoundedAffine
from pyro_genmodels.nn.checks import check_count
from pyro_genmodels.nn.splines import RationalQuadraticSpline
from pyro_genmodels.nn.transforms import FlowChoice


@dataclass(frozen=True)
class Glow(FlowChoice):
    """A flow of images (h, w) or (c, h, w) at several scales, whose sides can be halved `levels` times.

    It starts as a rotation of the channels, which suits standardised data: a `Flow` of it standardises all pixels jointly by
    default. A context is added to the hidden units of each network.

    Args:
        levels: number of scales; each halves the sides of the images.
        steps: number of steps at each scale.
        channels: number of hidden channels of the network in each step.
        bins: number of pieces of the splines that move channels; None for affine functions.

    Raises:
        ValueError: for a number that is not a positive integer, or fewer than 2 bins; by `build_for`, if events are not images
            or their sides cannot be halved that often.

    Example:
        >>> from pyro_genmodels import Flow
        >>> from pyro_genmodels.families import Glow
        >>> flow = Flow((3, 8, 8), transform=Glow(levels=2, steps=2, channels=16), levels=256)
        >>> flow().sample((5,)).shape
        torch.Size([5, 3, 8, 8])
    """

    levels: int = 2
    steps: int = 8
    channels: int = 64
    bins: int | None = None

    standardize: ClassVar[bool | Literal["jointly"]] = "jointly"

    def __post_init__(self) -> None:
        check_count("Glow", levels=self.levels, steps=self.steps, channels=self.channels)
        if self.bins is not None:
            check_count("Glow", bins=self.bins, least=2)

    def build(self, features: int, context: int) -> nn.Module:
        raise ValueError(
            f"Glow wants the shape of images, but found {features} coordinates without one. Use RealNVP() or NSF()."
        )

    def build_for(self, event_shape: Size, context: int, *, given_event: bool = False) -> nn.Module:
        """Build the lazy transform of flattened images. An image that it is conditioned on is read by its convolutions."""
        factor = 2**self.levels
        if len(event_shape) not in (2, 3) or any(n % factor or n == 0 for n in event_shape[-2:]):
            raise ValueError(
                f"Glow(levels={self.levels}) wants images (h, w) or (c, h, w) whose sides are multiples of {factor}, but found "
                f"{tuple(event_shape)}. Use fewer levels, pad the images, or use RealNVP() or NSF() for events of any shape."
            )
        colours, height, width = Size((1, *event_shape)[-3:])
        return _Glow(self, (colours, height, width), context, given_event=given_event)


class _Given(NamedTuple):
    """What networks are given beside the channels that they read: an image (n, g, h, w) and a context (n, c)."""

    image: Tensor | None
    context: Tensor | None

    def beside(self, x: Tensor) -> Tensor:
        """Return channels (n, c, h, w) with those of the image beside them."""
        return x if self.image is None else torch.cat((x, self.image), 1)

    def squeezed(self) -> _Given:
        return self if self.image is None else self._replace(image=F.pixel_unshuffle(self.image, 2))


class _Network(nn.Module):
    """A convolutional network, (n, inputs, h, w) -> (n, outputs, h, w), which is zero before training."""

    def __init__(self, inputs: int, outputs: int, channels: int, context: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, channels, 3, padding=1)
        self.context = nn.Linear(context, channels, bias=False) if context else None
        self.rest = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), _zero(nn.Conv2d(channels, outputs, 3, padding=1))
        )

    def forward(self, x: Tensor, given: _Given) -> Tensor:
        h = self.first(given.beside(x))
        if self.context is not None:
            h = h + self.context(given.context)[..., None, None]
        out: Tensor = self.rest(h)
        return out


class _Shallow(nn.Module):
    """A bias for each pixel, a convolution and an affine function of the context, zero before training."""

    def __init__(self, inputs: int, outputs: Sequence[int], context: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(*outputs))
        self.convolution = _zero(nn.Conv2d(inputs, outputs[0], 3, padding=1, bias=False)) if inputs else None
        self.context = _zero(nn.Linear(context, outputs[0], bias=False)) if context else None

    def forward(self, x: Tensor, given: _Given) -> Tensor:
        out = self.bias.expand(len(x), *self.bias.shape)
        if self.convolution is not None:
            out = out + self.convolution(x)
        if self.context is not None:
            out = out + self.context(given.context)[..., None, None]
        return out


class _Functions(nn.Module):
    """Functions of channels whose parameters a network reads from other channels.

    Args:
        network: network from the other channels to the parameters, (n, channels * number per channel, h, w).
        bins: number of bins of splines; None for affine functions.
    """

    def __init__(self, network: nn.Module, bins: int | None) -> None:
        super().__init__()
        self.network, self.bins = network, bins
        self.univariate: Any = BoundedAffine if bins is None else RationalQuadraticSpline

    @staticmethod
    def number(bins: int | None) -> int:
        """Return the number of parameters of one function."""
        return 2 if bins is None else 3 * bins - 1

    def forward(self, others: Tensor, given: _Given) -> Transform:
        phi = self.network(others, given)
        if self.bins is None:
            return self.univariate(*phi.chunk(2, 1))
        phi = phi.unflatten(1, (3 * self.bins - 1, -1)).movedim(1, -1)
        return self.univariate(*phi.split([self.bins, self.bins, self.bins - 1], -1))


class _Mixing(nn.Module):
    """An affine function of the channels of each pixel, whose matrix is diag(s) followed by PLU."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.factors = nn.Parameter(lower.tril(-1) + upper.triu(1))
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def _lower_and_upper(self) -> tuple[Tensor, Tensor]:
        lower = self.factors.tril(-1) + torch.eye(len(self.sign), dtype=self.sign.dtype, device=self.sign.device)
        return lower, self.factors.triu(1) + (self.sign * self.log_diagonal.exp()).diag()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed channels (n, c, h, w), and the change of log volume, ()."""
        lower, upper = self._lower_and_upper()
        weight = self.permutation @ lower @ upper * self.log_scale.exp()
        return F.conv2d(x, weight[..., None, None], self.shift), x[0, 0].numel() * (self.log_diagonal + self.log_scale).sum()

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self._lower_and_upper()
        half = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, half, upper=True) * (-self.log_scale).exp().unsqueeze(-1)
        return F.conv2d(y - self.shift[:, None, None], weight[..., None, None])


class _Step(nn.Module):
    """Channels mixed, and half of them moved by functions that depend on the other half."""

    def __init__(self, choice: Glow, channels: int, image: int, context: int) -> None:
        super().__init__()
        half = channels // 2
        network = _Network(half + image, half * _Functions.number(choice.bins), choice.channels, context)
        self.mixing, self.functions = _Mixing(channels), _Functions(network, choice.bins)

    def forward(self, x: Tensor, given: _Given) -> tuple[Tensor, Tensor]:
        x, change = self.mixing(x)
        kept, moved = x.chunk(2, 1)
        moved, ladj = self.functions(kept, given).call_and_ladj(moved)
        return torch.cat((kept, moved), 1), change + ladj.flatten(1).sum(1)

    def inverse(self, y: Tensor, given: _Given) -> Tensor:
        kept, moved = y.chunk(2, 1)
        mixed: Tensor = self.mixing.inverse(torch.cat((kept, self.functions(kept, given).inv(moved)), 1))
        return mixed


class _Level(nn.Module):
    """Steps at one scale, after which channels leave: half of them, or all at the last scale.

    Args:
        choice: the options.
        shape: shape of the squeezed images, (c, h, w).
        image: number of channels of the image that networks are given.
        context: length of the context vector.
        last: True for the last scale.
    """

    steps: Sequence[_Step]  # a ModuleList, which has no type of its items

    def __init__(self, choice: Glow, shape: tuple[int, int, int], image: int, context: int, *, last: bool) -> None:
        super().__init__()
        channels, *sides = shape
        self.stays = 0 if last else channels // 2
        leaves = channels - self.stays
        self.latents = (leaves, *sides)
        self.steps = nn.ModuleList(_Step(choice, channels, image, context) for _ in range(choice.steps))  # type: ignore[assignment]
        self.prior = _Functions(_Shallow(self.stays, (2 * leaves, *sides), context), None)

    def forward(self, x: Tensor, given: _Given) -> tuple[Tensor, Tensor, Tensor]:
        """Return channels that stay (n, c, h, w), the latent variables of those that leave (n, d), and the log determinant."""
        ladj = x.new_zeros(len(x))
        for step in self.steps:
            x, change = step(x, given)
            ladj = ladj + change
        stays, leaves = x.tensor_split([self.stays], 1)
        u, change = self.prior(stays, given).call_and_ladj(leaves)
        return stays, u.flatten(1), ladj + change.flatten(1).sum(1)

    def inverse(self, stays: Tensor, u: Tensor, given: _Given) -> Tensor:
        leaves = self.prior(stays, given).inv(u.unflatten(1, self.latents))
        x = torch.cat((stays, leaves), 1)
        for step in reversed(self.steps):
            x = step.inverse(x, given)
        return x


class _Glow(nn.Module):
    """The lazy transform of flattened images.

    Args:
        choice: the options.
        shape: shape of images (c, h, w).
        context: length of the context vector.
        given_event: True if contexts begin with a flattened image.
    """

    levels: Sequence[_Level]

    def __init__(self, choice: Glow, shape: tuple[int, int, int], context: int, *, given_event: bool) -> None:
        super().__init__()
        self.shape, self.given_event = shape, given_event
        channels, height, width = shape
        image = channels * given_event
        levels = []
        for level in range(choice.levels):
            channels, image, height, width = 4 * channels, 4 * image, height // 2, width // 2
            levels.append(_Level(choice, (channels, height, width), image, context, last=level == choice.levels - 1))
            channels //= 2
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]

    def forward(self, context: Tensor | None = None) -> Transform:
        return _ImageTransform(self, context)

    def given(self, context: Tensor | None, batch_shape: Size) -> list[_Given]:
        """Return what the networks of each level are given, for images of a batch shape."""
        image = None
        if context is not None:
            context = context.expand(*batch_shape, context.shape[-1]).reshape(-1, context.shape[-1])
            if self.given_event:
                image, context = context.tensor_split([Size(self.shape).numel()], -1)
                image = image.unflatten(-1, self.shape)
        found = [_Given(image, context).squeezed()]
        for _ in self.levels[1:]:
            found.append(found[-1].squeezed())
        return found


class _ImageTransform(Transform):
    """The bijection of flattened images (..., d) to latent variables (..., d), given a context (..., c) or None."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, network: _Glow, context: Tensor | None) -> None:
        super().__init__()
        self.network, self.context = network, context

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant, (...)."""
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent variables (..., d) and the log determinant (...), in one pass."""
        batch, latents = x.shape[:-1], []
        images, ladj = x.reshape(-1, *self.network.shape), torch.zeros((), dtype=x.dtype, device=x.device)
        for level, given in zip(self.network.levels, self.network.given(self.context, batch), strict=True):
            images, u, change = level(F.pixel_unshuffle(images, 2), given)
            latents.append(u)
            ladj = ladj + change
        return torch.cat(latents, 1).reshape(x.shape), ladj.reshape(batch)

    def _inverse(self, y: Tensor) -> Tensor:
        levels = self.network.levels
        parts = y.reshape(-1, y.shape[-1]).split([Size(level.latents).numel() for level in levels], 1)
        _, height, width = levels[-1].latents
        images = y.new_zeros(len(parts[0]), 0, height, width)  # nothing stays at the last level
        for level, u, given in reversed(list(zip(levels, parts, self.network.given(self.context, y.shape[:-1]), strict=True))):
            images = F.pixel_shuffle(level.inverse(images, u, given), 2)
        return images.reshape(y.shape)


def _zero(layer: nn.Module) -> nn.Module:
    """Set the layer's parameters to zero and return it."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
