r"""A causal transformer: parameters of coordinate i from attention over the coordinates before it.

Token i carries the value of the coordinate that was sampled last, :math:`x_{o_{i-1}}`, the position of this coordinate, its
*source*, and the position :math:`o_i` of the coordinate whose distribution it returns, its *target*. With both positions in the
token, one network serves every order :math:`o` (Pannatier et al., *sigma-GPT*, arXiv 2404.09562). Layers normalise their input
and add their output, as in GPT-2 (Radford et al., 2019; Vaswani et al., arXiv 1706.03762). A sample keeps the keys and values
of earlier tokens, so that a step costs one token and not all.
"""

from __future__ import annotations

__all__ = ["Transformer"]

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn

from pyro_genmodels.nn.checks import check_count, check_rate
from pyro_genmodels.nn.conditionals import ConditionalsChoice
from pyro_genmodels.nn.recompute import NOT_SAVED, check_recompute, run

SLOWEST_PERIOD = 1e4
"""Ratio of the lowest to the highest frequency of rotary positions."""
POSITION_SCALE = 0.3
"""Deviation of learned positions at the start, about that of the embedding of a value."""
OUTPUT_SCALE = 0.1
"""Scale of the last layer's weights at the start, where coordinates are nearly independent."""


@dataclass(frozen=True)
class Transformer(ConditionalsChoice):
    """A causal transformer over the coordinates of an event of any shape.

    A density takes one pass, with memory for d tokens; a sample takes one token per coordinate, and holds 2 layers * width * d
    numbers per event meanwhile.

    Args:
        layers: number of layers, each of attention and a dense network.
        width: length of the vector of one token.
        heads: number of attention heads, which divides the width.
        positions: "learned" for a vector per coordinate, which is added to tokens; "rotary" for rotations of queries by the
            target and of keys by the source, so that attention depends on the distance between both along each dimension of
            the event (Su et al., arXiv 2104.09864).
        dropout: rate at which inputs and outputs of layers are dropped in training.
        recompute: True to compute the activations of each layer again in the backward pass instead of holding them: much less
            memory for about a third more time, with the same gradients. It is not saved with a family.

    Raises:
        ValueError: for a number that is not a positive integer, a width that is no multiple of the heads, unknown positions or
            a rate outside [0, 1).

    Example:
        >>> from pyro_genmodels import Autoregressive, BernoulliLikelihood
        >>> from pyro_genmodels.families import Transformer
        >>> network = Transformer(layers=2, width=32)
        >>> family = Autoregressive((4, 4), likelihood=BernoulliLikelihood(), network=network)
        >>> family().sample((5,)).shape
        torch.Size([5, 4, 4])
    """

    layers: int = 4
    width: int = 128
    heads: int = 4
    positions: Literal["learned", "rotary"] = "learned"
    dropout: float = 0.0
    recompute: bool = field(default=False, metadata=NOT_SAVED)

    any_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("Transformer", layers=self.layers, width=self.width, heads=self.heads)
        check_rate("Transformer", dropout=self.dropout)
        check_recompute("Transformer", self.recompute)
        if self.width % self.heads:
            raise ValueError(f"Transformer wants a width that is a multiple of heads={self.heads}, but found {self.width}.")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f'Transformer wants positions="learned" or "rotary", but found {self.positions!r}.')

    def build(self, event_shape: Size, num_inputs: int, num_outputs: int, context: int) -> nn.Module:
        return _Transformer(self, event_shape, num_inputs, num_outputs, context)

    def build_positions(self, event_shape: Size) -> _LearnedPositions | _RotaryPositions:
        """Build the module that tells tokens, queries and keys of an event of a shape where they are.

        Raises:
            ValueError: if there are more dimensions of the event than pairs of numbers in a head, for rotary positions.
        """
        if self.positions == "learned":
            return _LearnedPositions(event_shape.numel(), self.width)
        pairs = self.width // self.heads // 2
        if pairs < max(1, len(event_shape)):
            raise ValueError(
                f"Rotary positions over events {tuple(event_shape)} want at least {2 * max(1, len(event_shape))} numbers per "
                f"head, but found width={self.width} and heads={self.heads}. Take a larger width, or fewer heads."
            )
        return _RotaryPositions(event_shape, pairs)


class _LearnedPositions(nn.Module):
    """Vectors of positions that are added to tokens. The last source is that of the first token, which carries no value."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(features + 1, width), nn.Embedding(features, width)
        for table in (self.source, self.target):
            nn.init.normal_(table.weight, std=POSITION_SCALE)

    def added(self, source: Tensor, target: Tensor) -> Tensor | float:
        """Return what is added to tokens, (..., length, width)."""
        return self.source(source) + self.target(target)

    def rotations(self, source: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the rotations of queries and keys: none."""
        return None, None


class _RotaryPositions(nn.Module):
    """Rotations of queries and keys, by angles in proportion to their place along each dimension of the event."""

    turns: Tensor

    def __init__(self, event_shape: Size, pairs: int) -> None:
        super().__init__()
        grid = torch.cartesian_prod(*[torch.arange(float(n)) for n in event_shape or (1,)]).reshape(event_shape.numel(), -1)
        axes = torch.arange(pairs) % grid.shape[1]
        frequencies = SLOWEST_PERIOD ** -(torch.arange(pairs).div(grid.shape[1], rounding_mode="floor") / pairs * grid.shape[1])
        angles = torch.cat([grid, -torch.ones(1, grid.shape[1])])[:, axes] * frequencies  # the first token lies before all
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()], 1), persistent=False)

    def added(self, source: Tensor, target: Tensor) -> Tensor | float:
        """Return what is added to tokens: nothing."""
        return 0.0

    def rotations(self, source: Tensor, target: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return cosines and sines for queries and for keys, (..., 1, length, 2, pairs)."""
        return self.turns[target].unsqueeze(-4), self.turns[source].unsqueeze(-4)


def _rotated(x: Tensor, turn: Tensor | None) -> Tensor:
    """Return vectors (n, heads, length, 2 * pairs or one more) rotated in the plane of each pair."""
    if turn is None:
        return x
    cos, sin = turn.unbind(-2)
    pairs = cos.shape[-1]
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class _Cache:
    """Keys and values of the tokens so far, (n, heads, length, size), with room for `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.held: list[Tensor] = []

    def append(self, *new: Tensor) -> list[Tensor]:
        """Append the keys and values of one token, and return all."""
        self.length += 1
        if torch.is_grad_enabled():  # a gradient needs the former ones unchanged
            self.held = [torch.cat(pair, 2) for pair in zip(self.held, new, strict=True)] if self.held else list(new)
            return self.held
        if not self.held:
            self.held = [t.new_empty(*t.shape[:2], self.capacity, t.shape[3]) for t in new]
        for held, t in zip(self.held, new, strict=True):
            held[:, :, self.length - 1 : self.length] = t
        return [held[:, :, : self.length] for held in self.held]


def _is_differentiated(x: Tensor) -> bool:
    """Return True for an input with a gradient, or under a transform of `torch.func`."""
    return x.requires_grad or torch.func.debug_unwrap(x) is not x


def _attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, smooth: bool) -> Tensor:
    """Return attention (n, heads, length, size).

    Torch's fast one has no second derivatives and cannot be mapped by `torch.vmap`, so `smooth` spells it out.
    """
    if not smooth:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    weights = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        weights = weights.masked_fill(later, -inf)
    return weights.softmax(-1) @ v


class _Block(nn.Module):
    """Attention to tokens up to the own one, then a dense network; each is added to its input."""

    def __init__(self, width: int, heads: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        with torch.no_grad():  # the sum of all layers' outputs is then of the size of one
            for layer in (self.attended, self.narrow):
                layer.weight.mul_((2 * layers) ** -0.5)

    def forward(
        self, h: Tensor, turns: tuple[Tensor | None, Tensor | None], cache: _Cache | None = None, *, smooth: bool = False
    ) -> Tensor:
        """Return tokens (n, length, width), with the tokens before them in the cache, if there is one."""
        q, k, v = self.inputs(self.before(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = _rotated(q, turns[0]), _rotated(k, turns[1])
        if cache is not None:
            k, v = cache.append(k, v)
        attended = _attention(q, k, v, causal=cache is None, smooth=smooth)
        h = h + self.dropout(self.attended(attended.transpose(1, 2).flatten(2)))
        return h + self.dropout(self.narrow(F.gelu(self.wide(self.between(h)))))


class _Transformer(nn.Module):
    blocks: Sequence[_Block]  # a ModuleList, which has no type of its items

    def __init__(self, choice: Transformer, event_shape: Size, num_inputs: int, num_outputs: int, context: int) -> None:
        super().__init__()
        self.features, self.recompute = event_shape.numel(), choice.recompute
        self.value = nn.Linear(num_inputs, choice.width, bias=False)
        self.context = nn.Linear(context, choice.width) if context else None
        self.positions = choice.build_positions(event_shape)
        self.dropout = nn.Dropout(choice.dropout) if choice.dropout else nn.Identity()
        self.blocks = nn.ModuleList(  # type: ignore[assignment]
            _Block(choice.width, choice.heads, choice.dropout, choice.layers) for _ in range(choice.layers)
        )
        self.norm, self.output = nn.LayerNorm(choice.width), nn.Linear(choice.width, num_outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(self.features, num_outputs))  # parameters of independent coordinates
        with torch.no_grad():
            self.output.weight.mul_(OUTPUT_SCALE)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.bias.dtype

    def forward(self, features: Tensor, context: Tensor | None = None, order: Tensor | None = None) -> Tensor:
        """Return parameters (..., d, num_outputs) for features (..., d, num_inputs) and context (..., c).

        The order is (d,), or (..., d) for one of each datum; None is 0, 1, 2, ...
        """
        batch = features.shape[:-2]
        x = features.reshape(batch.numel(), *features.shape[-2:])
        order = self._flat_order(order, batch)
        source = torch.cat([torch.full_like(order[..., :1], self.features), order[..., :-1]], -1)
        values = F.pad(self.value(x[:, :-1]), (0, 0, 1, 0))  # the first token carries no value
        smooth = any(_is_differentiated(t) for t in (features, context) if t is not None)
        params = self._outputs(values, self._flat_context(context, batch), source, order, smooth=smooth)
        return params.reshape(*batch, *params.shape[1:])

    def steps(self, shape: Size, context: Tensor | None = None, order: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Yield the parameters (*shape, num_outputs) of one coordinate after another, and take the features of the last."""
        shape = Size(shape)
        order, context = self._flat_order(order, shape), self._flat_context(context, shape)
        caches = [_Cache(self.features) for _ in self.blocks]
        source, value = torch.full_like(order[..., :1], self.features), self.bias.new_zeros(shape.numel(), 1, 1)
        for place in range(self.features):
            target = order[..., place : place + 1]
            params = self._outputs(value, context, source, target, caches)
            x = yield params.reshape(*shape, params.shape[-1])
            source, value = target, self.value(x.reshape(shape.numel(), 1, x.shape[-1]))

    def _outputs(
        self,
        values: Tensor,
        context: Tensor | None,
        source: Tensor,
        target: Tensor,
        caches: list[_Cache] | None = None,
        *,
        smooth: bool = False,
    ) -> Tensor:
        """Return parameters (n, length, num_outputs) of tokens with embedded values (n, length, width)."""
        h = values + self.positions.added(source, target)
        if self.context is not None:
            h = h + self.context(context).unsqueeze(1)
        h, turns = self.dropout(h.expand(*h.shape[:2], self.norm.normalized_shape[0])), self.positions.rotations(source, target)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            h = run(block, h, turns, cache, recompute=self.recompute and cache is None, smooth=smooth)
        return self.output(self.norm(h)) + self.bias[target]

    def _flat_order(self, order: Tensor | None, batch: Size) -> Tensor:
        """Return an order (d,), or orders (n, d) with one batch dimension."""
        if order is None:
            return torch.arange(self.features, device=self.bias.device)
        return order if order.dim() == 1 else order.expand(*batch, self.features).reshape(batch.numel(), self.features)

    def _flat_context(self, context: Tensor | None, batch: Size) -> Tensor | None:
        return None if context is None else context.expand(*batch, context.shape[-1]).reshape(batch.numel(), context.shape[-1])
