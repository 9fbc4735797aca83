r"""Coordinates that are angles: which they are, and how they are centred.

In place of a mean, angles in :math:`[-\pi, \pi)` have a mean direction, that of the mean of :math:`(\cos x, \sin x)`. Mardia
and Jupp, *Directional Statistics* (2000).
"""

from __future__ import annotations

__all__ = ["angles_of", "from_mean_direction", "on_lines"]

from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_genmodels.nn.circular_splines import Circular, wrapped
from pyro_genmodels.utils.distributions import coordinate_support
from pyro_genmodels.utils.supports import ByColumn


def angles_of(support: constraints.Constraint, event_shape: Sequence[int]) -> Tensor | None:
    """Return True for the coordinates on circles, (*event_shape), or None if there are none."""
    support = coordinate_support(support)
    if isinstance(support, Circular):
        return torch.ones(Size(event_shape), dtype=torch.bool)
    columns = [isinstance(each, Circular) for each in support.cseq] if isinstance(support, ByColumn) else [False]
    return torch.tensor(columns).expand(Size(event_shape)).clone() if any(columns) else None


def on_lines(support: constraints.Constraint) -> constraints.Constraint:
    """Return the support with all real numbers in place of each circle."""
    inner = coordinate_support(support)
    if isinstance(inner, Circular):
        return constraints.real
    if not isinstance(inner, ByColumn):
        return support
    columns = ByColumn([on_lines(each) for each in inner.cseq])
    return columns.runs[0][0] if len(columns.runs) == 1 else columns


def from_mean_direction(x: Tensor) -> Tensor:
    """Return angles (N, ...) as differences from their mean direction, which do not depend on where the circle is cut.

    Example:
        >>> from_mean_direction(torch.tensor([3.0, -3.0]))
        tensor([-0.1416,  0.1416])
    """
    return wrapped(x - torch.atan2(x.sin().mean(0), x.cos().mean(0)))
