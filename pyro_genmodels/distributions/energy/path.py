r"""The path from what is easily drawn to an energy's density, in coordinates in which chains can move freely.

.. math:: \log f_\beta(u) = (1 - \beta) \log f_0(u) + \beta \log p_0(u) - E_\beta(u), \qquad E_0 = 0, \quad E_1 = E,

with :math:`f_0` the *start* and :math:`p_0` what the energy tilts, both as densities of the positions :math:`u`. Where a
density is tilted the path starts there. Positions of bounded data are unbounded, by a bijection :math:`x = g(u)` that is
counted in the density, so that :math:`Z` is the same; those of classes are one-hot.
"""

from __future__ import annotations

__all__ = ["AnnealingPath", "kind_of", "positions", "start_of"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pyro.distributions import Bernoulli, Logistic, Normal, OneHotCategorical
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from pyro_genmodels.samplers.target import Beta, Kind, Target
from pyro_genmodels.utils.distributions import is_real, sum_event


@dataclass(frozen=True)
class AnnealingPath:
    """An energy's density and what leads to it.

    Attributes:
        energy: see `Energy`.
        event_shape: of one datum.
        kind: what a position is made of.
        classes: how many, where it is of classes; else 0.
        start: distribution of positions, all coordinates in its batch shape or in its event shape.
        base: density of the data that is tilted, or None.
        tilted: whether without a base the start is tilted; else the measure is flat.
        coordinates: positions -> data; None is the identity.
        features: positions -> what the energy is given; None is the data, or of discrete data the positions.
        origin: density of the data that the path begins with instead; None begins with the start or what is tilted.
    """

    energy: Callable[..., Tensor]
    event_shape: Size
    kind: Kind
    classes: int
    start: Any
    base: Distribution | None = None
    tilted: bool = False
    coordinates: Transform | None = None
    features: Callable[[Tensor], Tensor] | None = None
    origin: Distribution | None = None

    @property
    def position_shape(self) -> Size:
        """Of one chain's position."""
        return Size((*self.event_shape, self.classes)) if self.kind == "categorical" else self.event_shape

    @property
    def is_conjugate(self) -> bool:
        """Whether the start is of the exponential family whose natural parameters Boltzmann machines add to, and is tilted."""
        normal = isinstance(self.start, Normal) and (self.coordinates is None or self.features is positions)
        plain = self.tilted and self.base is None and self.origin is None
        return plain and (normal if self.kind == "real" else self.features in (None, positions))

    def encode(self, x: Tensor) -> Tensor:
        """Data -> positions."""
        if self.kind == "categorical":
            return F.one_hot(x.long(), self.classes).to(self.start.logits.dtype)
        if self.kind == "binary":
            return x.to(self.start.logits.dtype)
        return x if self.coordinates is None else self.coordinates.inv(x)

    def decode(self, u: Tensor) -> Tensor:
        """Positions -> data."""
        if self.kind == "categorical":
            return u.argmax(-1)
        return u if self.coordinates is None else self.coordinates(u)

    def log_det(self, u: Tensor) -> Tensor | float:
        """Log volume of data to that of positions, (chains...)."""
        return 0.0 if self.coordinates is None else self.coordinates.log_abs_det_jacobian(u, self.coordinates(u))

    def log_start(self, u: Tensor) -> Tensor:
        """The start's log density of positions, (chains...)."""
        log_p = self.start.log_prob(u)
        return sum_event(log_p, len(self.start.batch_shape))

    def energies(self, u: Tensor, context: Tensor | None) -> Tensor:
        """E of positions (chains..., *position), given contexts that broadcast with (chains..., c): (chains...)."""
        return self._call(self.energy, u, context, Size())

    def log_density(self, x: Tensor, context: Tensor | None) -> Tensor:
        """log(p_0(x) exp(-E(x))) of data (batch..., *event_shape), in their own units: (batch...)."""
        u = self.encode(x)
        energies = self.energies(u, context)
        if self.base is not None:
            return self.base.log_prob(x) - energies
        return self.log_start(u) - self.log_det(u) - energies if self.tilted else -energies

    def log_f(self, u: Tensor, context: Tensor | None = None, beta: Beta = 1.0) -> Tensor:
        """Log f_beta of positions (chains..., *position): (chains...), on their left the further dimensions of beta."""
        at_end = isinstance(beta, float) and beta == 1.0
        if self.origin is not None and not at_end:
            log_q = self.origin.log_prob(self.decode(u)) + self.log_det(u)
            log_f = beta * self.log_f(u, context)
            if not isinstance(beta, float):
                log_q, log_f = log_q.masked_fill(beta == 1, 0.0), log_f.masked_fill(beta == 0, 0.0)  # also where infinite
            return (1 - beta) * log_q + log_f
        energies = self.energies(u, context) if at_end else self._tempered(u, context, beta)
        if self.base is not None:
            return self.base.log_prob(self.decode(u)) + self.log_det(u) - energies
        if self.tilted:
            return self.log_start(u) - energies
        flat = self.log_det(u) - energies if at_end else beta * self.log_det(u) - energies
        return flat if at_end else (1 - beta) * self.log_start(u) + flat

    def _tempered(self, u: Tensor, context: Tensor | None, beta: Beta) -> Tensor:
        path = getattr(self.energy, "tempered", None)
        if path is None:
            energies = beta * self.energies(u, context)
            return energies if isinstance(beta, float) else energies.masked_fill(beta == 0, 0.0)  # also where E is infinite
        chains = self._chains(u)
        beta = torch.as_tensor(beta, dtype=u.dtype, device=u.device)
        beta = beta.expand(torch.broadcast_shapes(beta.shape, chains))
        left = beta.shape[: beta.dim() - len(chains)]
        beta = beta.reshape(*left, chains.numel())
        return self._call(lambda *inputs: path(*inputs, beta=beta), u, context, left)

    def _call(self, energy: Callable[..., Tensor], u: Tensor, context: Tensor | None, left: Size) -> Tensor:
        """Energies (*left, chains...) by a function that knows one dimension of chains."""
        chains = self._chains(u)
        features = self.features(u) if self.features is not None else self.decode(u) if self.kind == "real" else u
        inputs = [features.reshape(-1, *features.shape[len(chains) :])]
        if context is not None:
            inputs.append(context.expand(*chains, context.shape[-1]).reshape(-1, context.shape[-1]))
        energies, n = energy(*inputs), chains.numel()
        if energies.shape == (*left, n, 1):
            energies = energies.squeeze(-1)
        if energies.shape != (*left, n):
            raise ValueError(
                f"An energy should return one number a row, {(n,)}, but returned {tuple(energies.shape)} for rows of shape "
                f"{tuple(inputs[0].shape[1:])}. Sum over the event's dimensions, and keep the first."
            )
        return energies.reshape(left + chains)

    def _chains(self, u: Tensor) -> Size:
        return Size(u.shape[: u.dim() - len(self.position_shape)])  # a tensor that Pyro tracks has a plain tuple

    # For samplers.

    def target(self, context: Tensor | None = None) -> Target:
        """The path as samplers want it, for one chain or for one context (c,) each of n chains, (n, c)."""

        def at(u: Tensor) -> Tensor | None:
            """The contexts beside copies of chains at several temperatures."""
            if context is None:
                return None
            copies = len(self._chains(u)) - (context.dim() - 1)
            return context.reshape(*context.shape[:-1], *(1,) * copies, context.shape[-1])

        sweep = getattr(self.energy, "gibbs", None) if self.is_conjugate else None
        return Target(
            lambda u, beta: self.log_f(u, at(u), beta),
            len(self.position_shape),
            self.kind,
            None if sweep is None else lambda u, beta: self._sweep(sweep, u, at(u), beta),
            self.begin,
            self.encode,
            self.decode,
            self.event_shape,
        )

    def begin(self, shape: Sequence[int]) -> Tensor:
        """Positions that follow the start of the path, (*shape, *position)."""
        with torch.no_grad():
            origin = self.base if self.origin is None else self.origin
            if origin is not None:
                return self.encode(origin.expand(Size(shape)).sample())
            return self.start.expand(Size(shape) + self.start.batch_shape).sample()

    def _sweep(self, sweep: Callable[..., Tensor], u: Tensor, context: Tensor | None, beta: Beta) -> Tensor:
        chains = self._chains(u)
        beta = torch.as_tensor(beta, dtype=u.dtype, device=u.device).expand(chains).reshape(-1, 1)
        if context is not None:
            context = context.expand(*chains, context.shape[-1]).reshape(-1, context.shape[-1])
        natural = self.start.logits.reshape(-1) if self.kind != "real" else 0.0
        new = sweep(u.reshape(chains.numel(), -1), context, beta, natural)
        return new.reshape(u.shape)


def positions(u: Tensor) -> Tensor:
    """The features of energies that see the positions as they are."""
    return u


def kind_of(support: constraints.Constraint) -> tuple[Kind, int]:
    """What positions of data of that support are made of, and how many classes.

    Raises:
        ValueError: if chains cannot move on it.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if isinstance(support, type(constraints.boolean)):
        return "binary", 0
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if support.is_discrete and low == 0 and high is not None and high >= 1:
        return "categorical", int(high) + 1
    if support.is_discrete:
        raise ValueError(
            f"An energy wants real numbers, constraints.boolean or constraints.integer_interval(0, K - 1), but found {support}."
        )
    return "real", 0


def start_of(support: constraints.Constraint, event_shape: Size) -> Any:
    """Where a path starts if nothing is known: standard normal positions; uniform data on an interval; even chances."""
    kind, classes = kind_of(support)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    options: dict[str, Any] = {"validate_args": False}
    if kind == "binary":
        return Bernoulli(logits=torch.zeros(event_shape), **options)
    if kind == "categorical":
        return OneHotCategorical(logits=torch.zeros(*event_shape, classes), **options)
    zero, one = torch.zeros(event_shape), torch.ones(event_shape)
    bounded = not is_real(support) and hasattr(support, "lower_bound") and hasattr(support, "upper_bound")
    return Logistic(zero, one, **options) if bounded else Normal(zero, one, **options)
