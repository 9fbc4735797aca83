r"""Runs of a model and its guide over blocks of draws and blocks of rows.

All draws of a block are made in one run, in a plate of particles. If the model subsamples a plate, its rows are run block by
block: variables outside the plate are sampled once, :math:`z \sim q`, and then those of the rows, :math:`B` of :math:`N` at
a time,

.. math:: z_n \sim q(z_n \mid z), \qquad \log p(z, z_{1:N}, x_{1:N}) = \log p(z) + \sum_{n=1}^{N} \log p(z_n, x_n \mid z),

so that every row counts once, and nothing is estimated from a subsample.

Number of runs of the model for one block of draws and rows: one that shows its layout, one for the block, and one of a single
particle that shows whether particles can be sampled together. `ReplayBlock.predict` needs another one only if there is more
than one observed site, or a site after it.
"""

from __future__ import annotations

__all__ = ["Replay", "ReplayBlock"]

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous, AutoGaussian, AutoStructured
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_genmodels._pyro import handlers, sites, traces, vectorize
from pyro_genmodels._pyro.plates import measure_plates
from pyro_genmodels._pyro.subsampling import GivenRows, RowBlock, fixed_rows
from pyro_genmodels.inference_data.arrays import BlockValues, PlateRows
from pyro_genmodels.inference_data.layout import ModelLayout

Sites = dict[str, Any]
"""Sites of a trace, by name."""


class Replay:
    """Runs of a model, with a guide or with given draws.

    Args:
        model: function with Pyro statements.
        guide: function with Pyro statements; or draws of the latent variables by name, (draws, *shape of the site).
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        num_samples: number of draws.
        batch_size: largest number of draws made in one run.
        parallel: True to make the draws of a block in one run; None finds out if the model allows it.
        layout: layout of the model, if it is known.

    Attributes:
        layout: sites and plates of the model.
        parallel: True if the draws of a block are made in one run.
        point_masses: continuous variables for which the guide has a single value and no density.
        mispaired: rows that the model gives to a plate, ``subsample=rows``, where the guide chooses others.

    Raises:
        ValueError: if the shapes of given draws are not those of the sites, or rows cannot be run block by block.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | Mapping[str, Tensor],
        args: tuple,
        kwargs: Mapping[str, Any],
        *,
        num_samples: int,
        batch_size: int,
        parallel: bool | None = None,
        layout: ModelLayout | None = None,
    ) -> None:
        self.model = lambda: model(*args, **kwargs)
        self._num_samples, self._batch_size = num_samples, batch_size
        self._guide_runs_model = not isinstance(guide, Mapping) and isinstance(poutine.unwrap(guide), Messenger)
        self._guide_of: Callable[..., Callable[[], Any]]
        self.point_masses: list[str] = []
        self.mispaired: dict[str, Any] = {}
        if isinstance(guide, Mapping):
            self.layout = layout or self._find_layout(
                traces.holding({name: values[0] for name, values in guide.items()}), guide_is_given=True
            )
            latents = {name: values for name, values in guide.items() if name in self.layout.latents}
            _check_draws(self.layout, latents)
            self._guide_of = _DrawsAsGuide(latents, self.layout)
        else:
            guide_without_args = lambda: guide(*args, **kwargs)  # noqa: E731
            if layout is None:
                guide_trace = traces.proposal(poutine.trace(guide_without_args).get_trace())
                self.layout = self._find_layout(guide_trace, guide_is_given=False)
                if self.mispaired:
                    guide_trace = self._on_rows_of_model(guide_without_args)
                    self.layout = self._find_layout(guide_trace, guide_is_given=False)
                self.point_masses = self._find_point_masses(guide_trace, guide_without_args)
            else:
                self.layout = layout
            _check_autoguide(self.layout, poutine.unwrap(guide))
            self._guide_of = lambda draws, *, together: guide_without_args
        if layout is None and len(self.layout.rows.blocks) > 1:
            first = slice(0, 1)
            self.layout = self.layout.joined(self._run(first, rows, {}, together=False) for rows in self.layout.rows.blocks)
        self._tried: tuple[Trace, Trace] | None = None
        if self.layout.has_batch_outside_plates:
            self.parallel = False
        elif parallel is None:
            self.parallel = min(num_samples, batch_size) > 1 and (traces.is_family(model) or self._try_parallel())
        else:
            self.parallel = parallel

    def prior(self) -> Replay:
        """Return runs of the model alone, with its observed sites sampled."""
        model = handlers.draw_observed(self.model)
        return Replay(
            model,
            traces.no_latents,
            (),
            {},
            num_samples=self._num_samples,
            batch_size=self._batch_size,
            parallel=self.parallel,
            layout=self.layout,
        )

    def draw_blocks(self) -> list[slice]:
        """Return blocks of draws that are all draws together, each small enough for one run."""
        step = self._batch_size if self.parallel else 1
        return [slice(start, min(start + step, self._num_samples)) for start in range(0, self._num_samples, step)]

    def runs(self, draws: slice) -> Iterator[ReplayBlock]:
        """Yield the runs of a block of draws, one for each block of rows."""
        earlier = _EarlierSites()
        for rows in self.layout.rows.blocks:
            known = earlier.latents(rows)
            guide_trace, model_trace = self._take_tried(draws, rows) or self._run(draws, rows, known, together=self.parallel)
            guide_sites, model_sites = traces.sample_sites(guide_trace), traces.sample_sites(model_trace)
            known = known | _unobserved(guide_sites) | _unobserved(model_sites)
            new_guide, new_model = earlier.add("guide", guide_sites, rows), earlier.add("model", model_sites, rows)
            yield ReplayBlock(self, draws, rows, new_model, new_guide, known)

    def run_model(self, model: Callable[[], Any], draws: slice, rows: Mapping[str, RowBlock], known: Sites) -> Sites:
        """Return the sites of the model under other handlers, run with known latent variables."""
        return traces.sample_sites(self._trace(self._in_plate(model, draws, together=self.parallel), known, rows))

    def depends_on(self, hidden: Collection[str]) -> tuple[list[str], bool]:
        """Find what depends on discrete variables that are summed out.

        Returns:
            The names of the sites that depend on them; True if they are a chain in `pyro.markov`.
        """
        guide, nesting = self._guide_of(slice(0, 1), together=False), self.layout.nesting
        dependent: dict[str, None] = {}
        is_chain = False
        unseen = set(self.layout.event_dims)

        def has_enumerated_dims(name: str, site: Any) -> bool:
            if sites.is_deterministic(site):
                return site["value"].dim() - self.layout.event_dims[name] > nesting + 1
            return site["fn"].log_prob(site["value"]).dim() > nesting + 1

        for rows in self.layout.rows.blocks:
            guide_sites = traces.sample_sites(traces.proposal(self._trace(guide, {}, rows)))
            found = traces.sample_sites(self._trace(_enumerated(self.model, hidden, nesting), guide_sites, rows))
            dims = [sites.enumeration_dim(found[name]) for name in hidden if name in found]
            dependent |= {name: None for name, site in found.items() if name not in hidden and has_enumerated_dims(name, site)}
            is_chain |= len(set(dims)) < len(dims)
            if not (unseen := unseen - set(found) - set(guide_sites)):
                break
        return list(dependent), is_chain

    # Single runs.

    def _find_layout(self, guide_trace: Trace, *, guide_is_given: bool) -> ModelLayout:
        given = GivenRows()
        model_trace = poutine.trace(poutine.replay(given(self.model), trace=guide_trace)).get_trace()
        if not (self.mispaired or guide_is_given):
            self.mispaired = given.other_than(guide_trace)
        return ModelLayout(model_trace, guide_trace, guide_is_given=guide_is_given)

    def _on_rows_of_model(self, guide: Callable[[], Any]) -> Trace:
        """Return the trace of the guide on the rows that the model is given, without the plates at which it chose others."""
        with fixed_rows(self.mispaired):
            trace = traces.proposal(poutine.trace(guide).get_trace())
        for plate in self.mispaired:
            trace.remove_node(plate)
        return trace

    def _find_point_masses(self, guide_trace: Trace, guide: Callable[[], Any]) -> list[str]:
        if self._guide_runs_model:
            return []
        return traces.point_masses(self.layout.model_trace, guide_trace, lambda: self._trace(guide, {}, {}))

    def _try_parallel(self) -> bool:
        """Return True if the first block of draws can be made in one run, which is kept for `runs`."""
        if self._guide_runs_model:
            return False
        draws, rows = slice(0, min(self._num_samples, self._batch_size)), self.layout.rows.blocks[0]
        try:
            with vectorize.at_most_one_more_dim(self.layout.nesting):
                guide_trace, model_trace = self._run(draws, rows, {}, together=True)
            model, guide = (self._with_rows(fn, rows, {}) for fn in (self.model, self._guide_of(draws, together=True)))
            checked = vectorize.most_different_particle(model_trace, draws.stop, self.layout.nesting)
            pair, nesting = (model_trace, guide_trace), self.layout.nesting
            agrees = vectorize.agree_alone(model, guide, pair, draws.stop, nesting, [checked])
        except vectorize.SHAPE_ERRORS:
            return False
        self._tried = (guide_trace, model_trace) if agrees else None
        return agrees

    def _take_tried(self, draws: slice, rows: Mapping[str, RowBlock]) -> tuple[Trace, Trace] | None:
        """Return the run of `_try_parallel`, once, if it is the run of these draws and rows."""
        if draws.start != 0 or rows is not self.layout.rows.blocks[0]:
            return None
        tried, self._tried = self._tried, None
        return tried

    def _run(self, draws: slice, rows: Mapping[str, RowBlock], known: Sites, *, together: bool) -> tuple[Trace, Trace]:
        """Run the guide and then the model for some draws and rows, and return (guide trace, model trace)."""
        guide = self._in_plate(self._guide_of(draws, together=together), draws, together=together)
        guide_trace = traces.proposal(self._trace(guide, known, rows))
        known = known | _unobserved(traces.sample_sites(guide_trace))
        return guide_trace, self._trace(self._in_plate(self.model, draws, together=together), known, rows)

    def _in_plate(self, fn: Callable[[], Any], draws: slice, *, together: bool) -> Callable[[], Any]:
        return traces.particles(draws.stop - draws.start, self.layout.nesting)(fn) if together else fn

    def _trace(self, fn: Callable[[], Any], known: Sites, rows: Mapping[str, RowBlock]) -> Trace:
        trace = poutine.trace(self._with_rows(fn, rows, known)).get_trace()
        measure_plates(trace)
        return prune_subsample_sites(trace)

    def _with_rows(self, fn: Callable[[], Any], rows: Mapping[str, RowBlock], known: Sites) -> Callable[[], Any]:
        """Return a function that runs with these rows of the plates and these values of latent variables."""
        trace = Trace()
        for name, site in known.items():
            trace.add_node(name, **site)
        for name, site in self.layout.rows.subsamples.items():
            trace.add_node(name, **{**site, "value": rows[name].indices if name in rows else site["value"]})
        return poutine.replay(fn, trace=trace)


class _EarlierSites:
    """Sites of the runs of one block of draws over earlier blocks of rows.

    A site is the same in two runs if the rows of its own plates are the same.
    """

    def __init__(self) -> None:
        self._seen: set[tuple] = set()
        self._latents: dict[tuple, Any] = {}

    def latents(self, rows: Mapping[str, RowBlock]) -> Sites:
        """Return the latent variables that were sampled for these rows, by name."""
        return {
            name: site
            for (_, name, *plates), site in self._latents.items()
            if all(rows[plate].to.start == start for plate, start in plates)
        }

    def add(self, role: str, found: Sites, rows: Mapping[str, RowBlock]) -> Sites:
        """Add the sites of a run of the model or the guide, and return those that no earlier run has."""
        keys = {name: _key(role, name, site, rows) for name, site in found.items()}
        new = {name: site for name, site in found.items() if keys[name] not in self._seen}
        self._seen.update(keys[name] for name in new)
        self._latents.update({keys[name]: site for name, site in _unobserved(new).items()})
        return new


def _key(role: str, name: str, site: Mapping[str, Any], rows: Mapping[str, RowBlock]) -> tuple:
    plates = {frame.name for frame in site["cond_indep_stack"]}
    return (role, name, *((plate, block.to.start) for plate, block in rows.items() if plate in plates))


@dataclass(frozen=True)
class ReplayBlock:
    """One run: one block of draws over one block of rows.

    Attributes:
        replay: the runs of which this is one.
        draws: position of the draws among all.
        rows: rows of each plate that is run block by block.
        model: sites of the model that no earlier run of these draws has.
        guide: sites of the guide that no earlier run of these draws has.
        known: all latent variables of the run.
    """

    replay: Replay
    draws: slice
    rows: Mapping[str, RowBlock]
    model: Sites
    guide: Sites
    known: Sites

    def predict(self) -> Sites:
        """Return sites with the same latent variables and sampled observations.

        If nothing depends on the observed value, it is sampled from the site's distribution. Otherwise the model runs again.
        """
        if name := self.replay.layout.last_observed:
            return {name: {**self.model[name], "value": self.model[name]["fn"]()}}
        return self.replay.run_model(handlers.draw_observed(self.replay.model), self.draws, self.rows, self.known)

    def log_prob_summed_out(self, hidden: Collection[str], name: str) -> Tensor:
        """Return the log probability (nats) of an observed site, with the discrete variables of its rows summed out."""
        nesting = self.replay.layout.nesting
        known = {n: site for n, site in self.known.items() if n not in hidden}
        found = self.replay.run_model(_enumerated(self.replay.model, hidden, nesting), self.draws, self.rows, known)
        terms = [scale_and_mask(found[n]["fn"].log_prob(found[n]["value"]), mask=found[n]["mask"]) for n in (*hidden, name)]
        log_p = sum(terms[1:], terms[0])
        return log_p.logsumexp(list(range(log_p.dim() - nesting - 1)))

    def value(self, name: str, site: Mapping[str, Any]) -> BlockValues:
        """Return a site's value for the rows that are new.

        Raises:
            ValueError: if the site was not in the run that showed the layout.
        """
        event_dims = self.replay.layout.event_dims
        if name not in event_dims:
            raise ValueError(
                f"The model has the site {name!r} in some runs only, which ArviZ cannot represent: leave it out of groups."
            )
        return self._for_new_rows(site["value"], site, event_dims[name])

    def is_shared(self, name: str, site: Mapping[str, Any]) -> bool:
        """Return True if the draws of this block share one value of a site, and it is not from a run of a single draw."""
        layout = self.replay.layout
        batch_shape = site["value"].shape[: site["value"].dim() - layout.event_dims.get(name, 0)]
        has_draws = len(batch_shape) > layout.nesting and batch_shape[-layout.nesting - 1] > 1
        return self.replay.parallel and not has_draws

    def log_prob(self, site: dict[str, Any], *, scaled: bool) -> BlockValues:
        """Return a site's masked log probability (nats) for the rows that are new.

        Args:
            site: site of the model or the guide, whose "unscaled_log_prob" is used or set.
            scaled: True to count scales, except those of plates that are run block by block.

        Raises:
            ValueError: naming the site, if its value is outside the support or has a wrong shape.
        """
        layout = self.replay.layout
        scale = site["scale"] if scaled else 1.0
        for frame in site["cond_indep_stack"]:
            if scaled and frame.name in self.rows:
                scale = scale * (frame.size / layout.rows.sizes[frame.name])
        if "unscaled_log_prob" not in site:
            try:
                site["unscaled_log_prob"] = site["fn"].log_prob(site["value"])
            except ValueError as error:
                raise ValueError(f"The log density of {site['name']!r} cannot be computed: {error}") from error
        log_p = scale_and_mask(site["unscaled_log_prob"], scale, site["mask"])
        if not layout.extra_event_dims.get(site["name"], 0):
            log_p = self._summed_outside_plates(log_p, site)
        return self._for_new_rows(log_p, site, layout.extra_event_dims.get(site["name"], 0))

    def _summed_outside_plates(self, log_p: Tensor, site: Mapping[str, Any]) -> Tensor:
        """Return a log probability summed over dimensions that are no plate's, as a `Delta` of `NeuTraReparam` may have."""
        dims = {-self.replay.layout.nesting - 1, *(frame.dim for frame in sites.plate_frames(site))}
        others = [d for d in range(-min(self.replay.layout.nesting, log_p.dim()), 0) if d not in dims and log_p.shape[d] > 1]
        return log_p.sum(others, keepdim=True) if others else log_p

    def _for_new_rows(self, value: Tensor, site: Mapping[str, Any], event_dim: int) -> BlockValues:
        """Return a value with all dimensions of its plates and one of draws on the left, cut to the new rows."""
        num_draws, draws_dim = self.draws.stop - self.draws.start, -self.replay.layout.nesting - 1
        frames = {frame.dim: frame for frame in sites.plate_frames(site)}
        value = value.reshape((1,) * (event_dim - draws_dim - value.dim()) + value.shape)
        batch_shape, event_shape = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
        sizes = {dim: frame.size for dim, frame in frames.items()} | {draws_dim: num_draws}
        value = value.expand([sizes.get(dim, batch_shape[dim]) for dim in range(draws_dim, 0)] + list(event_shape))
        plates = [frames[dim] for dim in sorted(frames)]
        value = value.reshape([num_draws, *(frame.size for frame in plates), *event_shape])
        new = [self.rows[frame.name].new if frame.name in self.rows else slice(None) for frame in plates]
        return BlockValues(value[(slice(None), *new)], self.draws, [self._plate_rows(frame) for frame in plates])

    def _plate_rows(self, frame: Any) -> PlateRows:
        if frame.name in self.rows:
            return PlateRows(frame.name, self.replay.layout.rows.sizes[frame.name], self.rows[frame.name].to)
        return PlateRows(frame.name, frame.size, slice(None))


class _DrawsAsGuide:
    """Guides that replay given draws, one guide for each block.

    Args:
        draws: draws of each latent variable, (draws, *shape of the site).
        layout: layout of the model.
    """

    def __init__(self, draws: Mapping[str, Tensor], layout: ModelLayout) -> None:
        self._draws, self._layout = draws, layout

    def __call__(self, block: slice, *, together: bool) -> Callable[[], None]:
        """Return the guide of a block of draws, which is for a plate of particles if the draws are made together."""

        def guide() -> None:
            for name, draws in self._draws.items():
                value, event_dim = draws[block], self._layout.event_dims[name]
                if together:
                    missing = self._layout.nesting + 1 + event_dim - value.dim()
                    value = value.reshape(len(value), *(1,) * missing, *value.shape[1:])
                else:
                    value = value[0]
                pyro.sample(name, Delta(value, event_dim=event_dim).mask(False))

        return guide


def _check_draws(layout: ModelLayout, draws: Mapping[str, Tensor]) -> None:
    for name, values in draws.items():
        fn = layout.sites[name]["fn"]
        wanted = fn.batch_shape + fn.event_shape
        if values[0].numel() != wanted.numel():
            raise ValueError(f"Each draw of {name!r} must have the shape {tuple(wanted)}, but has {tuple(values.shape[1:])}.")
        if plate := layout.subsampled_plate(name):
            raise ValueError(
                f"The draws of {name!r} lie in the plate {plate!r}, which the model subsamples, so it is unknown to which rows "
                "they belong. Give the model all rows, without subsample_size."
            )


def _check_autoguide(layout: ModelLayout, guide: Any) -> None:
    if isinstance(guide, (AutoContinuous, AutoGaussian, AutoStructured)):
        per_row = [name for name in layout.latents if layout.subsampled_plate(name)]
        if per_row:
            raise ValueError(
                f"{type(guide).__name__} has one latent variable for the rows of a subsample, not one for each row, so "
                f"{', '.join(map(repr, per_row))} cannot be sampled for all rows. Use AutoNormal, or no subsample_size."
            )


def _unobserved(found: Mapping[str, Any]) -> Sites:
    return {name: site for name, site in found.items() if not site["is_observed"]}


def _enumerated(model: Callable[[], Any], hidden: Collection[str], nesting: int) -> Callable[[], Any]:
    """Return the model with all values of these discrete variables enumerated left of the particles."""

    def enumerate_hidden(site: Any) -> Any:
        return {"enumerate": "parallel" if site["name"] in hidden else None}

    return poutine.enum(poutine.infer_config(model, enumerate_hidden), first_available_dim=-nesting - 2)
