r"""Traces of a model and its guide, and what objectives, likelihoods and ArviZ read from them.

The guide runs first, :math:`z \sim q(z \mid x)`; the model runs against its draws, so that the log weight of a datum is

.. math:: \log w_n = \log p(x_n, z_n) - \log q(z_n \mid x_n).

Several particles are one run inside an outermost plate.
"""

from __future__ import annotations

__all__ = [
    "PARTICLES", "Pair", "as_pair", "data_plate", "evaluation_mode", "latents", "log_prob", "max_plate_nesting", "no_latents",
    "observed", "owners", "run", "run_particles", "samples",
]  # fmt: skip

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
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


def owners(*fns: Any) -> list[nn.Module]:
    """The modules behind callables: themselves, or those whose methods they are."""
    found = (fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None) for fn in fns)
    return list({id(m): m for m in found if isinstance(m, nn.Module)}.values())


@contextmanager
def evaluation_mode(*fns: Any) -> Iterator[None]:
    """Modules behind the callables in evaluation mode; each is put back as it was."""
    before = [(m, m.training) for owner in owners(*fns) for m in owner.modules()]
    try:
        for m, _ in before:
            m.training = False
        yield
    finally:
        for m, training in before:
            m.training = training


def run(model: Callable[..., Any], guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
    """One run of the guide and of the model against it, without log probabilities: (model trace, guide trace)."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, Messenger):
        guide(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()  # type: ignore[attr-defined]
    else:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def run_particles(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], num_particles: int, dim: int
) -> tuple[Trace, Trace]:
    """As `run`, with particles along dimension `dim` (negative, left of every plate)."""
    plate = pyro.plate(PARTICLES, num_particles, dim=dim)
    return run(plate(model), plate(guide), args, kwargs)


def samples(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace, by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def latents(trace: Trace) -> list[str]:
    """The names of the unobserved sites of a trace."""
    return [name for name, site in samples(trace).items() if not site["is_observed"]]


def observed(trace: Trace) -> list[str]:
    """The names of the observed sites of a trace, those of `pyro.deterministic` aside."""
    sites = samples(trace).items()
    return [name for name, site in sites if site["is_observed"] and not site["infer"].get("_deterministic")]


def max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> int:
    """How many dimensions the plates take, found by one run."""
    with poutine.block(), torch.no_grad():
        traces = run(model, guide, args, kwargs)
    frames = [f for trace in traces for site in samples(trace).values() for f in site["cond_indep_stack"] if f.vectorized]
    return max((-frame.dim for frame in frames), default=0)


def data_plate(trace: Trace, rows: int) -> tuple[str, int]:
    """The name and dimension of the plate whose rows are the data: every observed site is in it, and it has that many rows.

    Raises:
        ValueError: if there is none.
    """
    sites = samples(trace)
    stacks = [{f.name: f for f in sites[name]["cond_indep_stack"]} for name in observed(trace)]
    shared = [f for f in (stacks[0].values() if stacks else ()) if all(f.name in stack for stack in stacks)]
    shared = [f for f in shared if f.vectorized and f.size == rows and f.name != PARTICLES]
    if not shared:
        found = sorted({f"{f.name} ({f.size})" for stack in stacks for f in stack.values()})
        raise ValueError(
            f"Wanted one plate of {rows} rows around all observed sites, but found {', '.join(found) or 'no plates'}. Put the "
            "data in a pyro.plate over its rows, without subsampling."
        )
    outermost = min(shared, key=lambda f: f.dim)
    return outermost.name, outermost.dim


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
    for site in samples(trace).values():
        scale = site["scale"] if scaled else 1.0
        total = total + _keep(scale_and_mask(site["fn"].log_prob(site["value"]), scale, site["mask"]), dims)
    return total if isinstance(total, Tensor) else torch.zeros((1,) * len(dims))


def _keep(log_p: Tensor, dims: tuple[int, ...]) -> Tensor:
    log_p = log_p.reshape((1,) * (-min(dims) - log_p.dim()) + log_p.shape)
    others = [d for d in range(-log_p.dim(), 0) if d not in dims]
    return log_p.sum(others) if others else log_p
