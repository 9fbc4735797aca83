r"""Gibbs samplers for discrete data: with exact conditionals where the target has them, and with gradients elsewhere.

*Gibbs with gradients* proposes a neighbour :math:`x'`, which differs in one coordinate, with probabilities given by the
first-order change of :math:`\log f`,

.. math:: q(x' \mid x) \propto \exp\bigl(\tfrac12 \tilde d_{x'}\bigr), \qquad
    \tilde d_{x'} = \nabla \log f(x)^\top (x' - x) \approx \log f(x') - \log f(x),

and accepts by Metropolis and Hastings. One proposal in twenty is rejected at random, so that chains are aperiodic.

Grathwohl et al., *Oops I Took A Gradient: Scalable Sampling for Discrete Distributions* (arXiv 2102.04509), after Zanella
(arXiv 1711.07424).
"""

from __future__ import annotations

__all__ = ["Gibbs", "GibbsWithGradients"]

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import Sampler, State, flatten_event, metropolis
from pyro_genmodels.samplers.target import Beta, Target, value_and_score

ACCEPTANCE_LIMIT = 0.95
"""Largest acceptance probability: a chain that accepts every flip would alternate between even and odd sums."""


@dataclass(frozen=True)
class Gibbs(Sampler):
    """The sweep that the target offers. Boltzmann machines draw blocks of units that are independent given the others.

    Raises:
        ValueError: by `check`, if the target has no sweep.
    """

    needs_sweep: ClassVar[bool] = True

    def check(self, target: Target) -> None:
        if target.gibbs is None:
            raise ValueError(
                "Gibbs wants the conditional distributions of Boltzmann machines, which this energy does not have. Use "
                f"{target.space.samplers}."
            )

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        self.check(target)
        return State(x)

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        with torch.no_grad():
            x = target.gibbs(state.x, beta)
        return State(x), x.new_ones(x.shape[: x.dim() - target.event_dim])


@dataclass(frozen=True)
class GibbsWithGradients(Sampler):
    """Gibbs with gradients: each step changes one coordinate, chosen by the gradient of the log density.

    Example:
        >>> from pyro_genmodels.samplers import Binary, GibbsWithGradients, Target, sample_chains
        >>> ising = Target(lambda x, beta: beta * ((2 * x[..., :-1] - 1) * (2 * x[..., 1:] - 1)).sum(-1), 1, Binary())
        >>> x = torch.randint(2, (20, 8)).float()
        >>> sample_chains(ising, x, sampler=GibbsWithGradients(), num_samples=50, progress=False).draws.shape
        torch.Size([20, 50, 8])
    """

    moves_discrete: ClassVar[bool] = True

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return State(x, *value_and_score(target, x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        space, chain_dim = target.space, state.log_prob.dim()
        log_q = flatten_event(space.changes(state.x, state.score), chain_dim).log_softmax(-1)
        probabilities = log_q.exp().nan_to_num(nan=1.0)  # whatever is proposed for a NaN is rejected below
        neighbour = torch.multinomial(probabilities.reshape(-1, log_q.shape[-1]), 1).reshape(*log_q.shape[:-1], 1)
        proposed, way_back = space.move(state.x, neighbour, chain_dim)
        new = State(proposed, *value_and_score(target, proposed, beta))
        log_q_back = flatten_event(space.changes(new.x, new.score), chain_dim).log_softmax(-1)
        hastings = log_q_back.gather(-1, way_back).squeeze(-1) - log_q.gather(-1, neighbour).squeeze(-1)
        log_ratio = (new.log_prob - state.log_prob + hastings).clamp(max=0)
        return metropolis(state, new, log_ratio + log(ACCEPTANCE_LIMIT))
