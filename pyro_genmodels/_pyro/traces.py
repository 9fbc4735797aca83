r"""Traces of a model and its guide, and the quantities that objectives, likelihoods and ArviZ read from them.

The guide runs first, :math:`z \sim q(z \mid x)`. The model then runs with these latent variables, and the log weight of a
datum is

.. math:: \log w_n = \log p(x_n, z_n) - \log q(z_n \mid x_n).

Several particles are sampled in one run, inside an outermost plate.
"""

from __future__ import annotations

__all__ = [
    "Pair",
    "as_pair",
    "data_plates",
    "downstream_log_ratio",
    "has_single_values",
    "holding",
    "is_family",
    "latents",
    "log_prob",
    "max_plate_nesting",
    "modules_of",
    "no_latents",
    "observed",
    "particles",
    "point_masses",
    "proposal",
    "reparametrised",
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
from pyro.distributions import Delta, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer.trace_elbo import _compute_log_r
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from pyro_genmodels._pyro import sites
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.plates import measure_plates
from pyro_genmodels._pyro.reparam import MarkComputed
from pyro_genmodels._pyro.sites import PARTICLES, is_computed, plate_depth

Pair = tuple[Callable[..., Any], Callable[..., Any]]


def as_pair(fit: Any) -> Pair:
    """Return the pair (model, guide) of a family, of an `SVI` or of any other object with both, or the pair itself.

    Raises:
        TypeError: if the fit offers no model and guide.
    """
    if isinstance(fit, tuple) and len(fit) == 2 and all(map(callable, fit)):
        for role, part in zip(("model", "guide"), fit, strict=True):
            if _offers_pair(part):
                name = type(part).__name__
                raise TypeError(
                    f"A pair is (model, guide), two functions, but its {role} is a {name}, which has both: pass {name}.{role}, "
                    f"or the {name} alone. Several fits go to to_arviz as a list, [a, b], and to compare as a dictionary."
                )
        return fit
    if isinstance(fit, type):
        raise TypeError(f"A fit must be an object, but found the class {fit.__name__}: build it, as in {fit.__name__}(...).")
    if _offers_pair(fit):
        return fit.model, fit.guide
    if hasattr(fit, "get_samples"):
        raise TypeError(
            f"A fit must have .model and .guide here, but {type(fit).__name__} has draws and no guide: see to_arviz and az.loo."
        )
    raise TypeError(
        "A fit must have .model and .guide, as a family or an SVI has, or be a pair (model, guide), but found "
        f"{type(fit).__name__}. Pass the family itself, not the distribution that it returns."
    )


def _offers_pair(fit: Any) -> bool:
    """Return True if a fit has a model and a guide of its own."""
    return callable(getattr(fit, "model", None)) and callable(getattr(fit, "guide", None))


def no_latents(*args: Any, **kwargs: Any) -> None:
    """Sample nothing: the guide of a model without latent variables."""


def modules_of(*fns: Any) -> list[nn.Module]:
    """Return the modules that callables are, or whose bound methods they are, under any of Pyro's handlers."""
    candidates = [part for fn in map(poutine.unwrap, fns) for part in (fn, getattr(fn, "__self__", None))]
    return list({id(m): m for m in candidates if isinstance(m, nn.Module)}.values())


class _SampleTrace(TraceMessenger):
    """Handler that makes a trace of samples, without the parameters: a network has many, and nobody reads them there."""

    _pyro_post_param = None  # type: ignore[assignment]


def run_pair(
    model: Callable[..., Any], guide: Any, args: tuple, kwargs: Mapping[str, Any], plate: pyro.plate | None = None
) -> tuple[Trace, Trace]:
    """Run the guide, then the model with the guide's latent variables, and return (model trace, guide trace).

    The traces have no log probabilities yet, and no subsample sites.

    Args:
        model: function with Pyro statements.
        guide: function with Pyro statements, or a `Messenger` that makes both traces.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        plate: plate in which both run, such as `particles`.
    """
    in_plate = plate or (lambda fn: fn)
    bound_model = in_plate(lambda: model(*args, **kwargs))  # Pyro's handlers have a keyword `context` of their own
    bound_guide = in_plate(lambda: guide(*args, **kwargs))
    messenger = poutine.unwrap(guide)
    with without_trace_shapes(), MarkComputed():
        if isinstance(messenger, Messenger):
            bound_guide()
            model_trace, guide_trace = messenger.get_traces()  # type: ignore[attr-defined]
        else:
            guide_trace = _SampleTrace()(bound_guide).get_trace()
            model_trace = _SampleTrace()(poutine.replay(bound_model, trace=guide_trace)).get_trace()
    measure_plates(model_trace, guide_trace)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def trace_of(fn: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Trace:
    """Return the trace of one function, without log probabilities and subsample sites."""
    with without_trace_shapes(), MarkComputed():
        trace = prune_subsample_sites(poutine.trace(lambda: fn(*args, **kwargs)).get_trace())
    measure_plates(trace)
    return trace


def holding(values: Mapping[str, Any]) -> Trace:
    """Return a trace of unobserved sites with these values, by name, for `poutine.replay`."""
    trace = Trace()
    for name, value in values.items():
        trace.add_node(name, type="sample", name=name, value=value, is_observed=False, infer={}, cond_indep_stack=())
    return trace


def particles(number: int, nesting: int) -> pyro.plate:
    """Return a plate of this many particles, left of `nesting` dimensions for other plates."""
    return pyro.plate(PARTICLES, number, dim=-nesting - 1)


def is_family(fn: Any) -> bool:
    """Return True if a callable is a method of a family: its owner has an event shape, a model and a guide."""
    owner = getattr(fn, "__self__", None)
    offers = all(hasattr(owner, name) for name in ("event_shape", "data_support", "model", "guide"))
    return offers and "size" in inspect.signature(fn).parameters


def sample_sites(trace: Trace) -> dict[str, Any]:
    """Return the sample sites of a trace, by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def latents(trace: Trace) -> list[str]:
    """Return the names of the unobserved sample sites of a trace."""
    return [name for name, site in sample_sites(trace).items() if not site["is_observed"]]


def observed(trace: Trace) -> list[str]:
    """Return the names of the sites of a trace that hold data: observed, and not computed from latent variables."""
    named = sample_sites(trace).items()
    return [name for name, site in named if site["is_observed"] and not is_computed(site)]


def proposal(guide_trace: Trace) -> Trace:
    """Return the trace of a guide as a proposal: without the observed sites, which are no part of its density.

    A guide may observe what it samples in other runs, such as labels, and have terms of a loss in a `pyro.factor`. A factor
    with ``has_rsample=True`` is kept: it is the density of samples that were drawn otherwise, as in `AutoGaussian`.
    """
    kept = guide_trace.copy()
    for name, site in sample_sites(guide_trace).items():
        if site["is_observed"] and not (isinstance(site["fn"], Unit) and site["fn"].has_rsample):
            kept.remove_node(name)
    return kept


def reparametrised(trace: Trace) -> list[str]:
    """Return the names of the latent variables of a trace that `poutine.reparam` has replaced by computed values."""
    return [name for name, site in sample_sites(trace).items() if is_computed(site) and not sites.is_deterministic(site)]


def max_plate_nesting(model: Callable[..., Any], guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Return the number of batch dimensions that plates take, found by one run."""
    with poutine.block(), torch.no_grad():
        traces = run_pair(model, guide, args, kwargs)
    return max((plate_depth(site) for trace in traces for site in sample_sites(trace).values()), default=0)


def data_plates(trace: Trace, rows: int) -> dict[str, int]:
    """Return the plates of this many rows around all observed sites, outermost first: {name: batch dimension}.

    Raises:
        ValueError: if there is no such plate.
    """
    named = sample_sites(trace)
    stacks = [{f.name: f for f in named[name]["cond_indep_stack"]} for name in observed(trace)]
    shared = [f for f in (stacks[0].values() if stacks else ()) if all(f.name in stack for stack in stacks)]
    shared = [f for f in shared if f.vectorized and f.size == rows and f.name != PARTICLES]
    if not shared:
        found = sorted({f"{f.name} ({f.size})" for stack in stacks for f in stack.values()})
        raise ValueError(
            f"Wanted one plate of {rows} rows around all observed sites, but found {', '.join(found) or 'no plates'}. Put the "
            "data in a pyro.plate over its rows, without subsampling. If the guide is an autoguide with latent variables in "
            "every row, its plate keeps the size it was fitted with: write a guide that reads x."
        )
    return {f.name: f.dim for f in sorted(shared, key=lambda f: f.dim)}


def point_masses(model_trace: Trace, guide_trace: Trace, run_again: Callable[[], Trace]) -> list[str]:
    """Return the continuous variables for which a guide has a single value and no density, as `AutoDelta` has.

    A `Delta` without a density also holds what a guide computes from other samples. Then another run has another value.

    Args:
        model_trace: trace of the model, which tells what is discrete.
        guide_trace: trace of the guide.
        run_again: function that runs the guide with the same arguments and rows; it is called only if there is such a `Delta`.
    """
    found: dict[str, Any] = {}
    for name in latents(guide_trace):
        fn = sites.innermost(guide_trace.nodes[name]["fn"])
        is_mass = isinstance(fn, Delta) and not torch.as_tensor(fn.log_density).any()
        if is_mass and not (name in model_trace.nodes and _has_masses(model_trace.nodes[name]["fn"])):
            found[name] = guide_trace.nodes[name]["value"]
    return _repeated(found, run_again)


def has_single_values(guide_trace: Trace, run_again: Callable[[], Trace]) -> bool:
    """Return True if a guide has a single value for every latent variable, as that of a vector-quantised VAE has for codes.

    Args:
        guide_trace: trace of the guide.
        run_again: function that runs the guide with the same arguments and rows; it is called only if each has a `Delta`.
    """
    values: dict[str, Any] = {name: guide_trace.nodes[name]["value"] for name in latents(guide_trace)}
    are_masses = all(isinstance(sites.innermost(guide_trace.nodes[name]["fn"]), Delta) for name in values)
    return are_masses and len(_repeated(values, run_again)) == len(values)


def _repeated(values: Mapping[str, Tensor], run_again: Callable[[], Trace]) -> list[str]:
    """Return the names of variables that have the same value in another run, which is made only if there are variables."""
    again: Any = run_again() if values else None
    return [name for name, value in values.items() if value.equal(again.nodes[name]["value"])]


def _has_masses(fn: Any) -> bool:
    """Return True if a single value can have a probability under a distribution."""
    try:
        return isinstance(sites.innermost(fn), Delta) or bool(fn.support.is_discrete)
    except NotImplementedError:  # a distribution that has not said what its support is
        return False


def downstream_log_ratio(model_trace: Trace, guide_trace: Trace) -> MultiFrameTensor:
    """Return log p - log q (detached, nats) by the plates of its terms, as Pyro's Rao-Blackwellised score function needs it.

    Its ``sum_to(site["cond_indep_stack"])`` sums out all plates but those of a site. Both traces need log probabilities.
    """
    return _compute_log_r(model_trace, guide_trace)


def log_prob(trace: Trace, dims: tuple[int, ...], *, scaled: bool) -> Tensor:
    """Return the masked log probability (nats) of a trace, summed over its sites and all batch dimensions but these.

    Args:
        trace: trace whose sites are scored here.
        dims: negative batch dimensions to keep, ascending.
        scaled: True to count the scales of plates and handlers.

    Returns:
        One dimension for each of dims, of size 1 if no site has it.
    """
    total: Tensor | float = 0.0
    for site in sample_sites(trace).values():
        scale = site["scale"] if scaled else 1.0
        total = total + sum_to_dims(scale_and_mask(site["fn"].log_prob(site["value"]), scale, site["mask"]), dims)
    return total if isinstance(total, Tensor) else torch.zeros((1,) * len(dims))


def sum_to_dims(log_p: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return log_p, (batch...), summed over all batch dimensions but these, which are negative and ascending."""
    if not dims:
        return log_p.sum()
    log_p = log_p.reshape((1,) * (-min(dims) - log_p.dim()) + log_p.shape)
    others = [d for d in range(-log_p.dim(), 0) if d not in dims]
    return log_p.sum(others) if others else log_p
