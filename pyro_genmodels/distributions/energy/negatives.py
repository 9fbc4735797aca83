r"""Where negatives come from, by whose mean the gradient of log Z is estimated: from the data, from chains that go on, or anew.

Begun at the data and moved by k steps they give contrastive divergence, Hinton (2002), whose gradient is biased; chains that go
on from call to call give persistent contrastive divergence, Tieleman (2008), here with the replay buffer and restarts of Du and
Mordatch (arXiv 1903.08689); chains annealed from the start of the path depend on nothing before.
"""

from __future__ import annotations

__all__ = ["Annealed", "Contrastive", "Negatives", "Persistent"]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from pyro_genmodels.samplers import Sampler, anneal, run
from pyro_genmodels.samplers.annealing import schedule
from pyro_genmodels.samplers.kernel import beside, check_positive, per_chain

if TYPE_CHECKING:
    from pyro_genmodels.distributions.energy import Energy

STEP_SIZE_RATE = 0.05
"""By which step sizes follow the acceptance of negatives."""


class Negatives(ABC):
    """A source of negatives. Subclasses are frozen dataclasses of their options."""

    @abstractmethod
    def draw(self, energy: Energy, y: Tensor, context: Tensor | None) -> Tensor:
        """Positions (m, *position) for data (batch..., *event_shape); of each datum its own, (m, batch..., *position)."""


@dataclass(frozen=True)
class Contrastive(Negatives):
    """Chains that begin at the data, one for each datum.

    Args:
        steps: of the sampler, the k of CD-k.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "steps")

    def draw(self, energy: Energy, y: Tensor, context: Tensor | None) -> Tensor:
        path = energy.path
        with torch.no_grad():
            u = path.encode(y)
        batch = u.shape[: u.dim() - len(path.position_shape)]
        u = _move(energy, u.reshape(-1, *path.position_shape), self.steps, context)
        return u.reshape(1, *batch, *path.position_shape)  # each datum has its own, also where some are masked


@dataclass(frozen=True)
class Annealed(Negatives):
    """Chains led from the start of the path to the energy, anew at every call.

    Args:
        num_chains: how many; with a context for each row. By default 256, and with a context 1.
        steps: of the path, with one step of the sampler each.
    """

    num_chains: int | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        check_positive(self, "steps", *(["num_chains"] if self.num_chains is not None else []))

    def draw(self, energy: Energy, y: Tensor, context: Tensor | None) -> Tensor:
        m = self.num_chains or (256 if context is None else 1)
        shape = Size([m]) if context is None else Size([m]) + context.shape[:-1]
        u = _anneal(energy, shape, self.steps, context)
        return u.reshape(*shape, *energy.path.position_shape)


@dataclass(frozen=True)
class Persistent(Negatives):
    """Chains that go on from one call to the next, kept by the family.

    Args:
        num_chains: moved at each call.
        steps: of the sampler, each call.
        restart: probability with which a chain begins anew before it is moved.
        buffer_size: chains kept, of which those that are moved are drawn at random; by default as many as are moved.

    Raises:
        ValueError: on options that make no sense; by `draw`, of conditional energies, whose chains could not go on.
    """

    num_chains: int = 256
    steps: int = 10
    restart: float = 0.0
    buffer_size: int | None = None

    def __post_init__(self) -> None:
        check_positive(self, "num_chains", "steps")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"Persistent wants a probability as restart, but found {self.restart}.")
        if self.buffer_size is not None and self.buffer_size < self.num_chains:
            raise ValueError(
                f"Persistent wants a buffer_size of at least {self.num_chains} chains, but found {self.buffer_size}."
            )

    @property
    def kept(self) -> int:
        """Chains that are kept."""
        return self.buffer_size or self.num_chains

    def draw(self, energy: Energy, y: Tensor, context: Tensor | None) -> Tensor:
        memory = energy.memory
        if context is not None:
            raise ValueError(
                "Persistent chains cannot go on where every row has a context of its own. Use negatives=Annealed() or "
                "Contrastive()."
            )
        if memory is None:  # no family keeps them
            return _anneal(energy, Size([self.num_chains]), 100, None)
        sampler = energy.chains("negatives")
        if not memory.has_begun:
            memory.put_chains(_anneal(energy, Size([self.kept]), 100, None, settle=False))
        rows = slice(None)
        if self.kept > self.num_chains:
            rows = torch.randperm(self.kept, device=memory.chains.device)[: self.num_chains]
        u = memory.chains[rows].clone()
        if self.restart:
            anew = torch.rand(len(u), device=u.device) < self.restart
            u = torch.where(beside(anew, u), sampler.replicate(energy.path.begin((len(u),))), u)
        u = _move(energy, u, self.steps, None, settle=False)
        memory.put_chains(u, rows)
        return sampler.cold(u)


def _move(energy: Energy, u: Tensor, steps: int, context: Tensor | None, *, settle: bool = True) -> Tensor:
    """Chains (n, *position) moved on, and the step size with which they are."""
    sampler, memory, target = energy.chains("negatives"), energy.memory, energy.path.target(_rows(context))
    u = sampler.replicate(u) if settle else u
    moved = run(sampler, target, u, steps, step_size=None if memory is None else memory.step_size, rate=STEP_SIZE_RATE)
    if memory is not None:
        memory.put_step_size(moved.step_size, moved.acceptance)
    u = _sound(energy, sampler, moved.x)
    return sampler.cold(u) if settle else u


def _anneal(energy: Energy, shape: Size, steps: int, context: Tensor | None, *, settle: bool = True) -> Tensor:
    """Chains (n, *position) led to the energy from the start of its path."""
    sampler, target = energy.chains("negatives"), energy.path.target(_rows(context, shape))
    u = energy.path.begin((shape.numel(),))
    u = _sound(energy, sampler.base_kernel, anneal(target, sampler.base_kernel, u, schedule(steps, u), rate=0.1)[0])
    return u if settle else sampler.replicate(u)


def _rows(context: Tensor | None, shape: Size | None = None) -> Tensor | None:
    """One context for each chain, (n, c)."""
    if context is None:
        return None
    return context.detach().expand(*(shape or context.shape[:-1]), context.shape[-1]).reshape(-1, context.shape[-1])


def _sound(energy: Energy, sampler: Sampler, u: Tensor) -> Tensor:
    """Chains, of which those that ran away begin anew.

    Raises:
        FloatingPointError: if most of them ran away, where arguments are validated.
    """
    lost = ~per_chain(u, 1).isfinite().all(1)
    if energy._validate_args and lost.float().mean() > 0.5:
        raise FloatingPointError(
            f"{int(lost.sum())} of {len(u)} chains ran away to infinity: the energy does not rise far from the data, or steps "
            "are too large. Use Langevin(adjusted=True) or a smaller step_size, a base to be tilted, a lower learning rate, or "
            "ContrastiveDivergence(regularization=0.1)"
        )
    return torch.where(beside(lost, u), sampler.replicate(energy.path.begin((len(u),))), u)
