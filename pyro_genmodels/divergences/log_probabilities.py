r"""Log probabilities that are minus infinity for impossible outcomes.

Distributions of torch that are given probabilities keep logs of probabilities that are cut at the rounding of their dtype, 1e-7
or 2e-16, so that an impossible outcome is merely unlikely. An f-divergence may then be finite where it is infinite: the
Pearson chi-square divergence of (1/2, 1/2) from (1, 0) would be 2e6. Here no probability is cut.
"""

from __future__ import annotations

__all__ = ["log_prob_of"]

from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_genmodels.divergences.measures import is_inside
from pyro_genmodels.utils.distributions import parts_of, without_validation


def log_prob_of(fn: Distribution, x: Tensor) -> Tensor:
    """Return the log density at x, minus infinity for impossible outcomes.

    Example:
        >>> import pyro.distributions as dist
        >>> fn = dist.Categorical(torch.tensor([1.0, 0.0]))
        >>> fn.log_prob(torch.tensor(1)), log_prob_of(fn, torch.tensor(1))
        (tensor(-15.9424), tensor(-inf))
    """
    if isinstance(fn, ExpandedDistribution):
        return log_prob_of(fn.base_dist, x).expand(x.shape[: x.ndim - len(fn.event_shape)])
    if isinstance(fn, Independent):
        return log_prob_of(fn.base_dist, x).flatten(-fn.reinterpreted_batch_ndims).sum(-1)
    if isinstance(fn, torch.distributions.MixtureSameFamily):
        part, x = without_validation(fn.component_distribution), x.unsqueeze(-1 - len(fn.event_shape))
        inside = log_prob_of(part, x).masked_fill(~is_inside(part, x), -torch.inf)
        mixing = fn.mixture_distribution
        weights = _log(mixing.probs) if "probs" in vars(mixing) else mixing.logits.log_softmax(-1)
        return (inside + weights).logsumexp(-1)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return log_prob_of(next(part for part in parts_of(fn) if part is not fn), x.argmax(-1))
    if isinstance(fn, torch.distributions.Multinomial):
        inner: Any = next(part for part in parts_of(fn) if part is not fn)
        logs = _log(inner.probs) if "probs" in vars(inner) else inner.logits.log_softmax(-1)
        ways = torch.lgamma(x.sum(-1) + 1.0) - torch.lgamma(x + 1.0).sum(-1)
        return ways + _times(x, logs).sum(-1)
    if isinstance(fn, torch.distributions.Bernoulli):
        success, failure = _log_odds(fn)
        return torch.where(x > 0.5, success, failure)
    if isinstance(fn, torch.distributions.NegativeBinomial):
        n, (success, failure) = fn.total_count, _log_odds(fn)
        ways = torch.lgamma(n + x) - torch.lgamma(x + 1.0) - torch.lgamma(n)
        return torch.where(n + x == 0, 0.0, ways) + _times(n, failure) + _times(x, success)
    if isinstance(fn, torch.distributions.Categorical) and "probs" in vars(fn):
        probs = fn.probs.expand(torch.broadcast_shapes(x.shape, fn.batch_shape) + fn.probs.shape[-1:])
        return _log(probs.gather(-1, x.long().expand(probs.shape[:-1])[..., None])[..., 0])
    if isinstance(fn, torch.distributions.Binomial):
        n, (success, failure) = fn.total_count, _log_odds(fn)
        ways = torch.lgamma(n + 1.0) - torch.lgamma(x + 1.0) - torch.lgamma(n - x + 1.0)
        return ways + _times(x, success) + _times(n - x, failure)
    return fn.log_prob(x)


def _log_odds(fn: Any) -> tuple[Tensor, Tensor]:
    """Return the logs of the probabilities of success and failure, from what the distribution was given."""
    if "probs" in vars(fn):
        return _log(fn.probs), _log(1 - fn.probs)
    return torch.nn.functional.logsigmoid(fn.logits), torch.nn.functional.logsigmoid(-fn.logits)


def _times(counts: Tensor, logs: Tensor) -> Tensor:
    """Return counts times log probabilities, 0 for a count of 0."""
    return torch.where(counts == 0, 0.0, counts * torch.where(counts == 0, 0.0, logs))


def _log(probs: Tensor) -> Tensor:
    """Return logs, minus infinity at zero with a gradient of zero."""
    impossible = probs == 0
    return torch.where(impossible, 1.0, probs).log().masked_fill(impossible, -torch.inf)
