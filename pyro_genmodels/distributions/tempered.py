r"""Likelihoods over finitely many values with a temperature, and without their least likely values.

.. math:: q(k) \propto p(k)^{1/T} \text{ for } k \text{ among the likeliest values, the fewest whose mass reaches top-p.}

Holtzman et al., *The Curious Case of Neural Text Degeneration* (arXiv 1904.09751).
"""

from __future__ import annotations

__all__ = ["Tempered"]

from dataclasses import dataclass, replace
from math import inf
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.distributions.likelihoods import Likelihood


@dataclass(frozen=True)
class Tempered(Likelihood):
    """A likelihood over 0 .. k - 1 with a temperature, restricted to its likeliest values.

    Args:
        likelihood: likelihood whose distributions enumerate their support, the integers 0 .. k - 1.
        temperature: positive number that divides the logits.
        top_p: mass of the likeliest values that are kept, more than 0 and at most 1.

    Raises:
        ValueError: if the likelihood is over other values, or a number is out of range.
    """

    likelihood: Likelihood
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < inf):
            raise ValueError(f"A temperature is a positive number, but found {self.temperature!r}.")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is a number in (0, 1], but found {self.top_p!r}.")
        if not self.likelihood(torch.zeros(self.likelihood.num_outputs)).has_enumerate_support:
            raise ValueError(
                f"A temperature and top_p are for classes, zeros and ones, and levels, but found {self.likelihood!r}. Use "
                "CategoricalLikelihood(k), or leave them out."
            )

    @property
    def num_outputs(self) -> int:
        return self.likelihood.num_outputs

    @property
    def num_inputs(self) -> int:
        return self.likelihood.num_inputs

    @property
    def support(self) -> constraints.Constraint:
        return self.likelihood.support

    def __call__(self, params: Tensor) -> dist.TorchDistribution:
        conditional = self.likelihood(params)
        values = conditional.enumerate_support(expand=False)
        logits = conditional.log_prob(values).movedim(0, -1) / self.temperature
        if self.top_p == 1:  # the sum of all masses but tiny ones may be rounded to 1
            return dist.Categorical(logits=logits, validate_args=False)
        ranked = logits.softmax(-1).sort(-1, descending=True)
        dropped = ranked.values.cumsum(-1) - ranked.values >= self.top_p  # those above reach the mass without it
        dropped[..., 0] = False
        kept = dropped.gather(-1, ranked.indices.argsort(-1)).logical_not()
        return dist.Categorical(logits=logits.where(kept, logits.new_full((), -inf)), validate_args=False)

    def at(self, place: int | Tensor) -> Tempered:
        return replace(self, likelihood=self.likelihood.at(place))

    def encode(self, x: Tensor) -> Tensor:
        return self.likelihood.encode(x)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.long()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
