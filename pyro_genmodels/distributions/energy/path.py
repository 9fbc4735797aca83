r"""Annealing paths from an easy density to that of an energy, in coordinates in which chains move freely.

.. math:: \log f_\beta(u) = (1 - \beta) \log f_0(u) + \beta \log p_0(u) - E_\beta(u), \qquad E_0 = 0, \quad E_1 = E,

with :math:`f_0` the *start* and :math:`p_0` the density that the energy tilts, both as densities of the positions :math:`u`. If
a density is tilted the path starts there. The bijection :math:`x = g(u)` from positions to bounded data is counted in the
density, so that :math:`Z` is the same in both coordinates; see `pyro_genmodels.samplers.spaces`.
"""

from __future__ import annotations

__all__ = ["AnnealingPath", "PathOptions", "positions", "space_of"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Transform, constraints

from pyro_genmodels.samplers import Binary, OneHot, Reals, Space, Target, TargetData
from pyro_genmodels.samplers.target import Beta
from pyro_genmodels.utils.distributions import coordinate_support, interior, is_real, sum_event


@dataclass(frozen=True)
class PathOptions:
    """Options of an energy's annealing path.

    Attributes:
        coordinates: bijection from positions to data, over whole events; None is that of the support. Discrete data have none.
        features: function from positions to the input of the energy; None is the data, or for discrete data the positions.
        start: distribution of positions at the start of the path; None is a standard normal, uniform over data on an interval,
            and uniform over discrete data.
        tilt_start: True if the energy tilts the start, when there is no base; otherwise it has a flat measure.
    """

    coordinates: Transform | None = None
    features: Callable[[Tensor], Tensor] | None = None
    start: Distribution | None = None
    tilt_start: bool = False


@dataclass(frozen=True)
class AnnealingPath:
    """The density of an energy and a path to it.

    Attributes:
        energy: see `Energy`.
        event_shape: shape of one datum.
        space: space of the chain positions.
        start: distribution of positions, with all coordinates in its batch shape or in its event shape.
        base: density of the data that is tilted, or None.
        tilted: True if the start is tilted, when there is no base; otherwise the measure is flat.
        features: function from positions to the input of the energy; None is the default of the space.
        origin: density of the data at which the path starts instead; None starts at the start or at the base.
    """

    energy: Callable[..., Tensor]
    event_shape: Size
    space: Space
    start: Any
    base: Distribution | None = None
    tilted: bool = False
    features: Callable[[Tensor], Tensor] | None = None
    origin: Distribution | None = None

    @property
    def position_shape(self) -> Size:
        """Shape of one chain's position."""
        return self.space.position_shape(self.event_shape)

    @property
    def is_conjugate(self) -> bool:
        """True if the start is tilted and belongs to the exponential family whose parameters Boltzmann machines add to."""
        tilts_start = self.tilted and self.base is None and self.origin is None
        sees_positions = self.space.sees_positions if self.features is None else self.features is positions
        return tilts_start and sees_positions and isinstance(self.start, self.space.start_type)

    def encode(self, x: Tensor) -> Tensor:
        """Convert data to positions, of the type of the start."""
        return self.space.encode(x, self._dtype)

    @property
    def _dtype(self) -> torch.dtype | None:
        """Type of positions; None for a start without location or logits, where positions have the type of the data."""
        parameter = getattr(self.start, "logits" if self.space.is_discrete else "loc", None)
        return parameter.dtype if isinstance(parameter, Tensor) else None

    def decode(self, u: Tensor) -> Tensor:
        """Convert positions to data."""
        return self.space.decode(u)

    def log_start(self, u: Tensor) -> Tensor:
        """Return the start's log density of positions, (chains...)."""
        return sum_event(self.start.log_prob(u), len(self.start.batch_shape))

    def energies(self, u: Tensor, context: Tensor | None) -> Tensor:
        """Return the energies (chains...) of positions (chains..., *position), for contexts like (chains..., c)."""
        return self._call(self.energy, u, context, Size())

    def log_density(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return log(p_0(x) exp(-E(x))) of data (batch..., *event_shape), as a density of the data: (batch...)."""
        u = self.encode(x)
        energies = self.energies(u, context)
        if self.base is not None:
            return self.base.log_prob(x) - energies
        return self.log_start(u) - self.space.log_det(u) - energies if self.tilted else -energies

    def log_f(self, u: Tensor, context: Tensor | None = None, beta: Beta = 1.0) -> Tensor:
        """Return log f_beta of positions.

        Args:
            u: positions, (chains..., *position).
            context: contexts that broadcast with (chains..., c), or None.
            beta: position on the path, which broadcasts with (chains...). Further dimensions on its left are kept.

        Returns:
            (..., chains...).
        """
        at_end = isinstance(beta, float) and beta == 1.0
        if self.origin is not None and not at_end:
            return self._log_f_from_origin(u, context, beta)
        energies = self.energies(u, context) if at_end else self._tempered(u, context, beta)
        if self.base is not None:
            return self.base.log_prob(self.decode(u)) + self.space.log_det(u) - energies
        if self.tilted:
            return self.log_start(u) - energies
        flat = self.space.log_det(u) - energies if at_end else beta * self.space.log_det(u) - energies
        return flat if at_end else (1 - beta) * self.log_start(u) + flat

    def _log_f_from_origin(self, u: Tensor, context: Tensor | None, beta: Beta) -> Tensor:
        log_q = self.origin.log_prob(self.decode(u)) + self.space.log_det(u)  # type: ignore[union-attr]
        log_f = beta * self.log_f(u, context)
        if not isinstance(beta, float):  # infinite values at either end do not count at the other
            log_q, log_f = log_q.masked_fill(beta == 1, 0.0), log_f.masked_fill(beta == 0, 0.0)
        return (1 - beta) * log_q + log_f

    def _tempered(self, u: Tensor, context: Tensor | None, beta: Beta) -> Tensor:
        """Return E_beta (..., chains...), by the energy's own path if it has one, and beta E otherwise."""
        tempered = getattr(self.energy, "tempered", None)
        if tempered is None:
            energies = beta * self.energies(u, context)
            return energies if isinstance(beta, float) else energies.masked_fill(beta == 0, 0.0)  # also where E is infinite
        chains = self._chain_shape(u)
        beta = torch.as_tensor(beta, dtype=u.dtype, device=u.device)
        beta = beta.expand(torch.broadcast_shapes(beta.shape, chains))
        left = beta.shape[: beta.dim() - len(chains)]
        beta = beta.reshape(*left, chains.numel())
        return self._call(lambda *inputs: tempered(*inputs, beta=beta), u, context, left)

    def _call(self, energy: Callable[..., Tensor], u: Tensor, context: Tensor | None, left: Size) -> Tensor:
        """Return energies (*left, chains...) by a function that takes one dimension of chains."""
        chains = self._chain_shape(u)
        features = (self.features or self.space.features)(u)
        inputs = [features.reshape(-1, *features.shape[len(chains) :])]
        if context is not None:
            inputs.append(_per_chain(context, chains))
        energies, n = energy(*inputs), chains.numel()
        if energies.shape == (*left, n, 1):
            energies = energies.squeeze(-1)
        if energies.shape != (*left, n):
            raise ValueError(
                f"An energy should return one number a row, {(n,)}, but returned {tuple(energies.shape)} for rows of shape "
                f"{tuple(inputs[0].shape[1:])}. Sum over the event's dimensions, and keep the first."
            )
        return energies.reshape(left + chains).to(torch.promote_types(energies.dtype, features.dtype))

    def _chain_shape(self, u: Tensor) -> Size:
        return Size(u.shape[: u.dim() - len(self.position_shape)])  # the shape of a tensor that Pyro tracks is a plain tuple

    # For samplers.

    def target(self, context: Tensor | None = None, support: constraints.Constraint | None = None) -> Target:
        """Return the path as a target of samplers.

        Args:
            context: one context (c,), or one for each of n chains, (n, c); None without.
            support: support of the data, which starting points are checked against.
        """

        def for_copies(u: Tensor) -> Tensor | None:
            """Return the contexts with dimensions for copies of each chain at several temperatures."""
            if context is None:
                return None
            copies = len(self._chain_shape(u)) - (context.dim() - 1)
            return context.reshape(*context.shape[:-1], *(1,) * copies, context.shape[-1])

        sweep = getattr(self.energy, "gibbs", None) if self.is_conjugate else None
        num_contexts = len(context) if context is not None and context.dim() > 1 else None
        return Target(
            lambda u, beta: self.log_f(u, for_copies(u), beta),
            len(self.position_shape),
            self.space,
            gibbs=None if sweep is None else lambda u, beta: self._sweep(sweep, u, for_copies(u), beta),
            start=self.begin,
            data=TargetData(self.event_shape, support, self._dtype, num_contexts, partial(interior, support=support)),
        )

    def begin(self, shape: Sequence[int]) -> Tensor:
        """Draw positions at the start of the path, (*shape, *position)."""
        with torch.no_grad():
            origin = self.base if self.origin is None else self.origin
            if origin is not None:
                return self.encode(origin.expand(Size(shape)).sample())
            return self.start.expand(Size(shape) + self.start.batch_shape).sample()

    def _sweep(self, sweep: Callable[..., Tensor], u: Tensor, context: Tensor | None, beta: Beta) -> Tensor:
        """Return positions after a Gibbs sweep by a function that takes one dimension of chains and one of units."""
        chains = self._chain_shape(u)
        beta = torch.as_tensor(beta, dtype=u.dtype, device=u.device).expand(chains).reshape(-1, 1)
        context = None if context is None else _per_chain(context, chains)
        return sweep(u.reshape(chains.numel(), -1), context, beta, self.space.natural(self.start)).reshape(u.shape)


def _per_chain(context: Tensor, chains: Size) -> Tensor:
    """Expand contexts to (number of chains, c)."""
    return context.expand(*chains, context.shape[-1]).reshape(-1, context.shape[-1])


def positions(u: Tensor) -> Tensor:
    """Return positions as they are: the features of energies that see positions."""
    return u


def space_of(support: constraints.Constraint, coordinates: Transform | None = None) -> Space:
    """Return the space of chain positions for data of a support.

    Args:
        support: support of one coordinate or of a whole event.
        coordinates: bijection from positions to data over real numbers; None is the identity.

    Raises:
        ValueError: if the support is discrete and not boolean or the integers 0 .. K - 1.
    """
    support = coordinate_support(support)
    if isinstance(support, type(constraints.boolean)):
        return Binary()
    low, high = (getattr(support, name, None) for name in ("lower_bound", "upper_bound"))
    if support.is_discrete and low == 0 and high is not None and high >= 1:
        return OneHot(int(high) + 1)
    if support.is_discrete:
        raise ValueError(
            f"An energy wants real numbers, constraints.boolean or constraints.integer_interval(0, K - 1), but found {support}."
        )
    return Reals(coordinates, bounded=not is_real(support) and low is not None and high is not None)
