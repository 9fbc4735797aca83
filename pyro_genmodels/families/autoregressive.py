r"""Autoregressive models: one conditional distribution per coordinate, all from one masked network.

.. math:: \log p(x \mid c) = \sum_i \log p(x_i \mid x_{<i}, c)

Trained by `MaximumLikelihood`. Germain et al., *MADE* (arXiv 1502.03509).
"""

from __future__ import annotations

__all__ = ["Autoregressive"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.distributions.autoregressive import Autoregression
from pyro_genmodels.distributions.likelihoods import Likelihood, check_likelihood
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.family import Family, Standardize, StandardizeContext
from pyro_genmodels.nn.masked import MADE
from pyro_genmodels.utils.tensors import as_tensor


class Autoregressive(Family):
    """A masked autoregressive model (MADE).

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        likelihood: conditional distribution of one coordinate: `NormalLikelihood()`, the default, `BernoulliLikelihood()`,
            `CategoricalLikelihood(k)` or `DiscretizedLogisticLikelihood(levels)`.
        order: permutation of the coordinates of the flattened event, in the order in which they are drawn; by default
            0, 1, 2, ...
        hidden: widths of the hidden layers.
        dropout: rate at which hidden units are dropped in training.
        support: set in which one coordinate lies; only with `NormalLikelihood`.
        standardize: see `Family`; only with `NormalLikelihood`.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `likelihood` is not one of these choices.
        ValueError: if the order is not a permutation.

    Example:
        >>> from pyro_genmodels import Autoregressive, BernoulliLikelihood
        >>> made = Autoregressive((4,), likelihood=BernoulliLikelihood())
        >>> outcomes = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
        >>> round(made().log_prob(outcomes).exp().sum().item(), 4)
        1.0
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        likelihood: Likelihood | None = None,
        order: Sequence[int] | Tensor | None = None,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        support: constraints.Constraint = constraints.real,
        standardize: Standardize = True,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        likelihood = check_likelihood(likelihood)
        support = likelihood.support_within(support)
        super().__init__(
            event_shape,
            context=context,
            support=support,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        self.likelihood = likelihood
        features = self.event_shape.numel()
        order = torch.arange(features) if order is None else as_tensor(order, "order")
        if order.shape != (features,) or not order.sort().values.equal(torch.arange(features)):
            raise ValueError(f"order wants a permutation of 0 .. {features - 1}, but found {order.tolist()}.")
        self.register_buffer("order", order)
        self.conditionals = MADE(
            features,
            self.likelihood.num_inputs,
            self.likelihood.num_outputs,
            context=self.context_size,
            hidden=hidden,
            dropout=dropout,
        )

    def forward(self, context: Tensor | None = None) -> Autoregression:
        return Autoregression(
            self.conditionals,
            self.likelihood,
            self.order,
            self.event_shape,
            context=self.embed(context),
            support=self.support,
            pretransform=self.pretransform,
        )
