"""Sources of draws whose guide and data go with the model, or an error that names the site."""

from __future__ import annotations

__all__ = ["checked_source"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, params, sites, traces
from pyro_genmodels.inference_data.sources import DrawSource, source_of
from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.rng import forked_rng


def checked_source(fit: Any, args: tuple, kwargs: Mapping[str, Any], num_samples: int | None) -> DrawSource:
    """Return the source of draws that a fit is, after a run of its model and guide.

    Args:
        fit: the fit: see `source_of`.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        num_samples: number of draws to make, or None.

    Raises:
        ValueError: naming variables of the guide that the model lacks, or an observed site whose data are NaN or have a shape
            that does not go with its distribution; or as `source_of` does.

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
    for name in traces.observed(model_trace):
        _check_data(name, model_trace.nodes[name])
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
