r"""Flow matching: a regression of a velocity on that of random paths from noise to data, without solving an ODE.

A *coupling* pairs samples :math:`x_0` of the base with data :math:`x_1`, an *interpolant* joins the two by a path, and

.. math:: L(\theta) = \mathbb{E}_{t, x_0, x_1} \bigl| v_\theta(x_t, t, c) - \dot x_t \bigr|^2, \qquad
    x_t = a(t)\, x_0 + b(t)\, x_1,

is minimised by :math:`v(x, t) = \mathbb{E}[\dot x_t \mid x_t = x]`. The ODE of this velocity carries the distribution of
:math:`x_0` to that of :math:`x_1`. The loss is a squared speed in the space that the network models; it is not in nats.

Lipman et al. (arXiv 2210.02747); Albergo and Vanden-Eijnden (arXiv 2209.15571); couplings by optimal transport: Tong et al.
(arXiv 2302.00482), Pooladian et al. (arXiv 2304.14772).
"""

from __future__ import annotations

__all__ = [
    "Coupling",
    "FlowMatching",
    "GaussianTargetCoupling",
    "IndependentCoupling",
    "Interpolant",
    "LinearInterpolant",
    "OptimalTransportCoupling",
    "TrigonometricInterpolant",
]

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import pi
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.dynamics.processes import stratified
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distances import distances
from pyro_genmodels.utils.errors import check_choice, import_extra


class Coupling(ABC):
    """Rule that pairs samples of the base with data."""

    @abstractmethod
    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the two ends of each path, (N, ...) both, with the data in their original order.

        Args:
            x0: independent samples of the base, (N, ...).
            x1: data, (N, ...).
            context: context of the data, (N, c), or None.
        """


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Independent coupling: each datum gets an independent sample."""

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x0, x1


@dataclass(frozen=True)
class GaussianTargetCoupling(Coupling):
    """Independent coupling in which each path ends at its datum plus a small multiple of its sample.

    Attributes:
        sigma_min: the multiple. The flow learns the data with noise of that deviation, in units of the base, along the paths of
            Lipman et al.: straight lines of deviation 1 - (1 - sigma_min) t.
    """

    sigma_min: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < 1:
            raise ValueError(f"GaussianTargetCoupling wants a sigma_min between 0 and 1, but found {self.sigma_min!r}.")

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x0, x1 + self.sigma_min * x0


@dataclass(frozen=True)
class OptimalTransportCoupling(Coupling):
    """Coupling that minimises the sum of squared distances between the samples and the data of a batch, so paths hardly cross.

    With a context, samples are exchanged only between rows of equal context, such as the same label. Otherwise a sample would
    depend on the context, which it does not when the flow is sampled (arXiv 2503.10636). If no two contexts are equal, this is
    `IndependentCoupling`. It needs POT, and takes time proportional to N^3 for a batch of N rows.
    """

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transport = import_extra("ot", extra="eval", by="OptimalTransportCoupling")
        groups = torch.zeros(len(x1), dtype=torch.long) if context is None else _group_numbers(context)
        order = torch.arange(len(x1))
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            lengths = distances(*(x.detach().flatten(1).cpu().double()[rows] for x in (x0, x1)))
            if len(rows) > 1 and 0 < lengths.max() < float("inf"):  # with NaN rows the loss is NaN, however they are paired
                cost = (lengths / lengths.max()).square()  # POT's tolerances are absolute
                plan = transport.emd([], [], cost.numpy())  # a permutation matrix, divided by the number of rows
                order[rows] = rows[torch.as_tensor(plan.argmax(0))]
        return x0[order.to(x0.device)], x1


def _group_numbers(context: Tensor) -> Tensor:
    """Return a number for each row (N,), the same for equal rows."""
    return context.detach().cpu().unique(dim=0, return_inverse=True)[1]


class Interpolant(ABC):
    """A path between the two ends of a pair."""

    is_linear: bool = False
    """True for a straight line at constant speed."""

    @abstractmethod
    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the position and the velocity at time t, whose shape broadcasts with both ends."""


@dataclass(frozen=True)
class LinearInterpolant(Interpolant):
    """A straight line at constant speed."""

    is_linear = True

    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - t) * x0 + t * x1, x1 - x0


@dataclass(frozen=True)
class TrigonometricInterpolant(Interpolant):
    """A quarter of an ellipse, which preserves the variance of standardised ends."""

    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (pi / 2 * t).cos(), (pi / 2 * t).sin()
        return cos * x0 + sin * x1, pi / 2 * (cos * x1 - sin * x0)


class FlowMatching(Objective):
    """Flow matching of the velocities at the observed sites.

    A distribution needs a `velocity(x, t, context)`, from its `base` at time 0 to the data at time 1. `ODEFlow` has one, and
    `Diffusion` has one along straight paths. The base itself is not trained.

    Args:
        coupling: `IndependentCoupling`, `OptimalTransportCoupling` or `GaussianTargetCoupling`.
        path: `LinearInterpolant` or `TrigonometricInterpolant`.
        kwargs: further arguments of `Objective`.

    Raises:
        ValueError: if a site has no velocity, or the model has latent variables; the error says which objective to use.

    Example:
        >>> from pyro_genmodels import FlowMatching, ODEFlow
        >>> flow, x = ODEFlow((2,)), torch.randn(100, 2)
        >>> loss = FlowMatching()(flow)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    unit = "flow-matching error"
    wants_average = True

    def __init__(self, coupling: Coupling | None = None, path: Interpolant | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coupling: Coupling = check_choice("FlowMatching", "coupling", coupling, IndependentCoupling(), Coupling)
        self.path: Interpolant = check_choice("FlowMatching", "path", path, LinearInterpolant(), Interpolant)

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        flow, x = capabilities(dist).dequantize(x)
        flow = capabilities(flow).training_form
        y, context, _ = flow.aligned(x)
        x1 = y.reshape(-1, *flow.event_shape)
        rows = None if context is None else context.reshape(len(x1), -1)
        with torch.no_grad():  # the base is not trained
            x0, x1 = self.coupling(flow.base.sample((len(x1),)), x1, rows)
            t = stratified((len(x1),), x1)
            x_t, velocity = self.path(x0, x1, t.reshape(-1, *(1 for _ in flow.event_shape)))
        error = flow.velocity(x_t, t, rows) - velocity
        return error.square().reshape(len(x1), -1).sum(1).reshape(y.shape[: y.dim() - flow.event_dim])

    def check(self, name: str, dist: Distribution) -> None:
        found = capabilities(dist)
        if found.only_linear_paths and not self.path.is_linear:
            raise ValueError(
                f"The velocity of {type(dist).__name__} at site {name!r} has straight paths only: use path=LinearInterpolant()."
            )
        if not found.has_velocity:
            cures = {"none": "Trace_ELBO() with a guide"}
            cure = cures.get(found.density, "MaximumLikelihood()")
            if found.intractable:
                cure = "ContrastiveDivergence() or NoiseContrastive(noise=...)"
            raise ValueError(
                f"FlowMatching needs a velocity, but site {name!r} holds {type(dist).__name__}, which has none. Use {cure}, "
                "DenoisingScoreMatching() for scores and diffusions, or an ODEFlow."
            )

    def check_latents(self, names: list[str]) -> None:
        raise ValueError(
            f"FlowMatching has no density that could train latent variables, but the model has {', '.join(map(repr, names))}. "
            "Use pyro.infer.Trace_ELBO with a guide for them."
        )
