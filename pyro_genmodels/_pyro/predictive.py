r"""Replicated data: samples from a model and the data it observes, as two matrices with one row per row of the data.

The model runs under `draw_replicates`, so that each observed site has a sample and a datum,

.. math:: \tilde x_n \sim p(x \mid c_n), \qquad x_n \text{ as observed,}

and all observed sites of a row are flattened and joined. Masked values are 0 on both sides. If integers are rounded from
reparametrised samples (`Dequantized`), the samples before rounding are available with their gradient, and the data with noise.
"""

from __future__ import annotations

__all__ = [
    "ReplicatedData",
    "data_plate",
    "draw_replicates",
    "embedded_context",
    "is_rounded",
    "log_probs_without_gradient",
    "observed_and_drawn",
    "observed_sites",
    "replicated_data",
    "zero_masked",
]  # fmt: skip

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_genmodels._pyro import handlers, sites, traces, wrappers
from pyro_genmodels.utils.distributions import unwrap


@dataclass(frozen=True)
class ReplicatedData:
    """Samples from a model, and its data.

    Attributes:
        draws: samples, (particles, rows, d), with their graph.
        data: observed values, (rows, d).
        plate: name of the data's plate.
        dim: negative batch dimension of that plate.
        weight: weight of a row in a sum over all data: 1, or more if the plate is subsampled.
    """

    draws: Tensor
    data: Tensor
    plate: str
    dim: int
    weight: float


def replicated_data(trace: Trace, rows: int | None, context: Tensor | None = None, *, rounded: bool = True) -> ReplicatedData:
    """Return the samples and the data in a trace of a model under `draw_replicates`, possibly with many particles.

    Args:
        trace: trace of that run.
        rows: number of rows of the data; None takes the outermost plate around all observed sites.
        context: what each row is conditioned on, (rows, c), which is appended on both sides.
        rounded: True to return integers rounded; False to return them as `observed_and_drawn` does.

    Raises:
        ValueError: if the model observes nothing, has no plate around all observed sites, or has a `pyro.factor`.
    """
    observed = observed_sites(trace)
    plate = data_plate(observed, rows)
    draws, data = [], []
    for site in observed.values():
        real, drawn = (sites.observed_value(site), site["value"]) if rounded else observed_and_drawn(site)
        drawn, real = zero_masked(site, drawn, real.to(drawn.device).expand(drawn.shape))
        draws.append(_as_matrix(drawn, site, plate.dim))
        data.append(_as_matrix(real, site, plate.dim)[0])
    if context is not None:
        draws.append(context.expand(len(draws[0]), *context.shape))
        data.append(context)
    dtype = torch.get_default_dtype()
    for part in draws + data:
        dtype = torch.promote_types(dtype, part.dtype)
    drawn, real = (torch.cat([part.to(dtype) for part in parts], -1) for parts in (draws, data))
    return ReplicatedData(drawn, real, plate.name, plate.dim, _row_weight(observed, plate))


def observed_sites(trace: Trace) -> dict[str, Any]:
    """Return the sites of a run under `draw_replicates` at which a value was sampled in place of an observed one, by name.

    Raises:
        ValueError: if there is none, or if the model has a `pyro.factor`.
    """
    observed = {name: site for name, site in traces.sample_sites(trace).items() if sites.was_observed(site)}
    if factors := [name for name, site in observed.items() if isinstance(unwrap(site["fn"]), Unit)]:
        raise ValueError(
            f"All observed sites of the model must be sampled, but {factors[0]!r} is a pyro.factor, which has a weight and no "
            "samples. Write the term as a pyro.sample, or train by Trace_ELBO."
        )
    if not observed:
        raise ValueError("The model's observed sites must be sampled, but it has none: add pyro.sample(..., obs=x).")
    return observed


class _UnroundedMessenger(Messenger):
    """Handler that keeps the reparametrised samples from which integers are rounded."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and is_rounded(msg):
            fn: Any = unwrap(msg["fn"])
            msg["infer"]["unrounded"] = wrappers.map_inner(msg["fn"], lambda dequantized: dequantized.base).rsample()
            msg["value"], msg["done"] = fn.quantize(msg["infer"]["unrounded"].detach()), True


def draw_replicates(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model with its observed sites sampled, such that `replicated_data` can read its trace.

    In addition to `handlers.draw_observed`, rounded integers keep the samples they were rounded from.
    """
    drawn = handlers.draw_observed(model)
    return lambda *args, **kwargs: _UnroundedMessenger()(lambda: drawn(*args, **kwargs))()  # handlers have a keyword `context`


def is_rounded(site: Mapping[str, Any]) -> bool:
    """Return True if the integers sampled at an observed site are rounded from samples that carry gradients."""
    fn: Any = unwrap(site["fn"])
    return bool(getattr(fn, "is_dequantized", False) and fn.base.has_rsample and sites.was_observed(site))


def observed_and_drawn(site: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the observed and the sampled value of a site; if `is_rounded`, with noise and before rounding."""
    fn: Any = unwrap(site["fn"])
    observed = sites.observed_value(site)
    return (fn.dequantize(observed)[1], site["infer"]["unrounded"]) if is_rounded(site) else (observed, site["value"])


def embedded_context(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the context of each row as a family's networks see it, (rows, c); None for a model that is no family's."""
    if not traces.is_family(model):
        return None
    context = inspect.signature(model).bind(*args, **kwargs).arguments.get("context")
    embedded = model.__self__.embed(context)
    return None if embedded is None else embedded.detach().flatten(1)


def log_probs_without_gradient(
    trace: Trace, plate: str, dim: int, shape: Sequence[int], log_prob: Callable[[str, Any, Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the log densities of samples without gradient, as far as they depend on parameters (for the score function).

    Args:
        trace: trace of a run under `draw_replicates`.
        plate: name of the data's plate.
        dim: negative batch dimension of that plate.
        shape: numbers of particles and rows.
        log_prob: function from a site's name, its distribution without masks and its value to the log density (nats).

    Returns:
        The sum of those inside the plate, (particles, rows), and of those outside, (particles,); None if there is none.
    """
    per_row: Tensor | None = None
    shared: Tensor | None = None
    for name, site in traces.sample_sites(trace).items():
        if site["fn"].has_rsample or site["is_observed"] or is_rounded(site):
            continue
        log_p = log_prob(name, wrappers.without_masks(site["fn"]), site["value"].detach())
        if not log_p.requires_grad:
            continue
        dims = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
        particles_dim = dims.get(sites.PARTICLES, -max(log_p.dim(), -dim) - 1)
        if plate in dims:
            term = traces.sum_to_dims(log_p, (particles_dim, dim)).expand(*shape)
            per_row = term if per_row is None else per_row + term
        else:
            term = traces.sum_to_dims(log_p, (particles_dim,)).expand(shape[0])
            shared = term if shared is None else shared + term
    return per_row, shared


def data_plate(observed: Mapping[str, Any], rows: int | None) -> Any:
    """Return the frame of the data's plate: the outermost around all these sites, if possible of this many rows.

    Raises:
        ValueError: if no plate is around all sites.
    """
    stacks = [site["cond_indep_stack"] for site in observed.values()]
    shared = [f for f in stacks[0] if f.vectorized and f.name != sites.PARTICLES and all(f in stack for stack in stacks)]
    candidates = [f for f in shared if f.size == rows] or shared
    if not candidates:
        found = sorted({f"{f.name} ({f.size})" for stack in stacks for f in stack})
        raise ValueError(
            f"Wanted a plate of the data's rows around all observed sites, {', '.join(map(repr, observed))}, but found "
            f"{', '.join(found) or 'no plates'}. Write them inside one `with pyro.plate('data', len(x)):`."
        )
    return min(candidates, key=lambda f: f.dim)


def zero_masked(site: Mapping[str, Any], *values: Tensor) -> tuple[Tensor, ...]:
    """Return values of a site with 0 where it is masked."""
    mask = sites.mask_of(site)
    if mask is None:
        return values
    mask = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return tuple(torch.where(mask, value, torch.zeros_like(value)) for value in values)


def _as_matrix(value: Tensor, site: Any, dim: int) -> Tensor:
    """Return values (batch..., *event_shape) as (particles, rows, d)."""
    axis = dim - site["fn"].event_dim
    particles = [f.dim - site["fn"].event_dim for f in site["cond_indep_stack"] if f.name == sites.PARTICLES]
    value = value.movedim((particles[0], axis), (0, 1)) if particles else value.movedim(axis, 0)[None]
    return value.reshape(*value.shape[:2], -1)


def _row_weight(observed: Mapping[str, Any], plate: Any) -> float:
    """Return the scale of the data's plate times that of `poutine.scale` around all, as the mean over the sites."""
    scales = []
    for site in observed.values():
        inner = prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.name != plate.name and f.full_size)
        scales.append(float(torch.as_tensor(site["scale"]).float().mean()) / inner)
    return sum(scales) / len(scales)
