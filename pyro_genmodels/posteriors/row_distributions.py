"""Conditional distributions of the latent variables of rows of data, given features of the rows and shared variables."""

from __future__ import annotations

__all__ = ["RowDistribution"]

from collections.abc import Sequence
from math import log
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineTransform
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_genmodels.families import NSF, Flow, RealNVP
from pyro_genmodels.posteriors.autoguides import default_transform
from pyro_genmodels.posteriors.row_data import RowFeatures, placed
from pyro_genmodels.posteriors.row_layouts import Layout

ENCODING = 16
"""Length of the output of the default encoder."""
HIDDEN = 64
"""Width of the hidden layers of the default encoder and of the network for location and scale."""
MAX_LOG_SCALE = 10.0
"""Bound of the log scale of a row's variables, relative to that of all rows."""


class RowDistribution(PyroModule):
    """The distribution of the variables of a layout.

    Args:
        layout: the layout.
        parts: tensors that hold the features of rows.
        num_parents: number of coordinates of the earlier variables.
        start: location at the start, (size,).
        scale: deviation at the start.
        encoder: the encoder, or None.
        transform: layers of the flow, or None.
        like: tensor of the dtype and device.
    """

    def __init__(
        self,
        layout: Layout,
        parts: Sequence[Tensor],
        num_parents: int,
        start: Tensor,
        scale: float,
        encoder: nn.Module | None,
        transform: Any,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.row_plates = layout.plates
        n, context = layout.size, 0
        self.loc = nn.Parameter(start.detach().clone().to(like))
        self.log_scale = nn.Parameter(torch.full_like(self.loc, 0.0 if layout.plates else log(scale)))
        if layout.plates:
            self.features = RowFeatures(parts, len(layout.plates), like)
            self.encoder = (SkipNetwork(self.features.out_features, ENCODING) if encoder is None else encoder).to(like)
            with torch.no_grad():
                encoded = self.encoder(self.features(parts).flatten(0, len(layout.plates) - 1)[:2])
            context = encoded.shape[-1] + num_parents
            self.head = SkipNetwork(context, 2 * n, starts_at_zero=True).to(like)
            self.head_bias = nn.Parameter(torch.cat([like.new_zeros(n), like.new_full((n,), log(scale))]))
        local = NSF(transforms=1, hidden=(32,)) if n == 1 else RealNVP(transforms=4, hidden=(32, 32))
        layers = (local if layout.plates else default_transform(n)) if transform is None else transform
        self.flow = Flow((n,), context=context, transform=layers, standardize=False, standardize_context=False).to(like)
        if transform is None:
            _start_at_identity(self.flow)

    def standardized(self, z: Tensor) -> Tensor:
        """Return coordinates as other blocks are given them."""
        return (z - self.loc) / self.log_scale.exp()

    def forward(self, parts: Sequence[Tensor], parents: Sequence[Tensor]) -> dist.TorchDistribution:
        """Return the distribution, of batch shape (rows...), in the batch dimensions of the plates, or () if it is shared.

        Args:
            parts: tensors that hold the features of the rows.
            parents: coordinates of earlier variables, (batch..., any length) each.
        """
        shared = AffineTransform(self.loc, self.log_scale.exp(), event_dim=1)
        if not self.row_plates:
            return dist.TransformedDistribution(self.flow(), [shared], validate_args=False)
        given = [placed(self.encoder(self.features(parts)), self.row_plates), *parents]
        batch = torch.broadcast_shapes(*(x.shape[:-1] for x in given))
        context = torch.cat([x.expand(*batch, x.shape[-1]) for x in given], -1)
        loc, log_scale = (self.head(context) + self.head_bias).chunk(2, -1)
        own = AffineTransform(loc, (MAX_LOG_SCALE * (log_scale / MAX_LOG_SCALE).tanh()).exp(), event_dim=1)
        return dist.TransformedDistribution(self.flow(context), [own, shared], validate_args=False)


def _start_at_identity(flow: nn.Module) -> None:
    """Set the last layers of the networks of a flow to zero, so that couplings and splines are the identity at the start.

    Random layers multiply, so that a few steps could throw draws of a deep flow beyond all bounds.

    Args:
        flow: the flow, changed in place.
    """
    for module in flow.modules():
        last = module[-1] if isinstance(module, nn.Sequential) and len(module) > 1 else module
        if last is not module or isinstance(module, nn.ParameterList):
            for parameter in last.parameters():
                nn.init.zeros_(parameter)


class SkipNetwork(nn.Module):
    """A linear map plus a network with one hidden layer.

    Args:
        in_features: length of the input.
        out_features: length of the output.
        starts_at_zero: True for outputs that are 0 before training.
    """

    def __init__(self, in_features: int, out_features: int, *, starts_at_zero: bool = False) -> None:
        super().__init__()
        self.out_features = out_features
        self.linear = nn.Linear(in_features, out_features, bias=False)
        self.hidden, self.last = nn.Linear(in_features, HIDDEN), nn.Linear(HIDDEN, out_features)
        if starts_at_zero:
            for parameter in (self.linear.weight, self.last.weight, self.last.bias):
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.last(nn.functional.silu(self.hidden(x)))
