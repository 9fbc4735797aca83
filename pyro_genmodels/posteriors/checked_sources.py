"""Sources of draws whose guide, draws and data go with the model, or an error that names the site."""

from __future__ import annotations

__all__ = ["checked_source", "number_of_draws", "source_with_model"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels._pyro import handlers, params, sites, traces
from pyro_genmodels.inference_data.sources import DrawSource, source_of
from pyro_genmodels.utils.errors import listed, warn_caller
from pyro_genmodels.utils.rng import forked_rng


def number_of_draws(fit: Any, num_samples: int) -> int | None:
    """Return how many draws are to be made of a fit: None if it has draws, such as chains."""
    has_draws = isinstance(fit, Mapping) or (hasattr(fit, "get_samples") and not hasattr(fit, "psis"))
    return None if has_draws else num_samples


def source_with_model(
    owner: str, fit: Any, args: tuple, kwargs: Mapping[str, Any], num_samples: int | None, *, needs_all: bool = False
) -> DrawSource:
    """Return what `checked_source` does, of a fit with a model.

    Args:
        owner: name of the function that wants it.
        fit: see `checked_source`.
        args: see `checked_source`.
        kwargs: see `checked_source`.
        num_samples: see `checked_source`.
        needs_all: see `checked_source`.

    Raises:
        ValueError: if it has no model; or as `checked_source`.
    """
    source = checked_source(fit, args, kwargs, num_samples, needs_all=needs_all)
    if source.model is None:
        raise ValueError(f"{owner} wants a fit with a model, but these are draws only.")
    return source


def checked_source(
    fit: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int | None,
    *,
    needs_all: bool = False,
    warns_of_prior: bool = False,
) -> DrawSource:
    """Return the source of draws that a fit is, after a run of its model and guide.

    Args:
        fit: the fit: see `source_of`.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        num_samples: number of draws to make, or None.
        needs_all: True if there have to be draws of all continuous latent variables.
        warns_of_prior: True for a warning if the model observes nothing.

    Raises:
        ValueError: naming variables of the guide that the model lacks, a latent variable whose draws are missing, not finite,
            outside its support or of a wrong shape, or an observed site whose data are NaN or have a shape that does not go
            with its distribution; or as `source_of` does.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> checked_source((model, guide), (), {}, 100)
        Traceback (most recent call last):
        ValueError: The guide samples x, which the model lacks: it has z. Rename it, or give it infer={'is_auxiliary': True}.
    """
    source = source_of(fit, args, kwargs, num_samples, None)
    if source.model is None:
        return source
    guide = None if isinstance(source.guide, Mapping) else source.guide
    with forked_rng(), handlers.side_effect_free(source.model, guide), params.isolated_param_store([]):
        if guide is None:
            model_trace = traces.trace_of(source.model, source.args, source.kwargs)
        else:
            model_trace, guide_trace = traces.run_pair(source.model, guide, source.args, source.kwargs)
            _check_names(model_trace, guide_trace)
    observed = traces.observed(model_trace)
    if not observed and warns_of_prior:
        warn_caller(
            "No site of the model is observed in this call, so that the fit is compared with the prior: pass the data too.",
            UserWarning,
        )
    for name in observed:
        _check_data(name, model_trace.nodes[name])
    if isinstance(source.guide, Mapping):
        if needs_all:
            _check_all_drawn(model_trace, source.guide)
        for name in traces.latents(model_trace):
            if name in source.guide:
                _check_draws(name, model_trace.nodes[name], source.guide[name])
    return source


def _check_names(model_trace: Any, guide_trace: Any) -> None:
    """Check that the model has the variables of the guide.

    Raises:
        ValueError: naming those that it lacks.
    """
    found = {name for name in traces.latents(guide_trace) if not guide_trace.nodes[name]["infer"].get("is_auxiliary")}
    if unknown := sorted(found - set(model_trace.nodes)):
        raise ValueError(
            f"The guide samples {listed(unknown)}, which the model lacks: it has {listed(traces.latents(model_trace))}. Rename "
            "it, or give it infer={'is_auxiliary': True}."
        )


def _check_data(name: str, site: Any) -> None:
    """Check the data of an observed site.

    Raises:
        ValueError: if they are NaN where they are not masked, or have a wrong shape.
    """
    value, fn = site["value"], site["fn"]
    if not isinstance(value, Tensor) or not hasattr(fn, "batch_shape"):
        return
    wanted = fn.batch_shape + fn.event_shape
    try:
        torch.broadcast_shapes(value.shape, wanted)
    except RuntimeError as error:
        raise ValueError(
            f"The data of site {name!r} have the shape {tuple(value.shape)}, but its distribution has {tuple(wanted)}: its "
            "parameters, the plates around it and the data want as many rows."
        ) from error
    mask = sites.mask_of(site)
    missing = value.isnan().reshape(*value.shape[: value.dim() - fn.event_dim], -1).any(-1)
    if bool((missing if mask is None else missing & mask).any()):
        raise ValueError(
            f"The data of site {name!r} hold NaN. Leave these rows out, or give obs_mask= with other numbers in their place."
        )


def _check_all_drawn(model_trace: Any, draws: Mapping[str, Tensor]) -> None:
    """Check that there are draws of all continuous latent variables. The discrete ones are summed out.

    What stands for missing data, in a site with ``obs_mask=``, need not be drawn.

    Raises:
        ValueError: naming those without draws.
    """
    missing = []
    for name in traces.latents(model_trace):
        stands_for_data = name.endswith("_unobserved") and f"{name.removesuffix('_unobserved')}_observed" in model_trace.nodes
        if name not in draws and not stands_for_data and not _support(model_trace.nodes[name]).is_discrete:
            missing.append(name)
    if missing:
        raise ValueError(
            f"The fit has no draws of {listed(missing)}, but the model has {listed(traces.latents(model_trace))}. Without them "
            "the densities of the data are not those of its posterior."
        )


def _check_draws(name: str, site: Any, draws: Tensor) -> None:
    """Check the draws of a latent variable, (draws, ...).

    Raises:
        ValueError: if they have a wrong shape, are not finite, or are outside a support that is the same for all draws.
    """
    wanted = site["fn"].batch_shape + site["fn"].event_shape
    is_subsampled = any(frame.full_size != frame.size for frame in sites.plate_frames(site))
    if not is_subsampled and draws[0].numel() != wanted.numel():
        raise ValueError(f"Each draw of {name!r} must have the shape {tuple(wanted)}, but has {tuple(draws.shape[1:])}.")
    if bad := int((~draws.isfinite()).reshape(len(draws), -1).any(1).sum()):
        raise ValueError(f"Draws of {name!r} are not finite in {bad} of {len(draws)} draws.")
    support = _support(site)
    if not is_subsampled and _is_fixed(support):
        outside = ~support.check(draws.reshape(len(draws), *wanted))
        if bad := int(outside.reshape(len(draws), -1).any(1).sum()):
            raise ValueError(f"Draws of {name!r} are outside its support, {support}, in {bad} of {len(draws)} draws.")


def _support(site: Any) -> Any:
    """Return the support of a site, or the real numbers if its distribution does not tell."""
    try:
        return site["fn"].support
    except NotImplementedError:
        return constraints.real


def _is_fixed(support: Any) -> bool:
    """Return True if a support has no bounds that may differ from draw to draw."""
    base = getattr(support, "base_constraint", None)
    return not any(isinstance(value, Tensor) for value in vars(support).values()) and (base is None or _is_fixed(base))
