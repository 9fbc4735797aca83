r"""The log of a mean of Monte Carlo weights, with its error and k-hat.

.. math:: \log \tfrac1n \sum_j w_j, \qquad \mathrm{se} = \frac{1}{\sqrt n} \frac{\operatorname{sd}(w)}{\overline w} .

The standard error is that of the delta method, and means nothing if k-hat is above 0.7: see `pyro_genmodels.utils.pareto`.
"""

from __future__ import annotations

__all__ = ["LogMean", "log_mean_weight"]

from math import log
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.utils.pareto import smooth_log_weights


class LogMean(NamedTuple):
    """The log of a mean of weights, and what is known about it.

    Attributes:
        value: log of the mean of the raw weights. If these are unbiased, it is too low in expectation.
        std_error: its standard error by the delta method; NaN for a single weight, inf where the value is infinite.
        pareto_k: k-hat of the weights.
        smoothed: log of the mean of the smoothed weights: of less variance, but no bound in expectation.
    """

    value: Tensor
    std_error: Tensor
    pareto_k: Tensor
    smoothed: Tensor


def log_mean_weight(log_weights: Tensor) -> LogMean:
    """Return the log of the mean weight over the first dimension, summed in double precision.

    Args:
        log_weights: log weights, (draws, ...). A NaN makes its means NaN.

    Returns:
        Values of the type of log_weights, (...) each.

    Example:
        >>> log_mean_weight(torch.linspace(-1, 1, 1001)).value  # log sinh 1
        tensor(0.1618)
    """
    weights, n = log_weights.detach().to(torch.float64), len(log_weights)
    value = weights.logsumexp(0) - log(n)
    deviations = (weights - value).exp()
    std_error = (deviations.var(0) / n).sqrt() if n > 1 else torch.full_like(value, torch.nan)
    std_error = std_error.masked_fill(value.isinf(), torch.inf)
    smoothed, k = smooth_log_weights(weights.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    found = LogMean(value, std_error, k, smoothed.logsumexp(0) - log(n))
    return LogMean(*(part.masked_fill(value.isnan(), torch.nan).to(log_weights.dtype) for part in found))
