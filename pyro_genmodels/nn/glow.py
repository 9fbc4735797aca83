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
one pass. Round-trip errors in float32, of trained flows of 8 x 8 pixels: 2e-6 for affine functions, 4e-6 for splines
(`benchmarks/inverses.py`). Kingma & Dhariwal (arXiv 1807.03039), Dinh et al. (arXiv 1605.08803).
"""

from __future__ import annotations

__all__ = ["Glow"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints

from pyro_genmodels.nn.checks import check_count
from pyro_genmodels.nn.glow_layers import Given, Level
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


class _Glow(nn.Module):
    """The lazy transform of flattened images.

    Args:
        choice: the options.
        shape: shape of images (c, h, w).
        context: length of the context vector.
        given_event: True if contexts begin with a flattened image.
    """

    levels: Sequence[Level]

    def __init__(self, choice: Glow, shape: tuple[int, int, int], context: int, *, given_event: bool) -> None:
        super().__init__()
        self.shape, self.given_event = shape, given_event
        channels, height, width = shape
        image = channels * given_event
        levels = []
        for level in range(choice.levels):
            channels, image, height, width = 4 * channels, 4 * image, height // 2, width // 2
            options = choice.steps, choice.channels, choice.bins
            last = level == choice.levels - 1
            levels.append(Level((channels, height, width), *options, image=image, context=context, last=last))
            channels //= 2
        self.levels = nn.ModuleList(levels)  # type: ignore[assignment]

    def forward(self, context: Tensor | None = None) -> Transform:
        return _ImageTransform(self, context)

    def given(self, context: Tensor | None, batch_shape: Size) -> list[Given]:
        """Return what the networks of each level are given, for images of a batch shape."""
        image = None
        if context is not None:
            context = context.expand(*batch_shape, context.shape[-1]).reshape(-1, context.shape[-1])
            if self.given_event:
                image, context = context.tensor_split([Size(self.shape).numel()], -1)
                image = image.unflatten(-1, self.shape)
        found = [Given(image, context).squeezed()]
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
