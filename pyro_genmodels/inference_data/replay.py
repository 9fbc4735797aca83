r"""A model run in blocks of draws and blocks of rows, whose values are put together whole.

The draws of a block run together, in a plate of particles. Rows that a model subsamples are walked through: variables outside
the plate are drawn once, :math:`z \sim q`, and then those of its rows, :math:`B` of :math:`N` at a time,

.. math:: z_n \sim q(z_n \mid z), \qquad \log p(z, z_{1:N}, x_{1:N}) = \log p(z) + \sum_{n=1}^{N} \log p(z_n, x_n \mid z),

so that every row counts once and nothing is an estimate from a subsample.
"""

from __future__ import annotations

__all__ = ["Replay", "ReplayBlock", "numpy"]

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoContinuous, AutoGaussian, AutoStructured
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces, vectorize

Shaped = tuple[Tensor, list[Any]]
"""A tensor (draws, plates from the left, event) and the frames of the plates."""


class RowBlock(NamedTuple):
    """Some rows of a plate: which a run sees, where the new ones stand among these, and where they go among all."""

    indices: Tensor
    new: slice
    to: slice


class Replay:
    """A model, and a guide or draws in its place.

    Args:
        model: a function with Pyro statements.
        guide: likewise; or draws of the latent variables by name, (draws, *shape of the site).
        args: of both.
        kwargs: of both.
        parallel: whether the draws of a block are made in one run; None tries out whether the model allows it.
        at_once: draws that may be made together, also in trying.

    Attributes:
        sizes: of the plates that are walked through.
        coords: the rows that are seen of each plate.
        sequential: plates that are subsampled but cannot be walked through, of which one subsample is seen.
        latents: names of the model's latent variables.
        observed: the sites of what it observes.
        sites: all of them, the guide's too.
        factors: names of those of `pyro.factor`.
        unguided: the sites of those that the model draws by itself.
        point_mass: whether the guide draws nothing.
    """

    def __init__(
        self, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], *, parallel: bool | None = None, at_once: int = 3
    ) -> None:
        self.model = lambda: model(*args, **kwargs)
        given = isinstance(guide, Mapping)
        self.wraps_model = not given and isinstance(poutine.unwrap(guide), Messenger)
        first = _given_trace(guide) if given else self._own(poutine.trace(lambda: guide(*args, **kwargs)).get_trace())
        model_trace = poutine.trace(poutine.replay(self.model, trace=first)).get_trace()
        sites = ({} if given else traces.sample_sites(first)) | traces.sample_sites(model_trace)
        self.nesting = max(map(sites.plate_depth, sites.values()), default=0)
        # what a model draws at once outside all plates is, for us, one event
        self.loose = {
            n: len(s["fn"].batch_shape)
            for n, s in sites.items()
            if not (isinstance(s["fn"], (_Subsample, Unit)) or sites.is_deterministic(s) or sites.plate_depth(s))
        }
        # Pyro takes every dimension of a deterministic value for its event; those of its plates are not
        self.event_dims = {
            n: max(s["value"].dim() - sites.plate_depth(s), 0)
            if sites.is_deterministic(s)
            else s["fn"].event_dim + self.loose.get(n, 0)
            for n, s in sites.items()
            if not isinstance(s["fn"], _Subsample)
        }
        self.latents = traces.latents(prune_subsample_sites(model_trace))
        self.unguided = {n: sites[n] for n in self.latents if n not in first.nodes}
        self.point_mass = not given and traces.is_point_mass(prune_subsample_sites(first))
        self.sites = sites
        self.observed = {n: sites[n] for n in traces.observed(model_trace) if not isinstance(sites[n]["fn"], Unit)}
        self.factors = [n for n, s in sites.items() if isinstance(s["fn"], Unit)]
        self._find_rows(sites)
        if self.sizes and isinstance(poutine.unwrap(guide), (AutoContinuous, AutoGaussian, AutoStructured)):
            within = [n for n in self.latents if any(f.name in self.sizes for f in sites[n]["cond_indep_stack"])]
            if within:
                raise ValueError(
                    f"{type(guide).__name__} has one latent for the rows of a subsample, not one for each row, so that "
                    f"{', '.join(map(repr, within))} of all rows cannot be drawn. Use AutoNormal, or no subsample_size."
                )
        self._guide: Callable[[slice, bool], Callable] = lambda *_: lambda: guide(*args, **kwargs)
        trials = min(3, at_once)
        if given:
            values = {n: v for n, v in guide.items() if n in self.latents}
            self._check_given(sites, values)
            self._guide = self._given(values)
            trials = min([trials, *map(len, values.values())])
        if any(self.loose.values()) or (parallel is None and trials == 1):
            parallel = False
        if parallel is None:
            pair = self._seeing(self.model), self._seeing(self._guide(slice(0, trials), True))
            parallel = traces.is_family(model) or vectorize.can_vectorize(*pair, (), {}, self.nesting, trials=trials)
        self.parallel = parallel

    def hang_on(self, hidden: Collection[str]) -> tuple[list[str], bool]:
        """What depends on discrete variables that are summed out, and whether these are a chain in `pyro.markov`."""
        guide = traces.sample_sites(self._own(self._trace(self._guide(slice(0, 1), False), {}, self.row_blocks[0])))
        enumerated = _enumerating(self.model, hidden, self.nesting)
        sites = traces.sample_sites(self._trace(enumerated, guide, self.row_blocks[0]))

        def hangs(name: str, site: Any) -> bool:
            if sites.is_deterministic(site):
                return site["value"].dim() - self.event_dims[name] > self.nesting + 1
            return site["fn"].log_prob(site["value"]).dim() > self.nesting + 1

        dims = [sites[n]["infer"].get("_enumerate_dim") for n in hidden]
        return [n for n, s in sites.items() if n not in hidden and hangs(n, s)], len(set(dims)) < len(dims)

    def draw_blocks(self, total: int, batch_size: int) -> list[slice]:
        """The blocks of that many draws, which bound memory."""
        step = batch_size if self.parallel else 1
        return [slice(start, min(start + step, total)) for start in range(0, total, step)]

    def runs(self, draws: slice) -> Iterator[ReplayBlock]:
        """The runs of a block of draws, one for each block of rows."""
        guide, seen = self._guide(draws, self.parallel), set[tuple]()
        latents: dict[tuple, Any] = {}
        for rows in self.row_blocks:
            yield self._run(guide, draws, rows, seen, latents)

    def _run(self, guide: Callable, draws: slice, rows: Mapping[str, RowBlock], seen: set[tuple], latents: dict) -> ReplayBlock:
        plate: Callable = traces.particles(draws.stop - draws.start, self.nesting) if self.parallel else lambda fn: fn

        def key(role: str, name: str, site: Mapping[str, Any]) -> tuple:
            """Of a site for these rows: the rows it depends on are those of its own plates."""
            plates = {f.name for f in site["cond_indep_stack"]}
            return (role, name, *((plate, block.to.start) for plate, block in rows.items() if plate in plates))

        known = {k[1]: s for k, s in latents.items() if all(rows[plate].to.start == start for plate, start in k[2:])}
        sites = {"guide": traces.sample_sites(self._own(self._trace(plate(guide), known, rows)))}
        known = known | {n: s for n, s in sites["guide"].items() if not s["is_observed"]}
        sites["model"] = traces.sample_sites(self._trace(plate(self.model), known, rows))
        known = known | {n: s for n, s in sites["model"].items() if not s["is_observed"]}
        new = {role: {n: s for n, s in found.items() if key(role, n, s) not in seen} for role, found in sites.items()}
        for role, found in new.items():
            seen.update(key(role, n, s) for n, s in found.items())
            latents.update({key(role, n, s): s for n, s in found.items() if not s["is_observed"]})

        def again(handled: Callable, but: Collection[str] = ()) -> dict[str, Any]:
            return traces.sample_sites(self._trace(plate(handled), {n: s for n, s in known.items() if n not in but}, rows))

        return ReplayBlock(self, draws, rows, new["model"], new["guide"], again)

    def _own(self, trace: Trace) -> Trace:
        """A guide's trace without what it observes, where the guide runs the model inside."""
        for name in [n for n, s in traces.sample_sites(trace).items() if s["is_observed"]] if self.wraps_model else ():
            trace.remove_node(name)
        return trace

    def _trace(self, fn: Callable, known: Mapping[str, Any], rows: Mapping[str, RowBlock]) -> Trace:
        return prune_subsample_sites(poutine.trace(self._seeing(fn, known, rows)).get_trace())

    def _seeing(
        self, fn: Callable, known: Mapping[str, Any] | None = None, rows: Mapping[str, RowBlock] | None = None
    ) -> Callable:
        """A function that sees these rows, by default the first block of them, and the values of what is known."""
        rows, trace = self.row_blocks[0] if rows is None else rows, Trace()
        for name, site in (known or {}).items():
            trace.add_node(name, **site)
        for name, site in self._subsamples.items():
            trace.add_node(name, **{**site, "value": rows[name].indices if name in rows else site["value"]})
        return poutine.replay(fn, trace=trace)

    # Rows.

    def _find_rows(self, sites: Mapping[str, Any]) -> None:
        """Finds out which plates are walked through, and their blocks of rows; of others every run sees the same rows."""
        vectorised = {f.name for site in sites.values() for f in site["cond_indep_stack"] if f.vectorized}
        self._subsamples = {n: s for n, s in sites.items() if isinstance(s["fn"], _Subsample)}
        self.sizes: dict[str, int] = {}
        self.coords: dict[str, np.ndarray] = {}
        self.sequential: list[str] = []
        blocks = []
        for name, site in self._subsamples.items():
            size, count = site["fn"].size, len(site["value"])
            self.coords[name] = numpy(site["value"])
            if count == size or site["fn"].subsample_size is None:
                continue
            if name in vectorised:
                self.sizes[name], self.coords[name] = size, np.arange(size)
                blocks.append([(name, rows) for rows in _row_blocks(size, count, site["value"].device)])
            else:
                self.sequential.append(name)
        self.row_blocks = [dict(block) for block in product(*blocks)]

    # Given draws.

    def _check_given(self, sites: Mapping[str, Any], given: Mapping[str, Tensor]) -> None:
        for name in given:
            fn = sites[name]["fn"]
            wanted = fn.batch_shape + fn.event_shape
            if given[name][0].numel() != wanted.numel():
                found = tuple(given[name].shape[1:])
                raise ValueError(f"Each draw of {name!r} is wanted as {tuple(wanted)}, but found {found}.")
            walked = [f.name for f in sites[name]["cond_indep_stack"] if f.name in self.sizes]
            if walked:
                raise ValueError(
                    f"The draws of {name!r} lie in the plate {walked[0]!r}, which the model subsamples, so that nobody knows "
                    "to which rows they belong. Give the model all rows, without subsample_size."
                )

    def _given(self, given: Mapping[str, Tensor]) -> Callable[[slice, bool], Callable]:
        """A guide for each block of given draws."""

        def block(draws: slice, vectorised: bool) -> Callable:  # noqa: FBT001
            def guide() -> None:
                for name, values in given.items():
                    value, event_dim = values[draws], self.event_dims[name]
                    if vectorised:
                        value = value.reshape(
                            len(value), *(1,) * (self.nesting + 1 + event_dim - value.dim()), *value.shape[1:]
                        )
                    else:
                        value = value[0]
                    pyro.sample(name, Delta(value, event_dim=event_dim).mask(False))

            return guide

        return block


@dataclass(frozen=True)
class ReplayBlock:
    """One block of draws over one block of rows.

    Attributes:
        walk: of which this is a part.
        draws: which draws these are.
        rows: the rows of each plate that is walked through.
        model: the model's sites that no earlier run of these draws has shown.
        guide: the guide's.
        again: runs the model under other handlers, with the same latent variables but some; gives all its sites.
    """

    walk: Replay
    draws: slice
    rows: Mapping[str, RowBlock]
    model: Mapping[str, Any]
    guide: Mapping[str, Any]
    again: Callable[..., Mapping[str, Any]]

    def predict(self) -> Mapping[str, Any]:
        """The model's sites with the same latent variables, but what it observes drawn."""
        return self.again(handlers.unobserving()(self.walk.model))

    def summed_out(self, hidden: Collection[str], name: str) -> Tensor:
        """The log probability (nats) of an observed site with the discrete variables of its rows summed out."""
        sites = self.again(_enumerating(self.walk.model, hidden, self.walk.nesting), hidden)
        terms = [scale_and_mask(sites[n]["fn"].log_prob(sites[n]["value"]), mask=sites[n]["mask"]) for n in (*hidden, name)]
        log_p = sum(terms[1:], terms[0])
        return log_p.logsumexp(list(range(log_p.dim() - self.walk.nesting - 1)))

    def value(self, name: str, site: Mapping[str, Any]) -> Shaped:
        """A site's value for its new rows."""
        if name not in self.walk.event_dims:
            raise ValueError(
                f"The model has the site {name!r} in some runs only, which ArviZ cannot hold: leave it out of groups."
            )
        return self._shaped(site["value"], site, self.walk.event_dims[name])

    def log_prob(self, site: dict[str, Any], *, scaled: bool) -> Shaped:
        """A site's masked log probability (nats) for its new rows.

        Args:
            site: of a model or a guide.
            scaled: whether scales count, those of plates aside that are walked through.
        """
        scale = site["scale"] if scaled else 1.0
        for frame in site["cond_indep_stack"]:
            if scaled and frame.name in self.rows:
                scale = scale * (frame.size / self.walk.sizes[frame.name])
        if "unscaled_log_prob" not in site:
            site["unscaled_log_prob"] = site["fn"].log_prob(site["value"])
        return self._shaped(
            scale_and_mask(site["unscaled_log_prob"], scale, site["mask"]), site, self.walk.loose.get(site["name"], 0)
        )

    def _shaped(self, value: Tensor, site: Mapping[str, Any], event_dim: int) -> Shaped:
        n = self.draws.stop - self.draws.start
        frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized and f.name != sites.PARTICLES}
        left = -self.walk.nesting - 1
        value = value.reshape((1,) * (-left + event_dim - value.dim()) + value.shape)
        batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
        sizes = {dim: frame.size for dim, frame in frames.items()} | {left: n}
        value = value.expand([sizes.get(dim, batch[dim]) for dim in range(left, 0)] + list(event))
        plates = [frames[dim] for dim in sorted(frames)]
        value = value.reshape([n, *(frame.size for frame in plates), *event])
        new = [self.rows[frame.name].new if frame.name in self.rows else slice(None) for frame in plates]
        return value[(slice(None), *new)], plates

    def places(self, plates: list[Any]) -> tuple[slice, ...]:
        """Where the new rows of these plates go among all."""
        return tuple(self.rows[frame.name].to if frame.name in self.rows else slice(None) for frame in plates)


def _enumerating(model: Callable, hidden: Collection[str], nesting: int) -> Callable:
    """The model with all values of discrete variables side by side, left of the particles."""

    def choose(site: Any) -> Any:
        return {"enumerate": "parallel" if site["name"] in hidden else None}

    return poutine.enum(poutine.infer_config(model, choose), first_available_dim=-nesting - 2)


def numpy(value: Tensor) -> np.ndarray:
    """A tensor as an array, without gradient and on the CPU."""
    return value.detach().cpu().numpy()


def _row_blocks(size: int, count: int, device: torch.device) -> Iterator[RowBlock]:
    """All rows, so many at a time; the last block, which must be as long, begins with old ones."""
    for start in range(0, size, count):
        first = min(start, size - count)
        indices = torch.arange(first, first + count, device=device)
        yield RowBlock(indices, slice(start - first, count), slice(start, first + count))


def _given_trace(given: Mapping[str, Tensor]) -> Trace:
    """The first of given draws, as if a guide had drawn it."""
    trace = Trace()
    for name, values in given.items():
        trace.add_node(name, type="sample", name=name, is_observed=False, value=values[0], infer={}, cond_indep_stack=())
    return trace
