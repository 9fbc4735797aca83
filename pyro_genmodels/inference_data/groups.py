r"""Groups of variables as ArviZ names them: draws, densities and data of a fit, put together block by block.

Latent variables :math:`k` that inference has summed out have no draws. Where they lie in the rows of the one observed variable,
its log-likelihood is that of the sum,

.. math:: \log p(x_n \mid z) = \log \sum_{k_n} p(k_n \mid z)\, p(x_n \mid k_n, z).
"""

from __future__ import annotations

__all__ = ["GROUPS", "Groups", "collect", "in_chains"]

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyro.distributions import Unit
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.inference_data.replay import Replay, ReplayBlock, Shaped, numpy
from pyro_genmodels.inference_data.sources import DrawSource
from pyro_genmodels.utils.distributions import density_of, unwrap

GROUPS = (
    "posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "log_prior", "sample_stats",
    "observed_data", "constant_data",
)  # fmt: skip

Variables = dict[str, tuple[np.ndarray, list[str]]]
"""Arrays with the names of their dimensions, by name."""


@dataclass(frozen=True)
class Groups:
    """Groups of variables; labels of dimensions; the kinds of log-likelihoods that are not exact."""

    variables: dict[str, Variables]
    coords: Mapping[str, Any]
    kinds: Mapping[str, str]


def collect(source: DrawSource, reports: dict[str, str], **options: Any) -> Groups:
    """All wanted groups of a source, with dimensions (chain, draw, ...).

    Args:
        source: what is asked.
        reports: takes what cannot be computed, with the reason.
        options: see `_Collection`.
    """
    return _Collection(source, reports, **options).groups()


def in_chains(parts: Sequence[Groups]) -> Groups:
    """The chains of several fits to the same data in one.

    Raises:
        ValueError: if their data or the shapes of their variables differ.
    """
    first = parts[0]
    said = [{f"{group}.{name}" for group, names in part.variables.items() for name in names} for part in parts]
    if odd := {what for some in said for what in some if any(what not in others for others in said)}:
        raise ValueError(f"The fits do not go together: only some have {', '.join(sorted(odd))}. Choose groups= that all have.")
    joined: dict[str, Variables] = {}
    for group, variables in first.variables.items():
        for name, (array, names) in variables.items():
            others = [part.variables[group][name][0] for part in parts[1:]]
            shapes = [other.shape[int("chain" in names) :] for other in others]
            if any(shape != array.shape[int("chain" in names) :] for shape in shapes):
                raise ValueError(
                    f"The fits do not go together: their {group} of {name!r} have shapes {array.shape} and {shapes}."
                )
            if "chain" in names:
                array = np.concatenate([array, *others])
            elif not all(_same(array, other) for other in others):
                raise ValueError(f"The fits do not go together: their {group} of {name!r} differ.")
            joined.setdefault(group, {})[name] = (array, names)
    return Groups(joined, first.coords, first.kinds)


class _Collection:
    """All groups of a source, filled block by block."""

    def __init__(
        self,
        source: DrawSource,
        reports: dict[str, str],
        *,
        batch_size: int,
        wanted: set[str],
        parallel: bool | None,
        dims: Mapping[str, Sequence[str]],
        progress: bool,
    ) -> None:
        self.source, self.reports, self.batch_size, self.wanted = source, reports, batch_size, set(wanted)
        self.parallel, self.dims, self.progress = parallel, dims, progress
        self.arrays: dict[str, Variables] = {}
        self.kinds: dict[str, str] = {}
        self.coords: dict[str, Any] = {}
        self.hidden: list[str] = []
        self.predicted: list[str] = []
        self.summed_out = ""
        self.skipped: set[str] = set()
        self.no_prior: set[str] = set()
        self.filled: dict[tuple[str, str], int] = {}

    def groups(self) -> Groups:
        source = self.source
        if source.model is None:
            self._put_draws(source.guide)
            self._put_stats(source.stats)
        else:
            at_once = min(self.batch_size, source.total)
            walk = Replay(source.model, source.guide, source.args, source.kwargs, parallel=self.parallel, at_once=at_once)
            if taken := {"chain", "draw"} & set(walk.coords):
                raise ValueError(
                    f"A plate is called {taken.pop()!r}, which in ArviZ is a dimension of draws: call it otherwise."
                )
            self.coords = walk.coords
            self._posterior(walk)
            if walk.latents and not source.alone and self.wanted & {"prior", "prior_predictive"}:
                self._prior(parallel=walk.parallel)
            if not source.alone:
                self._constants(walk)
        if source.alone and source.kwargs.get("size") == 1:  # one row per draw: the plate says nothing
            self.arrays = {g: {n: _without_plate(*v) for n, v in group.items()} for g, group in self.arrays.items()}
        for (group, name), count in self.filled.items():
            array, names = self.arrays[group][name]
            if "draw" in names and count != array.size:
                raise ValueError(f"The model has the site {name!r} in some runs only, which ArviZ cannot hold.")
        chains = {
            group: {
                name: (array.reshape(source.chains, -1, *array.shape[1:]), ["chain", *names])
                if "draw" in names
                else (array, names)
                for name, (array, names) in variables.items()
            }
            for group, variables in self.arrays.items()
            if group in self.wanted
        }
        return Groups(chains, self.coords, self.kinds)

    def _posterior(self, walk: Replay) -> None:
        source = self.source
        given = isinstance(source.guide, Mapping)
        if walk.factors and not walk.observed:
            self.reports["log_likelihood"] = f"the model has it in pyro.factor {walk.factors[0]!r}, which has no rows"
        derived = {n: v for n, v in source.guide.items() if n not in {*walk.latents, *walk.observed}} if given else {}
        self._put_draws(derived)
        self._sort_out(walk, given=given)
        why = "a sequential plate that the model subsamples cannot be walked through: log_p is an estimate"
        self.reports |= {f"most rows of {plate!r}": why for plate in walk.sequential}
        known = ["log_p"] if given or walk.point_mass else ["log_p", "log_q"]
        if source.alone or not walk.latents or (self.hidden and not self.summed_out):
            known = []
        stats = {stat: np.zeros(source.total) for stat in known}
        for draws in self._blocks(walk, source.total, "posterior"):
            for run in walk.runs(draws):
                if self.summed_out in run.model:
                    run.model[self.summed_out]["unscaled_log_prob"] = run.summed_out(self.hidden, self.summed_out)
                self._take(run)
                self._add(run, stats)
        own = source.stats
        if walk.sizes:  # then a run's own are estimates from a few rows
            own = {stat: values for stat, values in own.items() if stat not in ("log_p", "log_weight")}
        stats = {**stats, **own}
        if {"log_p", "log_q"} <= set(stats):
            stats.setdefault("log_weight", stats["log_p"] - stats["log_q"])
        self._put_stats(stats)

    def _sort_out(self, walk: Replay, *, given: bool) -> None:
        """Finds out about variables without draws: those that are predicted, and those that inference has summed out."""
        unguided = walk.unguided
        discrete = [n for n, s in unguided.items() if s["fn"].has_enumerate_support]
        if not walk.observed and not self.source.alone:
            self.predicted = [n for n, s in unguided.items() if not s["infer"].get("enumerate")]
        elif self.source.complete:
            self.predicted = [n for n in unguided if n not in discrete]
        self.hidden = [n for n, s in unguided.items() if n not in self.predicted and (s["infer"].get("enumerate") or given)]
        if missing := [n for n in self.hidden if n not in discrete]:
            raise ValueError(
                f"There are no draws of {', '.join(map(repr, missing))}, which the model has. Give draws of all latent "
                "variables; of WeighedPredictive they are wanted by return_sites=."
            )
        if not self.hidden:
            return
        names = ", ".join(map(repr, self.hidden))
        self.reports |= {f"posterior[{n!r}]": "inference has summed it out: there are no draws of it" for n in self.hidden}
        hanging, chained = walk.hang_on(self.hidden)
        computed = [n for n in hanging if sites.is_deterministic(walk.sites[n])]
        self.reports |= {f"posterior[{n!r}]": f"it depends on {names}, of which there are no draws" for n in computed}
        self.skipped = {*self.hidden, *computed}
        others = [n for n in hanging if n not in computed]
        plates = {frozenset(f.name for f in walk.sites[n]["cond_indep_stack"]) for n in (*self.hidden, *others)}
        if len(others) == 1 and others[0] in walk.observed and len(plates) == 1 and not chained:
            self.summed_out = others[0]
            return
        why = f"{names} cannot be summed out row by row, as where one observed variable in their own plates depends on them"
        self.reports |= dict.fromkeys(["log_likelihood", "sample_stats.log_p"], why)
        self.reports |= {f"log_prior[{n!r}]": f"it depends on {names}" for n in others if n not in walk.observed}
        self.wanted -= {"log_likelihood"}
        self.no_prior = set(others)

    def _take(self, run: ReplayBlock) -> None:
        """Puts the values of a run where they belong."""
        predicted = run.predict() if "posterior_predictive" in self.wanted and set(run.walk.observed) & set(run.model) else {}
        for name, site in run.model.items():
            if isinstance(site["fn"], Unit) or name in self.skipped:  # pyro.factor: a term, not a variable
                continue
            if name not in run.walk.observed:
                predicted_here = name in self.predicted or (self.source.alone and name == "x")
                self._put("posterior_predictive" if predicted_here else "posterior", run, name, run.value(name, site))
                if not (self.source.alone or predicted_here or name in self.no_prior or sites.is_deterministic(site)):
                    self._put("log_prior", run, name, self._log_prob(run, "log_prior", name, site), event=False)
                continue
            if predicted:
                self._put("posterior_predictive", run, name, run.value(name, predicted[name]))
            if run.walk.latents:
                self._put("log_likelihood", run, name, self._log_prob(run, "log_likelihood", name, site), event=False)
            if run.draws.start == 0:
                self._put("observed_data", run, name, run.value(name, site), drawn=False)

    def _add(self, run: ReplayBlock, stats: dict[str, np.ndarray]) -> None:
        """Adds a run's terms to log p and log q; what the guide leaves to the model is drawn from its prior."""
        drawn = {**run.guide, **{n: s for n, s in run.model.items() if n in run.walk.unguided}}
        for stat, sites in (("log_p", run.model), ("log_q", drawn)):
            for name, site in sites.items() if stat in stats and "sample_stats" in self.wanted else ():
                if name in self.hidden or name in self.predicted:
                    continue
                shaped = self._log_prob(run, f"sample_stats.{stat}", name, site, scaled=True)
                if shaped is None:
                    stats.pop(stat)
                    break
                stats[stat][run.draws] += numpy(shaped[0].double().reshape(len(shaped[0]), -1).sum(1))

    def _log_prob(self, run: ReplayBlock, what: str, name: str, site: dict[str, Any], *, scaled: bool = False) -> Shaped | None:
        if not scaled and what not in self.wanted:
            return None
        density, _ = density_of(site["fn"])
        kind = type(unwrap(site["fn"])).__name__
        if density in ("none", "unnormalized"):
            self.reports[f"{what}[{name!r}]"] = f"a {kind} has " + ("no density" if density == "none" else "none normalised")
            return None
        if density != "exact" and what == "log_likelihood":
            self.kinds[name] = density
        try:
            return run.log_prob(site, scaled=scaled)
        except NotImplementedError:
            self.reports[f"{what}[{name!r}]"] = f"a {kind} has no log_prob"
            return None

    def _prior(self, *, parallel: bool) -> None:
        source = self.source
        total = source.total
        model = handlers.unobserving()(source.model)
        try:
            walk = Replay(model, traces.no_latents, source.args, source.kwargs, parallel=parallel)
            for draws in self._blocks(walk, total, "prior"):
                for run in walk.runs(draws):
                    for name, site in run.model.items():
                        if isinstance(site["fn"], Unit):
                            continue
                        observed = site["infer"].get("was_observed") and not sites.is_deterministic(site)
                        self._put("prior_predictive" if observed else "prior", run, name, run.value(name, site))
        except NotImplementedError as error:
            self.reports["prior"] = str(error) or "a variable of the model cannot be drawn"
            self.wanted -= {"prior", "prior_predictive"}

    def _constants(self, walk: Replay) -> None:
        """The model's arguments that are tensors and that it does not observe; rows are of the one plate that is as long."""
        observed = [array for array, _ in self.arrays.get("observed_data", {}).values()]
        lengths = {plate: walk.sizes.get(plate, len(rows)) for plate, rows in walk.coords.items()}
        for name, value in _arguments(self.source).items():
            array = numpy(value) if isinstance(value, Tensor) else np.asarray(value)
            if any(_same(array, x) for x in observed):
                continue
            plates = [plate for plate, length in lengths.items() if array.ndim and len(array) == length]
            first = plates if len(plates) == 1 and name not in plates else []  # a name is a variable's or a dimension's
            names = first + _names(self.dims, name, array.ndim - len(first))
            self.arrays.setdefault("constant_data", {})[name] = (array, names)

    # Where it is put.

    def _blocks(self, walk: Replay, total: int, what: str) -> Any:
        blocks = walk.draw_blocks(total, self.batch_size)
        return tqdm(blocks, desc=what, unit="block", delay=2, disable=not self.progress or len(blocks) == 1, leave=False)

    def _put(
        self, group: str, run: ReplayBlock, name: str, shaped: Shaped | None, *, drawn: bool = True, event: bool = True
    ) -> None:
        """Puts a block (draws, plates, event) of a variable in its place; if not `drawn`, its first draw stands for all."""
        if shaped is None or group not in {*self.wanted, "observed_data"}:  # that tells which arguments are constants
            return
        array, plates = numpy(shaped[0]), shaped[1]
        variables = self.arrays.setdefault(group, {})
        if name not in variables:
            sizes = [run.walk.sizes.get(frame.name, frame.size) for frame in plates]
            names = [frame.name for frame in plates]
            rest = array.ndim - 1 - len(plates)  # of a log density, what the model draws at once outside all plates
            names += _names(self.dims, name, rest) if event else [*self.dims.get(name, _names({}, name, rest))][:rest]
            shape = [*([self.source.total] if drawn else []), *sizes, *array.shape[1 + len(plates) :]]
            variables[name] = (np.zeros(shape, array.dtype), ["draw", *names] if drawn else names)
        where = run.places(plates)
        self.filled[group, name] = self.filled.get((group, name), 0) + (array.size if drawn else 0)
        if drawn:
            variables[name][0][(run.draws, *where)] = array
        else:
            variables[name][0][where] = array[0]

    def _put_draws(self, draws: Mapping[str, Tensor]) -> None:
        """Draws of which nothing is known but their values."""
        for name, value in draws.items() if "posterior" in self.wanted else ():
            names = ["draw", *_names(self.dims, name, value.dim() - 1)]
            self.arrays.setdefault("posterior", {})[name] = (numpy(value), names)

    def _put_stats(self, stats: Mapping[str, np.ndarray]) -> None:
        if stats and "sample_stats" in self.wanted:
            self.arrays["sample_stats"] = {name: (values, ["draw"]) for name, values in stats.items()}


def _arguments(source: DrawSource) -> dict[str, Any]:
    """The model's arguments that are tensors or arrays, by their names."""
    model = getattr(source.model, "forward", source.model)  # of a module, whose own call takes anything
    signature = inspect.signature(model)
    named: dict[str, Any] = {}
    for name, value in signature.bind(*source.args, **source.kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}_{i}": v for i, v in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return {n: v for n, v in named.items() if isinstance(v, (Tensor, np.ndarray))}


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == b.dtype.kind == "f")


def _names(dims: Mapping[str, Sequence[str]], variable: str, count: int) -> list[str]:
    names = list(dims.get(variable, [f"{variable}_dim_{i}" for i in range(count)]))
    if len(names) != count:
        raise ValueError(f"dims[{variable!r}] names {len(names)} dimensions, but the variable's event has {count}.")
    return names


def _without_plate(values: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    if "data" not in names:
        return values, names
    axis = names.index("data")
    return values.squeeze(axis), names[:axis] + names[axis + 1 :]
