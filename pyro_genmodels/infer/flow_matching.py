r"""Flow matching: a velocity is fitted to that of random ways from noise to data, and no ODE is solved.

A *coupling* pairs draws :math:`x_0` of the base with data :math:`x_1`, a *path* joins the two, and

.. math:: L(\theta) = \mathbb{E}_{t, x_0, x_1} \bigl| v_\theta(x_t, t, c) - \dot x_t \bigr|^2, \qquad
    x_t = a(t)\, x_0 + b(t)\, x_1,

has as its minimiser :math:`v(x, t) = \mathbb{E}[\dot x_t \mid x_t = x]`, whose ODE carries the law of :math:`x_0` to that of
:math:`x_1`. The loss is a squared speed in the space that the network models, not nats.

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
from pyro_genmodels.utils.errors import check_choice, import_extra


class Coupling(ABC):
    """How draws of the base and data are paired."""

    @abstractmethod
    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both ends of each way.

        Args:
            x0: independent draws of the base, (N, ...).
            x1: data, (N, ...).
            context: of the data, (N, c), or None.

        Returns:
            Both in pairs, the data in the same order as before.
        """


@dataclass(frozen=True)
class IndependentCoupling(Coupling):
    """Each datum has a draw of its own, as they come."""

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x0, x1


@dataclass(frozen=True)
class GaussianTargetCoupling(Coupling):
    """Each datum has a draw of its own, and is the centre of a small copy of the base.

    Attributes:
        sigma_min: deviation of that copy, in units of the base. The flow learns the data with that noise, along the paths of
            Lipman et al.: in one straight line of deviation 1 - (1 - sigma_min) t.
    """

    sigma_min: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < 1:
            raise ValueError(f"Target wants a sigma_min between 0 and 1, but found {self.sigma_min!r}.")

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return x0, x1 + self.sigma_min * x0


@dataclass(frozen=True)
class OptimalTransportCoupling(Coupling):
    """Draws and data of a batch are paired so that the sum of their squared distances is least: ways hardly cross.

    With a context only rows of equal contexts, such as labels, change their draws among themselves: otherwise a draw would tell
    of the context, as it does not in sampling (arXiv 2503.10636). Where no two are equal, this is `IndependentCoupling`. Needs POT; a
    batch of N rows takes time as N^3.
    """

    def __call__(self, x0: Tensor, x1: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        transport = import_extra("ot", extra="eval", by="OptimalTransport")
        groups = torch.zeros(len(x1), dtype=torch.long) if context is None else _equal(context)
        order = torch.arange(len(x1))
        for group in groups.unique():
            rows = (groups == group).nonzero().squeeze(1)
            if len(rows) > 1:
                ends = (x.detach().flatten(1).cpu().double()[rows].numpy() for x in (x0, x1))
                plan = transport.emd([], [], transport.dist(*ends))  # a permutation matrix, divided by the number of rows
                order[rows] = rows[torch.as_tensor(plan.argmax(0))]
        return x0[order.to(x0.device)], x1


def _equal(context: Tensor) -> Tensor:
    """A number for each row, the same for equal ones."""
    return context.detach().cpu().unique(dim=0, return_inverse=True)[1]


class Interpolant(ABC):
    """A path between the two ends of a pair."""

    is_linear: bool = False
    """True for a straight line at constant speed."""

    @abstractmethod
    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the way is at time t, and its velocity there; t has a shape that broadcasts with both ends."""


@dataclass(frozen=True)
class LinearInterpolant(Interpolant):
    """A straight line at constant speed."""

    is_linear = True

    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - t) * x0 + t * x1, x1 - x0


@dataclass(frozen=True)
class TrigonometricInterpolant(Interpolant):
    """A quarter of an ellipse, along which the variance of standardised ends is kept."""

    def __call__(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (pi / 2 * t).cos(), (pi / 2 * t).sin()
        return cos * x0 + sin * x1, pi / 2 * (cos * x1 - sin * x0)


class FlowMatching(Objective):
    """Flow matching of the velocities at the observed sites.

    It asks a distribution for its `velocity(x, t, context)`, from a `base` at time 0 to the data at time 1, as those of
    `ODEFlow` have it, and those of `Diffusion` along straight paths. The base itself is not trained.

    Args:
        coupling: `IndependentCoupling`, `OptimalTransportCoupling` or `GaussianTargetCoupling`.
        path: `LinearInterpolant` or `TrigonometricInterpolant`.
        kwargs: see `Objective`.

    Raises:
        ValueError: for a site without a velocity, or a model with latent variables, naming the objective to use.

    Example:
        >>> from pyro_genmodels import FlowMatching, ODEFlow
        >>> flow, x = ODEFlow((2,)), torch.randn(100, 2)
        >>> loss = FlowMatching()(flow)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    def __init__(self, coupling: Coupling | None = None, path: Interpolant | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.coupling: Coupling = check_choice("FlowMatching", "coupling", coupling, IndependentCoupling(), Coupling)
        self.path: Interpolant = check_choice("FlowMatching", "path", path, LinearInterpolant(), Interpolant)

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        flow, x = capabilities(dist).dequantize(x)
        flow = capabilities(flow).training_form
        y, context, _ = flow.aligned(x)
        x1 = y.reshape(-1, *flow.event_shape)
        told = None if context is None else context.reshape(len(x1), -1)
        with torch.no_grad():  # the ends are data
            x0, x1 = self.coupling(flow.base.sample((len(x1),)), x1, told)
            t = stratified((len(x1),), x1)
            at, velocity = self.path(x0, x1, t.reshape(-1, *(1 for _ in flow.event_shape)))
        error = flow.velocity(at, t, told) - velocity
        return error.square().reshape(len(x1), -1).sum(1).reshape(y.shape[: y.dim() - flow.event_dim])

    def check(self, name: str, dist: Distribution) -> None:
        found = capabilities(dist)
        if found.only_linear_paths and not self.path.is_linear:
            raise ValueError(
                f"The velocity of {type(dist).__name__} at site {name!r} is that of straight paths: use path=LinearInterpolant()."
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
            f"FlowMatching's loss is no density that latent variables could be weighed by, but the model has "
            f"{', '.join(map(repr, names))}. Use pyro.infer.Trace_ELBO with a guide for them."
        )
