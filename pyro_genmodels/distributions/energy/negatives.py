r"""Negatives: samples whose mean gradient estimates the gradient of log Z. They start at the data, continue, or are annealed.

Chains that start at the data and take k steps give contrastive divergence, Hinton (2002), whose gradient is biased. Chains that
continue from call to call give persistent contrastive divergence, Tieleman (2008), here with the replay buffer and restarts of
Du and Mordatch (arXiv 1903.08689). Chains annealed from the start of the path do not depend on earlier calls.
"""

from __future__ import annotations

__all__ = ["Annealed", "Contrastive", "Negatives", "Persistent"]

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from pyro_genmodels.distributions.energy.chains import EnergyChains
from pyro_genmodels.samplers.kernel import expand_right
from pyro_genmodels.utils.errors import check_positive_int

STEPS_OF_NEW_CHAINS = 100
"""Annealing steps of the first chains of a replay buffer."""


class Negatives(ABC):
    """A source of negatives. Subclasses are frozen dataclasses of their options."""

    @abstractmethod
    def draw(self, chains: EnergyChains, y: Tensor, context: Tensor | None) -> Tensor:
        """Draw negatives.

        Args:
            chains: chains of the energy.
            y: data, (batch..., *event_shape).
            context: contexts, (batch..., c), or None.

        Returns:
            Positions (m, *position); or (m, batch..., *position), if each datum has its own.
        """


@dataclass(frozen=True)
class Contrastive(Negatives):
    """Chains that start at the data, one for each datum.

    Args:
        steps: steps of the sampler, the k of CD-k.

    Raises:
        ValueError: if steps is not positive.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        check_positive_int("Contrastive", steps=self.steps)

    def draw(self, chains: EnergyChains, y: Tensor, context: Tensor | None) -> Tensor:
        sampler, position = chains.required_sampler("negatives"), chains.path.position_shape
        with torch.no_grad():
            u = chains.path.encode(y)
        batch = u.shape[: u.dim() - len(position)]
        moved = chains.move(sampler.replicate(u.reshape(-1, *position)), self.steps, _rows(context, batch))
        return sampler.cold(moved).reshape(1, *batch, *position)  # each datum has its own, also where some are masked


@dataclass(frozen=True)
class Annealed(Negatives):
    """Chains that are annealed from the start of the path at every call.

    Args:
        num_chains: number of chains; with a context, per row. None is 256, and with a context 1.
        steps: steps of the path, with one step of the sampler each.

    Raises:
        ValueError: if one of them is not positive.
    """

    num_chains: int | None = None
    steps: int = 100

    def __post_init__(self) -> None:
        check_positive_int("Annealed", steps=self.steps, num_chains=1 if self.num_chains is None else self.num_chains)

    def draw(self, chains: EnergyChains, y: Tensor, context: Tensor | None) -> Tensor:
        m = self.num_chains or (256 if context is None else 1)
        shape = Size([m]) if context is None else Size([m]) + context.shape[:-1]
        u = chains.anneal(shape.numel(), self.steps, _rows(context, shape))
        return u.reshape(*shape, *chains.path.position_shape)


@dataclass(frozen=True)
class Persistent(Negatives):
    """Chains that continue from one call to the next, in a replay buffer of the family.

    Args:
        num_chains: chains that are moved at each call.
        steps: steps of the sampler per call.
        restart: probability with which a chain is restarted before it is moved.
        buffer_size: chains in the buffer, of which a random subset is moved at each call; None is num_chains.

    Raises:
        ValueError: for invalid options; by `draw`, for conditional energies, whose chains cannot continue.
    """

    num_chains: int = 256
    steps: int = 10
    restart: float = 0.0
    buffer_size: int | None = None

    def __post_init__(self) -> None:
        check_positive_int("Persistent", num_chains=self.num_chains, steps=self.steps)
        if not 0 <= self.restart <= 1:
            raise ValueError(f"Persistent wants a probability as restart, but found {self.restart}.")
        if self.buffer_size is not None and self.buffer_size < self.num_chains:
            raise ValueError(
                f"Persistent wants a buffer_size of at least {self.num_chains} chains, but found {self.buffer_size}."
            )

    @property
    def capacity(self) -> int:
        """Number of chains in the buffer."""
        return self.buffer_size or self.num_chains

    def draw(self, chains: EnergyChains, y: Tensor, context: Tensor | None) -> Tensor:
        if context is not None:
            raise ValueError(
                "Persistent chains cannot go on where every row has a context of its own. Use negatives=Annealed() or "
                "Contrastive()."
            )
        buffer = chains.replay_buffer
        if buffer is None:  # a distribution without a family
            return chains.anneal(self.num_chains, STEPS_OF_NEW_CHAINS, None)
        sampler = chains.required_sampler("negatives")
        if not buffer.is_started:
            buffer.put(sampler.replicate(chains.anneal(self.capacity, STEPS_OF_NEW_CHAINS, None)))
        rows = slice(None)
        if self.capacity > self.num_chains:
            rows = torch.randperm(self.capacity, device=buffer.chains.device)[: self.num_chains]
        u = buffer.chains[rows].clone()
        if self.restart:
            restarted = torch.rand(len(u), device=u.device) < self.restart
            u = torch.where(expand_right(restarted, u), sampler.replicate(chains.path.begin((len(u),))), u)
        u = chains.move(u, self.steps, None)
        buffer.put(u, rows)
        return sampler.cold(u)


def _rows(context: Tensor | None, shape: Size) -> Tensor | None:
    """Return one context for each chain, (n, c), given the shape of the chains."""
    if context is None:
        return None
    return context.detach().expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
