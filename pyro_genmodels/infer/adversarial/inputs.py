"""Inputs of a critic, read from the traces of a model and its guide.

A model runs under `draw_replicates`, so that each observed site has a sample next to the observed value. Rows of the data's
plate come first in every tensor; several sites are flattened and joined.
"""

from __future__ import annotations

__all__ = [
    "Observations", "draw_observations", "guide_sites", "joined_latents", "log_q_without_gradient", "matching_sites",
    "num_rows", "observed", "plate_size", "rows_of_batch",
]  # fmt: skip

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.predictive import (
    data_plate,
    draw_replicates,
    is_rounded,
    log_probs_without_gradient,
    observed_and_drawn,
    observed_sites,
    zero_masked,
)
from pyro_genmodels._pyro.sites import observed_value
from pyro_genmodels.utils.distributions import density_of, unwrap
from pyro_genmodels.utils.errors import listed


@dataclass(frozen=True)
class Observations:
    """A run of a model that samples its observed sites.

    Attributes:
        trace: trace of the run.
        plate: frame of the data's plate.
        real: observed values, (rows, ...).
        fake: sampled values, (rows, ...).
        context: other arguments of the model with one row per datum, (rows, ...) each.
    """

    trace: Trace
    plate: Any
    real: Tensor
    fake: Tensor
    context: tuple[Tensor, ...]


def draw_observations(
    model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], *, rounded: bool = False
) -> Observations:
    """Run a model with its observed sites sampled.

    Args:
        model: the model.
        args: its arguments, the first of which is the data.
        kwargs: its keyword arguments.
        rounded: True to return samples of integers rounded, and both half a level above the integer; False to return data with
            noise and samples before rounding, as the critic sees them.
    """
    trace = traces.trace_of(draw_replicates(model), args, kwargs)
    sites = observed_sites(trace)
    plate = data_plate(sites, num_rows(args))
    pairs = [_as_network_inputs(site, rounded=rounded) for site in sites.values()]
    dims = [site["fn"].event_dim for site in sites.values()]
    real, fake = (_joined(list(zip(values, dims, strict=True)), plate) for values in zip(*pairs, strict=True))
    return Observations(trace, plate, real, fake, _context(args, kwargs, sites, len(real)))


def log_q_without_gradient(trace: Trace, plate: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the log probabilities (nats) of all samples without gradient, for the score function.

    Returns:
        Those inside the plate, (rows,), and the sum of those outside, (); None if there are none.
    """

    def log_prob(name: str, fn: Any, value: Tensor) -> Tensor:
        density, advice = density_of(fn)
        if density != "exact":
            raise ValueError(
                f"Adversarial wants samples with gradients, or exact densities for the score function, but site {name!r} holds "
                f"{type(unwrap(fn)).__name__}, which has neither. {advice}"
            )
        return fn.log_prob(value)

    per_row, shared = log_probs_without_gradient(trace, plate.name, plate.dim, (1, plate.size), log_prob)
    return None if per_row is None else per_row[0], None if shared is None else shared[0]


def guide_sites(guide_trace: Trace, plate: Any, owner: str) -> dict[str, Any]:
    """Return the guide's sites by name. Each must lie inside the data's plate and be sampled with gradients."""
    sites = {name: site for name, site in traces.sample_sites(guide_trace).items() if not site["is_observed"]}
    if not sites:
        raise ValueError(f"{owner} wants a guide that samples latent variables, but this one samples none. Pass guide=.")
    for name, site in sites.items():
        if all(f.name != plate.name for f in site["cond_indep_stack"]):
            raise ValueError(
                f"{owner} wants latent variables of single rows, but {name!r} lies outside the data's plate. Use "
                "PosteriorPairing()."
            )
        if not site["fn"].has_rsample:
            raise ValueError(
                f"{owner} wants a guide whose samples carry gradients, but site {name!r} holds a "
                f"{type(unwrap(site['fn'])).__name__}."
            )
    return sites


def matching_sites(names: Mapping[str, Any], trace: Trace) -> dict[str, Any]:
    """Return the model's sites that have the names of the guide's sites."""
    sites = traces.sample_sites(trace)
    if missing := [name for name in names if name not in sites]:
        raise ValueError(f"The guide samples {listed(missing)}, which the model does not have.")
    return {name: sites[name] for name in names}


def joined_latents(sites: Mapping[str, Any], plate: Any) -> Tensor:
    """Return the values of sites with the plate's rows first, (rows, ...)."""
    return _joined([(site["value"], site["fn"].event_dim) for site in sites.values()], plate)


def rows_of_batch(site: Mapping[str, Any], dims: tuple[int, ...]) -> Tensor:
    """Return a site's value as a matrix with a row for each index of the negative batch dimensions, outermost first."""
    value, event_dim = site["value"], site["fn"].event_dim
    value = value.reshape((1,) * (event_dim - dims[0] - value.dim()) + value.shape)
    return value.movedim([d - event_dim for d in dims], list(range(len(dims)))).flatten(len(dims)).flatten(0, len(dims) - 1)


def observed(trace: Trace) -> dict[str, Any]:
    """Return the observed sites of a trace by name."""
    return {name: traces.sample_sites(trace)[name] for name in traces.observed(trace)}


def plate_size(plate: Any) -> int:
    """Return the number of rows of all data, which is more than the plate's if it is subsampled."""
    return plate.full_size or plate.size


def num_rows(args: tuple) -> int | None:
    """Return the number of rows of the first argument, if it is a tensor with rows."""
    return len(args[0]) if args and isinstance(args[0], Tensor) and args[0].dim() else None


def _joined(values: list[tuple[Tensor, int]], plate: Any) -> Tensor:
    """Join values (batch..., *event_shape), given with their event dimensions, as (rows, ...)."""
    parts = [value.movedim(plate.dim - event_dim, 0) for value, event_dim in values]
    return parts[0] if len(parts) == 1 else torch.cat([part.reshape(len(part), -1) for part in parts], 1)


def _as_network_inputs(site: Mapping[str, Any], *, rounded: bool) -> tuple[Tensor, ...]:
    """Return the observed and the sampled value, as networks see them: standardised, of one dtype, and 0 where masked."""
    fn: Any = unwrap(site["fn"])
    if rounded and is_rounded(site):  # the middle of a level is inside the support of the base
        real, fake = (value.to(fn.dtype) + 0.5 for value in (observed_value(site), site["value"]))
    else:
        real, fake = observed_and_drawn(site)
    dtype = torch.promote_types(real.dtype, fake.dtype)
    pretransform = getattr(fn.base if is_rounded(site) else fn, "pretransform", None)
    both = (value.to(fake.device, dtype).expand(fake.shape) for value in (real, fake))
    return zero_masked(site, *(both if pretransform is None else map(pretransform, both)))


def _context(args: tuple, kwargs: Mapping[str, Any], sites: Mapping[str, Any], rows: int) -> tuple[Tensor, ...]:
    """Return the model's arguments with one row per datum, except the data.

    The data are the arguments that the model observes unchanged, or else the first one.
    """
    per_row = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim() and len(a) == rows]
    data = [a for a in per_row if any(a is observed_value(site) for site in sites.values())] or per_row[:1]
    return tuple(a for a in per_row if not any(a is part for part in data))
