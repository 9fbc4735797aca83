r"""Distances of a fit's samples from held-out data, which exist for every fit, with or without a likelihood.

The model is sampled without its observations. Samples are made for the contexts of n rows and compared with n other rows, so
that the two sets are independent. The distance of real rows from other real rows is the *baseline*: no model is expected to be
closer.
"""

from __future__ import annotations

__all__ = ["RowSplit", "SampleQuality", "sample_quality", "split_rows"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.predictive import draw_replicates, replicated_data
from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.permutation_test import MMDTest, mmd_test


@dataclass(frozen=True)
class SampleQuality:
    """Distances of a fit's samples from data.

    Attributes:
        test: permutation test of the squared maximum mean discrepancy, by a Gaussian kernel of the median distance.
        sliced_wasserstein: sliced Wasserstein distance of order 2, in the units of the data.
        baseline: the same distance between these data and as many others, for comparison.
    """

    test: MMDTest
    sliced_wasserstein: float
    baseline: float


@dataclass(frozen=True)
class RowSplit:
    """Two disjoint sets of rows of the data.

    Attributes:
        compared: indices of the rows that samples are compared with, (n,).
        sampled: indices of the rows whose contexts are sampled for, (n,).
        baseline: sliced Wasserstein distance between the two sets of rows.
    """

    compared: Tensor
    sampled: Tensor
    baseline: float


def split_rows(x: Tensor, num_samples: int) -> RowSplit:
    """Split rows of x, (N, ...), at random into two sets of num_samples each, or of half of all if there are fewer.

    The split is the same at every call.

    Raises:
        ValueError: for fewer than 2 samples or 4 rows.
    """
    n = min(num_samples, len(x) // 2)
    if n < 2:
        raise ValueError(
            f"Comparing samples with data takes 2 or more samples and twice as many rows, but found {num_samples} samples and "
            f"{len(x)} rows."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    compared, sampled = order[:n], order[n : 2 * n]
    return RowSplit(compared, sampled, sliced_wasserstein(x[compared], x[sampled], seed=1).value.item())


def sample_quality(fit: Any, data: RowArguments, rows: RowSplit) -> SampleQuality:
    """Return the distances of a fit's samples from rows of the data.

    Args:
        fit: family, `SVI`, or pair (model, guide).
        data: arguments of the model, cut to rows of the data.
        rows: rows to compare with and to sample for, from `split_rows`.
    """
    model, _ = traces.as_pair(fit)
    n = len(rows.compared)
    call = data.take(torch.cat([rows.compared, rows.sampled]))
    with handlers.side_effect_free(model):
        trace, _ = traces.run_pair(draw_replicates(model), traces.no_latents, call.args, call.kwargs)
    replicated = replicated_data(trace, call.num_rows)
    samples, compared = replicated.draws.flatten(0, 1)[n:], replicated.data[:n]
    distance = sliced_wasserstein(samples, compared, seed=1).value.item()
    return SampleQuality(mmd_test(samples, compared), distance, rows.baseline)
