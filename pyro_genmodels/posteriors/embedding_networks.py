r"""Networks that summarise observations: vectors, sets, sequences, series and images, with NaN for what is missing.

For i.i.d. rows :math:`x_1, \dots, x_n` of any number n a summary that does not depend on their order is

.. math:: s(x) = \rho\Bigl(\frac1n \sum_i \phi(x_i),\; \log n\Bigr).

Zaheer et al., *Deep Sets* (arXiv 1703.06114). Observations that are missing are NaN, and are left out of the mean; networks of
vectors see zeros in their place, with a vector of marks.

Sequences go through attention (Vaswani et al., arXiv 1706.03762), which does not look at missing rows.
"""

from __future__ import annotations

__all__ = ["ConvolutionalNetwork", "MarkedNetwork", "SequenceNetwork", "SetNetwork", "dense"]

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Size, Tensor, nn


def dense(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Return a dense network of SiLU layers from (..., in_features) to (..., out_features)."""
    layers: list[nn.Module] = []
    for before, after in pairwise((in_features, *hidden)):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear((in_features, *hidden)[-1], out_features))


class MarkedNetwork(nn.Module):
    """A network of vectors with zeros for missing numbers, and, if wanted, with marks of these.

    Args:
        network: the network.
        marks: True to give it a vector of marks too.
    """

    def __init__(self, network: nn.Module, *, marks: bool) -> None:
        super().__init__()
        self.network, self.marks = network, marks

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.network(torch.cat([x.nan_to_num(), x.isnan().to(x)], -1) if self.marks else x.nan_to_num())


class SetNetwork(nn.Module):
    """A network of the mean of a network over rows, and of the logarithm of their number.

    Args:
        shape: shape of one observation, (rows, ...).
        hidden: widths of the hidden layers of both networks.
        out_features: length of the output.
    """

    def __init__(self, shape: Size, hidden: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.each = dense(shape[1:].numel(), hidden, out_features)
        self.all = dense(out_features + 1, hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2) if x.dim() > 2 else x[..., None]
        present = ~rows.isnan().any(-1, keepdim=True)
        number = present.sum(1)
        total = (self.each(rows.nan_to_num()) * present).sum(1)
        return self.all(torch.cat([total / number.clamp(min=1), number.to(total).clamp(min=1).log()], -1))


class SequenceNetwork(nn.Module):
    """Attention between rows with positions, then a dense network of the mean over the rows that are there.

    Args:
        shape: shape of one observation, (rows, ...).
        width: number of features of each row.
        num_heads: number of heads of attention.
        num_layers: number of layers.
        out_features: length of the output.
    """

    positions: Tensor

    def __init__(self, shape: Size, width: int, num_heads: int, num_layers: int, out_features: int) -> None:
        super().__init__()
        self.first = nn.Linear(shape[1:].numel(), width)
        layers = [
            nn.TransformerEncoderLayer(width, num_heads, 2 * width, dropout=0.0, batch_first=True) for _ in range(num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.last = dense(width + 1, (width,), out_features)
        angles = torch.arange(shape[0])[:, None] * 10_000.0 ** -torch.linspace(0, 1, width // 2)
        self.register_buffer("positions", torch.cat([angles.sin(), angles.cos()], -1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2) if x.dim() > 2 else x[..., None]
        missing = rows.isnan().any(-1)
        empty = missing.all(-1, keepdim=True)
        h = self.first(rows.nan_to_num()) + self.positions
        for layer in self.layers:  # attention wants one row at least
            h = layer(h, src_key_padding_mask=missing & ~empty)
        number = (~missing).sum(-1, keepdim=True).to(h)
        mean = (h * ~missing[..., None]).sum(1) / number.clamp(min=1)
        return self.last(torch.cat([mean, number.clamp(min=1).log()], -1))


class ConvolutionalNetwork(nn.Module):
    """Convolutions that each halve the length, then a dense layer.

    Args:
        shape: shape of one observation: (length,), (length, channels) or (channels, height, width).
        channels: number of channels of each layer.
        kernel: length of a kernel.
        out_features: length of the output.
    """

    def __init__(self, shape: Size, channels: Sequence[int], kernel: int, out_features: int) -> None:
        super().__init__()
        self.shape = shape
        layer: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        inputs = {1: 1, 2: shape[-1], 3: shape[0]}[len(shape)]
        layers: list[nn.Module] = []
        for before, after in pairwise((inputs, *channels)):
            layers += [layer(before, after, kernel, stride=2, padding=kernel // 2), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.layers(self._with_channels(torch.zeros(1, *shape))).shape[1]
        self.last = nn.Linear(size, out_features)

    def _with_channels(self, x: Tensor) -> Tensor:
        return {1: x[:, None], 2: x.transpose(1, -1), 3: x}[len(self.shape)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self._with_channels(x.nan_to_num())))
