r"""Hamiltonian Monte Carlo: a momentum is drawn, and position and momentum follow Hamilton's equations for a while.

.. math:: H(x, v) = -\log f(x) + \tfrac12 |v|^2, \qquad v \sim N(0, I)

The leapfrog's error in H decides whether the end is accepted. Step sizes vary by a fifth from trajectory to trajectory. Neal,
*MCMC using Hamiltonian Dynamics* (arXiv 1206.1901). NUTS, which chooses the length itself, is Pyro's: see `potential`.
"""

from __future__ import annotations

__all__ = ["Hamiltonian", "leapfrog", "potential"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.samplers.kernel import Sampler, State, beside_event, check_counts, check_positive, metropolis, per_chain
from pyro_genmodels.samplers.target import Beta, Target, check_target, value_and_score


def leapfrog(
    x: Tensor, v: Tensor, state: State, value_and_score: Callable[[Tensor], tuple[Tensor, Tensor]], step_size: Any, steps: int
) -> tuple[State, Tensor]:
    """Steps of the leapfrog from position x and momentum v, both (chains..., *event_shape): the state and momentum there."""
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
        step_size: of the leapfrog, in units of the standardised data; tuned to an acceptance of 0.8.
        num_leapfrog: its steps to one proposal.

    Raises:
        ValueError: if one of them is not positive.

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
        both = lambda x: value_and_score(target, x, beta)  # noqa: E731
        jitter = step_size * (0.8 + 0.4 * torch.rand_like(state.log_prob))  # or a trajectory may end where it began
        new, w = leapfrog(state.x, v, state, both, beside_event(jitter, target.event_dim), self.num_leapfrog)
        kinetic = 0.5 * per_chain(v.square() - w.square(), new.log_prob.dim()).sum(-1)
        return metropolis(state, new, new.log_prob - state.log_prob + kinetic)


def potential(target: Any, name: str = "x") -> Callable[[dict[str, Tensor]], Tensor]:
    """An energy as Pyro's `NUTS` and `HMC` want it, by the name of its one variable.

    It is of positions, which for data with bounds are not the data: ``target.decode`` leads to these.

    Args:
        target: log density x (chains, ...) -> (chains,), an energy distribution, or a `Target`, of real numbers.
        name: of the variable.

    Returns:
        {name: x (*event_shape)} -> potential energy (), for ``NUTS(potential_fn=...)``.

    Raises:
        ValueError: if the target is not of real numbers, or an energy of many contexts.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> kernel = NUTS(potential_fn=potential(lambda x: -0.5 * x.square().sum(-1)))
        >>> mcmc = MCMC(kernel, 10, 10, initial_params={"x": torch.zeros(3)}, disable_progbar=True)
        >>> mcmc.run(); mcmc.get_samples()["x"].shape
        torch.Size([10, 3])
    """
    checked = check_target(target, 1)
    if checked.chains not in (None, 1):
        raise ValueError(
            f"potential wants the energy of one context, but found {checked.chains}. Give it one: energy(context[:1])."
        )
    Hamiltonian().check(checked)
    return lambda values: -checked.log_prob(values[name][None], 1.0)[0]
