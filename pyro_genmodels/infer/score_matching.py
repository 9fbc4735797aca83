r"""Score matching: a fit of the model's score to that of the data, without the normalising constant of the density.

With :math:`s = \nabla_u \log p_\theta(u)`, per datum and up to a constant in the parameters,

.. math:: \tfrac12 |s(u)|^2 + \operatorname{tr} \nabla s(u), \qquad
    \tfrac12 |s(u)|^2 + v^\top \nabla s(u)\, v

are half the Fisher divergence from the data (implicit: Hyvärinen, JMLR 2005), and an estimate of it by random projections v
(sliced: Song et al., arXiv 1905.07088). Denoising score matching is in `denoising.py`. The coordinates :math:`u` are unbounded,
and standardised if the distribution standardises, so that the loss does not depend on the units of the data: see
`Capabilities.score_coordinates`.
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
from pyro_genmodels.utils.errors import check_positive_int


class ScoreMatching(Objective):
    """Base of the three objectives, for densities that can be differentiated in unbounded coordinates."""

    unit = "score-matching loss"

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
            return self.score_loss(dist, x)

    @abstractmethod
    def score_loss(self, dist: Any, x: Tensor) -> Tensor:
        """Return the loss of each datum, (batch...). Gradients are enabled at the call."""


class _ByParts(ScoreMatching):
    """Base of the objectives that integrate by parts, and so need a continuous score."""

    def check(self, name: str, dist: Any) -> None:
        super().check(name, dist)
        jumps = capabilities(dist).score_jumps
        if jumps is not None:
            raise ValueError(
                f"{type(self).__name__} needs a continuous score, for it integrates by parts, but site {name!r} "
                f"holds {type(dist).__name__} {jumps.reason}. Use DenoisingScoreMatching(), or {jumps.cure}."
            )


class ImplicitScoreMatching(_ByParts):
    """Implicit score matching with the exact trace of the score's Jacobian, which takes one backward pass per coordinate.

    Args:
        kwargs: arguments of `Objective`.

    Raises:
        ValueError: if a site has no density over real numbers, or a discontinuous score (splines, ReLU); the error says what to
            use.

    Example:
        >>> from pyro_genmodels import EnergyModel, ImplicitScoreMatching
        >>> model, x = EnergyModel((2,), sampler=None), torch.randn(100, 2)
        >>> ImplicitScoreMatching()(model)(x).backward()
    """

    def score_loss(self, dist: Any, x: Tensor) -> Tensor:
        score, u, event_dim = differentiable_score(dist, x)
        flat = score.reshape(*score.shape[: score.dim() - event_dim], -1)
        units = torch.eye(flat.shape[-1], dtype=u.dtype, device=u.device)
        units = units.reshape(-1, *(1 for _ in flat.shape[:-1]), flat.shape[-1]).expand(-1, *flat.shape)
        rows = pull_back(flat, u, units, create_graph=True)
        trace = rows.reshape(-1, *flat.shape).diagonal(dim1=0, dim2=-1).sum(-1)
        return flat.square().sum(-1) / 2 + trace


class SlicedScoreMatching(_ByParts):
    """Sliced score matching with an estimate of the trace by random signs.

    Args:
        num_projections: number of random projections for each datum.
        variance_reduced: True for the exact square of the score, False for the square of its projections.
        kwargs: further arguments of `Objective`.

    Raises:
        ValueError: if a site has no density over real numbers, or a discontinuous score (splines, ReLU); the error says what to
            use.

    Example:
        >>> from pyro_genmodels import EnergyModel, SlicedScoreMatching
        >>> model, x = EnergyModel((20,), sampler=None), torch.randn(100, 20)
        >>> SlicedScoreMatching()(model)(x).backward()
    """

    def __init__(self, *, num_projections: int = 1, variance_reduced: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_positive_int("SlicedScoreMatching", num_projections=num_projections)
        self.num_projections, self.variance_reduced = num_projections, variance_reduced

    def score_loss(self, dist: Any, x: Tensor) -> Tensor:
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
