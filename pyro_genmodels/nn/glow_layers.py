"""The layers of `Glow`: channels mixed, half of them moved by functions of the other half, and their conditional prior."""

from __future__ import annotations

__all__ = ["Given", "Level"]

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_genmodels.nn.affine import BoundedAffine
from pyro_genmodels.nn.precision import full_precision
from pyro_genmodels.nn.splines import RationalQuadraticSpline


class Given(NamedTuple):
    """Conditions of the networks beside the channels that they read: an image (n, g, h, w) and a context (n, c)."""

    image: Tensor | None
    context: Tensor | None

    def beside(self, x: Tensor) -> Tensor:
        """Return channels (n, c, h, w) with those of the image beside them."""
        return x if self.image is None else torch.cat((x, self.image), 1)

    def squeezed(self) -> Given:
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

    def forward(self, x: Tensor, given: Given) -> Tensor:
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

    def forward(self, x: Tensor, given: Given) -> Tensor:
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

    def forward(self, others: Tensor, given: Given) -> Transform:
        phi = self.network(others, given).to(others.dtype)
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

    @full_precision
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed channels (n, c, h, w), and the change of log volume, ()."""
        change = x.shape[-2] * x.shape[-1] * (self.log_diagonal + self.log_scale).sum()
        lower, upper = self._lower_and_upper()
        weight = self.permutation @ lower @ upper * self.log_scale.exp()
        return F.conv2d(x, weight[..., None, None], self.shift), change

    @full_precision
    def inverse(self, y: Tensor) -> Tensor:
        lower, upper = self._lower_and_upper()
        half = torch.linalg.solve_triangular(lower, self.permutation.mT, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, half, upper=True) * (-self.log_scale).exp().unsqueeze(-1)
        return F.conv2d(y - self.shift[:, None, None], weight[..., None, None])


class _Step(nn.Module):
    """Channels mixed, and half of them moved by functions that depend on the other half: see `Level`."""

    def __init__(self, channels: int, hidden: int, bins: int | None, image: int, context: int) -> None:
        super().__init__()
        half = channels // 2
        network = _Network(half + image, half * _Functions.number(bins), hidden, context)
        self.mixing, self.functions = _Mixing(channels), _Functions(network, bins)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor]:
        x, change = self.mixing(x)
        kept, moved = x.chunk(2, 1)
        moved, ladj = self.functions(kept, given).call_and_ladj(moved)
        return torch.cat((kept, moved), 1), change + ladj.flatten(1).sum(1)

    def inverse(self, y: Tensor, given: Given) -> Tensor:
        kept, moved = y.chunk(2, 1)
        mixed: Tensor = self.mixing.inverse(torch.cat((kept, self.functions(kept, given).inv(moved)), 1))
        return mixed


class Level(nn.Module):
    """Steps at one scale, after which channels leave: half of them, or all at the last scale.

    Args:
        shape: shape of the squeezed images, (c, h, w).
        steps: number of steps.
        hidden: number of hidden channels of the networks.
        bins: number of bins of splines; None for affine functions.
        image: number of channels of the image that networks are given.
        context: length of the context vector.
        last: True for the last scale.
    """

    steps: Sequence[_Step]  # a ModuleList, which has no type of its items

    def __init__(
        self,
        shape: tuple[int, int, int],
        steps: int,
        hidden: int,
        bins: int | None,
        *,
        image: int,
        context: int,
        last: bool,
    ) -> None:
        super().__init__()
        channels, *sides = shape
        self.stays = 0 if last else channels // 2
        leaves = channels - self.stays
        self.latents = (leaves, *sides)
        layers = [_Step(channels, hidden, bins, image, context) for _ in range(steps)]
        self.steps = nn.ModuleList(layers)  # type: ignore[assignment]
        self.prior = _Functions(_Shallow(self.stays, (2 * leaves, *sides), context), None)

    def forward(self, x: Tensor, given: Given) -> tuple[Tensor, Tensor, Tensor]:
        """Return channels that stay (n, c, h, w), the latent variables of those that leave (n, d), and the log determinant."""
        ladj = x.new_zeros(len(x))
        for step in self.steps:
            x, change = step(x, given)
            ladj = ladj + change
        stays, leaves = x.tensor_split([self.stays], 1)
        u, change = self.prior(stays, given).call_and_ladj(leaves)
        return stays, u.flatten(1), ladj + change.flatten(1).sum(1)

    def inverse(self, stays: Tensor, u: Tensor, given: Given) -> Tensor:
        leaves = self.prior(stays, given).inv(u.unflatten(1, self.latents))
        x = torch.cat((stays, leaves), 1)
        for step in reversed(self.steps):
            x = step.inverse(x, given)
        return x


def _zero(layer: nn.Module) -> nn.Module:
    """Set the layer's parameters to zero and return it."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
