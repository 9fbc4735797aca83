"""Mixtures, of equal weights, of masked networks (MADE), each with its own order of the coordinates."""

from collections.abc import Callable, Sequence
from math import log
from pathlib import Path
from typing import Any

import torch
from resumable import resumable
from torch import Tensor

from pyro_genmodels import log_likelihood, train
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.training import Fit


def train_member(member: Any, x: Tensor, valid: Tensor, file: Path, optim: Callable[..., Any], **options: Any) -> Fit:
    """Train a family until the loss of the validation rows falls no more; resume it from its checkpoint."""
    options = {"epochs": 2000, "mode": Captured(), "progress": False} | options
    return train(member, x, valid=valid, optim=optim, checkpoint=resumable(file), **options)


def mixture_log_prob(families: Sequence[Any], x: Tensor) -> Tensor:
    """Return the log density of a mixture of families with equal weights, (N,)."""
    return torch.stack([log_likelihood(family, x).values for family in families]).logsumexp(0) - log(len(families))


def mean_of(values: Tensor) -> str:
    """Return the mean of values and its standard error, in words."""
    values = values.double()
    return f"{values.mean():.3f} ± {values.std() / len(values) ** 0.5:.3f}"
