r"""Diffusions: the reverse of a process that turns data into noise.

The process adds noise to data, :math:`x_t = \alpha x_0 + \sigma \varepsilon`. A *denoiser* estimates the data in x_t, and so
determines the score at every noise level. Samples follow a reverse process (`pyro_genmodels.dynamics.reverse`). There are two
densities, which are equal for the exact score but not for a learned one:

- `FlowDensity`: that of the probability flow, an ODE in :math:`\lambda = \log(\alpha / \sigma)`, by change of variables;
- `VariationalBound`: a lower bound for the reverse SDE. With the noise :math:`\tilde\sigma_0 = e^{-\lambda_{\max}}` that is
  left at the start,

.. math:: \log p(x) \ge -\tfrac{d}{2} \log(2 \pi e \tilde\sigma_0^2) - \mathrm{KL}\bigl(q(x_1 \mid x) \,\|\, N(0, r^2)\bigr)
    - \int_{\lambda_{\min}}^{\lambda_{\max}} \mathbb{E}\,|\hat\varepsilon - \varepsilon|^2\, d\lambda .

Each call of the bound is an unbiased estimate. Both densities are those of data with the smallest noise of the process.

Song et al. (arXiv 2011.13456); Kingma et al., *Variational Diffusion Models* (arXiv 2107.00630).
"""

from __future__ import annotations

__all__ = ["DiffusionLikelihood", "FlowDensity", "ReverseDiffusion", "VariationalBound"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import exp, log, pi, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import AffineTransform, ComposeTransform

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.ode import ContinuousFlow, Trace
from pyro_genmodels.distributions.sampler_gap import SamplerGap, default_reverse_sampler
from pyro_genmodels.dynamics.denoiser import Denoiser
from pyro_genmodels.dynamics.ode import Dopri5, Solver
from pyro_genmodels.dynamics.probability_flow import ProbabilityFlow, flow_velocity
from pyro_genmodels.dynamics.processes import Process, along, stratified
from pyro_genmodels.dynamics.reverse import ReverseSampler, Trajectory, simulate_reverse
from pyro_genmodels.utils.distributions import Density, modules_and_tensors, sum_event
from pyro_genmodels.utils.errors import check_choice, check_positive_int


class DiffusionLikelihood(ABC):
    """A choice of `log_prob` for a diffusion."""

    @property
    @abstractmethod
    def flow_density(self) -> FlowDensity:
        """Options of the diffusion's probability flow, `ReverseDiffusion.flow`."""

    @abstractmethod
    def density(self, diffusion: ReverseDiffusion) -> Density:
        """Return the kind of density that `log_prob` computes."""

    @abstractmethod
    def mean_inside_log(self, diffusion: ReverseDiffusion) -> bool:
        """Return True if the log of a mean of exp(log_prob) over calls is a tighter bound."""

    @abstractmethod
    def log_prob(self, diffusion: ReverseDiffusion, value: Tensor) -> Tensor:
        """Return the log density (nats) of value (sample..., *batch_shape, *event_shape): (sample..., *batch_shape)."""


@dataclass(frozen=True)
class FlowDensity(DiffusionLikelihood):
    """The density of a diffusion's probability flow.

    Attributes:
        solver: solver of the ODE, with its tolerances.
        trace: trace of the Jacobian: `ExactTrace`, or `Hutchinson`, with which the density is an estimate. None is exact up to
            16 coordinates.
    """

    solver: Solver = field(default_factory=Dopri5)
    trace: Trace | None = None

    @property
    def flow_density(self) -> FlowDensity:
        return self

    def density(self, diffusion: ReverseDiffusion) -> Density:
        return diffusion.flow.density

    def mean_inside_log(self, diffusion: ReverseDiffusion) -> bool:
        return diffusion.flow.mean_inside_log

    def log_prob(self, diffusion: ReverseDiffusion, value: Tensor) -> Tensor:
        return diffusion.flow.log_prob(value)


@dataclass(frozen=True)
class VariationalBound(DiffusionLikelihood):
    """An unbiased estimate of a lower bound, that of a diffusion's reverse SDE.

    Attributes:
        num_times: noise levels that each call evaluates for each value.
    """

    num_times: int = 1

    def __post_init__(self) -> None:
        check_positive_int("VariationalBound", num_times=self.num_times)

    @property
    def flow_density(self) -> FlowDensity:
        return FlowDensity()

    def density(self, diffusion: ReverseDiffusion) -> Density:
        return "lower bound"

    def mean_inside_log(self, diffusion: ReverseDiffusion) -> bool:
        return False

    def log_prob(self, diffusion: ReverseDiffusion, value: Tensor) -> Tensor:
        y, context, log_det = diffusion.aligned(value)
        return diffusion.variational_bound(y, context, self.num_times) + log_det


class ReverseDiffusion(GenerativeDistribution):
    """The distribution of a diffusion's samples, from noise by a reverse process.

    Args:
        denoiser: network and process.
        event_shape: shape of one datum.
        sampler: sampler of the reverse process; None is that of `default_reverse_sampler`. `rsample` follows the probability
            flow instead, if parameters need gradients.
        likelihood: choice of `log_prob`: `FlowDensity`, the default, or `VariationalBound`.
        drop_context: probability with which training replaces the context by the null context.
        kwargs: further arguments of `GenerativeDistribution`.

    Example:
        >>> from pyro_genmodels.dynamics.denoiser import DataPrediction
        >>> from pyro_genmodels.dynamics.processes import VariancePreserving
        >>> process = VariancePreserving()
        >>> normal = lambda x, t, context: process.alpha(t)[:, None] * x  # the denoiser of standard normal data
        >>> d = ReverseDiffusion(Denoiser(normal, process, DataPrediction(), clock=False), (2,))
        >>> d.log_prob(torch.zeros(2))
        tensor(-1.8379)
    """

    has_rsample = True
    has_velocity = True
    only_linear_paths = True
    has_noise_error = True

    def __init__(
        self,
        denoiser: Denoiser,
        event_shape: Sequence[int],
        *,
        sampler: ReverseSampler | None = None,
        likelihood: DiffusionLikelihood | None = None,
        drop_context: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, **kwargs)
        self.drop_context = drop_context
        self.denoiser, self.network = denoiser, denoiser.network
        self.sampler = _sampler(sampler, self.event_shape)
        self.likelihood = _likelihood(likelihood)

    @property
    def density(self) -> Density:
        """Kind of density that `log_prob` returns."""
        return self.likelihood.density(self)

    @property
    def mean_inside_log(self) -> bool:
        """True if the log of a mean of exp(log_prob) over calls is a tighter bound."""
        return self.likelihood.mean_inside_log(self)

    # Variants.

    def with_sampler(self, sampler: ReverseSampler) -> ReverseDiffusion:
        """Return the diffusion with another sampler."""
        return self._with(sampler=_sampler(sampler, self.event_shape))

    def with_likelihood(self, likelihood: DiffusionLikelihood) -> ReverseDiffusion:
        """Return the diffusion with another `log_prob`."""
        return self._with(likelihood=_likelihood(likelihood))

    def with_training_bound(self) -> ReverseDiffusion:
        """Return the diffusion with its variational bound as `log_prob`."""
        return self.with_likelihood(VariationalBound())

    def guided(self, weight: float) -> ReverseDiffusion:
        """Return the diffusion with that weight of its context: see `Denoiser.guided`."""
        return self._with(denoiser=self.denoiser.guided(weight))

    @property
    def training_form(self) -> ReverseDiffusion:
        """The diffusion without guidance."""
        return self._with(denoiser=self.denoiser.plain)

    def _with(self, **changes: Any) -> ReverseDiffusion:
        new = self.expand(self.batch_shape)
        new.__dict__.update(changes)
        return new

    @property
    def process(self) -> Process:
        """The process that adds noise to data."""
        return self.denoiser.process

    # Samples.

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        return self._reverse(shape, context).x.reshape(shape + self.event_shape)

    def _noise(self, shape: Size) -> Tensor:
        """Return standard normal noise for as many rows as the shape has elements, (n, *event_shape)."""
        like = self._like()
        return torch.randn(shape.numel(), *self.event_shape, dtype=like.dtype, device=like.device)

    def _reverse(self, shape: Size, context: Tensor | None, noise: Tensor | None = None, **kwargs: Any) -> Trajectory:
        noise = self._noise(shape) if noise is None else noise
        rows = None if context is None else context.reshape(len(noise), context.shape[-1])
        denoiser = self.denoiser
        return simulate_reverse(self.sampler, lambda x, t: denoiser.estimate(x, t, rows), denoiser.process, noise, **kwargs)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples of the probability flow, by its solver, with the gradient of the parameters.

        If no parameter needs a gradient, or under ``torch.no_grad()``, they are those of `sample`.
        """
        modules, tensors = modules_and_tensors(self)
        learned = any(t.requires_grad for t in (*tensors, *(p for module in modules for p in module.parameters())))
        return self.flow.rsample(sample_shape) if learned and torch.is_grad_enabled() else self.sample(sample_shape)

    def trajectory(self, sample_shape: Sequence[int] = (), *, num_frames: int = 20, progress: bool | None = None) -> Trajectory:
        """Return samples with their trajectories.

        Args:
            sample_shape: shape of the samples.
            num_frames: number of positions to keep, including the start and the end, at least 2.
            progress: True shows a progress bar, False does not; None shows it if sampling takes long.

        Returns:
            Trajectory with x (*sample_shape, *batch_shape, *event_shape), the evaluations of the network, and frames in the
            scale of the process, of standardised data: (frames, *sample_shape, *batch_shape, *event_shape).

        Raises:
            ValueError: if there are fewer than 2 frames, or if dropout is active.
        """
        self._check_draws()
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            trajectory = self._reverse(shape, self._context_at(shape), num_frames=num_frames, progress=progress)
        x = trajectory.x.reshape(shape + self.event_shape)
        frames = trajectory.frames.reshape(len(trajectory.frames), *shape, *self.event_shape)
        return replace(trajectory, x=self.to_data(x), frames=frames)

    def sampler_gap(self, num_samples: int = 1000) -> SamplerGap:
        """Estimate how far the sampler's draws are from the density of the probability flow.

        Draws of the sampler and of the probability flow, which has that density, start at the same noise. The mean difference
        of their log densities is returned. A gap of 0 is necessary for draws of the density, but not sufficient.

        Args:
            num_samples: number of draws of each, at least 2.

        Raises:
            ValueError: if there are fewer than 2 samples, or if dropout is active.

        Example:
            >>> from pyro_genmodels import Diffusion
            >>> gap = Diffusion((2,)).eval()().sampler_gap(100)
            >>> gap.evaluations, bool(gap.value.abs() < 0.1)
            (71, True)
        """
        check_positive_int("sampler_gap", least=2, num_samples=num_samples)
        self._check_draws()
        shape, exact = Size([num_samples]) + self.batch_shape, self.with_sampler(ProbabilityFlow(self.flow.solver))
        with torch.no_grad():
            context, noise = self._context_at(shape), self._noise(shape)
            found = self._reverse(shape, context, noise)
            ends = (part.x.reshape(shape + self.event_shape) for part in (found, exact._reverse(shape, context, noise)))
            log_p, log_p_exact = (self.flow.log_prob(self.to_data(x)).double() for x in ends)
        differences = (log_p - log_p_exact).reshape(num_samples, -1).mean(1)
        return SamplerGap(differences.mean(), differences.std() / sqrt(num_samples), found.evaluations)

    # Densities and scores.

    def log_prob(self, value: Tensor) -> Tensor:
        return self.likelihood.log_prob(self, value)

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.variational_bound(y, context, 1)

    @property
    def flow(self) -> ContinuousFlow:
        """The probability flow as a distribution, with noise at time 0 and data at time 1: see `log_prob_with_error`."""
        likelihood = self.likelihood.flow_density
        shrinkage = (1 + exp(-2 * self.denoiser.process.log_snr_range[1])) ** -0.5  # alpha / hypot(alpha, sigma) at the start
        own = [] if self.pretransform is None else [self.pretransform]
        return ContinuousFlow(
            _Velocity(self.denoiser),
            self.base,
            self.event_shape,
            solver=likelihood.solver,
            trace=likelihood.trace,
            network=self.network,
            context=self.context,
            batch_shape=self.batch_shape,
            support=self.support,
            pretransform=ComposeTransform([*own, AffineTransform(0.0, shrinkage, event_dim=self.event_dim)]),
            validate_args=self._validate_args,
        )

    # A flow along straight paths, for `FlowMatching`.

    @property
    def base(self) -> dist.Independent:
        """Standard normal distribution over one event."""
        zero = self._like().new_zeros(self.event_shape)
        return dist.Normal(zero, zero + 1, validate_args=False).to_event(self.event_dim)

    def velocity(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the conditional mean of data - noise at x = (1 - t) noise + t data, (n, *event_shape).

        Args:
            x: points, (n, *event_shape).
            t: times in [0, 1], (n,).
            context: context of each point, (n, c), or None.
        """
        process, context = self.denoiser.process, self._with_dropped_context(context)
        log_snr = torch.logit(t, eps=1e-6).clamp(*process.log_snr_range)
        time, t = process.time(log_snr), torch.sigmoid(log_snr)
        scale = torch.hypot(process.alpha(time), process.sigma(time)) / torch.hypot(t, 1 - t)
        data, noise = self.denoiser.estimate(along(scale, x) * x, time, context)  # unlike x, they do not cancel
        return data - noise

    def variational_bound(self, y: Tensor, context: Tensor | None, num_times: int) -> Tensor:
        """Return an unbiased estimate of the lower bound (nats), (batch...), in the space of the network.

        Args:
            y: data in the space of the network, (batch..., *event_shape).
            context: (batch..., c) or None.
            num_times: noise levels over which the integral is averaged.
        """
        (low, high), d = self.denoiser.process.log_snr_range, self.event_shape.numel()
        # the share of the data in the variance at the end
        signal = torch.sigmoid(torch.tensor(2 * low, dtype=torch.float64)).item()
        end = 0.5 * (signal * sum_event(y.square(), self.event_dim) - d * (signal + log(1 - signal)))
        start = 0.5 * d * (log(2 * pi) + 1 - 2 * high)
        copies = y.expand(num_times, *y.shape)
        log_snr = low + (high - low) * stratified(copies.shape[: copies.dim() - self.event_dim], y)
        t = self.denoiser.process.time(log_snr)
        return -start - end - (high - low) * self.noise_error(copies, t, context).mean(0)

    def noise_error(self, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        r"""Return the squared error of the predicted noise, :math:`|\hat\varepsilon - \varepsilon|^2`, (batch...).

        The term :math:`\bar\alpha^4 (|\varepsilon|^2 - d)` of mean 0 is subtracted, which removes most of the variance at small
        noise.

        Args:
            y: data in the space of the network, (batch..., *event_shape).
            t: times of the process, (batch...).
            context: context of each datum, (batch..., c), or None.
        """
        rows, t, context = y.reshape(-1, *self.event_shape), t.reshape(-1), self._with_dropped_context(context)
        context = None if context is None else context.expand(*y.shape[: y.dim() - self.event_dim], -1).flatten(0, -2)
        noise = torch.randn_like(rows)
        process = self.denoiser.process
        error = sum_event((self.denoiser.noise(process.noised(rows, t, noise), t, context) - noise).square(), self.event_dim)
        excess = sum_event(noise.square(), self.event_dim) - self.event_shape.numel()
        known = torch.sigmoid(2 * process.log_snr(t)).square() * excess
        return (error - known).reshape(y.shape[: y.dim() - self.event_dim])

    def _with_dropped_context(self, context: Tensor | None) -> Tensor | None:
        """Return contexts (..., c), of which a random part is replaced by the null context in training."""
        null = self.denoiser.null
        if context is None or null is None or not (self.drop_context and self.network.training and torch.is_grad_enabled()):
            return context
        dropped = torch.rand(context.shape[:-1], device=context.device) < self.drop_context
        return torch.where(dropped.unsqueeze(-1), null, context)

    def noisy_score(self, value: Tensor, t: Tensor) -> Tensor:
        """Return the network's score of noisy data at times t of the process: shape of the value broadcast with the batch.

        Args:
            value: noisy standardised data in the scale of the process, (batch..., *event_shape).
            t: times of the process, () or (batch...).
        """
        shape = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        x, t, context = value.expand(shape + self.event_shape), t.expand(shape).reshape(-1), self._context_at(shape)
        rows = None if context is None else context.reshape(-1, context.shape[-1])
        flat = x.reshape(-1, *self.event_shape)
        noise = self.denoiser.noise(flat, t, rows)
        return (-noise / along(self.denoiser.process.sigma(t), flat)).reshape(x.shape)

    def score(self, value: Tensor) -> Tensor:
        """Return the network's score of data with the smallest noise of the process. No density is integrated."""
        if torch.is_inference_mode_enabled():
            return self._outside_inference_mode("score", value)
        value, process, create_graph = self._as_value(value), self.denoiser.process, torch.is_grad_enabled()
        with torch.enable_grad():
            x = value if value.requires_grad else value.detach().clone().requires_grad_()
            x = x.expand(
                torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape) + self.event_shape
            )
            y, _, log_det = self.aligned(x)
            with torch.set_grad_enabled(create_graph):
                start = y.new_tensor(process.start)
                score = process.alpha(start) * self.noisy_score(process.alpha(start) * y, start)
            outputs = [(y, score)] + ([(log_det.sum(), None)] if isinstance(log_det, Tensor) and log_det.requires_grad else [])
            ys, grads = zip(*outputs, strict=True)
            return torch.autograd.grad(ys, x, grads, create_graph=create_graph)[0]


def _sampler(found: Any, event_shape: Sequence[int]) -> ReverseSampler:
    return check_choice("A diffusion", "sampler", found, default_reverse_sampler(event_shape), ReverseSampler)


def _likelihood(found: Any) -> DiffusionLikelihood:
    return check_choice("A diffusion", "likelihood", found, FlowDensity(), DiffusionLikelihood)


@dataclass(frozen=True)
class _Velocity:
    """Velocity of the probability flow, from noise at time 0 to data at time 1, with time linear in log(alpha / sigma)."""

    denoiser: Denoiser

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        low, high = self.denoiser.process.log_snr_range
        slope = flow_velocity(lambda x, t: self.denoiser.estimate(x, t, context), self.denoiser.process)
        return (high - low) * slope(low + (high - low) * t, x)
