"""A gated PixelCNN: parameters of a pixel by convolutions over the pixels above it and to its left.

Two stacks of gated convolutions run beside each other. The vertical one sees all rows above the pixel, the horizontal one the
pixels to its left, and what the vertical stack tells. Of the pixel itself, the horizontal stack sees earlier colours: every
channel has a *degree*, the number of colours of its own pixel on which it may depend. Van den Oord et al., *Conditional Image
Generation with PixelCNN Decoders* (arXiv 1606.05328).

A sample computes the vertical stack once per row, and the horizontal one once per coordinate, from the few activations beside
it that its kernels reach (as in Ramachandran et al., arXiv 1704.06001).
"""

from __future__ import annotations

__all__ = ["PixelCNN"]

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_count, check_rate
from pyro_genmodels.nn.conditionals import ConditionalsChoice
from pyro_genmodels.nn.recompute import NOT_SAVED, check_recompute, run

OUTPUT_SCALE = 0.1
"""Scale of the last layer's weights at the start, where coordinates are nearly independent."""


@dataclass(frozen=True)
class PixelCNN(ConditionalsChoice):
    """A gated PixelCNN for images (h, w) or (c, h, w), in raster order: row by row, and all colours of a pixel in turn.

    Args:
        layers: number of gated layers.
        channels: number of channels of each stack.
        kernel: number of rows and columns of the kernels before they are masked, an odd number of 3 or more. A pixel sees
            layers * (kernel // 2) pixels far.
        dropout: rate at which channels of the horizontal stack are dropped in training.
        recompute: True to compute the activations of each layer again in the backward pass instead of holding them: much less
            memory for about a third more time, with the same gradients. It is not saved with a family.

    Raises:
        ValueError: for a number that is not a positive integer, a kernel that is even or less than 3, or a rate outside [0, 1);
            by `build`, if events are not images or there are fewer channels than colours; by `order`, for another order.

    Example:
        >>> from pyro_genmodels import Autoregressive, BernoulliLikelihood
        >>> from pyro_genmodels.families import PixelCNN
        >>> family = Autoregressive((4, 4), likelihood=BernoulliLikelihood(), network=PixelCNN(layers=2, channels=8))
        >>> family().sample((5,)).shape
        torch.Size([5, 4, 4])
    """

    layers: int = 6
    channels: int = 64
    kernel: int = 5
    dropout: float = 0.0
    recompute: bool = field(default=False, metadata=NOT_SAVED)

    def __post_init__(self) -> None:
        check_count("PixelCNN", layers=self.layers, channels=self.channels)
        check_count("PixelCNN", kernel=self.kernel, least=3)
        check_rate("PixelCNN", dropout=self.dropout)
        check_recompute("PixelCNN", self.recompute)
        if self.kernel % 2 == 0:
            raise ValueError(f"PixelCNN wants an odd kernel, such as 5, but found {self.kernel}.")

    def order(self, event_shape: Size, wanted: Tensor | None) -> Tensor:
        colours, height, width = _image_shape(event_shape)
        raster = torch.arange(event_shape.numel()).reshape(colours, height, width).permute(1, 2, 0).flatten()
        if wanted is not None and not wanted.cpu().equal(raster):
            raise ValueError(
                "PixelCNN samples pixels row by row and the colours of each in turn, but found another order. Leave order out, "
                "or use Transformer(...), which takes any."
            )
        return raster

    def build(self, event_shape: Size, num_inputs: int, num_outputs: int, context: int) -> nn.Module:
        image_shape = _image_shape(event_shape)
        if self.channels < image_shape[0]:
            raise ValueError(
                f"PixelCNN wants at least one channel for each of the {image_shape[0]} colours, but found "
                f"channels={self.channels}."
            )
        return _PixelCNN(self, image_shape, num_inputs, num_outputs, context)


def _image_shape(event_shape: Size) -> tuple[int, int, int]:
    """Return the number of colours, rows and columns.

    Raises:
        ValueError: if events are not images.
    """
    if len(event_shape) not in (2, 3):
        raise ValueError(
            f"PixelCNN wants images (h, w) or (c, h, w), but found {tuple(event_shape)}. Use Transformer(...), which takes "
            "events of any shape, or leave network out."
        )
    colours, height, width = Size((1, *event_shape)[-3:])
    return colours, height, width


class _Leftward(nn.Module):
    """A convolution over columns up to the own one, where outputs see inputs of no higher degree, or of lower if strict.

    Args:
        in_degrees: degrees of the input channels.
        out_degrees: degrees of the output channels.
        reach: number of columns that it sees, the own one among them.
        strict: True to connect an output only to inputs of lower degree in the own column.
        bias: True for a bias.
    """

    mask: Tensor

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, reach: int, *, strict: bool = False, bias: bool = True) -> None:
        super().__init__()
        mask = torch.ones(len(out_degrees), len(in_degrees), reach, dtype=torch.uint8)
        mask[..., -1] = out_degrees[:, None] - int(strict) >= in_degrees[None, :]
        self.register_buffer("mask", mask, persistent=False)
        fan_in = mask.sum((1, 2), keepdim=True).clamp(min=1)
        self.weight = nn.Parameter(torch.empty(mask.shape).uniform_(-1.0, 1.0) / fan_in.sqrt())
        self.bias = nn.Parameter(torch.zeros(len(out_degrees))) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs (n, out, h, w) for inputs (n, in, h, w)."""
        weight = (self.weight * self.mask).unsqueeze(2)
        return F.conv2d(F.pad(x, (self.weight.shape[-1] - 1, 0)), weight, self.bias)

    def at(self, window: Tensor) -> Tensor:
        """Return the outputs of the last column, (n, out), for the columns that it sees, (n, in, reach)."""
        return F.linear(window.flatten(1), (self.weight * self.mask).flatten(1), self.bias)


def _gated(x: Tensor) -> Tensor:
    values, gates = x.chunk(2, 1)
    return values.tanh() * gates.sigmoid()


class _Gated(nn.Module):
    """One layer of both stacks.

    Args:
        above: number of input channels of the vertical stack.
        left: degrees of the input channels of the horizontal stack.
        degrees: degrees of its output channels.
        kernel: number of rows and columns of the kernels.
        context: length of the context vector.
        dropout: rate at which channels are dropped.
        first: True for the first layer, which reads colours and has no skip connection.
    """

    def __init__(
        self, above: int, left: Tensor, degrees: Tensor, *, kernel: int, context: int, dropout: float, first: bool
    ) -> None:
        super().__init__()
        twice, self.reach = torch.cat([degrees, degrees]), kernel // 2 + 1
        self.vertical = nn.Conv2d(above, len(twice), (self.reach, kernel), padding=(0, kernel // 2))
        self.down = nn.Conv2d(len(twice), len(twice), 1)
        self.horizontal = _Leftward(left, twice, self.reach, strict=first, bias=False)
        self.out = _Leftward(degrees, degrees, 1)
        self.context = nn.Linear(context, 2 * len(twice), bias=False) if context else None
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.first = first

    def added(self, context: Tensor | None) -> Tensor:
        """Return what a context adds to both stacks, (n, 4 * channels, 1, 1)."""
        if self.context is None:
            return self.vertical.weight.new_zeros(1, 2 * self.vertical.out_channels, 1, 1)
        added: Tensor = self.context(context)
        return added[..., None, None]

    def rows(self, v: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vertical stack's rows, and what is added to the horizontal one, given these rows and those above."""
        to_vertical, to_horizontal = added.chunk(2, 1)
        v = self.vertical(v)
        return _gated(v + to_vertical), self.down(v) + to_horizontal

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return both stacks (n, channels, h, w)."""
        v, told = self.rows(F.pad(v, (0, 0, self.reach - 1, 0)), self.added(context))
        out = self.out(self.dropout(_gated(self.horizontal(h) + told)))
        return v, out if self.first else h + out

    def at(self, window: Tensor, told: Tensor) -> Tensor:
        """Return the horizontal stack at one place, (n, channels), for its inputs (n, in, reach)."""
        out = self.out.at(self.dropout(_gated(self.horizontal.at(window) + told)).unsqueeze(-1))
        return out if self.first else window[..., -1] + out


class _PixelCNN(nn.Module):
    layers: Sequence[_Gated]  # a ModuleList, which has no type of its items

    def __init__(
        self, choice: PixelCNN, image_shape: tuple[int, int, int], num_inputs: int, num_outputs: int, context: int
    ) -> None:
        super().__init__()
        self.image_shape, self.num_inputs, self.num_outputs = image_shape, num_inputs, num_outputs
        self.recompute = choice.recompute
        colours, channels = image_shape[0], choice.channels
        inputs = torch.arange(colours).repeat_interleave(num_inputs)
        degrees = torch.arange(channels) * colours // channels
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            _Gated(
                channels if i else len(inputs),
                degrees if i else inputs,
                degrees,
                kernel=choice.kernel,
                context=context,
                dropout=choice.dropout,
                first=i == 0,
            )
            for i in range(choice.layers)
        )
        self.middle = _Leftward(degrees, degrees, 1)
        self.output = _Leftward(degrees, torch.arange(colours).repeat_interleave(num_outputs), 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(*image_shape[1:], colours, num_outputs))  # parameters of independent coordinates
        with torch.no_grad():
            self.output.weight.mul_(OUTPUT_SCALE)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.bias.dtype

    def forward(self, features: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return parameters (..., d, num_outputs) for features (..., d, num_inputs) and context (..., c), in raster order."""
        batch, (colours, height, width) = features.shape[:-2], self.image_shape
        x = features.reshape(-1, height, width, colours * self.num_inputs).permute(0, 3, 1, 2)
        context = None if context is None else context.expand(*batch, context.shape[-1]).reshape(len(x), -1)
        v, h = F.pad(x, (0, 0, 1, 0))[:, :, :-1], x  # the vertical stack sees rows above only
        for layer in self.layers:
            v, h = run(layer, v, h, context, recompute=self.recompute)
        params = self.output(F.relu(self.middle(F.relu(h))))
        params = params.permute(0, 2, 3, 1).unflatten(-1, (colours, self.num_outputs)) + self.bias
        return params.reshape(*batch, -1, self.num_outputs)

    def steps(self, shape: Size, context: Tensor | None = None, order: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Yield the parameters (*shape, num_outputs) of one coordinate after another, and take the features of the last."""
        n, (colours, height, width) = Size(shape).numel(), self.image_shape
        context = None if context is None else context.expand(*shape, context.shape[-1]).reshape(n, -1)
        added = [layer.added(context) for layer in self.layers]
        zeros = self.bias.new_zeros(n, 1, 1, 1)
        above = [zeros.expand(n, layer.vertical.in_channels, layer.reach, width) for layer in self.layers]
        row = zeros.expand(n, colours * self.num_inputs, 1, width)
        for i in range(height):
            told = []
            for k, layer in enumerate(self.layers):
                above[k] = torch.cat([above[k][:, :, 1:], row], 2)
                row, down = layer.rows(above[k], added[k])
                told.append(down[:, :, 0])
            left = [zeros[..., 0].expand(n, layer.horizontal.weight.shape[1], layer.reach - 1) for layer in self.layers]
            pixels = []
            for j in range(width):
                pixel = [zeros[:, 0, 0].expand(n, self.num_inputs)] * colours
                for colour in range(colours):
                    h = torch.cat(pixel, -1)
                    now = []
                    for k, layer in enumerate(self.layers):
                        now.append(h)
                        h = layer.at(torch.cat([left[k], h.unsqueeze(-1)], -1), told[k][..., j])
                    params = self.output.at(F.relu(self.middle.at(F.relu(h).unsqueeze(-1))).unsqueeze(-1))
                    params = params.unflatten(-1, (colours, self.num_outputs))[:, colour] + self.bias[i, j, colour]
                    x = yield params.reshape(*shape, self.num_outputs)
                    pixel[colour] = x.reshape(n, self.num_inputs)
                now[0] = torch.cat(pixel, -1)  # activations of later layers do not see the last colour
                left = [torch.cat([a[..., 1:], b.unsqueeze(-1)], -1) for a, b in zip(left, now, strict=True)]
                pixels.append(now[0])
            row = torch.stack(pixels, -1).unsqueeze(2)
