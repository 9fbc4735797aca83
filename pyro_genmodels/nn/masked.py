r"""A masked network: output i depends only on the inputs before i.

Every unit has a *degree*, the index of the last input that it depends on. A unit is connected to units of no higher degree, and
output i to units of a degree lower than i. Units are sorted by degree, so the units that are known after i inputs are a prefix
of every layer, and drawing all outputs one after another computes every unit once. Germain et al., *MADE* (arXiv 1502.03509).
"""

from __future__ import annotations

__all__ = ["MADE", "MaskedLinear", "MaskedNetwork"]

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_rate, check_widths
from pyro_genmodels.nn.conditionals import ConditionalsChoice
from pyro_genmodels.nn.padding import Padding


class MaskedLinear(nn.Linear):
    """A linear layer that connects units by their degrees.

    Args:
        in_degrees: degree of each input, ascending.
        out_degrees: degree of each output, ascending.
        strict: True to connect an output only to inputs of lower degree; False to allow the same degree too.
        bias: True for a bias.
    """

    mask: Tensor

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, *, strict: bool = False, bias: bool = True) -> None:
        super().__init__(len(in_degrees), len(out_degrees), bias=bias)
        mask = out_degrees[:, None] - int(strict) >= in_degrees[None, :]
        self.register_buffer("mask", mask)
        self.in_degrees, self.out_degrees, self.strict = in_degrees.tolist(), out_degrees.tolist(), strict
        fan_in = mask.sum(1, keepdim=True).clamp(min=1)
        with torch.no_grad():  # torch initialises by all inputs, of which each unit has only some
            self.weight.mul_((len(in_degrees) / fan_in).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask.view(torch.uint8), self.bias)  # several times faster than by truth values

    def rows(self, degree: int) -> slice:
        """Return the slice of the outputs of that degree."""
        return slice(bisect_left(self.out_degrees, degree), bisect_right(self.out_degrees, degree))

    def outputs(self, known: Tensor, degree: int) -> Tensor:
        """Return the outputs of one degree, (..., rows), given the prefix of the inputs that is known, (..., prefix)."""
        rows = self.rows(degree)
        stop = bisect_right(self.in_degrees, degree - int(self.strict))
        return F.linear(known[..., :stop], self.weight[rows, :stop], None if self.bias is None else self.bias[rows])


@dataclass(frozen=True)
class MaskedNetwork(ConditionalsChoice):
    """A masked multilayer perceptron over the coordinates in the order of sampling; see `MADE` for its options."""

    hidden: Sequence[int] = (256, 256)
    dropout: float = 0.0
    direct: bool = False

    def build(self, event_shape: Size, num_inputs: int, num_outputs: int, context: int) -> nn.Module:
        d = event_shape.numel()
        return self.build_by_coordinate(event_shape, [num_inputs] * d, [num_outputs] * d, context)

    def build_by_coordinate(
        self, event_shape: Size, num_inputs: Sequence[int], num_outputs: Sequence[int], context: int
    ) -> nn.Module:
        return MADE(num_inputs, num_outputs, context=context, hidden=self.hidden, dropout=self.dropout, direct=self.direct)


class MADE(nn.Module):
    """A masked multilayer perceptron for the conditional distributions of d coordinates.

    Args:
        num_inputs: number of input features of each coordinate.
        num_outputs: number of parameters of each conditional distribution.
        context: length of the context vector, on which every unit may depend.
        hidden: widths of the hidden layers.
        dropout: rate at which hidden units are dropped in training.
        direct: True to connect inputs also directly to the outputs after them. These weights begin at 0.
        activation: constructor of the nonlinearity.
    """

    layers: Sequence[MaskedLinear]  # a ModuleList, which has no type of its items

    def __init__(
        self,
        num_inputs: Sequence[int],
        num_outputs: Sequence[int],
        *,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        direct: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_widths("A masked network", hidden=hidden, empty=True)
        check_rate("A masked network", dropout=dropout)
        self.inputs, self.outputs = Padding(num_inputs), Padding(num_outputs)
        self.features = features = len(self.outputs.lengths)
        places = torch.arange(features)
        first = -1 if context or features == 1 else 0
        inputs = degrees = torch.cat([torch.full((context,), -1), places.repeat_interleave(torch.tensor(num_inputs))])
        outputs = places.repeat_interleave(torch.tensor(num_outputs))
        layers = []
        for width in hidden:
            out_degrees = first + torch.arange(width) * (features - 1 - first) // width
            layers.append(MaskedLinear(degrees, out_degrees))
            degrees = out_degrees
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.output = MaskedLinear(degrees, outputs, strict=True)
        self.direct = MaskedLinear(inputs, outputs, strict=True, bias=False) if direct else None
        if self.direct is not None:
            nn.init.zeros_(self.direct.weight)
        self.activation = nn.Sequential(activation(), nn.Dropout(dropout))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.output.weight.dtype

    def forward(self, features: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return parameters (..., d, num_outputs) for features (..., d, num_inputs) and context (..., c), in one order.

        Where coordinates have different numbers, both are padded to the largest.
        """
        inputs = self.inputs.join(features)
        if context is not None:
            inputs = torch.cat([context, inputs], -1)
        h = inputs
        for layer in self.layers:
            h = self.activation(layer(h))
        out = self.output(h)
        return self.outputs.pad(out if self.direct is None else out + self.direct(inputs))

    def steps(self, shape: Size, context: Tensor | None = None, order: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Yield the parameters (*shape, num_outputs) of one coordinate after another, without padding.

        After each, send the generator the input features (*shape, num_inputs) of the value drawn for that coordinate.
        """
        empty = self.output.weight.new_empty((*shape, 0))
        known = [empty if context is None else context] + [empty] * len(self.layers)
        for place in range(self.features):
            for i, layer in enumerate(self.layers):  # units that depend on coordinate place - 1, but on none after it
                known[i + 1] = torch.cat([known[i + 1], self.activation(layer.outputs(known[i], place - 1))], -1)
            out = self.output.outputs(known[-1], place)
            x = yield out if self.direct is None else out + self.direct.outputs(known[0], place)
            known[0] = torch.cat([known[0], x[..., : self.inputs.lengths[place]]], -1)
