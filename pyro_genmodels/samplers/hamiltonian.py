r"""Hamiltonian Monte Carlo: a momentum is drawn, and position and momentum follow Hamilton's equations for some steps.

.. math:: H(x, v) = -\log f(x) + \tfrac12 |v|^2, \qquad v \sim N(0, I)

The end is accepted with a probability given by the leapfrog's error in H. Step sizes vary by a fifth between trajectories, so
that none is periodic. Neal, *MCMC using Hamiltonian Dynamics* (arXiv 1206.1901). `potential` hands a target to Pyro's NUTS.
"""

from __future__ import annotations

__all__ = ["Hamiltonian", "leapfrog", "potential"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import (
    Sampler,
    State,
    check_counts,
    check_positive,
    flatten_event,
    metropolis,
    step_size_per_event,
)
from pyro_genmodels.samplers.target import Beta, Target, check_target, value_and_score


def leapfrog(
    x: Tensor, v: Tensor, state: State, value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]], step_size: Any, steps: int
) -> tuple[State, Tensor]:
    """Take leapfrog steps from position x and momentum v, both (chains..., *event_shape).

    Args:
        x: position.
        v: momentum.
        state: state at x.
        value_and_score: x -> log density and its gradient.
        step_size: step size, which broadcasts with x.
        steps: number of steps.

    Returns:
        The state and the momentum at the end.
    """
    log_prob, score = state.log_prob, state.score
    v = v + 0.5 * step_size * score
    for i in range(steps):
        x = x + step_size * v
        log_prob, score = value_and_score(x)
        v = v + (1.0 if i < steps - 1 else 0.5) * step_size * score
    return State(x, log_prob, score), v


@dataclass(frozen=True)
class Hamiltonian(Sampler):
    """Hamiltonian Monte Carlo over real numbers.

    Args:
        step_size: step size of the leapfrog in units of the standardised data, before it is tuned to an acceptance of 0.8.
        num_leapfrog: leapfrog steps per proposal.

    Raises:
        ValueError: if either is not positive.

    Example:
        >>> from pyro_genmodels.samplers import Hamiltonian, sample_chains
        >>> normal = lambda x: -0.5 * x.square().sum(-1)
        >>> chains = sample_chains(normal, torch.zeros(100, 3), sampler=Hamiltonian(), num_samples=100, progress=False)
        >>> bool((chains.draws.var() - 1).abs() < 0.1)
        True
    """

    step_size: float = 0.1
    num_leapfrog: int = 10

    target_acceptance = 0.8

    def __post_init__(self) -> None:
        check_positive(self, "step_size")
        check_counts(self, "num_leapfrog")

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return State(x, *value_and_score(target, x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        v = torch.randn_like(state.x)
        jitter = step_size * (0.8 + 0.4 * torch.rand_like(state.log_prob))
        jitter = step_size_per_event(jitter, target.event_dim)
        new, w = leapfrog(state.x, v, state, lambda x: value_and_score(target, x, beta), jitter, self.num_leapfrog)
        kinetic = 0.5 * flatten_event(v.square() - w.square(), new.log_prob.dim()).sum(-1)
        return metropolis(state, new, new.log_prob - state.log_prob + kinetic)


def potential(target: Any, name: str = "x") -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a target's potential energy in the form that Pyro's `NUTS` and `HMC` take.

    The variable is a chain position. Positions of bounded data are unbounded: ``target.decode`` converts them to data.

    Args:
        target: log density x (chains, ...) -> (chains,), an energy's distribution, or a `Target`, over real numbers.
        name: name of the variable.

    Returns:
        {name: x (*event_shape)} -> potential energy (), for ``NUTS(potential_fn=...)``.

    Raises:
        ValueError: if the target is not over real numbers, or is an energy with several contexts.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> kernel = NUTS(potential_fn=potential(lambda x: -0.5 * x.square().sum(-1)))
        >>> mcmc = MCMC(kernel, 10, 10, initial_params={"x": torch.zeros(3)}, disable_progbar=True)
        >>> mcmc.run(); mcmc.get_samples()["x"].shape
        torch.Size([10, 3])
    """
    checked = check_target(target, 1)
    contexts = None if checked.data is None else checked.data.num_contexts
    if contexts not in (None, 1):
        raise ValueError(f"potential wants the energy of one context, but found {contexts}. Give it one: energy(context[:1]).")
    Hamiltonian().check(checked)
    return lambda values: -checked.log_prob(values[name][None], 1.0)[0]
