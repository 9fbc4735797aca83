r"""Energies to choose from: positions in, one number out.

Each is a *choice*, an immutable record of options whose ``build(shape, kind, context)`` makes a module, (x, context) ->
energies (n,), for positions x (n, *shape) of one kind: real numbers, zeros and ones, or classes one-hot in the last dimension.
The constant term that no density knows is left out, so that every parameter has a gradient.
"""

from __future__ import annotations

__all__ = ["ConvolutionalEnergy", "DenseEnergy", "EnergyChoice"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.mlp import MLP
from pyro_genmodels.nn.residual import Residual


class EnergyChoice(ABC):
    """An energy, to be built for positions of a shape and kind."""

    @abstractmethod
    def build(self, shape: Size, kind: str, context: int) -> nn.Module:
        """The module for positions (n, *shape) of that kind and contexts (n, context), or none if that is 0."""


@dataclass(frozen=True)
class DenseEnergy(EnergyChoice):
    """A multilayer perceptron over the flattened position and the context.

    Args:
        hidden: widths of the hidden layers.
    """

    hidden: Sequence[int] = (128, 128)

    def __post_init__(self) -> None:
        if not isinstance(self.hidden, Sequence):
            raise TypeError(f"DenseEnergy wants widths of its hidden layers, such as (128, 128), but found {self.hidden!r}.")

    def build(self, shape: Size, kind: str, context: int) -> nn.Module:
        return _Dense(shape.numel() + context, self.hidden, centred=kind == "binary")


class _Dense(nn.Module):
    def __init__(self, inputs: int, hidden: Sequence[int], *, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.mlp = MLP(inputs, 1, hidden, last_bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.flatten(1) if x.dim() > 1 else x[:, None]
        x = 2 * x - 1 if self.centred else x
        return self.mlp(x if context is None else torch.cat([x, context], -1)).squeeze(-1)


@dataclass(frozen=True)
class ConvolutionalEnergy(EnergyChoice):
    """A residual network over images (h, w) or (c, h, w), each stage at half the resolution of the one before.

    Args:
        channels: of each stage.

    Raises:
        ValueError: by `build`, of what is no image, or too small to be halved so often.
    """

    channels: Sequence[int] = (32, 64, 64)

    def build(self, shape: Size, kind: str, context: int) -> nn.Module:
        image = shape[:-1] if kind == "categorical" else shape
        if len(image) not in (2, 3) or min(image[-2:]) < 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"ConvolutionalEnergy{tuple(self.channels)} wants images (h, w) or (c, h, w) of at least "
                f"{2 ** (len(self.channels) - 1)} rows and columns, but found {tuple(image)}. Use DenseEnergy, or fewer stages."
            )
        return _Convolutional(shape, kind, context, self.channels)


class _Convolutional(nn.Module):
    def __init__(self, shape: Size, kind: str, context: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.images = kind, len(shape) - (kind == "categorical") == 2
        planes = (1 if self.images else shape[0]) * (shape[-1] if kind == "categorical" else 1)
        self.first = nn.Conv2d(planes, channels[0], 3, padding=1)
        self.context = nn.Linear(context, channels[0], bias=False) if context else None
        self.stages = nn.ModuleList(Residual(a, b) for a, b in zip((channels[0], *channels), channels, strict=False))
        self.last = nn.Linear(channels[-1], 1, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.images:
            x = x.unsqueeze(1)
        if self.kind == "categorical":
            x = x.movedim(-1, 2).flatten(1, 2)
        h = self.first(2 * x - 1 if self.kind == "binary" else x)
        if self.context is not None:
            h = h + self.context(context)[..., None, None]
        for i, stage in enumerate(self.stages):
            h = stage(F.avg_pool2d(h, 2) if i else h)
        return self.last(F.silu(h).sum((-1, -2))).squeeze(-1)
