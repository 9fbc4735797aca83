r"""Autoregressive distributions: :math:`p(x \mid c) = \prod_i p(x_i \mid x_{<i}, c)`, in any order of the coordinates.

A density takes one pass of a network whose output i depends on earlier coordinates only. A sample takes one step per
coordinate. Larochelle and Murray, *NADE* (2011); Germain et al., *MADE* (arXiv 1502.03509).
"""

from __future__ import annotations

__all__ = ["Autoregression", "Conditionals"]

from collections.abc import Sequence
from functools import reduce
from math import inf
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.distributions.sequences import is_after_end
from pyro_genmodels.distributions.tempered import Tempered
from pyro_genmodels.utils.capture import can_be_read


class Conditionals(Protocol):
    """A network of the conditionals, over d coordinates in the order in which they are sampled.

    An order is a permutation of the coordinates of the flattened event, (d,), or one for each datum, (..., d). A network that
    was built for one order ignores it.
    """

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the features and the parameters."""

    def __call__(self, features: Tensor, context: Tensor | None, order: Tensor) -> Tensor:
        """Return the parameters (..., d, num_outputs) of all conditionals, given features (..., d, num_inputs)."""

    def steps(self, shape: Size, context: Tensor | None, order: Tensor) -> Any:
        """Return a generator of the parameters (*shape, num_outputs) of each conditional in turn.

        Its method `send` takes the features (*shape, num_inputs) of the coordinate that was sampled last.
        """


class Autoregression(GenerativeDistribution):
    """A product of conditionals: one pass of the network for a density, and one step per coordinate for a sample.

    Args:
        conditionals: network of the conditionals.
        likelihood: distribution of one coordinate, given the network's parameters, in the units of the flattened event.
        order: indices of the flattened event's coordinates in the order of sampling, (d,).
        event_shape: shape of one datum, with d coordinates in all.
        any_order: True if the network serves every order.
        end: symbol after which a sequence holds end symbols only, with probability 1; None if there is none.
        kwargs: further arguments of `GenerativeDistribution`.
    """

    def __init__(
        self,
        conditionals: Conditionals,
        likelihood: Likelihood,
        order: Tensor,
        event_shape: Sequence[int],
        *,
        any_order: bool = False,
        end: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, support=kwargs.pop("support", likelihood.support), **kwargs)
        self.conditionals, self.likelihood, self.order = conditionals, likelihood, order
        self.any_order, self.end = any_order, end
        self.network = conditionals

    @property
    def has_rsample(self) -> bool:
        return self.likelihood.has_rsample

    def _features(self, likelihood: Likelihood, x: Tensor) -> Tensor:
        """Return features (..., num_inputs) of values (...) with a likelihood, which may be that of one coordinate."""
        features = likelihood.encode(likelihood.cast(x, self.conditionals.dtype)).to(self.conditionals.dtype)
        return F.pad(features, (0, unused)) if (unused := self.likelihood.num_inputs - features.shape[-1]) else features

    def _rounded(self, y: Tensor) -> Tensor:
        return y if self.likelihood.has_scale else super()._rounded(y)  # which computes in doubles, or rounds them itself

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self._log_prob_in(self.order, y, context)

    def _log_prob_in(self, order: Tensor, y: Tensor, context: Tensor | None) -> Tensor:
        """Return the log density in an order (d,), or in one for each datum, (batch..., d)."""
        likelihood = self.likelihood.at(order)
        y = likelihood.cast(_ordered(self.flat(y), order), self.conditionals.dtype)
        params = self.conditionals(self._features(likelihood, y), context, order).to(self.conditionals.dtype)
        log_p = likelihood(params).log_prob(y)
        if self.end is not None:
            certain = torch.where(y == self.end, 0.0, -inf).to(log_p.dtype)
            log_p = torch.where(is_after_end(y, self.end), certain, log_p)
        return log_p.sum(-1)

    def training_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density; for a network of any order in training mode, in an order drawn for each datum."""
        if not (self.any_order and getattr(self.network, "training", False)):
            return self.log_prob(value)
        y, context, log_det = self.aligned(value)
        noise = torch.rand(y.shape[: y.dim() - self.event_dim] + self.order.shape, device=self.order.device)
        return self._log_prob_in(noise.argsort(-1), y, context) + log_det

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        return self._draw_in(self.order, shape, context)

    def _draw_in(
        self, order: Tensor, shape: Size, context: Tensor | None, given: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Return samples (*shape, *event_shape).

        Args:
            order: order of sampling, (d,), or one for each datum, (*shape, d).
            shape: batch shape of the samples.
            context: context (*shape, c), or None.
            given: flags of the coordinates that are known, and values, (*shape, d) in the order of sampling.
        """
        steps = self.conditionals.steps(shape, context, order)
        drawn: list[Tensor] = []
        params = next(steps)
        places = order.tolist() if self.likelihood.is_mixed and order.dim() == 1 else order.unbind(-1)
        for place in places:
            likelihood = self.likelihood.at(place)
            conditional = likelihood(params[..., : likelihood.num_outputs].to(self.conditionals.dtype))
            value = conditional.rsample() if conditional.has_rsample else conditional.sample()
            if self.end is not None and drawn:
                value = torch.where(drawn[-1] == self.end, drawn[-1], value)
            if given is not None:
                known, values = (part[..., len(drawn)] for part in given)
                value = torch.where(known, values, value)
            drawn.append(value)
            if self.end is not None and can_be_read(value) and bool((value == self.end).all()):
                drawn += [value] * (len(places) - len(drawn))  # all have ended
                break
            if len(drawn) < len(places):
                params = steps.send(self._features(likelihood, value))
        dtype = reduce(torch.promote_types, {value.dtype for value in drawn})  # columns may be of different kinds
        return self.unflat(_ordered(torch.stack([value.to(dtype) for value in drawn], -1), order.argsort(-1)))

    def _on_device(self, value: Any) -> Tensor:
        return super()._on_device(self.likelihood.arranged(value, self.owner))

    def complete(self, x: Tensor, known: Tensor) -> Tensor:
        """Draw the unknown coordinates of events, given the known ones.

        Args:
            x: events, (batch..., *event_shape); what they hold where `known` is False is ignored. For several completions of
                one event, expand it.
            known: True where a coordinate is known, (batch..., *event_shape).

        Returns:
            Events of the batch shape of x, known and the distribution, with the values of x where they are known.

        Raises:
            ValueError: if a known coordinate is sampled after an unknown one, unless the network serves every order; if `known`
                does not hold truth values, or a known value is not finite or outside of the support.

        Example:
            >>> from pyro_genmodels import Autoregressive, BernoulliLikelihood
            >>> family = Autoregressive((3,), likelihood=BernoulliLikelihood())
            >>> x, known = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([True, True, False])
            >>> family().complete(x.expand(5, 3), known)[:, :2].unique(dim=0)
            tensor([[1., 0.]])
        """
        x, known = self._as_value(x), torch.as_tensor(known, device=self.order.device)
        if known.dtype is not torch.bool or known.shape[max(known.dim() - self.event_dim, 0) :] != self.event_shape:
            raise ValueError(
                f"known wants truth values whose shape ends with the event shape {tuple(self.event_shape)}, but found "
                f"{known.dtype} of shape {tuple(known.shape)}. Pass, for example, known=~x.isnan()."
            )
        self._check_draws()
        with torch.no_grad():
            x, known = torch.broadcast_tensors(torch.where(known, x, self._inner_event().to(x.dtype)), known)
            if self._validate_args:
                self._validate_sample(x)
            y, context, _ = self.aligned(x)
            shape = y.shape[: y.dim() - self.event_dim]
            known = known.expand(y.shape)
            order = self._order_from(self.flat(known))
            flags, values = _ordered(self.flat(known), order), _ordered(self.flat(y), order)
            given = flags, self.likelihood.cast(values, self.conditionals.dtype)
            return torch.where(known, x, self.to_data(self._draw_in(order, shape, context, given)))

    def _inner_event(self) -> Tensor:
        """Return an event in the support."""
        zeros = self._like().new_zeros(self.event_shape.numel())
        if self.end is not None:
            return self.unflat(zeros + self.end)
        return self.to_data(self.unflat(self.likelihood.fill(zeros, torch.zeros_like(zeros, dtype=torch.bool))))

    def _order_from(self, known: Tensor) -> Tensor:
        """Return an order in which the known coordinates (batch..., d) come first."""
        flags = known[..., self.order]
        if self.any_order:
            return self.order[(~flags).to(torch.uint8).argsort(dim=-1, stable=True)]
        late = flags[..., 1:] & ~flags[..., :-1]
        if late.any():
            place = int(late.reshape(-1, late.shape[-1]).any(0).nonzero()[0])
            before, after = self.order[place : place + 2].tolist()
            raise ValueError(
                f"{self.owner} samples coordinate {before} of the flattened event, which is not known, before coordinate "
                f"{after}, which is. Build the family with an order that begins with the known coordinates, or with "
                'network=Transformer(...) and order="any", which takes every set of them.'
            )
        return self.order

    def in_order(self, order: Sequence[int] | Tensor) -> Autoregression:
        """Return the distribution that samples the coordinates in another order.

        With a finite network, each order has a slightly different density; the mean of several is one as well, and a better one
        (arXiv 1310.1757).

        Args:
            order: permutation of the coordinates of the flattened event, (d,).

        Raises:
            ValueError: if it is not a permutation, or the network serves one order only.
        """
        order = torch.as_tensor(order, device=self.order.device)
        if not self.any_order:
            raise ValueError(
                f'{self.owner} has one order. Build the family with network=Transformer(...) and order="any" for every order.'
            )
        if order.shape != self.order.shape or not order.sort().values.equal(self.order.sort().values):
            raise ValueError(f"in_order wants a permutation of 0 .. {len(self.order) - 1}, but found {order.tolist()}.")
        return self._with(order=order)

    def tempered(self, temperature: float = 1.0, top_p: float = 1.0) -> Autoregression:
        """Return the distribution with sharper or flatter conditionals, whose samples and densities are exact as well.

        Args:
            temperature: number that divides the logits of each conditional; below 1, likely values become likelier.
            top_p: mass of the likeliest values that are kept, the fewest that reach it (*nucleus sampling*, arXiv 1904.09751).

        Raises:
            ValueError: if the conditionals are not over classes, zeros and ones or levels, or a number is out of range.

        Example:
            >>> from pyro_genmodels import Autoregressive, CategoricalLikelihood
            >>> family = Autoregressive((3,), likelihood=CategoricalLikelihood(5))
            >>> family().tempered(temperature=0.7, top_p=0.9).sample((2,)).shape
            torch.Size([2, 3])
        """
        return self._with(likelihood=self.likelihood.map(lambda each: Tempered(each, temperature, top_p)))

    def _with(self, **changes: Any) -> Autoregression:
        new = self.__class__.__new__(self.__class__)
        new.__dict__.update(self.__dict__, **changes)
        return new


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """Return vectors (..., d) with their coordinates in an order, (d,) or (..., d)."""
    return x[..., order] if order.dim() == 1 else x.gather(-1, order.expand(x.shape))
