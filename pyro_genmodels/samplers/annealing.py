r"""Annealing: chains that follow a path of densities, with importance weights that correct for the finite number of steps.

Chains start at samples of :math:`f_0`, whose integral is 1. At each of :math:`0 = \beta_0 < \dots < \beta_K = 1`

.. math:: \log w \leftarrow \log w + \log f_{\beta_k}(x) - \log f_{\beta_{k-1}}(x), \qquad x \leftarrow T_{\beta_k}(x),

where :math:`T_\beta` leaves :math:`f_\beta` invariant. Then :math:`\mathbb{E}\, w = Z`, the integral of :math:`f_1`, for any
number of steps, and :math:`\log \overline{w}` is too low in expectation (Jensen). Backwards, from samples of :math:`f_1 / Z`
that are moved before they are weighted, the same sum has :math:`\mathbb{E}\, w = 1 / Z`, and the estimate is too high.
Backwards from any :math:`x`, with kernels that are their own reversal, it bounds the density of the forward run's end at x:

.. math:: \log p_{\mathrm{RAISE}}(x) \ge \mathbb{E}[\log f_1(x) + \log w] .

Neal, *Annealed Importance Sampling* (1998); Burda, Grosse and Salakhutdinov, *Accurate and Conservative Estimates of MRF
Log-likelihood using Reverse Annealing* (arXiv 1412.8566).
"""

from __future__ import annotations

__all__ = ["anneal", "schedule", "tune"]

import warnings

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.samplers.kernel import Sampler, run
from pyro_genmodels.samplers.target import Target


def schedule(steps: int, like: Tensor, *, bend: float = 4.0) -> Tensor:
    """Return betas (steps + 1,) from 0 to 1 along a sigmoid, denser at both ends (Grosse et al., arXiv 1511.02543)."""
    s = torch.sigmoid(bend * torch.linspace(-1.0, 1.0, steps + 1, dtype=torch.float64, device=like.device))
    return ((s - s[0]) / (s[-1] - s[0])).to(like.dtype)


def anneal(
    target: Target,
    sampler: Sampler,
    x: Tensor,
    betas: Tensor,
    *,
    step_sizes: Tensor | None = None,
    rate: float = 0.0,
    progress: bool = False,
    label: str = "annealing",
) -> tuple[Tensor, Tensor]:
    """Move chains along the path, with one step of the sampler at each beta.

    Args:
        target: target with the path.
        sampler: sampler whose steps leave each density invariant.
        x: first positions, (chains..., *event_shape).
        betas: (K + 1,). Ascending: chains are weighted, then moved. Descending: they are moved, then weighted.
        step_sizes: step sizes of the sampler at each beta, (K + 1,); None takes its own.
        rate: rate of tuning during the run if there are no step_sizes; tuning biases the weights.
        progress: True to show a progress bar.
        label: label of the progress bar.

    Returns:
        Positions, (chains..., *event_shape), and log weights, (chains...).

    Raises:
        ValueError: for a sampler with temperatures.

    Warns:
        RuntimeWarning: if the log density of a chain is NaN, whose weight is then zero.
    """
    if sampler.temperatures is not None:
        raise ValueError(f"Annealing has temperatures of its own: use the sampler inside {type(sampler).__name__}.")
    ascending = bool(betas[0] < betas[-1])
    x = x.detach()
    chains = x.shape[: x.dim() - target.event_dim]
    log_w, step_size = x.new_zeros(chains), sampler.first_step_size(x)
    broken = torch.zeros_like(log_w, dtype=torch.bool)

    def move(k: int) -> None:
        nonlocal x, step_size
        step_size = step_size if step_sizes is None else step_sizes[k]
        x, step_size, _ = run(sampler, target, x, 1, beta=betas[k], step_size=step_size, rate=rate)

    for k in tqdm(range(1, len(betas)), desc=label, disable=not progress, mininterval=0.5, leave=False):
        if not ascending:
            move(k - 1)
        with torch.no_grad():
            before, after = target.log_prob(x, betas[k - 1 : k + 1].reshape(2, *(1 for _ in chains))).expand(2, *chains)
        is_nan = after.isnan() | before.isnan()
        broken = broken | (is_nan & (log_w > -torch.inf))
        step = (after - before).masked_fill(is_nan | (before == -torch.inf), -torch.inf)
        log_w = torch.where(log_w == -torch.inf, log_w, log_w + step)  # a weight of zero stays zero
        if ascending:
            move(k)
    if num_broken := int(broken.sum()):
        warnings.warn(
            f"Annealing: the log density is NaN on the path of {num_broken} of {broken.numel()} chains, whose weight is set to "
            "zero. Let the energy be finite everywhere, or the log density -inf where the density is zero.",
            RuntimeWarning,
            stacklevel=2,
        )
    return x, log_w


def tune(target: Target, sampler: Sampler, x: Tensor, betas: Tensor, *, steps: int = 3, rate: float = 0.7) -> Tensor | None:
    """Tune the step sizes of a sampler along the path, by a run whose chains are thrown away.

    Step sizes that depend on the weighted chains would bias their weights.

    Args:
        target: target with the path.
        sampler: sampler to tune.
        x: samples of f_0, (chains, *event_shape).
        betas: (K + 1,), ascending.
        steps: steps of the sampler at each of up to twenty betas.
        rate: see `run`.

    Returns:
        Step sizes (K + 1,), or None if the sampler has nothing to tune.
    """
    if sampler.target_acceptance is None:
        return None
    at = torch.linspace(0, len(betas) - 1, min(len(betas), 20)).round().long()
    step_size, sizes = sampler.first_step_size(x), []
    for i, k in enumerate(at):
        x, step_size, _ = run(
            sampler, target, x, 10 * steps if i == 0 else steps, beta=betas[k], step_size=step_size, rate=rate
        )
        sizes.append(step_size)
    nearest = torch.linspace(0, len(at) - 1, len(betas)).round().long()
    return torch.stack(sizes)[nearest.to(x.device)]
