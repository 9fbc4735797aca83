r"""Chains of an energy: moved along its annealing path or at its end, with the step size of the replay buffer.

Chains that reach infinity are restarted at the start of the path; if most do, an error says so.
"""

from __future__ import annotations

__all__ = ["EnergyChains"]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.distributions.energy.path import AnnealingPath
from pyro_genmodels.distributions.energy.state import ReplayBuffer
from pyro_genmodels.samplers import Sampler, anneal, run
from pyro_genmodels.samplers.annealing import schedule
from pyro_genmodels.samplers.kernel import expand_right, flatten_event
from pyro_genmodels.utils.distributions import has_active_dropout

NEGATIVES_TUNING_RATE = 0.05
"""Rate at which step sizes follow the acceptance of negatives."""
DRAWS_TUNING_RATE = 0.1
"""Rate at which step sizes follow the acceptance of annealed chains and of draws."""


@dataclass(frozen=True)
class EnergyChains:
    """The path, sampler and replay buffer that move chains of an energy.

    Attributes:
        path: density of the energy and the path to it.
        sampler: Markov kernel, or None.
        replay_buffer: chains that continue from call to call, or None.
        num_steps: steps of the sampler per draw.
        validate: True to raise errors about chains that reach infinity.
    """

    path: AnnealingPath
    sampler: Sampler | None
    replay_buffer: ReplayBuffer | None = None
    num_steps: int = 500
    validate: bool = True

    def required_sampler(self, purpose: str) -> Sampler:
        """Return the sampler.

        Args:
            purpose: what it is needed for, as a noun: "draws", "negatives".

        Raises:
            ValueError: if there is none, or if the energy has active dropout.
        """
        if self.sampler is None:
            raise ValueError(
                f"This energy has no sampler, and so no {purpose}. Build it with one such as Langevin(), or train it by "
                "NoiseContrastive(noise=...), SlicedScoreMatching() or DenoisingScoreMatching(), which need no samples of it."
            )
        if has_active_dropout(self.path.energy, self.path.base):
            raise ValueError(
                f"An energy whose dropout is active has no {purpose}, for it has no density. Build it without dropout."
            )
        return self.sampler

    def anneal(self, n: int, steps: int, context: Tensor | None) -> Tensor:
        """Draw negatives by annealing from the start of the path.

        Args:
            n: number of chains.
            steps: steps of the path, with one step of the sampler each.
            context: contexts of the chains, (n, c), or None.

        Returns:
            Positions (n, *position).
        """
        kernel = self.required_sampler("negatives").base_kernel
        u = self.path.begin((n,))
        u, _ = anneal(self.path.target(context), kernel, u, schedule(steps, u), rate=DRAWS_TUNING_RATE)
        return self._restart_lost(kernel, u)

    def move(self, u: Tensor, steps: int, context: Tensor | None) -> Tensor:
        """Move negatives, and update the step size of the buffer.

        Args:
            u: positions at all temperatures of the sampler, as `Sampler.replicate` returns them.
            steps: number of steps.
            context: contexts of the chains, (n, c), or None.

        Returns:
            Positions of the same shape.
        """
        sampler, target = self.required_sampler("negatives"), self.path.target(context)
        moved = run(sampler, target, u, steps, step_size=self._step_size, rate=NEGATIVES_TUNING_RATE)
        if self.replay_buffer is not None:
            self.replay_buffer.put_step_size(moved.step_size, moved.acceptance)
        return self._restart_lost(sampler, moved.x)

    def draw(self, n: int, context: Tensor | None) -> Tensor:
        """Draw from the energy. The replay buffer is read and not changed.

        Chains are copies of random chains of the buffer, if it is started and there is no context. Otherwise they are annealed
        from the start of the path in `num_steps` steps. In both cases they then take `num_steps` steps of the sampler.

        Args:
            n: number of draws.
            context: contexts, (n, c), or None.

        Returns:
            Positions (n, *position).

        Raises:
            ValueError: if there is no sampler, or if the energy has active dropout.
            FloatingPointError: if a chain is not finite and arguments are validated.
        """
        sampler, target = self.required_sampler("draws"), self.path.target(context)
        if context is None and self.replay_buffer is not None and self.replay_buffer.is_started:
            u = self.replay_buffer.random(n)
        else:
            u = self.path.begin((n,))
            u, _ = anneal(target, sampler.base_kernel, u, schedule(self.num_steps, u), rate=DRAWS_TUNING_RATE)
            u = sampler.replicate(u)
        moved = run(sampler, target, u, self.num_steps, step_size=self._step_size, rate=DRAWS_TUNING_RATE)
        return self.check_finite(sampler.cold(moved.x))

    @property
    def _step_size(self) -> Tensor | None:
        return None if self.replay_buffer is None else self.replay_buffer.step_size

    def check_finite(self, u: Tensor) -> Tensor:
        """Return draws as they are.

        Raises:
            FloatingPointError: if a chain is not finite and arguments are validated.
        """
        lost = ~u.reshape(-1, self.path.position_shape.numel()).isfinite().all(1)
        if self.validate and lost.any():
            raise FloatingPointError(
                f"{int(lost.sum())} of {len(lost)} chains ran away to infinity: the energy does not rise far from the data, or "
                "steps are too large. Use Langevin(adjusted=True), a smaller step_size, or a base to be tilted"
            )
        return u

    def _restart_lost(self, sampler: Sampler, u: Tensor) -> Tensor:
        """Restart the chains that are not finite, and raise a FloatingPointError if these are most of them."""
        lost = ~flatten_event(u, 1).isfinite().all(1)
        if self.validate and lost.float().mean() > 0.5:
            raise FloatingPointError(
                f"{int(lost.sum())} of {len(u)} chains ran away to infinity: the energy does not rise far from the data, or "
                "steps are too large. Use Langevin(adjusted=True) or a smaller step_size, a base to be tilted, a lower "
                "learning rate, or ContrastiveDivergence(regularization=0.1)"
            )
        return torch.where(expand_right(lost, u), sampler.replicate(self.path.begin((len(u),))), u)
