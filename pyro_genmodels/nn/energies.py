r"""Energy networks: chain positions in, one number out.

Each is a *choice*, an immutable record of options. Its ``build(event_shape, space, context)`` returns a module (x, context) ->
energies (n,), for positions x (n, *position) in a space of chains (`pyro_genmodels.samplers.Space`). Constant terms, which no
density depends on, are left out, so that every parameter has a gradient.
"""

from __future__ import annotations

__all__ = ["ConvolutionalEnergy", "DenseEnergy", "EnergyChoice"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_widths
from pyro_genmodels.nn.mlp import MLP
from pyro_genmodels.nn.precision import FullPrecisionLinear
from pyro_genmodels.nn.residual import Residual


class Units(Protocol):
    """The parts of a space of chain positions that networks use; see `pyro_genmodels.samplers.Space`."""

    @property
    def is_discrete(self) -> bool: ...

    @property
    def width(self) -> int: ...

    def position_shape(self, event_shape: Sequence[int]) -> Size: ...

    def scaled(self, u: Tensor) -> Tensor: ...

    def draw(self, natural: Tensor) -> Tensor: ...

    def log_sum(self, natural: Tensor) -> Tensor: ...


class EnergyChoice(ABC):
    """An energy network that has yet to be built for an event shape and a space of positions."""

    @abstractmethod
    def build(self, event_shape: Size, space: Units, context: int) -> nn.Module:
        """Build the network.

        Args:
            event_shape: shape of one datum.
            space: space of the positions, which are real numbers, zeros and ones, or one-hot in a further last dimension.
            context: length of the context vector; 0 is none.

        Returns:
            A module (x (n, *position), context (n, context)) -> energies (n,) in nats.
        """


@dataclass(frozen=True)
class DenseEnergy(EnergyChoice):
    """A multilayer perceptron over the flattened position and the context.

    Args:
        hidden: widths of the hidden layers.

    Raises:
        TypeError: if the widths are not a sequence of positive integers.
    """

    hidden: Sequence[int] = (128, 128)

    def __post_init__(self) -> None:
        check_widths("DenseEnergy", hidden=self.hidden, empty=True)

    def build(self, event_shape: Size, space: Units, context: int) -> nn.Module:
        return _Dense(space, space.position_shape(event_shape).numel() + context, self.hidden)


class _Dense(nn.Module):
    def __init__(self, space: Units, inputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.space = space
        self.mlp = MLP(inputs, 1, hidden, last=FullPrecisionLinear, last_bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.space.scaled(x.flatten(1) if x.dim() > 1 else x[:, None])
        return self.mlp(x if context is None else torch.cat([x, context], -1)).squeeze(-1)


@dataclass(frozen=True)
class ConvolutionalEnergy(EnergyChoice):
    """A residual network over images (h, w) or (c, h, w), each stage at half the resolution of the one before.

    Args:
        channels: channels of each stage.

    Raises:
        TypeError: if the channels are not a sequence of positive integers.
        ValueError: by `build`, if the data are not images, or too small for the number of stages.
    """

    channels: Sequence[int] = (32, 64, 64)

    def __post_init__(self) -> None:
        check_widths("ConvolutionalEnergy", channels=self.channels)

    def build(self, event_shape: Size, space: Units, context: int) -> nn.Module:
        if len(event_shape) not in (2, 3) or min(event_shape[-2:]) < 2 ** (len(self.channels) - 1):
            raise ValueError(
                f"ConvolutionalEnergy{tuple(self.channels)} wants images (h, w) or (c, h, w) of at least "
                f"{2 ** (len(self.channels) - 1)} rows and columns, but found {tuple(event_shape)}. Use DenseEnergy, or fewer "
                "stages."
            )
        return _Convolutional(event_shape, space, context, self.channels)


class _Convolutional(nn.Module):
    def __init__(self, event_shape: Size, space: Units, context: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.space, self.image_shape = space, Size((1, *event_shape)[-3:])
        planes = self.image_shape[0] * space.width
        self.first = nn.Conv2d(planes, channels[0], 3, padding=1)
        self.context = nn.Linear(context, channels[0], bias=False) if context else None
        self.stages = nn.ModuleList(Residual(a, b) for a, b in zip((channels[0], *channels), channels, strict=False))
        self.last = FullPrecisionLinear(channels[-1], 1, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.reshape(len(x), *self.image_shape, self.space.width).movedim(-1, 2).flatten(1, 2)  # classes as channels
        h = self.first(self.space.scaled(x))
        if self.context is not None:
            h = h + self.context(context)[..., None, None]
        for i, stage in enumerate(self.stages):
            h = stage(F.avg_pool2d(h, 2) if i else h)
        return self.last(F.silu(h).sum((-1, -2), dtype=self.last.weight.dtype)).squeeze(-1)
