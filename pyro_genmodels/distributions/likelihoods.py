r"""Likelihoods: the distribution of one coordinate of the data, given the outputs of a network.

`VAE` and `Autoregressive` share these choices. Each is an immutable object that maps raw outputs of a network,
(..., num_outputs), to a Pyro distribution of batch shape (...), and values of that distribution to input features of a network,
(..., num_inputs). Networks see and return numbers of order 1. The units of the data come from one of three places:

- Real numbers are *located*: the family subtracts their mean and divides by their deviation, and the likelihood is one of the
  standardised values.
- Positive numbers, counts and proportions have a likelihood with a scale: outputs and features are deviations of a logarithm
  (`pyro_genmodels.distributions.scaled_likelihoods`). The family measures its mean and deviation, and the likelihood is one of
  the data themselves.
- Zeros and ones have a logit that is measured as a difference from the logit of the share of ones in the data.

`Mixed` (`pyro_genmodels.distributions.mixed`) has one likelihood for each column of a table.
"""

from __future__ import annotations

__all__ = [
    "BernoulliLikelihood",
    "CategoricalLikelihood",
    "DiscretizedLogisticLikelihood",
    "Estimate",
    "Likelihood",
    "MeasuredLikelihood",
    "NormalLikelihood",
    "StudentTLikelihood",
    "check_likelihood",
    "positive",
]

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import expm1, inf, log, prod
from numbers import Real
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_genmodels.distributions.discretized import DiscretizedLogisticMixture
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import check_choice, check_positive_int

Estimate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Function that returns location and scale, (...) each, of real numbers (N, ...)."""
MIN_LOGISTIC_SCALE = 0.03
"""Scale of a discretised logistic, in levels, that a network can always reach; nearly all probability is on one level."""


class Likelihood(ABC):
    """A univariate distribution whose parameters are outputs of a network."""

    num_inputs: int = 1
    """Number of features of one value."""

    has_rsample: bool = False
    """True if samples carry gradients."""

    is_mixed: bool = False
    """True if coordinates have likelihoods of their own: see `Mixed`."""

    has_scale: bool = False
    """True if outputs and features are in units that `units` measures and `in_units` sets."""

    units_since: int = 1
    """Version of a family's state from which on these units are measured."""

    if_outside: str = ""
    """Advice about values outside of the support or at its end, for error messages."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Number of raw parameters per coordinate."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """Support of one value."""

    @abstractmethod
    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        """Return the distribution, of batch shape (...), with raw parameters (..., num_outputs)."""

    def support_within(self, support: constraints.Constraint) -> constraints.Constraint:
        """Return the support of a family with this likelihood; a likelihood of real values allows other sets of real values."""
        if is_real(self.support):
            if getattr(support, "is_discrete", False):
                raise ValueError(
                    f"{type(self).__name__} is a likelihood of real numbers, but found support={support}. Use "
                    "BernoulliLikelihood(), CategoricalLikelihood(k) or PoissonLikelihood(), or Mixed([...]) for columns of "
                    "different kinds, and leave support out."
                )
            return support
        if not is_real(support):
            raise ValueError(
                f"{type(self).__name__} has the support {self.support}, but found support={support}. Leave it out."
            )
        return self.support

    def encode(self, x: Tensor) -> Tensor:
        """Return features (..., num_inputs) of values (...), roughly between -1 and 1."""
        return x.unsqueeze(-1)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values in the dtype that the distribution scores: the given dtype, or integers."""
        return x.to(dtype)

    # Units, and the coordinates of an event.

    @property
    def is_located(self) -> bool:
        """True if the likelihood is one of standardised values: the family subtracts a mean and divides by a deviation."""
        return is_real(self.support)

    def units(self, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
        """Return the location and scale by which outputs of networks are measured, as doubles of shape (...).

        Args:
            x: data, (N, ...).
            estimate: function that returns mean and deviation of real numbers (N, ...), or robust ones. For integers it leaves
                out those that are NaN.
        """
        if self.is_located:
            return estimate(x)
        zeros = torch.zeros(x.shape[1:], dtype=torch.float64, device=x.device)
        return zeros, zeros + 1

    def in_units(self, loc: Tensor, scale: Tensor) -> Likelihood:
        """Return the likelihood with the location and scale of its coordinates, (...)."""
        return self

    def check_event(self, event_shape: Sequence[int]) -> None:  # noqa: B027 (most fit events of any shape)
        """Raise a ValueError if events of that shape cannot have this likelihood."""

    def at(self, place: int | Tensor) -> Likelihood:
        """Return the likelihood of one coordinate of the flattened event, or of one for each element of a tensor of places."""
        return self

    def groups(self, event_shape: Sequence[int]) -> list[tuple[tuple[int, ...], Likelihood]]:
        """Return the coordinates of the flattened event that have equal likelihoods, with these."""
        return [(tuple(range(prod(event_shape))), self)]

    def map(self, function: Callable[[Likelihood], Likelihood]) -> Likelihood:
        """Return the likelihood whose coordinates have another likelihood, a function of theirs."""
        return function(self)

    def labels(self, event_shape: Sequence[int]) -> list[str]:
        """Return names of the coordinates, for messages."""
        places = torch.cartesian_prod(*(torch.arange(n) for n in event_shape)).reshape(-1, len(event_shape)).tolist()
        return [f"coordinate {tuple(place) if len(place) > 1 else place[0]}" for place in places] if event_shape else ["x"]

    def arranged(self, x: Any, owner: str) -> Any:
        """Return data with the columns of a data frame in the order of the likelihood's names, if it has names.

        Raises:
            ValueError: if `x` is a frame of other columns. The message begins with the owner.
        """
        return x

    def fill(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return values (...) with those that are not `seen` replaced by a number of the support."""
        return torch.where(seen, x, inner_value(self.support))


@dataclass(frozen=True)
class MeasuredLikelihood(Likelihood):
    """Base of likelihoods that read outputs of networks in units of the data, so that outputs of 0 describe these.

    Attributes:
        loc: location of the coordinates, (...). A family sets it from its data.
        scale: scale of the coordinates, (...).
    """

    loc: Any = field(default=0.0, init=False, repr=False, compare=False)
    scale: Any = field(default=1.0, init=False, repr=False, compare=False)

    has_scale = True

    def in_units(self, loc: Tensor, scale: Tensor) -> Self:
        new = copy.copy(self)
        object.__setattr__(new, "loc", loc)
        object.__setattr__(new, "scale", scale)
        return new

    def at(self, place: int | Tensor) -> Self:
        is_vector = isinstance(self.loc, Tensor) and self.loc.dim()
        return self.in_units(self.loc[place], self.scale[place]) if is_vector else self


def inner_value(support: constraints.Constraint) -> float:
    """Return a number of the support of one coordinate that is not at an end, or the first of integers.

    Example:
        >>> inner_value(constraints.unit_interval), inner_value(constraints.integer_interval(2, 5))
        (0.5, 2.0)
    """
    if support.is_discrete:
        return float(getattr(support, "lower_bound", 0.0))
    return float(biject_to(support)(torch.zeros(())))


def positive(raw: Tensor, least: float = 0.0) -> Tensor:
    """Return positive numbers above `least` from outputs of a network; 0 gives 1 more than that."""
    return least + F.softplus(raw + log(expm1(1.0)))


def _is_positive(value: Any) -> bool:
    """Return True for a positive, finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < inf


def check_likelihood(likelihood: Any) -> Likelihood:
    """Return a likelihood, or `NormalLikelihood()` for None.

    Raises:
        TypeError: if it is not a likelihood.
    """
    checked: Likelihood = check_choice("A family", "likelihood", likelihood, NormalLikelihood(), Likelihood)
    return checked


@dataclass(frozen=True)
class BernoulliLikelihood(MeasuredLikelihood):
    """A Bernoulli distribution over zeros and ones, with one logit; 0 is the logit of the share of ones in the data.

    Example:
        >>> BernoulliLikelihood()(torch.zeros(1)).mean
        tensor(0.5000)
    """

    num_outputs = 1
    support = constraints.boolean
    units_since = 2
    if_outside = "Code the two values as 0 and 1, or use CategoricalLikelihood(k) for more classes."

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.loc + params.squeeze(-1), validate_args=False)

    def units(self, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
        """Return the logit of the share of ones, as of half a one and half a zero more, so that it is finite; and 1."""
        share = (x.sum(0, dtype=torch.float64) + 0.5) / (len(x) + 1)
        return share.logit(), torch.ones_like(share)

    def encode(self, x: Tensor) -> Tensor:
        return torch.add(x.new_full((), -1), x, alpha=2).unsqueeze(-1)  # 2 x - 1 in one pass


@dataclass(frozen=True)
class CategoricalLikelihood(Likelihood):
    """A categorical distribution over 0 .. num_classes - 1. For ordered levels see `DiscretizedLogisticLikelihood`."""

    num_classes: int

    if_outside = (
        "Classes are numbered from 0, and one that the model was built without has no probability: count all of them in "
        "CategoricalLikelihood(k), also those that the training data lack, or leave these rows out."
    )

    def __post_init__(self) -> None:
        check_positive_int("CategoricalLikelihood", least=2, num_classes=self.num_classes)

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
    """A discretised mixture of logistics over the ordered integers 0 .. levels - 1: see `DiscretizedLogisticMixture`.

    Args:
        levels: number of levels.
        components: number of logistics in the mixture.
    """

    levels: int
    components: int = 5

    if_outside = "Number the levels from 0, and count all of them in DiscretizedLogisticLikelihood(levels)."

    def __post_init__(self) -> None:
        check_positive_int("DiscretizedLogisticLikelihood", least=2, levels=self.levels)
        check_positive_int("DiscretizedLogisticLikelihood", components=self.components)

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
        lowest = min(-7.0, log(8 * MIN_LOGISTIC_SCALE / self.levels))
        scale = self.levels / 8 * log_scale.clamp(lowest, 7).exp()
        return DiscretizedLogisticMixture(logits, half * (1 + spread + loc), scale, self.levels, validate_args=False)

    def encode(self, x: Tensor) -> Tensor:
        return (2 * x / (self.levels - 1) - 1).unsqueeze(-1)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.long()


@dataclass(frozen=True)
class NormalLikelihood(Likelihood):
    """A normal distribution over the real numbers, or a mixture of normal distributions.

    Args:
        scale: "learned" for a standard deviation that the network predicts for each coordinate, or a fixed standard deviation,
            in units of the standardised data if the family standardises.
        min_scale: lower bound of a learned scale, in the same units, which keeps the density finite. Without standardisation
            these are the units of the data: give a bound far below their spread.
        components: number of components of a mixture with learned weights (Bishop, *Mixture Density Networks*, 1994). Samples
            of a mixture carry no gradients.
    """

    scale: float | Literal["learned"] = "learned"
    min_scale: float = 1e-3
    components: int = 1

    support = constraints.real

    def __post_init__(self) -> None:
        check_positive_int("NormalLikelihood", components=self.components)
        if self.scale != "learned" and not _is_positive(self.scale):
            raise ValueError(f'NormalLikelihood wants scale="learned" or a positive number, but found {self.scale!r}.')
        if not _is_positive(self.min_scale):
            raise ValueError(f"NormalLikelihood wants a positive number as min_scale, but found {self.min_scale!r}.")

    @property
    def num_outputs(self) -> int:
        return self.components * (1 + (self.scale == "learned") + (self.components > 1))

    @property
    def has_rsample(self) -> bool:
        """True if samples carry gradients."""
        return self.components == 1

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x unchanged if it holds floats, so that standardisation subtracts a mean in their own precision."""
        return x if x.is_floating_point() else x.to(dtype)

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        loc, *others = params.split(self.components, -1)
        scale: Any = self.scale
        if self.scale == "learned":
            scale = positive(others[0], self.min_scale)
        if self.components == 1:
            scale = scale.squeeze(-1) if isinstance(scale, Tensor) else scale
            return dist.Normal(loc.squeeze(-1), scale, validate_args=False)
        # different initial locations, or the components would stay equal
        loc = loc + torch.linspace(-1.5, 1.5, self.components, dtype=loc.dtype, device=loc.device)
        weights = dist.Categorical(logits=others[-1], validate_args=False)
        return dist.MixtureSameFamily(weights, dist.Normal(loc, scale, validate_args=False), validate_args=False)


@dataclass(frozen=True)
class StudentTLikelihood(Likelihood):
    """Student's t distribution over the real numbers, for data with heavy tails. Lange, Little and Taylor (1989).

    Its scale is that of the bulk, not of the tails: build the family with ``standardize="robust"`` too.

    Args:
        df: degrees of freedom, a positive number, or "learned" for a number above 1 that the network predicts.
        min_scale: lower bound of the scale, in units of the standardised data.

    Raises:
        ValueError: if an argument is no positive number.

    Example:
        >>> StudentTLikelihood(df=3.0)(torch.zeros(5, 2)).log_prob(torch.zeros(5)).exp()
        tensor([0.3672, 0.3672, 0.3672, 0.3672, 0.3672])
    """

    df: float | Literal["learned"] = "learned"
    min_scale: float = 1e-3

    support = constraints.real
    has_rsample = True

    def __post_init__(self) -> None:
        if self.df != "learned" and not _is_positive(self.df):
            raise ValueError(f'StudentTLikelihood wants df="learned" or a positive number, but found {self.df!r}.')
        if not _is_positive(self.min_scale):
            raise ValueError(f"StudentTLikelihood wants a positive number as min_scale, but found {self.min_scale!r}.")

    @property
    def num_outputs(self) -> int:
        return 2 + (self.df == "learned")

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x unchanged if it holds floats, as `NormalLikelihood.cast` does."""
        return x if x.is_floating_point() else x.to(dtype)

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        loc, raw_scale, *others = params.unbind(-1)
        df = 1 + positive(others[0] + 3) if self.df == "learned" else self.df
        return dist.StudentT(df, loc, positive(raw_scale, self.min_scale), validate_args=False)
