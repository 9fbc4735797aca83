r"""Posterior draws by guided reverse diffusion: the prior is a diffusion, the likelihood :math:`\ell(x) = p(y \mid x)` any.

Under noise the likelihood is not known. Both methods take it at the estimate of the data, :math:`\ell(D(x_t, t))`,
and add its gradient to the score. `guided` leaves it at that (DPS: Chung et al., arXiv 2209.14687), which is biased; its steps
:math:`\delta^2 \nabla \log \ell` are divided by :math:`1 + \delta^2 h_t / \alpha^2`, about as implicit ones would be, so that
sharp likelihoods do not blow them up, and small steps are what they were. `twisted` takes the gradient for a proposal of
particles, ancestral steps from t to s, and weighs these,

.. math:: w \leftarrow w\; \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)}\; \frac{\psi_s(x_s)}{\psi_t(x_t)} , \qquad
    \psi_t = \ell(D(x_t, t))^{\gamma_t}, \quad \gamma_t = \frac{1}{1 + c_t^2 h_t} ,

with :math:`\ell(x)` itself at the end. The power makes up for what the estimate leaves open, a variance
:math:`c_t^2 = \sigma^2 / (\alpha^2 + \sigma^2)` where the log-likelihood has the curvature :math:`h_t` along its gradient; any
power is exact, as the factors cancel, and so is any number in its place where the likelihood of the estimate is 0. So weighed
draws follow :math:`p(x)\,\ell(x) / p(y)`, with p the law of the ancestral walk, as their number grows; and the mean weight
estimates :math:`p(y)` without bias (Wu et al., arXiv 2306.17775).
"""

from __future__ import annotations

__all__ = ["Particles", "guided", "twisted"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.dynamics.processes import Process, along
from pyro_genmodels.dynamics.reverse import PROGRESS_DELAY, prior_scale
from pyro_genmodels.dynamics.spacing import UniformLogSNR

Denoise = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Particles:
    """Weighed draws of a posterior.

    Attributes:
        x: (n, *event_shape).
        log_weights: (n,), of mean weight 1.
        log_evidence: the estimate of log p(y), (); NaN where none is made.
        effective_sizes: effective sample size at each step, before any resampling, (steps,).
        evaluations: of the denoiser, for all particles at once.
    """

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor
    effective_sizes: Tensor
    evaluations: int


def effective_size(log_weights: Tensor) -> Tensor:
    """The effective sample size of log weights (n,)."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def guided(
    denoise: Denoise,
    process: Process,
    log_likelihood: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    num_steps: int = 500,
    scale: float = 1.0,
    progress: bool | None = None,
) -> Particles:
    """Draws by the ancestral walk with a guided score. They are biased, and no weight tells by how much.

    Args:
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x.
        process: that made noise of data.
        log_likelihood: of data, (n, *event_shape) -> (n,).
        noise: standard normal, (n, *event_shape).
        num_steps: of the walk.
        scale: of the guidance.
        progress: whether to show a progress bar; None where it takes long.

    Raises:
        FloatingPointError: where the walk leaves what is finite.
    """
    x, walk = noise * prior_scale(process), _Walk(denoise, process, log_likelihood, num_steps, noise)
    for t, s in walk.pairs("guided", progress=progress):
        data, gradient, _, curvature = walk.look(x, t, tempered=False)
        mean, deviation = walk.kernel(x, data, t, s)
        size = scale * deviation.square()
        size = size / (1 + size * along(curvature, x) / process.alpha(t).square())
        x = mean + size * gradient + deviation * torch.randn_like(x)
    x = x / process.alpha(walk.times[-1])
    if not x.isfinite().all():
        raise FloatingPointError(
            "The guided walk came to NaN or infinity: lower the scale, take more steps, or TwistedDiffusion."
        )
    size = x.new_full((num_steps,), len(x))
    return Particles(x, x.new_zeros(len(x)), x.new_tensor(float("nan")), size, walk.evaluations)


def twisted(
    denoise: Denoise,
    process: Process,
    log_likelihood: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    num_steps: int = 500,
    resample_below: float = 0.5,
    progress: bool | None = None,
) -> Particles:
    """Weighed particles by twisted sequential Monte Carlo.

    Args:
        denoise: (x (n, *event_shape), t ()) -> estimates of the data in x.
        process: that made noise of data.
        log_likelihood: of data, (n, *event_shape) -> (n,).
        noise: standard normal, (n, *event_shape).
        num_steps: of the walk.
        resample_below: effective sample size, as a part of n, below which particles are resampled (systematically).
        progress: whether to show a progress bar; None where it takes long.

    Raises:
        FloatingPointError: if no particle has a finite likelihood.
    """
    x, walk = noise * prior_scale(process), _Walk(denoise, process, log_likelihood, num_steps, noise)
    n, sizes, evidence = len(x), [], x.new_zeros(())
    data, gradient, log_w, _ = walk.look(x, walk.times[0])
    twist = log_w
    for t, s in walk.pairs("twisted", progress=progress):
        sizes.append(_effective(log_w))
        if sizes[-1] < resample_below * n:
            evidence = evidence + log_w.logsumexp(0) - torch.tensor(float(n)).log()
            chosen = _systematic(log_w)
            x, data, gradient, twist, log_w = x[chosen], data[chosen], gradient[chosen], twist[chosen], torch.zeros_like(log_w)
        mean, deviation = walk.kernel(x, data, t, s)
        shift, z = deviation * gradient, torch.randn_like(x)  # in deviations
        x = mean + deviation * (shift + z)
        if s == walk.times[-1]:
            after = log_likelihood(x / process.alpha(s))
        else:
            data, gradient, after, _ = walk.look(x, s)
        log_ratio = (z.square() - (z + shift).square()).reshape(n, -1).sum(1) / 2  # of the walk's law to the proposal's
        log_w, twist = log_w + log_ratio + after - twist, after
        log_w = log_w.masked_fill(log_w.isnan(), -torch.inf)
    sizes.append(_effective(log_w))
    total = log_w.logsumexp(0) - torch.tensor(float(n)).log()
    return Particles(
        x / process.alpha(walk.times[-1]), log_w - total, evidence + total, torch.stack(sizes[1:]), walk.evaluations
    )


def _kept_alive(log_twist: Tensor) -> Tensor:
    """Where the estimate is ruled out, the twist of the least likely other: the data behind it may yet be ruled in."""
    out = ~log_twist.isfinite()
    least = log_twist.masked_fill(out, torch.inf).min()
    return torch.where(out, least.nan_to_num(posinf=0.0), log_twist)


def _effective(log_weights: Tensor) -> Tensor:
    size = effective_size(log_weights)
    if not size.isfinite():
        raise FloatingPointError(
            "No particle has a finite likelihood: look for observations that the model rules out, or take more particles."
        )
    return size


class _Walk:
    """Ancestral steps, and the likelihood as it is seen from on the way."""

    def __init__(self, denoise: Denoise, process: Process, log_likelihood: Callable, steps: int, like: Tensor) -> None:
        self.denoise, self.process, self.log_likelihood = denoise, process, log_likelihood
        self.times, self.evaluations = UniformLogSNR()(process, steps).to(like), 0

    def pairs(self, label: str, *, progress: bool | None) -> Iterable[tuple[Tensor, Tensor]]:
        return tqdm(
            pairwise(self.times), total=len(self.times) - 1, desc=label, unit="step", leave=False,
            delay=0 if progress else PROGRESS_DELAY, disable=None if progress is None else not progress,
        )  # fmt: skip

    def look(self, x: Tensor, t: Tensor, *, tempered: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The estimate of the data, the gradient in x of the twist, the twist, and the curvature, (n,).

        Not tempered, the twist is the likelihood itself.
        """
        self.evaluations += 1
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            data = self.denoise(x, t)
            at = data.detach().requires_grad_()
            found = self.log_likelihood(at)
            slope = _gradient(found, at, create_graph=True)
            curvature = _curvature(slope, at)
            power: Any = self._power(curvature, t) if tempered else 1.0
            (gradient,) = torch.autograd.grad(data, x, power * slope.detach().nan_to_num(0.0, 0.0, 0.0))
        return data.detach(), gradient, _kept_alive(power * found.detach()), curvature

    def _power(self, curvature: Tensor, t: Tensor) -> Tensor:
        """1 / (1 + c^2 h), h averaged over the particles."""
        return 1 / (1 + torch.sigmoid(-2 * self.process.log_snr(t)) * curvature.mean())

    def kernel(self, x: Tensor, data: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x at s, from x at t and the estimate of the data."""
        p = self.process
        kept = (2 * (p.log_snr(t) - p.log_snr(s))).exp()
        mean = p.alpha(s) * (1 - kept) * data + kept * p.alpha(s) / p.alpha(t) * x
        return mean, p.sigma(s) * (1 - kept).sqrt()


def _curvature(slope: Tensor, at: Tensor) -> Tensor:
    """Less the second derivative of the log-likelihood along its gradient, (n,), and 0 where it is convex."""
    size = slope.detach().reshape(len(at), -1).norm(dim=1).clamp(min=1e-30)
    direction = slope.detach() / along(size, at)
    curvature = -(direction * _gradient((slope * direction).sum(), at)).reshape(len(at), -1).sum(1)
    return curvature.masked_fill(~curvature.isfinite(), 0.0).clamp(min=0)


def _gradient(value: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient in x, zero where the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value.sum(), x, create_graph=create_graph, allow_unused=True, materialize_grads=True)[0]


def _systematic(log_weights: Tensor) -> Tensor:
    """Indices of n particles, each as often as it weighs, but for less than one (systematic resampling)."""
    n = len(log_weights)
    edges = log_weights.softmax(0).cumsum(0)
    points = (torch.arange(n, device=edges.device) + torch.rand((), device=edges.device)) / n
    return torch.searchsorted(edges, points.to(edges)).clamp(max=n - 1)
