r"""Parallel tempering: copies of a chain at several temperatures, which trade places.

.. math:: \min\Bigl(1, \frac{f_{\beta}(x')\, f_{\beta'}(x)}{f_{\beta}(x)\, f_{\beta'}(x')}\Bigr)

is the probability that neighbours :math:`x` at :math:`\beta` and :math:`x'` at :math:`\beta'` trade. The hot ones cross where
the cold one, which follows the target, could not. Swendsen and Wang (1986); Geyer (1991).
"""

from __future__ import annotations

__all__ = ["ParallelTempering"]

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import Sampler, State, beside, check_counts
from pyro_genmodels.samplers.langevin import Langevin
from pyro_genmodels.samplers.target import Beta, Target


@dataclass(frozen=True)
class ParallelTempering(Sampler):
    """Copies at temperatures from the target to what is easily drawn, each moved by a sampler, with trades between neighbours.

    The tempered densities are those of the target's path: an energy's lead to its start; a plain log density's are its powers,
    of which the last should still have an integral (see `hottest`).

    Args:
        sampler: that moves each copy.
        temperatures: how many copies.
        hottest: the lowest beta.
        steps: of the sampler between two rounds of trades.

    Raises:
        ValueError: on fewer than two temperatures, or a hottest that is not in [0, 1).

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
                "ParallelTempering of a plain log density has powers of it, of which that with beta = 0 has no integral. Give "
                "the lowest beta, ParallelTempering(..., hottest=0.05), or a Target with a path."
            )

    def first_step_size(self, like: Tensor) -> Tensor:
        return self.sampler.first_step_size(like).repeat(self.temperatures)

    def replicate(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).repeat_interleave(self.temperatures, 1)

    def cold(self, x: Tensor) -> Tensor:
        return x[:, 0]

    def betas(self, x: Tensor, beta: Beta) -> Tensor:
        """(temperatures,), from the coldest, which is beta itself: evenly down to 0, or by equal factors to the hottest."""
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
        return self.sampler.init(trade(state.x, target, betas), target, betas), total / self.steps


def trade(x: Tensor, target: Target, betas: Tensor) -> Tensor:
    """One round of trades between neighbours, first of the even pairs, then of the odd ones.

    Args:
        x: positions, (chains, temperatures, *event_shape).
        target: the densities.
        betas: (temperatures,).
    """
    with torch.no_grad():
        table = target.log_prob(x, betas[:, None, None]).movedim(0, -1)  # (chains, place, beta)
        order = torch.arange(len(betas), device=x.device).expand(x.shape[0], -1)
        for first in (0, 1):
            order = _trade_pairs(order, table, first)
    return x.gather(1, beside(order, x).expand(x.shape))


def _trade_pairs(order: Tensor, table: Tensor, first: int) -> Tensor:
    """Trades the copies at betas (first, first + 1), (first + 2, first + 3), ...; order (chains, beta) says which is where."""
    count = (order.shape[1] - first) // 2
    if not count:
        return order
    pairs = order[:, first : first + 2 * count].unflatten(1, (count, 2))
    at = torch.arange(first, first + 2 * count, device=order.device).reshape(count, 2)
    chain = torch.arange(len(order), device=order.device)[:, None, None]
    log_ratio = table[chain, pairs.flip(-1), at].sum(-1) - table[chain, pairs, at].sum(-1)
    accept = torch.rand_like(log_ratio).log() < log_ratio
    traded = torch.where(accept[..., None], pairs.flip(-1), pairs).flatten(1)
    return torch.cat([order[:, :first], traded, order[:, first + 2 * count :]], 1)
