"""The default dense network, and a call of a network on any batch shape."""

from __future__ import annotations

__all__ = ["MLP", "call_batched"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_rate, check_widths


class MLP(nn.Sequential):
    """A multilayer perceptron, (..., in_features) -> (..., out_features).

    Args:
        in_features: length of the input vector.
        out_features: length of the output vector.
        hidden: widths of the hidden layers.
        dropout: rate at which hidden units are dropped in training.
        activation: constructor of the nonlinearity.
        last: class of the last layer.
        last_bias: True for a bias in the last layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (128, 128),
        *,
        dropout: float = 0.0,
        activation: Callable[[], nn.Module] = nn.SiLU,
        last: type[nn.Linear] = nn.Linear,
        last_bias: bool = True,
    ) -> None:
        check_widths("A dense network", hidden=hidden, empty=True)
        check_rate("A dense network", dropout=dropout)
        layers: list[nn.Module] = []
        for before, after in zip((in_features, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, after), activation()]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__(*layers, last((in_features, *hidden)[-1], out_features, bias=last_bias))


def call_batched(network: Callable[..., Any], batch: Size, x: Tensor, context: Tensor | None) -> Any:
    """Call a network that takes one batch dimension on inputs with any number of them.

    Args:
        network: function called as network(x) or, with a context, as network(x, context).
        batch: batch shape.
        x: input, (*batch, ...).
        context: context, (..., c), which is broadcast to (*batch, c); or None.

    Returns:
        The network's output, a tensor or a tuple of tensors, with the first dimension of each unflattened to the batch shape.
        It has at least the precision of x, also where `torch.autocast` has rounded it.
    """
    if len(batch) == 1 and (context is None or context.shape[:-1] == batch):
        return _at_least(network(x) if context is None else network(x, context), x)
    inputs = [x.reshape(-1, *x.shape[len(batch) :])]
    if context is not None:
        inputs.append(context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1]))
    out = _at_least(network(*inputs), x)
    if isinstance(out, tuple):
        return tuple(part.reshape(batch + part.shape[1:]) for part in out)
    return out.reshape(batch + out.shape[1:])


def _at_least(out: Any, x: Tensor) -> Any:
    """Return a network's output, a tensor or a tuple of tensors, with at least the precision of its input."""
    if isinstance(out, tuple):
        return tuple(_at_least(part, x) for part in out)
    return out.to(torch.promote_types(out.dtype, x.dtype)) if isinstance(out, Tensor) else out
