r"""A masked network: output i sees inputs before i only.

Every unit has a *degree*, the last input it sees; a unit is joined to units of no higher degree, an output to units of lower
degree than its own place. Units are kept sorted by degree, so what is known after i inputs is a prefix of every layer, and a
draw of all outputs, input by input, computes every unit once. Germain et al., *MADE* (arXiv 1502.03509).
"""

from __future__ import annotations

__all__ = ["MADE", "MaskedLinear"]

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Sequence

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn


class MaskedLinear(nn.Linear):
    """A linear layer between units of given degrees.

    Args:
        in_degrees: degree of each input, ascending.
        out_degrees: degree of each output, ascending.
        strict: whether an output must have a higher degree than the inputs it sees, or may have the same.
    """

    mask: Tensor

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor, *, strict: bool = False) -> None:
        super().__init__(len(in_degrees), len(out_degrees))
        seen = out_degrees[:, None] - int(strict) >= in_degrees[None, :]
        self.register_buffer("mask", seen)
        self.in_degrees, self.out_degrees, self.strict = in_degrees.tolist(), out_degrees.tolist(), strict
        fan_in = seen.sum(1, keepdim=True).clamp(min=1)
        with torch.no_grad():  # the layer's scale as if each unit had only the inputs it sees
            self.weight.mul_((len(in_degrees) / fan_in).sqrt())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)

    def rows(self, degree: int) -> slice:
        """The outputs of that degree."""
        return slice(bisect_left(self.out_degrees, degree), bisect_right(self.out_degrees, degree))

    def outputs(self, known: Tensor, degree: int) -> Tensor:
        """The outputs of one degree, (..., rows), from the prefix of the inputs that is known, (..., prefix)."""
        rows = self.rows(degree)
        seen = bisect_right(self.in_degrees, degree - int(self.strict))
        return F.linear(known[..., :seen], self.weight[rows, :seen], self.bias[rows])


class MADE(nn.Module):
    """Conditionals of d coordinates by one masked perceptron.

    Args:
        features: d, how many coordinates.
        num_inputs: features that stand for one coordinate.
        num_outputs: parameters of one conditional.
        context: length of the context vector, which every unit sees.
        hidden: widths of the hidden layers.
        dropout: rate at which hidden units are dropped in training.
        activation: constructor of the nonlinearity.
    """

    layers: Sequence[MaskedLinear]  # in truth a ModuleList of them

    def __init__(
        self,
        features: int,
        num_inputs: int,
        num_outputs: int,
        *,
        context: int = 0,
        hidden: Sequence[int] = (128, 128),
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.features, self.num_inputs, self.num_outputs = features, num_inputs, num_outputs
        places = torch.arange(features)
        first = -1 if context or features == 1 else 0
        degrees = torch.cat([torch.full((context,), -1), places.repeat_interleave(num_inputs)])
        layers = []
        for width in hidden:
            above = first + torch.arange(width) * (features - 1 - first) // width
            layers.append(MaskedLinear(degrees, above))
            degrees = above
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.output = MaskedLinear(degrees, places.repeat_interleave(num_outputs), strict=True)
        self.activation = nn.Sequential(activation(), nn.Dropout(dropout))

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.output.weight.dtype

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        """Features (..., d, num_inputs), context (..., c) -> parameters (..., d, num_outputs)."""
        h = features.flatten(-2)
        if context is not None:
            h = torch.cat([context, h], -1)
        for layer in self.layers:
            h = self.activation(layer(h))
        return self.output(h).unflatten(-1, (self.features, self.num_outputs))

    def steps(self, shape: Size, context: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Parameters (*shape, num_outputs) of each coordinate in turn; send it the last one's inputs (*shape, num_inputs)."""
        empty = self.output.weight.new_empty((*shape, 0))
        known = [empty if context is None else context] + [empty] * len(self.layers)
        for place in range(self.features):
            for i, layer in enumerate(self.layers):  # the units that see coordinates before `place`, and no others
                known[i + 1] = torch.cat([known[i + 1], self.activation(layer.outputs(known[i], place - 1))], -1)
            x = yield self.output.outputs(known[-1], place)
            known[0] = torch.cat([known[0], x], -1)
