r"""How far a fit's draws are from held-out data: what can be said of every fit, with a likelihood or without.

Draws are of the fit's model without its observations, given the contexts of n other rows than those they are compared with: two
independent sets. Beside
the distance of these from the rows stands that of the rows from n others: the *floor*, which no model's draws are meant to be
below.
"""

from __future__ import annotations

__all__ = ["SampleQuality", "model_arguments", "sample_quality", "split"]

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.predictive import replicated_data, replicating
from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.evaluation.likelihood import log_likelihood
from pyro_genmodels.evaluation.permutation_test import MMDTest, mmd_test

_OPTIONS = {name for name, p in inspect.signature(log_likelihood).parameters.items() if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class SampleQuality:
    """Draws of a fit against data.

    Attributes:
        test: the squared maximum mean discrepancy, by a Gaussian kernel of the median distance, and its p-value.
        sliced_wasserstein: the distance of order 2, in the units of the data.
    """

    test: MMDTest
    sliced_wasserstein: float


def split(x: Tensor, draws: int) -> tuple[tuple[Tensor, Tensor], float]:
    """Rows of x to compare draws with, as many as asked for or half of all, others to draw for, and how far these are apart.

    Raises:
        ValueError: for fewer than 2 draws or 4 rows.
    """
    n = min(draws, len(x) // 2)
    if n < 2:
        raise ValueError(
            f"compare wants 2 or more draws, and twice as many rows, but was asked for {draws} beside {len(x)} rows."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).to(x.device)
    rows, others = order[:n], order[n : 2 * n]
    return (rows, others), sliced_wasserstein(x[rows], x[others], seed=1).value.item()


def model_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those keyword arguments of `log_likelihood` that are the model's."""
    return {name: value for name, value in kwargs.items() if name not in _OPTIONS}


def sample_quality(fit: Any, x: Tensor, args: tuple, kwargs: Mapping[str, Any], rows: tuple[Tensor, Tensor]) -> SampleQuality:
    """Of draws for some rows of x, and of the tensors beside it that have as many, and data of others.

    Args:
        fit: as `log_likelihood` takes it.
        x: data, (N, ...).
        args: the model's other arguments.
        kwargs: those of `log_likelihood`, of which its own options are left out.
        rows: to compare with, (n,), and to draw for, (n,).
    """
    model, _ = traces.as_pair(fit)
    both, n = torch.cat(rows), len(rows[0])
    cut = lambda a: a[both] if isinstance(a, Tensor) and a.dim() and len(a) == len(x) else a  # noqa: E731
    own = {name: cut(value) for name, value in model_arguments(kwargs).items()}
    with handlers.side_effect_free():
        run, _ = traces.run_pair(replicating(model), traces.no_latents, tuple(map(cut, (x, *args))), own)
    found = replicated_data(run, len(both))
    drawn, data = found.draws.flatten(0, 1)[n:], found.data[:n]
    return SampleQuality(mmd_test(drawn, data), sliced_wasserstein(drawn, data, seed=1).value.item())
