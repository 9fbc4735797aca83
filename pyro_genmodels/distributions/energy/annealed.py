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

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Size, Tensor

from pyro_genmodels.distributions.energy.distribution import Energy
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionKind
from pyro_genmodels.dynamics.resampling import effective_size
from pyro_genmodels.samplers import Sampler, Target, anneal, default_sampler
from pyro_genmodels.samplers.annealing import schedule, tune
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.log_mean import LogMean, log_mean_weight
from pyro_genmodels.utils.pareto import MAX_PARETO_K, is_unreliable, largest_pareto_k

NUM_TUNING_CHAINS = 200
"""Chains of the run that tunes step sizes for `conservative_bound`."""


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling of an energy.

    Attributes:
        dist: distribution of the energy, with contexts (n, c) or none.
        num_chains: number of chains, for each context.
        num_steps: number of betas of the path.
        progress: True to show progress bars.
    """

    dist: Energy
    num_chains: int
    num_steps: int
    progress: bool = False

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
        parts = [None] if contexts is None else contexts.split(max(1, batch_size // m))
        results = [self._forwards(part) for part in parts]
        value, error, size, k = results[0] if contexts is None else (torch.cat(part) for part in zip(*results, strict=True))
        message, back, back_error = "", None, None
        if is_unreliable(k, m):
            message = _heavy("the weights", k)
        if not bool((size >= max(0.02 * m, min(5.0, 0.5 * m))).all()):  # also if it is NaN
            message = f"few chains carry all the weight (effective sample size {size.min():.1f} of {m})"
        if draws is not None:
            backwards = self._backwards(draws)
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

    def _forwards(self, contexts: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log Z, its error, the effective sample size and k-hat for each context (n, c)."""
        shape = Size([self.num_chains]) if contexts is None else Size([self.num_chains, len(contexts)])
        rows = None if contexts is None else contexts.repeat(self.num_chains, 1)
        sampler, target, start = _kernel(self.dist), self.dist.path.target(rows), self.dist.path.begin((shape.numel(),))
        betas, sizes = _tuned(self.dist, target, sampler, self.num_steps, shape.numel())
        _, log_w = anneal(target, sampler, start, betas, step_sizes=sizes, progress=self.progress)
        log_w = log_w.reshape(shape)
        mean = log_mean_weight(log_w)
        return mean.value, mean.std_error, effective_size(log_w.double()).to(log_w), mean.pareto_k

    def _backwards(self, draws: Tensor) -> LogMean:
        """Return -log Z and its error, from exact draws."""
        sampler, target = _kernel(self.dist), self.dist.path.target()
        u = self.dist.path.encode(self.dist.aligned(draws)[0])
        betas, sizes = _tuned(self.dist, target, sampler, self.num_steps, self.num_chains)
        back = None if sizes is None else sizes.flip(0)
        _, log_w = anneal(target, sampler, u, betas.flip(0), step_sizes=back, progress=self.progress)
        return log_mean_weight(log_w)


def _heavy(weights: str, k: Tensor) -> str:
    return f"{weights} have a heavy tail (Pareto k-hat {largest_pareto_k(k):.2f}, above {MAX_PARETO_K})"


def conservative_bound(
    dist: Energy, x: Tensor, *, num_chains: int = 1, num_steps: int = 1000, batch_size: int = 20_000, progress: bool = False
) -> LogMean:
    """Bound the log density of data from below in expectation, by annealing backwards from them (RAISE).

    Args:
        dist: distribution of the energy.
        x: data, (N, *event_shape), one for each context if there are any.
        num_chains: chains per datum, whose weights are averaged.
        num_steps: number of betas of the path.
        batch_size: largest number of chains in memory.
        progress: True to show progress bars.

    Returns:
        Bounds in nats, their standard errors (NaN for a single chain), their k-hat, and estimates from smoothed weights, (N,)
        each.

    Raises:
        TypeError: if it is not the distribution of an energy.
    """
    if not isinstance(dist, Energy):
        raise TypeError(f"Annealing backwards wants the distribution of an energy, but found {type(dist).__name__}.")
    sampler, path = _kernel(dist), dist.path
    parts = []
    with torch.no_grad():
        pilots = NUM_TUNING_CHAINS if dist.context is None else min(len(x), NUM_TUNING_CHAINS)
        pilot = path.target(None if dist.context is None else dist.context[:1].expand(pilots, -1))
        betas, sizes = _tuned(dist, pilot, sampler, num_steps, pilots)
        back = None if sizes is None else sizes.flip(0)
        for start, stop in pairwise([*range(0, len(x), max(1, batch_size // num_chains)), len(x)]):
            part = x[start:stop]
            rows = None if dist.context is None else dist.context[start:stop].repeat(num_chains, 1)
            u = path.encode(part).repeat(num_chains, *(1 for _ in path.position_shape))
            _, log_w = anneal(path.target(rows), sampler, u, betas.flip(0), step_sizes=back, progress=progress)
            mean = log_mean_weight(log_w.reshape(num_chains, len(part)))
            log_f = path.log_density(part, None if rows is None else rows[: len(part)])
            parts.append(mean._replace(value=log_f + mean.value, smoothed=log_f + mean.smoothed))
    return LogMean(*map(torch.cat, zip(*parts, strict=True)))


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
