"""Embeddings: choices of a network that summarises the observations of one site, with NaN for what is missing."""

from __future__ import annotations

__all__ = ["ConvolutionalEmbedding", "DenseEmbedding", "Embedding", "SequenceEmbedding", "SetEmbedding"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor, nn

from pyro_genmodels.posteriors.embedding_networks import (
    ConvolutionalNetwork,
    MarkedNetwork,
    SequenceNetwork,
    SetNetwork,
    dense,
)
from pyro_genmodels.utils.errors import check_positive_int


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
        return MarkedNetwork(dense(size, self.hidden, self.out_features), marks=bool(self.missing))

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
        return ConvolutionalNetwork(shape, self.channels, self.kernel, self.out_features)

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
        return SetNetwork(shape, self.hidden, self.out_features)

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
        return SequenceNetwork(shape, self.width, self.num_heads, self.num_layers, self.out_features)

    @property
    def takes_missing(self) -> bool:
        return self.min_rows is not None

    def hide(self, x: Tensor) -> Tensor:
        return _without_last_rows(x, self.min_rows)

    def completed(self, x: Tensor, shape: Size) -> Tensor:
        return _with_rows(x, shape, self.min_rows)

    def num_kinds(self, shape: Size) -> int:
        return shape[1:].numel()


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
