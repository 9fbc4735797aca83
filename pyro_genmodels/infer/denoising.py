r"""Denoising score matching: the score of data with noise, fitted by what the noise was.

With :math:`u_\sigma = u + \sigma \epsilon`, half the Fisher divergence from the data with noise is, up to a constant, the
mean of

.. math:: \tfrac12 \lambda(\sigma)\, \bigl| s(u_\sigma) + \epsilon / \sigma \bigr|^2 .

A diffusion learns all levels of its process at once: with :math:`\hat\varepsilon = -\sigma s`,

.. math:: \mathbb{E}_{t, \varepsilon}\, w(t)\, |\hat\varepsilon(x_t, t) - \varepsilon|^2, \qquad
    x_t = \alpha x_0 + \sigma \varepsilon,

where a *weighting* says how times are drawn and what each counts. Vincent (2011); Song et al., *Maximum Likelihood Training of
Score-Based Diffusion Models* (arXiv 2101.09258); Kingma et al. (arXiv 2107.00630).
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.handlers import map_inner
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.processes import Karras, Process, stratified
from pyro_genmodels.infer.score_matching import ScoreMatching, score_of
from pyro_genmodels.utils.distributions import sum_event, unwrap


class TimeWeighting(ABC):
    """How the times of a process are drawn in training, and what the error of the noise at each of them counts."""

    @abstractmethod
    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        """Times and weights, from uniform numbers, all of one shape."""


@dataclass(frozen=True)
class UniformWeighting(TimeWeighting):
    """Times are uniform, and all count alike: the simple loss of DDPM (arXiv 2006.11239)."""

    def __call__(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        return process.start + (process.end - process.start) * u, torch.ones_like(u)


@dataclass(frozen=True)
class LikelihoodWeighting(TimeWeighting):
    """Times count as they do in the variational bound, so that the loss is that bound but for a constant (nats).

    Attributes:
        importance: whether times are drawn as often as they count, so that all weights are one number, of less variance; else
            they are uniform, and few of them, near the data, count for nearly all: the loss then jumps.
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
    """sigma / alpha is log-normal, and errors count as in EDM (arXiv 2206.00364), for data of deviation 1.

    Attributes:
        loc: mean of log(sigma / alpha).
        scale: its standard deviation.
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

    At one level the model learns the data with that noise. At several it must be told at which it is asked, as an
    `EnergyModel(..., noise=(low, high))` is. A `Diffusion` that is observed learns at the times of its process; one that is
    the prior of a latent variable counts there by its variational bound, and what else is observed then counts by its
    likelihood, so that model, guide and prior are trained by one loss, the negative of a bound on the log-likelihood.

    Args:
        noise: standard deviation of the noise in the distribution's own coordinates (of standardised data, in their units); or
            several, of which each datum is given one at random. By default 0.1, or all that the model was built for, as likely
            in each order of magnitude.
        weighting: of a diffusion `UniformWeighting`, `LikelihoodWeighting` or `LogNormalWeighting`; by default the first, but
            the last for a `Karras` process, most of whose times see nothing but noise. Of other models sigma (batch...) ->
            weight of the loss there; by default sigma squared, so that all levels count alike.
        kwargs: see `Objective`.

    Raises:
        ValueError: for a site without a density over real numbers, or several levels with a model that is told none.

    Example:
        >>> from pyro_genmodels import DenoisingScoreMatching, EnergyModel
        >>> model, x = EnergyModel((2,), noise=(0.01, 3.0)), torch.randn(100, 2)
        >>> DenoisingScoreMatching()(model)(x).backward()
    """

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
        self.noise, self.weighting = levels, weighting

    def check(self, name: str, dist: Any) -> None:
        diffusion = capabilities(dist).has_noise_error
        if self.weighting is not None and isinstance(self.weighting, TimeWeighting) != diffusion:
            wanted = "UniformWeighting()" if diffusion else "torch.square"
            raise ValueError(
                f"DenoisingScoreMatching was given {self.weighting!r}, but site {name!r} holds {type(dist).__name__}, which "
                f"wants a weighting such as {wanted}."
            )
        if diffusion:
            if self.noise is not None:
                raise ValueError(
                    f"DenoisingScoreMatching(noise=...) is for energies; the diffusion at site {name!r} learns at the levels "
                    "of its own process. Leave noise out, or build the family with another process."
                )
            return
        super().check(name, dist)
        if self.noise is not None and len(self.noise) > 1 and capabilities(dist).noise is None:
            raise ValueError(
                f"DenoisingScoreMatching at {len(self.noise)} levels needs a model that is told the level, but site {name!r} "
                f"holds a {type(dist).__name__} that is not. Build EnergyModel(..., noise=(low, high)), or give one level."
            )

    def of(self, dist: Any, x: Tensor) -> Tensor:
        dist, x = capabilities(dist).dequantize(x)
        dist = capabilities(dist)
        if dist.has_noise_error:
            y, context, _ = dist.aligned(x)
            u = stratified(y.shape[: y.dim() - dist.event_dim], y)
            t, weight = self._times(dist.process, u)
            return weight * dist.training_form.noise_error(y, t, context)
        batch = torch.broadcast_shapes(x.shape[: x.dim() - dist.event_dim], dist.batch_shape)
        sigma = self._levels(dist, batch, x)
        if dist.noise is not None:
            dist = dist.at_noise(sigma)
        log_density, u, event_dim = dist.score_coordinates(x)
        scale = sigma.reshape(*batch, *(1 for _ in range(event_dim)))
        epsilon = torch.randn_like(u)
        score = score_of(log_density, (u + scale * epsilon).detach().requires_grad_())
        weighting: Any = self.weighting or torch.square
        return weighting(sigma) * sum_event((score + epsilon / scale).square(), event_dim) / 2

    def _score(self, model_trace: Trace, guide_trace: Trace) -> None:
        sites = traces.sample_sites(model_trace)
        priors: list[Any] = [sites[name] for name in traces.latents(model_trace) if _has_noise_error(sites[name])]
        for site in priors:
            site["fn"] = map_inner(site["fn"], lambda prior: prior.with_training_bound())
        if priors:  # observed sites then contribute their log_prob, as in any ELBO
            model_trace.compute_log_prob(site_filter=lambda _, site: site["is_observed"] and not _has_noise_error(site))
        super()._score(model_trace, guide_trace)

    def _times(self, process: Process, u: Tensor) -> tuple[Tensor, Tensor]:
        usual: TimeWeighting = LogNormalWeighting() if isinstance(process, Karras) else UniformWeighting()
        return (self.weighting if isinstance(self.weighting, TimeWeighting) else usual)(process, u)

    def _levels(self, dist: Any, batch: Size, x: Tensor) -> Tensor:
        """A level for each datum, (batch...)."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        if self.noise is not None:
            levels = self.noise.to(x.device, dtype)
            return levels[torch.randint(len(levels), batch, device=x.device)]
        if dist.noise is None:
            return torch.full(batch, 0.1, dtype=dtype, device=x.device)
        low, high = dist.noise
        return low * (high / low) ** torch.rand(batch, dtype=dtype, device=x.device)


def _has_noise_error(site: Mapping[str, Any]) -> bool:
    """Return True if the distribution at a site has a denoiser, inside Pyro's wrappers."""
    return bool(capabilities(unwrap(site["fn"])).has_noise_error)
