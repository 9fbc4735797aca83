r"""Discretised mixtures of logistics, for ordered integers.

Level :math:`k \in \{0, \dots, K-1\}` has the mass of the mixture between :math:`k - 1/2` and :math:`k + 1/2`. The first and the
last level also have the tails, so the masses sum to one exactly. With :math:`\sigma` the logistic function and
:math:`u = (k + 1/2 - \mu)/s`, :math:`l = (k - 1/2 - \mu)/s`,

.. math:: \sigma(u) - \sigma(l) = \sigma(u)\,\sigma(-l)\,(1 - e^{-1/s}),

a product, so its logarithm is accurate far out in the tails. Salimans et al., *PixelCNN++* (arXiv 1701.05517).
"""

from __future__ import annotations

__all__ = ["DiscretizedLogisticMixture"]

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.tensors import as_tensor


def check_levels(owner: str, levels: Any, dtype: torch.dtype) -> None:
    """Raise a ValueError unless a number of levels is an integer of at least 2, all of whose levels the dtype tells apart."""
    check_positive_int(owner, least=2, levels=levels)
    if levels > (most := int(2 / torch.finfo(dtype).eps)):
        raise ValueError(
            f"{owner} can tell at most {most} levels apart in {dtype}, but found {levels}. Use double precision, by "
            "family.double() or torch.float64, or model real numbers."
        )


class DiscretizedLogisticMixture(TorchDistribution):
    """A distribution over the integers 0 .. levels - 1.

    Args:
        logits: unnormalised log weights of the components, (batch..., components).
        loc: locations of the components in units of levels, (batch..., components).
        scale: scales of the components in units of levels, (batch..., components).
        levels: number of levels, at least 2.
        validate_args: True checks values; None is torch's default.

    Example:
        >>> d = DiscretizedLogisticMixture(torch.zeros(1), torch.tensor([1.0]), torch.tensor([0.5]), levels=3)
        >>> d.log_prob(torch.arange(3)).exp()
        tensor([0.2689, 0.4621, 0.2689])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.real_vector,
        "loc": constraints.real_vector,
        "scale": constraints.independent(constraints.positive, 1),
    }
    has_enumerate_support = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, levels: int, *, validate_args: bool | None = None) -> None:
        check_levels("DiscretizedLogisticMixture", levels, loc.dtype)
        self.logits, self.loc, self.scale = torch.broadcast_tensors(logits, loc, scale)
        self.levels = levels
        super().__init__(self.logits.shape[:-1], Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedLogisticMixture:
        shape = (*batch_shape, self.logits.shape[-1])
        logits, loc, scale = (t.expand(shape) for t in (self.logits, self.loc, self.scale))
        return DiscretizedLogisticMixture(logits, loc, scale, self.levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        value = self._as_tensor(value)
        if self._validate_args:
            self._validate_sample(value)
        k = value.unsqueeze(-1).to(self.loc.dtype)
        bottom, top = k <= 0, k >= self.levels - 1
        below_upper = F.logsigmoid((k - self.loc + 0.5) / self.scale).masked_fill(top, 0)
        above_lower = F.logsigmoid((self.loc - k + 0.5) / self.scale).masked_fill(bottom, 0)
        width = (-torch.expm1(-1 / self.scale)).log().expand_as(below_upper).masked_fill(top | bottom, 0)
        return (self.logits.log_softmax(-1) + below_upper + above_lower + width).logsumexp(-1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            component = torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(Size(sample_shape))
            loc, scale = (
                t.expand(*shape, t.shape[-1]).gather(-1, component.unsqueeze(-1)).squeeze(-1) for t in (self.loc, self.scale)
            )
            u = torch.rand_like(loc).clamp(torch.finfo(loc.dtype).tiny, 1 - torch.finfo(loc.dtype).eps)
            return (loc + scale * u.logit()).round().clamp(0, self.levels - 1).long()

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002 (torch's signature)
        values = torch.arange(self.levels, device=self.loc.device)
        values = values.reshape(-1, *(1,) * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values

    @property
    def mean(self) -> Tensor:
        return self._moment(lambda k: k)

    @property
    def variance(self) -> Tensor:
        mean = self.mean
        return self._moment(lambda k: (k - mean).square())

    @property
    def mode(self) -> Tensor:
        return self.log_prob(self.enumerate_support()).argmax(0)

    def entropy(self) -> Tensor:
        log_p = self.log_prob(self.enumerate_support())
        return -(log_p.exp() * log_p).sum(0)

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability of value (sample..., *batch_shape) or less, for any real numbers."""
        k = self._as_tensor(value).to(self.loc).floor().unsqueeze(-1)
        below = torch.sigmoid((k - self.loc + 0.5) / self.scale).masked_fill(k >= self.levels - 1, 1).masked_fill(k < 0, 0)
        return (self.logits.softmax(-1) * below).sum(-1)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the smallest level whose `cdf` is at least value (sample..., *batch_shape), a probability."""
        value = self._as_tensor(value).to(self.loc)
        level = torch.zeros(torch.broadcast_shapes(value.shape, self.batch_shape), dtype=torch.long, device=self.loc.device)
        for bit in reversed(range((self.levels - 1).bit_length())):  # the number of levels with a smaller cdf, bit by bit
            higher = (level + 2**bit).clamp(max=self.levels - 1)
            level = torch.where(self.cdf(higher - 1) < value, higher, level)
        return level

    def _as_tensor(self, value: Any) -> Tensor:
        return as_tensor(value, type(self).__name__, floats=self.loc.dtype).to(self.loc.device)

    def _moment(self, function: Any) -> Tensor:
        k = self.enumerate_support()
        return (self.log_prob(k).exp() * function(k.to(self.loc.dtype))).sum(0)
