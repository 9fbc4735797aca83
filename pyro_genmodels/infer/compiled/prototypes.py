"""First runs of a model: what a log density needs to know of it, and what it cannot have."""

from __future__ import annotations

__all__ = ["Prototype", "first_runs"]

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.autoguide.initialization import InitMessenger, init_to_uniform
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.reparam import replaceable
from pyro_genmodels._pyro.sites import is_deterministic
from pyro_genmodels.infer.compiled.coordinates import check_same_support
from pyro_genmodels.infer.compiled.initial import never_without
from pyro_genmodels.utils.precision import step_in_errors

MAX_TRIES = 20
"""Largest number of first runs of a model that fail before its error is raised."""


class Prototype(NamedTuple):
    """A summary of the first runs of a model: its latent variables and what must be known of them.

    Attributes:
        potential: map from unconstrained values by name to minus the log density, with discrete variables summed out.
        transforms: map from the support of each continuous variable to unconstrained values, by name.
        values: a value of each of these variables, by name.
        supports: support of each of these variables, by name.
        others: names of discrete and of deterministic variables.
        enumerated: the model with its discrete variables enumerated.
        observed: for each observed site, a `pyro.factor` too, how far apart the numbers of the latent variables' dtype are near
            its data, in standard errors of their mean.
    """

    potential: Callable[[Mapping[str, Tensor]], Tensor]
    transforms: Mapping[str, Any]
    values: Mapping[str, Tensor]
    supports: Mapping[str, Any]
    others: frozenset[str]
    enumerated: Callable[[], Any]
    observed: Mapping[str, float]


def first_runs(run: Callable[[], Any]) -> Prototype:
    """Run a model for what does not change from run to run.

    Random values may lie where the model cannot run, such as at a matrix that is not positive definite, so there are several
    tries.

    Args:
        run: the model without arguments.

    Raises:
        ValueError: naming a plate that subsamples, a discrete variable that cannot be enumerated, or a variable whose support
            or shape depends on other variables.
        RuntimeError: of the model, if all tries fail.
    """
    for tries_left in reversed(range(MAX_TRIES)):
        try:
            with poutine.block(), torch.no_grad(), pyro.validation_enabled(is_validate=False):
                alone = poutine.trace(InitMessenger(never_without(_draw))(run)).get_trace()
                _check_sites(alone)
                nesting = _plate_nesting(alone)
                _, potential, transforms, trace = initialize_model(
                    run, max_plate_nesting=nesting, init_strategy=never_without(init_to_uniform), initial_params={}
                )
        except RuntimeError:
            if not tries_left:
                raise
        else:
            break
    _check_variables(alone, trace, transforms)
    enumerated = poutine.enum(config_enumerate(run), first_available_dim=-1 - nesting)
    nodes: Any = trace.nodes
    others = {name for name, site in nodes.items() if site["type"] == "sample" and _has_value(site)} - set(transforms)
    values = {name: nodes[name]["value"] for name in transforms}
    dtype = max((x.dtype for x in values.values()), key=lambda d: torch.finfo(d).eps, default=torch.float64)
    data: dict[str, Any] = {name: alone.nodes[name]["value"] for name in traces.observed(alone)}
    return Prototype(
        potential,
        transforms,
        values,
        {name: nodes[name]["fn"].support for name in transforms},
        frozenset(others),
        enumerated,
        {name: step_in_errors(x, dtype) if isinstance(x, Tensor) else 0.0 for name, x in data.items()},
    )


def _has_value(site: Any) -> bool:
    """Return True for a latent or deterministic variable, False for data and the rows of a plate."""
    return not site_is_subsample(site) and (is_deterministic(site) or not site["is_observed"])


def _draw(site: Mapping[str, Any]) -> Any:
    """Return a draw of a site's distribution, as Pyro makes it."""
    return replaceable(site["fn"](*site["args"], **site["kwargs"]))


def _check_sites(trace: Trace) -> None:
    """Check that a model has no plate that subsamples, and no discrete variable that cannot be enumerated.

    Raises:
        ValueError: naming the first one.
    """
    for name, site in trace.iter_stochastic_nodes():
        fn: Any = site["fn"]
        if site_is_subsample(site):
            if fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"The plate {name!r} subsamples {fn.subsample_size} of {fn.size} rows, so that the density would differ "
                    "from call to call. Give the plate all rows, or fit the model by SVI."
                )
        elif not fn.has_enumerate_support and fn.support.is_discrete:
            raise ValueError(
                f"The variable {name!r} is discrete and cannot be enumerated ({fn}), so it has no place in a log density over "
                "continuous variables. Sum it out in the model, or observe it."
            )


def _plate_nesting(trace: Trace) -> int:
    """Return the number of batch dimensions that the plates of a model take."""
    sampled = (site for site in trace.nodes.values() if site["type"] == "sample")
    return max((-frame.dim for site in sampled for frame in site["cond_indep_stack"] if frame.dim is not None), default=0)


def _check_variables(alone: Trace, enumerated: Trace, transforms: Mapping[str, Any]) -> None:
    """Check that the continuous variables of two runs have the same names, shapes and supports.

    Args:
        alone: trace without enumeration.
        enumerated: trace with enumeration.
        transforms: maps from the supports of the second trace to unconstrained coordinates.

    Raises:
        ValueError: naming the first variable that differs.
    """
    sites: dict[str, Any] = {name: site for name, site in alone.iter_stochastic_nodes() if not site_is_subsample(site)}
    continuous = {name for name, site in sites.items() if not site["fn"].has_enumerate_support}
    for name in sorted(continuous ^ set(transforms)):
        raise ValueError(
            f"The variable {name!r} is not in every run of the model, and a log density wants the same ones in all."
        )
    for name, transform in transforms.items():
        value: Any = sites[name]["value"]
        other: Any = enumerated.nodes[name]["value"]
        if value.shape != other.shape:
            raise ValueError(
                f"The distribution of {name!r} depends on a discrete variable: its shape is {tuple(value.shape)}, and "
                f"{tuple(other.shape)} where that is enumerated. Sample one value of {name!r} for each value of the discrete "
                "variable, before it, and choose among them."
            )
        check_same_support(name, transform.inv, sites[name]["fn"].support, transform(value))
