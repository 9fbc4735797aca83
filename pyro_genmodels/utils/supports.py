"""Supports of coordinates, one for each column of events."""

from __future__ import annotations

__all__ = ["ByColumn", "support_by_column"]

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from pyro_genmodels.utils.distributions import coordinate_support
from pyro_genmodels.utils.errors import listed


class ByColumn(constraints.stack):
    """The set of vectors (..., d) whose columns lie in sets of their own, one coordinate at a time.

    Args:
        supports: set of each column.

    Example:
        >>> support = ByColumn([constraints.real, constraints.boolean])
        >>> support.check(torch.tensor([[0.5, 1.0], [0.5, 0.5]]))
        tensor([[ True,  True],
                [ True, False]])
    """

    event_dim = 0

    def __init__(self, supports: Iterable[constraints.Constraint]) -> None:
        super().__init__(supports, dim=-1)

    @cached_property
    def runs(self) -> list[tuple[constraints.Constraint, int]]:
        """Sets of neighbouring columns that are equal, with the number of these columns."""
        runs = (list(run) for _, run in groupby(self.cseq, _key))
        return [(run[0], len(run)) for run in runs]

    def check(self, value: Tensor) -> Tensor:
        """Return True for each coordinate that lies in the set of its column, (..., d)."""
        parts = value.split([n for _, n in self.runs], -1)
        return torch.cat([each.check(part) for (each, _), part in zip(self.runs, parts, strict=True)], -1)

    def __repr__(self) -> str:
        return f"ByColumn({listed(map(str, self.cseq))})"


class _ColumnTransform(Transform):
    """A bijection of each column, elementwise over vectors (..., d).

    Args:
        runs: bijections of neighbouring columns, with the number of these columns.
    """

    bijective = True

    def __init__(self, runs: Sequence[tuple[Transform, int]]) -> None:
        super().__init__()
        self.transforms, self.lengths = [t for t, _ in runs], [n for _, n in runs]

    @property
    def domain(self) -> constraints.Constraint:
        return ByColumn([t.domain for t, n in zip(self.transforms, self.lengths, strict=True) for _ in range(n)])

    @property
    def codomain(self) -> constraints.Constraint:
        return ByColumn([t.codomain for t, n in zip(self.transforms, self.lengths, strict=True) for _ in range(n)])

    def _call(self, x: Tensor) -> Tensor:
        return torch.cat([t(part) for t, part in zip(self.transforms, x.split(self.lengths, -1), strict=True)], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.cat([t.inv(part) for t, part in zip(self.transforms, y.split(self.lengths, -1), strict=True)], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |dy/dx| of each coordinate, of the shape of x."""
        parts = zip(self.transforms, x.split(self.lengths, -1), y.split(self.lengths, -1), strict=True)
        return torch.cat([t.log_abs_det_jacobian(a, b) for t, a, b in parts], -1)


@biject_to.register(ByColumn)
@transform_to.register(ByColumn)
def _columns_to_reals(support: ByColumn) -> Transform:
    return _ColumnTransform([(biject_to(each), n) for each, n in support.runs])


def support_by_column(support: constraints.Constraint, event_shape: Sequence[int]) -> constraints.Constraint:
    """Return the set of one coordinate or of each column, given a support that may be torch's for several columns.

    Args:
        support: any constraint. ``constraints.stack`` and ``constraints.cat`` along the last dimension become `ByColumn`, or
            the set of one coordinate if all columns have the same; others are returned as they are.
        event_shape: shape of one datum, whose last dimension has the columns.

    Raises:
        ValueError: if it is put together along another dimension, of sets that are not of single numbers, or for another number
            of columns.

    Example:
        >>> support_by_column(constraints.stack([constraints.real, constraints.positive], dim=-1), (2,))
        ByColumn(Real(), GreaterThan(lower_bound=0.0))
    """
    inner = coordinate_support(support)
    if isinstance(inner, ByColumn) or not isinstance(inner, (constraints.stack, constraints.cat)):
        return support
    by_column = ByColumn(_columns(inner, event_shape[-1] if event_shape else 0))
    return by_column.runs[0][0] if len(by_column.runs) == 1 else by_column


def _columns(support: Any, width: int) -> list[constraints.Constraint]:
    """Return the set of each of a number of columns, given one for all, or a support that is put together of several."""
    if not isinstance(support, (constraints.stack, constraints.cat)):
        if support.event_dim or any(isinstance(v, Tensor) and v.dim() for v in vars(support).values()):
            raise ValueError(
                f"A column has one number in each row, but found the support {support} of several. Transform the data "
                "beforehand, or give one set for each column."
            )
        return [support] * width
    if support.dim != -1:
        raise ValueError(
            f"A support with a set for each column is put together along the last dimension, but found dim={support.dim}. Use "
            "constraints.stack([...], dim=-1)."
        )
    lengths = support.lengths if isinstance(support, constraints.cat) else [1] * len(support.cseq)
    if sum(lengths) != width:
        raise ValueError(
            f"The support has sets for {sum(lengths)} columns, but the last dimension of an event has {width}. Give one set "
            "for each column."
        )
    return [column for part, length in zip(support.cseq, lengths, strict=True) for column in _columns(part, length)]


def _key(support: constraints.Constraint) -> Any:
    """Return a value that is equal for equal sets."""
    values = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(support).items()}
    return type(support), values
