r"""Events with missing coordinates: the density of those that are known.

.. math:: p(x_\text{seen}) = \prod_{j \,\text{seen}} p(x_j)

The coordinates are independent, as those of a decoder given its latent variable are, so the missing ones integrate to 1. With
such a likelihood the evidence bound of a variational autoencoder is one of the density of what is known: Mattei and Frellsen,
*MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets* (arXiv 1812.02633).
"""

from __future__ import annotations

__all__ = ["PartlyObserved"]

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Transform, constraints

from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.utils.distributions import mean_in_data, sum_event


class _OrMissing(constraints.Constraint):
    """A set of numbers, and NaN."""

    def __init__(self, support: constraints.Constraint) -> None:
        self.support = support
        super().__init__()

    @property
    def is_discrete(self) -> bool:
        return bool(self.support.is_discrete)

    @property
    def event_dim(self) -> int:
        return int(self.support.event_dim)

    def check(self, value: Tensor) -> Tensor:
        return self.support.check(value) | value.isnan()


class PartlyObserved(TorchDistribution):
    """Independent coordinates, of which some may be missing: the density is that of those that are not NaN.

    Samples have all coordinates.

    Args:
        likelihood: distribution of each coordinate, in the space of the network.
        params: raw parameters of a network, (batch..., *event_shape, num_outputs).
        event_shape: shape of one datum.
        transform: elementwise bijection from data to the space of the network; None is the identity.
        support: set in which one coordinate of the data lies; by default that of the likelihood.

    Example:
        >>> from pyro_genmodels import NormalLikelihood
        >>> d = PartlyObserved(NormalLikelihood(scale=1.0), torch.zeros(2, 1), (2,))
        >>> d.log_prob(torch.tensor([[0.0, 0.0], [0.0, torch.nan]]))
        tensor([-1.8379, -0.9189])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    allows_missing = True
    """True if coordinates that are NaN have no part in the density."""

    def __init__(
        self,
        likelihood: Likelihood,
        params: Tensor,
        event_shape: Sequence[int],
        *,
        transform: Transform | None = None,
        support: constraints.Constraint | None = None,
    ) -> None:
        self.likelihood, self.transform, self.dtype = likelihood, transform, params.dtype
        self.coordinates = likelihood(params)
        self.own_support = likelihood.support if support is None else support
        batch_shape = self.coordinates.batch_shape[: len(self.coordinates.batch_shape) - len(event_shape)]
        super().__init__(batch_shape, Size(event_shape), validate_args=False)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        support = _OrMissing(self.own_support)
        return constraints.independent(support, self.event_dim) if self.event_dim else support

    @property
    def has_rsample(self) -> bool:
        return bool(self.coordinates.has_rsample)

    @property
    def mean(self) -> Tensor:
        return mean_in_data(self.coordinates.mean, self.transform)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PartlyObserved:
        new = copy.copy(self)
        new.coordinates = self.coordinates.expand(Size(batch_shape) + self.event_shape)
        new._batch_shape = Size(batch_shape)
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._to_data(self.coordinates.sample(Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._to_data(self.coordinates.rsample(Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (nats) of the coordinates that are not NaN, (sample..., *batch_shape)."""
        seen = ~value.isnan()
        y = value if self.transform is None else self.transform(value)
        y = self.likelihood.cast(self.likelihood.fill(y, seen), self.dtype)
        log_p = self.coordinates.log_prob(y)
        if self.transform is not None:
            log_p = log_p + self.transform.log_abs_det_jacobian(value, y)
        return sum_event(torch.where(seen, log_p, 0.0), self.event_dim)

    def _to_data(self, y: Tensor) -> Tensor:
        return y if self.transform is None else self.transform.inv(y)
