r"""Likelihoods of positive numbers, proportions and counts, whose outputs are deviations of a logarithm.

With a link g, such as the logarithm, location m and scale s of g over the data, and outputs a and b of a network, a positive
number or a proportion has the mean and concentration

.. math:: g(\mu) = m + s a, \qquad \kappa \propto e^b / s^2 .

So outputs of order 1 describe the data, whatever their unit and spread. A count has :math:`\log \mu = m + s a` as well. There m
is the log of a typical count c, and s is the deviation of log(1 + x), in units of log x at c: 0.001 for a million calls a day,
give or take a thousand, and of order 1 for mostly zeros. With ``standardize="robust"``, a count whose log(1 + x) is more than
three robust deviations from the median counts as one at that distance.

Densities are computed in double precision: at a count of a million, terms of a million cancel. Counts: Cameron and Trivedi,
*Regression Analysis of Count Data* (1998); Lambert, *Zero-Inflated Poisson Regression* (1992). Proportions: Ferrari and
Cribari-Neto, *Beta Regression* (2004).
"""

from __future__ import annotations

__all__ = [
    "BetaLikelihood",
    "CountLikelihood",
    "GammaLikelihood",
    "LogNormalLikelihood",
    "NegativeBinomialLikelihood",
    "PoissonLikelihood",
    "ScaledLikelihood",
    "ZeroInflatedLikelihood",
]

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_genmodels.distributions.likelihoods import Estimate, MeasuredLikelihood, positive
from pyro_genmodels.utils.distributions import interior
from pyro_genmodels.utils.errors import check_choice
from pyro_genmodels.utils.precision import in_doubles

MAX_LOG_CONCENTRATION = 10.0
"""Largest size of the logarithm of a concentration, relative to that of the data."""
MAX_COUNT_SCALE = 3.0
"""Largest scale of a log count. Rare counts, such as one in a thousand rows, would have a larger one."""
MIN_COUNT = 1e-3
"""Smallest typical count."""
IF_NOT_POSITIVE = (
    "If 0 means that there is nothing, add a column of zeros and ones that says so, and make the amount missing there (NaN, "
    "with missing=True). If it means less than can be measured, use half of the smallest amount. Numbers of both signs want "
    "NormalLikelihood()."
)
"""Advice about values that are not positive."""


class Widened(dist.TorchDistribution):
    """A distribution that is computed in double precision, with values and log densities in another.

    Args:
        base: univariate distribution in double precision.
        dtype: data type of samples, moments and log densities.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, base: Distribution, dtype: torch.dtype) -> None:
        self.base_dist, self.dtype = base, dtype
        super().__init__(base.batch_shape, Size(), validate_args=False)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> constraints.Constraint | None:
        return self.base_dist.support

    @property
    def has_rsample(self) -> bool:
        return bool(self.base_dist.has_rsample)

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean.to(self.dtype)

    @property
    def variance(self) -> Tensor:
        return self.base_dist.variance.to(self.dtype)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Widened:
        return Widened(self.base_dist.expand(Size(batch_shape)), self.dtype)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._rounded(self.base_dist.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._rounded(self.base_dist.rsample(Size(sample_shape)))

    def _rounded(self, x: Tensor) -> Tensor:
        """Return samples that are not rounded to an end of the support."""
        return interior(x.to(self.dtype), self.base_dist.support)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.base_dist.log_prob(in_doubles(value)).to(self.dtype)


class PreciseBeta(dist.Beta):
    r"""A beta distribution whose log density is precise for large concentrations too.

    Proportions near 1e-9, or near 0.5 with a deviation of 1e-8, have concentrations of 1e12 and more. Terms of their size
    cancel in the usual formula. With :math:`n = a + b` and the mean :math:`p = a / n` it is

    .. math:: \log f(x) = \tfrac12 \log \frac{a b}{2 \pi n} - \log x (1 - x) - a\, g(x / p) - b\, g((1 - x) / (1 - p))
        + r(n) - r(a) - r(b), \qquad g(t) = t - 1 - \log t,

    where r is the remainder of Stirling's formula.

    Example:
        >>> PreciseBeta(torch.tensor(2.0), torch.tensor(3.0)).log_prob(torch.tensor(0.5)).exp()
        tensor(1.5000)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        a, b = self.concentration1, self.concentration0
        n = a + b
        p, q, rest = a / n, b / n, 1 - value
        distance = torch.where(p < q, value - p, q - rest)  # from the end that is near, where numbers are precise
        terms = _log_power(value, a, p, distance) + _log_power(rest, b, q, -distance)
        remainders = _stirling_remainder(n) - _stirling_remainder(a) - _stirling_remainder(b)
        return terms + remainders + (a.log() + q.log() - log(2 * pi)) / 2


class PreciseGamma(dist.Gamma):
    r"""A gamma distribution whose log density is precise for large concentrations, as that of `PreciseBeta`.

    With the mean m it is :math:`\tfrac12 \log(a / 2 \pi) - \log x - a\, g(x / m) - r(a)`.

    Example:
        >>> PreciseGamma(torch.tensor(1.0), torch.tensor(2.0)).log_prob(torch.tensor(0.0)).exp()
        tensor(2.)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        a, mean = self.concentration, self.concentration / self.rate
        return _log_power(value, a, mean, value - mean) - _stirling_remainder(a) + (a.log() - log(2 * pi)) / 2


def _log_power(x: Tensor, a: Tensor, p: Tensor, distance: Tensor) -> Tensor:
    """Return (a - 1) log x - a log p - a (x - p) / p, given x - p as the distance."""
    u = distance / p
    near = u.abs() < 0.5
    small, far = u.where(near, 0.0), x.where(~near, 0.5)
    return torch.where(near, a * (small.log1p() - small) - x.log(), torch.xlogy(a - 1, far) - a * (p.log() + u))


def _stirling_remainder(z: Tensor) -> Tensor:
    """Return log Gamma(z) - (z - 1/2) log z + z - log(2 pi) / 2."""
    small, large = z.clamp(max=10.0), z.clamp(min=10.0)
    exact = small.lgamma() - (small - 0.5) * small.log() + small - log(2 * pi) / 2
    w = large.reciprocal().square()
    series = (1 / 12 - w * (1 / 360 - w * (1 / 1260 - w * (1 / 1680 - w / 1188)))) / large
    return torch.where(z < 10, exact, series)


@dataclass(frozen=True)
class ScaledLikelihood(MeasuredLikelihood):
    """Base of likelihoods whose outputs and features are deviations of a link function of the data.

    The location and scale are those of the link function.
    """

    @abstractmethod
    def link(self, x: Tensor) -> Tensor:
        """Return the link function of data."""

    @abstractmethod
    def distribution(self, params: Tensor) -> Distribution:
        """Return the distribution for raw parameters (..., num_outputs), both in double precision."""

    def units(self, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
        return estimate(self.link(in_doubles(x)))

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x unchanged if it holds floats, since features and densities are computed in double precision."""
        return x if x.is_floating_point() else x.to(dtype)

    def encode(self, x: Tensor) -> Tensor:
        y = (self.link(in_doubles(x)) - self.loc) / self.scale
        return y.to(x.dtype if x.is_floating_point() else torch.get_default_dtype()).unsqueeze(-1)

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        return Widened(self.distribution(in_doubles(params)), params.dtype)

    def linked(self, output: Tensor) -> Tensor:
        """Return the link function of the mean for an output of the network, (...)."""
        return self.loc + self.scale * output

    def concentration(self, output: Tensor) -> Tensor:
        """Return the concentration for an output of the network, (...): that of data of the scale for 0."""
        return output.clamp(-MAX_LOG_CONCENTRATION, MAX_LOG_CONCENTRATION).exp() / in_doubles(torch.as_tensor(self.scale)) ** 2


def _log(x: Tensor) -> Tensor:
    """Return the logarithm of positive numbers; draws that were rounded to 0 count as the smallest one."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).log()


@dataclass(frozen=True)
class LogNormalLikelihood(ScaledLikelihood):
    """A log-normal distribution over the positive numbers, whose spread is one of factors.

    Args:
        min_scale: lower bound of the deviation of log x, in units of that of all data.

    Example:
        >>> LogNormalLikelihood(min_scale=1e-6)(torch.zeros(2)).mean  # of exp(z), z standard normal
        tensor(1.6487)
    """

    min_scale: float = 1e-3

    num_outputs = 2
    support = constraints.positive
    if_outside = IF_NOT_POSITIVE
    has_rsample = True

    def link(self, x: Tensor) -> Tensor:
        return _log(x)

    def distribution(self, params: Tensor) -> Distribution:
        loc, raw_scale = params.unbind(-1)
        return dist.LogNormal(self.linked(loc), self.scale * positive(raw_scale, self.min_scale), validate_args=False)


@dataclass(frozen=True)
class GammaLikelihood(ScaledLikelihood):
    """A gamma distribution over the positive numbers, such as waiting times and amounts.

    Example:
        >>> GammaLikelihood()(torch.zeros(2)).mean
        tensor(1.)
    """

    num_outputs = 2
    support = constraints.positive
    has_rsample = True
    if_outside = IF_NOT_POSITIVE

    def link(self, x: Tensor) -> Tensor:
        return _log(x)

    def distribution(self, params: Tensor) -> Distribution:
        location, raw = params.unbind(-1)
        concentration = self.concentration(raw)
        return PreciseGamma(concentration, concentration * (-self.linked(location)).exp(), validate_args=False)


@dataclass(frozen=True)
class BetaLikelihood(ScaledLikelihood):
    """A beta distribution over proportions, strictly between 0 and 1.

    Example:
        >>> BetaLikelihood()(torch.zeros(2)).mean
        tensor(0.5000)
    """

    num_outputs = 2
    support = constraints.unit_interval
    has_rsample = True
    if_outside = (
        "Move proportions of exactly 0 and 1 inside, as by (x * (n - 1) + 0.5) / n for n rows, or use NormalLikelihood() if "
        "there are many. Per cent are divided by 100."
    )

    def link(self, x: Tensor) -> Tensor:
        return _log(x) - _log(1 - x)

    def distribution(self, params: Tensor) -> Distribution:
        location, raw = params.unbind(-1)
        logit, center = self.linked(location), in_doubles(torch.as_tensor(self.loc))
        concentration = self.concentration(raw) / (center.sigmoid() * (-center).sigmoid())  # var(logit x) at the center
        return PreciseBeta(concentration * logit.sigmoid(), concentration * (-logit).sigmoid(), validate_args=False)


@dataclass(frozen=True)
class CountLikelihood(ScaledLikelihood):
    """Base of likelihoods of counts 0, 1, 2, ... without an upper bound, with the logarithm of their mean as first output."""

    support = constraints.nonnegative_integer
    if_outside = "Counts are whole numbers from 0: use NormalLikelihood() or LogNormalLikelihood() for other numbers."

    def link(self, x: Tensor) -> Tensor:
        return x.clamp(min=0).log1p()

    def units(self, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
        loc, deviation = (part.nan_to_num() for part in estimate(self.link(in_doubles(x))))  # NaN where there is no count
        typical = loc.expm1().clamp(min=MIN_COUNT)
        scale = deviation * (1 + typical) / typical  # d log x = d log(1 + x) * (1 + x) / x
        least = (1 + typical) ** -0.5  # of a Poisson distribution
        return typical.log(), torch.maximum(scale, least).clamp(max=MAX_COUNT_SCALE)

    def encode(self, x: Tensor) -> Tensor:
        y = (self.link(in_doubles(x)) - F.softplus(in_doubles(torch.as_tensor(self.loc)))) / self.scale
        return y.to(x.dtype if x.is_floating_point() else torch.get_default_dtype()).unsqueeze(-1)


@dataclass(frozen=True)
class PoissonLikelihood(CountLikelihood):
    """A Poisson distribution over counts, whose variance is its mean.

    Example:
        >>> PoissonLikelihood()(torch.zeros(1)).log_prob(torch.tensor(0.0))
        tensor(-1.)
    """

    num_outputs = 1

    def distribution(self, params: Tensor) -> Distribution:
        return dist.Poisson(self.linked(params.squeeze(-1)).exp(), validate_args=False)


@dataclass(frozen=True)
class NegativeBinomialLikelihood(CountLikelihood):
    """A negative binomial distribution over counts, whose variance is larger than its mean: a gamma mixture of Poissons.

    Example:
        >>> d = NegativeBinomialLikelihood()(torch.zeros(2))
        >>> d.mean, d.variance
        (tensor(1.), tensor(2.))
    """

    num_outputs = 2

    def distribution(self, params: Tensor) -> Distribution:
        location, raw = params.unbind(-1)
        concentration = self.concentration(raw)
        logits = self.linked(location) - concentration.log()
        return dist.NegativeBinomial(concentration, logits=logits, validate_args=False)


@dataclass(frozen=True)
class ZeroInflatedLikelihood(CountLikelihood):
    """A likelihood of counts with more zeros: with a learned probability a count is 0, else of another likelihood.

    Args:
        base: likelihood of the other counts, `PoissonLikelihood()` or `NegativeBinomialLikelihood()`.

    Raises:
        TypeError: if the base is no likelihood of counts.

    Example:
        >>> ZeroInflatedLikelihood(PoissonLikelihood())(torch.zeros(2)).mean
        tensor(0.5000)
    """

    base: CountLikelihood = NegativeBinomialLikelihood()

    def __post_init__(self) -> None:
        check_choice("ZeroInflatedLikelihood", "base", self.base, None, CountLikelihood)

    @property
    def num_outputs(self) -> int:
        return self.base.num_outputs + 1

    def units(self, x: Tensor, estimate: Estimate) -> tuple[Tensor, Tensor]:
        """Return location and scale of the counts that are not 0."""
        return self.base.units(torch.where(x > 0, in_doubles(x), torch.nan), estimate)

    def distribution(self, params: Tensor) -> Distribution:
        counts = self.base.in_units(self.loc, self.scale).distribution(params[..., :-1])
        return dist.ZeroInflatedDistribution(counts, gate_logits=params[..., -1], validate_args=False)
