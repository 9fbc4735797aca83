r"""From a fit to ArviZ: the only file that imports arviz.

Draw :math:`s` of the posterior carries :math:`\log p(x, z_s)`, :math:`\log q(z_s)` and their difference, the log weight that
Pareto-smoothed importance sampling starts from (Yao et al., *Yes, but Did It Work?*, arXiv 1802.02538).
"""

from __future__ import annotations

__all__ = ["to_arviz"]

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine import Trace
from pyro.poutine.subsample_messenger import _Subsample
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
    parallel: bool | None = None,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> arviz.InferenceData:
    """What a fit says, as ArviZ data of one chain.

    Groups: ``posterior``, draws of the latent variables from the guide; ``posterior_predictive``, draws of what the model
    observes; ``sample_stats`` with ``log_p`` and (unless the guide is a point mass) ``log_q`` and ``log_weight``, in nats, of
    each posterior draw; ``observed_data``.
    Plates are dimensions by their names. A family called without data gives draws of x, and of its latent variables from
    their prior.

    Args:
        fit: a family, an `SVI`, or a pair (model, guide).
        args: the model's own arguments.
        num_samples: draws.
        batch_size: draws made at once, which bounds memory.
        parallel: whether draws are made together in one run, which a model must allow (no ``z[0]`` or ``z.sum()``); None tries
            out whether it does.
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
    call = _own_call(model, args, kwargs)
    data_given = call is None
    args, kwargs = call or (args, kwargs)
    with traces.looking_on():
        layout = _Layout(model, guide, args, kwargs, dims or {}, parallel=parallel)
        at_once = batch_size if layout.parallel else 1
        sizes = [min(at_once, num_samples - start) for start in range(0, num_samples, at_once)]
        draw = _draw_posterior if data_given else _draw_family
        blocks = [draw(layout, n) for n in sizes]
    groups: dict[str, Named] = {}
    for group, variables in blocks[0].items():
        for name, (values, names) in variables.items():
            if "draw" in names:
                values = np.concatenate([block[group][name][0] for block in blocks], axis=1)
            groups.setdefault(group, {})[name] = (values, names)
    if not data_given and kwargs.get("size") == 1:  # one row per draw: the plate says nothing
        groups = {g: {n: _without_plate(*v) for n, v in variables.items()} for g, variables in groups.items()}
    return _inference_data(groups, {**layout.coords, **(coords or {})})


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


class _Layout:
    """A model and its guide with their arguments, and what one run tells: plates, their rows, and the shapes of events."""

    def __init__(
        self, model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], dims: Mapping, *, parallel: bool | None
    ) -> None:
        self.dims = dims
        guide_trace = poutine.trace(lambda: guide(*args, **kwargs)).get_trace()
        model_trace = poutine.trace(poutine.replay(lambda: model(*args, **kwargs), trace=guide_trace)).get_trace()
        sites = [(name, site) for t in (guide_trace, model_trace) for name, site in traces.samples(t).items()]
        self.nesting = max((traces.depth(site) for _, site in sites), default=0)
        # Pyro takes every dimension of a deterministic value for its event; those of its plates are not
        self.event_dims = {
            name: max(site["value"].dim() - traces.depth(site), 0) for name, site in sites if traces.is_deterministic(site)
        }
        self.rows = Trace()  # every run sees the same rows of a subsampled plate
        for name, site in sites:
            if isinstance(site["fn"], _Subsample) and name not in self.rows.nodes:
                self.rows.add_node(name, **site)
        indices = traces.samples(self.rows).items()
        self.coords: dict[str, Any] = {name: _numpy(site["value"]) for name, site in indices}
        self.model = poutine.replay(lambda: model(*args, **kwargs), trace=self.rows)
        self.guide = poutine.replay(lambda: guide(*args, **kwargs), trace=self.rows)
        if parallel is None:
            parallel = traces.is_family(model) or traces.vectorises(self.model, self.guide, (), {}, self.nesting)
        self.parallel = parallel

    def plate(self, n: int) -> Any:
        """What n draws are made in, or None where each has a run of its own."""
        return traces.particles(n, self.nesting) if self.parallel else None

    def drawn(self, guide_trace: Trace) -> Any:
        """The guide that draws again what it drew."""
        return poutine.replay(self.guide, trace=guide_trace)

    def variable(self, name: str, site: Mapping[str, Any], n: int | None) -> tuple[np.ndarray, list[str]]:
        """A site's value with dimensions (chain, draw, plates from the left, event), or without draws if n is None."""
        event_dim = self.event_dims.get(name, site["fn"].event_dim)
        frames = {f.dim: f for f in site["cond_indep_stack"] if f.vectorized}
        draws = -self.nesting - 1
        value: Tensor = site["value"]
        value = value.reshape((1,) * (-draws + event_dim - value.dim()) + value.shape)
        batch, event = value.shape[: value.dim() - event_dim], value.shape[value.dim() - event_dim :]
        wanted = {dim: frame.size for dim, frame in frames.items()} | {draws: n or 1}
        value = value.expand([wanted.get(dim, batch[dim]) for dim in range(draws, 0)] + list(event))
        plates = sorted(dim for dim in frames if dim != draws)
        value = value.reshape([n or 1, *(wanted[dim] for dim in plates), *event])
        event_names = list(self.dims.get(name, [f"{name}_dim_{i}" for i in range(event_dim)]))
        if len(event_names) != event_dim:
            raise ValueError(f"dims[{name!r}] names {len(event_names)} dimensions, but the variable's event has {event_dim}.")
        names = [frames[dim].name for dim in plates] + event_names
        return (_numpy(value)[0], names) if n is None else (_numpy(value)[None], ["chain", "draw", *names])


def _draw_family(layout: _Layout, n: int) -> dict[str, Named]:
    """A family's own draws: data, and their latent variables from the prior."""
    trace, _ = traces.run(layout.model, traces.no_latents, (), {}, layout.plate(n))
    groups: dict[str, Named] = {}
    for name, site in traces.samples(trace).items():
        groups.setdefault("posterior_predictive" if name == "x" else "posterior", {})[name] = layout.variable(name, site, n)
    return groups


def _draw_posterior(layout: _Layout, n: int) -> dict[str, Named]:
    """One block of n draws of every group."""
    model_trace, guide_trace = traces.run(layout.model, layout.guide, (), {}, layout.plate(n))
    predicted = traces.samples(
        traces.run(poutine.uncondition(layout.model), layout.drawn(guide_trace), (), {}, layout.plate(n))[0]
    )
    observed = traces.observed(model_trace)
    groups: dict[str, Named] = defaultdict(dict)
    for name, site in traces.samples(model_trace).items():
        if isinstance(site["fn"], Unit):  # of pyro.factor: a term, not a variable
            continue
        if name in observed:
            groups["posterior_predictive"][name] = layout.variable(name, predicted[name], n)
            groups["observed_data"][name] = layout.variable(name, site, None)
        else:
            groups["posterior"][name] = layout.variable(name, site, n)
    if traces.latents(model_trace):
        draws = (-layout.nesting - 1,)
        log_p, log_q = (_numpy(traces.log_prob(t, draws, scaled=True).expand(n)) for t in (model_trace, guide_trace))
        stats = {"log_p": log_p}
        if not traces.is_point_mass(guide_trace):
            stats |= {"log_q": log_q, "log_weight": log_p - log_q}
        groups["sample_stats"] = {name: (value[None], ["chain", "draw"]) for name, value in stats.items()}
    return groups


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
