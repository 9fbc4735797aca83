"""Sources of draws: a model with its guide, or with draws in the guide's place."""

from __future__ import annotations

__all__ = ["DrawSource", "check_separate_parameters", "source_of"]

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Importance
from pyro.infer.predictive import WeighedPredictiveResults
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_genmodels._pyro import handlers, kernels, params, traces
from pyro_genmodels.inference_data.arrays import to_numpy
from pyro_genmodels.utils.tensors import as_tensor

DEFAULT_NUM_SAMPLES = 1000
MIN_DRAWS_OF_DIAGNOSTICS = 4
"""Smallest number of draws per chain for which Pyro computes the diagnostics of an MCMC run."""

INDEPENDENT = (
    "energy, diverging: these are statistics of a Markov chain, but draws of a guide are independent, so plot_energy, bfmi and "
    "plot_parallel have nothing to show"
)
"""Note on the statistics that draws of a guide do not have."""


@dataclass(frozen=True)
class DrawSource:
    """A model with a guide, or with draws in the guide's place.

    Attributes:
        model: model, or None if it is not known.
        guide: function, or draws by name, (draws, ...).
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        num_samples: number of draws.
        num_chains: number of chains that the draws are, one after another.
        has_all_continuous: True if there are draws of all continuous latent variables, as from MCMC.
        stats: statistics of each draw, (draws,).
        is_family_prior: True for a family called without data.
        note: statistics of each draw that cannot be had, and why.
        pareto_k: k-hat of the weights that the draws were resampled with; NaN if there were none.
    """

    model: Any
    guide: Any
    args: tuple
    kwargs: Mapping[str, Any]
    num_samples: int
    num_chains: int = 1
    has_all_continuous: bool = False
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    is_family_prior: bool = False
    note: str = ""
    pareto_k: float = math.nan

    @property
    def draws_per_chain(self) -> int:
        """Number of draws of each chain."""
        return self.num_samples // self.num_chains

    def block(self, draws: slice) -> DrawSource:
        """Return a source of some draws of each chain; one that makes its draws makes as many."""
        count = draws.stop - draws.start
        if not isinstance(self.guide, Mapping):
            return replace(self, num_samples=count)

        def cut(values: Any) -> Any:
            return values.reshape(self.num_chains, -1, *values.shape[1:])[:, draws].reshape(-1, *values.shape[1:])

        guide = {name: cut(values) for name, values in self.guide.items()}
        stats = {name: cut(values) for name, values in self.stats.items()}
        return replace(self, guide=guide, stats=stats, num_samples=self.num_chains * count)


def source_of(fit: Any, args: tuple, kwargs: Mapping[str, Any], num_samples: int | None, model: Any) -> DrawSource:
    """Return the source of draws that a fit is.

    Args:
        fit: object with a model and a guide (a family, an `SVI`, a pair), or with draws (`MCMC`, `Importance`, the result of
            `WeighedPredictive`, `Chains`, an object with `.samples` by name, or draws by name, (chain, draw, ...)).
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        num_samples: number of draws to make, or None.
        model: model of a fit that has only draws.

    Raises:
        ValueError: if the shapes of the draws differ in chains or draws, or the arguments do not go with the fit.
    """
    found = _draws_of(fit, args, kwargs, model)
    if found is None:
        pair = traces.as_pair(fit)
        _one_model(fit, pair[0], model)
        if not (args or kwargs) and hasattr(fit, "psis"):  # a posterior, which has its arguments
            args, kwargs = fit.args, fit.kwargs
        call = _family_call_without_data(pair[0], args, kwargs)
        if call is not None:
            return DrawSource(*pair, (), call, num_samples or DEFAULT_NUM_SAMPLES, is_family_prior=True)
        return DrawSource(*pair, args, kwargs, num_samples or DEFAULT_NUM_SAMPLES, note=INDEPENDENT)
    if num_samples is not None:
        raise ValueError(f"The {type(fit).__name__} has draws of its own: leave num_samples out.")
    if found.model is None and (args or kwargs):
        raise ValueError("These draws come without a model, so the arguments have no use: pass the model as model=.")
    chains, per_chain = _chains_and_draws(found.draws)
    flat = {name: values.flatten(0, 1) for name, values in found.draws.items()}
    return DrawSource(
        found.model,
        flat,
        found.args,
        found.kwargs,
        chains * per_chain,
        chains,
        has_all_continuous=found.has_all_continuous,
        stats=found.stats,
        note=found.note,
        pareto_k=found.pareto_k,
    )


@dataclass(frozen=True)
class _FoundDraws:
    """Draws that a fit holds.

    Attributes:
        draws: draws by name, (chain, draw, ...).
        model: their model, or None.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        stats: statistics of each draw, (draws,).
        note: statistics that cannot be had, and why.
        has_all_continuous: True if there are draws of all continuous latent variables.
        pareto_k: k-hat of the weights that the draws were resampled with; NaN if there were none.
    """

    draws: Mapping[str, Tensor]
    model: Any
    args: tuple
    kwargs: Mapping[str, Any]
    stats: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: str = ""
    has_all_continuous: bool = False
    pareto_k: float = math.nan


def _draws_of(fit: Any, args: tuple, kwargs: Mapping[str, Any], model: Any) -> _FoundDraws | None:
    """Return the draws that a fit holds, or None if it has a model and a guide to make them."""
    if hasattr(fit, "get_samples") and hasattr(fit, "kernel"):  # MCMC
        if kernels.has_not_run(fit):
            raise ValueError(f"This {type(fit).__name__} has not been run. Call its .run(...) first.")
        draws = fit.get_samples(group_by_chain=True)
        if not (args or kwargs):
            args, kwargs = kernels.arguments_of_run(fit)
        recorded = kernels.recorded_statistics(fit)
        stats = _divergences(fit, *next(iter(draws.values())).shape[:2])
        stats |= {name: values.reshape(-1) for name, values in (recorded or {}).items()}
        note = kernels.NOT_RECORDED if recorded is None else ""
        return _FoundDraws(draws, _one_model(fit, fit.kernel.model, model), args, kwargs, stats, note, has_all_continuous=True)
    if hasattr(fit, "get_samples") and hasattr(fit, "stats"):  # Chains, WeightedDraws, and draws of a posterior with its model
        stats = {name: to_numpy(values.flatten()) for name, values in fit.stats.items()}
        own = getattr(fit, "model", None)
        if own is not None and not (args or kwargs):
            args, kwargs = fit.args, fit.kwargs
        draws = fit.get_samples(group_by_chain=True)
        k = float(getattr(fit, "pareto_k", math.nan))
        has_model = own is not None
        return _FoundDraws(draws, _one_model(fit, own, model), args, kwargs, stats, has_all_continuous=has_model, pareto_k=k)
    if isinstance(fit, Importance):
        return _importance_draws(fit, args, kwargs, model)
    if isinstance(fit, WeighedPredictiveResults):
        draws = {name: values[None] for name, values in dict(fit.samples).items() if isinstance(values, Tensor)}
        log_probs = {"log_p": fit.model_log_prob, "log_q": fit.guide_log_prob, "log_weight": fit.log_weights}
        return _FoundDraws(draws, model, args, kwargs, {name: to_numpy(values) for name, values in log_probs.items()})
    if isinstance(getattr(fit, "samples", None), Mapping):  # a CompartmentalModel
        if not fit.samples:
            raise ValueError(f"This {type(fit).__name__} has no draws yet: fit it first, by its fit_svi(...) or fit_mcmc(...).")
        return _FoundDraws({name: values[None] for name, values in fit.samples.items()}, model, args, kwargs)
    if isinstance(fit, Mapping):
        return _FoundDraws({name: _as_draws(name, values) for name, values in fit.items()}, model, args, kwargs)
    return None


def _as_draws(name: Any, values: Any) -> Tensor:
    """Return draws that a dictionary holds as a tensor.

    Raises:
        TypeError: if they are a fit, or no numbers.
    """
    if callable(getattr(values, "model", None)) or hasattr(values, "get_samples"):
        raise TypeError(
            f"A dictionary given to to_arviz holds draws by name, (chain, draw, ...), but {name!r} is a "
            f"{type(values).__name__}. Call to_arviz for each fit; several fits of one model, as chains, go in a list."
        )
    return as_tensor(values, f"to_arviz, for draws of {name!r},")


def _importance_draws(fit: Importance, args: tuple, kwargs: Mapping[str, Any], model: Any) -> _FoundDraws:
    """Return the draws of a run of `Importance`, with their weights; its own arguments are the default."""
    if not fit.exec_traces:
        raise ValueError("This Importance has not been run. Call its .run(...) first.")
    own_call = fit.exec_traces[0].nodes["_INPUT"]
    if not (args or kwargs):
        args, kwargs = own_call["args"], own_call["kwargs"]
    names = traces.latents(prune_subsample_sites(fit.exec_traces[0]))
    draws = {name: torch.stack([trace.nodes[name]["value"] for trace in fit.exec_traces])[None] for name in names}
    log_weight, log_p = (
        torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).detach()
        for values in (fit.log_weights, [trace.log_prob_sum() for trace in fit.exec_traces])
    )
    stats = {"log_q": to_numpy(log_p - log_weight), "log_weight": to_numpy(log_weight)}
    return _FoundDraws(draws, _one_model(fit, fit.model, model), args, kwargs, stats)


def _chains_and_draws(draws: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the numbers of chains and of draws per chain that all variables share."""
    shapes = {tuple(values.shape[:2]) for values in draws.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or 0 in next(iter(shapes)):
        found = {name: tuple(values.shape) for name, values in draws.items()}
        raise ValueError(
            "Draws must have the shape (chain, draw, ...), with the same numbers of chains and draws for all variables, but "
            f"found {found or 'none'}."
        )
    chains, per_chain = next(iter(shapes))
    return chains, per_chain


def _one_model(fit: Any, own: Any, given: Any) -> Any:
    """Return the model of a fit, or the given one; raise a ValueError if there are both."""
    if own is not None and given is not None:
        raise ValueError(f"The {type(fit).__name__} has a model: leave model= out.")
    return given if own is None else own


def _divergences(mcmc: Any, chains: int, draws: int) -> dict[str, np.ndarray]:
    """Return the statistic "diverging" of each draw of an MCMC run, if its kernel reports divergences."""
    if draws < MIN_DRAWS_OF_DIAGNOSTICS:
        return {}
    found = mcmc.diagnostics().get("divergences")
    if found is None:
        return {}
    diverging = np.zeros((chains, draws), bool)
    for chain in range(chains):
        diverging[chain, list(found[f"chain {chain}"])] = True
    return {"diverging": diverging.reshape(-1)}


def _family_call_without_data(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the keyword arguments that sample from a family, if the model is a family's and is called without data."""
    if not traces.is_family(model):
        return None
    try:
        call = inspect.signature(model).bind_partial(*args, **kwargs).arguments
    except TypeError:  # arguments that the family does not take
        return None
    if call.get("x") is not None:
        return None
    if call.get("context") is None:
        call.setdefault("size", 1)
    return call


def check_separate_parameters(sources: Sequence[DrawSource]) -> None:
    """Check that fits do not hold the same parameters; then all of them would be the one that was trained last.

    Raises:
        ValueError: naming the first parameter that two fits share.
    """
    fit_of_parameter: dict[int, int] = {}
    for i, source in enumerate(sources):
        if isinstance(source.guide, Mapping):
            continue
        isolated = params.isolated_param_store(traces.modules_of(source.model, source.guide))
        with handlers.side_effect_free(source.model, source.guide), isolated, poutine.trace(param_only=True) as capture:
            traces.run_pair(source.model, source.guide, source.args, source.kwargs)
        for name, site in capture.trace.nodes.items():
            value: Any = site["value"]
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            if leaf.requires_grad and fit_of_parameter.setdefault(id(leaf), i) != i:
                raise ValueError(
                    f"Fits {fit_of_parameter[id(leaf)]} and {i} share the parameter {name!r}, so both hold what was trained "
                    "last. Train each between pyro.clear_param_store() with a guide of its own. If the guide is a plain "
                    "function, call to_arviz after each and join the results by arviz's concat(..., dim='chain')."
                )
