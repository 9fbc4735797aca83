"""A model as a simulator: draws of its latent variables from their prior, with the observations that follow from them.

A simulator is any model. What is observed may have a density, as at ``pyro.sample("x", dist.Normal(...))``, or be computed by
code that draws random numbers itself, as at ``pyro.deterministic("x", simulate(theta))``.
"""

from __future__ import annotations

__all__ = ["SimulatedModel", "Simulations"]

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.handlers import side_effect_free
from pyro_genmodels._pyro.sites import is_computed
from pyro_genmodels._pyro.vectorize import SHAPE_ERRORS, can_vectorize
from pyro_genmodels.infer.compiled.coordinates import Coordinates, check_same_support
from pyro_genmodels.posteriors.conditioned import ConditionedModel, FreeSites, Simulated
from pyro_genmodels.utils.errors import listed, one_line
from pyro_genmodels.utils.parallel import run_each, seeded, spawn_seeds
from pyro_genmodels.utils.tensors import as_tensor

BLOCK, BLOCK_TOGETHER = 10, 1000
"""Number of simulations of one task, made one by one or together in one run."""
MAX_TRIES = 20
"""Largest number of first runs of a model that fail before its error is raised."""


@dataclass(frozen=True)
class Simulations:
    """Draws of latent variables and observations.

    Attributes:
        values: latent variables and observations, (simulation, ...) by name.
        failures: number of simulations that were left out, by the reason.
    """

    values: Mapping[str, Tensor]
    failures: Counter[str]

    def __len__(self) -> int:
        return len(next(iter(self.values.values()))) if self.values else 0

    @staticmethod
    def joined(parts: Sequence[Simulations]) -> Simulations:
        """Return several as one."""
        filled = [part.values for part in parts if len(part)]
        values = {name: torch.cat([part[name] for part in filled]) for name in (filled[0] if filled else ())}
        return Simulations(values, sum((part.failures for part in parts), Counter[str]()))

    def finite(self) -> Simulations:
        """Return those without NaN and infinity, with the number of the others among the failures."""
        if not len(self):
            return self
        good = torch.stack([x.reshape(len(x), -1).isfinite().all(1) for x in self.values.values()]).all(0)
        lost = len(good) - int(good.sum())
        failures = self.failures + Counter({"NaN or infinite values": lost} if lost else {})
        return Simulations({name: x[good] for name, x in self.values.items()} if lost else self.values, failures)


class SimulatedModel:
    """A model that is run without its observations.

    Args:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: names of the sites that are observed.

    Attributes:
        observed: names of the observed sites.
        shapes: shape of one value of each observed and latent site, by name.
        latents: names of all latent variables, the discrete ones too.
        has_density: True if no observed site is computed by a simulator.
        coordinates: maps between unconstrained coordinates and the continuous latent variables.

    Raises:
        ValueError: if the model lacks an observed site, observes others, has no continuous latent variable, subsamples, or has
            a latent variable whose support or shape depends on others.
    """

    def __init__(self, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], observed: Sequence[str]) -> None:
        self.model, self.args, self.kwargs, self.observed = model, args, dict(kwargs), list(observed)
        with side_effect_free(model):
            first, second = self._first_run(), self._first_run()
        self._check(first)
        first = prune_subsample_sites(first)
        frames = [frame for site in first.nodes.values() for frame in site.get("cond_indep_stack", ())]
        self._nesting = max((-frame.dim for frame in frames if frame.dim is not None), default=0)
        self.latents = [name for name in traces.latents(first) if name not in self.observed]
        sites: dict[str, Any] = {name: first.nodes[name] for name in (*self.latents, *self.observed)}
        self.shapes = {name: site["value"].shape for name, site in sites.items()}
        self.has_density = not any(isinstance(sites[name]["fn"], Simulated) for name in self.observed)
        self._event_dims = {name: site["fn"].event_dim for name, site in sites.items()}
        continuous = [name for name in self.latents if not sites[name]["fn"].support.is_discrete]
        if not continuous:
            raise ValueError("The model has no continuous latent variable, so there is no posterior to learn.")
        transforms = {name: biject_to(sites[name]["fn"].support).inv for name in continuous}
        self.coordinates = Coordinates(transforms, {name: sites[name]["value"] for name in continuous})
        self._check_same(second)
        self._together: bool | None = None

    def given(self, values: Mapping[str, Tensor]) -> ConditionedModel:
        """Return the model conditioned on observations.

        Args:
            values: value of each observed site, by name. NaN marks what is missing, which is masked.
        """
        return ConditionedModel(self.model, values)

    def simulate(
        self,
        number: int,
        latents: Mapping[str, Tensor] | None = None,
        *,
        parallel: bool | None = None,
        n_jobs: int = 1,
        progress: bool = True,
    ) -> Iterator[Simulations]:
        """Yield simulations, some at a time. Those that fail or have NaN are left out and counted.

        Args:
            number: how many.
            latents: values of all latent variables, (number, ...) by name; None draws them from their prior.
            parallel: True to make many in one run, which the model must allow. None does as the last choice did, and finds out
                if there was none.
            n_jobs: number of processes.
            progress: True for a progress bar.
        """
        self._together = self._together if parallel is None else parallel
        together = self._can_run_together()
        size = BLOCK_TOGETHER if together else BLOCK
        starts = range(0, number, size)
        seeds = spawn_seeds(None, len(starts))
        blocks = {}
        for start, seed in zip(starts, seeds, strict=True):
            stop = min(start + size, number)
            blocks[seed] = (stop - start, None if latents is None else {name: x[start:stop] for name, x in latents.items()})

        def task(seed: int) -> Simulations:
            with seeded(seed):
                return self._block(*blocks[seed], together=together)

        for outcome in run_each(task, seeds, n_jobs=n_jobs, progress=progress, description="simulations"):
            if outcome.error is not None:
                raise RuntimeError(f"Simulations cannot be run: {outcome.error}")
            yield outcome.value.finite()

    def draw_latents(self, number: int) -> dict[str, Tensor]:
        """Return draws of all latent variables from their prior, (number, ...) by name. No run goes on after the last one."""
        if self._can_run_together():
            return self._many(number, None, self.latents)
        with side_effect_free(self.model):
            runs = [self._trace(stop_after=self.latents[-1]) for _ in range(number)]
        return {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in self.latents}

    def run_latents(self) -> dict[str, Tensor]:
        """Run the model up to its last latent variable, and return all continuous ones, (...) by name."""
        run = self._trace(stop_after=self.latents[-1])
        return {name: run.nodes[name]["value"] for name in self.coordinates.names}

    def from_table(self, table: Mapping[str, Any]) -> Simulations:
        """Return simulations that were made elsewhere.

        Args:
            table: values of the continuous latent variables and of the observed sites, (simulation, ...) by name.

        Raises:
            ValueError: if names or shapes are not those of the model, or a latent variable lies outside of its support.
        """
        names = [*self.coordinates.names, *self.observed]
        if missing := sorted(set(names) ^ set(table)):
            raise ValueError(
                f"simulations= wants the values of {listed(names)}, each (simulation, ...), but found {listed(table)}: "
                f"{listed(missing)} {'differs' if len(missing) == 1 else 'differ'}."
            )
        values = {name: as_tensor(table[name], "simulations=", floats=torch.get_default_dtype()) for name in names}
        number = {len(x) if x.dim() else 0 for x in values.values()}
        wanted = {name: f"(n, {', '.join(map(str, self.shapes[name]))})".replace(", )", ",)") for name in names}
        if len(number) != 1 or any(x.shape[1:] != self.shapes[name] for name, x in values.items()):
            found = {name: tuple(x.shape) for name, x in values.items()}
            raise ValueError(f"simulations= wants {wanted}, with as many rows each, but found {found}.")
        for name in self.coordinates.names:
            rows = values[name][values[name].reshape(len(values[name]), -1).isfinite().all(1)]  # others are left out below
            inside = self.coordinates.transforms[name].domain.check(rows)
            if not inside.all():
                raise ValueError(
                    f"simulations= has values of {name!r} outside of its support, {self.coordinates.transforms[name].domain}."
                )
        return Simulations(values, Counter()).finite()

    def _can_run_together(self) -> bool:
        """Return True if many simulations can be made in one run."""
        if self._together is None:
            free = FreeSites(self.observed, draws=False)(self.model)
            with side_effect_free(self.model):
                try:
                    self._together = can_vectorize(free, traces.no_latents, self.args, self.kwargs, self._nesting)
                except ArithmeticError:  # of a simulation that fails: it is run by itself, and counted
                    self._together = False
        return self._together

    def _block(self, number: int, latents: Mapping[str, Tensor] | None, *, together: bool) -> Simulations:
        """Return simulations, also those with NaN."""
        names = [*self.latents, *self.observed]
        if together:
            try:
                return Simulations(self._many(number, latents, names), Counter())
            except SHAPE_ERRORS:  # some simulation fails, or the model does not broadcast: each is run by itself
                pass
        runs, failures = [], Counter[str]()
        with side_effect_free(self.model):
            for i in range(number):
                try:
                    runs.append(self._trace(None if latents is None else {name: x[i] for name, x in latents.items()}))
                except Exception as error:  # a simulator can fail in any way: it is counted and reported
                    failures[f"{type(error).__name__}: {one_line(error, 100)}"] += 1
        values = {name: torch.stack([run.nodes[name]["value"] for run in runs]) for name in names} if runs else {}
        return Simulations(values, failures)

    def _many(self, number: int, latents: Mapping[str, Tensor] | None, names: Sequence[str]) -> dict[str, Tensor]:
        """Return values of many simulations made in one run, (number, ...) by name."""
        with side_effect_free(self.model):
            values = {}
            for name, x in (latents or {}).items():
                ones = self._nesting + self._event_dims[name] - len(self.shapes[name])
                values[name] = x.reshape(number, *(1,) * ones, *self.shapes[name])
            trace = self._trace(values or None, plate=traces.particles(number, self._nesting))
        found = {}
        for name in names:
            value: Any = trace.nodes[name]["value"]
            shape = self.shapes[name]
            same = value.numel() == shape.numel() and number != 1
            found[name] = value.reshape(shape).expand(number, *shape) if same else value.reshape(number, *shape)
        return found

    def _first_run(self) -> Trace:
        """Return the trace of a run that does not fail, of a few."""
        for _ in range(MAX_TRIES - 1):
            try:
                return self._trace()
            except (ArithmeticError, RuntimeError, ValueError):  # as some simulations do
                continue
        return self._trace()

    def _trace(self, values: Mapping[str, Tensor] | None = None, *, plate: Any = None, stop_after: str | None = None) -> Trace:
        """Run the model without its observations, and return the trace."""
        free = FreeSites(self.observed)(self.model)

        def run() -> Any:
            return free(*self.args, **self.kwargs)

        bound = run if values is None else poutine.condition(run, data=dict(values))
        bound = bound if plate is None else plate(bound)
        if stop_after is not None:  # inside of the trace, which has recorded the variable by then
            bound = _StopAfter(stop_after)(bound)
        traced = poutine.trace(bound)
        try:
            return traced.get_trace()
        except _StoppedError:
            return traced.trace

    def _check(self, trace: Trace) -> None:
        sites = traces.sample_sites(trace)
        for name, site in sites.items():
            fn: Any = site["fn"]
            if site_is_subsample(site) and fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(f"The plate {name!r} subsamples {fn.subsample_size} of {fn.size} rows. Give it all rows.")
        if unknown := [name for name in self.observed if name not in sites]:
            known = [name for name, site in sites.items() if not site_is_subsample(site)]
            raise ValueError(f"The model has no site {unknown[0]!r} to observe; its sites are {listed(known)}.")
        others = [
            name
            for name, site in sites.items()
            if site["is_observed"] and not is_computed(site) and name not in self.observed and not site_is_subsample(site)
        ]
        if others:
            raise ValueError(
                f"The model observes {listed(others)}, but observed= has {listed(self.observed)} only. Name all of them, or "
                "call the model without these data."
            )

    def _check_same(self, trace: Trace) -> None:
        """Check that shapes and supports of a second run are those of the first."""
        for name, shape in self.shapes.items():
            site: Any = trace.nodes.get(name)
            if site is None or site["value"].shape != shape:
                found = (
                    "is not in every run" if site is None else f"has the shapes {tuple(shape)} and {tuple(site['value'].shape)}"
                )
                raise ValueError(f"The variable {name!r} {found}, and all simulations must have the same variables and shapes.")
        for name, transform in self.coordinates.transforms.items():
            fn: Any = trace.nodes[name]["fn"]
            check_same_support(name, transform.inv, fn.support, torch.empty(self.coordinates.shapes[name]))


class _StoppedError(Exception):
    """The end of a run after the variable that was waited for."""


class _StopAfter(Messenger):
    """Handler that ends a run after one variable is drawn.

    Args:
        name: name of the variable.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == self.name:
            raise _StoppedError
