"""Initial values of chains: strategies of Pyro's, values by name, or draws of a fit."""

from __future__ import annotations

__all__ = ["as_strategy"]

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_generated, init_to_value
from pyro.poutine.util import prune_subsample_sites

from pyro_genmodels._pyro import traces
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
