"""Initial values of chains: strategies of Pyro's, values by name, or draws of a fit."""

from __future__ import annotations

__all__ = ["as_strategy", "as_values", "flat_coordinates", "never_without", "off_modes", "within_precision"]

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_generated, init_to_value
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.reparam import replaceable
from pyro_genmodels.utils.tensors import as_tensor

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Map from coordinates, (dim,), to log density, (), and its gradient, (dim,)."""

MAX_ROUNDING = 1.0
"""Largest rounding of a log density, in nats, that chains can start with."""
MAX_CLIMB = 100
"""Largest number of steps uphill to where it is smaller."""
NUM_MOVES = 6
"""Number of moves away from a mode that are tried, each of a tenth of the size of the one before."""

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
        return init_to_value(values=as_values(init))
    if hasattr(init, "get_samples"):
        return init_to_generated(generate=partial(_one_draw, init.get_samples()))
    if callable(init) and not hasattr(init, "guide"):
        return init
    _, guide = traces.as_pair(init)
    return init_to_generated(generate=partial(_one_run, guide, args, kwargs))


def as_values(init: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return initial values by name as tensors of floats.

    Raises:
        TypeError: if a value has no numbers.
    """
    return {name: as_tensor(value, f"init, for {name!r},", floats=torch.get_default_dtype()) for name, value in init.items()}


def flat_coordinates(evaluate: Evaluate, starts: Tensor) -> Tensor:
    """Return True for each coordinate that a model says nothing about, (dim,), as far as some points show.

    The gradient of the log density is the same at all of them, exactly: 0, or 1 for a positive variable, whose coordinate is
    its logarithm. There is no such distribution. The points are the starts, and others near and far, on both sides of them.

    Args:
        evaluate: map from coordinates, (dim,), to log density, (), and its gradient, (dim,).
        starts: points with a finite gradient, (n, dim).
    """
    slopes = torch.stack([evaluate(z)[1] for z in starts])
    slope = slopes[0]
    flat = (slopes == slope).all(0) & ((slope == 0) | (slope == 1))
    z = starts[0]
    for distance in (2.0, 20.0, 200.0, 2000.0):
        if not flat.any():
            break
        move = distance * torch.empty_like(z).uniform_(-1.0, 1.0)
        for nearby in (z + move, z - move, z + move * flat, z - move * flat):
            value, gradient = evaluate(nearby)
            if value.isfinite() and gradient.isfinite().all():
                flat = flat & (gradient == slope)
    return flat


def within_precision(evaluate: Evaluate, starts: Tensor, eps: float) -> Tensor:
    """Return starts, (n, dim), with those moved uphill, by L-BFGS, at which the log density is rounded by more than a nat.

    Args:
        evaluate: map from coordinates, (dim,), to log density, (), and its gradient, (dim,).
        starts: points with a finite gradient, (n, dim).
        eps: relative distance of neighbouring numbers in the model's precision.
    """
    limit = MAX_ROUNDING / eps
    return torch.stack([z if abs(float(evaluate(z)[0])) <= limit else _climbed(evaluate, z, limit) for z in starts])


def _climbed(evaluate: Evaluate, start: Tensor, limit: float) -> Tensor:
    """Return a point uphill, (dim,), where the size of the log density is below a limit, or as high as it is found."""
    from scipy.optimize import minimize  # slow to import, and rarely needed

    best, highest = start, float(evaluate(start)[0])

    def negative(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best, highest
        z = torch.from_numpy(x.copy()).to(start)
        value, gradient = evaluate(z)
        if not value.isfinite() or not gradient.isfinite().all():
            return np.inf, np.zeros_like(x)
        if float(value) > highest:
            best, highest = z, float(value)
        return -float(value), -gradient.double().cpu().numpy()

    def stop(intermediate_result: Any) -> None:
        if abs(intermediate_result.fun) <= limit:
            raise StopIteration

    first = start.double().cpu().numpy()
    minimize(negative, first, jac=True, method="L-BFGS-B", callback=stop, options={"maxiter": MAX_CLIMB})
    return best


def off_modes(evaluate: Evaluate, starts: Tensor) -> Tensor:
    """Return starts, (n, dim), with each coordinate whose gradient is exactly 0, as at a mode, moved a little.

    A sampler that takes its first scales from the gradient can begin there.

    Args:
        evaluate: map from coordinates, (dim,), to log density, (), and its gradient, (dim,).
        starts: points with a finite gradient, (n, dim).
    """
    return torch.stack([_off_mode(evaluate, z) for z in starts])


def _off_mode(evaluate: Evaluate, start: Tensor) -> Tensor:
    """Return one start, (dim,), as `off_modes` does."""
    _, gradient = evaluate(start)
    z = start
    for power in range(1, NUM_MOVES + 1):
        if gradient.ne(0).all():
            return z
        move = 0.1**power * torch.randn_like(z)
        nearby = z + torch.where(gradient.eq(0), move, torch.zeros_like(z))
        value, found = evaluate(nearby)
        if value.isfinite() and found.isfinite().all():
            z, gradient = nearby, found
    return z


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


def _one_draw(draws: Mapping[str, Tensor]) -> Strategy:
    """Return the strategy that starts at one of some draws, (draws, ...) by name, chosen at random."""
    i = int(torch.randint(len(next(iter(draws.values()))), ()))
    return init_to_value(values={name: values[i] for name, values in draws.items()})


def _one_run(guide: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Strategy:
    """Return the strategy that starts at a draw of a guide."""
    with poutine.block(), torch.no_grad():
        trace = prune_subsample_sites(poutine.trace(lambda: guide(*args, **kwargs)).get_trace())
    values: dict[str, Any] = {name: trace.nodes[name]["value"] for name in traces.latents(trace)}
    return init_to_value(values={name: value.detach() for name, value in values.items()})
