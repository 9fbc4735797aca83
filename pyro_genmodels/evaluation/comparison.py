r"""Comparison of several fits on the same held-out data.

For fits :math:`m` and held-out rows :math:`n`, with :math:`\ell_{mn}` the log-likelihood,

.. math:: \mathrm{elpd}_m = \sum_n \ell_{mn}, \qquad
    \mathrm{dse}_m = \sqrt{N}\,\mathrm{sd}_n(\ell_{\text{best},n} - \ell_{mn}), \qquad
    w = \operatorname{argmax}_{w \in \Delta} \sum_n \log \sum_m w_m e^{\ell_{mn}}.

The table has the columns of ArviZ's `compare`, but its elpd is computed on held-out data and is not a leave-one-out estimate.
elpd is a sum of log-likelihoods, so higher is better; nats and bits_per_dim are negative and per datum, so lower is better. A
fit without a likelihood has an empty row, unless samples are compared too. A fit with a NaN in any row is ranked behind those
without, and has no weight. Stacking weights: Yao et al., *Using Stacking to Average Bayesian Predictive Distributions* (arXiv
1704.02030).
"""

from __future__ import annotations

__all__ = ["Comparison", "compare"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels._pyro.handlers import side_effect_free
from pyro_genmodels._pyro.traces import as_pair
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments, with_own_plate
from pyro_genmodels.evaluation.likelihood import has_likelihood, log_likelihood
from pyro_genmodels.evaluation.result import LogLikelihood, no_likelihood
from pyro_genmodels.evaluation.sample_quality import SampleQuality, sample_quality, split_rows
from pyro_genmodels.utils.errors import import_extra, type_with_article
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, option_names, runs_models
from pyro_genmodels.utils.pareto import count_unreliable, largest_pareto_k
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import as_tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_OPTIONS = option_names(log_likelihood)


@dataclass(frozen=True)
class Comparison:
    """Log-likelihoods of several fits on the same held-out data, and the quality of their samples.

    Attributes:
        log_likelihoods: name of the fit -> its log-likelihoods, best first; then fits with NaN, and those of the kind "none".
        dims: number of dimensions of one datum; None if no data were given.
        sample_quality: name of the fit -> distances of its samples from the data; empty if samples were not compared.
    """

    log_likelihoods: Mapping[str, LogLikelihood]
    dims: int | None
    sample_quality: Mapping[str, SampleQuality] = field(default_factory=dict)

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

        values = self._values
        n = values.shape[1]
        differences = (values[0] - values).masked_fill(values == values[0], 0.0)  # also where both are infinite
        fits = list(self.log_likelihoods.values())
        shared = torch.tensor([fit.shared_error for fit in fits]).square().double()  # of log Z, the same in every row
        table = pd.DataFrame(
            {
                "rank": range(len(fits)),
                "elpd": values.sum(1),
                "se": (n * _variance(values) + n**2 * shared).sqrt(),
                "elpd_diff": differences.sum(1),
                "dse": (n * _variance(differences) + n**2 * (shared + shared[0]) * (torch.arange(len(fits)) > 0)).sqrt(),
                "weight": self._weights,
                "kind": [fit.kind for fit in fits],
                "num_samples": [fit.num_samples for fit in fits],
                "nats": -values.mean(1),
                "bits_per_dim": [fit.bits_per_dim(self.dims) if self.dims else float("nan") for fit in fits],
            },
            index=pd.Index(self.log_likelihoods, name="fit"),
        )
        k_hats = [fit.pareto_k for fit in fits]
        if any(k is not None and not k.isnan().all() for k in k_hats):
            table["pareto_k"] = [float("nan") if k is None else largest_pareto_k(k) for k in k_hats]
            table["unreliable"] = [float("nan") if k is None else count_unreliable(k) / len(k) for k in k_hats]
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
        ax.set_xlabel(f"held-out elpd (nats of {self._values.shape[1]} rows, higher is better){note}")
        ax.set_ylim(y[-1] - 0.5, 0.5)
        ax.locator_params(axis="x", nbins=5)  # numbers of many digits
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return ax

    @cached_property
    def _values(self) -> Tensor:
        """Log-likelihoods, (fits, N), in double precision."""
        return torch.stack([fit.values.double().cpu() for fit in self.log_likelihoods.values()])

    @property
    def _without_likelihood(self) -> list[str]:
        """Names of the fits without a likelihood."""
        return [name for name, fit in self.log_likelihoods.items() if fit.kind == "none"]

    @property
    def _notes(self) -> list[str]:
        """Sentences on rows of fits whose values say less than the others."""
        return [f"{name}: {note}" for name, fit in self.log_likelihoods.items() for note in fit.notes]

    @cached_property
    def _weights(self) -> Tensor:
        """Stacking weights (fits,), NaN for fits with a NaN; computed once, since this takes many steps."""
        known = ~self._values.isnan().any(1)
        weights = torch.full_like(self._values[:, 0], torch.nan)
        if known.any():
            weights[known] = stacking_weights(self._values[known])
        return weights

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
        return f"held-out log-likelihood of {self._values.shape[1]} rows\n{text}"


@runs_models(log_likelihood)
def compare(
    fits: Mapping[str, Any],
    x: Any = None,
    *args: Any,
    quality_samples: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Compare several fits by their log-likelihood on the same held-out data, and by the quality of their samples.

    A fit that can be sampled from but has no density, such as an `Implicit` site, is listed without a likelihood. The fits'
    modules run in evaluation mode, and their mode is restored afterwards.

    Args:
        fits: name -> fit, as `log_likelihood` takes it, or a `LogLikelihood` already computed on the same rows.
        x: data that no fit was trained on, (N, ...): tensor, numpy array or data frame.
        args: other arguments of the models, passed to `log_likelihood` together with kwargs. To compare a conditional with an
            unconditional fit, pass a `LogLikelihood` of each.
        quality_samples: number of samples of each fit to compare with as many rows of x (at most half of all), by the maximum
            mean discrepancy and the sliced Wasserstein distance, in the units of the data. None compares no samples. A
            `LogLikelihood` has no samples.
        model_kwargs: keyword arguments of the models whose names are also options of `log_likelihood` or of this function.
        kwargs: options of `log_likelihood` (num_samples, batch_size, ...) and keyword arguments of the models.

    Raises:
        TypeError: if fits have no names, or x holds no numbers.
        ValueError: without fits; if the fits' rows differ; if samples are to be compared without data, fewer than 2 of them, or
            those of a model whose plate chooses rows.
        ImportError: if samples are to be compared and POT, of the extra ``eval``, is missing.

    Warns:
        RuntimeWarning: if values are unreliable, see `log_likelihood`.

    Example:
        >>> from pyro_genmodels import Flow, MAF, compare
        >>> x = torch.randn(50, 2)
        >>> list(compare({"spline": Flow((2,)), "affine": Flow((2,), transform=MAF())}, x).table["kind"])
        ['exact', 'exact']
    """
    if not isinstance(fits, Mapping):
        raise TypeError(f"compare wants fits by name, such as {{'flow': flow}}, but found {type_with_article(fits)}.")
    if not fits:
        raise ValueError("compare wants at least one fit, but found none.")
    if quality_samples is not None and x is None:
        raise ValueError(f"compare found quality_samples={quality_samples}, but no data x to compare samples with.")
    if quality_samples is not None and (isinstance(quality_samples, bool) or not isinstance(quality_samples, Integral)):
        raise TypeError(f"compare wants quality_samples as a number of samples or None, but found {quality_samples!r}.")
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    own = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    own = joined_keywords(own, model_kwargs)
    given, x = x, None if x is None else as_tensor(x, "compare")
    split = None if quality_samples is None or x is None else split_rows(x, quality_samples)
    log_likelihoods: dict[str, LogLikelihood] = {}
    qualities: dict[str, SampleQuality] = {}
    for name, fit in fits.items():
        if isinstance(fit, LogLikelihood):
            log_likelihoods[name] = fit
            continue
        if x is None:
            raise ValueError(f"compare was given the fit {name!r}, but no data x to evaluate it on.")
        model, guide = as_pair(fit)
        check_model_keywords(model, guide, (x, *args), own)
        data = row_arguments("compare", given, args, own, options.get("row_dim", 0), model=model)
        if split is not None:
            _check_rows_can_be_cut(name, fit, data)
            qualities[name] = sample_quality(fit, data, split)
        shared = {option: value for option, value in options.items() if option in option_names(has_likelihood)}
        has_one = has_likelihood(fit, *data.args, model_kwargs=data.kwargs, **shared)
        log_likelihoods[name] = (
            log_likelihood(fit, *data.args, model_kwargs=data.kwargs, **options) if has_one else no_likelihood(data.num_rows)
        )
    rows = {name: len(found.values) for name, found in log_likelihoods.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"compare wants the same data for all fits, but found rows {rows}.")
    best_first = sorted(log_likelihoods.items(), key=lambda item: _ranking(item[1]))
    dims = None if x is None else prod(size for d, size in enumerate(x.shape) if d != options.get("row_dim", 0) % x.dim())
    return Comparison(dict(best_first), dims, qualities)


def _check_rows_can_be_cut(name: str, fit: Any, data: RowArguments) -> None:
    """Raise a ValueError unless a model can be given some rows of the data, for which it is to be sampled."""
    model, guide = as_pair(fit)
    with side_effect_free(model, guide), forked_rng():
        plate = with_own_plate(model, data).plate
    if data.row_dim or plate is not None:
        found = f"row_dim={data.row_dim}" if plate is None else f"the plate {plate.name!r} with subsample_size={plate.count}"
        raise ValueError(
            f"compare cuts rows of x, its first dimension, to compare samples of {name!r} with them, but found {found}. Leave "
            "quality_samples out."
        )


def _ranking(fit: LogLikelihood) -> tuple[bool, bool, float]:
    """Return a key that sorts fits: the best first, those with NaN behind the others, those without a likelihood last."""
    is_nan = bool(fit.values.isnan().any())
    return fit.kind == "none", is_nan, 0.0 if is_nan else -fit.mean


def _variance(values: Tensor) -> Tensor:
    """Return the variance over rows, (fits,); NaN for a single row."""
    return values.var(1) if values.shape[1] > 1 else torch.full_like(values[:, 0], float("nan"))


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
