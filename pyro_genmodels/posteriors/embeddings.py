r"""Embeddings: networks that summarise observations for an amortised posterior.

For i.i.d. rows :math:`x_1, \dots, x_n` of any number n a summary that does not depend on their order is

.. math:: s(x) = \rho\Bigl(\frac1n \sum_i \phi(x_i),\; \log n\Bigr).

Zaheer et al., *Deep Sets* (arXiv 1703.06114). Observations that are missing are NaN, and are left out of the mean; networks of
vectors see zeros in their place, with a vector of marks.

Sequences go through attention (Vaswani et al., arXiv 1706.03762), which does not look at missing rows.
"""

from __future__ import annotations

__all__ = [
    "ConvolutionalEmbedding",
    "DenseEmbedding",
    "Embedding",
    "ObservationEncoder",
    "SequenceEmbedding",
    "SetEmbedding",
    "dense",
    "embeddings_by_name",
]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Size, Tensor, nn

from pyro_genmodels.utils.errors import check_positive_int, listed, type_with_article


@dataclass(frozen=True)
class Embedding(ABC):
    """Base class of choices of a network that embeds the observations of one site."""

    @abstractmethod
    def build(self, shape: Size) -> nn.Module:
        """Return a network from observations (n, *shape), with NaN where they are missing, to vectors (n, out_features).

        Args:
            shape: shape of one observation.

        Raises:
            ValueError: if observations of this shape cannot be embedded.
        """

    def hide(self, x: Tensor) -> Tensor:
        """Return observations (n, *shape) of which some are made missing, for training; by default none is."""
        return x

    def completed(self, x: Tensor, shape: Size) -> Tensor:
        """Return an observation in the shape of the simulations, with NaN for what it lacks; by default it lacks nothing."""
        return x

    @property
    def takes_missing(self) -> bool:
        """True if values may be NaN, because training has hidden some; by default they may not."""
        return False

    def num_kinds(self, shape: Size) -> int:
        """Return the number of last coordinates that have a mean and a deviation of their own; by default all have."""
        return shape.numel()


@dataclass(frozen=True)
class DenseEmbedding(Embedding):
    """A dense network of all numbers of an observation.

    Attributes:
        out_features: length of its output.
        hidden: widths of its hidden layers.
        missing: largest share of the numbers that are made missing in training, chosen anew at each step: 0 if none will be
            missing later.

    Example:
        >>> network = DenseEmbedding(out_features=8).build(torch.Size([5]))
        >>> network(torch.randn(3, 5)).shape
        torch.Size([3, 8])
    """

    out_features: int = 32
    hidden: Sequence[int] = (64, 64)
    missing: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int("DenseEmbedding", out_features=self.out_features)
        if not 0 <= self.missing < 1:
            raise ValueError(f"DenseEmbedding wants missing as a share from 0 to below 1, but found {self.missing!r}.")

    def build(self, shape: Size) -> nn.Module:
        size = shape.numel() * (2 if self.missing else 1)
        return _Marked(dense(size, self.hidden, self.out_features), marks=bool(self.missing))

    @property
    def takes_missing(self) -> bool:
        return self.missing > 0

    def hide(self, x: Tensor) -> Tensor:
        if not self.missing:
            return x
        share = self.missing * torch.rand(len(x), *(1 for _ in x.shape[1:]), device=x.device)
        return x.masked_fill(torch.rand_like(x) < share, torch.nan)


@dataclass(frozen=True)
class ConvolutionalEmbedding(Embedding):
    """A convolutional network of series, (length,) or (length, channels), or of images, (channels, height, width).

    Attributes:
        out_features: length of its output.
        channels: number of channels of its layers, each of which halves the length.
        kernel: length of a kernel.

    Example:
        >>> network = ConvolutionalEmbedding(out_features=8).build(torch.Size([100, 2]))  # a series of two channels
        >>> network(torch.randn(3, 100, 2)).shape
        torch.Size([3, 8])
    """

    out_features: int = 32
    channels: Sequence[int] = (16, 32)
    kernel: int = 5

    def __post_init__(self) -> None:
        check_positive_int("ConvolutionalEmbedding", out_features=self.out_features, kernel=self.kernel)

    def build(self, shape: Size) -> nn.Module:
        if len(shape) not in (1, 2, 3):
            raise ValueError(f"ConvolutionalEmbedding wants series or images, but found observations {tuple(shape)}.")
        return _Convolutions(shape, self)

    def num_kinds(self, shape: Size) -> int:
        return shape[1] if len(shape) == 2 else 1


@dataclass(frozen=True)
class SetEmbedding(Embedding):
    """A network of independent rows, in any order: observations (rows, ...).

    Attributes:
        out_features: length of its output.
        hidden: widths of the hidden layers, before and after the mean over the rows.
        min_rows: smallest number of rows: in training some of the rows are left out, so that later there may be any number from
            this one to that of the simulations. None if there are always as many.

    Example:
        >>> network, x = SetEmbedding(out_features=8).build(torch.Size([20, 2])), torch.randn(3, 20, 2)
        >>> network(x).shape
        torch.Size([3, 8])
        >>> torch.allclose(network(x), network(x.flip(1)), atol=1e-5)  # rows in any order
        True
    """

    out_features: int = 32
    hidden: Sequence[int] = (64, 64)
    min_rows: int | None = None

    def __post_init__(self) -> None:
        check_positive_int("SetEmbedding", out_features=self.out_features)
        if self.min_rows is not None:
            check_positive_int("SetEmbedding", min_rows=self.min_rows)

    def build(self, shape: Size) -> nn.Module:
        if not shape:
            raise ValueError("SetEmbedding wants observations of several rows, (rows, ...), but found single numbers.")
        return _Set(shape, self)

    @property
    def takes_missing(self) -> bool:
        return self.min_rows is not None

    def hide(self, x: Tensor) -> Tensor:
        return _without_last_rows(x, self.min_rows)  # the rows are exchangeable: the first ones are as good as any

    def completed(self, x: Tensor, shape: Size) -> Tensor:
        return _with_rows(x, shape, self.min_rows)

    def num_kinds(self, shape: Size) -> int:
        return shape[1:].numel()


@dataclass(frozen=True)
class SequenceEmbedding(Embedding):
    """A small transformer of sequences whose order matters: observations (rows, ...).

    Attributes:
        out_features: length of its output.
        width: number of features of each row inside of it.
        num_heads: number of heads of attention.
        num_layers: number of layers.
        min_rows: smallest number of rows: in training some of the last rows are left out, so that later there may be any number
            from this one to that of the simulations. None if there are always as many.

    Example:
        >>> network, x = SequenceEmbedding(out_features=8).build(torch.Size([20, 2])), torch.randn(3, 20, 2)
        >>> network(x).shape
        torch.Size([3, 8])
        >>> torch.allclose(network(x), network(x.flip(1)), atol=1e-5)  # the order matters
        False
    """

    out_features: int = 32
    width: int = 32
    num_heads: int = 4
    num_layers: int = 2
    min_rows: int | None = None

    def __post_init__(self) -> None:
        check_positive_int(
            "SequenceEmbedding",
            out_features=self.out_features,
            width=self.width,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
        )
        if self.min_rows is not None:
            check_positive_int("SequenceEmbedding", min_rows=self.min_rows)
        if self.width % 2 or self.width % self.num_heads:
            raise ValueError(
                f"SequenceEmbedding wants an even width that num_heads divides, but found {self.width} and {self.num_heads}."
            )

    def build(self, shape: Size) -> nn.Module:
        if not shape:
            raise ValueError("SequenceEmbedding wants observations of several rows, (rows, ...), but found single numbers.")
        return _Transformer(shape, self)

    @property
    def takes_missing(self) -> bool:
        return self.min_rows is not None

    def hide(self, x: Tensor) -> Tensor:
        return _without_last_rows(x, self.min_rows)

    def completed(self, x: Tensor, shape: Size) -> Tensor:
        return _with_rows(x, shape, self.min_rows)

    def num_kinds(self, shape: Size) -> int:
        return shape[1:].numel()


class ObservationEncoder(nn.Module):
    """The context of an amortised posterior: observations in one vector, standardised, embedded and concatenated.

    Args:
        shapes: shape of the observation of each site, by name.
        embeddings: choice or network for each site, by name; a site without one is passed on as it is.
        example: observations, (n, ...) by name, whose mean and deviation standardise all others.
    """

    loc: Tensor
    scale: Tensor
    like: Tensor

    def __init__(
        self,
        shapes: Mapping[str, Size],
        embeddings: Mapping[str, Embedding | nn.Module],
        example: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.shapes, self.choices = dict(shapes), dict(embeddings)
        self.networks = nn.ModuleDict(
            {
                f"site_{i}": choice.build(shapes[name]) if isinstance(choice, Embedding) else choice
                for i, name in enumerate(shapes)
                if (choice := self.choices.get(name)) is not None
            }
        )
        loc, scale = [], []
        for name, shape in shapes.items():
            choice = self.choices.get(name)
            kinds = choice.num_kinds(shape) if isinstance(choice, Embedding) else shape.numel()
            rows, repeats = example[name].double().reshape(-1, kinds), shape.numel() // kinds
            deviation = rows.std(0, correction=0)
            loc.append(rows.mean(0).repeat(repeats))
            scale.append(torch.where(deviation > 0, deviation, 1.0).repeat(repeats))
        self.register_buffer("loc", torch.cat(loc))
        self.register_buffer("scale", torch.cat(scale))
        self.register_buffer("like", torch.zeros(()))
        with torch.no_grad():
            self.out_features = self.eval()(self.flatten({n: x[:2] for n, x in example.items()})).shape[-1]
        self.train()

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return observations, (n, ...) by name, as vectors, (n, numbers)."""
        return torch.cat([values[name].double().reshape(len(values[name]), -1) for name in self.shapes], -1)

    def hide(self, context: Tensor) -> Tensor:
        """Return vectors of observations, (n, numbers), of which some are made missing as the choices want it."""
        parts = []
        for name, part in self._parts(context).items():
            choice = self.choices.get(name)
            parts.append((choice.hide(part) if isinstance(choice, Embedding) else part).reshape(len(part), -1))
        return torch.cat(parts, -1)

    def forward(self, context: Tensor) -> Tensor:
        """Return the embedded observations, (..., out_features), of vectors, (..., numbers)."""
        batch = context.shape[:-1]
        rows = ((context - self.loc) / self.scale).to(self.like.dtype).reshape(-1, context.shape[-1])
        parts = []
        for i, (name, part) in enumerate(self._parts(rows).items()):
            choice = self.choices.get(name)
            if choice is None:
                parts.append(part.reshape(len(part), -1))
            else:
                parts.append(self.networks[f"site_{i}"](part if isinstance(choice, Embedding) else part.nan_to_num()))
        return torch.cat(parts, -1).reshape(*batch, -1)

    def _parts(self, context: Tensor) -> dict[str, Tensor]:
        parts = context.split([shape.numel() for shape in self.shapes.values()], -1)
        return {name: part.reshape(-1, *shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def embeddings_by_name(embedding: Any, names: Sequence[str]) -> dict[str, Embedding | nn.Module]:
    """Return the embedding of each observed site, by name, after checking them."""
    if embedding is None:
        return {}
    if not isinstance(embedding, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"There are {len(names)} observed sites: give embedding= as a dictionary by name, of some of {listed(names)}."
            )
        embedding = {names[0]: embedding}
    for name, choice in embedding.items():
        if name not in names:
            raise ValueError(f"embedding= has {name!r}, which is not among the observed sites {listed(names)}.")
        if not isinstance(choice, (Embedding, nn.Module)):
            raise TypeError(
                f"embedding= wants a choice such as SetEmbedding() or a module, but found {type_with_article(choice)}."
            )
    return dict(embedding)


def dense(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    """Return a dense network."""
    layers: list[nn.Module] = []
    for before, after in pairwise((in_features, *hidden)):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear((in_features, *hidden)[-1], out_features))


def _without_last_rows(x: Tensor, min_rows: int | None) -> Tensor:
    """Return observations (n, rows, ...) of which the last rows are missing, a random number of them."""
    if min_rows is None:
        return x
    rows = x.shape[1]
    number = torch.randint(min(min_rows, rows), rows + 1, (len(x), 1), device=x.device)
    hidden = torch.arange(rows, device=x.device) >= number
    return x.masked_fill(hidden.reshape(len(x), rows, *(1 for _ in x.shape[2:])), torch.nan)


def _with_rows(x: Tensor, shape: Size, min_rows: int | None) -> Tensor:
    """Return one observation with missing rows at its end, if it may lack them."""
    lacking = shape[0] - len(x) if x.shape[1:] == shape[1:] and x.dim() else 0
    if min_rows is None or not 0 < lacking <= shape[0] - min(min_rows, shape[0]):
        return x
    return torch.cat([x, x.new_full((lacking, *shape[1:]), torch.nan)])


class _Marked(nn.Module):
    """A network of vectors with zeros for missing numbers, and, if wanted, with marks of these."""

    def __init__(self, network: nn.Module, *, marks: bool) -> None:
        super().__init__()
        self.network, self.marks = network, marks

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.network(torch.cat([x.nan_to_num(), x.isnan().to(x)], -1) if self.marks else x.nan_to_num())


class _Set(nn.Module):
    """A network of the mean of a network over rows, and of the logarithm of their number."""

    def __init__(self, shape: Size, choice: SetEmbedding) -> None:
        super().__init__()
        self.each = dense(shape[1:].numel(), choice.hidden, choice.out_features)
        self.all = dense(choice.out_features + 1, choice.hidden, choice.out_features)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2) if x.dim() > 2 else x[..., None]
        present = ~rows.isnan().any(-1, keepdim=True)
        number = present.sum(1)
        total = (self.each(rows.nan_to_num()) * present).sum(1)
        return self.all(torch.cat([total / number.clamp(min=1), number.to(total).clamp(min=1).log()], -1))


class _Transformer(nn.Module):
    """Attention between rows with positions, then a dense network of the mean over the rows that are there."""

    positions: Tensor

    def __init__(self, shape: Size, choice: SequenceEmbedding) -> None:
        super().__init__()
        self.first = nn.Linear(shape[1:].numel(), choice.width)
        layers = [
            nn.TransformerEncoderLayer(choice.width, choice.num_heads, 2 * choice.width, dropout=0.0, batch_first=True)
            for _ in range(choice.num_layers)
        ]
        self.layers = nn.ModuleList(layers)
        self.last = dense(choice.width + 1, (choice.width,), choice.out_features)
        angles = torch.arange(shape[0])[:, None] * 10_000.0 ** -torch.linspace(0, 1, choice.width // 2)
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


class _Convolutions(nn.Module):
    """Convolutions that each halve the length, then a dense layer."""

    def __init__(self, shape: Size, choice: ConvolutionalEmbedding) -> None:
        super().__init__()
        self.shape = shape
        layer: type[nn.Conv1d] | type[nn.Conv2d] = nn.Conv2d if len(shape) == 3 else nn.Conv1d
        inputs = {1: 1, 2: shape[-1], 3: shape[0]}[len(shape)]
        layers: list[nn.Module] = []
        for before, after in pairwise((inputs, *choice.channels)):
            layers += [layer(before, after, choice.kernel, stride=2, padding=choice.kernel // 2), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            size = self.layers(self._with_channels(torch.zeros(1, *shape))).shape[1]
        self.last = nn.Linear(size, choice.out_features)

    def _with_channels(self, x: Tensor) -> Tensor:
        return {1: x[:, None], 2: x.transpose(1, -1), 3: x}[len(self.shape)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layers(self._with_channels(x.nan_to_num())))
