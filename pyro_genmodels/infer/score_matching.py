r"""Score matching: the score of the model is fitted to that of the data, and no constant of the density is ever needed.

With :math:`s = \nabla_u \log p_\theta(u)`, per datum and up to a constant in the parameters,

.. math:: \tfrac12 |s(u)|^2 + \operatorname{tr} \nabla s(u), \qquad
    \tfrac12 |s(u)|^2 + v^\top \nabla s(u)\, v

are half the Fisher divergence from the data (implicit: Hyvärinen, JMLR 2005), and its estimate by random projections v (sliced:
Song et al., arXiv 1905.07088). Denoising score matching is in `denoising.py`. Scores are taken in the distribution's own
coordinates :math:`u`: without bounds, and standardised where it standardises, so that units of the data do not weigh.
"""

from __future__ import annotations

__all__ = ["ImplicitScoreMatching", "SlicedScoreMatching"]

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distributions import density_of, is_real, over_events, sum_event


class ScoreMatching(Objective):
    """What the three share: a density that can be differentiated, in coordinates without bounds."""

    def check(self, name: str, dist: Any) -> None:
        density, advice = density_of(dist)
        if density == "none":
            raise ValueError(f"{type(self).__name__} needs a density, but site {name!r} has none. {advice}")
        if dist.support is None or dist.support.is_discrete:
            raise ValueError(
                f"{type(self).__name__} needs a density over real numbers, but site {name!r} holds {type(dist).__name__} over "
                f"{dist.support}, which has no score. Use ContrastiveDivergence() or NoiseContrastive(noise=...) for energies, "
                "MaximumLikelihood() for densities, and Trace_ELBO with a guide where there are latent variables."
            )

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.of(dist, x)

    @abstractmethod
    def of(self, dist: Any, x: Tensor) -> Tensor:
        """The loss of each datum, computed with gradients enabled."""


class _ByParts(ScoreMatching):
    """What rests on integration by parts, and so on scores that do not jump."""

    def check(self, name: str, dist: Any) -> None:
        super().check(name, dist)
        if isinstance(dist, NormalizingFlow) and not dist.smooth:
            found, cure = "of splines or ReLU", "MaximumLikelihood()"
        elif isinstance(dist, Energy) and _has_kinks(dist.network):
            found, cure = "with ReLU in its network", "smooth units such as SiLU"
        else:
            return
        raise ValueError(
            f"{type(self).__name__} needs a score without jumps, which integration by parts would not see, but site {name!r} "
            f"holds {type(dist).__name__} {found}. Use DenoisingScoreMatching(), or {cure}."
        )


class ImplicitScoreMatching(_ByParts):
    """Implicit score matching, with the trace of the score's Jacobian exact: as many backward passes as coordinates, in one.

    Args:
        kwargs: see `Objective`.

    Raises:
        ValueError: for a site without a density over real numbers, or whose score jumps (splines, ReLU), naming what to use.

    Example:
        >>> from pyro_genmodels import EnergyModel, ImplicitScoreMatching
        >>> model, x = EnergyModel((2,), sampler=None), torch.randn(100, 2)
        >>> ImplicitScoreMatching()(model)(x).backward()
    """

    def of(self, dist: Any, x: Tensor) -> Tensor:
        log_density, u, event_dim = in_coordinates(dist, x)
        score = score_of(log_density, u)
        flat = score.reshape(*score.shape[: score.dim() - event_dim], -1)
        units = torch.eye(flat.shape[-1], dtype=u.dtype, device=u.device)
        rows = _pull_back(flat, u, units.reshape(-1, *(1 for _ in flat.shape[:-1]), flat.shape[-1]).expand(-1, *flat.shape))
        trace = rows.reshape(-1, *flat.shape).diagonal(dim1=0, dim2=-1).sum(-1)
        return flat.square().sum(-1) / 2 + trace


class SlicedScoreMatching(_ByParts):
    """Sliced score matching: the trace by random signs.

    Args:
        num_projections: for each datum.
        variance_reduced: whether the square of the score is exact as well, instead of that of its projections.
        kwargs: see `Objective`.

    Raises:
        ValueError: for a site without a density over real numbers, or whose score jumps (splines, ReLU), naming what to use.

    Example:
        >>> from pyro_genmodels import EnergyModel, SlicedScoreMatching
        >>> model, x = EnergyModel((20,), sampler=None), torch.randn(100, 20)
        >>> SlicedScoreMatching()(model)(x).backward()
    """

    def __init__(self, *, num_projections: int = 1, variance_reduced: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_projections < 1:
            raise ValueError(f"SlicedScoreMatching wants num_projections of 1 or more, but found {num_projections}.")
        self.num_projections, self.variance_reduced = num_projections, variance_reduced

    def of(self, dist: Any, x: Tensor) -> Tensor:
        log_density, u, event_dim = in_coordinates(dist, x)
        score = score_of(log_density, u)
        v = torch.randint(2, (self.num_projections, *u.shape), device=u.device).to(u) * 2 - 1
        curvature = sum_event(v * _pull_back(score, u, v), event_dim).mean(0)
        if self.variance_reduced:
            return sum_event(score.square(), event_dim) / 2 + curvature
        return sum_event(v * score, event_dim).square().mean(0) / 2 + curvature


def in_coordinates(dist: Any, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
    """The log density of a distribution's own coordinates, up to a constant; data there, a leaf; and their event dimensions."""
    if isinstance(dist, Energy):
        y, context, _ = dist.aligned(x)
        return lambda u: dist.path.log_f(u, context), _leaf(dist.path.encode(y)), len(dist.event_shape)
    batch = torch.broadcast_shapes(x.shape[: x.dim() - dist.event_dim], dist.batch_shape)
    x = x.expand(batch + dist.event_shape)
    if isinstance(dist, GenerativeDistribution) and dist.pretransform is not None:
        to_data = dist.pretransform.inv
    elif is_real(dist.support):
        return dist.log_prob, _leaf(x), dist.event_dim
    else:
        to_data = over_events(biject_to(dist.support), dist.event_dim)

    def log_density(u: Tensor) -> Tensor:
        y = to_data(u)
        return dist.log_prob(y) + to_data.log_abs_det_jacobian(u, y)

    return log_density, _leaf(to_data.inv(x)), to_data.domain.event_dim


def _has_kinks(network: Any) -> bool:
    """Whether a network's gradient jumps somewhere, as far as its layers tell."""
    kinked = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Hardswish, nn.MaxPool2d)
    return isinstance(network, nn.Module) and any(isinstance(part, kinked) for part in network.modules())


def _leaf(u: Tensor) -> Tensor:
    return u.detach().requires_grad_()


def score_of(log_density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    (score,) = torch.autograd.grad(log_density(u).sum(), u, create_graph=True)
    return score


def _pull_back(score: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """V times the Jacobian of the score, (k, *shape of u), for k fields v (k, *shape of the score)."""
    if not score.requires_grad:  # a score that is constant
        return torch.zeros(len(v), *u.shape).to(u)
    (rows,) = torch.autograd.grad(
        score, u, v, create_graph=True, is_grads_batched=True, allow_unused=True, materialize_grads=True
    )
    return rows
