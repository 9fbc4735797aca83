r"""The networks of a GAN: generators, which map noise to events, and critics, which map events to one number each.

Each class is a *choice*, an immutable record of options whose `build` makes a module. A generator is called as (z, context),
with z (n, latent), and returns events (n, *shape). A critic is called as (x, context) and returns (n,); its x is (n, *shape),
or (n, pack, *shape) if it is given several rows together.
"""

from __future__ import annotations

__all__ = ["ConvolutionalCritic", "ConvolutionalGenerator", "CriticChoice", "DenseCritic", "DenseGenerator", "GeneratorChoice"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_count, check_widths
from pyro_genmodels.nn.mlp import MLP
from pyro_genmodels.nn.residual import Residual


class GeneratorChoice(ABC):
    """A choice of a generator network."""

    standardize: ClassVar[bool | Literal["jointly"]] = "jointly"
    """The family's default for its argument `standardize`."""

    @abstractmethod
    def build(self, shape: Size, latent: int, context: int) -> nn.Module:
        """Build the generator.

        Args:
            shape: shape of one event.
            latent: number of coordinates of the noise.
            context: length of the context vector, 0 for none.
        """


class CriticChoice(ABC):
    """A choice of a critic network."""

    @abstractmethod
    def build(self, shape: Size, pack: int, context: int) -> nn.Module:
        """Build the critic.

        Args:
            shape: shape of one event.
            pack: number of events that the critic is given together.
            context: total length of the context vectors of these events, 0 for none.
        """


@dataclass(frozen=True)
class DenseGenerator(GeneratorChoice):
    """A multilayer perceptron.

    Args:
        hidden: widths of the hidden layers.
        octaves: number of octaves of additional inputs: sines and cosines of each coordinate of the noise at 1, 2, 4, ...
            radians per unit. They help with data in separate clusters, which a smooth map joins by bridges.
    """

    hidden: Sequence[int] = (128, 128, 128)
    octaves: int = 0
    standardize: ClassVar[bool | Literal["jointly"]] = True

    def __post_init__(self) -> None:
        check_widths("DenseGenerator", hidden=self.hidden, empty=True)
        check_count("DenseGenerator", octaves=self.octaves, least=0)

    def build(self, shape: Size, latent: int, context: int) -> nn.Module:
        return _DenseGenerator(shape, latent, context, self.hidden, self.octaves)


class _DenseGenerator(nn.Module):
    def __init__(self, shape: Size, latent: int, context: int, hidden: Sequence[int], octaves: int) -> None:
        super().__init__()
        self.shape, self.features = shape, _Octaves(octaves)
        self.mlp = MLP(latent * self.features.factor + context, shape.numel(), hidden)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        z = self.features(z)
        return self.mlp(z if context is None else torch.cat([z, context], -1)).reshape(len(z), *self.shape)


@dataclass(frozen=True)
class DenseCritic(CriticChoice):
    """A multilayer perceptron over the flattened event.

    Args:
        hidden: widths of the hidden layers.
        octaves: number of octaves of additional inputs: sines and cosines of each coordinate at 1, 2, 4, ... radians per unit.
            They help with fine structure in few dimensions.
    """

    hidden: Sequence[int] = (128, 128, 128)
    octaves: int = 0

    def __post_init__(self) -> None:
        check_widths("DenseCritic", hidden=self.hidden, empty=True)
        check_count("DenseCritic", octaves=self.octaves, least=0)

    def build(self, shape: Size, pack: int, context: int) -> nn.Module:
        return _DenseCritic(pack * shape.numel(), context, self.hidden, self.octaves)


class _DenseCritic(nn.Module):
    def __init__(self, inputs: int, context: int, hidden: Sequence[int], octaves: int) -> None:
        super().__init__()
        self.features = _Octaves(octaves)
        self.mlp = MLP(inputs * self.features.factor + context, 1, hidden)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.features(x.reshape(len(x), -1))
        return self.mlp(x if context is None else torch.cat([x, context], -1)).squeeze(-1)


class _Octaves(nn.Module):
    """Fourier features: each coordinate with its sines and cosines at `octaves` frequencies, (n, d) -> (n, factor * d)."""

    frequencies: Tensor

    def __init__(self, octaves: int) -> None:
        super().__init__()
        self.factor = 1 + 2 * octaves
        self.register_buffer("frequencies", 2.0 ** torch.arange(octaves), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.factor == 1:
            return x
        angles = (x.unsqueeze(-1) * self.frequencies).flatten(1)
        return torch.cat([x, angles.sin(), angles.cos()], -1)


@dataclass(frozen=True)
class ConvolutionalGenerator(GeneratorChoice):
    """A residual network from a coarse image to a fine one, each stage at twice the resolution of the one before.

    Args:
        channels: number of channels of each stage, from coarse to fine.

    Raises:
        ValueError: in `build`, if events are not images or their sides cannot be halved that often.
    """

    channels: Sequence[int] = (64, 64, 32)

    def __post_init__(self) -> None:
        check_widths("ConvolutionalGenerator", channels=self.channels)

    def build(self, shape: Size, latent: int, context: int) -> nn.Module:
        _check_image("ConvolutionalGenerator", shape, self.channels)
        return _ConvolutionalGenerator(shape, latent + context, self.channels)


class _ConvolutionalGenerator(nn.Module):
    def __init__(self, shape: Size, inputs: int, channels: Sequence[int]) -> None:
        super().__init__()
        factor = 2 ** (len(channels) - 1)
        self.shape = shape
        self.coarse = (channels[0], shape[-2] // factor, shape[-1] // factor)
        self.first = nn.Linear(inputs, Size(self.coarse).numel())
        self.stages = nn.ModuleList(Residual(a, b) for a, b in zip((channels[0], *channels), channels, strict=False))
        self.last = nn.Conv2d(channels[-1], 1 if len(shape) == 2 else shape[0], 3, padding=1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(z if context is None else torch.cat([z, context], -1)).reshape(len(z), *self.coarse)
        for i, stage in enumerate(self.stages):
            h = stage(F.interpolate(h, scale_factor=2.0, mode="nearest") if i else h)
        return self.last(F.silu(h)).reshape(len(z), *self.shape)


@dataclass(frozen=True)
class ConvolutionalCritic(CriticChoice):
    """A residual network over images (h, w) or (c, h, w), each stage at half the resolution of the one before.

    Args:
        channels: number of channels of each stage, from fine to coarse.

    Raises:
        ValueError: in `build`, if events are not images or their sides cannot be halved that often.
    """

    channels: Sequence[int] = (32, 64, 64)

    def __post_init__(self) -> None:
        check_widths("ConvolutionalCritic", channels=self.channels)

    def build(self, shape: Size, pack: int, context: int) -> nn.Module:
        _check_image("ConvolutionalCritic", shape, self.channels)
        return _ConvolutionalCritic(shape, pack, context, self.channels)


class _ConvolutionalCritic(nn.Module):
    def __init__(self, shape: Size, pack: int, context: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.input_channels, self.sides = pack * (1 if len(shape) == 2 else shape[0]), shape[-2:]
        self.first = nn.Conv2d(self.input_channels, channels[0], 3, padding=1)
        self.context = nn.Linear(context, channels[0], bias=False) if context else None
        self.stages = nn.ModuleList(Residual(a, b) for a, b in zip((channels[0], *channels), channels, strict=False))
        factor = 2 ** (len(channels) - 1)
        self.last = nn.Linear(channels[-1] * (shape[-2] // factor) * (shape[-1] // factor), 1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.first(x.reshape(len(x), self.input_channels, *self.sides))
        if self.context is not None:
            h = h + self.context(context)[..., None, None]
        for i, stage in enumerate(self.stages):
            h = stage(F.avg_pool2d(h, 2) if i else h)
        return self.last(F.silu(h).flatten(1)).squeeze(-1)


def _check_image(owner: str, shape: Size, channels: Sequence[int]) -> None:
    factor = 2 ** (len(channels) - 1)
    if len(shape) not in (2, 3) or any(n % factor for n in shape[-2:]):
        raise ValueError(
            f"{owner}{tuple(channels)} wants images (h, w) or (c, h, w) whose sides are multiples of {factor}, but found "
            f"{tuple(shape)}. Use {owner.replace('Convolutional', 'Dense')}, fewer stages, or pad the images."
        )
