"""Pyro's wrappers around a distribution: `MaskedDistribution`, `Independent` and `ExpandedDistribution`."""

from __future__ import annotations

__all__ = ["map_inner", "through_wrappers", "without_masks"]

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_genmodels.utils.distributions import sum_event


def map_inner(fn: Any, change: Callable[[Any], Distribution]) -> Any:
    """Return a distribution whose innermost distribution is replaced by ``change(inner)``, in the same wrappers."""
    if isinstance(fn, MaskedDistribution):
        return MaskedDistribution(map_inner(fn.base_dist, change), fn._mask)
    if isinstance(fn, Independent):
        return map_inner(fn.base_dist, change).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        return map_inner(fn.base_dist, change).expand(fn.batch_shape)
    return change(fn)


def through_wrappers(fn: Distribution, term: Callable[[Distribution], Tensor]) -> Tensor:
    """Return a term of the distribution inside wrappers, summed and masked as the wrappers sum and mask its `log_prob`."""
    if isinstance(fn, MaskedDistribution):
        return scale_and_mask(through_wrappers(fn.base_dist, term), mask=fn._mask)
    if isinstance(fn, Independent):
        return sum_event(through_wrappers(fn.base_dist, term), fn.reinterpreted_batch_ndims)
    if isinstance(fn, ExpandedDistribution):
        values = through_wrappers(fn.base_dist, term)
        return values.expand(torch.broadcast_shapes(values.shape, fn.batch_shape))
    return term(fn)


def without_masks(fn: Distribution) -> Distribution:
    """Return the distribution inside all outer `MaskedDistribution` wrappers."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn
