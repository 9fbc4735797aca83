r"""Traces of a model and its guide, and what objectives, likelihoods and ArviZ read from them.

The guide runs first, :math:`z \sim q(z \mid x)`; the model runs against its draws, so that the log weight of a datum is

.. math:: \log w_n = \log p(x_n, z_n) - \log q(z_n \mid x_n).

Several particles are one run inside an outermost plate.
"""

from __future__ import annotations

__all__ = [
    "PARTICLES",
    "Pair",
    "as_pair",
    "data_plates",
    "is_deterministic",
    "is_family",
    "is_point_mass",
    "latents",
    "log_prob",
    "max_plate_nesting",
    "modules_of",
    "no_latents",
    "observed",
    "particles",
    "plate_depth",
    "run_pair",
    "sample_sites",
    "sum_to_dims",
    "trace_of",
]  # fmt: skip

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

Pair = tuple[Callable[..., Any], Callable[..., Any]]

PARTICLES = "num_particles_vectorized"
"""The plate of particles, by Pyro's own name for it."""


def as_pair(fit: Any) -> Pair:
    """The (model, guide) of whatever offers them: a family, an `SVI`, or such a pair."""
    if isinstance(fit, tuple) and len(fit) == 2 and all(map(callable, fit)):
        return fit
    if callable(getattr(fit, "model", None)) and callable(getattr(fit, "guide", None)):
        return fit.model, fit.guide
    raise TypeError(
        f"Wanted a fit with .model and .guide (a family, an SVI) or a pair (model, guide), but found {type(fit).__name__}."
    )


def no_latents(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latent variables."""


def modules_of(*fns: Any) -> list[nn.Module]:
    """The modules behind callables, under any handlers: themselves, or those whose methods they are."""
    found = [part for fn in map(poutine.unwrap, fns) for part in (fn, getattr(fn, "__self__", None))]
    return list({id(m): m for m in found if isinstance(m, nn.Module)}.values())


def run_pair(
    model: Callable[..., Any], guide: Any, args: tuple, kwargs: Mapping[str, Any], plate: pyro.plate | None = None
) -> tuple[Trace, Trace]:
    """One run of the guide and of the model against it, without log probabilities: (model trace, guide trace).

    Args:
        model: a function with Pyro statements.
        guide: likewise, or a handler that gives both traces.
        args: of both.
        kwargs: of both.
        plate: to run both in, such as `particles`.
    """
    within = plate or (lambda fn: fn)
    bound_model = within(lambda: model(*args, **kwargs))  # Pyro's handlers have a keyword `context` of their own
    bound_guide = within(lambda: guide(*args, **kwargs))
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):
        bound_guide()
        model_trace, guide_trace = messenger.get_traces()  # type: ignore[attr-defined]
    else:
        guide_trace = poutine.trace(bound_guide).get_trace()
        model_trace = poutine.trace(poutine.replay(bound_model, trace=guide_trace)).get_trace()
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def trace_of(fn: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Trace:
    """The trace of one function, without log probabilities."""
    return prune_subsample_sites(poutine.trace(lambda: fn(*args, **kwargs)).get_trace())


def particles(number: int, nesting: int) -> pyro.plate:
    """The plate of that many particles, left of `nesting` dimensions of other plates."""
    return pyro.plate(PARTICLES, number, dim=-nesting - 1)


def is_family(fn: Any) -> bool:
    """Whether a callable is a family's own method: it has an owner with an event shape, a model and a guide."""
    owner = getattr(fn, "__self__", None)
    offers = all(hasattr(owner, name) for name in ("event_shape", "data_support", "model", "guide"))
    return offers and "size" in inspect.signature(fn).parameters


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace, by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def latents(trace: Trace) -> list[str]:
    """The names of the unobserved sites of a trace."""
    return [name for name, site in sample_sites(trace).items() if not site["is_observed"]]


def observed(trace: Trace) -> list[str]:
    """The names of the observed sites of a trace, those of `pyro.deterministic` aside."""
    sites = sample_sites(trace).items()
    return [name for name, site in sites if site["is_observed"] and not is_deterministic(site)]


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site is of `pyro.deterministic`, or holds what a reparametrised variable is computed to be."""
    fn = site["fn"]
    computed = site["is_observed"] and isinstance(fn, MaskedDistribution) and fn._mask is False
    return bool(site["infer"].get("_deterministic")) or (computed and isinstance(_innermost(fn), Delta))


def plate_depth(site: Mapping[str, Any]) -> int:
    """How many batch dimensions the plates of a site reach over, the particles' aside."""
    return max((-f.dim for f in site["cond_indep_stack"] if f.vectorized and f.name != PARTICLES), default=0)


def max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> int:
    """How many dimensions the plates take, found by one run."""
    with poutine.block(), torch.no_grad():
        traces = run_pair(model, guide, args, kwargs)
    return max((plate_depth(site) for trace in traces for site in sample_sites(trace).values()), default=0)


def data_plates(trace: Trace, rows: int) -> dict[str, int]:
    """Plates whose rows can be the data, outermost first, with their dimensions: of that many rows, around all observed sites.

    Raises:
        ValueError: if there is none.
    """
    sites = sample_sites(trace)
    stacks = [{f.name: f for f in sites[name]["cond_indep_stack"]} for name in observed(trace)]
    shared = [f for f in (stacks[0].values() if stacks else ()) if all(f.name in stack for stack in stacks)]
    shared = [f for f in shared if f.vectorized and f.size == rows and f.name != PARTICLES]
    if not shared:
        found = sorted({f"{f.name} ({f.size})" for stack in stacks for f in stack.values()})
        raise ValueError(
            f"Wanted one plate of {rows} rows around all observed sites, but found {', '.join(found) or 'no plates'}. Put the "
            "data in a pyro.plate over its rows, without subsampling; and note that the plate of an autoguide with latent "
            "variables in every row is fixed to the rows it was fitted to: write a guide that reads x."
        )
    return {f.name: f.dim for f in sorted(shared, key=lambda f: f.dim)}


def is_point_mass(guide_trace: Trace) -> bool:
    """Whether a guide draws nothing, as `AutoDelta` does: all its sites are `Delta`, none with a density of its own."""
    fns = [_innermost(site["fn"]) for site in sample_sites(guide_trace).values()]
    return bool(fns) and all(isinstance(fn, Delta) and not torch.as_tensor(fn.log_density).any() for fn in fns)


def _innermost(fn: Any) -> Any:
    return _innermost(fn.base_dist) if hasattr(fn, "base_dist") else fn


def log_prob(trace: Trace, dims: tuple[int, ...], *, scaled: bool) -> Tensor:
    """Log probability (nats) of each cell of the given batch dimensions, masked, summed over all sites and other dimensions.

    Args:
        trace: its sites are scored here.
        dims: negative batch dimensions to keep, ascending.
        scaled: whether the scales of plates and handlers count.

    Returns:
        One dimension for each of dims; of size 1 where no site has it.
    """
    total: Tensor | float = 0.0
    for site in sample_sites(trace).values():
        scale = site["scale"] if scaled else 1.0
        total = total + sum_to_dims(scale_and_mask(site["fn"].log_prob(site["value"]), scale, site["mask"]), dims)
    return total if isinstance(total, Tensor) else torch.zeros((1,) * len(dims))


def sum_to_dims(log_p: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values of cells, summed over all but the given batch dimensions, negative and ascending."""
    log_p = log_p.reshape((1,) * (-min(dims) - log_p.dim()) + log_p.shape)
    others = [d for d in range(-log_p.dim(), 0) if d not in dims]
    return log_p.sum(others) if others else log_p
