"""Validation of two distributions, and their log densities at samples of one of them."""

from __future__ import annotations

__all__ = ["check_densities", "check_events", "common_batch", "log_densities", "log_prob_of"]

from collections.abc import Iterator

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_genmodels.divergences.measures import measure_of, support_of
from pyro_genmodels.utils.distributions import density_of, unwrap, without_validation


def check_events(p: Distribution, q: Distribution, *, by: str) -> None:
    """Raise an error unless p and q are distributions with the same event shape and batch shapes that broadcast.

    Args:
        p: distribution.
        q: other distribution.
        by: name of the calling function, for error messages.
    """
    for name, side in (("p", p), ("q", q)):
        if not isinstance(side, Distribution):
            cure = "For samples see wasserstein, sliced_wasserstein and mmd, or divergence_table."
            if isinstance(side, torch.nn.Module):
                cure = f"Call it: {name}()."
            raise TypeError(f"{by} wants distributions, but {name} is a {type(side).__name__}. {cure}")
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"{by} wants two distributions of one event shape, but p has {tuple(p.event_shape)} and q "
            f"{tuple(q.event_shape)}. Use .to_event() on the one with fewer dimensions."
        )
    try:
        torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    except RuntimeError:
        raise ValueError(
            f"{by} wants two batch shapes that broadcast, but p has {tuple(p.batch_shape)} and q {tuple(q.batch_shape)}. Use "
            ".expand() on one of them."
        ) from None


def check_densities(p: Distribution, q: Distribution, *, by: str, normalised: bool = True) -> None:
    """Raise a ValueError unless both distributions have an exact density with respect to some measure.

    Args:
        p: distribution.
        q: other distribution.
        by: name of the calling function, for error messages.
        normalised: True if the densities must be normalised.
    """
    for name, side in (("p", p), ("q", q)):
        density, _ = density_of(side)
        if density != "exact" and normalised:
            raise ValueError(
                f"{by} wants two exact densities, but {name} is a {type(side).__name__}, whose density is: {density}. "
                "Compare samples instead, by c2st or mmd."
            )
        for part in _parts(side):
            if problem := _problem(part):
                raise ValueError(f"{by} wants two normalised densities, but {name} is or holds a {problem}")
        if measure_of(side) is None:
            raise ValueError(
                f"{by} wants probabilities or densities, but {name} is a {type(side).__name__} that mixes both: its log_prob "
                "adds probabilities of points to densities. Compare its parts, or samples, by wasserstein or mmd."
            )


def _parts(fn: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and all distributions inside of it."""
    yield fn
    for part in vars(fn).values():
        if isinstance(part, Distribution):
            yield from _parts(part)


def _problem(part: Distribution) -> str:
    """Return what is wrong with a part that makes a density not normalised, and the way out; empty if nothing is."""
    if isinstance(part, MaskedDistribution):
        return f"masked {type(part.base_dist).__name__}, whose log_prob is 0 where it is masked. Leave .mask() out."
    if isinstance(part, dist.Empirical):
        return "Empirical, whose log_prob takes one value at a time. Compare its samples, by wasserstein or mmd."
    if isinstance(part, dist.ImproperUniform):
        return "ImproperUniform, which has no normalised density. Use a proper distribution, such as a wide Normal."
    if isinstance(part, (dist.Delta, dist.Unit)):
        log_factor = part.log_density if isinstance(part, dist.Delta) else part.log_factor
        if bool((torch.as_tensor(log_factor) != 0).any()):
            return f"{type(part).__name__} with a weight: its log_prob at the point is not 0. Leave the weight out."
    return ""


def common_batch(p: Distribution, q: Distribution) -> tuple[Distribution, Distribution]:
    """Return both distributions expanded to their common batch shape."""
    shape = torch.broadcast_shapes(p.batch_shape, q.batch_shape)
    p, q = (side if side.batch_shape == shape else side.expand(shape) for side in (p, q))
    return p, q


def log_prob_of(fn: Distribution, x: Tensor) -> Tensor:
    """Return the log density at x, minus infinity for impossible outcomes.

    Distributions of torch that are given probabilities keep log probabilities that are cut at the rounding of their dtype, 1e-7
    or 2e-16, so that an impossible outcome is merely unlikely. Here they are not cut.

    Example:
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
        inside = log_prob_of(part, x).masked_fill(~support_of(part).check(x), -torch.inf)
        mixing = fn.mixture_distribution
        weights = _log(mixing.probs) if "probs" in vars(mixing) else mixing.logits.log_softmax(-1)
        return (inside + weights).logsumexp(-1)
    if isinstance(fn, torch.distributions.OneHotCategorical):
        return log_prob_of(next(part for part in _parts(fn) if part is not fn), x.argmax(-1))
    if isinstance(fn, torch.distributions.Bernoulli):
        if "probs" in vars(fn):
            return _log(torch.where(x > 0.5, fn.probs, 1 - fn.probs))
        return torch.nn.functional.logsigmoid(torch.where(x > 0.5, fn.logits, -fn.logits))
    if isinstance(fn, torch.distributions.Categorical) and "probs" in vars(fn):
        probs = fn.probs.expand(torch.broadcast_shapes(x.shape, fn.batch_shape) + fn.probs.shape[-1:])
        return _log(probs.gather(-1, x.long().expand(probs.shape[:-1])[..., None])[..., 0])
    if isinstance(fn, torch.distributions.Binomial) and "probs" in vars(fn):
        n, p = fn.total_count, fn.probs
        ways = torch.lgamma(n + 1.0) - torch.lgamma(x + 1.0) - torch.lgamma(n - x + 1.0)
        parts = (torch.where(count == 0, 0.0, count * _log(share)) for count, share in ((x, p), (n - x, 1 - p)))
        return ways + sum(parts)
    return fn.log_prob(x)


def _log(probs: Tensor) -> Tensor:
    """Return logs, minus infinity at zero with a gradient of zero."""
    impossible = probs == 0
    return torch.where(impossible, 1.0, probs).log().masked_fill(impossible, -torch.inf)


def log_densities(p: Distribution, q: Distribution, num_samples: int, *, by: str) -> tuple[Tensor, Tensor]:
    """Return the log densities of p and q at samples of p, (num_samples, batch...) each.

    The samples are reparametrised if p allows it. The log density of q is minus infinity outside of its support.

    Args:
        p: distribution that is sampled from.
        q: other distribution, of the same event and batch shape.
        num_samples: number of samples per batch element.
        by: name of the calling function, for error messages.

    Raises:
        ValueError: if a log density is NaN.

    Example:
        >>> from torch.distributions import Uniform
        >>> log_densities(Uniform(0.0, 1.0), Uniform(2.0, 3.0), 2, by="mine")
        (tensor([0., 0.]), tensor([-inf, -inf]))
    """
    x = p.rsample((num_samples,)) if p.has_rsample else p.sample((num_samples,))
    with torch.no_grad():
        valid = q.sample((num_samples,))  # replaces points outside the support
    y = x.to(valid.dtype)
    inside = support_of(q).check(y)
    event = inside[(...,) + (None,) * len(q.event_shape)]
    log_p = log_prob_of(p, x)
    log_q = log_prob_of(q, torch.where(event, y, valid)).masked_fill(~inside, -torch.inf)
    for side, log_density in ((p, log_p), (q, log_q)):
        if num_nan := int(log_density.isnan().sum()):
            raise ValueError(
                f"{by} wants densities, but log_prob of {type(unwrap(side)).__name__} is NaN at {num_nan} of the "
                f"{log_density.numel()} samples of {type(unwrap(p)).__name__}. Check its parameters."
            )
    return log_p, log_q
