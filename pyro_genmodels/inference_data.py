r"""From a fit to ArviZ: the only file that imports arviz.

Draw :math:`s` of the posterior carries :math:`\log p(x, z_s)`, :math:`\log q(z_s)` and their difference, the log weight that
Pareto-smoothed importance sampling starts from (Yao et al., *Yes, but Did It Work?*, arXiv 1802.02538).
"""

from __future__ import annotations

__all__ = ["to_arviz"]

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_genmodels import traces

if TYPE_CHECKING:
    import arviz

Named = dict[str, tuple[np.ndarray, list[str]]]


def to_arviz(
    fit: Any,
    *args: Any,
    num_samples: int = 1000,
    batch_size: int = 100,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> arviz.InferenceData:
    """What a fit says, as ArviZ data of one chain.

    Groups: ``posterior``, draws of the latent variables from the guide; ``posterior_predictive``, draws of what the model
    observes; ``sample_stats`` with ``log_p``, ``log_q`` and ``log_weight`` (nats) of each posterior draw; ``observed_data``.
    Plates are dimensions by their names. A family called without data gives draws of x, and of its latent variables from
    their prior.

    Args:
        fit: a family, an `SVI`, or a pair (model, guide).
        args: the model's own arguments.
        num_samples: draws.
        batch_size: draws made at once, which bounds memory.
        coords: labels of dimensions.
        dims: names of the event dimensions of a variable, by its name.
        kwargs: the model's own keyword arguments.

    Raises:
        ValueError: if num_samples or batch_size is not positive.

    Example:
        >>> from pyro_genmodels import Flow
        >>> to_arviz(Flow((2,)), num_samples=50).posterior_predictive.sizes["draw"]
        50
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"num_samples and batch_size must be positive, got {num_samples} and {batch_size}.")
    model, guide = traces.as_pair(fit)
    given = not _draws_family(model, args, kwargs)
    if not given and kwargs.get("context") is None:
        kwargs = {"size": 1, **kwargs}
    named = dict(dims or {})
    with traces.looking_on(model, guide):
        nesting = traces.max_plate_nesting(model, guide, args, kwargs)
        blocks = [
            _draw(model, guide, args, kwargs, min(batch_size, num_samples - start), nesting, named, given=given)
            for start in range(0, num_samples, batch_size)
        ]
    groups: dict[str, Named] = {}
    for group, variables in blocks[0].items():
        for name, (values, names) in variables.items():
            if "draw" in names:
                values = np.concatenate([block[group][name][0] for block in blocks], axis=1)
            groups.setdefault(group, {})[name] = (values, names)
    if not given and kwargs.get("size") == 1:  # one row per draw: the plate says nothing
        groups = {g: {n: _without_plate(*v) for n, v in variables.items()} for g, variables in groups.items()}
    return _inference_data(groups, coords)


def _draws_family(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether this is a family's own model, called without data."""
    family = getattr(model, "__self__", None)
    return hasattr(family, "event_shape") and hasattr(family, "guide") and not args and kwargs.get("x") is None


def _draw(
    model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], n: int, nesting: int, dims: Mapping, *, given: bool
) -> dict[str, Named]:
    """One block of n draws of every group."""
    dim = -nesting - 1
    plate = traces.particles(n, nesting)
    guide_trace = poutine.trace(plate(lambda: guide(*args, **kwargs))).get_trace()
    replayed = poutine.replay(plate(lambda: model(*args, **kwargs)), trace=guide_trace)
    drawn = prune_subsample_sites(poutine.trace(poutine.uncondition(replayed)).get_trace())
    groups: dict[str, Named] = {"posterior": {}, "posterior_predictive": {}}
    if not given:
        for name, site in traces.samples(drawn).items():
            group = "posterior_predictive" if name == "x" else "posterior"
            groups[group][name] = _variable(name, site, dim, dims, n)
        return {g: v for g, v in groups.items() if v}

    model_trace = prune_subsample_sites(poutine.trace(replayed).get_trace())
    guide_trace = prune_subsample_sites(guide_trace)
    observed = traces.observed(model_trace)
    groups["observed_data"] = {}
    for name, site in traces.samples(model_trace).items():
        if name in observed:
            groups["posterior_predictive"][name] = _variable(name, traces.samples(drawn)[name], dim, dims, n)
            groups["observed_data"][name] = _variable(name, site, dim, dims, None)
        else:
            groups["posterior"][name] = _variable(name, site, dim, dims, n)
    if groups["posterior"]:
        log_p, log_q = (_per_draw(trace, dim, n) for trace in (model_trace, guide_trace))
        stats = {"log_p": log_p, "log_q": log_q, "log_weight": log_p - log_q}
        groups["sample_stats"] = {name: (value[None], ["chain", "draw"]) for name, value in stats.items()}
    return {g: v for g, v in groups.items() if v}


def _per_draw(trace: Trace, dim: int, n: int) -> np.ndarray:
    return _numpy(traces.log_prob(trace, (dim,), scaled=True).expand(n))


def _variable(name: str, site: Mapping[str, Any], dim: int, dims: Mapping, n: int | None) -> tuple[np.ndarray, list[str]]:
    """A site's value with its dimensions named: (chain, draw, plates from the left, event), or without draws if n is None."""
    value: Tensor = site["value"]
    event_dim = site["fn"].event_dim
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.vectorized and f.name != traces.PARTICLES}
    value = value.reshape((1,) * (-dim - value.dim() + event_dim) + value.shape)
    batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
    sizes = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    value = value.expand([sizes.get(i, batch[i]) if i != dim or n is not None else 1 for i in range(dim, 0)] + list(event))
    keep = sorted(plates)
    value = value.reshape([n or 1, *(value.shape[i - event_dim] for i in keep), *event])
    event_names = list(dims.get(name, [f"{name}_dim_{i}" for i in range(event_dim)]))
    if len(event_names) != event_dim:
        raise ValueError(
            f"dims[{name!r}] names {len(event_names)} dimensions, but the variable has {event_dim} event dimensions."
        )
    names = [plates[i] for i in keep] + event_names
    array = _numpy(value)
    return (array[0], names) if n is None else (array[None], ["chain", "draw", *names])


def _without_plate(values: np.ndarray, names: list[str]) -> tuple[np.ndarray, list[str]]:
    if "data" not in names:
        return values, names
    axis = names.index("data")
    return values.squeeze(axis), names[:axis] + names[axis + 1 :]


def _numpy(value: Tensor) -> np.ndarray:
    return value.detach().cpu().numpy()


def _inference_data(groups: Mapping[str, Named], coords: Mapping[str, Sequence[Any]] | None) -> arviz.InferenceData:
    import arviz as az

    drawn: dict[str, Any] = {g: {n: v for n, (v, _) in variables.items()} for g, variables in groups.items()}
    dims = {n: [d for d in names if d not in ("chain", "draw")] for v in groups.values() for n, (_, names) in v.items()}
    return az.from_dict(**drawn, dims=dims, coords=dict(coords or {}))
