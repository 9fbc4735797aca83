r"""The partition function of an energy, :math:`Z = \int p_0(x)\, e^{-E(x)}\, dx`, with what is known of its error."""

from __future__ import annotations

__all__ = ["log_partition", "quick_log_partition"]

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.annealed import Annealing
from pyro_genmodels.distributions.energy.exact import MAX_STATES, exact_log_partition
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.utils.distributions import check_exact_density, unwrap, without_validation

MAX_DEFAULT_EVALUATIONS = 2**25
"""Evaluations of a conditional energy, over all its contexts, by which it is summed or integrated unasked."""


def log_partition(
    energy: Any,
    *,
    num_chains: int = 256,
    num_steps: int = 1000,
    draws: Tensor | None = None,
    start: Any = None,
    exact: bool | None = None,
    batch_size: int = 20_000,
    progress: bool = False,
) -> LogPartition:
    """The log of Z of an energy with its parameters as they are; a family remembers it until they change.

    Args:
        energy: an energy's distribution, or a family without a context, or the `Fit` of one.
        num_chains: of annealed importance sampling; of a conditional energy, for each context.
        num_steps: betas of its path, with one step of the sampler each.
        draws: exact draws of the model, (n, *event_shape), if such can be had, from which to anneal backwards as well.
        start: density over one datum that the path begins with, in place of the energy's own: a Pyro distribution or a family
            without a context, such as a flow that was trained on the data. The nearer, the better the estimate.
        exact: whether to sum or integrate over all there is; None does where it can. An integral whose last two grids differ by
            more than 1e-5 is an estimate, and that difference its error.
        batch_size: chains at once, where there are many contexts.
        progress: whether to show a progress bar.

    Returns:
        log Z, () or of the batch shape of a conditional energy.

    Raises:
        ValueError: if an exact value is asked for that cannot be had, or the energy has no sampler.

    Warns:
        RuntimeWarning: if the estimate is unreliable: if hardly any chain carries weight, or forwards and backwards disagree by
            more than three standard errors.

    Example:
        >>> import torch
        >>> from pyro_genmodels.distributions import Energy
        >>> normal = Energy(lambda x: 0.5 * x.square().sum(-1), (2,))
        >>> log_partition(normal)  # log(2 pi)
        LogPartition(value=tensor(1.8379), std_error=tensor(0.), kind='exact', ...)
    """
    dist = _energy_of(energy)
    if not (isinstance(num_chains, int) and isinstance(num_steps, int) and num_chains >= 2 and num_steps >= 1):
        raise ValueError(f"num_chains wants 2 or more and num_steps 1 or more, but found {num_chains} and {num_steps}.")
    if draws is not None and not (isinstance(draws, Tensor) and draws.shape[1:] == dist.event_shape and len(draws) >= 2):
        found = tuple(draws.shape) if isinstance(draws, Tensor) else type(draws).__name__
        raise ValueError(f"draws wants a tensor of two or more draws, (n, *{tuple(dist.event_shape)}), but found {found}.")
    distinct, place = _distinct(dist)
    with torch.no_grad():
        found = None
        origin = None
        if start is not None:
            origin = without_validation(check_exact_density("log_partition", "start", start, dist.event_shape))
        if exact is not False:
            found = exact_log_partition(
                distinct, None if exact or place is None else MAX_DEFAULT_EVALUATIONS, progress=progress
            )
        if origin is not None:
            distinct = distinct.replace(path=dataclasses.replace(distinct.path, origin=origin))
        if found is None and exact:
            raise ValueError(
                f"log Z of this energy over events {tuple(dist.event_shape)} cannot be had exactly: that takes at most "
                f"{MAX_STATES} outcomes, 20 hidden units of a Boltzmann machine, or two real dimensions. Leave exact out."
            )
        found = found or Annealing(distinct, num_chains, num_steps, progress).estimate(draws, batch_size)
    if place is not None:
        each = {name: getattr(found, name) for name in ("value", "std_error", "effective_sample_size")}
        found = dataclasses.replace(found, **{n: v[place].reshape(dist.batch_shape) for n, v in each.items() if v is not None})
    dist.remember_log_partition(found)
    return found


def quick_log_partition(dist: Energy) -> LogPartition:
    """What is known of log Z, or else the estimate of a short run, which an energy's family then remembers.

    It is for telling epochs of training apart; who wants the likelihood estimates it at length.
    """
    if dist.log_partition is not None:
        return dist.log_partition
    chains, steps = (100, min(max(200, dist.event_shape.numel()), 1000)) if dist.context is None else (16, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its kind says the same, and remains
        return log_partition(dist, num_chains=chains, num_steps=steps, exact=False)


def _distinct(dist: Energy) -> tuple[Energy, Tensor | None]:
    """The distribution given each context once, (n, c), and where in these each of its own is: labels come again and again."""
    if dist.context is None:
        return dist, None
    rows, place = dist.context.detach().reshape(-1, dist.context.shape[-1]).unique(dim=0, return_inverse=True)
    place = place.reshape(dist.context.shape[:-1]).expand(dist.batch_shape)
    return dist.replace(context=rows, _batch_shape=rows.shape[:1]), place


def _energy_of(energy: Any) -> Energy:
    """The energy's distribution, given that or what makes it: a family, or the `Fit` of one."""
    energy = getattr(energy, "family", energy)
    made = energy() if callable(energy) and not isinstance(energy, Distribution) else energy
    dist = unwrap(made) if isinstance(made, Distribution) else made
    if not (isinstance(dist, Distribution) and capabilities(dist).intractable):
        raise TypeError(f"Wanted an energy's distribution, such as EnergyModel((2,))(), but found {type(dist).__name__}.")
    return dist
