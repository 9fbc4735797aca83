r"""Autoregressive distributions: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, in any order of the coordinates.

A density takes one pass of a network whose output i depends on earlier coordinates only. A sample takes one step per
coordinate. Larochelle and Murray, *NADE* (2011); Germain et al., *MADE* (arXiv 1502.03509).
"""

from __future__ import annotations

__all__ = ["Autoregression", "Conditionals"]

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.likelihoods import Likelihood


class Conditionals(Protocol):
    """A network of the conditionals, over d coordinates in the order in which they are sampled."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features and the parameters."""

    def __call__(self, features: Tensor, context: Tensor | None) -> Tensor:
        """Return the parameters (..., d, num_outputs) of all conditionals, given features (..., d, num_inputs)."""

    def steps(self, shape: Size, context: Tensor | None) -> Any:
        """Return a generator of the parameters (*shape, num_outputs) of each conditional in turn.

        Its method `send` takes the features (*shape, num_inputs) of the coordinate that was sampled last.
        """


class Autoregression(GenerativeDistribution):
    """A product of conditionals: one pass of the network for a density, and one step per coordinate for a sample.

    Args:
        conditionals: network of the conditionals.
        likelihood: distribution of one coordinate, given the network's parameters.
        order: indices of the flattened event's coordinates in the order of sampling, (d,).
        event_shape: shape of one datum, with d coordinates in all.
        kwargs: further arguments of `GenerativeDistribution`.
    """

    def __init__(
        self,
        conditionals: Conditionals,
        likelihood: Likelihood,
        order: Tensor,
        event_shape: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, support=kwargs.pop("support", likelihood.support), **kwargs)
        self.conditionals, self.likelihood, self.order = conditionals, likelihood, order
        self.network = conditionals

    @property
    def has_rsample(self) -> bool:
        return self.likelihood.has_rsample

    def _features(self, x: Tensor) -> Tensor:
        return self.likelihood.encode(x).to(self.conditionals.dtype)

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        y = self.likelihood.cast(self.flat(y)[..., self.order], self.conditionals.dtype)
        return self.likelihood(self.conditionals(self._features(y), context)).log_prob(y).sum(-1)

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        steps = self.conditionals.steps(shape, context)
        drawn = []
        params = next(steps)
        for last in [False] * (len(self.order) - 1) + [True]:
            conditional = self.likelihood(params)
            drawn.append(conditional.rsample() if conditional.has_rsample else conditional.sample())
            if not last:
                params = steps.send(self._features(drawn[-1]))
        return self.unflat(torch.stack(drawn, -1)[..., self.order.argsort()])
