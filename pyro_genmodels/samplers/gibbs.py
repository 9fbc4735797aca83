r"""Gibbs samplers of discrete data: by exact conditionals where the target has them, by gradients where it does not.

*Gibbs with gradients* proposes to change one coordinate, chosen by what the first-order change of :math:`\log f` promises:

.. math:: q(x' \mid x) \propto \exp\bigl(\tfrac12 \tilde d_{x'}\bigr), \qquad
    \tilde d_{x'} = \nabla \log f(x)^\top (x' - x) \approx \log f(x') - \log f(x),

for all :math:`x'` one change away, and accepts by Metropolis and Hastings, but lets one in twenty be, so that chains have no
period. Grathwohl et al., *Oops I Took A Gradient: Scalable Sampling for Discrete Distributions* (arXiv 2102.04509), after
Zanella (arXiv 1711.07424).
"""

from __future__ import annotations

__all__ = ["Gibbs", "GibbsWithGradients"]

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import Sampler, State, metropolis, per_chain
from pyro_genmodels.samplers.target import Beta, Kind, Target, value_and_score


@dataclass(frozen=True)
class Gibbs(Sampler):
    """The target's own sweep: of a Boltzmann machine, block by block where units are independent given the others.

    Raises:
        ValueError: by `check`, if the target has none.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("real", "binary", "categorical")

    def check(self, target: Target) -> None:
        if target.gibbs is None:
            cure = "Langevin()" if target.kind == "real" else "GibbsWithGradients()"
            raise ValueError(
                f"Gibbs wants the conditional distributions of Boltzmann machines, which this energy does not have. Use {cure}."
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
    """One coordinate at a time, chosen by the gradient, of zeros and ones or classes.

    Example:
        >>> from pyro_genmodels.samplers import GibbsWithGradients, Target, sample_chains
        >>> ising = Target(lambda x, beta: beta * ((2 * x[..., :-1] - 1) * (2 * x[..., 1:] - 1)).sum(-1), 1, "binary")
        >>> x = torch.randint(2, (20, 8)).float()
        >>> sample_chains(ising, x, sampler=GibbsWithGradients(), num_samples=50, progress=False).draws.shape
        torch.Size([20, 50, 8])
    """

    kinds: ClassVar[tuple[Kind, ...]] = ("binary", "categorical")

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return State(x, *value_and_score(target, x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        x, chains = state.x, state.log_prob.dim()
        change, propose = (_flips, _flip) if target.kind == "binary" else (_moves, _move)
        log_q = per_chain(change(state), chains).log_softmax(-1)
        chosen = torch.multinomial(log_q.exp().reshape(-1, log_q.shape[-1]), 1).reshape(*log_q.shape[:-1], 1)
        proposed, back = propose(x, chosen, chains)
        new = State(proposed, *value_and_score(target, proposed, beta))
        log_back = per_chain(change(new), chains).log_softmax(-1)
        forth, back = log_q.gather(-1, chosen).squeeze(-1), log_back.gather(-1, back).squeeze(-1)
        log_ratio = (new.log_prob - state.log_prob + back - forth).clamp(max=0)
        return metropolis(state, new, log_ratio + log(0.95))  # where all is accepted parity would alternate


# Zeros and ones: a change is a coordinate.


def _flips(state: State) -> Tensor:
    """Half of the change that each flip promises, (chains..., *event_shape)."""
    return 0.5 * (1 - 2 * state.x) * state.score


def _flip(x: Tensor, chosen: Tensor, chains: int) -> tuple[Tensor, Tensor]:
    """X with the chosen coordinate flipped, and the choice that flips it back."""
    flat = per_chain(x, chains)
    return flat.scatter(-1, chosen, 1 - flat.gather(-1, chosen)).reshape(x.shape), chosen


# Classes, one-hot: a change is a coordinate and its new class.


def _moves(state: State) -> Tensor:
    """Half of the change that each move to another class promises, (chains..., *event_shape), -inf where it is the class."""
    promise = 0.5 * (state.score - (state.x * state.score).sum(-1, keepdim=True))
    return promise.masked_fill(state.x > 0.5, -torch.inf)


def _move(x: Tensor, chosen: Tensor, chains: int) -> tuple[Tensor, Tensor]:
    """X with the chosen coordinate moved to the chosen class, and the choice that moves it back."""
    classes = x.shape[-1]
    flat = x.reshape(*x.shape[:chains], -1, classes)
    place, new = chosen // classes, chosen % classes
    at = place[..., None].expand(*place.shape, classes)
    old = flat.gather(-2, at).argmax(-1)
    moved = flat.scatter(-2, at, torch.nn.functional.one_hot(new, classes).to(x))
    return moved.reshape(x.shape), place * classes + old
