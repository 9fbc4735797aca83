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

__all__ = [
    "LikelihoodKind",
    "LikelihoodResult",
    "LogLikelihood",
    "StreamedLogLikelihood",
    "checked",
    "lower_bound",
    "no_likelihood",
    "warned",
]

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, isfinite, log, log10, nan, sqrt
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.evaluation.row_counts import RowCounts, RowTotals
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.log_mean import LogMean
from pyro_genmodels.utils.pareto import MAX_PARETO_K, are_unreliable
from pyro_genmodels.utils.parts import read_parts

LikelihoodKind = Literal["exact", "lower bound", "estimate", "unreliable", "none"]
"""Meaning of a log-likelihood."""


class LikelihoodResult(ABC):
    """Base of log-likelihoods of rows: what is known of their mean, in numbers and words."""

    kind: LikelihoodKind
    num_samples: int
    shared_error: float
    observation_noise: float | None
    is_bound: bool

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def counts(self) -> RowCounts:
        """Numbers of rows whose values say less than others."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """Mean log-likelihood of a datum (nats), higher is better."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Variance of the values of rows; NaN for a single datum."""

    @abstractmethod
    def parts(self) -> Iterator[Tensor]:
        """Return the values of all rows in parts, (n,) each, in order.

        Raises:
            ValueError: if they are not known.
        """

    @property
    def label(self) -> str:
        """Kind in words, such as "unreliable lower bound"."""
        return "unreliable lower bound" if self.kind == "unreliable" and self.is_bound else self.kind

    @property
    def nats(self) -> float:
        """Negative log-likelihood in nats per datum, lower is better."""
        return -self.mean

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean, with the data as a random sample; NaN for a single datum."""
        return nan if self.num_rows < 2 else sqrt(self.variance / self.num_rows + self.shared_error**2)

    @property
    def digits(self) -> int:
        """Number of decimals to print the mean with: 3, or more if the standard error is below 0.001."""
        error = self.mean_std_error
        return 3 if error == 0 or not isfinite(error) else max(3, -floor(log10(error)))

    @property
    def notes(self) -> list[str]:
        """Sentences on rows whose values say less than others: NaN, infinite, or of a k-hat that is above .7 or unknown."""
        return [] if self.kind == "none" else self.counts.notes(self.num_samples)

    def bits_per_dim(self, dims: int) -> float:
        """Return the negative log-likelihood in bits per dimension, lower is better, for data of `dims` dimensions."""
        return -self.mean / (dims * log(2))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        if self.kind == "none":
            return f"- (no likelihood, n={self.num_rows})"
        is_sampled = self.kind != "exact" and (self.kind != "unreliable" or self.is_bound or self.num_samples > 1)
        k = f", k={self.num_samples}" if is_sampled else ""
        noise = self.observation_noise
        about = f"{self.label}{k}, n={self.num_rows}"
        about += "" if noise is None else f", with Gaussian observation noise {noise:.3g}"
        notes = "".join(f"; {note}" for note in self.notes)
        digits = self.digits
        return f"{self.nats:.{digits}f} ± {self.mean_std_error:.{digits}f} nats per datum, lower is better ({about}{notes})"


@dataclass(frozen=True, repr=False)
class LogLikelihood(LikelihoodResult):
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
    def num_rows(self) -> int:
        return len(self.values)

    @property
    def counts(self) -> RowCounts:
        return RowCounts.of(self.values, self.pareto_k)

    @property
    def mean(self) -> float:
        return self.values.double().mean().item()

    @property
    def variance(self) -> float:
        return self.values.double().var().item() if len(self.values) > 1 else nan

    def parts(self) -> Iterator[Tensor]:
        return iter([self.values])


@dataclass(frozen=True, repr=False)
class StreamedLogLikelihood(LikelihoodResult):
    """Log-likelihoods (nats) of rows that were read and evaluated batch by batch; only their mean and variance are held.

    Attributes:
        totals: counts and moments of the values, in double precision.
        kind: meaning of the values, as that of a `LogLikelihood`, which has the other attributes too.
        num_samples: k, the number of samples behind each value; 1 if nothing was sampled.
        path: folder of parquet files with the columns ``log_likelihood`` and ``std_error`` of each row, in the order of the
            rows, and for values of importance weights ``pareto_k`` and ``smoothed``; None if they were not written.
        shared_error: standard error of the mean that comes from values of log Z shared by several rows.
        is_bound: True if the values are lower bounds on average, also where they are unreliable.
    """

    totals: RowTotals
    kind: LikelihoodKind
    num_samples: int
    path: Path | None = None
    shared_error: float = 0.0
    observation_noise: float | None = None
    is_bound: bool = False

    @property
    def num_rows(self) -> int:
        return self.totals.counts.rows

    @property
    def counts(self) -> RowCounts:
        return self.totals.counts

    @property
    def mean(self) -> float:
        return self.totals.moments.mean.item()

    @property
    def variance(self) -> float:
        return self.totals.moments.variance.item()

    def parts(self) -> Iterator[Tensor]:
        if self.path is None:
            raise ValueError(
                "The values of each row are wanted, but these log-likelihoods of a stream were not written. Give "
                "log_likelihood a folder, out='scores.parquet', or pass the fit itself."
            )
        return (torch.from_numpy(columns["log_likelihood"].copy()) for columns in read_parts(self.path))


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
    counts = RowCounts.of(found.values, found.pareto_k, x)
    return replace(found, kind="unreliable") if warned(owner, counts, found.num_samples, found.values.dtype, cure) else found


def warned(owner: str, counts: RowCounts, num_samples: int, dtype: torch.dtype, cure: str) -> bool:
    """Warn, and return True, if the counts of rows say that their log-likelihoods are unreliable.

    Args:
        owner: function that made them, for the warnings.
        counts: the counts.
        num_samples: number of samples behind each value.
        dtype: data type of the values.
        cure: what to do if k-hat is too large.
    """
    warnings = [text for text in (_heavy_weights(counts, num_samples, cure), _not_finite(counts, dtype)) if text]
    for text in warnings:
        warn_caller(f"{owner}: {text}")
    return bool(warnings)


def _heavy_weights(counts: RowCounts, num_samples: int, cure: str) -> str:
    """Return a warning of rows whose weights have a heavy tail, or nothing if there are few."""
    if not are_unreliable(counts.heavy, counts.rows, counts.largest_k, num_samples):
        return ""
    return (
        f"Pareto k-hat is above {MAX_PARETO_K} in {counts.heavy} of {counts.rows} rows (largest {counts.largest_k:.2f}): "
        f"a few samples carry the weight there, and the value and its standard error cannot be relied on. {cure}"
    )


def _not_finite(counts: RowCounts, dtype: torch.dtype) -> str:
    """Return a warning of values that are NaN, plus infinity, or minus infinity by overflow; nothing if there are none."""
    if not counts.wrong:
        return ""
    return (
        f"the value is {counts.first_value} in {counts.wrong} of {counts.rows} rows, the first of them row "
        f"{counts.first_wrong}, so that their mean says nothing. Look at these rows: numbers above about "
        f"{torch.finfo(dtype).max ** 0.5:.0e} overflow in {dtype}, and a NaN in data or parameters spreads."
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
