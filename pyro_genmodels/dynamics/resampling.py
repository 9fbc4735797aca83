"""Weighted draws: how many of equal weight they are worth, and draws of equal weight chosen among them."""

from __future__ import annotations

__all__ = ["effective_size", "systematic_index"]

import torch
from torch import Tensor


def effective_size(log_weights: Tensor, dim: int = 0) -> Tensor:
    """Return the effective sample size of log weights, Kish's (sum of w)^2 / sum of w^2, over one dimension.

    Args:
        log_weights: log weights, which need not be normalised.
        dim: dimension of the draws.

    Example:
        >>> effective_size(torch.zeros(5))
        tensor(5.)
    """
    return (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()


def systematic_index(log_weights: Tensor, num_samples: int) -> Tensor:
    """Return indices of draws by systematic resampling, (num_samples,), ascending.

    Each draw is chosen num_samples times its normalised weight, rounded up or down.

    Args:
        log_weights: log weights, (n,), which need not be normalised.
        num_samples: number of indices.

    Example:
        >>> systematic_index(torch.tensor([0.5, 0.0, 0.5]).log(), 4)
        tensor([0, 0, 2, 2])
    """
    edges = log_weights.double().softmax(0).cumsum(0)
    places = torch.arange(num_samples, dtype=edges.dtype, device=edges.device)
    points = (places + torch.rand((), device=edges.device).to(edges)) / num_samples
    return torch.searchsorted(edges, points).clamp(max=len(edges) - 1)
