r"""What one coordinate of the data is, given what a network says about it: the choices shared by `VAE` and `Autoregressive`.

Each is an immutable record that turns raw outputs of a network, (..., num_outputs), into a Pyro distribution of batch shape
(...), and values of that distribution into features a network can read, (..., num_inputs).
"""

from __future__ import annotations

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedLogisticLikelihood",
    "Likelihood",
    "NormalLikelihood",
    "check_likelihood",
]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import expm1, log
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.distributions.discretized import DiscretizedLogisticMixture
from pyro_genmodels.utils.distributions import is_real


class Likelihood(ABC):
    """A univariate distribution whose parameters a network gives."""

    num_inputs: int = 1
    """Features that stand for one value."""

    has_rsample: bool = False
    """Whether draws carry gradients."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Raw parameters per coordinate."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """Where a value may lie."""

    @abstractmethod
    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        """Raw parameters (..., num_outputs) -> distribution of batch shape (...)."""

    def support_within(self, support: constraints.Constraint) -> constraints.Constraint:
        """The support of a family of this likelihood, which for real values alone may be set to another."""
        if is_real(self.support):
            return support
        if not is_real(support):
            raise ValueError(f"{type(self).__name__} has the support {self.support}, and cannot have {support}: leave it out.")
        return self.support

    def encode(self, x: Tensor) -> Tensor:
        """Values (...) -> features (..., num_inputs), about -1 to 1."""
        return x.unsqueeze(-1)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Values in the type their distribution scores: dtype, or integers."""
        return x.to(dtype)


def check_likelihood(likelihood: Any) -> Likelihood:
    """The likelihood itself, `NormalLikelihood` for None; anything else is a TypeError."""
    if likelihood is None:
        return NormalLikelihood()
    if not isinstance(likelihood, Likelihood):
        found = f"the class {likelihood.__name__}" if isinstance(likelihood, type) else repr(likelihood)
        raise TypeError(
            f"likelihood wants one of this library's choices, such as BernoulliLikelihood() or NormalLikelihood(), but found {found}."
        )
    return likelihood


@dataclass(frozen=True)
class BernoulliLikelihood(Likelihood):
    """Zeros and ones, from one logit."""

    num_outputs = 1
    support = constraints.boolean

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=params.squeeze(-1), validate_args=False)

    def encode(self, x: Tensor) -> Tensor:
        return (2 * x - 1).unsqueeze(-1)


@dataclass(frozen=True)
class CategoricalLikelihood(Likelihood):
    """Integers 0 .. num_classes - 1 in no order, from a logit each. Ordered levels fit `DiscretizedLogisticLikelihood` better."""

    num_classes: int

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"Categorical needs at least 2 classes, got {self.num_classes}.")

    @property
    def num_outputs(self) -> int:
        return self.num_classes

    @property
    def num_inputs(self) -> int:
        return self.num_classes

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.num_classes - 1)

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=params, validate_args=False)

    def encode(self, x: Tensor) -> Tensor:
        return F.one_hot(x.long(), self.num_classes)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.long()


@dataclass(frozen=True)
class DiscretizedLogisticLikelihood(Likelihood):
    """Integers 0 .. levels - 1 in their order, from a mixture of logistics (`DiscretizedLogisticMixture`).

    Args:
        levels: number of levels.
        components: logistics in the mixture.
    """

    levels: int
    components: int = 5

    def __post_init__(self) -> None:
        if self.levels < 2 or self.components < 1:
            raise ValueError(
                f"DiscretizedLogistic needs at least 2 levels and 1 component, got {self.levels} and {self.components}."
            )

    @property
    def num_outputs(self) -> int:
        return 3 * self.components

    @property
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        logits, loc, log_scale = params.chunk(3, -1)
        half = (self.levels - 1) / 2
        spread = torch.linspace(-0.5, 0.5, self.components, device=loc.device, dtype=loc.dtype)
        scale = self.levels / 8 * log_scale.clamp(-7, 7).exp()
        return DiscretizedLogisticMixture(logits, half * (1 + spread + loc), scale, self.levels, validate_args=False)

    def encode(self, x: Tensor) -> Tensor:
        return (2 * x / (self.levels - 1) - 1).unsqueeze(-1)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.long()


@dataclass(frozen=True)
class NormalLikelihood(Likelihood):
    """Real numbers.

    Args:
        scale: "learned" (the network gives one per coordinate) or the standard deviation itself, in units of the
            standardised data where the family standardises.
        min_scale: lower bound of a learned scale, which keeps the density finite.
        components: of a mixture whose weights the network gives too (Bishop, *Mixture Density Networks*, 1994); the draws of a
            mixture carry no gradients.
    """

    scale: float | Literal["learned"] = "learned"
    min_scale: float = 1e-3
    components: int = 1

    support = constraints.real

    def __post_init__(self) -> None:
        if not isinstance(self.components, int) or self.components < 1:
            raise ValueError(f"Normal needs at least one component, got {self.components!r}.")
        if self.scale != "learned" and not (isinstance(self.scale, (int, float)) and self.scale > 0):
            raise ValueError(f'Normal needs scale="learned" or a positive number, got {self.scale!r}.')

    @property
    def num_outputs(self) -> int:
        return self.components * (1 + (self.scale == "learned") + (self.components > 1))

    @property
    def has_rsample(self) -> bool:
        """Whether draws carry gradients."""
        return self.components == 1

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        loc, *others = params.split(self.components, -1)
        scale: Any = self.scale
        if self.scale == "learned":
            scale = self.min_scale + F.softplus(others[0] + log(expm1(1.0)))
        if self.components == 1:
            scale = scale.squeeze(-1) if isinstance(scale, Tensor) else scale
            return dist.Normal(loc.squeeze(-1), scale, validate_args=False)
        # apart from each other from the start
        loc = loc + torch.linspace(-1.5, 1.5, self.components, dtype=loc.dtype, device=loc.device)
        weights = dist.Categorical(logits=others[-1], validate_args=False)
        return dist.MixtureSameFamily(weights, dist.Normal(loc, scale, validate_args=False), validate_args=False)
