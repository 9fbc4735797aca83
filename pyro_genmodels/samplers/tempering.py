r"""Parallel tempering: copies of a chain at several temperatures, which swap positions.

.. math:: \min\Bigl(1, \frac{f_{\beta}(x')\, f_{\beta'}(x)}{f_{\beta}(x)\, f_{\beta'}(x')}\Bigr)

is the probability that neighbours :math:`x` at :math:`\beta` and :math:`x'` at :math:`\beta'` swap. Hot copies cross between
modes where the cold copy, which follows the target, cannot. Swendsen and Wang (1986); Geyer (1991).
"""

from __future__ import annotations

__all__ = ["ParallelTempering"]

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import Sampler, State, check_counts, expand_right
from pyro_genmodels.samplers.langevin import Langevin
from pyro_genmodels.samplers.target import Beta, Target


@dataclass(frozen=True)
class ParallelTempering(Sampler):
    """Copies of each chain at several temperatures, each moved by a sampler, with swaps between neighbours.

    The tempered densities are those of the target's path. The path of an energy ends at its start; that of a plain log density
    consists of its powers, and the hottest of these must have an integral (see `hottest`).

    Args:
        sampler: sampler that moves each copy.
        temperatures: number of copies.
        hottest: lowest beta.
        steps: steps of the sampler between two rounds of swaps.

    Raises:
        TypeError: if the sampler is not one, or is tempered itself.
        ValueError: for fewer than two temperatures, or a hottest beta outside of [0, 1).

    Example:
        >>> from pyro_genmodels.samplers import Langevin, ParallelTempering, sample_chains
        >>> wells = lambda x: -8 * (x**2 - 1).square().sum(-1)
        >>> tempered = ParallelTempering(Langevin(0.05), hottest=0.05)
        >>> draws = sample_chains(wells, torch.ones(20, 1), sampler=tempered, num_samples=100, progress=False).draws
        >>> 0.3 < (draws > 0).float().mean() < 0.7
        tensor(True)
    """

    sampler: Sampler = field(default_factory=Langevin)
    temperatures: int = 8
    hottest: float = 0.0
    steps: int = 5

    def __post_init__(self) -> None:
        check_counts(self, "steps", "temperatures")
        if not isinstance(self.sampler, Sampler) or self.sampler.temperatures is not None:
            raise TypeError(f"ParallelTempering wants a plain sampler such as Langevin(), but found {self.sampler!r}.")
        if self.temperatures < 2 or not 0 <= self.hottest < 1:
            raise ValueError(
                f"ParallelTempering wants two or more temperatures and 0 <= hottest < 1, but found {self.temperatures} and "
                f"{self.hottest}."
            )

    @property
    def base_kernel(self) -> Sampler:
        return self.sampler

    @property
    def target_acceptance(self) -> float | None:
        return self.sampler.target_acceptance

    def check(self, target: Target) -> None:
        self.sampler.check(target)
        if target.start is None and not self.hottest:
            raise ValueError(
                "ParallelTempering of a plain log density uses its powers, and the power 0 has no integral. Give the lowest "
                "beta, ParallelTempering(..., hottest=0.05), or a Target with a path."
            )

    def first_step_size(self, like: Tensor) -> Tensor:
        return self.sampler.first_step_size(like).repeat(self.temperatures)

    def replicate(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).repeat_interleave(self.temperatures, 1)

    def cold(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def betas(self, x: Tensor, beta: Beta) -> Tensor:
        """Return the betas (temperatures,), from beta itself evenly down to 0, or by equal factors down to the hottest."""
        ladder = torch.linspace(1.0, 0.0, self.temperatures, dtype=x.dtype, device=x.device)
        return beta * (self.hottest ** (1 - ladder) if self.hottest else ladder)

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return self.sampler.init(x, target, self.betas(x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        betas = self.betas(state.x, beta)
        total = torch.zeros_like(betas)
        for _ in range(self.steps):
            state, accepted = self.sampler.step(state, target, step_size, betas)
            total = total + accepted
        return self.sampler.init(swap(state.x, target, betas), target, betas), total / self.steps


def swap(x: Tensor, target: Target, betas: Tensor) -> Tensor:
    """Swap neighbours at random, first the even pairs, then the odd ones.

    Args:
        x: positions, (chains, temperatures, *event_shape).
        target: target whose path has the tempered densities.
        betas: betas of the copies, (temperatures,).

    Returns:
        Positions of the same shape.
    """
    with torch.no_grad():
        table = target.log_prob(x, betas[:, None, None]).movedim(0, -1)  # (chains, copy, beta)
        order = torch.arange(len(betas), device=x.device).expand(x.shape[0], -1)
        for first in (0, 1):
            order = _swap_pairs(order, table, first)
    return x.gather(1, expand_right(order, x).expand(x.shape))


def _swap_pairs(order: Tensor, table: Tensor, first: int) -> Tensor:
    """Swap the pairs of betas that begin at `first`, given the copy at each beta, order (chains, betas)."""
    count = (order.shape[1] - first) // 2
    if not count:
        return order
    pairs = order[:, first : first + 2 * count].unflatten(1, (count, 2))
    at = torch.arange(first, first + 2 * count, device=order.device).reshape(count, 2)
    chain = torch.arange(len(order), device=order.device)[:, None, None]
    log_ratio = table[chain, pairs.flip(-1), at].sum(-1) - table[chain, pairs, at].sum(-1)
    accept = torch.rand_like(log_ratio).log() < log_ratio
    swapped = torch.where(accept[..., None], pairs.flip(-1), pairs).flatten(1)
    return torch.cat([order[:, :first], swapped, order[:, first + 2 * count :]], 1)
