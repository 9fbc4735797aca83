r"""Choices for the latent variable of a VAE: the form of its guide, and priors with parameters of their own.

A guide reads what the encoder returns for a datum. A normal distribution with independent coordinates misses what the data say
about several coordinates together; a covariance, or a flow, does not. The best normal prior is not the standard one but the
average of all guides, :math:`\tfrac1N \sum_n q(z \mid x_n)`, which a mixture approximates.

Kingma and Welling (arXiv 1312.6114); Rezende and Mohamed (arXiv 1505.05770); Kingma et al. (arXiv 1606.04934); Tomczak and
Welling, *VAE with a VampPrior* (arXiv 1705.07120).
"""

from __future__ import annotations

__all__ = [
    "FlowPosterior",
    "FullNormalPosterior",
    "LatentPosterior",
    "LatentPrior",
    "MixturePrior",
    "NormalPosterior",
    "VampPrior",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform, ComposeTransform, IndependentTransform, Transform

from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.distributions.likelihoods import positive
from pyro_genmodels.nn.transforms import NSF, FlowChoice
from pyro_genmodels.nn.zuko_layers import flow_options, lazy_transform
from pyro_genmodels.utils.errors import check_choice, check_positive_int

MIN_SCALE = 1e-5
"""Smallest standard deviation of a normal distribution whose network returns it unconstrained."""


def positive_scale(raw: Tensor) -> Tensor:
    """Return standard deviations from unconstrained numbers: softplus, shifted to be 1 at 0."""
    return positive(raw, MIN_SCALE)


class LatentPosterior(ABC):
    """A choice of the distribution of z given x, whose parameters an encoder returns."""

    may_be_pair: ClassVar[bool] = False
    """True if the encoder may return a pair (location, deviation) too."""

    @abstractmethod
    def num_outputs(self, size: int) -> int:
        """Return how many numbers the encoder returns for z of this many coordinates."""

    @abstractmethod
    def build(self, shape: Size) -> nn.Module:
        """Return a module from what the encoder returns, (batch..., num_outputs), to the distribution of z of this shape."""


@dataclass(frozen=True)
class NormalPosterior(LatentPosterior):
    """A normal distribution with independent coordinates. The encoder returns locations, then unconstrained deviations."""

    may_be_pair: ClassVar[bool] = True

    def num_outputs(self, size: int) -> int:
        return 2 * size

    def build(self, shape: Size) -> nn.Module:
        return _Normal(shape)


class _Normal(nn.Module):
    def __init__(self, shape: Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, out: Tensor) -> dist.TorchDistribution:
        loc, raw = (part.reshape(part.shape[:-1] + self.shape) for part in out.chunk(2, -1))
        return dist.Normal(loc, positive_scale(raw)).to_event(len(self.shape))


@dataclass(frozen=True)
class FullNormalPosterior(LatentPosterior):
    """A normal distribution with a covariance of its own for each datum.

    The encoder returns the location, the unconstrained diagonal of the Cholesky factor, as `NormalPosterior` has deviations,
    and the entries below it, which are multiplied by the diagonal entry of their row.
    """

    def num_outputs(self, size: int) -> int:
        return 2 * size + size * (size - 1) // 2

    def build(self, shape: Size) -> nn.Module:
        return _FullNormal(shape)


class _MultivariateNormal(dist.MultivariateNormal):
    """A normal distribution whose products of matrices autocast does not round."""

    def log_prob(self, value: Tensor) -> Tensor:
        with torch.autocast(self.loc.device.type, enabled=False):
            return super().log_prob(value)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.autocast(self.loc.device.type, enabled=False):
            return super().rsample(Size(sample_shape))


class _FullNormal(nn.Module):
    def __init__(self, shape: Size) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, out: Tensor) -> dist.TorchDistribution:
        size = self.shape.numel()
        loc, raw, below = out.split([size, size, size * (size - 1) // 2], -1)
        unit = torch.eye(size, dtype=out.dtype, device=out.device).expand(*out.shape[:-1], size, size).clone()
        rows, columns = torch.tril_indices(size, size, -1, device=out.device)
        unit[..., rows, columns] = below
        normal = _MultivariateNormal(loc, scale_tril=positive_scale(raw).unsqueeze(-1) * unit)
        if len(self.shape) == 1:
            return normal
        return dist.TransformedDistribution(normal, [dist.transforms.ReshapeTransform(Size((size,)), self.shape)])


@dataclass(frozen=True)
class FlowPosterior(LatentPosterior):
    """A normal distribution with independent coordinates, mapped by a flow that is conditioned on the datum.

    Args:
        transform: layers of the flow. By default splines in coupling layers, whose draws and densities take few passes. `MAF()`
            takes a pass of its networks for each coordinate of a draw. `Planar()` has few parameters.
        num_features: length of the vector by which the encoder conditions the flow.

    Raises:
        TypeError: if the transform is no choice of layers.
        ValueError: if `num_features` is not a positive integer.
    """

    transform: FlowChoice = field(default_factory=lambda: NSF(transforms=2, hidden=(64,), passes=2))
    num_features: int = 32

    def __post_init__(self) -> None:
        check_choice("FlowPosterior", "transform", self.transform, NSF(passes=2), FlowChoice)
        check_positive_int("FlowPosterior", num_features=self.num_features)

    def num_outputs(self, size: int) -> int:
        return 2 * size + self.num_features

    def build(self, shape: Size) -> nn.Module:
        return _FlowOfNormal(shape, self.transform, self.num_features)


class _FlowOfNormal(nn.Module):
    def __init__(self, shape: Size, choice: FlowChoice, num_features: int) -> None:
        super().__init__()
        self.shape, self.base = shape, choice.base
        self.flow = lazy_transform(choice.build(shape.numel(), num_features))

    def forward(self, out: Tensor) -> dist.TorchDistribution:
        options = flow_options(self.flow)
        return NormalizingFlow(self._transform, self.base(out), self.shape, context=out, **options)

    def _transform(self, out: Tensor | None) -> Transform:
        """Return the bijection from z to the base, both vectors."""
        if out is None:
            raise ValueError("The flow of a posterior wants what the encoder returns.")
        size = self.shape.numel()
        loc, raw, features = out.split([size, size, out.shape[-1] - 2 * size], -1)
        scale = positive_scale(raw)
        affine = IndependentTransform(AffineTransform(-loc / scale, 1 / scale), 1)
        return ComposeTransform([affine, self.flow(features)])


class LatentPrior(ABC):
    """A choice of a prior of z that has parameters of its own."""

    @abstractmethod
    def build(self, shape: Size, inputs: Size) -> nn.Module:
        """Return a module that returns the distribution of z.

        Its argument is a function from inputs of the encoder, (batch..., *inputs), to the guide's distribution of z.

        Args:
            shape: shape of z.
            inputs: shape of what the encoder is given of one datum.
        """


@dataclass(frozen=True)
class MixturePrior(LatentPrior):
    """A mixture of normal distributions with independent coordinates, whose weights, locations and deviations are learned.

    Args:
        components: number of components.

    Raises:
        ValueError: if it is not a positive integer.
    """

    components: int = 10

    def __post_init__(self) -> None:
        check_positive_int("MixturePrior", components=self.components)

    def build(self, shape: Size, inputs: Size) -> nn.Module:
        return _Mixture(self.components, shape)


class _Mixture(nn.Module):
    def __init__(self, components: int, shape: Size) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, *shape))
        self.raw_scale = nn.Parameter(torch.zeros(components, *shape))

    def forward(self, encode: Callable[[Tensor], Any]) -> dist.TorchDistribution:
        parts = dist.Normal(self.loc, positive_scale(self.raw_scale)).to_event(self.loc.dim() - 1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


@dataclass(frozen=True)
class VampPrior(LatentPrior):
    r"""The average of the guides of learned inputs, :math:`\sum_k \pi_k\, q(z \mid u_k)` (arXiv 1705.07120).

    Args:
        components: number K of inputs.

    Raises:
        ValueError: if it is not a positive integer.
    """

    components: int = 500

    def __post_init__(self) -> None:
        check_positive_int("VampPrior", components=self.components)

    def build(self, shape: Size, inputs: Size) -> nn.Module:
        return _AverageOfGuides(self.components, inputs)


class _AverageOfGuides(nn.Module):
    def __init__(self, components: int, inputs: Size) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.inputs = nn.Parameter(0.5 * torch.randn(components, *inputs))

    def forward(self, encode: Callable[[Tensor], Any]) -> dist.TorchDistribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), encode(self.inputs))
