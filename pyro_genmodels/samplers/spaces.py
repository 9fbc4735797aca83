r"""Spaces in which chains move: real numbers, zeros and ones, or classes as one-hot vectors.

Data :math:`x` and chain positions :math:`u` differ where data are bounded, :math:`x = g(u)` with a bijection :math:`g`, and
where they are classes, whose positions are one-hot in a further last dimension. A space converts between the two and knows what
else depends on the kind of data: the neighbours of a discrete position with the first-order change of the log density,

.. math:: \tfrac12\, \nabla \log f(u)^\top (u' - u),

and the exponential family :math:`p(u) \propto e^{\eta^\top u}` over positions, whose natural parameters :math:`\eta` are means
(of normals with variance 1), log odds or logits. Boltzmann machines only ever change :math:`\eta`.
"""

from __future__ import annotations

__all__ = ["Binary", "OneHot", "Reals", "Space"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pyro.distributions import Bernoulli, Logistic, Normal, OneHotCategorical
from torch import Size, Tensor
from torch.distributions import Distribution, Transform


class Space(ABC):
    """A space of chain positions. Subclasses are frozen dataclasses.

    Attributes:
        description: what positions are made of, in words.
        samplers: samplers that can move chains here, in words.
        start_type: class of the distributions with natural parameters.
        is_discrete: True if positions are zeros and ones.
        bounded: True if the data are real numbers on an interval with two ends.
        width: numbers that one coordinate of a datum takes in a position.
        num_levels: values that one coordinate of a datum can have; 0 over real numbers.
    """

    description: ClassVar[str]
    samplers: ClassVar[str] = "GibbsWithGradients()"
    start_type: ClassVar[type[Distribution]]
    is_discrete: ClassVar[bool] = True
    bounded: bool = False

    @property
    def width(self) -> int:
        return 1

    @property
    def num_levels(self) -> int:
        return 0

    # Data and positions.

    def position_shape(self, event_shape: Sequence[int]) -> Size:
        """Return the shape of one position, given that of one datum."""
        return Size(event_shape)

    def encode(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Convert data (..., *event_shape) to positions of a type.

        None is torch's default type for discrete data, and the type of the data over real numbers.
        """
        return x.to(dtype or torch.get_default_dtype())

    def decode(self, u: Tensor) -> Tensor:
        """Convert positions to data."""
        return u

    def features(self, u: Tensor) -> Tensor:
        """Return the default input of an energy network: data over real numbers, and discrete positions."""
        return u

    @property
    def sees_positions(self) -> bool:
        """True if the default features are the positions themselves."""
        return True

    def log_det(self, u: Tensor) -> Tensor | float:
        """Return the log volume of data relative to that of positions, (chains...)."""
        return 0.0

    def scaled(self, u: Tensor) -> Tensor:
        """Return positions in a scale that suits networks."""
        return u

    def contains(self, u: Tensor) -> bool:
        """Return True if all positions lie in the space."""
        return True

    # Exponential families of positions.

    @abstractmethod
    def start(self, natural: Tensor) -> Any:
        """Return the distribution of positions with natural parameters of the shape of a position."""

    @abstractmethod
    def natural(self, start: Any) -> Tensor:
        """Return the natural parameters (units,) of such a distribution."""

    @abstractmethod
    def draw(self, natural: Tensor) -> Tensor:
        """Draw units (n, units) of positions with natural parameters (n, units)."""

    @abstractmethod
    def log_sum(self, natural: Tensor) -> Tensor:
        """Return the log of the sum over positions of exp(natural . u), (..., units) -> (...).

        Over real numbers it is the log of the mean under a standard normal.
        """

    # Discrete spaces only.

    def frequencies(self, x: Tensor) -> Tensor:
        """Return the natural parameters of the frequencies in data (N, *event_shape), with half a count added to each."""
        raise NotImplementedError(f"{self.description} have no frequencies.")

    def changes(self, u: Tensor, score: Tensor) -> Tensor:
        """Return half the first-order change of the log density for each neighbour, (chains..., *position)."""
        raise NotImplementedError(f"{self.description} have no neighbours.")

    def move(self, u: Tensor, neighbour: Tensor, chain_dim: int) -> tuple[Tensor, Tensor]:
        """Move each chain to a neighbour.

        Args:
            u: positions, (chains..., *position).
            neighbour: indices into the flattened `changes` of each chain, (chains..., 1).
            chain_dim: number of dimensions of chains.

        Returns:
            The new positions, and the indices of the neighbours that lead back.
        """
        raise NotImplementedError(f"{self.description} have no neighbours.")


@dataclass(frozen=True)
class Reals(Space):
    """Real numbers.

    Attributes:
        coordinates: bijection from positions to data, over whole events; None is the identity.
        bounded: True if the data lie on an interval with two ends. The start is then logistic instead of normal: the logistic
            function maps it to a uniform distribution over the interval.
    """

    coordinates: Transform | None = None
    bounded: bool = False

    description: ClassVar[str] = "real numbers"
    samplers: ClassVar[str] = "Langevin() or Hamiltonian()"
    start_type: ClassVar[type[Distribution]] = Normal
    is_discrete: ClassVar[bool] = False

    def encode(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        u = x if self.coordinates is None else self.coordinates.inv(x)
        return u if dtype is None else u.to(dtype)

    def decode(self, u: Tensor) -> Tensor:
        return u if self.coordinates is None else self.coordinates(u)

    def features(self, u: Tensor) -> Tensor:
        return self.decode(u)

    @property
    def sees_positions(self) -> bool:
        return self.coordinates is None

    def log_det(self, u: Tensor) -> Tensor | float:
        return 0.0 if self.coordinates is None else self.coordinates.log_abs_det_jacobian(u, self.coordinates(u))

    def start(self, natural: Tensor) -> Any:
        return (Logistic if self.bounded else Normal)(natural, torch.ones_like(natural), validate_args=False)

    def natural(self, start: Any) -> Tensor:
        return start.mean.reshape(-1)

    def draw(self, natural: Tensor) -> Tensor:
        return natural + torch.randn_like(natural)

    def log_sum(self, natural: Tensor) -> Tensor:
        return 0.5 * natural.square().sum(-1)


@dataclass(frozen=True)
class Binary(Space):
    """Zeros and ones. A neighbour differs in one coordinate."""

    description: ClassVar[str] = "zeros and ones"
    start_type: ClassVar[type[Distribution]] = Bernoulli

    @property
    def num_levels(self) -> int:
        return 2

    def scaled(self, u: Tensor) -> Tensor:
        return 2 * u - 1

    def contains(self, u: Tensor) -> bool:
        return bool(((u == 0) | (u == 1)).all())

    def start(self, natural: Tensor) -> Any:
        return Bernoulli(logits=natural, validate_args=False)

    def natural(self, start: Any) -> Tensor:
        return start.logits.reshape(-1)

    def draw(self, natural: Tensor) -> Tensor:
        return (torch.rand_like(natural) < natural.sigmoid()).to(natural)

    def log_sum(self, natural: Tensor) -> Tensor:
        return F.softplus(natural).sum(-1)

    def frequencies(self, x: Tensor) -> Tensor:
        ones = self.encode(x).sum(0) + 0.5
        return (ones / (len(x) + 1 - ones)).log()

    def changes(self, u: Tensor, score: Tensor) -> Tensor:
        return 0.5 * (1 - 2 * u) * score

    def move(self, u: Tensor, neighbour: Tensor, chain_dim: int) -> tuple[Tensor, Tensor]:
        flat = u.reshape(*u.shape[:chain_dim], -1)
        return flat.scatter(-1, neighbour, 1 - flat.gather(-1, neighbour)).reshape(u.shape), neighbour


@dataclass(frozen=True)
class OneHot(Space):
    """Classes, one-hot in the last dimension. A neighbour has another class at one coordinate.

    Attributes:
        classes: number of classes.
    """

    classes: int

    description: ClassVar[str] = "classes"
    start_type: ClassVar[type[Distribution]] = OneHotCategorical

    @property
    def width(self) -> int:
        return self.classes

    @property
    def num_levels(self) -> int:
        return self.classes

    def position_shape(self, event_shape: Sequence[int]) -> Size:
        return Size((*event_shape, self.classes))

    def encode(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return F.one_hot(x.long(), self.classes).to(dtype or torch.get_default_dtype())

    def decode(self, u: Tensor) -> Tensor:
        return u.argmax(-1)

    def start(self, natural: Tensor) -> Any:
        return OneHotCategorical(logits=natural, validate_args=False)

    def natural(self, start: Any) -> Tensor:
        return start.logits.reshape(-1)

    def draw(self, natural: Tensor) -> Tensor:
        logits = natural.unflatten(-1, (-1, self.classes))
        gumbel = -torch.empty_like(logits).exponential_().log()
        return F.one_hot((logits + gumbel).argmax(-1), self.classes).to(natural).flatten(-2)

    def log_sum(self, natural: Tensor) -> Tensor:
        return natural.unflatten(-1, (-1, self.classes)).logsumexp(-1).sum(-1)

    def frequencies(self, x: Tensor) -> Tensor:
        counts = self.encode(x).sum(0) + 0.5
        return (counts / (len(x) + 0.5 * self.classes)).log()

    def changes(self, u: Tensor, score: Tensor) -> Tensor:
        change = 0.5 * (score - (u * score).sum(-1, keepdim=True))
        return change.masked_fill(u > 0.5, -torch.inf)  # the class it has is no neighbour

    def move(self, u: Tensor, neighbour: Tensor, chain_dim: int) -> tuple[Tensor, Tensor]:
        flat = u.reshape(*u.shape[:chain_dim], -1, self.classes)
        coordinate, new = neighbour // self.classes, neighbour % self.classes
        at = coordinate[..., None].expand(*coordinate.shape, self.classes)
        old = flat.gather(-2, at).argmax(-1)
        moved = flat.scatter(-2, at, F.one_hot(new, self.classes).to(u))
        return moved.reshape(u.shape), coordinate * self.classes + old
