r"""Markov kernels: an immutable choice of options with a pure step, and the loop that runs it.

A step maps a state to the next and returns the acceptance probability of its proposal. Step sizes are arguments, one for all
chains. They are tuned between steps towards a target acceptance :math:`a^*`: in `run` by

.. math:: \log \epsilon \leftarrow \log \epsilon + \eta\,(\bar a - a^*), \qquad \bar a \text{ the mean over chains},

and in the warmup of `sample_chains` by dual averaging (Hoffman and Gelman, arXiv 1111.4246).
"""

from __future__ import annotations

__all__ = [
    "ChainRun",
    "DualAveraging",
    "Sampler",
    "State",
    "check_count",
    "check_counts",
    "check_positive",
    "expand_right",
    "flatten_event",
    "mean_over_chains",
    "metropolis",
    "run",
    "step_size_per_event",
]  # fmt: skip

from abc import ABC, abstractmethod
from math import log, sqrt
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.samplers.target import Beta, Target


class State(NamedTuple):
    """The state of chains.

    Attributes:
        x: positions, (chains..., *event_shape).
        log_prob: log f_beta(x), (chains...); None if the kernel does not need it.
        score: gradient of log_prob in x; None if the kernel does not need it.
    """

    x: Tensor
    log_prob: Any = None
    score: Any = None


class ChainRun(NamedTuple):
    """The result of a run of chains.

    Attributes:
        x: positions, (chains..., *event_shape).
        step_size: step size after tuning.
        acceptance: mean acceptance probability over steps and chains, of the shape of step_size.
    """

    x: Tensor
    step_size: Tensor
    acceptance: Tensor


class Sampler(ABC):
    """A Markov kernel. Subclasses are frozen dataclasses of their options.

    Attributes:
        needs_sweep: True if the kernel is the target's own sweep.
        moves_discrete: True if the kernel moves discrete positions, False if it moves real numbers.
        target_acceptance: mean acceptance that the step size is tuned to; None if nothing is tuned.
        temperatures: number of copies of each chain, in a dimension after that of the chains; None for a plain chain.
    """

    needs_sweep: ClassVar[bool] = False
    moves_discrete: ClassVar[bool] = False
    target_acceptance: ClassVar[float | None] = None
    temperatures: int | None = None

    @property
    def base_kernel(self) -> Sampler:
        """The kernel that moves one copy of a chain."""
        return self

    def unbiased(self) -> Sampler:
        """Return the kernel with the corrections that make it leave the target invariant."""
        return self

    @abstractmethod
    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        """Return the state at positions x, (chains..., *event_shape)."""

    @abstractmethod
    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        """Return the next state and the acceptance probability of each chain, (chains...)."""

    def first_step_size(self, like: Tensor) -> Tensor:
        """Return the step size before tuning, of the type and device of `like`."""
        return like.new_tensor(getattr(self, "step_size", 1.0))

    def replicate(self, x: Tensor) -> Tensor:
        """Copy points x (chains, *event_shape) to all temperatures."""
        return x

    def cold(self, x: Tensor) -> Tensor:
        """Return the positions at the temperature of the target, (chains, *event_shape)."""
        return x

    def check(self, target: Target) -> None:
        """Raise a ValueError that names the right samplers if this one cannot move chains in the target's space."""
        space = target.space
        if space.is_discrete != self.moves_discrete:
            raise ValueError(f"{type(self).__name__} cannot move {space.description}. Use {space.samplers}.")


def run(
    sampler: Sampler,
    target: Target,
    x: Tensor,
    steps: int,
    *,
    step_size: Tensor | None = None,
    beta: Beta = 1.0,
    rate: float = 0.0,
) -> ChainRun:
    """Move chains by a number of steps.

    Args:
        sampler: the kernel.
        target: the density.
        x: positions, (chains..., *event_shape).
        steps: number of steps.
        step_size: first step size; None takes the sampler's own.
        beta: position on the path, which broadcasts with (chains...).
        rate: rate at which the log of the step size follows the acceptance; 0 turns tuning off.

    Returns:
        Positions, step size and mean acceptance.
    """
    step_size = sampler.first_step_size(x) if step_size is None else step_size
    target_acceptance = sampler.target_acceptance if rate else None
    total = torch.zeros_like(step_size)
    state = sampler.init(x.detach(), target, beta)
    for _ in range(steps):
        state, accepted = sampler.step(state, target, step_size, beta)
        accepted = mean_over_chains(accepted, step_size)
        total = total + accepted
        if target_acceptance is not None:
            step_size = step_size * (rate * (accepted - target_acceptance)).exp()
    return ChainRun(state.x, step_size, total / max(steps, 1))


def mean_over_chains(values: Tensor, like: Tensor) -> Tensor:
    """Average values (chains..., *shape of like) over the chains."""
    return values.flatten(0, values.dim() - like.dim() - 1).mean(0) if values.dim() > like.dim() else values


class DualAveraging:
    """Tuning of a step size by Nesterov's dual averaging: large changes at first, then convergence to a weighted mean.

    Args:
        step_size: first step size.
        target_acceptance: mean acceptance to reach.
        shrinkage: gamma of Hoffman and Gelman (arXiv 1111.4246), section 3.2.
        delay: their t_0.
        power: their kappa.
    """

    def __init__(
        self, step_size: Tensor, target_acceptance: float, *, shrinkage: float = 0.05, delay: float = 10, power: float = 0.75
    ) -> None:
        self.target_acceptance, self.shrinkage, self.delay, self.power = target_acceptance, shrinkage, delay, power
        self.centre = log(10) + step_size.log()
        self.error, self.mean, self.count = torch.zeros_like(step_size), torch.zeros_like(step_size), 0
        self.log_step = step_size.log()

    def update(self, accepted: Tensor) -> None:
        """Update the averages with the mean acceptance of one step."""
        self.count += 1
        weight = 1 / (self.count + self.delay)
        self.error = (1 - weight) * self.error + weight * (self.target_acceptance - accepted)
        self.log_step = self.centre - sqrt(self.count) / self.shrinkage * self.error
        weight = self.count**-self.power
        self.mean = weight * self.log_step + (1 - weight) * self.mean

    @property
    def step_size(self) -> Tensor:
        """The step size to try next."""
        return self.log_step.exp()

    @property
    def final_step_size(self) -> Tensor:
        """The step size to keep after tuning."""
        return self.mean.exp() if self.count else self.step_size


# Helpers of all samplers.


def metropolis(state: State, new: State, log_ratio: Tensor) -> tuple[State, Tensor]:
    """Accept the new state of each chain with probability min(1, exp(log_ratio)); infinite or NaN densities are rejected."""
    log_ratio = log_ratio.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_ratio = log_ratio.masked_fill(new.log_prob == torch.inf, -torch.inf)
    accept = torch.rand_like(log_ratio).log() < log_ratio
    parts = [
        None if a is None or b is None else torch.where(expand_right(accept, a), a, b) for a, b in zip(new, state, strict=True)
    ]
    return State(*parts), log_ratio.clamp(max=0).exp()  # type: ignore[arg-type]


def flatten_event(values: Tensor, chain_dim: int) -> Tensor:
    """Reshape values (chains..., *event_shape) to (chains..., n), given the number of dimensions of chains."""
    return values.reshape(*values.shape[:chain_dim], -1)


def expand_right(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values (chains...) to (chains..., 1, ...), with as many dimensions as `like`."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def step_size_per_event(step_size: Tensor, event_dim: int) -> Tensor:
    """Reshape step sizes of chains so that they broadcast with positions."""
    return step_size.reshape(step_size.shape + (1,) * event_dim) if step_size.dim() else step_size


def check_count(owner: str, *, least: int = 1, **values: Any) -> None:
    """Raise a ValueError unless every value is an integer of at least `least`, of Python or numpy."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{owner} wants an integer {name} of {least} or more, but found {value!r}.")


def check_counts(choice: Any, *names: str) -> None:
    """Raise a ValueError if an option is not an integer of 1 or more."""
    check_count(type(choice).__name__, **{name: getattr(choice, name) for name in names})


def check_positive(choice: Any, *names: str) -> None:
    """Raise a ValueError if an option is not a positive finite number."""
    for name in names:
        value = getattr(choice, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < float("inf"):
            raise ValueError(f"{type(choice).__name__} wants a positive {name}, but found {value!r}.")
