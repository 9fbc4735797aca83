r"""Posterior sampling by guided reverse diffusion: the prior is a diffusion, and :math:`\ell(x) = p(y \mid x)` any likelihood.

The likelihood of noisy data is not known. Both methods use the likelihood of the estimate of the data,
:math:`\ell(D(x_t, t))`, and add its gradient to the score. `sample_guided` does no more than that (DPS: Chung et al., arXiv
2209.14687), which is biased. Its steps :math:`\delta^2 \nabla \log \ell` are divided by
:math:`1 + \delta^2 h_t / \alpha^2`, as in an approximately implicit step. Sampling then stays stable under sharp likelihoods,
and small steps hardly change. `sample_twisted` uses the gradient in the proposal of a particle filter, whose particles take
ancestral steps from t to s, with weights

.. math:: w \leftarrow w\; \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)}\; \frac{\psi_s(x_s)}{\psi_t(x_t)} , \qquad
    \psi_t = \ell(D(x_t, t))^{\gamma_t}, \quad \gamma_t = \frac{1}{1 + c_t^2 h_t} ,

with :math:`\ell(x)` itself at the end. The power accounts for the uncertainty of the estimate, which has variance
:math:`c_t^2 = \sigma^2 / (\alpha^2 + \sigma^2)`, given the curvature :math:`h_t` of the log-likelihood along its gradient. The
twists cancel in the product of the weights. Any power is therefore exact, and so is any positive number in place of the
likelihood where that of the estimate is 0. As the number of particles grows, the weighted samples follow
:math:`p(x)\,\ell(x) / p(y)`, in which p is the distribution of the ancestral sampler, and the mean weight estimates
:math:`p(y)` without bias (Wu et al., arXiv 2306.17775).
"""

from __future__ import annotations

__all__ = ["Particles", "sample_guided", "sample_twisted"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.dynamics.processes import Process, along
from pyro_genmodels.dynamics.resampling import effective_size, systematic_index
from pyro_genmodels.dynamics.reverse import prior_scale, progress_bar
from pyro_genmodels.dynamics.spacing import UniformLogSNR

DataDenoiser = Callable[[Tensor, Tensor], Tensor]
"""(x (n, *event_shape), t ()) -> estimates of the data in x."""


@dataclass(frozen=True)
class Particles:
    """Weighted draws from a posterior.

    Attributes:
        x: draws, (n, *event_shape).
        log_weights: log weights, (n,). The mean weight is 1.
        log_evidence: estimate of log p(y) (nats), (); NaN if the method gives none.
        effective_sizes: effective sample size at each step, before any resampling, (steps,).
        evaluations: number of calls of the denoiser, each for all particles at once.
        averaged_log_weights: log weights whose means make up the evidence, of each resampling and of the end, (times, n).
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    effective_sizes: Tensor
    evaluations: int
    averaged_log_weights: Tensor


def sample_guided(
    denoise: DataDenoiser,
    process: Process,
    log_likelihood: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    num_steps: int = 500,
    scale: float = 1.0,
    progress: bool | None = None,
) -> Particles:
    """Draw from a posterior by ancestral sampling with a guided score. The draws are biased by an unknown amount.

    Args:
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x.
        process: process that adds the noise.
        log_likelihood: log-likelihood of data, (n, *event_shape) -> (n,).
        noise: standard normal noise, (n, *event_shape).
        num_steps: number of ancestral steps.
        scale: scale of the guidance, 1 for the gradient of the log-likelihood itself.
        progress: True shows a progress bar, False does not; None shows it if sampling takes more than five seconds.

    Raises:
        FloatingPointError: if the draws are NaN or infinite.
    """
    x, steps = noise * prior_scale(process), _AncestralSteps(denoise, process, log_likelihood, num_steps, noise)
    for t, s in steps.pairs("guided", progress=progress):
        data, gradient, _, curvature = steps.evaluate(x, t, tempered=False)
        mean, deviation = steps.kernel(x, data, t, s)
        size = scale * deviation.square()
        size = size / (1 + size * along(curvature, x) / process.alpha(t).square())
        x = mean + size * gradient + deviation * torch.randn_like(x)
    x = x / process.alpha(steps.times[-1])
    if not x.isfinite().all():
        raise FloatingPointError(
            "Guided sampling has reached NaN or infinite values: lower the scale, take more steps, or use TwistedDiffusion."
        )
    size = x.new_full((num_steps,), len(x))
    return Particles(x, x.new_zeros(len(x)), x.new_tensor(float("nan")), size, steps.evaluations, x.new_zeros(0, len(x)))


def sample_twisted(
    denoise: DataDenoiser,
    process: Process,
    log_likelihood: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    num_steps: int = 500,
    resample_below: float = 0.5,
    progress: bool | None = None,
) -> Particles:
    """Draw weighted particles from a posterior by twisted sequential Monte Carlo.

    Args:
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x.
        process: process that adds the noise.
        log_likelihood: log-likelihood of data, (n, *event_shape) -> (n,).
        noise: standard normal noise, (n, *event_shape).
        num_steps: number of ancestral steps.
        resample_below: effective sample size, as a fraction of n, below which particles are resampled (systematically).
        progress: True shows a progress bar, False does not; None shows it if sampling takes more than five seconds.

    Raises:
        FloatingPointError: if no particle has a finite likelihood.
    """
    x, steps = noise * prior_scale(process), _AncestralSteps(denoise, process, log_likelihood, num_steps, noise)
    n, sizes, averaged = len(x), [], []
    data, gradient, log_w, _ = steps.evaluate(x, steps.times[0])
    twist = log_w
    for t, s in steps.pairs("twisted", progress=progress):
        sizes.append(_finite_effective_size(log_w))
        if sizes[-1] < resample_below * n:
            averaged.append(log_w)
            chosen = systematic_index(log_w, n)
            x, data, gradient, twist, log_w = x[chosen], data[chosen], gradient[chosen], twist[chosen], torch.zeros_like(log_w)
        mean, deviation = steps.kernel(x, data, t, s)
        shift, z = deviation * gradient, torch.randn_like(x)  # in standard deviations
        x = mean + deviation * (shift + z)
        if s == steps.times[-1]:
            next_twist = log_likelihood(x / process.alpha(s))
        else:
            data, gradient, next_twist, _ = steps.evaluate(x, s)
        log_ratio = (z.square() - (z + shift).square()).reshape(n, -1).sum(1) / 2  # log p - log q
        log_w, twist = log_w + log_ratio + next_twist - twist, next_twist
        log_w = log_w.masked_fill(log_w.isnan(), -torch.inf)
    sizes.append(_finite_effective_size(log_w))
    x, log_weights = x / process.alpha(steps.times[-1]), torch.stack([*averaged, log_w])
    log_means = log_weights.logsumexp(1) - log(n)
    return Particles(x, log_w - log_means[-1], log_means.sum(), torch.stack(sizes[1:]), steps.evaluations, log_weights)


def _finite_twist(log_twist: Tensor) -> Tensor:
    """Replace infinite twists by the smallest finite one.

    The likelihood of an estimate may be 0 although that of the final draw is not, so such particles must not be lost yet.
    """
    infinite = ~log_twist.isfinite()
    least = log_twist.masked_fill(infinite, torch.inf).min()
    return torch.where(infinite, least.nan_to_num(posinf=0.0), log_twist)


def _finite_effective_size(log_weights: Tensor) -> Tensor:
    """Return the effective sample size, or raise an error if all weights are 0."""
    size = effective_size(log_weights)
    if not size.isfinite():
        raise FloatingPointError(
            "No particle has a finite likelihood: look for observations that the model rules out, or take more particles."
        )
    return size


class _AncestralSteps:
    """Ancestral steps, and the likelihood of the estimates at each."""

    def __init__(self, denoise: DataDenoiser, process: Process, log_likelihood: Callable, steps: int, like: Tensor) -> None:
        self.denoise, self.process, self.log_likelihood = denoise, process, log_likelihood
        self.times, self.evaluations = UniformLogSNR()(process, steps).to(like), 0

    def pairs(self, label: str, *, progress: bool | None) -> Iterable[tuple[Tensor, Tensor]]:
        """Return pairs of successive times, with a progress bar."""
        return progress_bar(pairwise(self.times), len(self.times) - 1, label, progress=progress)

    def evaluate(self, x: Tensor, t: Tensor, *, tempered: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the estimate of the data, the gradient of the log twist in x, the log twist, and the curvature, (n,).

        If `tempered` is False, the twist is the likelihood of the estimate, without its power.
        """
        self.evaluations += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            data = self.denoise(x, t)
            estimate = data.detach().requires_grad_()
            log_p = self.log_likelihood(estimate)
            slope = _gradient(log_p, estimate, create_graph=True)
            curvature = _curvature(slope, estimate)
            power: Any = self._power(curvature, t) if tempered else 1.0
            (gradient,) = torch.autograd.grad(data, x, power * slope.detach().nan_to_num(0.0, 0.0, 0.0))
        return data.detach(), gradient, _finite_twist(power * log_p.detach()), curvature

    def _power(self, curvature: Tensor, t: Tensor) -> Tensor:
        """Return 1 / (1 + c^2 h), with h averaged over the particles."""
        return 1 / (1 + torch.sigmoid(-2 * self.process.log_snr(t)) * curvature.mean())

    def kernel(self, x: Tensor, data: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and standard deviation of x at time s, given x at time t and the estimate of the data."""
        p = self.process
        exponent = 2 * (p.log_snr(t) - p.log_snr(s))
        share, new = exponent.exp(), -torch.expm1(exponent)  # of the noise at s: from x, and new
        mean = p.alpha(s) * new * data + share * p.alpha(s) / p.alpha(t) * x
        return mean, p.sigma(s) * new.sqrt()


def _curvature(slope: Tensor, x: Tensor) -> Tensor:
    """Return minus the second derivative of the log-likelihood along its gradient, (n,), or 0 if it is convex there."""
    direction = torch.nn.functional.normalize(_scaled(slope.detach().reshape(len(x), -1)), dim=1).reshape(x.shape)
    curvature = -(direction * _gradient((slope * direction).sum(), x)).reshape(len(x), -1).sum(1)
    return curvature.masked_fill(~curvature.isfinite(), 0.0).clamp(min=0)


def _scaled(rows: Tensor) -> Tensor:
    """Return rows (n, d) divided by their largest entry, so that their squares neither vanish nor overflow."""
    largest = rows.abs().amax(1, keepdim=True)
    return torch.where(largest > 0, rows / largest, rows)


def _gradient(value: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of the sum of values in x, which is zero if they do not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True, materialize_grads=True)[0]
