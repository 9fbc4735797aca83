r"""Export of a fit to ArviZ. This is the only file that imports arviz.

Each draw :math:`s` of the posterior has :math:`\log p(x, z_s)`, :math:`\log q(z_s)` and their difference. The difference is the
log weight that Pareto-smoothed importance sampling starts from (Yao et al., *Yes, but Did It Work?*, arXiv 1802.02538).
Leave-one-out cross-validation (Vehtari et al., arXiv 1507.04544) needs :math:`\log p(x_n \mid z_s)` of every row as well.
"""

from __future__ import annotations

__all__ = ["to_arviz"]

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, params, traces
from pyro_genmodels.inference_data.attributes import group_attributes
from pyro_genmodels.inference_data.groups import GROUPS, PARETO_K, CollectOptions, Groups, collect, concatenate_chains
from pyro_genmodels.inference_data.names import check_dims, check_names, xarray_name
from pyro_genmodels.inference_data.sources import DrawSource, check_separate_parameters, source_of
from pyro_genmodels.inference_data.zarr_export import write_blocks
from pyro_genmodels.utils.errors import check_positive_int, warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, given_options, joined_keywords, runs_models
from pyro_genmodels.utils.pareto import pareto_k, smooth_log_weights
from pyro_genmodels.utils.parts import Output, as_output
from pyro_genmodels.utils.tensors import noting_frames

if TYPE_CHECKING:
    import arviz

BATCH_SIZE = 100
"""Default of the largest number of draws made in one run."""

FRAMES = (
    "to_arviz passes data frames to the model unchanged, with columns by name. train and log_likelihood give it tensors: for a "
    "model of tensors pass torch.tensor(frame.to_numpy())."
)
"""Note on errors of a model that was given data frames."""


@runs_models()
def to_arviz(
    fit: Any,
    *args: Any,
    num_samples: int | None = None,
    batch_size: int | None = None,
    groups: Collection[str] = GROUPS,
    model: Callable[..., Any] | None = None,
    parallel: bool | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
    out: str | Path | Output | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> arviz.InferenceData:
    """Return draws, densities and data of a fit as ArviZ data.

    The groups, each if the fit has it:

    - ``posterior``: draws of the latent variables and of `pyro.deterministic`;
    - ``posterior_predictive``: draws of the observed variables;
    - ``prior``, ``prior_predictive``: draws of the model without guide and data;
    - ``log_likelihood``: log density of each observed value for each draw, in nats, without any scale; 0 for a masked value. If
      the density is itself a lower bound (`Dequantized`), the variable has the attribute ``kind``. A model without latent
      variables has no such group: its parameters were trained on the data, which the leave-one-out of ArviZ cannot take into
      account. Use `log_likelihood` instead. If all latent variables are of single rows, as those of a VAE, leaving a row out
      means nothing, which the attribute ``left_out`` says;
    - ``log_prior``: log density of each latent variable, in nats;
    - ``sample_stats``: for each draw ``log_p``, the joint density of latent variables and data, and (unless the guide is a
      point mass at a continuous variable) ``log_q`` and ``log_weight`` = log_p - log_q, in nats, with the attribute
      ``pareto_k``, k-hat of all weights: above 0.7 they do not correct for the guide. ``smoothed_log_weight`` is the
      log of the weight after Pareto smoothing; over all draws the weights sum to 1. An `AmortizedGuide` has k-hat of the latent
      variables of each row too, such as ``pareto_k_groups`` for a plate called "groups", (chain, rows). Draws that were
      resampled by weights, as those of `Pathfinder`, have their ``pareto_k``, (chain). For MCMC also ``diverging``, and if its
      kernel is in `record_statistics` of `pyro_genmodels.inference_data`, as in ``MCMC(record_statistics(NUTS(model)), ...)``,
      ``energy`` (for `az.plot_energy` and `az.bfmi`), ``lp``, ``acceptance_rate``, ``step_size`` and ``tree_depth``;
    - ``observed_data``;
    - ``constant_data``: tensors and arrays among the model's arguments that it does not observe. Those in lists,
      dictionaries and frames are called ``name_0``, ``name_key`` and ``name_column``.

    Dimensions are (chain, draw), then the plates by name, then the event's. If the model or the guide subsamples a plate, all
    of its rows are run block by block, and log_p and log_q are those of all rows. Rows that have no value of a variable, such
    as short sequences, hold NaN, and a log density of 0. For a minibatch of a family (``size=``) log_p and log_q are scaled
    estimates.

    All modules of the fit are in evaluation mode during the call. A plain model runs four times for one block of draws: once
    to find its sites and plates, once for the block, once for a single draw (to find out if draws can be made together), and
    once for the prior. It runs once more if it has several observed sites, or a site after the observed one.

    Args:
        fit: a family, an `SVI` or a pair (model, guide); an `MCMC` run; a run of `Importance` or the result of
            `WeighedPredictive`, with draws that are weighted and not resampled; `Chains`; `WeightedDraws`, with weights in
            ``sample_stats``; a `CompartmentalModel` of `pyro.contrib.epidemiology` that is fitted; draws by name,
            (chain, draw, ...); or a list of these, whose chains are concatenated. The fits of a list must have separate
            parameters. Agreement of their chains is informative only if they started from different points
            (`init_to_sample`).
        args: positional arguments of the model; an `MCMC` run remembers its own. A family called without data gives draws of x
            as ``posterior_predictive``, and of its latent variables from their prior as ``posterior``.
        num_samples: number of draws, 1000 by default. Leave it out for a fit that has draws: all of them are exported.
        batch_size: largest number of draws made in one run, which bounds memory; 100 by default.
        groups: names of the wanted groups.
        model: model of a fit that has only draws (plain draws, `WeighedPredictive`); without it there is a ``posterior`` only.
            Leave it out for a fit that has a model.
        parallel: True to make the draws of a block in one run. The model must allow it (no ``z[0]`` or ``z.sum()``). None
            finds out if it does.
        coords: labels of dimensions.
        dims: names of the event dimensions of a variable, by its name.
        progress: True to show a progress bar after two seconds.
        out: folder such as "posterior.zarr", into which draws are written block by block, so that memory stays bounded; or an
            `evaluation.Output(path, resume=True, rows=1000)`, with which an interrupted run goes on after its last block of
            draws. The draws are a function of its seed, of the number of draws of a block (at most 100 times batch_size, and
            fewer for large data) and of batch_size. They have no labels. k-hat of the latent variables of rows is left out.
        model_kwargs: keyword arguments of the model, also those with the name of an option above.
        kwargs: keyword arguments of the model, with any other name.

    Returns:
        `arviz.InferenceData`, or an `xarray.DataTree` with ArviZ 1. With `out` its arrays are read from the folder when they
        are used.

    Raises:
        ValueError: if a count is not positive, a group is unknown, there is no fit in a list, an argument does not go with the
            fit (num_samples with draws, a second model, arguments without a model), a keyword can be meant for to_arviz or
            for the model, fits share parameters, shapes of draws do not agree, two things have one name in ArviZ, or
            `out` holds a run of another fit, of other data or by other settings.
        FileExistsError: if `out` exists, and the run is not resumed.

    Warns:
        UserWarning: naming each group and variable that cannot be computed, and why; also if groups= names ``log_likelihood``
            and all latent variables are of single rows; if a model that does not take draws together runs 10,000 times.

    Example:
        >>> from pyro_genmodels import Flow
        >>> to_arviz(Flow((2,)), num_samples=50).posterior_predictive.sizes["draw"]
        50
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    fits = fit if isinstance(fit, list) else [fit]
    if not fits:
        raise ValueError("to_arviz wants at least one fit, but found an empty list.")
    sources = [source_of(one, args, kwargs, num_samples, model) for one in fits]
    for source in sources:
        if source.model is not None:
            guide = None if isinstance(source.guide, Mapping) else source.guide
            check_model_keywords(source.model, guide, source.args, source.kwargs)
    options = _collect_options(num_samples, batch_size, groups, parallel, coords, dims, progress=progress)
    if len(sources) > 1:
        check_separate_parameters(sources)
    if out is not None:
        output = as_output("to_arviz", out, (".zarr",))
        own = replace(options, progress=False)

        def block(part: Sequence[DrawSource], reports: dict[str, str]) -> Groups:
            return concatenate_chains(_collected(part, reports, own))

        _warn_of(write_blocks(sources, block, output, coords or {}, options))
        return _opened(output.path)
    reports: dict[str, str] = {}
    chains = _collected(sources, reports, options)
    _warn_of(reports)
    joined = concatenate_chains(chains)
    _add_smoothed_weights(joined)
    if joined.no_loo and "log_likelihood" in options.named:
        warn_caller(f"to_arviz: log_likelihood is not for {joined.no_loo}.", UserWarning)
    return _inference_data(joined, coords or {})


def _collected(sources: Sequence[DrawSource], reports: dict[str, str], options: CollectOptions) -> list[Groups]:
    """Return the groups of each of several sources of draws, and add to `reports` what cannot be computed."""
    parts = []
    for source in sources:
        modules = traces.modules_of(source.model, source.guide) if len(sources) > 1 else []
        frames = noting_frames((*source.args, *source.kwargs.values()), FRAMES)
        with frames, handlers.side_effect_free(source.model, source.guide), params.isolated_param_store(modules):
            parts.append(collect(source, reports, options))
    return parts


def _warn_of(reports: Mapping[str, str]) -> None:
    """Warn of what cannot be computed, if there is anything."""
    if reports:
        left_out = "; ".join(f"{name} ({why})" for name, why in reports.items())
        warn_caller(f"to_arviz leaves out: {left_out}.", UserWarning)


def _opened(path: str | Path) -> arviz.InferenceData:
    """Return the data in a zarr folder, whose arrays are read when they are used."""
    import arviz as az
    import xarray as xr

    tree = xr.open_datatree(path, engine="zarr")
    return az.InferenceData.from_datatree(tree) if int(az.__version__.split(".")[0]) == 0 else tree  # type: ignore[return-value]


def _collect_options(
    num_samples: Any, batch_size: Any, groups: Any, parallel: Any, coords: Any, dims: Any, *, progress: bool
) -> CollectOptions:
    """Return the options of `to_arviz` after checking them; None is the default."""
    counts = {"num_samples": num_samples, "batch_size": batch_size}
    check_positive_int("to_arviz", **{name: count for name, count in counts.items() if count is not None})
    if isinstance(groups, str) or (unknown := [group for group in groups if group not in GROUPS]):
        found = repr(groups) if isinstance(groups, str) else ", ".join(map(repr, unknown))
        raise ValueError(f"Unknown groups {found}: choose a list from {', '.join(GROUPS)}.")
    check_dims(dims or {})
    if not isinstance(coords or {}, Mapping):
        raise TypeError(f"to_arviz wants coords as a dictionary of labels, but found {type(coords).__name__}.")
    wanted = frozenset(groups)
    named = wanted if "groups" in given_options() else frozenset()
    return CollectOptions(wanted, batch_size or BATCH_SIZE, parallel, dims or {}, progress, named)


def _inference_data(groups: Groups, coords: Mapping[str, Sequence[Any]]) -> arviz.InferenceData:
    """Return groups as `InferenceData` (ArviZ 0.x) or as `DataTree` (ArviZ 1.x)."""
    import arviz as az
    import xarray as xr

    labels = {**groups.coords, **coords}
    check_names(groups.variables, groups.coords, coords)
    datasets: dict[str, Any] = {}
    for group in (group for group in GROUPS if group in groups.variables):
        variables = {}
        for name, (array, names) in groups.variables[group].items():
            own = {xarray_name(dim): labels.get(dim, np.arange(size)) for dim, size in zip(names, array.shape, strict=True)}
            attributes = _attributes(group, name, array, groups.kinds)
            variables[xarray_name(name)] = xr.DataArray(array, own, list(own), attrs=attributes)
        datasets[group] = xr.Dataset(variables, attrs=group_attributes(groups, group))
    if int(az.__version__.split(".")[0]) == 0:
        return az.InferenceData(**datasets)
    return xr.DataTree.from_dict(datasets)  # type: ignore[return-value]


def _attributes(group: str, name: str, array: np.ndarray, kinds: Mapping[str, str]) -> dict[str, Any]:
    """Return the attributes of a variable: the kind of a log-likelihood that is not exact, and k-hat of the weights."""
    if group == "log_likelihood" and name in kinds:
        return {"kind": kinds[name]}
    if (group, name) == ("sample_stats", "log_weight"):
        log_weights = torch.as_tensor(array).flatten()
        return {"pareto_k": torch.nan if log_weights.isnan().any() else float(pareto_k(log_weights))}
    return {}


def _add_smoothed_weights(groups: Groups) -> None:
    """Add the log weights of all draws after smoothing, normalised, unless the sum of the weights is zero, infinite or NaN."""
    stats = groups.variables.get("sample_stats", {})
    array, dims = stats.get("log_weight", (np.array(np.nan), []))
    if np.isfinite(array.max()):
        smoothed = smooth_log_weights(torch.as_tensor(array).flatten())[0].log_softmax(0)
        stats["smoothed_log_weight"] = smoothed.reshape(array.shape).numpy(), dims


def draws_of_data(data: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the draws of ArviZ data, (chain, draw, ...) by name, and the statistics of each draw, (chain, draw).

    Args:
        data: `InferenceData` or `DataTree` with the group ``posterior``.
    """
    variables = {str(name): torch.as_tensor(np.asarray(x.values)) for name, x in data["posterior"].data_vars.items()}
    stats = data["sample_stats"].data_vars if "sample_stats" in data else {}
    return variables, {
        str(name): torch.as_tensor(np.asarray(x.values)) for name, x in stats.items() if x.dims == ("chain", "draw")
    }


def pareto_k_of_data(data: Any) -> dict[str, Tensor]:
    """Return k-hat of all draws, (), by the name "", and of each row's, (rows...), by that of its plate; the largest of chains.

    Args:
        data: `InferenceData` or `DataTree`.
    """
    stats = data["sample_stats"].data_vars if "sample_stats" in data else {}
    return {
        str(name).removeprefix(PARETO_K).removeprefix("_"): torch.as_tensor(np.asarray(x.values)).amax(0)
        for name, x in stats.items()
        if f"{name}_".startswith(f"{PARETO_K}_") and x.dims[:1] == ("chain",)
    }


def chain_diagnostics(draws: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return R-hat, bulk and tail effective sample size of scalars, by name. R-hat of one chain is NaN.

    Args:
        draws: draws of each scalar, (chain, draw).
    """
    import arviz as az
    import xarray as xr

    data = xr.Dataset({f"x{i}": (("chain", "draw"), x.numpy()) for i, x in enumerate(draws.values())})
    single = next(iter(draws.values())).shape[0] == 1
    bulk, tail = az.ess(data, method="bulk"), az.ess(data, method="tail")
    r_hat = None if single else az.rhat(data)
    return {
        name: {
            "r_hat": float("nan") if r_hat is None else float(r_hat[f"x{i}"]),
            "ess_bulk": float(bulk[f"x{i}"]),
            "ess_tail": float(tail[f"x{i}"]),
        }
        for i, name in enumerate(draws)
    }


def log_likelihood_of_data(data: Any) -> dict[str, Tensor]:
    """Return the log densities of the observed variables of ArviZ data, (chain, draw, rows...) by name.

    Args:
        data: `InferenceData` or `DataTree`.
    """
    return variables_of_data(data, "log_likelihood")


def variables_of_data(data: Any, group: str) -> dict[str, Tensor]:
    """Return the variables of a group of ArviZ data by name; none if there is no such group.

    Args:
        data: `InferenceData` or `DataTree`.
        group: name of the group.
    """
    variables = data[group].data_vars if group in data else {}
    return {str(name): torch.as_tensor(np.asarray(x.values)) for name, x in variables.items()}


def plot_predictive(replicated: Mapping[str, Tensor], observed: Mapping[str, Tensor], num_samples: int = 50) -> Any:
    """Plot the distribution of data over those of replicated data, by `az.plot_ppc` or, in ArviZ 1, by `az.plot_ppc_dist`.

    Args:
        replicated: replicated data, (draw, entries) by name.
        observed: the data, (entries,) by name.
        num_samples: number of replicated data sets.
    """
    import arviz as az
    import xarray as xr

    entries = {name: (f"{name}_entry", np.arange(len(y))) for name, y in observed.items()}
    coords = dict(entries.values())
    draws = {"chain": np.zeros(1, int), "draw": np.arange(len(next(iter(replicated.values()))))}
    replicas = {name: (("chain", "draw", entries[name][0]), x[None].numpy()) for name, x in replicated.items()}
    data = {name: (entries[name][0], y.numpy()) for name, y in observed.items()}
    datasets: dict[str, Any] = {
        "posterior_predictive": xr.Dataset(replicas, draws | coords),
        "observed_data": xr.Dataset(data, coords),
    }
    plot_ppc_dist = getattr(az, "plot_ppc_dist", None)
    if plot_ppc_dist is not None:
        return plot_ppc_dist(xr.DataTree.from_dict(datasets), num_samples=num_samples)
    with warnings.catch_warnings():  # ArviZ 0.23 calls matplotlib 3.11 in a way that it warns of
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping", DeprecationWarning)
        return az.plot_ppc(az.InferenceData(**datasets), num_pp_samples=min(num_samples, len(draws["draw"])))


def elpd_data(data: Any, name: str, *, elpd: Tensor, pareto_k: Tensor, p_loo: float, max_pareto_k: float) -> Any:
    """Return leave-one-out densities of rows as ArviZ's `ELPDData`.

    Args:
        data: `InferenceData` or `DataTree` with the groups ``posterior`` and ``log_likelihood``.
        name: name of the observed variable.
        elpd: log predictive density of each row, in nats, (rows...).
        pareto_k: k-hat of each row, (rows...).
        p_loo: effective number of parameters.
        max_pareto_k: largest k-hat that is trusted.
    """
    import arviz as az

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of values that are replaced
        found = az.loo(data, pointwise=True, var_name=name)
    is_old = hasattr(found, "loo_i")
    rows = found.loo_i if is_old else found.elpd_i
    total, std_error = float(elpd.sum()), float(elpd.std() * elpd.numel() ** 0.5)
    values = {
        "elpd_loo" if is_old else "elpd": total,
        "p_loo" if is_old else "p": p_loo,
        "loo_i" if is_old else "elpd_i": rows.copy(data=elpd.numpy()),
        "se": std_error,
        "pareto_k": found.pareto_k.copy(data=pareto_k.numpy()),
        "warning": bool((pareto_k > max_pareto_k).any()),
    }
    for key, value in values.items():
        setattr(found, key, value)
    return found
