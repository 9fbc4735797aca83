r"""Partition functions by annealed importance sampling, and bounds of the likelihood by annealing backwards.

Chains are led along the energy's path (`samplers.annealing`); the mean of their weights w is Z. Of the logarithm of the average

.. math:: \mathrm{se} = \frac{\mathrm{sd}(w)}{\bar w \sqrt m}, \qquad
    \text{effective sample size} = \frac{(\sum w)^2}{\sum w^2} .

Neal (1998); Grosse et al., *Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo* (arXiv 1511.02543).
"""

from __future__ import annotations

__all__ = ["Annealing", "conservative_bound"]

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

import torch
from torch import Size, Tensor

from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionKind
from pyro_genmodels.samplers import Gibbs, GibbsWithGradients, Langevin, Sampler, Target, anneal
from pyro_genmodels.samplers.annealing import schedule, tune


@dataclass(frozen=True)
class Annealing:
    """Annealed importance sampling of an energy.

    Attributes:
        dist: the energy's distribution, with contexts (n, c) or none.
        num_chains: for each context.
        num_steps: betas of the path.
        progress: whether to show progress bars.
    """

    dist: Energy
    num_chains: int
    num_steps: int
    progress: bool = False

    def estimate(self, draws: Tensor | None, batch_size: int) -> LogPartition:
        """Log Z of each context, at most so many chains at once; and backwards from exact draws, if there are any."""
        contexts, m = self.dist.context, self.num_chains
        if contexts is not None and draws is not None:
            raise ValueError("Annealing backwards from draws is for energies without a context: leave draws out.")
        parts = [None] if contexts is None else contexts.split(max(1, batch_size // m))
        found = [self._forwards(part) for part in parts]
        value, error, size = found[0] if contexts is None else (torch.cat(part) for part in zip(*found, strict=True))
        kind: PartitionKind = "estimate"
        message, back, back_error = "", None, None
        if not bool((size >= max(0.02 * m, min(5.0, 0.5 * m))).all()):  # also where it is NaN
            kind, message = "unreliable", f"hardly any chain carries weight (effective sample size {size.min():.1f} of {m})"
        if draws is not None:
            back, back_error = self._backwards(draws)
            if not bool((back - value).abs() <= 3 * (back_error**2 + error**2).sqrt()):  # also where it is NaN
                kind = "unreliable"
                message = f"forwards it is {value:.2f} ± {error:.2f}, backwards {back:.2f} ± {back_error:.2f}"
        if message:
            warnings.warn(
                f"The estimate of log Z is unreliable: {message}. Raise num_steps ({self.num_steps}) or num_chains ({m}).",
                RuntimeWarning,
                stacklevel=4,
            )
        return LogPartition(value, error, kind, back, back_error, size, m, self.num_steps)

    def _forwards(self, contexts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Log Z, its error and effective sample size for each context (n, c)."""
        shape = Size([self.num_chains]) if contexts is None else Size([self.num_chains, len(contexts)])
        rows = None if contexts is None else contexts.repeat(self.num_chains, 1)
        sampler, target, start = kernel(self.dist), self.dist.path.target(rows), self.dist.path.begin((shape.numel(),))
        betas, sizes = tuned(self.dist, target, sampler, self.num_steps, shape.numel())
        _, log_w = anneal(target, sampler, start, betas, step_sizes=sizes, progress=self.progress)
        return mean_weight(log_w.reshape(shape))

    def _backwards(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Log Z and its error, from exact draws."""
        sampler, target = kernel(self.dist), self.dist.path.target()
        u = self.dist.path.encode(self.dist.aligned(draws)[0])
        betas, sizes = tuned(self.dist, target, sampler, self.num_steps, self.num_chains)
        back = None if sizes is None else sizes.flip(0)
        _, log_w = anneal(target, sampler, u, betas.flip(0), step_sizes=back, progress=self.progress)
        value, error, _ = mean_weight(log_w)
        return -value, error


def conservative_bound(
    dist: Energy, x: Tensor, *, num_chains: int = 1, num_steps: int = 1000, batch_size: int = 20_000, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """What annealing backwards from data says of their log density: in expectation too little (RAISE).

    Args:
        dist: the energy's.
        x: data, (N, *event_shape), one for each context where there are any.
        num_chains: from each datum, over which weights are averaged.
        num_steps: betas of the path.
        batch_size: chains at once.
        progress: whether to show progress bars.

    Returns:
        Bounds (N,) in nats, and their standard errors, NaN of a single chain.
    """
    sampler, path = kernel(dist), dist.path
    values, errors = [], []
    with torch.no_grad():
        pilot = path.target(None if dist.context is None else dist.context[:1].expand(min(len(x), 200), -1))
        betas, sizes = tuned(dist, pilot, sampler, num_steps, 200 if dist.context is None else min(len(x), 200))
        for start, stop in pairwise([*range(0, len(x), max(1, batch_size // num_chains)), len(x)]):
            part = x[start:stop]
            rows = None if dist.context is None else dist.context[start:stop].repeat(num_chains, 1)
            u = path.encode(part).repeat(num_chains, *(1 for _ in path.position_shape))
            back = None if sizes is None else sizes.flip(0)
            _, log_w = anneal(path.target(rows), sampler, u, betas.flip(0), step_sizes=back, progress=progress)
            log_w = log_w.reshape(num_chains, len(part))
            value, error, _ = mean_weight(log_w) if num_chains > 1 else (log_w[0], torch.full_like(log_w[0], torch.nan), None)
            values.append(path.log_density(part, None if rows is None else rows[: len(part)]) + value)
            errors.append(error)
    return torch.cat(values), torch.cat(errors)


def kernel(dist: Energy) -> Sampler:
    """What moves the chains at each beta, leaving the density there as it is.

    It is, of tempered samplers, the one that is tempered; Langevin with its correction; sweeps only where there are any.
    """
    sampler = dist.chains("estimate of log Z").base_kernel
    if isinstance(sampler, Langevin):
        return replace(sampler, adjusted=True)
    if isinstance(sampler, Gibbs) and not dist.path.is_conjugate:  # a path with a beginning of its own
        return Langevin() if dist.path.kind == "real" else GibbsWithGradients()
    return sampler


def tuned(dist: Energy, target: Target, sampler: Sampler, num_steps: int, chains: int) -> tuple[Tensor, Tensor | None]:
    """Betas, and step sizes tuned by chains that are then thrown away."""
    u = dist.path.begin((chains,))
    betas = schedule(num_steps, u)
    return betas, tune(target, sampler, u, betas)


def mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the mean weight over the first dimension, its standard error, and the effective sample size."""
    m = len(log_w)
    value = log_w.logsumexp(0) - log(m)
    error = (log_w - value).exp().std(0) / m**0.5
    return value, error, (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()
