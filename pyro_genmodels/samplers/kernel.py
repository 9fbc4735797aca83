r"""What every sampler is: an immutable choice of Markov kernel, with a pure step; and the loop that runs it.

A step takes a state to the next and tells with what probability its proposal was accepted. Step sizes are handed in, one for
all chains, and tuned between steps towards a wanted acceptance: on the run by

.. math:: \log \epsilon \leftarrow \log \epsilon + \eta\,(\bar a - a^*), \qquad \bar a \text{ the mean over chains},

and in the warmup of `sample_chains` by dual averaging (Hoffman and Gelman, arXiv 1111.4246).
"""

from __future__ import annotations

__all__ = [
    "ChainRun",
    "DualAveraging",
    "Sampler",
    "State",
    "beside",
    "beside_event",
    "check_counts",
    "check_positive",
    "metropolis",
    "over_chains",
    "per_chain",
    "run",
]  # fmt: skip

from abc import ABC, abstractmethod
from math import log, sqrt
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.samplers.target import Beta, Kind, Target


class State(NamedTuple):
    """Where chains are.

    Attributes:
        x: positions, (chains..., *event_shape).
        log_prob: log f_beta(x), (chains...), where the kernel needs it.
        score: its gradient, where the kernel needs it.
    """

    x: Tensor
    log_prob: Any = None
    score: Any = None


class ChainRun(NamedTuple):
    """What a run of chains ends with.

    Attributes:
        x: positions, (chains..., *event_shape).
        step_size: as tuned.
        acceptance: mean acceptance probability over steps and chains, of the shape of step_size.
    """

    x: Tensor
    step_size: Tensor
    acceptance: Tensor


class Sampler(ABC):
    """A Markov kernel. Subclasses are frozen dataclasses of their options."""

    kinds: ClassVar[tuple[Kind, ...]] = ("real",)
    """What it can move."""
    target_acceptance: ClassVar[float | None] = None
    """What its step size is tuned to; None where nothing is tuned."""
    temperatures: int | None = None
    """How many copies of a chain run beside each other, in a dimension after that of chains; None is a plain chain."""

    @property
    def base_kernel(self) -> Sampler:
        """What moves one copy."""
        return self

    @abstractmethod
    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        """The state at positions x, (chains..., *event_shape)."""

    @abstractmethod
    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        """The next state, and the acceptance probability of each chain, (chains...)."""

    def first_step_size(self, like: Tensor) -> Tensor:
        """The step size to begin with."""
        return like.new_tensor(getattr(self, "step_size", 1.0))

    def replicate(self, x: Tensor) -> Tensor:
        """Positions to begin with, from points x (chains, *event_shape)."""
        return x

    def cold(self, x: Tensor) -> Tensor:
        """Of positions, those that follow the target itself, (chains, *event_shape)."""
        return x

    def check(self, target: Target) -> None:
        """Raises a ValueError if it cannot move what the target is of, naming what can."""
        if target.kind not in self.kinds:
            cure = "Langevin() or Hamiltonian()" if target.kind == "real" else "GibbsWithGradients()"
            found = {"real": "real numbers", "binary": "zeros and ones", "categorical": "classes"}[target.kind]
            raise ValueError(f"{type(self).__name__} cannot move {found}. Use {cure}.")


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
    """Moves chains by a number of steps.

    Args:
        sampler: the kernel.
        target: the density.
        x: positions, (chains..., *event_shape).
        steps: how many.
        step_size: to begin with; by default the sampler's own.
        beta: where on the path, broadcast with (chains...).
        rate: by which the logarithm of the step size follows the acceptance; 0 leaves it.
    """
    step_size = sampler.first_step_size(x) if step_size is None else step_size
    wanted = sampler.target_acceptance if rate else None
    total = torch.zeros_like(step_size)
    state = sampler.init(x.detach(), target, beta)
    for _ in range(steps):
        state, accepted = sampler.step(state, target, step_size, beta)
        accepted = over_chains(accepted, step_size)
        total = total + accepted
        if wanted is not None:
            step_size = step_size * (rate * (accepted - wanted)).exp()
    return ChainRun(state.x, step_size, total / max(steps, 1))


def over_chains(values: Tensor, like: Tensor) -> Tensor:
    """Values (chains..., *shape of like), averaged over the chains."""
    return values.flatten(0, values.dim() - like.dim() - 1).mean(0) if values.dim() > like.dim() else values


class DualAveraging:
    """A step size tuned by the averages of Nesterov: it moves in large steps at first, and settles at their weighted mean.

    Args:
        step_size: to begin with.
        wanted: the mean acceptance.
    """

    def __init__(self, step_size: Tensor, wanted: float, *, shrinkage: float = 0.05, delay: float = 10, power: float = 0.75):
        self.wanted, self.shrinkage, self.delay, self.power = wanted, shrinkage, delay, power
        self.centre = log(10) + step_size.log()
        self.error, self.mean, self.count = torch.zeros_like(step_size), torch.zeros_like(step_size), 0
        self.log_step = step_size.log()

    def update(self, accepted: Tensor) -> None:
        """Takes in the mean acceptance of a step."""
        self.count += 1
        weight = 1 / (self.count + self.delay)
        self.error = (1 - weight) * self.error + weight * (self.wanted - accepted)
        self.log_step = self.centre - sqrt(self.count) / self.shrinkage * self.error
        weight = self.count**-self.power
        self.mean = weight * self.log_step + (1 - weight) * self.mean

    @property
    def step_size(self) -> Tensor:
        """To try next."""
        return self.log_step.exp()

    @property
    def final_step_size(self) -> Tensor:
        """To go on with."""
        return self.mean.exp() if self.count else self.step_size


# What the samplers share.


def metropolis(state: State, new: State, log_ratio: Tensor) -> tuple[State, Tensor]:
    """Accepts the new state of each chain with probability min(1, exp(log_ratio)); an infinite or NaN density is refused."""
    log_ratio = log_ratio.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_ratio = log_ratio.masked_fill(new.log_prob == torch.inf, -torch.inf)
    accept = torch.rand_like(log_ratio).log() < log_ratio
    chosen = [None if a is None or b is None else torch.where(beside(accept, a), a, b) for a, b in zip(new, state, strict=True)]
    return State(*chosen), log_ratio.clamp(max=0).exp()  # type: ignore[arg-type]


def per_chain(values: Tensor, chains: int) -> Tensor:
    """Values (chains..., *event_shape) as (chains..., n), given how many dimensions those of chains are."""
    return values.reshape(*values.shape[:chains], -1)


def beside(values: Tensor, like: Tensor) -> Tensor:
    """Values (chains...) as (chains..., 1, ...), of as many dimensions as `like`."""
    return values.reshape(values.shape + (1,) * (like.dim() - values.dim()))


def beside_event(step_size: Tensor, event_dim: int) -> Tensor:
    """Step sizes of chains beside the dimensions of a position."""
    return step_size.reshape(step_size.shape + (1,) * event_dim) if step_size.dim() else step_size


def check_counts(choice: Any, *names: str) -> None:
    """Raises a ValueError if an option is not a whole number of 1 or more."""
    for name in names:
        value = getattr(choice, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(choice).__name__} wants a whole number of 1 or more as {name}, but found {value!r}.")


def check_positive(choice: Any, *names: str) -> None:
    """Raises a ValueError if an option is not a positive finite number."""
    for name in names:
        value = getattr(choice, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{type(choice).__name__} wants a positive {name}, but found {value!r}.")
