r"""The partition function of an energy, :math:`Z = \int p_0(x)\, e^{-E(x)}\, dx`: computed, or estimated with an error."""

from __future__ import annotations

__all__ = ["log_partition", "quick_log_partition"]

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.energy.annealed import Annealing
from pyro_genmodels.distributions.energy.distribution import Energy
from pyro_genmodels.distributions.energy.exact import MAX_HIDDEN_UNITS, MAX_STATES, exact_log_partition
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.utils.distributions import check_exact_density, has_active_dropout, unwrap, without_validation
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.parallel import check_n_jobs

MAX_DEFAULT_EVALUATIONS = 2**25
"""Largest number of energies, over all contexts, that a conditional energy is summed or integrated over by default."""


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
    n_jobs: int | None = None,
) -> LogPartition:
    """Compute or estimate log Z of an energy for its present parameters; a family stores it until they change.

    Args:
        energy: distribution of an energy, a family without a context, or the `Fit` of one.
        num_chains: chains of annealed importance sampling, for each context.
        num_steps: betas of its path, with one step of the sampler each.
        draws: exact draws of the model, (n, *event_shape), from which to anneal backwards as well; None without.
        start: density over one datum at which the path starts instead of at the energy's own start: a Pyro distribution or a
            family without a context, such as a flow that was trained on the data. A density near the energy's gives a better
            estimate.
        exact: True to sum or integrate, False to estimate; None sums or integrates where it can. An integral whose last two
            grids differ by more than 1e-5 is an estimate, with that difference as its error.
        batch_size: largest number of chains in memory.
        progress: True to show a progress bar.
        n_jobs: number of processes, as joblib takes it, for the chains of an estimate. They run in blocks with a seed each, so
            that the estimate does not depend on the number. None runs them together in this process, which is best for small
            energies. The extra ``parallel`` runs more than one.

    Returns:
        log Z in nats, () or of the batch shape of a conditional energy, with its standard error, kind and k-hat.

    Raises:
        TypeError: if it is not an energy.
        ValueError: if an exact value is asked for and cannot be computed, the energy has no sampler, or its dropout is active.

    Warns:
        RuntimeWarning: if the estimate is unreliable: if few chains carry all the weight, k-hat of the weights is above .7
            (`pyro_genmodels.utils.pareto`), or forwards and backwards estimates differ by more than three standard errors.

    Example:
        >>> import torch
        >>> from pyro_genmodels.distributions import Energy
        >>> normal = Energy(lambda x: 0.5 * x.square().sum(-1), (2,))
        >>> log_partition(normal)  # log(2 pi)
        LogPartition(value=tensor(1.8379), std_error=tensor(0.), kind='exact', ...)
    """
    dist = _energy_of(energy)
    check_positive_int("log_partition", num_steps=num_steps, batch_size=batch_size)
    check_positive_int("log_partition", least=2, num_chains=num_chains)
    if n_jobs is not None:
        check_n_jobs("log_partition", n_jobs)
    if not (exact is None or isinstance(exact, bool)):
        raise ValueError(f"log_partition wants exact to be True, False or None, but found {exact!r}.")
    if draws is not None and not (isinstance(draws, Tensor) and draws.shape[1:] == dist.event_shape and len(draws) >= 2):
        found = tuple(draws.shape) if isinstance(draws, Tensor) else type(draws).__name__
        raise ValueError(
            f"log_partition wants two or more exact draws, (n, *{tuple(dist.event_shape)}), but found {found} as draws."
        )
    if has_active_dropout(dist.path.energy, dist.path.base):
        raise ValueError(
            "An energy whose dropout is active has no log Z, because each call is another energy. Call .eval() on it first, or "
            "build it without dropout."
        )
    distinct, place = _distinct(dist)
    with torch.no_grad():
        result = None
        if start is not None:
            start = without_validation(check_exact_density("log_partition", "start", start, dist.event_shape))
        if exact is not False:
            limit = None if exact or place is None else MAX_DEFAULT_EVALUATIONS
            result = exact_log_partition(distinct, limit, progress=progress)
        if result is None and exact:
            raise ValueError(
                f"log Z of this energy over events {tuple(dist.event_shape)} cannot be computed exactly: that takes at most "
                f"{MAX_STATES} outcomes, {MAX_HIDDEN_UNITS} hidden units of a Boltzmann machine, or two real dimensions. Leave "
                "exact out."
            )
        if result is None:
            if start is not None:
                distinct = distinct.replace(path=dataclasses.replace(distinct.path, origin=start))
            result = Annealing(distinct, num_chains, num_steps, progress, n_jobs).estimate(draws, batch_size)
    if place is not None:
        each = {name: getattr(result, name) for name in ("value", "std_error", "effective_sample_size", "pareto_k")}
        each = {name: value[place].reshape(dist.batch_shape) for name, value in each.items() if value is not None}
        result = dataclasses.replace(result, **each)
    dist.remember_log_partition(result)
    return result


def quick_log_partition(dist: Energy) -> LogPartition:
    """Return log Z if it is known, and otherwise an estimate by a short run of annealed importance sampling.

    The estimate is good enough to compare epochs of training. A likelihood needs a longer run. A family without a context
    stores the estimate until its parameters change.

    Raises:
        ValueError: if log Z is not known and the energy has no sampler.
    """
    if dist.log_partition is not None:
        return dist.log_partition
    chains, steps = (100, min(max(200, dist.event_shape.numel()), 1000)) if dist.context is None else (16, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the kind of the result says the same
        return log_partition(dist, num_chains=chains, num_steps=steps, exact=False)


def _distinct(dist: Energy) -> tuple[Energy, Tensor | None]:
    """Return the distribution with each distinct context once, (n, c), and the index of each given context among these."""
    if dist.context is None:
        return dist, None
    rows, place = dist.context.detach().reshape(-1, dist.context.shape[-1]).unique(dim=0, return_inverse=True)
    place = place.reshape(dist.context.shape[:-1]).expand(dist.batch_shape)
    return dist.replace(context=rows, _batch_shape=rows.shape[:1]), place


def _energy_of(energy: Any) -> Energy:
    """Return the distribution of an energy, given that, a family or the `Fit` of one."""
    energy = getattr(energy, "family", energy)
    made = energy() if callable(energy) and not isinstance(energy, Distribution) else energy
    dist: Any = unwrap(made) if isinstance(made, Distribution) else made
    if not isinstance(dist, Energy):
        raise TypeError(
            f"log_partition wants the distribution of an energy, such as EnergyModel((2,))(), but found {type(dist).__name__}."
        )
    return dist
