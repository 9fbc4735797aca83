"""Networks for scores and velocities, which depend on a point and a time: dense networks for vectors, U-Nets for images.

Each choice, `DenseField` or `UNet`, is an immutable record of options whose `build` makes a module for a family's event shape.
The module is called as network(x, t, context), with x (n, *event_shape), t (n,) and context (n, c) or None. It returns a tensor
of the shape of x, which is zero before training.

Sinusoidal embedding of time: Vaswani et al. (arXiv 1706.03762), of coordinates: Tancik et al. (arXiv 2006.10739); U-Nets
for scores: Ho et al. (arXiv 2006.11239), Ronneberger et al. (arXiv 1505.04597).
"""

from __future__ import annotations

__all__ = ["DenseField", "FieldChoice", "UNet"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import log
from typing import ClassVar, Literal

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from pyro_genmodels.nn.checks import check_count, check_rate, check_widths
from pyro_genmodels.nn.recompute import NOT_SAVED, check_recompute, run

NUM_TIME_FEATURES = 64
"""Length of the sinusoidal embedding of time."""


class FieldChoice(ABC):
    """A choice of a network for scores or velocities."""

    standardize: ClassVar[bool | Literal["jointly"]] = True
    """The family's default for its argument `standardize`."""

    @abstractmethod
    def build(self, shape: Size, context: int) -> nn.Module:
        """Build the network for events of a shape and contexts of a length, 0 for none."""


@dataclass(frozen=True)
class DenseField(FieldChoice):
    """A dense network with residual blocks.

    Attributes:
        width: width of each layer.
        blocks: number of residual blocks, of two layers each.
        dropout: rate at which units are dropped in training.
        octaves: number of octaves of additional inputs: sines and cosines of each coordinate at frequencies 1, 2, 4, ..., with
            which the network learns fine structure in few dimensions.
    """

    width: int = 256
    blocks: int = 3
    dropout: float = 0.0
    octaves: int = 0

    def __post_init__(self) -> None:
        check_count("DenseField", width=self.width)
        check_count("DenseField", blocks=self.blocks, octaves=self.octaves, least=0)
        check_rate("DenseField", dropout=self.dropout)

    def build(self, shape: Size, context: int) -> nn.Module:
        return _Dense(shape, context, self.width, self.blocks, self.dropout, self.octaves)


@dataclass(frozen=True)
class UNet(FieldChoice):
    """A U-Net for images (h, w) or (c, h, w).

    Attributes:
        channels: number of channels at each resolution, from fine to coarse; each resolution is half of the one before.
        attention: True for attention between pixels at the coarsest resolution.
        dropout: rate at which units are dropped in training.
        recompute: True to compute the activations of each layer again in the backward pass instead of holding them: much less
            memory for about a third more time, with the same gradients. It is not saved with a family.

    Raises:
        TypeError: if the channels are not a sequence of positive integers.
        ValueError: if they are not multiples of 8; in `build`, if events are not images or their sides cannot be halved that
            often.
    """

    standardize: ClassVar[bool | Literal["jointly"]] = "jointly"

    channels: Sequence[int] = (32, 64, 64)
    attention: bool = True
    dropout: float = 0.0
    recompute: bool = field(default=False, metadata=NOT_SAVED)

    def __post_init__(self) -> None:
        check_widths("UNet", channels=self.channels)
        check_rate("UNet", dropout=self.dropout)
        check_recompute("UNet", self.recompute)
        if any(n % 8 for n in self.channels):
            raise ValueError(f"UNet wants channels in multiples of 8, such as (32, 64, 64), but found {tuple(self.channels)}.")

    def build(self, shape: Size, context: int) -> nn.Module:
        factor = 2 ** (len(self.channels) - 1)
        if len(shape) not in (2, 3) or any(n % factor for n in shape[-2:]):
            raise ValueError(
                f"UNet{tuple(self.channels)} wants images (h, w) or (c, h, w) whose sides are multiples of {factor}, but "
                f"found {tuple(shape)}. Use DenseField, other channels, or pad the images."
            )
        return _UNet(self, shape, context)


class _Condition(nn.Module):
    """A network that embeds time and context in one vector, which every layer is given."""

    frequencies: Tensor

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, log(100.0), NUM_TIME_FEATURES // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(NUM_TIME_FEATURES + context, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, t: Tensor, context: Tensor | None) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies
        parts = [angles.cos(), angles.sin()] + ([] if context is None else [context])
        return self.layers(torch.cat(parts, -1))


class _Dense(nn.Module):
    frequencies: Tensor

    def __init__(self, shape: Size, context: int, width: int, blocks: int, dropout: float, octaves: int) -> None:
        super().__init__()
        self.shape = Size(shape)
        self.register_buffer("frequencies", 2.0 ** torch.arange(octaves), persistent=False)
        self.condition = _Condition(context, width)
        self.first = nn.Linear(self.shape.numel() * (1 + 2 * octaves), width)
        self.blocks = nn.ModuleList(_DenseBlock(width, dropout) for _ in range(blocks))
        self.last = _zero(nn.Linear(width, self.shape.numel()))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        condition = self.condition(t, context)
        angles = (x.reshape(len(x), -1, 1) * self.frequencies).flatten(1)
        h = self.first(torch.cat([x.reshape(len(x), -1), angles.sin(), angles.cos()], -1))
        for block in self.blocks:
            h = block(h, condition)
        return self.last(F.silu(h)).reshape(x.shape)


class _DenseBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.first, self.condition, self.second = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        inner = F.silu(self.first(F.silu(h)) + self.condition(condition))
        return h + self.second(self.dropout(inner))


class _UNet(nn.Module):
    def __init__(self, choice: UNet, shape: Size, context: int) -> None:
        super().__init__()
        channels, dropout, self.recompute = choice.channels, choice.dropout, choice.recompute
        image_channels, width = (1 if len(shape) == 2 else shape[0]), 4 * channels[0]
        self.condition = _Condition(context, width)
        self.first = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        pairs = list(zip((channels[0], *channels), channels, strict=False))
        self.down = nn.ModuleList(_ConvolutionalBlock(a, b, width, dropout) for a, b in pairs)
        self.middle = _ConvolutionalBlock(channels[-1], channels[-1], width, dropout)
        self.attention = _Attention(channels[-1]) if choice.attention else None
        back = zip(channels[::-1], (*channels[-2::-1], channels[0]), strict=True)
        self.up = nn.ModuleList(_ConvolutionalBlock(2 * a, b, width, dropout) for a, b in back)
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = _zero(nn.Conv2d(channels[0], image_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        condition = self.condition(t, context)
        h, skips = self.first(x if x.dim() == 4 else x.unsqueeze(1)), []
        for i, block in enumerate(self.down):
            h = run(block, F.avg_pool2d(h, 2) if i else h, condition, recompute=self.recompute)
            skips.append(h)
        h = run(self.middle, h, condition, recompute=self.recompute)
        if self.attention is not None:
            h = run(self.attention, h, recompute=self.recompute)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if i else h
            h = run(block, torch.cat([h, skips.pop()], 1), condition, recompute=self.recompute)
        return self.last(F.silu(self.norm(h))).reshape(x.shape)


class _ConvolutionalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.condition = nn.Linear(width, outputs)
        drop = nn.Dropout(dropout) if dropout else nn.Identity()
        last = _zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.after = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), drop, last)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        return self.skip(h) + self.after(self.before(h) + self.condition(condition)[..., None, None])


class _Attention(nn.Module):
    """Self-attention between all pixels, with four heads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.inputs, self.output = nn.Conv2d(channels, 3 * channels, 1), _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, h: Tensor) -> Tensor:
        n, c, height, width = h.shape
        q, k, v = self.inputs(self.norm(h)).reshape(n, 3, 4, c // 4, height * width).transpose(-1, -2).unbind(1)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(n, c, height, width)
        return h + self.output(attended)


def _zero(layer: nn.Module) -> nn.Module:
    """Set the layer's parameters to zero and return it."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
