r"""The result of a log-likelihood: values of rows, what kind of number they are, and warnings if they are unreliable.

A proposal that is too narrow, or far too wide, gives weights with a heavy tail, and the bound stays far below the truth for any
practical number of samples. Their k-hat (`pyro_genmodels.utils.pareto`, arXiv 1507.02646) shows this: if it is above .7 in more
than one row of twenty, the values are called an unreliable lower bound; on average they are still below the truth. `values` are
means of the raw weights, because the mean of Pareto-smoothed weights is no bound; that estimate, of less variance, is in
`smoothed`.

Signs: `values`, `mean` and an elpd are log-likelihoods, so higher is better. "nats per datum", printed and in tables, and bits
per dimension are their negatives, as losses are, so lower is better.
"""

from __future__ import annotations

__all__ = ["LikelihoodKind", "LogLikelihood", "checked", "lower_bound", "no_likelihood"]

from dataclasses import dataclass, replace
from math import log
from typing import Literal

import torch
from torch import Tensor

from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.log_mean import LogMean
from pyro_genmodels.utils.pareto import MAX_PARETO_K, MIN_PARETO_DRAWS, count_unreliable, is_unreliable, largest_pareto_k

LikelihoodKind = Literal["exact", "lower bound", "estimate", "unreliable", "none"]
"""Meaning of a log-likelihood."""


@dataclass(frozen=True, repr=False)
class LogLikelihood:
    """Log-likelihoods (nats), one per datum, and what is known about them.

    Attributes:
        values: log-likelihoods, (N,), higher is better; NaN if the kind is "none".
        std_error: Monte Carlo standard error of each value, (N,); 0 for values without sampling, NaN for a single sample.
        kind: meaning of the values; "unreliable" if k-hat of the rows says so, if log Z is, or if values are NaN, plus infinity
            or minus infinity by overflow; "none" for a fit that can be sampled from but has no likelihood.
        num_samples: k, the number of samples behind each value; 1 if nothing was sampled.
        log_partition: log Z that all values share, if they are of one energy; its error is part of each standard error.
        shared_error: standard error of the mean that comes from values of log Z shared by several rows.
        observation_noise: deviation of the Gaussian noise that was added to samples without a density
            (`gaussian_observation_likelihood`); None if none was added.
        pareto_k: k-hat of the importance weights of each row, (N,); NaN for fewer than 21 samples, None if nothing was sampled.
        smoothed: estimate of each value from Pareto-smoothed weights, (N,): of less variance than `values`, but no bound; None
            without importance weights.
        is_bound: True if the values are lower bounds on average, also where they are unreliable.
    """

    values: Tensor
    std_error: Tensor
    kind: LikelihoodKind
    num_samples: int
    log_partition: LogPartition | None = None
    shared_error: float = 0.0
    observation_noise: float | None = None
    pareto_k: Tensor | None = None
    smoothed: Tensor | None = None
    is_bound: bool = False

    @property
    def label(self) -> str:
        """Kind in words, such as "unreliable lower bound"."""
        return "unreliable lower bound" if self.kind == "unreliable" and self.is_bound else self.kind

    @property
    def mean(self) -> float:
        """Mean log-likelihood of a datum (nats), higher is better."""
        return self.values.double().mean().item()

    @property
    def nats(self) -> float:
        """Negative log-likelihood in nats per datum, lower is better."""
        return -self.mean

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean, with the data as a random sample; NaN for a single datum."""
        if len(self.values) < 2:
            return float("nan")
        return (self.values.double().var() / len(self.values) + self.shared_error**2).sqrt().item()

    @property
    def notes(self) -> list[str]:
        """Sentences on rows whose values say less than others: NaN, infinite, or of a k-hat that is above .7 or unknown."""
        if self.kind == "none":
            return []
        rows_of = {"the value is NaN": self.values.isnan(), "the value is infinite": self.values.isinf()}
        if self.pareto_k is not None:
            heavy = f"Pareto k-hat is above {MAX_PARETO_K} (largest {largest_pareto_k(self.pareto_k):.2f})"
            rows_of[heavy] = self.pareto_k > MAX_PARETO_K
            if self.num_samples < MIN_PARETO_DRAWS:
                unknown = f"Pareto k-hat is unknown, with fewer than {MIN_PARETO_DRAWS} samples,"
                rows_of[unknown] = self.pareto_k.isnan() & self.values.isfinite()
        return [f"{note} in {rows.sum()} of {len(rows)} rows" for note, rows in rows_of.items() if rows.any()]

    def bits_per_dim(self, dims: int) -> float:
        """Return the negative log-likelihood in bits per dimension, lower is better, for data of `dims` dimensions."""
        return -self.mean / (dims * log(2))

    def __repr__(self) -> str:
        return f"LogLikelihood({self})"

    def __str__(self) -> str:
        if self.kind == "none":
            return f"- (no likelihood, n={len(self.values)})"
        is_sampled = self.kind != "exact" and (self.kind != "unreliable" or self.is_bound or self.num_samples > 1)
        k = f", k={self.num_samples}" if is_sampled else ""
        noise = self.observation_noise
        about = f"{self.label}{k}, n={len(self.values)}"
        about += "" if noise is None else f", with Gaussian observation noise {noise:.3g}"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.nats:.3f} ± {self.mean_std_error:.3f} nats per datum, lower is better ({about}{notes})"


def checked(owner: str, found: LogLikelihood, x: Tensor, *, cure: str) -> LogLikelihood:
    """Return log-likelihoods, of the kind "unreliable" if their k-hat or their values say so.

    Args:
        owner: function that made them, for the warnings.
        found: log-likelihoods, of the kind that they have if they are reliable.
        x: data, with N rows in any dimension.
        cure: what to do if k-hat is too large.

    Warns:
        RuntimeWarning: if they are unreliable; it names how many.
    """
    warnings = [text for text in (_heavy_weights(found, cure), _not_finite(found.values, x)) if text]
    for text in warnings:
        warn_caller(f"{owner}: {text}")
    return replace(found, kind="unreliable") if warnings else found


def _heavy_weights(found: LogLikelihood, cure: str) -> str:
    """Return a warning of rows whose weights have a heavy tail, or nothing if there are few."""
    k = found.pareto_k
    if k is None or not is_unreliable(k, found.num_samples):
        return ""
    return (
        f"Pareto k-hat is above {MAX_PARETO_K} in {count_unreliable(k)} of {len(k)} rows (largest {largest_pareto_k(k):.2f}): "
        f"a few samples carry the weight there, and the value and its standard error cannot be relied on. {cure}"
    )


def _not_finite(values: Tensor, x: Tensor) -> str:
    """Return a warning of values that are NaN, plus infinity, or minus infinity by overflow; nothing if there are none.

    Minus infinity is right for an impossible datum, unless its square is too large for the precision of the values.
    """
    largest = torch.finfo(values.dtype).max ** 0.5
    overflows = values.isneginf() & bool((x.abs() > largest).any())
    wrong = values.isnan() | values.isposinf() | overflows
    if not wrong.any():
        return ""
    first = int(wrong.nonzero()[0])
    return (
        f"the value is {values[first].item()} in {int(wrong.sum())} of {len(values)} rows, the first of them row {first}, so "
        f"that their mean says nothing. Look at these rows: numbers above about {largest:.0e} overflow in {values.dtype}, and "
        "a NaN in data or parameters spreads."
    )


def lower_bound(
    owner: str, mean: LogMean, num_samples: int, x: Tensor, *, cure: str, observation_noise: float | None = None
) -> LogLikelihood:
    """Return lower bounds that are logs of mean weights; their kind is "unreliable" if k-hat or the values say so.

    Args:
        owner: function that made them, for warnings.
        mean: log mean weight of each row.
        num_samples: number of weights of each row.
        x: data, (N, ...).
        cure: what to do if k-hat is too large.
        observation_noise: deviation of the noise that was added to samples.

    Warns:
        RuntimeWarning: if they are unreliable.
    """
    found = LogLikelihood(
        mean.value,
        mean.std_error,
        "lower bound",
        num_samples,
        observation_noise=observation_noise,
        pareto_k=mean.pareto_k,
        smoothed=mean.smoothed,
        is_bound=True,
    )
    return checked(owner, found, x, cure=cure)


def no_likelihood(num_rows: int) -> LogLikelihood:
    """Return the `LogLikelihood` of a fit without one: NaN for each row, of the kind "none"."""
    values = torch.full((num_rows,), torch.nan)
    return LogLikelihood(values, values, "none", 0)
