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
from torch import Tensor

from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.jacobian import pull_back
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distributions import density_of, sum_event


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
        jumps = capabilities(dist).score_jumps
        if jumps is not None:
            raise ValueError(
                f"{type(self).__name__} needs a continuous score, for it integrates by parts, but site {name!r} "
                f"holds {type(dist).__name__} {jumps.reason}. Use DenoisingScoreMatching(), or {jumps.cure}."
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
        score, u, event_dim = differentiable_score(dist, x)
        flat = score.reshape(*score.shape[: score.dim() - event_dim], -1)
        units = torch.eye(flat.shape[-1], dtype=u.dtype, device=u.device)
        units = units.reshape(-1, *(1 for _ in flat.shape[:-1]), flat.shape[-1]).expand(-1, *flat.shape)
        rows = pull_back(flat, u, units, create_graph=True)
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
        score, u, event_dim = differentiable_score(dist, x)
        v = torch.randint(2, (self.num_projections, *u.shape), device=u.device).to(u) * 2 - 1
        curvature = sum_event(v * pull_back(score, u, v, create_graph=True), event_dim).mean(0)
        if self.variance_reduced:
            return sum_event(score.square(), event_dim) / 2 + curvature
        return sum_event(v * score, event_dim).square().mean(0) / 2 + curvature


def differentiable_score(dist: Any, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the score at data in the distribution's score coordinates, the coordinates, and their number of event dimensions.

    The score carries gradients to the parameters and to the coordinates, a leaf of the graph.
    """
    log_density, u, event_dim = capabilities(dist).score_coordinates(x)
    u = u.detach().requires_grad_()
    return score_of(log_density, u), u, event_dim


def score_of(log_density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """Return the gradient of a log density at u, which can be differentiated again."""
    (score,) = torch.autograd.grad(log_density(u).sum(), u, create_graph=True)
    return score
