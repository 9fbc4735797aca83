r"""Posterior predictive checks: do data that the fitted model makes look like the data that it was fitted to?

For each draw :math:`z_s` of a posterior, replicated data :math:`\tilde y_s \sim p(y \mid z_s)` are compared with the data y by
a test quantity T, which may depend on the draw:

.. math:: p = P(T(\tilde y, z) > T(y, z) \mid y) + \tfrac12 P(T(\tilde y, z) = T(y, z) \mid y) .

A p-value near 0 or 1 says that the model cannot make such data. Data were used to fit and to check, so under a true model the
p-values are nearer to 1/2 than uniform ones: extreme values are rarer than they say. An estimate by n draws can be 0 or 1 by
chance, so a verdict counts the data among the draws,

.. math:: \frac{1 + \#\{s : T(\tilde y_s, z_s) \ge T(y, z_s)\}}{1 + n},

and the same for the other side, which are below :math:`\alpha` with probability :math:`\alpha` at most for any n, if p is
uniform. The probabilities of single rows under leave-one-out, :math:`P(\tilde y_n \le y_n \mid y_{-n})`, are uniform for
continuous data, which is tested by their empirical distribution function, as of independent ones.

Gelman, Meng and Stern, *Posterior Predictive Assessment of Model Fitness via Realized Discrepancies* (1996); Gelman et al.,
*Bayesian Data Analysis* (2013), chapter 6; Phipson and Smyth, *Permutation P-values Should Never Be Zero* (arXiv 1603.05766);
Vehtari, Gelman and Gabry for leave-one-out (arXiv 1507.04544); Säilynoja, Bürkner and Vehtari for its test (arXiv 2103.10522).
"""

from __future__ import annotations

__all__ = ["PredictiveCheck", "predictive_check"]

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, sites, traces
from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.inference_data.export import chain_diagnostics, plot_predictive, variables_of_data
from pyro_genmodels.inference_data.names import xarray_name
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.posteriors.checked_sources import number_of_draws, source_with_model
from pyro_genmodels.posteriors.uniformity import adjusted_p_values, ecdf_p_value, normal_scores
from pyro_genmodels.utils.errors import check_positive_int, listed, type_with_article
from pyro_genmodels.utils.keywords import joined_keywords, runs_models
from pyro_genmodels.utils.pareto import is_unreliable, smooth_log_weights
from pyro_genmodels.utils.rng import forked_rng

if TYPE_CHECKING:
    import pandas as pd

Statistic = Callable[..., Any]
"""A function of the data of one site, or of these and a draw of the variables by name, that returns one number."""
FALSE_ALARM_RATE = 0.01
"""Probability that a verdict finds any fault, if p-values are uniform."""
BATCH_SIZE = 1000
"""Largest number of draws of one run."""
MIN_ROWS = 10
"""Smallest number of leave-one-out probabilities that are tested."""
MAX_ROWS = 2000
"""Largest number of leave-one-out probabilities that are tested: rows at equal distances."""


def _deviation(y: Tensor) -> Tensor:
    return y.std(correction=0)


def _skewness(y: Tensor) -> Tensor:
    centred = y - y.mean()
    variance = centred.square().mean()
    return centred.pow(3).mean() / variance.pow(1.5) if variance > 0 else variance


STATISTICS: Mapping[str, Statistic] = {
    "mean": torch.mean,
    "sd": _deviation,
    "min": torch.min,
    "max": torch.max,
    "skewness": _skewness,
}
"""Statistics of a check by default."""


@dataclass(frozen=True, repr=False)
class PredictiveCheck:
    """Statistics of the data beside those of replicated data.

    Attributes:
        observed: each statistic of the data, (draw,), by names such as ``sd(y)``.
        replicated: the same of the replicated data, (draw,).
        weights: weight of each draw, (draw,), with sum 1.
        num_chains: number of chains that the draws are, one after another; 0 for independent draws.
        loo_pit: probability of a lower value in each entry given all others, (rows...) by site, for sites of single numbers
            with a density. Ties are broken at random, and it is never 0 or 1. It is NaN for excluded entries.
        loo_pareto_k: k-hat of the weights behind these, (rows...) by site.
        kept: True for the entries of each site that are neither masked nor missing, (rows...) by name. Others are excluded.
        data: draws, replicated data and data as ArviZ has them, for `az.plot_ppc` and others.
    """

    observed: Mapping[str, Tensor]
    replicated: Mapping[str, Tensor]
    weights: Tensor
    num_chains: int
    loo_pit: Mapping[str, Tensor]
    loo_pareto_k: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    data: Any = field(compare=False)

    @cached_property
    def table(self) -> pd.DataFrame:
        """Data frame with a row for each statistic.

        Columns: ``observed``, the mean over draws if it depends on them; mean and sd of those ``replicated``; ``p_value``, the
        probability of a larger replicated one; its Monte Carlo standard error ``p_error``; ``adjusted``, the two-sided p-value
        of a verdict, adjusted for the number of tests (Holm).
        """
        import pandas as pd

        rows = {}
        for name, replicated in self.replicated.items():
            p, size = self._share(name, torch.gt) + 0.5 * self._share(name, torch.eq), self._sizes[name]
            smoothed = (size * p + 0.5) / (size + 1)
            mean = self.weights @ replicated
            rows[name] = {
                "observed": float(self.weights @ self.observed[name]),
                "replicated": float(mean),
                "replicated_sd": float((self.weights @ (replicated - mean).square()).sqrt()),
                "p_value": p,
                "p_error": (smoothed * (1 - smoothed) / size) ** 0.5,
                "adjusted": self._adjusted[name],
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    @cached_property
    def loo_p_values(self) -> dict[str, float]:
        """P-values of uniform leave-one-out probabilities, by site, not adjusted. They are those of independent rows.

        There are none of sites with fewer than 10 entries, or too many k-hats above 0.7.
        """
        num_draws = len(self.weights)
        return {
            name: ecdf_p_value((pit * (num_draws + 1)).long().clamp(0, num_draws), num_draws)
            for name in self.loo_pit
            if len(pit := self._known_pit(name)) >= MIN_ROWS
            and not is_unreliable(self.loo_pareto_k[name][~self.loo_pit[name].isnan()], num_draws)
        }

    def _known_pit(self, name: str) -> Tensor:
        """Return the leave-one-out probabilities of a site to test, (entries,)."""
        pit = self.loo_pit[name][~self.loo_pit[name].isnan()]
        return pit[torch.linspace(0, len(pit) - 1, MAX_ROWS).round().long()] if len(pit) > MAX_ROWS else pit

    @cached_property
    def _adjusted(self) -> dict[str, float]:
        """Two-sided p-value of each statistic, and p-value of the leave-one-out probabilities of each site, adjusted (Holm)."""
        p_values = {name: self._two_sided(name) for name in self.replicated}
        p_values |= {f"loo_pit({name})": p for name, p in self.loo_p_values.items()}
        return dict(zip(p_values, adjusted_p_values(list(p_values.values())), strict=True))

    def _two_sided(self, name: str) -> float:
        """Return the two-sided p-value of a statistic, with the data counted as one of the draws on both sides."""
        size = self._sizes[name]
        tails = [(size * self._share(name, side) + 1) / (size + 1) for side in (torch.ge, torch.le)]
        return min(1.0, 2 * min(tails))

    def _share(self, name: str, side: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Return the weight of the draws whose replicated statistic is greater than the observed one, equal, or less."""
        held = side(self.replicated[name], self.observed[name])
        return min(float(self.weights @ held.double()), 1.0)

    @cached_property
    def _sizes(self) -> dict[str, float]:
        """Number of independent draws of equal weight that the draws are worth for the p-value of each statistic."""
        by_weight = 1 / float(self.weights.square().sum())
        sizes = {}
        for name, replicated in self.replicated.items():
            values = replicated - self.observed[name]
            larger = (values > 0).double() + 0.5 * (values == 0).double()
            values = larger if larger.std() > 0 else values
            sizes[name] = by_weight
            if self.num_chains and values.std() > 0:
                size = chain_diagnostics({"x": values.reshape(self.num_chains, -1)})["x"]["ess_bulk"]
                sizes[name] = min(size, by_weight) if isfinite(size) else by_weight
        return sizes

    def faults(self, false_alarm_rate: float = FALSE_ALARM_RATE) -> list[str]:
        """Return in words which statistics of the data the model does not make.

        Args:
            false_alarm_rate: probability of any fault under a true model, for any number of draws, if p-values are uniform,
                and leave-one-out probabilities independent. Those of a true model are so or nearer to 1/2.
        """
        found = self.table[self.table["adjusted"] <= false_alarm_rate].sort_values("adjusted")
        return [
            f"{name} of the data is {'larger' if row['p_value'] < 0.5 else 'smaller'} than the model makes it "
            f"({row['observed']:.3g}, replicated {row['replicated']:.3g} ± {row['replicated_sd']:.2g}, "
            f"p {_p_words(row['p_value'], self._sizes[str(name)])})"
            for name, row in found.iterrows()
        ] + [
            f"{_loo_words(self._known_pit(name))} {name}: leave-one-out probabilities are not uniform (p {p:.2g})"
            for name, p in self.loo_p_values.items()
            if self._adjusted[f"loo_pit({name})"] <= false_alarm_rate
        ]

    @property
    def verdict(self) -> str:
        """The faults in one line, or "no fault found". It says so if there are too few draws to find one in a statistic."""
        if faults := self.faults():
            return "; ".join(faults)
        needed = ceil(2 * len(self._adjusted) / FALSE_ALARM_RATE) - 1
        if (size := max(self._sizes.values())) >= needed:
            return "no fault found"
        beyond = [name for name in self.replicated if self._two_sided(name) <= 2 / (self._sizes[name] + 1)]
        words = f"no fault found, but to find one takes {needed} draws, and these are worth {size:.0f}"
        return words + (f": the data lie beyond all of them in {listed(beyond)}" if beyond else "")

    def __repr__(self) -> str:
        return f"<predictive check of {listed(self.kept)} by {len(self.weights)} draws: {self.verdict}>"

    def __str__(self) -> str:
        return "\n".join([self.verdict, str(self.table.round(3)), *self.excluded])

    @property
    def excluded(self) -> list[str]:
        """Number of excluded entries of each site, in words."""
        numbers = {name: (int((~kept).sum()), kept.numel()) for name, kept in self.kept.items()}
        return [f"{n} of the {size} entries of {name} are masked or missing" for name, (n, size) in numbers.items() if n]

    def plot(self) -> Any:
        """Plot the distribution of the data over those of replicated data, by ArviZ, for sites of more than one number.

        Returns:
            The axes of `az.plot_ppc` with ArviZ 0.23, and the collection of `az.plot_ppc_dist` with ArviZ 1.

        Raises:
            ValueError: if all sites are single numbers, which have no distribution.
        """
        replicas, data = (variables_of_data(self.data, group) for group in ("posterior_predictive", "observed_data"))
        observed = {name: data[name][kept].flatten() for name, kept in self.kept.items()}
        observed = {name: y for name, y in observed.items() if len(y) > 1}
        if not observed:
            raise ValueError(f"There is no distribution to plot: {listed(self.kept)} has one number. See the table.")
        return plot_predictive(
            {name: replicas[name].flatten(0, 1)[:, self.kept[name]].flatten(1) for name in observed}, observed
        )


def _p_words(p: float, num_draws: float) -> str:
    """Return a p-value in words: an estimate of 0 or 1 says no more than the number of draws does."""
    if p in (0.0, 1.0):
        return f"below {1 / num_draws:.1g}" if p == 0.0 else f"above 1 - {1 / num_draws:.1g}"
    return f"{p:.2g}"


def _loo_words(pit: Tensor) -> str:
    """Return in words how leave-one-out probabilities, (n,), differ from uniform ones: the more certain of two ways."""
    scores = normal_scores(pit)
    if min(scores.mean_p, scores.deviation_p) > FALSE_ALARM_RATE:
        return "predictions have another shape than"
    if scores.mean_p < scores.deviation_p:
        return f"predictions are too {'low' if scores.mean > 0 else 'high'} for"
    return f"predictions are too {'narrow' if scores.deviation > 1 else 'wide'} for"


@runs_models()
def predictive_check(
    fit: Any,
    *args: Any,
    statistics: Mapping[str, Statistic] | None = None,
    var_names: Sequence[str] | None = None,
    num_samples: int = 2000,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PredictiveCheck:
    """Compare the data with data that a fitted model makes.

    Draws of a guide count alike, as the check is of the fit as it is. Draws that come with weights, as those of `Importance`,
    count by these. Masked entries, and those of rows that the model was not given, are excluded. If a plate is subsampled, all
    of its rows are replicated.

    Args:
        fit: what `posterior` returned, or any fit with a model that `to_arviz` takes.
        args: positional arguments of the model; a fit by `posterior` and an `MCMC` run remember theirs.
        statistics: functions by name, of the data of one site: ``{"range": lambda y: y.max() - y.min()}``; or of these and a
            draw: ``{"chi2": lambda y, z: ((y - z["loc"]) ** 2).sum()}``, where z has latent variables and deterministic values
            by name. They return one number. Data are floats of the shape of the site, and without their excluded entries
            (entries, *event shape) if there are any. By default mean, standard deviation, least and largest value, and
            skewness.
        var_names: names of the observed sites to check; by default all.
        num_samples: number of draws of a guide. To find a fault in one of m statistics takes 200 (m + 1) draws.
        progress: True for a progress bar.
        model_kwargs: keyword arguments of the model.
        kwargs: keyword arguments of the model, with any other name.

    Raises:
        TypeError: if statistics are no dictionary of functions.
        ValueError: if there is no model, the model observes nothing, its data differ from draw to draw or cannot be sampled,
            or a statistic is not one finite number; if the guide has variables that the model lacks, draws are outside their
            support, or draws or data are NaN or of a wrong shape.

    Warns:
        UserWarning: naming sites without a density, which have no leave-one-out values.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, posterior
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 2.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Poisson(rate), obs=y)
        >>> y = torch.tensor([0.0, 0, 0, 0, 1, 9, 12, 0, 8, 0])
        >>> fit = posterior(model, y, method=Laplace(), progress=False)
        >>> check = predictive_check(fit, statistics={"sd": torch.std}, num_samples=500, progress=False)
        >>> check.faults()[0][:45]
        'sd(y) of the data is larger than the model ma'
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_positive_int("predictive_check", least=10, num_samples=num_samples)
    functions = STATISTICS if statistics is None else statistics
    if not isinstance(functions, Mapping) or not functions or not all(map(callable, functions.values())):
        raise TypeError(f"predictive_check wants statistics as functions by name, but found {type_with_article(functions)}.")
    number = number_of_draws(fit, num_samples)
    source = source_with_model("predictive_check", fit, args, kwargs, number)
    groups = ("posterior", "posterior_predictive", "log_likelihood", "observed_data")
    options: Any = {"num_samples": number, "batch_size": BATCH_SIZE, "progress": progress, "model_kwargs": kwargs}
    data = to_arviz(fit, *args, groups=groups, **options)
    return _checked(source, data, functions, var_names)


def _checked(
    source: DrawSource, data: Any, functions: Mapping[str, Statistic], var_names: Sequence[str] | None
) -> PredictiveCheck:
    """Return the check of ArviZ data: see `predictive_check`."""
    replicas = variables_of_data(data, "posterior_predictive")
    observed = variables_of_data(data, "observed_data")
    log_p = variables_of_data(data, "log_likelihood")
    z = {name: x.flatten(0, 1) for name, x in variables_of_data(data, "posterior").items()}
    log_weights = torch.zeros(source.num_samples, dtype=torch.float64)
    is_weighted = "log_weight" in source.stats
    if is_weighted:
        log_weights = smooth_log_weights(torch.as_tensor(source.stats["log_weight"]).double())[0].log_softmax(0)
    found: dict[str, dict[str, Tensor]] = {"observed": {}, "replicated": {}, "loo_pit": {}, "loo_pareto_k": {}}
    all_kept = {}
    for name, site in _observed_sites(source, replicas, observed, var_names).items():
        y, y_rep = observed[name].double(), replicas[name].flatten(0, 1).double()
        row_log_p = log_p[name].flatten(0, 1).double() if name in log_p else None
        all_kept[name] = kept = _kept(name, site, y, row_log_p)
        if not kept.all():
            y, y_rep = y[kept], y_rep[:, kept]
        if not y.numel():
            raise ValueError(f"All entries of {name!r} are masked or missing, so there is nothing to check.")
        if bad := int((~y_rep.isfinite()).reshape(len(y_rep), -1).any(1).sum()):
            raise ValueError(f"Replicated data of {name!r} are not finite in {bad} of {len(y_rep)} draws.")
        for label, function in functions.items():
            key = f"{label}({name})"
            found["observed"][key], found["replicated"][key] = _evaluated(key, function, y, y_rep, z)
        if row_log_p is not None and row_log_p.shape[1:] == kept.shape and site["fn"].event_dim == 0:
            pit, k = _loo_pit(y, y_rep, row_log_p[:, kept], log_weights)
            for group, values in (("loo_pit", pit), ("loo_pareto_k", k)):
                found[group][name] = torch.full(kept.shape, torch.nan, dtype=torch.float64).masked_scatter(kept, values)
    num_chains = source.num_chains if isinstance(source.guide, Mapping) and not is_weighted else 0
    weights = log_weights.softmax(0)
    return PredictiveCheck(**found, weights=weights, num_chains=num_chains, kept=all_kept, data=data)


def _observed_sites(
    source: DrawSource, replicas: Mapping[str, Tensor], observed: Mapping[str, Tensor], var_names: Sequence[str] | None
) -> dict[str, Any]:
    """Return the sites to check, by their names in ArviZ.

    Raises:
        ValueError: if there are none, or one of those named is none.
    """
    with forked_rng(), handlers.side_effect_free(source.model):
        trace = traces.trace_of(source.model, source.args, source.kwargs)
    found = {xarray_name(name): trace.nodes[name] for name in traces.observed(trace)}
    checked = {name: site for name, site in found.items() if name in replicas and name in observed}
    if var_names is None and checked:
        return checked
    if missing := [name for name in var_names or () if xarray_name(name) not in checked]:
        raise ValueError(f"predictive_check has no observed site {missing[0]!r} to check, but {listed(checked)}.")
    if not checked:
        raise ValueError(
            "predictive_check wants a model with observed sites that can be sampled, and with the same data for every draw, "
            f"but of {listed(found)} none is."
            if found
            else "predictive_check wants a model that observes data, but found none: give the model its data."
        )
    return {xarray_name(name): checked[xarray_name(name)] for name in var_names or ()}


def _kept(name: str, site: Any, y: Tensor, log_p: Tensor | None) -> Tensor:
    """Return True for the entries of a site that are neither masked nor missing, (rows...).

    The mask of a subsample is not that of all rows. Then entries are masked if their log density is 0 in all draws.

    Raises:
        ValueError: if there is a mask of a subsample, and no density.
    """
    num_rows = y.dim() - site["fn"].event_dim
    kept = ~y.isnan().reshape(*y.shape[:num_rows], -1).any(-1)
    mask = sites.mask_of(site)
    if mask is None:
        return kept
    if mask.shape == kept.shape:
        return kept & mask.cpu()
    if log_p is None or log_p.shape[1:] != kept.shape:
        raise ValueError(
            f"{name!r} has a mask of the shape {tuple(mask.shape)} for rows {tuple(kept.shape)} and no density of each row, so "
            "that masked entries are unknown. Give the model all rows."
        )
    return kept & (log_p != 0).any(0)


def _evaluated(key: str, function: Statistic, y: Tensor, y_rep: Tensor, z: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return a statistic of data and of replicated data for each draw, (draw,) each.

    Raises:
        ValueError: if it is not one finite number.
    """
    draws = range(len(y_rep))
    if _takes_draw(function):
        latents = [{name: x[s] for name, x in z.items()} for s in draws]
        values = [[function(y, latents[s]) for s in draws], [function(y_rep[s], latents[s]) for s in draws]]
    else:
        values = [[function(y)] * len(y_rep), [function(replica) for replica in y_rep]]
    return _numbers(key, values[0]), _numbers(key, values[1])


def _numbers(key: str, values: Sequence[Any]) -> Tensor:
    """Return the values of a statistic, (draw,), in float64.

    Raises:
        ValueError: if one is not a finite number.
    """
    tensors = [torch.as_tensor(value) for value in values]
    if wrong := [tuple(x.shape) for x in tensors if x.numel() != 1]:
        raise ValueError(f"The statistic {key} has to be one number, but found the shape {wrong[0]}.")
    numbers = torch.stack([x.detach().double().reshape(()) for x in tensors])
    if bad := int((~numbers.isfinite()).sum()):
        raise ValueError(f"The statistic {key} is not finite for {bad} of {len(numbers)} draws.")
    return numbers


def _takes_draw(function: Statistic) -> bool:
    """Return True if a statistic takes the draw as its second argument: if that has no default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a builtin function
        return False
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 1


def _loo_pit(y: Tensor, y_rep: Tensor, log_p: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probability of a lower value in each entry given all others, ties broken at random, and k-hat.

    Of n draws of equal weight it is (rank + U) / (n + 1), with U uniform, which is uniform itself under a true model.

    Args:
        y: values, (n,).
        y_rep: replicated ones, (draw, n).
        log_p: log densities of the values, (draw, n).
        log_weights: log weights of the draws, (draw,).
    """
    y, y_rep, log_p = y.reshape(-1), y_rep.reshape(len(y_rep), -1), log_p.reshape(len(log_p), -1)
    smoothed, k = smooth_log_weights(log_weights[:, None] - log_p)
    weights = smoothed.softmax(0)
    below, ties, n = (weights * (y_rep < y)).sum(0), (weights * (y_rep == y)).sum(0), 1 / weights.square().sum(0)
    with forked_rng(0):
        u = torch.rand(y.shape, dtype=torch.float64)
    return (n * below + u * (n * ties + 1)) / (n + 1), k
