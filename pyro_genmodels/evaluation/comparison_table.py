r"""The table of several fits on the same held-out rows, and what it needs to know of their values."""

from __future__ import annotations

__all__ = ["ComparisonTable", "PairedValues", "differences", "ranking", "stacking_weights", "weights_of_known"]

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.evaluation.result import LikelihoodResult
from pyro_genmodels.evaluation.sample_quality import SampleQuality
from pyro_genmodels.utils.errors import import_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class PairedValues:
    """Sums and variances over rows of the log-likelihoods of fits, the best first, and of their differences to the best.

    Attributes:
        rows: number of rows.
        totals: sum of the values of each fit, (fits,), in double precision like all that follow.
        variances: their variance over rows.
        difference_totals: sum of the differences of the best to each fit.
        difference_variances: their variance over rows.
    """

    rows: int
    totals: Tensor
    variances: Tensor
    difference_totals: Tensor
    difference_variances: Tensor

    @classmethod
    def of(cls, values: Tensor) -> PairedValues:
        """Return them, given values (fits, rows)."""
        found = differences(values[0], values)
        return cls(values.shape[1], values.sum(1), _variance(values), found.sum(1), _variance(found))


def differences(best: Tensor, values: Tensor) -> Tensor:
    """Return how far values lie below others; 0 where both are the same, also where both are infinite."""
    return (best - values).masked_fill(values == best, 0.0)


def _variance(values: Tensor) -> Tensor:
    """Return the variance over rows, (fits,); NaN for a single row."""
    return values.var(1) if values.shape[1] > 1 else torch.full_like(values[:, 0], float("nan"))


class ComparisonTable(ABC):
    """Base of comparisons: their table, plot and text.

    Attributes:
        log_likelihoods: name of the fit -> its log-likelihoods, best first.
        dims: number of dimensions of one datum, or None.
        sample_quality: name of the fit -> distances of its samples from the data.
    """

    log_likelihoods: Mapping[str, Any]
    dims: int | None
    sample_quality: Mapping[str, SampleQuality]

    @property
    @abstractmethod
    def _paired(self) -> PairedValues:
        """Sums and variances of the values, from which the table is made."""

    @property
    @abstractmethod
    def _weights(self) -> Tensor | Sequence[float]:
        """Stacking weights (fits,), NaN for fits with a NaN."""

    @property
    def baseline(self) -> float:
        """Sliced Wasserstein distance between real data and other real data; NaN if samples were not compared."""
        return next((quality.baseline for quality in self.sample_quality.values()), float("nan"))

    @property
    def table(self) -> pd.DataFrame:
        """Data frame with one row per fit, best first.

        Columns: ``rank`` from 0; ``elpd`` (nats, summed over the held-out rows, higher is better) and its ``se``;
        ``elpd_diff`` to the best and its paired ``dse``; the stacking ``weight``; ``kind`` and its ``num_samples``; ``nats``
        and ``bits_per_dim`` (negative and per datum, lower is better). Without a likelihood these are NaN. If importance
        weights were averaged: ``pareto_k``, the largest k-hat of a row, and ``unreliable``, the share of rows where it is above
        .7. If samples were compared: ``mmd``, the squared discrepancy, its p-value ``mmd_p``, and ``sliced_wasserstein``. If
        noise was added to samples: its deviation ``observation_noise``.
        """
        import pandas as pd

        n, found = self._paired.rows, self._paired
        fits = list(self.log_likelihoods.values())
        shared = torch.tensor([fit.shared_error for fit in fits]).square().double()  # of log Z, the same in every row
        table = pd.DataFrame(
            {
                "rank": range(len(fits)),
                "elpd": found.totals,
                "se": (n * found.variances + n**2 * shared).sqrt(),
                "elpd_diff": found.difference_totals,
                "dse": (n * found.difference_variances + n**2 * (shared + shared[0]) * (torch.arange(len(fits)) > 0)).sqrt(),
                "weight": self._weights,
                "kind": [fit.kind for fit in fits],
                "num_samples": [fit.num_samples for fit in fits],
                "nats": -found.totals / n,
                "bits_per_dim": [fit.bits_per_dim(self.dims) if self.dims else float("nan") for fit in fits],
            },
            index=pd.Index(self.log_likelihoods, name="fit"),
        )
        counts = [fit.counts for fit in fits]
        if not all(isnan(count.largest_k) for count in counts):
            table["pareto_k"] = [count.largest_k for count in counts]
            known = [not isnan(count.largest_k) or count.unknown > 0 for count in counts]
            table["unreliable"] = [c.heavy / c.rows if k else float("nan") for c, k in zip(counts, known, strict=True)]
        if self.sample_quality:
            qualities = [self.sample_quality.get(name) for name in self.log_likelihoods]
            table["mmd"] = [quality.test.value if quality else float("nan") for quality in qualities]
            table["mmd_p"] = [quality.test.p_value if quality else float("nan") for quality in qualities]
            table["sliced_wasserstein"] = [quality.sliced_wasserstein if quality else float("nan") for quality in qualities]
        noise = [fit.observation_noise for fit in fits]
        if any(sigma is not None for sigma in noise):
            table["observation_noise"] = [float("nan") if sigma is None else sigma for sigma in noise]
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot held-out elpd with its standard error, and each difference to the best with its paired standard error.

        Fits without a likelihood, or whose elpd is not finite, are named below the axis.

        Raises:
            ValueError: if no fit has a likelihood.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="A picture")
        table, without = self.table, self._without_likelihood
        table = table.drop(index=without)
        if table.empty:
            raise ValueError("No fit has a likelihood to plot. See `sample_quality`: compare(fits, x, quality_samples=2000).")
        finite = table["elpd"].abs() < float("inf")
        infinite, table = list(table.index[~finite]), table[finite]
        if table.empty:
            raise ValueError(f"No fit has a finite elpd to plot: {'; '.join(self._notes)}.")
        ax = plt.subplots(figsize=(7, 1 + 0.6 * len(table)), layout="constrained")[1] if ax is None else ax
        y = -table["rank"].to_numpy()
        ax.errorbar(table["elpd"], y, xerr=table["se"], fmt="o", color="black", label="elpd ± se")
        ax.errorbar(
            table["elpd"][1:], y[1:] + 0.2, xerr=table["dse"][1:], fmt="^", color="gray", label="± se of the difference"
        )
        ax.axvline(table["elpd"].iloc[0], color="gray", linestyle="--", linewidth=1)
        ax.set_yticks(y, [f"{name}\n({self.log_likelihoods[name].label})" for name in table.index])
        note = f"\nno likelihood: {', '.join(without)}" if without else ""
        note += f"\nelpd not finite: {', '.join(infinite)}" if infinite else ""
        ax.set_xlabel(f"held-out elpd (nats of {self._paired.rows} rows, higher is better){note}")
        ax.set_ylim(y[-1] - 0.5, 0.5)
        ax.locator_params(axis="x", nbins=5)  # numbers of many digits
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return ax

    @property
    def _without_likelihood(self) -> list[str]:
        """Names of the fits without a likelihood."""
        return [name for name, fit in self.log_likelihoods.items() if fit.kind == "none"]

    @property
    def _notes(self) -> list[str]:
        """Sentences on rows of fits whose values say less than the others."""
        return [f"{name}: {note}" for name, fit in self.log_likelihoods.items() for note in fit.notes]

    def __str__(self) -> str:
        labels = [fit.label for fit in self.log_likelihoods.values()]
        text = self.table.assign(kind=labels).to_string(float_format=lambda v: f"{v:.3f}", na_rep="-")
        text += "\nelpd: summed log-likelihoods, higher is better; nats, bits_per_dim: negative and per datum, lower is better."
        fits = self.log_likelihoods.items()
        kinds = {fit.label for _, fit in fits} - {"none"}
        if len(kinds) > 1:
            text += (
                f"\nkinds differ ({', '.join(sorted(kinds))}): a lower bound underrates its fit, an estimate may overrate it."
            )
        text += "".join(f"\n{note}." for note in self._notes)
        if self._without_likelihood:
            text += f"\nwithout a likelihood: {', '.join(self._without_likelihood)}."
        for name, fit in fits:
            if fit.observation_noise is not None:
                text += f"\n{name}: Gaussian observation noise {fit.observation_noise:.3g} was added to its samples."
        if self.sample_quality:
            text += f"\nsliced Wasserstein distance between two sets of real data (baseline): {self.baseline:.3f}."
        return f"held-out log-likelihood of {self._paired.rows} rows\n{text}"


def ranking(fit: LikelihoodResult) -> tuple[bool, bool, float]:
    """Return a key that sorts fits: the best first, those with NaN behind the others, those without a likelihood last."""
    is_nan = fit.counts.nans > 0
    return fit.kind == "none", is_nan, 0.0 if is_nan else -fit.mean


def weights_of_known(values: Tensor) -> Tensor:
    """Return the stacking weights (fits,) of values (fits, rows), NaN for fits with a NaN."""
    known = ~values.isnan().any(1)
    weights = torch.full_like(values[:, 0], torch.nan)
    if known.any():
        weights[known] = stacking_weights(values[known])
    return weights


def stacking_weights(values: Tensor, *, max_steps: int = 10_000) -> Tensor:
    """Return the weights of the mixture of fits with the highest likelihood, found by expectation maximisation.

    Args:
        values: log-likelihoods, (fits, rows).
        max_steps: largest number of steps; they stop earlier once no weight moves by more than 1e-9.

    Returns:
        (fits,), summing to one.

    Example:
        >>> stacking_weights(torch.tensor([[-1.0, -1.0], [-9.0, -9.0]])).round(decimals=3)
        tensor([1., 0.])
    """
    best = values.max(0).values
    values, best = values[:, best.isfinite()], best[best.isfinite()]  # rows that all fits rule out say nothing about weights
    if not len(best):
        return torch.full((len(values),), 1 / len(values), dtype=values.dtype)
    ratios = (values - best).exp()  # exp(values), as ArviZ takes it, would be 0 for images
    weights = torch.full((len(values),), 1 / len(values), dtype=values.dtype)
    for _ in range(max_steps):
        new = weights * (ratios / (weights @ ratios)).mean(1)
        if (new - weights).abs().max() < 1e-9:
            break
        weights = new
    return weights
