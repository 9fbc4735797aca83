"""The sites and plates of a model, as one run of the model and its guide shows them."""

from __future__ import annotations

__all__ = ["ModelLayout", "SubsampledRows"]

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample

from pyro_genmodels._pyro import sites, traces
from pyro_genmodels._pyro.plates import measure_plates
from pyro_genmodels._pyro.sites import is_deterministic, plate_depth, plate_frames
from pyro_genmodels._pyro.subsampling import RowBlock, row_blocks
from pyro_genmodels.inference_data.arrays import to_numpy


class SubsampledRows:
    """The plates of a model, and blocks of rows that together are all rows of the plates that it subsamples.

    Args:
        sites: all sites of a run, by name; of a plate in model and guide, the one that chooses rows.

    Attributes:
        subsamples: sites at which plates choose their rows, by name of the plate.
        sizes: number of rows of each plate that is subsampled and run block by block.
        coords: indices of the rows of each plate that appear in the result.
        sequential: plates that are subsampled in a Python loop; only one subsample of these is run.
        blocks: combinations of one block of rows per plate in sizes.
    """

    def __init__(self, sites: Mapping[str, Any]) -> None:
        vectorized = {frame.name for site in sites.values() for frame in site["cond_indep_stack"] if frame.vectorized}
        self.subsamples = {name: site for name, site in sites.items() if site_is_subsample(site)}
        self.sizes: dict[str, int] = {}
        self.coords: dict[str, np.ndarray] = {}
        self.sequential: list[str] = []
        blocks = []
        for name, site in self.subsamples.items():
            size, count = site["fn"].size, len(site["value"])
            self.coords[name] = _row_labels(site["value"], count)
            if count == size or site["fn"].subsample_size is None:
                continue
            if name in vectorized:
                self.sizes[name], self.coords[name] = size, np.arange(size)
                blocks.append([(name, block) for block in row_blocks(size, count, site["value"].device)])
            else:
                self.sequential.append(name)
        self.coords |= {name: np.arange(size) for name, size in _plate_sizes(sites).items() if name not in self.coords}
        self.blocks: list[dict[str, RowBlock]] = [dict(block) for block in product(*blocks)]


class ModelLayout:
    """The sites of a model and its guide, and the meaning of their dimensions.

    Args:
        model_trace: trace of the model, run with the guide's latent variables.
        guide_trace: trace of the guide.
        guide_is_given: True if draws stand in place of a guide; then guide_trace only holds the first of them.

    Attributes:
        model_trace: trace of the model.
        sites: all sites, the guide's too.
        nesting: number of batch dimensions that plates take.
        extra_event_dims: number of batch dimensions of a site outside all plates. They count as dimensions of its event.
        event_dims: number of event dimensions of each site's value.
        latents: names of the model's latent variables.
        reparametrised: names of those that `poutine.reparam` has replaced by values computed from the others.
        weighted: names of reparametrised variables whose values are samples of another distribution than their prior.
        unguided: sites of the latent variables that the guide leaves to the model.
        observed: observed sites of the model.
        factors: names of the sites of `pyro.factor`.
        rows: plates and their rows.
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, *, guide_is_given: bool) -> None:
        measure_plates(model_trace, guide_trace)
        self.model_trace, self._guide_trace, self._guide_is_given = model_trace, guide_trace, guide_is_given
        model_sites = traces.sample_sites(model_trace)
        guide_sites = {} if guide_is_given else traces.sample_sites(guide_trace)
        self.sites = guide_sites | model_sites
        self.nesting = max(map(plate_depth, self.sites.values()), default=0)
        variables = {name: site for name, site in self.sites.items() if not site_is_subsample(site)}
        self.extra_event_dims = {
            name: len(site["fn"].batch_shape)
            for name, site in variables.items()
            if not (_is_factor(site) or is_deterministic(site) or plate_depth(site))
        }
        self.event_dims = {name: self._event_dim(name, site) for name, site in variables.items()}
        self.latents = traces.latents(prune_subsample_sites(model_trace))
        self.reparametrised = traces.reparametrised(model_trace)
        self.weighted = [name for name in self.reparametrised if sites.is_weighted(self.sites[name])]
        self.unguided = {name: self.sites[name] for name in self.latents if name not in guide_trace.nodes}
        self.observed = {n: self.sites[n] for n in traces.observed(model_trace) if not _is_factor(self.sites[n])}
        self.factors = [name for name, site in self.sites.items() if _is_factor(site)]
        self.rows = SubsampledRows(self.sites | _chosen_rows(guide_sites))

    def joined(self, runs: Iterable[tuple[Trace, Trace]]) -> ModelLayout:
        """Return the layout with the sites of further runs as well: some rows may have sites that others lack.

        Args:
            runs: pairs (guide trace, model trace).
        """
        guide_trace, model_trace = self._guide_trace.copy(), self.model_trace.copy()
        for pair in runs:
            for whole, part in zip((guide_trace, model_trace), pair, strict=True):
                whole.nodes.update({name: site for name, site in part.nodes.items() if name not in whole.nodes})
        return ModelLayout(model_trace, guide_trace, guide_is_given=self._guide_is_given)

    @property
    def has_latents(self) -> bool:
        """True if the model has latent variables, sampled or computed by `poutine.reparam`."""
        return bool(self.latents or self.reparametrised)

    @property
    def has_batch_outside_plates(self) -> bool:
        """True if a site outside all plates has a batch shape, so that its dimensions leave no room for particles."""
        return any(self.extra_event_dims.values())

    @property
    def last_observed(self) -> str | None:
        """Name of the only observed site, if it is the model's last site, so that nothing depends on its value."""
        return next(iter(self.observed)) if [*self.observed] == [*self.sites][-1:] else None

    def subsampled_plate(self, name: str) -> str | None:
        """Return the plate around a site that is run block by block, or None."""
        return next((frame.name for frame in self.sites[name]["cond_indep_stack"] if frame.name in self.rows.sizes), None)

    def _event_dim(self, name: str, site: Mapping[str, Any]) -> int:
        if is_deterministic(site):  # Pyro counts all its dimensions as the event's, also those of plates
            return max(site["value"].dim() - plate_depth(site), 0)
        return site["fn"].event_dim + self.extra_event_dims.get(name, 0)


def _plate_sizes(sites: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of rows of each plate around these sites."""
    return {frame.name: frame.size for site in sites.values() for frame in plate_frames(site)}


def _chosen_rows(guide_sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sites at which plates of a guide choose rows, which the model takes even if its plate chooses none."""
    subsamples = {name: site for name, site in guide_sites.items() if site_is_subsample(site)}
    return {name: site for name, site in subsamples.items() if site["fn"].subsample_size is not None}


def _row_labels(rows: Any, count: int) -> np.ndarray:
    """Return the indices of a plate's rows, or 0 to count - 1 if the plate was given the data instead of indices."""
    if isinstance(rows, (torch.Tensor, Sequence)):
        labels = to_numpy(rows) if isinstance(rows, torch.Tensor) else np.asarray(rows)
        if labels.ndim == 1 and labels.dtype.kind in "iu":
            return labels
    return np.arange(count)


def _is_factor(site: Mapping[str, Any]) -> bool:
    return isinstance(site["fn"], Unit)
