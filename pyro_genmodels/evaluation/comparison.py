r"""Several fits, one held-out set, one table.

For fits :math:`m` and rows :math:`n` of data none of them has seen, with :math:`\ell_{mn}` the log-likelihood,

.. math:: \mathrm{elpd}_m = \sum_n \ell_{mn}, \qquad
    \mathrm{dse}_m = \sqrt{N}\,\mathrm{sd}_n(\ell_{\text{best},n} - \ell_{mn}), \qquad
    w = \operatorname{argmax}_{w \in \Delta} \sum_n \log \sum_m w_m e^{\ell_{mn}}.

The table reads as ArviZ's `compare`, but its elpd is held out, never a leave-one-out estimate. A fit that can only be drawn
from has a row with nothing in it, unless draws are compared too. Stacking weights: Yao et al.,
*Using Stacking to Average Bayesian Predictive Distributions* (arXiv 1704.02030).
"""

from __future__ import annotations

__all__ = ["Comparison", "compare"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.evaluation.likelihood import LogLikelihood, has_likelihood, log_likelihood, no_likelihood
from pyro_genmodels.evaluation.sample_quality import SampleQuality, model_arguments, sample_quality, split
from pyro_genmodels.utils.errors import import_extra

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Comparison:
    """Fits judged on the same held-out data.

    Attributes:
        log_likelihoods: by name of the fit, best first, those without one (of the kind "none") last.
        dims: dimensions of one datum, or None if no data were given.
        sample_quality: of draws and data, by name of the fit, where that was asked for.
        floor: the sliced Wasserstein distance of data from other data, as many as there were draws; NaN if that was not asked
            for.
    """

    log_likelihoods: Mapping[str, LogLikelihood]
    dims: int | None
    sample_quality: Mapping[str, SampleQuality] = field(default_factory=dict)
    floor: float = float("nan")

    @property
    def table(self) -> pd.DataFrame:
        """One row per fit, best first.

        Columns: ``rank`` from 0; ``elpd`` (nats, summed over the held-out rows) and its ``se``; ``elpd_diff`` to the best and
        its paired ``dse``; ``weight`` of stacking; ``kind`` and its ``num_samples``; ``nats`` (negative, per datum) and
        ``bits_per_dim``. Without a likelihood these are NaN. Where draws were compared also ``mmd``, the squared discrepancy,
        its p-value ``mmd_p``, and ``sliced_wasserstein``; where noise was added to draws, its deviation ``observation``.
        """
        import pandas as pd

        values = self._values()
        n = values.shape[1]
        differences = values[0] - values
        fits = list(self.log_likelihoods.values())
        shared = torch.tensor([fit.shared_error for fit in fits]).square().double()  # of log Z, the same in every row
        table = pd.DataFrame(
            {
                "rank": range(len(fits)),
                "elpd": values.sum(1),
                "se": (n * _variance(values) + n**2 * shared).sqrt(),
                "elpd_diff": differences.sum(1),
                "dse": (n * _variance(differences) + n**2 * (shared + shared[0]) * (torch.arange(len(fits)) > 0)).sqrt(),
                "weight": self._weights(values),
                "kind": [fit.kind for fit in fits],
                "num_samples": [fit.num_samples for fit in fits],
                "nats": -values.mean(1),
                "bits_per_dim": [fit.bits_per_dim(self.dims) if self.dims else float("nan") for fit in fits],
            },
            index=pd.Index(self.log_likelihoods, name="fit"),
        )
        if self.sample_quality:
            found = [self.sample_quality.get(name) for name in self.log_likelihoods]
            table["mmd"] = [one.test.value if one else float("nan") for one in found]
            table["mmd_p"] = [one.test.p_value if one else float("nan") for one in found]
            table["sliced_wasserstein"] = [one.sliced_wasserstein if one else float("nan") for one in found]
        if any(fit.observation is not None for fit in fits):
            table["observation"] = [float("nan") if fit.observation is None else fit.observation for fit in fits]
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Held-out elpd with its standard error, and each difference to the best with its own, paired one.

        Fits without a likelihood are named below.

        Raises:
            ValueError: if no fit has one.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="A picture")
        table, without = self.table, self._without
        table = table.drop(index=without)
        if table.empty:
            raise ValueError(
                "No fit has a likelihood that could be pictured. See `sample_quality`: compare(fits, x, draws=2000)."
            )
        ax = plt.subplots(figsize=(7, 1 + 0.6 * len(table)), layout="constrained")[1] if ax is None else ax
        y = -table["rank"].to_numpy()
        ax.errorbar(table["elpd"], y, xerr=table["se"], fmt="o", color="black", label="elpd ± se")
        ax.errorbar(
            table["elpd"][1:], y[1:] + 0.2, xerr=table["dse"][1:], fmt="^", color="gray", label="± se of the difference"
        )
        ax.axvline(table["elpd"].iloc[0], color="gray", linestyle="--", linewidth=1)
        ax.set_yticks(y, [f"{name}\n({kind})" for name, kind in table["kind"].items()])
        note = f"\nno likelihood: {', '.join(without)}" if without else ""
        ax.set_xlabel(f"held-out elpd (nats, {self._values().shape[1]} data){note}")
        ax.set_ylim(y[-1] - 0.5, 0.5)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
        return ax

    def _values(self) -> Tensor:
        return torch.stack([fit.values.double().cpu() for fit in self.log_likelihoods.values()])

    @property
    def _without(self) -> list[str]:
        return [name for name, fit in self.log_likelihoods.items() if fit.kind == "none"]

    def _weights(self, values: Tensor) -> Tensor:
        """Of stacking, over the fits that have a likelihood; NaN of others."""
        known = torch.tensor([fit.kind != "none" for fit in self.log_likelihoods.values()])
        weights = torch.full_like(values[:, 0], torch.nan)
        if known.any():
            weights[known] = stacking_weights(values[known])
        return weights

    def __str__(self) -> str:
        text = self.table.to_string(float_format=lambda v: f"{v:.3f}", na_rep="-")
        fits = self.log_likelihoods.items()
        kinds = {fit.kind for _, fit in fits} - {"none"}
        if len(kinds) > 1:
            text += f"\nkinds differ ({', '.join(sorted(kinds))}): a bound understates its fit, an estimate may overstate it."
        if self._without:
            text += f"\nwithout a likelihood: {', '.join(self._without)}."
        for name, fit in fits:
            if fit.observation is not None:
                text += f"\n{name} is judged with Gaussian observation noise {fit.observation:.3g}, which its draws have not."
        if self.sample_quality:
            text += f"\nsliced Wasserstein distance of real from other real data: {self.floor:.3f}."
        return f"held-out log-likelihood of {self._values().shape[1]} data\n{text}"


def compare(
    fits: Mapping[str, Any], x: Tensor | None = None, *args: Any, draws: int | None = None, **kwargs: Any
) -> Comparison:
    """Held-out log-likelihood of several fits on the same data, and the likeness of their draws to these.

    A fit that draws and has no density, such as an `Implicit` site, is there without a likelihood.

    Args:
        fits: by name, what `log_likelihood` takes, or a `LogLikelihood` already computed on the same rows.
        x: data none of the fits has seen, (N, ...).
        args: the models' other arguments, with kwargs passed to `log_likelihood`. To judge a conditional and an
            unconditional fit together, hand in a `LogLikelihood` of each.
        draws: how many of each fit are compared with as many rows of x (half of all at most), by the maximum mean discrepancy
            and the sliced Wasserstein distance, in the units of the data; None compares none. A `LogLikelihood` has none.
        kwargs: among them num_samples and batch_size.

    Raises:
        ValueError: without fits; if the fits' rows differ; on draws without data, or fewer than 2 of them.
        ImportError: on draws without POT, of the extra ``eval``.

    Example:
        >>> from pyro_genmodels import Flow, MAF, compare
        >>> x = torch.randn(50, 2)
        >>> list(compare({"spline": Flow((2,)), "affine": Flow((2,), transform=MAF())}, x).table["kind"])
        ['exact', 'exact']
    """
    if not isinstance(fits, Mapping):
        raise TypeError(f"compare wants fits by name, such as {{'flow': flow}}, but found a {type(fits).__name__}.")
    if not fits:
        raise ValueError("compare wants at least one fit, but found none.")
    if draws is not None and x is None:
        raise ValueError(f"compare was asked for {draws} draws, but given no data x to compare them with.")
    rows_drawn, floor = (None, float("nan")) if draws is None or x is None else split(x, draws)
    judged, alike = {}, {}
    for name, fit in fits.items():
        if not isinstance(fit, LogLikelihood):
            if x is None:
                raise ValueError(f"compare was given the fit {name!r} but no data x to judge it on.")
            if rows_drawn is not None:
                alike[name] = sample_quality(fit, x, args, kwargs, rows_drawn)
            own = model_arguments(kwargs)
            known = has_likelihood(fit, x, *args, **own)
            fit = log_likelihood(fit, x, *args, **kwargs) if known else no_likelihood(len(x))
        judged[name] = fit
    rows = {name: len(fit.values) for name, fit in judged.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"compare wants the same data for all fits, but found rows {rows}.")
    best_first = sorted(judged, key=lambda name: (judged[name].kind == "none", -judged[name].mean))
    dims = None if x is None else prod(x.shape[1:])
    return Comparison({name: judged[name] for name in best_first}, dims, alike, floor)


def _variance(values: Tensor) -> Tensor:
    """Variance over rows; of one row nobody knows."""
    return values.var(1) if values.shape[1] > 1 else torch.full_like(values[:, 0], float("nan"))


def stacking_weights(values: Tensor, *, max_steps: int = 10_000) -> Tensor:
    """Weights of the mixture of fits that gives the data the highest likelihood, by expectation maximisation.

    Args:
        values: log-likelihoods, (fits, rows).
        max_steps: bound on the steps; they end when no weight moves by more than 1e-9.

    Returns:
        (fits,), summing to one.
    """
    best = values.max(0).values
    values, best = values[:, best.isfinite()], best[best.isfinite()]  # a datum that all fits rule out tells them not apart
    ratios = (values - best).exp()  # ArviZ takes exp(values) as they are, which is 0 for images
    weights = torch.full((len(values),), 1 / len(values), dtype=values.dtype)
    for _ in range(max_steps):
        new = weights * (ratios / (weights @ ratios)).mean(1)
        if (new - weights).abs().max() < 1e-9:
            break
        weights = new
    return weights
