r"""Langevin dynamics: a step along the score, and noise.

.. math:: x' = x + \epsilon\, \nabla \log f(x) + \sqrt{2 \epsilon}\, \xi, \qquad \xi \sim N(0, I)

As :math:`\epsilon \to 0` it draws from :math:`f`. With a finite step it draws from something near, or, where each step is a
proposal of Metropolis and Hastings, from :math:`f` itself. Roberts and Tweedie, *Exponential Convergence of Langevin
Distributions and Their Discrete Approximations* (1996). Annealed over levels of noise: Song and Ermon (arXiv 1907.05600).
"""

from __future__ import annotations

__all__ = ["Langevin", "annealed_langevin", "langevin_step"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.samplers.kernel import Sampler, State, beside_event, check_positive, metropolis, per_chain
from pyro_genmodels.samplers.target import Beta, Target, value_and_score


def langevin_step(x: Tensor, score: Tensor, step_size: Any) -> Tensor:
    """One unadjusted step from x, at which the score is given, both (chains..., *event_shape)."""
    return x + step_size * score + (2 * step_size) ** 0.5 * torch.randn_like(x)


@dataclass(frozen=True)
class Langevin(Sampler):
    """Langevin dynamics of real numbers.

    Args:
        step_size: epsilon above, in squared units of the standardised data.
        adjusted: whether steps are accepted or refused, so that the draws are of the target itself. The step size is then tuned
            to an acceptance of 0.57 (Roberts and Rosenthal, 1998).

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
        return 0.574 if self.adjusted else None

    def init(self, x: Tensor, target: Target, beta: Beta = 1.0) -> State:
        return State(x, *value_and_score(target, x, beta))

    def step(self, state: State, target: Target, step_size: Tensor, beta: Beta = 1.0) -> tuple[State, Tensor]:
        x, log_prob, score = state
        step_size = beside_event(step_size, target.event_dim)
        proposed = langevin_step(x, score, step_size)
        new = State(proposed, *value_and_score(target, proposed, beta))
        if not self.adjusted:
            return new, torch.ones_like(log_prob)
        forth, back = (proposed - x - step_size * score).square(), (x - proposed - step_size * new.score).square()
        hastings = per_chain((forth - back) / (4 * step_size), log_prob.dim()).sum(-1)
        return metropolis(state, new, new.log_prob - log_prob + hastings)


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
    r"""Draws by a score that knows levels of noise, from the loudest to the quietest.

    At the level :math:`\sigma` the step is :math:`\epsilon = \texttt{step\_size} \cdot \sigma^2`, the same in its units.

    Args:
        score: (x, sigma) -> score of the data with noise of that standard deviation, of the shape of x; sigma is ().
        x: where to begin, (chains..., *event_shape), say noise of the loudest level.
        noise: standard deviations, descending.
        steps: per level.
        step_size: in units of the variance of the noise.
        denoise: whether the end is moved to the mean of the data given it, x + sigma^2 score.
        progress: whether to show a progress bar.

    Returns:
        Draws of the shape of x.

    Raises:
        ValueError: if the levels are not positive and descending, or steps or the step size not positive.

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
    if not (isinstance(steps, int) and steps >= 1 and 0 < step_size < float("inf")):
        raise ValueError(f"steps wants 1 or more and step_size a positive number, but found {steps!r} and {step_size!r}.")
    with torch.no_grad():
        for sigma, value in zip(tqdm(levels, desc="noise levels", disable=not progress), values, strict=True):
            for _ in range(steps):
                x = langevin_step(x, score(x, sigma), step_size * value**2)
        return x + values[-1] ** 2 * score(x, levels[-1]) if denoise else x
