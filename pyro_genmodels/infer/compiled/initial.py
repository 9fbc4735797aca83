"""Initial values of chains: strategies of Pyro's, values by name, or draws of a fit."""

from __future__ import annotations

__all__ = ["as_strategy", "never_without"]

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_generated, init_to_value
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import biject_to

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.reparam import replaceable
from pyro_genmodels.utils.tensors import as_tensor

Strategy = Callable[[Any], Any]
"""Function from a site to its initial value, such as `pyro.infer.autoguide.init_to_median`."""


def as_strategy(init: Any, args: tuple, kwargs: Mapping[str, Any]) -> Strategy:
    """Return the strategy that initial values are given by. A variable without a value starts as by `init_to_uniform`.

    Args:
        init: a strategy; values by name; or a fit: an object with draws, or a model and a guide.
        args: positional arguments of the guide.
        kwargs: keyword arguments of the guide.

    Raises:
        TypeError: if it is none of these.

    Example:
        >>> strategy = as_strategy({"z": 1.5}, (), {})
        >>> strategy({"name": "z"})
        tensor(1.5000)
    """
    if isinstance(init, Mapping):
        values = {
            name: as_tensor(value, f"init, for {name!r},", floats=torch.get_default_dtype()) for name, value in init.items()
        }
        return init_to_value(values=values)
    if hasattr(init, "get_samples"):
        return init_to_generated(generate=partial(_one_draw, init.get_samples()))
    if callable(init) and not hasattr(init, "guide"):
        return init
    _, guide = traces.as_pair(init)
    return init_to_generated(generate=partial(_one_run, guide, args, kwargs))


def never_without(strategy: Strategy) -> Strategy:
    """Return a strategy that also has values for distributions without draws, such as `pyro.distributions.ImproperUniform`.

    They are uniform between -2 and 2 in unconstrained coordinates, as those of `init_to_uniform`.

    Args:
        strategy: strategy that may draw from the distribution, or asks for a draw where it has no value.

    Example:
        >>> import pyro.distributions as dist
        >>> site = {"name": "z", "fn": dist.ImproperUniform(dist.constraints.positive, (), (3,))}
        >>> never_without(init_to_value(values={}))(site) > 0
        tensor([True, True, True])
    """

    def value(site: Any) -> Any:
        try:
            return strategy(site)
        except NotImplementedError:  # by `sample`
            fn = site["fn"]
            if fn.support.is_discrete:
                raise
            transform = biject_to(fn.support)
            return replaceable(transform(torch.empty(transform.inverse_shape(fn.shape())).uniform_(-2.0, 2.0)))

    return value


def _one_draw(draws: Mapping[str, torch.Tensor]) -> Strategy:
    """Return the strategy that starts at one of some draws, (draws, ...) by name, chosen at random."""
    i = int(torch.randint(len(next(iter(draws.values()))), ()))
    return init_to_value(values={name: values[i] for name, values in draws.items()})


def _one_run(guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Strategy:
    """Return the strategy that starts at a draw of a guide."""
    with poutine.block(), torch.no_grad():
        trace = prune_subsample_sites(poutine.trace(lambda: guide(*args, **kwargs)).get_trace())
    values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in traces.latents(trace)}
    return init_to_value(values={name: value.detach() for name, value in values.items()})
