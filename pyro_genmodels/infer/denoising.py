r"""Denoising score matching: a regression of the score of noisy data on the noise.

With :math:`u_\sigma = u + \sigma \epsilon`, half the Fisher divergence from the noisy data is, up to a constant, the mean of

.. math:: \tfrac12 \lambda(\sigma)\, \bigl| s(u_\sigma) + \epsilon / \sigma \bigr|^2 .

A diffusion learns all levels of its process at once: with :math:`\hat\varepsilon = -\sigma s`,

.. math:: \mathbb{E}_{t, \varepsilon}\, w(t)\, |\hat\varepsilon(x_t, t) - \varepsilon|^2, \qquad
    x_t = \alpha x_0 + \sigma \varepsilon,

where a *weighting* defines the distribution of times and the weight of each. Vincent (2011); Song et al., *Maximum Likelihood
Training of Score-Based Diffusion Models* (arXiv 2101.09258); Kingma et al. (arXiv 2107.00630).
"""

from __future__ import annotations

__all__ = [
    "DenoisingScoreMatching",
    "LikelihoodWeighting",
    "LogNormalWeighting",
    "TimeWeighting",
    "UniformWeighting",
]

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.wrappers import map_inner
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.processes import Process, stratified
from pyro_genmodels.infer.score_matching import ScoreMatching, score_of
from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.distributions import sum_event, unwrap
from pyro_genmodels.utils.errors import type_with_article, warn_caller

DEFAULT_NOISE = 0.1
"""Deviation of the noise by default, for data of deviation 1."""


class TimeWeighting(ABC):
    """Distribution of the times in training, and the weight of the error at each time."""

    @abstractmethod
    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return times and weights for uniform random numbers u in [0, 1), all of one shape."""


@dataclass(frozen=True)
class UniformWeighting(TimeWeighting):
    """Uniform times with equal weights: the simple loss of DDPM (arXiv 2006.11239)."""

    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        return process.start + (process.end - process.start) * u, torch.ones_like(u)


@dataclass(frozen=True)
class LikelihoodWeighting(TimeWeighting):
    """The weights of the variational bound, so that the loss is that bound up to a constant (nats).

    Attributes:
        importance: True draws times in proportion to their weights, which makes all weights equal and reduces the variance.
            False draws uniform times, and the loss is noisy, because few times near the data have nearly all the weight.
    """

    importance: bool = True

    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        low, high = process.log_snr_range
        if self.importance:
            return process.time(low + (high - low) * u), torch.full_like(u, high - low)
        t, _ = UniformWeighting()(process, u)
        rate = process.squared_diffusion(t) / (2 * process.sigma(t).square())  # of the log signal-to-noise ratio
        return t, rate * (process.end - process.start)


@dataclass(frozen=True)
class LogNormalWeighting(TimeWeighting):
    """Log-normal sigma / alpha with the weights of EDM (arXiv 2206.00364), for data of deviation 1.

    Attributes:
        loc: mean of log(sigma / alpha).
        scale: standard deviation of log(sigma / alpha).
    """

    loc: float = -1.2
    scale: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"LogNormalWeighting wants a positive scale, but found {self.scale}.")

    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = -self.loc - self.scale * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))
        t = process.time(log_snr.clamp(*process.log_snr_range))
        return t, 1 + (-2 * process.log_snr(t)).exp()


class DenoisingScoreMatching(ScoreMatching):
    """Denoising score matching at one or several levels of noise, or at all levels of a diffusion.

    With one noise level, the model learns the density of the data with that noise. Several levels need a model with the level
    as an input, such as ``EnergyModel(..., noise=(low, high))``. A `Diffusion` at an observed site is trained at the times of
    its process. A diffusion that is the prior of a latent variable contributes its variational bound, and the observed sites
    then contribute their likelihood. The loss is then the negative of a bound on the log-likelihood, which trains model,
    guide and prior together.

    Args:
        noise: standard deviation of the noise in the distribution's score coordinates (those of standardised data, if it
            standardises), or several, of which each datum gets one at random. The default is 0.1, or the range that the model
            was built for, log-uniformly.
        weighting: for a diffusion, `UniformWeighting`, `LikelihoodWeighting` or `LogNormalWeighting`. The default is the first,
            and the last for a `Karras` process, most of whose times are almost pure noise. For other models, a function
            sigma (batch...) -> weight of the loss (batch...). The default is sigma squared, which makes the losses of all
            levels comparable.
        kwargs: further arguments of `Objective`.

    Raises:
        ValueError: if a site has no density over real numbers, or several levels are given to a model without the level as
            input.

    Example:
        >>> from pyro_genmodels import DenoisingScoreMatching, EnergyModel
        >>> model, x = EnergyModel((2,), noise=(0.01, 3.0)), torch.randn(100, 2)
        >>> DenoisingScoreMatching()(model)(x).backward()
    """

    wants_average = True

    def __init__(
        self,
        noise: float | Sequence[float] | Tensor | None = None,
        *,
        weighting: TimeWeighting | Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        levels = None if noise is None else torch.as_tensor(noise, dtype=torch.get_default_dtype()).reshape(-1)
        if levels is not None and not (len(levels) and (levels > 0).all() and levels.isfinite().all()):
            raise ValueError(f"DenoisingScoreMatching wants positive standard deviations as noise, but found {noise!r}.")
        self.noise, self.weighting, self._has_looked = levels, weighting, False

    def check(self, name: str, dist: Any) -> None:
        diffusion = capabilities(dist).has_noise_error
        if self.weighting is not None and isinstance(self.weighting, TimeWeighting) != diffusion:
            wanted = "UniformWeighting()" if diffusion else "torch.square"
            raise ValueError(
                f"DenoisingScoreMatching wants a weighting such as {wanted} for {type(dist).__name__} at site {name!r}, but "
                f"found {self.weighting!r}."
            )
        if diffusion:
            if self.noise is not None:
                raise ValueError(
                    f"DenoisingScoreMatching(noise=...) is for energies; the diffusion at site {name!r} is trained at the "
                    "levels of its own process. Leave noise out, or build the family with another process."
                )
            return
        super().check(name, dist)
        if self.noise is not None and len(self.noise) > 1 and capabilities(dist).noise is None:
            raise ValueError(
                f"DenoisingScoreMatching at {len(self.noise)} levels needs a model with the level as input, but site {name!r} "
                f"holds {type_with_article(dist)} without. Build EnergyModel(..., noise=(low, high)), or give one level."
            )

    def score_loss(self, dist: Any, x: Tensor) -> Tensor:
        dist, x = capabilities(dist).dequantize(x)
        dist = capabilities(dist)
        if dist.has_noise_error:
            y, context, _ = dist.aligned(x)
            u = stratified(y.shape[: y.dim() - dist.event_dim], y)
            t, weight = self._times(dist.process, u)
            return weight * dist.training_form.noise_error(y, t, context)
        batch = torch.broadcast_shapes(x.shape[: x.dim() - dist.event_dim], dist.batch_shape)
        log_density, u, event_dim = dist.score_coordinates(x)  # u is in the precision of the network
        self._warn_of_default_noise(dist, u, event_dim)
        sigma = self._levels(dist, batch, u)
        if dist.noise is not None:
            log_density, u, event_dim = dist.at_noise(sigma).score_coordinates(x)
        scale = sigma.reshape(*batch, *(1 for _ in range(event_dim)))
        epsilon = torch.randn_like(u)
        score = score_of(log_density, (u + scale * epsilon).detach().requires_grad_())
        weighting: Any = self.weighting or torch.square
        return weighting(sigma) * sum_event((score + epsilon / scale).square(), event_dim) / 2

    def unit_of(self, model_trace: Trace) -> str:
        """Return the unit of the loss of a model, given its trace."""
        if _sites_with_noise_error(model_trace, traces.latents(model_trace)):
            return "nats"
        return "denoising error" if _sites_with_noise_error(model_trace, traces.observed(model_trace)) else self.unit

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        priors = _sites_with_noise_error(model_trace, traces.latents(model_trace))
        for site in priors:
            site["fn"] = map_inner(site["fn"], lambda prior: prior.with_training_bound())
        if priors:  # observed sites then contribute their log_prob, as in any ELBO
            model_trace.compute_log_prob(site_filter=lambda _, site: site["is_observed"] and not _has_noise_error(site))
        super()._score(model_trace, guide_trace)

    def _times(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        default: TimeWeighting = LogNormalWeighting() if process.is_mostly_noise else UniformWeighting()
        return (self.weighting if isinstance(self.weighting, TimeWeighting) else default)(process, u)

    def _warn_of_default_noise(self, dist: Any, u: Tensor, event_dim: int) -> None:
        """Warn if the default noise hides the first batch of data, unless Pyro's validation is off."""
        if self._has_looked or self.noise is not None or dist.noise is not None or not is_validation_enabled():
            return
        rows = u.detach().reshape(-1, u.shape[u.dim() - event_dim :].numel())
        if len(rows) < 2 or not can_be_read(u):
            return
        self._has_looked = True
        deviation = rows.std(0).max().item()
        if 0 < deviation < DEFAULT_NOISE:  # particles may all have the same row
            warn_caller(
                f"DenoisingScoreMatching adds noise of {DEFAULT_NOISE} by default, but the data deviate by {deviation:.2g} at "
                "most, so that the model learns the noise. Standardise the data, or pass noise=, such as a tenth of that.",
            )

    def _levels(self, dist: Any, batch: Size, u: Tensor) -> Tensor:
        """Return a noise level for each datum, (batch...)."""
        if self.noise is not None:
            levels = self.noise.to(u)
            return levels[torch.randint(len(levels), batch, device=u.device)]
        if dist.noise is None:
            return torch.full(batch, DEFAULT_NOISE, dtype=u.dtype, device=u.device)
        low, high = dist.noise
        return low * (high / low) ** torch.rand(batch, dtype=u.dtype, device=u.device)


def _sites_with_noise_error(trace: Trace, names: Iterable[str]) -> list[Any]:
    """Return the sites of these names whose distributions have a denoiser."""
    sites = traces.sample_sites(trace)
    return [sites[name] for name in names if _has_noise_error(sites[name])]


def _has_noise_error(site: Mapping[str, Any]) -> bool:
    """Return True if the distribution at a site has a denoiser, inside Pyro's wrappers."""
    return bool(capabilities(unwrap(site["fn"])).has_noise_error)
