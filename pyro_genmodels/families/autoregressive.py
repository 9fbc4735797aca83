r"""Autoregressive models: one conditional distribution per coordinate, all from one network.

.. math:: \log p(x \mid c) = \sum_i \log p(x_i \mid x_{<i}, c)

Trained by `MaximumLikelihood`. Germain et al., *MADE* (arXiv 1502.03509); Uria et al., *A Deep and Tractable Density Estimator*
(arXiv 1310.1757), for orders that are drawn in training.
"""

from __future__ import annotations

__all__ = ["Autoregressive"]

from collections.abc import Sequence
from typing import Literal

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.distributions.autoregressive import Autoregression
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.distributions.sequences import EndedSequences
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.coordinates import CoordinateFamily
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.nn.conditionals import ConditionalsChoice
from pyro_genmodels.nn.masked import MaskedNetwork
from pyro_genmodels.nn.transformer import Transformer
from pyro_genmodels.utils.errors import check_choice
from pyro_genmodels.utils.tensors import as_tensor


class Autoregressive(CoordinateFamily):
    """An autoregressive model: by a masked dense network (MADE), a `Transformer` or a `PixelCNN`.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        likelihood: conditional distribution of one coordinate: `NormalLikelihood()`, the default, another one of
            `pyro_genmodels.families`, or `Mixed` with one for each column of a table.
        network: network of the conditionals: `Transformer` or `PixelCNN`; None for a masked dense network.
        order: permutation of the coordinates of the flattened event, in the order in which they are drawn; by default
            0, 1, 2, ..., or row by row for `PixelCNN`. With "any", which wants a `Transformer`, `MaximumLikelihood` draws an
            order for each datum in training mode, so that one network learns all. Then `log_prob` and `sample` use
            0, 1, 2, ..., ``in_order(order)`` of the distribution gives it in another order, and its `complete` uses one that
            begins with the known coordinates.
        hidden: widths of the hidden layers of the masked network; by default (256, 256).
        dropout: rate at which hidden units of the masked network are dropped in training.
        direct: True for weights from inputs of the masked network to the outputs after them too (*MADE*, arXiv 1502.03509).
            They help most with many coordinates: on binarized MNIST they are worth 4 nats to a hidden layer of 2,000 units.
        end: end symbol of sequences of any length up to that of the event: after the first one, an event holds end symbols
            only, which have probability 1. Only with a discrete likelihood, for events (length,) in the order 0, 1, 2, ...
        support: set in which one coordinate lies; only with likelihoods of real numbers.
        standardize: see `Family`; only with likelihoods of real numbers and those that have a scale.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `likelihood` or `network` is not one of these choices.
        ValueError: if the order is not a permutation, or not one that the network can have; if `hidden`, `dropout` or `direct`
            is given beside another network, which has its own; if events or the likelihood cannot have the end symbol.

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
        network: ConditionalsChoice | None = None,
        order: Sequence[int] | Tensor | Literal["any"] | None = None,
        hidden: Sequence[int] | None = None,
        dropout: float = 0.0,
        direct: bool = False,
        end: int | None = None,
        support: constraints.Constraint = constraints.real,
        standardize: Standardize = True,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        super().__init__(
            event_shape,
            likelihood=likelihood,
            context=context,
            support=support,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        network = _choose_network(network, hidden, dropout, direct=direct)
        self.any_order = isinstance(order, str)
        if self.any_order and not (order == "any" and network.any_order):
            raise ValueError(
                f'order wants a permutation, None, or "any" with network=Transformer(...), but found {order!r} with '
                f"{type(network).__name__}."
            )
        self.register_buffer("order", self._permutation(network, None if isinstance(order, str) else order))
        coordinates = [self.likelihood.at(i) for i in self.order.tolist()]
        self.conditionals = network.build_by_coordinate(
            self.event_shape,
            [each.num_inputs for each in coordinates],
            [each.num_outputs for each in coordinates],
            self.context_size,
        )

        self.end = end
        if end is not None:
            self._check_end(end)
            self.support = EndedSequences(self.support, end)

    def _check_end(self, end: int) -> None:
        """Raise a ValueError unless events are sequences of symbols, of which the end symbol is one."""
        if (
            len(self.event_shape) != 1
            or not self.support.is_discrete
            or not self.support.check(torch.tensor(end)).all()
            or self.any_order
            or not bool((self.order.diff() == 1).all())
        ):
            raise ValueError(
                f"end={end!r} wants sequences (length,) in their own order, with a likelihood that has this value, such as "
                f"CategoricalLikelihood({end} + 1), but found events {tuple(self.event_shape)} with {self.likelihood!r}."
            )

    def validate(self, x: Tensor) -> None:
        super().validate(x)
        if self.end is None or not is_validation_enabled():
            return
        x = as_tensor(self.arranged(x), self.name)
        if not (proper := self.support.check(x)).all():
            raise ValueError(
                f"{self.name} was given other symbols after the end symbol {self.end} in {int((~proper).sum())} of {len(x)} "
                f"rows, the first of them row {int((~proper).nonzero()[0])}. Replace them by the end symbol."
            )

    def _permutation(self, network: ConditionalsChoice, order: Sequence[int] | Tensor | None) -> Tensor:
        """Return the order of the coordinates, (d,), after a check."""
        wanted = None if order is None else as_tensor(order, "order")
        features = self.event_shape.numel()
        if wanted is not None and (wanted.shape != (features,) or not wanted.sort().values.equal(torch.arange(features))):
            raise ValueError(f"order wants a permutation of 0 .. {features - 1}, but found {wanted.tolist()}.")
        return network.order(self.event_shape, wanted)

    def forward(self, context: Tensor | None = None) -> Autoregression:
        likelihood = self.likelihood
        if likelihood.has_scale:
            likelihood = likelihood.in_units(self.loc.flatten(), self.scale.flatten())
        return Autoregression(
            self.conditionals,
            likelihood,
            self.order,
            self.event_shape,
            any_order=self.any_order,
            end=self.end,
            context=self.embed(context),
            support=self.support,
            pretransform=self.pretransform,
        )


def _choose_network(
    network: ConditionalsChoice | None, hidden: Sequence[int] | None, dropout: float, *, direct: bool
) -> ConditionalsChoice:
    """Return the network, or a masked one with these options for None."""
    if network is None:
        return MaskedNetwork((256, 256) if hidden is None else hidden, dropout, direct)
    chosen: ConditionalsChoice = check_choice("Autoregressive", "network", network, Transformer(), ConditionalsChoice)
    if hidden is not None or dropout or direct:
        raise ValueError(
            f"hidden, dropout and direct are options of the masked network, but found network={network!r}. Give the network's "
            "own options to it, as in Transformer(layers=4, width=128, dropout=0.1)."
        )
    return chosen
