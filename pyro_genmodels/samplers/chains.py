r"""Sampling with many chains: warmup, samples, and what is known of each sample.

The step size is tuned by dual averaging during the warmup and fixed afterwards, so that the samples come from a fixed Markov
kernel. ArviZ judges convergence: ``to_arviz(chains)``, then ``arviz.rhat`` and ``arviz.ess``.
"""

from __future__ import annotations

__all__ = ["Chains", "default_sampler", "sample_chains"]

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.samplers.gibbs import GibbsWithGradients
from pyro_genmodels.samplers.kernel import DualAveraging, Sampler, check_count, flatten_event, mean_over_chains
from pyro_genmodels.samplers.langevin import Langevin
from pyro_genmodels.samplers.spaces import Space
from pyro_genmodels.samplers.target import Target, check_target, value_and_score

MAX_LOG_DENSITY_GAP = 1e6
"""Nats below the best sample at which a chain counts as lost."""
MIN_DRAWS_FOR_DIAGNOSTICS = 100
"""Number of samples below which the acceptance of a single chain is not judged."""


@dataclass(frozen=True)
class Chains:
    """Samples of Markov chains.

    Attributes:
        draws: (chain, draw, *event_shape).
        stats: statistics of each sample, (chain, draw): ``acceptance_rate``, the acceptance probability of its last proposal,
            and ``lp``, the unnormalised log density (nats) of its position, if the sampler computes it.
        step_size: step size after the warmup.
        name: name of the variable, for `to_arviz`.
    """

    draws: Tensor
    stats: Mapping[str, Tensor]
    step_size: Tensor
    name: str = "x"

    @property
    def acceptance_rate(self) -> float:
        """Mean acceptance over samples and chains."""
        return self.stats["acceptance_rate"].mean().item()

    def get_samples(self, *, group_by_chain: bool = True) -> dict[str, Tensor]:
        """Return the samples by name, as Pyro's MCMC does: (chain, draw, ...), or all chains one after another."""
        return {self.name: self.draws if group_by_chain else self.draws.flatten(0, 1)}


def default_sampler(space: Space) -> Sampler:
    """Return `GibbsWithGradients` for a discrete space, and `Langevin` with Metropolis' correction for real numbers."""
    return GibbsWithGradients() if space.is_discrete else Langevin()


def sample_chains(
    target: Any,
    initial: Tensor,
    *,
    sampler: Sampler | None = None,
    num_samples: int = 1000,
    warmup: int = 500,
    thin: int = 1,
    name: str = "x",
    progress: bool = True,
) -> Chains:
    """Sample from an unnormalised density with many chains at once.

    Args:
        target: log density (nats), x (chains, *event_shape) -> (chains,); an energy's distribution; or a `Target`.
        initial: starting points, (chains, *event_shape).
        sampler: Markov kernel; None is that of `default_sampler`.
        num_samples: samples per chain.
        warmup: steps before the first sample, in which the step size is tuned.
        thin: steps per sample.
        name: name of the variable.
        progress: True to show a progress bar.

    Returns:
        Samples in the units of the data, with acceptance and log density.

    Raises:
        TypeError: if the target or the sampler is not one.
        ValueError: for invalid counts, starting points of zero density, or a sampler that cannot move the data.

    Warns:
        RuntimeWarning: if nearly no or nearly every proposal was accepted, with advice on the step size; or if samples are not
            finite.

    Example:
        >>> from pyro_genmodels.samplers import sample_chains
        >>> ring = lambda x: -50 * (x.norm(dim=-1) - 1) ** 2
        >>> chains = sample_chains(ring, torch.randn(100, 2), num_samples=200, progress=False)
        >>> 0.8 < chains.draws.norm(dim=-1).mean() < 1.2
        tensor(True)
    """
    check_count("sample_chains", num_samples=num_samples, thin=thin)
    check_count("sample_chains", least=0, warmup=warmup)
    num_samples, thin, warmup = int(num_samples), int(thin), int(warmup)  # integers of numpy may overflow
    target, x = _checked_start(target, initial)
    sampler = default_sampler(target.space) if sampler is None else sampler
    if not isinstance(sampler, Sampler):
        found = f"the class {sampler.__name__}" if isinstance(sampler, type) else repr(sampler)
        raise TypeError(f"sample_chains wants a sampler such as Langevin() or Hamiltonian(), but found {found}.")
    sampler.check(target)
    _check_density(target, x)
    x = sampler.replicate(x)

    step_size = sampler.first_step_size(x)
    tuning = DualAveraging(step_size, sampler.target_acceptance) if sampler.target_acceptance and warmup else None
    state = sampler.init(x, target)
    draws, accepted, log_prob = [], [], []
    with tqdm(total=warmup + num_samples * thin, desc="chains", disable=not progress, mininterval=0.5, unit="step") as bar:
        for _ in range(warmup):
            state, accept = sampler.step(state, target, tuning.step_size if tuning else step_size)
            if tuning:
                tuning.update(mean_over_chains(accept, step_size))
            bar.update()
        step_size = tuning.final_step_size if tuning else step_size
        for _ in range(num_samples):
            for _ in range(thin):
                state, accept = sampler.step(state, target, step_size)
                bar.update()
            draws.append(target.decode(sampler.cold(state.x)))
            accepted.append(sampler.cold(accept))
            if state.log_prob is not None:
                log_prob.append(sampler.cold(state.log_prob))
    stats = {"acceptance_rate": torch.stack(accepted, 1)} | ({"lp": torch.stack(log_prob, 1)} if log_prob else {})
    chains = Chains(torch.stack(draws, 1), stats, step_size, name)
    _warn(chains, sampler)
    return chains


def _checked_start(target: Any, initial: Any) -> tuple[Target, Tensor]:
    """Return the target and the positions (chains, *position) of starting points."""
    if not isinstance(initial, Tensor) or initial.dim() < 1 or not len(initial):
        found = tuple(initial.shape) if isinstance(initial, Tensor) else type(initial).__name__
        raise ValueError(f"initial wants a tensor of starting points, (chains, ...), but found {found}.")
    target = check_target(target, initial.dim() - 1)
    if target.data is not None:
        target.data.check(initial)
    elif not initial.is_floating_point():
        initial = initial.to(torch.get_default_dtype())
    return target, target.encode(initial.detach())


def _check_density(target: Target, x: Tensor) -> None:
    """Raise an error if the log density has the wrong type or shape, or is not finite at positions x."""
    if not target.space.contains(x):
        raise ValueError(
            f"initial wants {target.space.description}, but has values from {x.min():g} to {x.max():g}. Round them."
        )
    with torch.no_grad():
        log_prob = target.log_prob(x, 1.0)
    if not isinstance(log_prob, Tensor):
        raise TypeError(f"The log density must be a tensor with one number per chain, but is {type(log_prob).__name__}.")
    if log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"The log density must have the shape {(len(x),)}, one number per chain, but has {tuple(log_prob.shape)} for "
            f"positions {tuple(x.shape)}. Sum over the dimensions of an event, and keep the first."
        )
    finite = log_prob.isfinite()
    if target.gibbs is None:
        finite &= flatten_event(value_and_score(target, x, 1.0)[1], 1).isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(x)} starting points have no finite log density or score. Begin within the support."
        )


def _is_lost(log_prob: Tensor) -> Tensor:
    """Return True where a log density is far below the best finite one, infinite or NaN."""
    best = log_prob.masked_fill(~log_prob.isfinite(), -torch.inf).max()
    return ~(log_prob.isfinite() & (log_prob >= best - MAX_LOG_DENSITY_GAP))


def _warn(chains: Chains, sampler: Sampler) -> None:
    """Warn if chains diverged, stood still, or accepted nearly every proposal."""
    draws, has_rejections = flatten_event(chains.draws, 2), sampler.target_acceptance is not None
    bad, rates, lp = ~draws.isfinite().all(-1), chains.stats["acceptance_rate"].mean(1), chains.stats.get("lp")
    stuck = (rates < 0.01) & has_rejections & (draws.shape[1] >= MIN_DRAWS_FOR_DIAGNOSTICS)
    if bad.any():
        message = (
            f"{int(bad.any(1).sum())} of {len(bad)} chains left the real numbers. Lower the step size, or adjust the steps"
        )
    elif lp is not None and (lost := _is_lost(lp).any(1)).any():
        message = (
            f"{int(lost.sum())} of {len(lost)} chains ran away, to log densities of {lp.min():.3g}. Lower the step size, or "
            "adjust the steps"
        )
    elif has_rejections and chains.acceptance_rate < 0.05:
        message = (
            f"Only {chains.acceptance_rate:.1%} of the proposals were accepted: lower the step size, or warm up for longer"
        )
    elif stuck.any():
        message = f"{int(stuck.sum())} of {len(stuck)} chains accepted nearly nothing: lower the step size, or begin elsewhere"
    elif has_rejections and chains.acceptance_rate > 0.999:
        message = "Every proposal was accepted, so that chains hardly move: raise the step size, or warm up for longer"
    else:
        return
    warnings.warn(f"{message} ({type(sampler).__name__}).", RuntimeWarning, stacklevel=3)
