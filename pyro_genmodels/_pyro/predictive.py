r"""What a model draws beside what it observes: two matrices, a row for each row of the data's plate.

The model runs as `replicating` has it, so that at each observed site there is a draw beside the datum,

.. math:: \tilde x_n \sim p(x \mid c_n), \qquad x_n \text{ as observed,}

and all observed sites of a row are joined, flattened. A masked value is 0 on both sides, and so tells nothing. Integers that
are rounded from reparametrised draws (`Dequantized`) can be had before they are, with their gradient, and the data with noise.
"""

from __future__ import annotations

__all__ = [
    "ReplicatedData",
    "both_of",
    "conditions",
    "is_rounded",
    "masked",
    "observed_sites",
    "plate_of",
    "replicated_data",
    "replicating",
    "scores",
]  # fmt: skip

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.utils.distributions import unwrap


@dataclass(frozen=True)
class ReplicatedData:
    """Draws and data.

    Attributes:
        draws: (particles, rows, d), with their graph.
        data: (rows, d).
        plate: the data's, by name.
        dim: of that plate, negative.
        weight: of a row in a sum over all data: 1, or more where the plate is of more rows than are present.
    """

    draws: Tensor
    data: Tensor
    plate: str
    dim: int
    weight: float


def replicated_data(trace: Trace, rows: int | None, given: Tensor | None = None, *, rounded: bool = True) -> ReplicatedData:
    """Reads them from a run of a model under `replicating`, also of many particles.

    Args:
        trace: of that run.
        rows: how many rows the data have; None takes the outermost plate around all observed sites.
        given: what each row is conditioned on, (rows, c), which then stands on both sides.
        rounded: whether integers are; else see `both_of`.

    Raises:
        ValueError: without observed sites; without one plate around them; if the model has a `pyro.factor`, by which nothing
            can be drawn.
    """
    sites = observed_sites(trace)
    plate = plate_of(sites, rows)
    draws, data = [], []
    for site in sites.values():
        seen, drawn = (site["infer"]["obs"], site["value"]) if rounded else both_of(site)
        seen = seen.to(drawn.device).expand(drawn.shape)
        drawn, seen = masked(site, drawn, seen)
        draws.append(_matrix(drawn, site, plate.dim))
        data.append(_matrix(seen, site, plate.dim)[0])
    if given is not None:
        draws.append(given.expand(len(draws[0]), *given.shape))
        data.append(given)
    dtype = torch.promote_types(_common(draws + data), torch.get_default_dtype())
    drawn, seen = (torch.cat([part.to(dtype) for part in parts], -1) for parts in (draws, data))
    return ReplicatedData(drawn, seen, plate.name, plate.dim, _weight(sites, plate))


def observed_sites(trace: Trace) -> dict[str, Any]:
    """The sites at which a run under `replicating` has drawn beside what was observed, by name.

    Raises:
        ValueError: if there is none, or if the model has a `pyro.factor`.
    """
    sites = {name: site for name, site in traces.sample_sites(trace).items() if site["infer"].get("was_observed")}
    factors = [name for name, site in sites.items() if isinstance(unwrap(site["fn"]), Unit)]
    if factors:
        raise ValueError(
            f"Draws are wanted of the whole model, but {factors[0]!r} is a pyro.factor, which weighs draws and makes none. Say "
            "what it stands for with pyro.sample, or train by Trace_ELBO."
        )
    if not sites:
        raise ValueError("Wanted draws of what the model observes, but it observes nothing: pyro.sample(..., obs=x).")
    return sites


class _Unrounded(Messenger):
    """Keeps, where integers are rounded from draws with gradients, what they were before."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["done"] and is_rounded(msg):
            fn: Any = unwrap(msg["fn"])
            msg["infer"]["unrounded"] = fn.base.rsample()
            msg["value"], msg["done"] = fn.quantize(msg["infer"]["unrounded"].detach()), True


def replicating(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model as it draws what it observes, to be read by `replicated_data`."""
    drawn = handlers.drawing_observed(model)
    return lambda *args, **kwargs: _Unrounded()(lambda: drawn(*args, **kwargs))()  # handlers have a keyword `context`


def is_rounded(site: Mapping[str, Any]) -> bool:
    """Whether integers were drawn at an observed site that before they were rounded carry gradients."""
    fn = unwrap(site["fn"])
    return bool(getattr(fn, "is_dequantized", False) and fn.base.has_rsample and site["infer"].get("was_observed"))


def both_of(site: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What was observed and what was drawn at a site; where `is_rounded`, with noise, and as it was before."""
    fn: Any = unwrap(site["fn"])
    observed = site["infer"]["obs"]
    return (fn.dequantize(observed)[1], site["infer"]["unrounded"]) if is_rounded(site) else (observed, site["value"])


def conditions(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """What a family is told of each row, (rows, c), as its networks are given it; nothing of another model."""
    if not traces.is_family(model):
        return None
    context = inspect.signature(model).bind(*args, **kwargs).arguments.get("context")
    embedded = model.__self__.embed(context)
    return None if embedded is None else embedded.detach().flatten(1)


def scores(
    run: Trace, plate: str, dim: int, shape: Sequence[int], log_prob: Callable[[str, Any, Tensor], Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Log densities of a run's draws that carry no gradient, where these depend on parameters.

    Args:
        run: under `replicating`.
        plate: the data's, by name.
        dim: of that plate.
        shape: particles and rows.
        log_prob: name, distribution out of its masks and value of a site -> its log density.

    Returns:
        Those of single rows, (particles, rows), and of what rows share, (particles,); None where there are none.
    """
    own: Tensor | None = None
    shared: Tensor | None = None
    for name, site in traces.sample_sites(run).items():
        fn = site["fn"]
        if fn.has_rsample or site["is_observed"] or is_rounded(site):
            continue
        while isinstance(fn, MaskedDistribution):
            fn = fn.base_dist
        log_p = log_prob(name, fn, site["value"].detach())
        if not log_p.requires_grad:
            continue
        frames = {f.name: f.dim for f in site["cond_indep_stack"] if f.vectorized}
        first = frames.get(traces.PARTICLES, -max(log_p.dim(), -dim) - 1)
        if plate in frames:
            cells = traces.sum_to_dims(log_p, (first, dim)).expand(*shape)
            own = cells if own is None else own + cells
        else:
            cells = traces.sum_to_dims(log_p, (first,)).expand(shape[0])
            shared = cells if shared is None else shared + cells
    return own, shared


def plate_of(sites: Mapping[str, Any], rows: int | None) -> Any:
    """The plate of the data's rows: around all of these sites, of that many rows if one is, else the outermost.

    Raises:
        ValueError: if there is none.
    """
    stacks = [site["cond_indep_stack"] for site in sites.values()]
    shared = [f for f in stacks[0] if f.vectorized and f.name != traces.PARTICLES and all(f in stack for stack in stacks)]
    fitting = [f for f in shared if f.size == rows] or shared
    if not fitting:
        found = sorted({f"{f.name} ({f.size})" for stack in stacks for f in stack})
        raise ValueError(
            f"Wanted a plate of the data's rows around all observed sites, {', '.join(map(repr, sites))}, but found "
            f"{', '.join(found) or 'no plates'}. Write them inside one `with pyro.plate('data', len(x)):`."
        )
    return min(fitting, key=lambda f: f.dim)


def masked(site: Mapping[str, Any], *values: Tensor) -> tuple[Tensor, ...]:
    """Values of a site, with 0 where it is masked."""
    mask = _mask(site)
    if mask is None:
        return values
    mask = mask.reshape(mask.shape + (1,) * site["fn"].event_dim)
    return tuple(torch.where(mask, value, torch.zeros_like(value)) for value in values)


def _mask(site: Any) -> Tensor | None:
    """Where a site's values count, (batch...), or None for everywhere."""
    masks = [site["mask"]] if site["mask"] is not None else []
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution):
        masks.append(fn._mask)
        fn = fn.base_dist
    if not masks:
        return None
    shape = site["value"].shape[: site["value"].dim() - fn.event_dim]
    both = torch.ones(shape, dtype=torch.bool, device=site["value"].device)
    for mask in masks:
        both = both & torch.as_tensor(mask, device=both.device)
    return both


def _matrix(value: Tensor, site: Any, dim: int) -> Tensor:
    """Values (batch..., *event_shape) as (particles, rows, d)."""
    at = dim - site["fn"].event_dim
    particles = [f.dim - site["fn"].event_dim for f in site["cond_indep_stack"] if f.name == traces.PARTICLES]
    value = value.movedim((particles[0], at), (0, 1)) if particles else value.movedim(at, 0)[None]
    return value.reshape(*value.shape[:2], -1)


def _common(values: list[Tensor]) -> torch.dtype:
    dtype = torch.float16
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _weight(sites: Mapping[str, Any], plate: Any) -> float:
    """The scale of the data's plate, and of `poutine.scale` around all, the mean of the sites'."""
    scales = []
    for site in sites.values():
        inner = prod(f.full_size / f.size for f in site["cond_indep_stack"] if f.name != plate.name and f.full_size)
        scales.append(float(torch.as_tensor(site["scale"]).float().mean()) / inner)
    return sum(scales) / len(scales)
