r"""Partition functions by annealed importance sampling, and likelihood bounds by annealing backwards.

Chains follow the energy's path (`pyro_genmodels.samplers.annealing`). The mean of their m weights w estimates Z, with

.. math:: \mathrm{se}(\log \bar w) = \frac{\mathrm{sd}(w)}{\bar w \sqrt m}, \qquad
    \text{effective sample size} = \frac{(\sum w)^2}{\sum w^2} .

The mean is that of the raw weights: it makes log Z too low in expectation, and backwards too high, so that the two bracket it.
Smoothed weights would do neither. k-hat of the weights (arXiv 1507.02646) says whether their mean and its error can be trusted.

Neal (1998); Grosse et al., *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo* (arXiv 1511.02543).
"""

from __future__ import annotations

__all__ = ["Annealing", "conservative_bound"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pyro_genmodels.distributions.energy.distribution import Energy
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionKind
from pyro_genmodels.dynamics.resampling import effective_size
from pyro_genmodels.samplers import Sampler, Target, anneal, default_sampler
from pyro_genmodels.samplers.annealing import schedule, tune
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.log_mean import LogMean, log_mean_weight
from pyro_genmodels.utils.parallel import run_values, seeded, spawn_seeds
from pyro_genmodels.utils.pareto import MAX_PARETO_K, is_unreliable, largest_pareto_k

T = TypeVar("T")

NUM_TUNING_CHAINS = 200
"""Chains of the run that tunes step sizes for `conservative_bound`."""
BLOCK = 250
"""Largest number of chains of a block, where blocks have seeds of their own and may run in several processes."""


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling of an energy.

    Attributes:
        dist: distribution of the energy, with contexts (n, c) or none.
        num_chains: number of chains, for each context.
        num_steps: number of betas of the path.
        progress: True to show progress bars.
        n_jobs: number of processes, as joblib takes it, for chains in blocks with a seed each. None runs as many as fit into
            memory together, from torch's random numbers.
    """

    dist: Energy
    num_chains: int
    num_steps: int
    progress: bool = False
    n_jobs: int | None = None

    def estimate(self, draws: Tensor | None, batch_size: int) -> LogPartition:
        """Estimate log Z of each context.

        Args:
            draws: exact draws of the model, from which to anneal backwards as well; None without.
            batch_size: largest number of chains in memory.

        Raises:
            ValueError: for draws of an energy with a context.

        Warns:
            RuntimeWarning: if the estimate is unreliable.
        """
        contexts, m = self.dist.context, self.num_chains
        if contexts is not None and draws is not None:
            raise ValueError("Annealing backwards from draws is for energies without a context: leave draws out.")
        if contexts is None:
            chains = [m] if self.n_jobs is None else [len(block) for block in _blocks(torch.arange(m), batch_size)]
            value, error, size, k = _estimate(torch.cat(self._each(self._forwards, chains)))
        else:
            block = max(1, (batch_size if self.n_jobs is None else min(batch_size, BLOCK)) // m)
            weights = self._each(self._conditional, contexts.split(block))
            value, error, size, k = (torch.cat(part) for part in zip(*map(_estimate, weights), strict=True))
        message, back, back_error = "", None, None
        if is_unreliable(k, m):
            message = _heavy("the weights", k)
        if not bool((size >= max(0.02 * m, min(5.0, 0.5 * m))).all()):  # also if it is NaN
            message = f"few chains carry all the weight (effective sample size {size.min():.1f} of {m})"
        if draws is not None:
            blocks = [draws] if self.n_jobs is None else _blocks(draws, batch_size)
            backwards = log_mean_weight(torch.cat(self._each(self._backwards, blocks)))
            back, back_error = -backwards.value, backwards.std_error
            if is_unreliable(backwards.pareto_k, len(draws)):  # an error so large that any two values agree
                message = _heavy("the weights of the backward run", backwards.pareto_k)
            if not bool((back - value).abs() <= 3 * (back_error**2 + error**2).sqrt()):  # also if it is NaN
                message = f"forwards it is {value:.2f} ± {error:.2f}, backwards {back:.2f} ± {back_error:.2f}"
        kind: PartitionKind = "unreliable" if message else "estimate"
        if message:
            warn_caller(
                f"The estimate of log Z is unreliable: {message}. Raise num_steps ({self.num_steps}) or num_chains ({m}).",
            )
        return LogPartition(value, error, kind, back, back_error, size, m, self.num_steps, k)

    def _each(self, run: Callable[[Any], Tensor], blocks: Sequence[Any]) -> list[Tensor]:
        return _run_blocks(run, blocks, self.n_jobs, progress=self.progress)

    def _forwards(self, chains: int) -> Tensor:
        """Return the log weights of some chains, (chains,)."""
        return self._anneal(self.dist.path.target(), chains)

    def _conditional(self, contexts: Tensor) -> Tensor:
        """Return the log weights of all chains for some contexts, (num_chains, contexts)."""
        target = self.dist.path.target(contexts.repeat(self.num_chains, 1))
        return self._anneal(target, self.num_chains * len(contexts)).reshape(self.num_chains, len(contexts))

    def _anneal(self, target: Target, chains: int) -> Tensor:
        """Return the log weights of chains from the start of the path, (chains,)."""
        sampler, start = _kernel(self.dist), self.dist.path.begin((chains,))
        betas, sizes = _tuned(self.dist, target, sampler, self.num_steps, chains)
        return anneal(target, sampler, start, betas, step_sizes=sizes, progress=self._shows_steps)[1]

    def _backwards(self, draws: Tensor) -> Tensor:
        """Return the log weights of chains backwards from exact draws, (draws,)."""
        sampler, target = _kernel(self.dist), self.dist.path.target()
        u = self.dist.path.encode(self.dist.aligned(draws)[0])
        betas, sizes = _tuned(self.dist, target, sampler, self.num_steps, self.num_chains)
        back = None if sizes is None else sizes.flip(0)
        return anneal(target, sampler, u, betas.flip(0), step_sizes=back, progress=self._shows_steps)[1]

    @property
    def _shows_steps(self) -> bool:
        """True if each run has a progress bar of its own."""
        return self.progress and self.n_jobs is None


def _estimate(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log Z, its error, the effective sample size and k-hat from log weights, (chains, ...)."""
    mean = log_mean_weight(log_w)
    return mean.value, mean.std_error, effective_size(log_w.double()).to(log_w), mean.pareto_k


def _blocks(rows: Tensor, batch_size: int) -> Sequence[Tensor]:
    """Return rows in blocks of nearly equal size."""
    return rows.tensor_split(ceil(len(rows) / min(batch_size, BLOCK)))


def _run_blocks(run: Callable[[Any], T], blocks: Sequence[Any], n_jobs: int | None, *, progress: bool) -> list[T]:
    """Return the result of each block, from torch's random numbers, or with a number of processes from a seed of its own."""
    if n_jobs is None:
        return [run(block) for block in blocks]
    task = _Blocks(run, blocks, spawn_seeds(None, len(blocks)))
    return run_values(task, range(len(blocks)), n_jobs=n_jobs, progress=progress, description="annealing")


@dataclass(frozen=True)
class _Blocks(Generic[T]):
    """Blocks by number, each with its own seed."""

    run: Callable[[Any], T]
    blocks: Sequence[Any]
    seeds: Sequence[int]

    def __call__(self, number: int) -> T:
        with seeded(self.seeds[number]), torch.no_grad():
            return self.run(self.blocks[number])


def _heavy(weights: str, k: Tensor) -> str:
    return f"{weights} have a heavy tail (Pareto k-hat {largest_pareto_k(k):.2f}, above {MAX_PARETO_K})"


def conservative_bound(
    dist: Energy,
    x: Tensor,
    *,
    num_chains: int = 1,
    num_steps: int = 1000,
    batch_size: int = 20_000,
    progress: bool = False,
    n_jobs: int | None = None,
) -> LogMean:
    """Bound the log density of data from below in expectation, by annealing backwards from them (RAISE).

    Args:
        dist: distribution of the energy.
        x: data, (N, *event_shape), one for each context if there are any.
        num_chains: chains per datum, whose weights are averaged.
        num_steps: number of betas of the path.
        batch_size: largest number of chains in memory.
        progress: True to show progress bars.
        n_jobs: see `Annealing`.

    Returns:
        Bounds in nats, their standard errors (NaN for a single chain), their k-hat, and estimates from smoothed weights, (N,)
        each.

    Raises:
        TypeError: if it is not the distribution of an energy.
    """
    if not isinstance(dist, Energy):
        raise TypeError(f"Annealing backwards wants the distribution of an energy, but found {type(dist).__name__}.")
    with torch.no_grad():
        pilots = NUM_TUNING_CHAINS if dist.context is None else min(len(x), NUM_TUNING_CHAINS)
        pilot = dist.path.target(None if dist.context is None else dist.context[:1].expand(pilots, -1))
        betas, sizes = _tuned(dist, pilot, _kernel(dist), num_steps, pilots)
        shows_steps = progress and n_jobs is None
        bound = _RowBounds(dist, num_chains, betas.flip(0), None if sizes is None else sizes.flip(0), progress=shows_steps)
        size = max(1, (batch_size if n_jobs is None else min(batch_size, BLOCK)) // num_chains)
        rows = [x] if dist.context is None else [x, dist.context]
        blocks = list(zip(*(part.split(size) for part in rows), strict=True))
        parts = _run_blocks(bound, blocks, n_jobs, progress=progress)
    return LogMean(*map(torch.cat, zip(*parts, strict=True)))


@dataclass(frozen=True)
class _RowBounds:
    """Bounds for some rows, by chains backwards from each.

    Attributes:
        dist: distribution of the energy.
        num_chains: chains per row.
        betas: descending betas of the path, (K + 1,).
        step_sizes: step sizes at each, or None.
        progress: True to show a progress bar.
    """

    dist: Energy
    num_chains: int
    betas: Tensor
    step_sizes: Tensor | None
    progress: bool

    def __call__(self, block: tuple[Tensor, ...]) -> LogMean:
        """Return the bounds for rows, (n, *event_shape), and their contexts, (n, c), if there are any."""
        x, *contexts = block
        path, rows = self.dist.path, contexts[0].repeat(self.num_chains, 1) if contexts else None
        u = path.encode(x).repeat(self.num_chains, *(1 for _ in path.position_shape))
        sampler, sizes = _kernel(self.dist), self.step_sizes
        _, log_w = anneal(path.target(rows), sampler, u, self.betas, step_sizes=sizes, progress=self.progress)
        mean = log_mean_weight(log_w.reshape(self.num_chains, len(x)))
        log_f = path.log_density(x, contexts[0] if contexts else None)
        return mean._replace(value=log_f + mean.value, smoothed=log_f + mean.smoothed)


def _kernel(dist: Energy) -> Sampler:
    """Return a kernel that leaves the density at each beta invariant, as near as possible to the energy's sampler."""
    sampler = dist.chains.required_sampler("estimate of log Z").base_kernel.unbiased()
    if sampler.needs_sweep and not dist.path.is_conjugate:  # a path from another origin
        return default_sampler(dist.path.space)
    return sampler


def _tuned(dist: Energy, target: Target, sampler: Sampler, num_steps: int, chains: int) -> tuple[Tensor, Tensor | None]:
    """Return betas, and step sizes tuned by a run whose chains are thrown away."""
    u = dist.path.begin((chains,))
    betas = schedule(num_steps, u)
    return betas, tune(target, sampler, u, betas)
