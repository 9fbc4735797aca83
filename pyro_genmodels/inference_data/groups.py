"""Groups of variables as ArviZ names them: draws, densities and data of a fit, put together block by block."""

from __future__ import annotations

__all__ = ["GROUPS", "PARETO_K", "CollectOptions", "Groups", "collect", "concatenate_chains"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyro import poutine
from pyro.distributions import Unit
from tqdm.auto import tqdm

from pyro_genmodels._pyro import sites
from pyro_genmodels.inference_data.arrays import BlockValues, GroupArrays, Variables, same_array, to_numpy
from pyro_genmodels.inference_data.constants import collect_constants
from pyro_genmodels.inference_data.layout import ModelLayout
from pyro_genmodels.inference_data.replay import Replay, ReplayBlock
from pyro_genmodels.inference_data.row_weights import RowWeights
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.inference_data.undrawn import find_undrawn
from pyro_genmodels.utils.distributions import density_of, unwrap
from pyro_genmodels.utils.errors import listed, one_line, warn_caller
from pyro_genmodels.utils.precision import in_doubles

GROUPS = (
    "posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "log_prior", "sample_stats",
    "observed_data", "constant_data",
)  # fmt: skip

CANNOT_SAMPLE = (ArithmeticError, RuntimeError, ValueError)
"""Errors of a model that meets values which it, or one of its distributions, cannot take, such as a draw from a wide prior."""

PARETO_K = "pareto_k"
"""Name of the statistic that is k-hat of all draws. For the latent variables of rows the names of the plates follow it."""

MANY_RUNS = 10_000
"""Number of runs of a model that takes its draws one by one, from which on this is told."""

PROGRESS_DELAY = 2
"""Seconds after which a progress bar is shown."""


@dataclass(frozen=True)
class Groups:
    """Groups of variables of one or more chains.

    Attributes:
        variables: variables of each group, with the dimensions (chain, draw, plates, event).
        coords: labels of dimensions.
        kinds: kind of each log-likelihood that is not exact, by variable.
        note: statistics of each draw that cannot be had, and why.
        no_loo: functions of ArviZ that mean nothing for the log-likelihood, and why.
    """

    variables: dict[str, Variables]
    coords: Mapping[str, Any]
    kinds: Mapping[str, str]
    note: str = ""
    no_loo: str = ""


@dataclass(frozen=True)
class CollectOptions:
    """Options of `to_arviz`, with the same names.

    Attributes:
        groups: names of the wanted groups.
        batch_size: largest number of draws made in one run.
        parallel: True to make the draws of a block in one run; None finds out if the model allows it.
        dims: names of the event dimensions of a variable, by its name.
        progress: True to show progress bars.
        named: groups that the call names, so that it is said if one is missing.
    """

    groups: frozenset[str]
    batch_size: int
    parallel: bool | None
    dims: Mapping[str, Sequence[str]]
    progress: bool
    named: frozenset[str] = frozenset()


def concatenate_chains(parts: Sequence[Groups]) -> Groups:
    """Return the chains of several fits to the same data together.

    Raises:
        ValueError: if their data, their variables or the shapes of these differ.
    """
    first = parts[0]
    names_of = [{f"{group}.{name}" for group, names in part.variables.items() for name in names} for part in parts]
    if partial := names_of[0].union(*names_of) - names_of[0].intersection(*names_of):
        raise ValueError(
            f"The fits do not go together: only some have {', '.join(sorted(partial))}. Choose groups= that all have."
        )
    joined: dict[str, Variables] = {}
    for group, variables in first.variables.items():
        for name, (array, dims) in variables.items():
            others = [part.variables[group][name][0] for part in parts[1:]]
            shapes = [other.shape[int("chain" in dims) :] for other in others]
            if any(shape != array.shape[int("chain" in dims) :] for shape in shapes):
                raise ValueError(
                    f"The fits do not go together: their {group} of {name!r} have shapes {array.shape} and {shapes}."
                )
            if "chain" in dims:
                array = np.concatenate([array, *others])
            elif not all(same_array(array, other) for other in others):
                raise ValueError(f"The fits do not go together: their {group} of {name!r} differ.")
            joined.setdefault(group, {})[name] = (array, dims)
    return Groups(joined, first.coords, first.kinds, first.note, first.no_loo)


def collect(source: DrawSource, reports: dict[str, str], options: CollectOptions) -> Groups:
    """Return all wanted groups of a source of draws, with the dimensions (chain, draw, plates, event).

    Args:
        source: source of draws.
        reports: dictionary to which this adds what cannot be computed, with the reason.
        options: options of `to_arviz`.

    Raises:
        ValueError: if a plate is called "chain" or "draw", or if a variable is not in all runs.
    """
    arrays = GroupArrays(source.num_samples, options.groups, options.dims)
    if source.model is None:
        arrays.put_all_draws(source.guide)
        arrays.put_stats(source.stats)
        found = arrays.by_chain(source.num_chains)
        reports |= dict.fromkeys(_missing(options, found, reports), "these draws come without a model: pass it as model=")
        return Groups(found, {}, {}, source.note)
    replay = Replay(
        source.model,
        source.guide,
        source.args,
        source.kwargs,
        num_samples=source.num_samples,
        batch_size=options.batch_size,
        parallel=options.parallel,
    )
    _warn_of_many_runs(replay, options)
    coords = replay.layout.rows.coords
    if reserved := {"chain", "draw"} & set(coords):
        raise ValueError(f"A plate is called {reserved.pop()!r}, which in ArviZ is a dimension of draws: give it another name.")
    posterior = _Posterior(source, replay, arrays, reports)
    posterior.collect(progress=options.progress)
    if replay.layout.has_latents and not source.is_family_prior and arrays.wants("prior", "prior_predictive"):
        _collect_prior(replay, arrays, reports, progress=options.progress)
    if not source.is_family_prior:
        collect_constants(source, replay, arrays)
    elif source.kwargs.get("size") == 1:  # one row for each draw
        arrays.without_plate("data")
    found = arrays.by_chain(source.num_chains)
    reports |= {group: _why_missing(group, replay.layout) for group in _missing(options, found, reports)}
    return Groups(found, coords, posterior.densities.kinds, source.note, _no_loo(replay.layout))


def _warn_of_many_runs(replay: Replay, options: CollectOptions) -> None:
    """Warn if a model that does not take draws together runs very often."""
    blocks = len(replay.layout.rows.blocks)
    number = len(replay.draw_blocks()) * blocks
    if not replay.parallel and options.parallel is None and number >= MANY_RUNS:
        each = "each draw" if blocks == 1 else f"each draw and each of {blocks} blocks of rows"
        warn_caller(
            f"to_arviz runs the model {number} times, once for {each}, because it does not take draws together. Index and "
            "reduce latent variables from the right, as z[..., 0] and z.sum(-1), and put all batches into plates or "
            ".to_event(1); or make fewer draws.",
            UserWarning,
        )


def _missing(options: CollectOptions, found: Mapping[str, Variables], reports: Mapping[str, str]) -> list[str]:
    """Return the missing groups that the call names and that no report explains yet."""
    said = {name.partition("[")[0].partition(".")[0] for name in reports}
    return [group for group in GROUPS if group in options.named and group not in found and group not in said]


def _why_missing(group: str, layout: ModelLayout) -> str:
    """Return why a model has nothing for a group."""
    if group == "constant_data":
        return "the model has no arrays as arguments that it does not observe"
    of_data = group in ("log_likelihood", "observed_data", "posterior_predictive")
    if of_data and not layout.observed:
        return "the model observes nothing in this call: give it its data"
    if not layout.has_latents:
        cure = ": see pyro_genmodels.log_likelihood" if group == "log_likelihood" else ""
        return f"the model has no latent variables{cure}"
    return "the fit has nothing for it"


def _no_loo(layout: ModelLayout) -> str:
    """Return a sentence if all latent variables are of single rows, whose leave-one-out values then mean nothing."""
    stacks = [layout.sites[name]["cond_indep_stack"] for name in (*layout.latents, *layout.observed)]
    plates = set.intersection(*({frame.name for frame in stack} for stack in stacks)) if stacks else set()
    if not (plates and layout.latents and layout.observed):
        return ""
    return (
        f"loo, waic, compare: every latent variable is of one row of {min(plates)!r} and its draws have seen that row, so that "
        "leaving it out means nothing. Use log_likelihood or compare of pyro_genmodels on held-out rows"
    )


class _Densities:
    """Log densities of sites, where these have one.

    Args:
        reports: dictionary to which this adds the sites without a density.

    Attributes:
        kinds: kind of each log-likelihood that is not exact, by site.
    """

    def __init__(self, reports: dict[str, str]) -> None:
        self._reports = reports
        self.kinds: dict[str, str] = {}

    def log_prob(self, block: ReplayBlock, group: str, site: dict[str, Any], *, scaled: bool = False) -> BlockValues | None:
        """Return the log density (nats) of a site of a block for a group, or None if it has none."""
        density, _ = density_of(site["fn"])
        name, kind = site["name"], type(unwrap(site["fn"])).__name__
        if density in ("none", "unnormalized"):
            missing = "no density" if density == "none" else "no normalised density"
            self._reports[f"{group}[{name!r}]"] = f"a {kind} has {missing}"
            return None
        if density != "exact" and group == "log_likelihood":
            self.kinds[name] = density
        try:
            return block.log_prob(site, scaled=scaled)
        except NotImplementedError:
            self._reports[f"{group}[{name!r}]"] = f"a {kind} has no log_prob"
            return None


class _Posterior:
    """Draws of the posterior, predictions, densities and data.

    Args:
        source: source of draws.
        replay: runs of its model.
        arrays: arrays to fill.
        reports: dictionary to which this adds what cannot be computed, with the reason.
    """

    def __init__(self, source: DrawSource, replay: Replay, arrays: GroupArrays, reports: dict[str, str]) -> None:
        self.source, self.replay, self.arrays, self.reports = source, replay, arrays, reports
        self.densities = _Densities(reports)
        self.row_weights = RowWeights(source.num_samples, self._plates_with_weights())
        self.undrawn = find_undrawn(replay, source)

    def collect(self, *, progress: bool) -> None:
        """Run all blocks, and put their values into the arrays."""
        self._report()
        if self.undrawn.leaves_no_likelihood:
            self.arrays.leave_out("log_likelihood")
        layout, guide, summed_out_at = self.replay.layout, self.source.guide, self.undrawn.summed_out_at
        if isinstance(guide, Mapping):
            self.arrays.put_all_draws({name: draws for name, draws in guide.items() if name not in layout.sites})
        stats = {name: np.zeros(self.source.num_samples) for name in self._computed_stats()}
        for draws in _with_progress(self.replay, "posterior", progress=progress):
            for block in self.replay.runs(draws):
                if summed_out_at in block.model:
                    log_p = block.log_prob_summed_out(self.undrawn.hidden, summed_out_at)
                    block.model[summed_out_at]["unscaled_log_prob"] = log_p
                self._put_values(block)
                self._add_to_stats(block, stats)
                self._add_to_row_weights(block)
        known = self.source.stats
        if layout.rows.sizes:  # the source's own are estimates from a subsample
            known = {name: values for name, values in known.items() if name not in ("log_p", "log_weight")}
        stats = {**stats, **known}
        if {"log_p", "log_q"} <= set(stats):
            stats.setdefault("log_weight", stats["log_p"] - stats["log_q"])
        self.arrays.put_stats(stats)
        if not np.isnan(self.source.pareto_k) and "log_weight" not in stats:  # of weighted draws it is an attribute
            self.arrays.put_chain_stat(PARETO_K, np.full(self.source.num_chains, self.source.pareto_k))
        for name, k in self.row_weights.pareto_k().items():
            self.arrays.put_chain_stat(f"{PARETO_K}_{name}", to_numpy(k)[None], self.row_weights.plates[name])
        why = "it is computed from latent variables, so that it differs from draw to draw"
        self.reports |= {f"observed_data[{name!r}]": why for name in self.arrays.drop_varying()}

    def _plates_with_weights(self) -> dict[str, list[str]]:
        """Return the plates whose rows have latent variables of their own, by name, of a guide that knows them."""
        guide: Any = poutine.unwrap(self.source.guide)
        if not (self.arrays.wants("sample_stats") and hasattr(guide, "plates_with_data")):
            return {}
        layout, found = self.replay.layout, {}
        if layout.unguided:
            why = f"the guide lacks {listed(layout.unguided)}, so that rows have no weights: sum discrete ones out in the model"
            self.reports[f"sample_stats.{PARETO_K} of rows"] = why
            return {}
        for name, plates in guide.plates_with_data.items():
            if partial := [plate for plate in plates if plate in layout.rows.sizes and plate in guide.plates_given_in_part]:
                number = len(layout.rows.subsamples[partial[0]]["value"])
                why = f"the guide is given data of {number} rows, fewer than the plate has"
                self.reports[f"sample_stats.{PARETO_K}_{name}"] = why
            else:
                found[name] = list(plates)
        return found

    def _report(self) -> None:
        layout = self.replay.layout
        if layout.factors and not layout.observed:
            self.reports["log_likelihood"] = f"the model has it in pyro.factor {layout.factors[0]!r}, which has no rows"
        self.reports |= self.undrawn.reports
        if self.arrays.wants("sample_stats") and layout.has_latents and self.replay.point_masses:
            found = ", ".join(map(repr, self.replay.point_masses))
            why = f"the guide has a single value of {found}, a point mass without a density"
            if hasattr(poutine.unwrap(self.source.guide), "laplace_approximation"):
                why = "the guide is a point mass until it is converted: use guide.laplace_approximation(...)"
            self.reports["sample_stats.log_q and log_weight"] = why
        why = (
            "the model is given its rows by subsample=, but the guide takes others, so that Pyro trains it on the wrong rows: "
            "give an autoguide the model's plate by create_plates="
        )
        self.reports |= {f"rows of {plate!r} that the model is not given": why for plate in self.replay.mispaired}
        why = "the model subsamples this plate in a Python loop, so only one subsample is run: log_p is an estimate"
        self.reports |= {f"most rows of {plate!r}": why for plate in layout.rows.sequential}

    def _computed_stats(self) -> list[str]:
        """Return which of log_p and log_q can be computed for each draw."""
        layout = self.replay.layout
        if self.source.is_family_prior or not layout.has_latents or self.undrawn.leaves_no_likelihood:
            return []
        return ["log_p"] if isinstance(self.source.guide, Mapping) or self.replay.point_masses else ["log_p", "log_q"]

    def _put_values(self, block: ReplayBlock) -> None:
        """Put the values and densities of a block into the arrays."""
        observed = self.replay.layout.observed
        predicted = {} if block.model.keys().isdisjoint(observed) else self._predict(block)
        for name, site in block.model.items():
            if isinstance(site["fn"], Unit) or name in self.undrawn.skipped:  # a pyro.factor is a term, not a variable
                continue
            if name in observed:
                self._put_observed(block, name, site, predicted)
            else:
                self._put_latent(block, name, site)

    def _predict(self, block: ReplayBlock) -> Mapping[str, Any]:
        """Return the sites with sampled observations, if they are wanted and can be sampled."""
        if not self.arrays.wants("posterior_predictive"):
            return {}
        try:
            return block.predict()
        except CANNOT_SAMPLE as error:
            _leave_out(self.arrays, self.reports, "posterior_predictive", error)
            return {}

    def _put_latent(self, block: ReplayBlock, name: str, site: dict[str, Any]) -> None:
        source = self.source
        is_predicted = name in self.undrawn.predicted or (source.is_family_prior and name == "x")
        self.arrays.put_draws("posterior_predictive" if is_predicted else "posterior", name, block.value(name, site))
        without_prior = source.is_family_prior or is_predicted or name in self.undrawn.without_prior
        if not without_prior and (sites.is_weighted(site) or not sites.is_computed(site)):
            self._put_log_prob(block, "log_prior", site)

    def _put_observed(self, block: ReplayBlock, name: str, site: dict[str, Any], predicted: Mapping[str, Any]) -> None:
        if predicted:
            self.arrays.put_draws("posterior_predictive", name, block.value(name, predicted[name]))
        if self.replay.layout.has_latents:
            self._put_log_prob(block, "log_likelihood", site)
        self.arrays.put_observed(name, block.value(name, site), is_shared=block.is_shared(name, site))

    def _put_log_prob(self, block: ReplayBlock, group: str, site: dict[str, Any]) -> None:
        log_p = self.densities.log_prob(block, group, site) if self.arrays.wants(group) else None
        if log_p is not None:
            self.arrays.put_log_prob(group, site["name"], log_p)

    def _add_to_stats(self, block: ReplayBlock, stats: dict[str, np.ndarray]) -> None:
        """Add a block's terms to log p and log q. The model samples what the guide leaves out, so its prior is in log q."""
        guided = block.guide | {name: site for name, site in block.model.items() if name in self.replay.layout.unguided}
        left_out = {*self.undrawn.hidden, *self.undrawn.predicted}
        for stat, found in (("log_p", block.model), ("log_q", guided)):
            for name, site in found.items() if stat in stats and self.arrays.wants("sample_stats") else ():
                if name in left_out:
                    continue
                log_p = self.densities.log_prob(block, f"sample_stats.{stat}", site, scaled=True)
                if log_p is None:
                    stats.pop(stat)
                    break
                stats[stat][block.draws] += to_numpy(in_doubles(log_p.values).reshape(len(log_p.values), -1).sum(1))

    def _add_to_row_weights(self, block: ReplayBlock) -> None:
        """Add a block's terms to the log weights of rows."""
        for sign, found in ((1, block.model), (-1, block.guide)):
            for site in found.values() if self.row_weights.plates else ():
                log_p = self.densities.log_prob(block, f"sample_stats.{PARETO_K} of rows", site)
                if log_p is None:
                    self.row_weights.plates.clear()
                    break
                self.row_weights.add(log_p, sign)


def _collect_prior(replay: Replay, arrays: GroupArrays, reports: dict[str, str], *, progress: bool) -> None:
    """Put draws of the model without guide and data into the arrays."""
    if replay.layout.weighted:
        names = ", ".join(map(repr, replay.layout.weighted))
        reports["prior"] = f"the reparametrisation of {names} is sampled from another distribution, and weighted"
        arrays.leave_out("prior", "prior_predictive")
        return
    prior = replay.prior()
    try:
        for draws in _with_progress(prior, "prior", progress=progress):
            for block in prior.runs(draws):
                for name, site in block.model.items():
                    if isinstance(site["fn"], Unit):
                        continue
                    arrays.put_draws("prior_predictive" if sites.was_observed(site) else "prior", name, block.value(name, site))
    except CANNOT_SAMPLE as error:
        _leave_out(arrays, reports, "prior", error)
        arrays.leave_out("prior_predictive")


def _leave_out(arrays: GroupArrays, reports: dict[str, str], group: str, error: Exception) -> None:
    """Leave out a group whose variables cannot be sampled, because of an error in a run of the model."""
    arrays.leave_out(group)
    if isinstance(error, NotImplementedError):
        reports[group] = one_line(error) if str(error) else "a variable of the model cannot be sampled"
    else:
        first_line = str(error).partition("\n")[0]
        reports[group] = f"the model fails for one of its draws: {one_line(first_line)}"


def _with_progress(replay: Replay, name: str, *, progress: bool) -> Any:
    """Return the blocks of draws, with a progress bar if there is more than one."""
    blocks = replay.draw_blocks()
    show = progress and len(blocks) > 1
    return tqdm(blocks, desc=name, unit="block", delay=PROGRESS_DELAY, disable=not show, leave=False)
