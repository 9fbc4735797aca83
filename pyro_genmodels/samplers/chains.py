r"""Chains as a user wants them: warmed up, drawn from, with what is known of each draw.

After the warmup, in which step sizes are tuned by dual averaging, every draw follows the sampler's law: nothing is tuned any
more. How far chains agree is ArviZ's to say: ``to_arviz(chains)``, then ``arviz.rhat`` and ``arviz.ess``.
"""

from __future__ import annotations

__all__ = ["Chains", "sample_chains"]

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.samplers.gibbs import GibbsWithGradients
from pyro_genmodels.samplers.kernel import DualAveraging, Sampler, over_chains, per_chain
from pyro_genmodels.samplers.langevin import Langevin
from pyro_genmodels.samplers.target import Target, check_target, value_and_score

MAX_POSITION = 1e6
"""Nats below the best draw, at which a chain is not where the density is."""


MIN_DRAWS_FOR_DIAGNOSTICS = 100
"""By fewer the acceptance of a single chain is not judged."""


@dataclass(frozen=True)
class Chains:
    """Draws of Markov chains.

    Attributes:
        draws: (chain, draw, *event_shape).
        stats: of each draw, (chain, draw): ``acceptance_rate``, the probability with which its last proposal was accepted, and
            ``lp``, the unnormalised log density (nats) of positions, where the sampler knows it.
        step_size: in use after the warmup.
        name: of the variable, for `to_arviz`.
    """

    draws: Tensor
    stats: Mapping[str, Tensor]
    step_size: Tensor
    name: str = "x"

    @property
    def acceptance_rate(self) -> float:
        """Mean over draws and chains."""
        return self.stats["acceptance_rate"].mean().item()

    def get_samples(self, *, group_by_chain: bool = True) -> dict[str, Tensor]:
        """The draws by name, as Pyro's MCMC gives them: (chain, draw, ...), or all chains one after another."""
        return {self.name: self.draws if group_by_chain else self.draws.flatten(0, 1)}


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
    """Draws from an unnormalised density by many chains at once.

    Args:
        target: log density (nats), x (chains, *event_shape) -> (chains,); an energy distribution; or a `Target`.
        initial: where chains begin, (chains, *event_shape).
        sampler: by default `Langevin` with Metropolis' correction, or `GibbsWithGradients` of discrete data.
        num_samples: draws of each chain.
        warmup: steps before them, in which the step size is tuned.
        thin: steps from one draw to the next.
        name: of the variable.
        progress: whether to show a progress bar.

    Returns:
        Draws in the units of the data, with acceptance and log density.

    Raises:
        ValueError: on counts that are not positive, starting points of zero density, or a sampler that cannot move the data.

    Warns:
        RuntimeWarning: if nearly nothing or nearly everything was accepted, saying which way to change the step size; or if
            draws are not finite.

    Example:
        >>> from pyro_genmodels.samplers import sample_chains
        >>> ring = lambda x: -50 * (x.norm(dim=-1) - 1) ** 2
        >>> chains = sample_chains(ring, torch.randn(100, 2), num_samples=200, progress=False)
        >>> 0.8 < chains.draws.norm(dim=-1).mean() < 1.2
        tensor(True)
    """
    for option, value, least in (("num_samples", num_samples, 1), ("thin", thin, 1), ("warmup", warmup, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            wanted = "must be positive" if least else "must not be negative"
            raise ValueError(f"{option} {wanted if isinstance(value, int) else 'wants a whole number'}, but is {value!r}.")
    if not (sampler is None or isinstance(sampler, Sampler)):
        found = f"the class {sampler.__name__}" if isinstance(sampler, type) else repr(sampler)
        raise TypeError(f"sample_chains wants a sampler such as Langevin() or Hamiltonian(), but found {found}.")
    if not isinstance(initial, Tensor) or initial.dim() < 1 or not len(initial):
        found = tuple(initial.shape) if isinstance(initial, Tensor) else type(initial).__name__
        raise ValueError(f"initial wants a tensor of starting points, (chains, ...), but found {found}.")
    target = check_target(target, initial.dim() - 1)
    if target.event_shape is not None and tuple(initial.shape[1:]) != tuple(target.event_shape):
        raise ValueError(f"initial wants (chains, *{tuple(target.event_shape)}), but found {tuple(initial.shape)}.")
    if target.chains not in (None, len(initial)):
        raise ValueError(f"initial wants a starting point for each of {target.chains} contexts, but found {len(initial)}.")
    if not initial.is_floating_point() and target.event_shape is None:
        initial = initial.to(torch.get_default_dtype())
    sampler = (Langevin() if target.kind == "real" else GibbsWithGradients()) if sampler is None else sampler
    sampler.check(target)
    if target.support is not None and not target.support.check(initial).all():
        raise ValueError(f"initial wants starting points within {target.support}, but some lie outside.")
    x = target.encode(initial.detach())
    _check_start(target, x)
    x = sampler.replicate(x)

    step_size = sampler.first_step_size(x)
    tuning = DualAveraging(step_size, sampler.target_acceptance) if sampler.target_acceptance and warmup else None
    state = sampler.init(x, target)
    draws, accepted, log_prob = [], [], []
    bar = tqdm(total=warmup + num_samples * thin, desc="chains", disable=not progress, mininterval=0.5, unit="step")
    with bar:
        for _ in range(warmup):
            state, accept = sampler.step(state, target, tuning.step_size if tuning else step_size)
            if tuning:
                tuning.update(over_chains(accept, step_size))
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


def _check_start(target: Target, x: Tensor) -> None:
    """Raises a ValueError if chains cannot begin at positions x."""
    if target.kind == "binary" and not ((x == 0) | (x == 1)).all():
        raise ValueError(f"initial wants zeros and ones, but has values from {x.min():g} to {x.max():g}. Round them.")
    with torch.no_grad():
        log_prob = target.log_prob(x, 1.0)
    if not isinstance(log_prob, Tensor):
        raise TypeError(f"The log density should be a tensor, one number a chain, but is {type(log_prob).__name__}.")
    if log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"The log density should be of shape {(len(x),)}, one number a chain, but is of {tuple(log_prob.shape)} for "
            f"positions {tuple(x.shape)}. Sum over the dimensions of an event, and keep the first."
        )
    finite = log_prob.isfinite()
    if target.gibbs is None:
        finite &= per_chain(value_and_score(target, x, 1.0)[1], 1).isfinite().all(-1)
    if not finite.all():
        raise ValueError(
            f"{int((~finite).sum())} of {len(x)} starting points have no finite log density or score. Begin within the support."
        )


def _warn(chains: Chains, sampler: Sampler) -> None:
    draws, metropolis = per_chain(chains.draws, 2), sampler.target_acceptance is not None
    bad, rates, lp = ~draws.isfinite().all(-1), chains.stats["acceptance_rate"].mean(1), chains.stats.get("lp")
    stuck = (rates < 0.01) & metropolis & (draws.shape[1] >= MIN_DRAWS_FOR_DIAGNOSTICS)
    if bad.any():
        message = (
            f"{int(bad.any(1).sum())} of {len(bad)} chains left the real numbers. Lower the step size, or adjust the steps"
        )
    elif lp is not None and (lost := (lp < lp.max() - MAX_POSITION).any(1)).any():
        message = (
            f"{int(lost.sum())} of {len(lost)} chains ran away, to log densities of {lp.min():.3g}. Lower the step size, or "
            "adjust the steps"
        )
    elif metropolis and chains.acceptance_rate < 0.05:
        message = (
            f"Only {chains.acceptance_rate:.1%} of the proposals were accepted: lower the step size, or warm up for longer"
        )
    elif stuck.any():
        message = f"{int(stuck.sum())} of {len(stuck)} chains accepted nearly nothing: lower the step size, or begin elsewhere"
    elif metropolis and chains.acceptance_rate > 0.999:
        message = "Every proposal was accepted, so that chains hardly move: raise the step size, or warm up for longer"
    else:
        return
    warnings.warn(f"{message} ({type(sampler).__name__}).", RuntimeWarning, stacklevel=3)
