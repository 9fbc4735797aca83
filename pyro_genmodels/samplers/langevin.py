r"""Langevin dynamics: a step along the score plus noise.

.. math:: x' = x + \epsilon\, \nabla \log f(x) + \sqrt{2 \epsilon}\, \xi, \qquad \xi \sim N(0, I)

As :math:`\epsilon \to 0` its samples follow :math:`f`. With a finite step they are biased, unless each step is a proposal that
is accepted or rejected by Metropolis and Hastings. A step that suits most of a density is too large in its narrowest parts,
where every proposal would be rejected. A quarter of the adjusted steps is therefore smaller, by a random factor between 1 and
100 that does not depend on the position, so that no chain stands still.

Roberts and Tweedie, *Exponential Convergence of Langevin Distributions and Their Discrete Approximations* (1996). Annealing
over noise levels: Song and Ermon (arXiv 1907.05600).
"""

from __future__ import annotations

__all__ = ["Langevin", "annealed_langevin", "langevin_step"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.samplers.kernel import Sampler, State, check_positive, flatten_event, metropolis, step_size_per_event
from pyro_genmodels.samplers.target import Beta, Target, value_and_score

SHARE_OF_SMALL_STEPS = 0.25
"""Share of the adjusted steps that are smaller than the step size."""


def langevin_step(x: Tensor, score: Tensor, step_size: Any) -> Tensor:
    """Take one unadjusted step from x, given the score at x, both (chains..., *event_shape).

    The noise is computed from the step size before that is rounded to the dtype of x: half precision would make zero of it.
    """
    step, deviation = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (step_size, (2 * step_size) ** 0.5))
    return x.addcmul(step, score).addcmul(deviation, torch.randn_like(x))


@dataclass(frozen=True)
class Langevin(Sampler):
    """Langevin dynamics over real numbers.

    Args:
        step_size: epsilon above, in squared units of the standardised data.
        adjusted: True to accept or reject each step by Metropolis and Hastings, so that samples are unbiased. The step size is
            then tuned to an acceptance of 0.66: 0.574 for whole steps (Roberts and Rosenthal, 1998), and more for small ones.

    Raises:
        ValueError: if the step size is not positive.

    Example:
        >>> from pyro_genmodels.samplers import Langevin, sample_chains
        >>> double_well = lambda x: -(x**2 - 1).square().sum(-1)
        >>> chains = sample_chains(double_well, torch.ones(50, 1), sampler=Langevin(0.1), num_samples=100, progress=False)
        >>> chains.draws.shape
        torch.Size([50, 100, 1])
    """

    step_size: float = 0.01
    adjusted: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "step_size")

    @property
    def target_acceptance(self) -> float | None:
        return 0.66 if self.adjusted else None

    def unbiased(self) -> Langevin:
        return replace(self, adjusted=True)

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return State(x, *value_and_score(target, x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        x, log_prob, score = state
        step_size = step_size * _random_factor(log_prob) if self.adjusted else step_size
        step_size = step_size_per_event(step_size, target.event_dim)
        proposed = langevin_step(x, score, step_size)
        new = State(proposed, *value_and_score(target, proposed, beta))
        if not self.adjusted:
            return new, torch.ones_like(log_prob)
        forward, backward = (proposed - x - step_size * score).square(), (x - proposed - step_size * new.score).square()
        hastings = flatten_event((forward - backward) / (4 * step_size), log_prob.dim()).sum(-1)
        return metropolis(state, new, new.log_prob - log_prob + hastings)


def _random_factor(like: Tensor) -> Tensor:
    """Return factors of step sizes, (chains...): 1 for most chains, and for the others log-uniform between 0.01 and 1."""
    return torch.where(torch.rand_like(like) < SHARE_OF_SMALL_STEPS, 0.01 ** torch.rand_like(like), torch.ones_like(like))


def annealed_langevin(
    score: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    noise: Sequence[float] | Tensor,
    *,
    steps: int = 100,
    step_size: float = 0.1,
    denoise: bool = True,
    progress: bool = False,
) -> Tensor:
    r"""Draw samples with a noise-conditional score, from the highest noise level to the lowest.

    The step at the noise level :math:`\sigma` is :math:`\epsilon = \mathtt{step\_size} \cdot \sigma^2`.

    Args:
        score: (x, sigma) -> score, of the shape of x, of the data with noise of that standard deviation; sigma is ().
        x: first positions, (chains..., *event_shape), such as noise of the highest level.
        noise: standard deviations in descending order.
        steps: steps per level.
        step_size: step size in units of the variance of the noise.
        denoise: True to replace the last position by the mean of the data given it, x + sigma^2 score.
        progress: True to show a progress bar.

    Returns:
        Samples of the shape of x.

    Raises:
        ValueError: if levels are not positive and descending, or steps or step_size is not positive.

    Example:
        >>> noise = torch.logspace(0.5, -2, 10)
        >>> normal = lambda x, sigma: -x / (1 + sigma**2)
        >>> draws = annealed_langevin(normal, 3 * torch.randn(1000, 1), noise)
        >>> bool((draws.std() - 1).abs() < 0.15)
        True
    """
    levels = torch.as_tensor(noise, dtype=x.dtype, device=x.device)
    values = levels.tolist()
    if not values or not (levels > 0).all() or sorted(values, reverse=True) != values:
        raise ValueError(f"noise wants positive standard deviations, the largest first, but found {values}.")
    if not (isinstance(steps, Integral) and steps >= 1 and 0 < step_size < float("inf")):
        raise ValueError(f"steps wants 1 or more and step_size a positive number, but found {steps!r} and {step_size!r}.")
    with torch.no_grad():
        for sigma, value in zip(tqdm(levels, desc="noise levels", disable=not progress), values, strict=True):
            for _ in range(steps):
                x = langevin_step(x, score(x, sigma), step_size * value**2)
        return x + values[-1] ** 2 * score(x, levels[-1]) if denoise else x
