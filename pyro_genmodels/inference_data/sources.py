"""Where draws come from: a model with its guide, or with draws in the guide's place."""

from __future__ import annotations

__all__ = ["DrawSource", "check_apart", "source_of"]

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Importance
from pyro.infer.predictive import WeighedPredictiveResults
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_genmodels._pyro import handlers, params, traces
from pyro_genmodels.inference_data.replay import numpy


@dataclass(frozen=True)
class DrawSource:
    """A model with a guide, or with draws in its place.

    Attributes:
        model: None where nothing is known of it.
        guide: a function, or draws by name (draws, ...).
        args: of the model.
        kwargs: of the model.
        total: draws.
        chains: that these are of, one after another.
        complete: whether draws stand for all latent variables there are, as those of MCMC.
        stats: what is known of each draw, (draws,).
        alone: whether this is a family called without data.
    """

    model: Any
    guide: Any
    args: tuple
    kwargs: Mapping[str, Any]
    total: int
    chains: int = 1
    complete: bool = False
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    alone: bool = False


def source_of(fit: Any, args: tuple, kwargs: Mapping[str, Any], num_samples: int | None, model: Any) -> DrawSource:
    """Reads a fit.

    Args:
        fit: what offers a model and a guide (a family, an `SVI`, a pair), or draws (`MCMC`, `Importance`, the result of
            `WeighedPredictive`, `Chains`, or draws by name, (chain, draw, ...)).
        args: the model's.
        kwargs: the model's.
        num_samples: draws to make, or None.
        model: of draws that do not bring one.

    Raises:
        ValueError: if the draws' shapes do not go together, or the arguments do not go with the fit.
    """
    stats: dict[str, np.ndarray] = {}
    if hasattr(fit, "get_samples") and hasattr(fit, "kernel"):  # MCMC
        model, draws = _one_model(fit, fit.kernel.model, model), fit.get_samples(group_by_chain=True)
        stats = _divergences(fit, *next(iter(draws.values())).shape[:2])
    elif hasattr(fit, "get_samples") and hasattr(fit, "stats"):  # chains of our own samplers
        draws = fit.get_samples(group_by_chain=True)
        stats = {name: numpy(values.flatten()) for name, values in fit.stats.items()}
    elif isinstance(fit, Importance):
        if not fit.exec_traces:
            raise ValueError("This Importance has not been run. Call its .run(...) first.")
        model, seen = _one_model(fit, fit.model, model), fit.exec_traces[0].nodes["_INPUT"]
        args, kwargs = (args, kwargs) if args or kwargs else (seen["args"], seen["kwargs"])
        names = traces.latents(prune_subsample_sites(fit.exec_traces[0]))
        draws = {n: torch.stack([trace.nodes[n]["value"] for trace in fit.exec_traces])[None] for n in names}
        log_weight, log_p = (
            torch.stack([torch.as_tensor(value) for value in values]).detach()
            for values in (fit.log_weights, [trace.log_prob_sum() for trace in fit.exec_traces])
        )
        stats = {"log_q": numpy(log_p - log_weight), "log_weight": numpy(log_weight)}
    elif isinstance(fit, WeighedPredictiveResults):
        draws = {n: v[None] for n, v in dict(fit.samples).items() if isinstance(v, Tensor)}
        known = {"log_p": fit.model_log_prob, "log_q": fit.guide_log_prob, "log_weight": fit.log_weights}
        stats = {n: numpy(v) for n, v in known.items()}
    elif isinstance(fit, Mapping):
        draws = {n: v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for n, v in fit.items()}
    else:
        pair = traces.as_pair(fit)
        _one_model(fit, pair[0], model)
        call = _own_call(pair[0], args, kwargs)
        return DrawSource(*pair, *(call or (args, kwargs)), num_samples or 1000, alone=call is not None)
    if num_samples is not None:
        raise ValueError(f"A {type(fit).__name__} has draws of its own: leave num_samples out.")
    if model is None and (args or kwargs):
        raise ValueError("These draws bring no model, so that the arguments say nothing: pass the model of them as model=.")
    shapes = {tuple(v.shape[:2]) for v in draws.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        found = {n: tuple(v.shape) for n, v in draws.items()}
        raise ValueError(
            f"Draws are wanted as (chain, draw, ...), of as many chains and draws each, but found {found or 'none'}."
        )
    chains, per_chain = next(iter(shapes))
    complete = hasattr(fit, "kernel")
    flat = {n: v.flatten(0, 1) for n, v in draws.items()}
    return DrawSource(model, flat, args, kwargs, chains * per_chain, chains, complete, stats)


def _one_model(fit: Any, own: Any, given: Any) -> Any:
    """The model a fit brings, or else the one that is given."""
    if own is not None and given is not None:
        raise ValueError(f"A {type(fit).__name__} has a model: leave model= out.")
    return given if own is None else own


def _divergences(mcmc: Any, chains: int, draws: int) -> dict[str, np.ndarray]:
    if draws < 4:  # Pyro's diagnostics want more
        return {}
    found = mcmc.diagnostics().get("divergences")
    if found is None:
        return {}
    diverging = np.zeros((chains, draws), bool)
    for chain in range(chains):
        diverging[chain, list(found[f"chain {chain}"])] = True
    return {"diverging": diverging.reshape(-1)}


def _own_call(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments that draw from a family, if this is a family's own model called without data."""
    if not traces.is_family(model):
        return None
    given = inspect.signature(model).bind_partial(*args, **kwargs).arguments
    if given.get("x") is not None:
        return None
    if given.get("context") is None:
        given.setdefault("size", 1)
    return (), given


def check_apart(sources: Sequence[DrawSource]) -> None:
    """Refuses restarts that hold the same parameters: they are one fit, the last, told several times."""
    owners: dict[int, int] = {}
    for i, source in enumerate(sources):
        if isinstance(source.guide, Mapping):
            continue
        modules = traces.modules_of(source.model, source.guide)
        with handlers.side_effect_free(), params.isolated_param_store(modules), poutine.trace(param_only=True) as capture:
            traces.run_pair(source.model, source.guide, source.args, source.kwargs)
        for name, site in capture.trace.nodes.items():
            value: Any = site["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if leaf.requires_grad and owners.setdefault(id(leaf), i) != i:
                raise ValueError(
                    f"Fits {owners[id(leaf)]} and {i} share the parameter {name!r}, so that both say what was trained last. "
                    "Train each between pyro.clear_param_store() with a guide of its own; if the guide is a plain function, "
                    "call to_arviz after each and join the results by arviz's concat(..., dim='chain')."
                )
