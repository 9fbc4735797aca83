r"""Standardisation: networks are given data and contexts of mean 0 and deviation 1, whatever their units and offset.

.. math:: y = (x - m) / s

Networks learn from inputs of order 1. Years, Unix times and lengths in nanometres are far larger or smaller. The mean m and the
deviation s are computed in float64, and x - m in the precision of x, so that nothing is lost before y is rounded to the
precision of the networks. Robust standardisation takes the median and the interquartile range instead: Huber, *Robust
Statistics* (1981).
"""

from __future__ import annotations

__all__ = ["Standardization", "Standardize", "estimate", "estimate_of_all", "mean_and_deviation"]

from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.families.input_warnings import (
    Inputs,
    warn_of_atoms,
    warn_of_combinations,
    warn_of_constants,
    warn_of_outliers,
    warn_of_steps,
)

Standardize = bool | Literal["jointly", "robust", "jointly robust"]

QUARTILES_OF_NORMAL, MEDIAN_OF_NORMAL = 1.3489795, 0.6744898
"""Interquartile range and median distance from the centre of a standard normal."""
FARTHEST = 3.0
"""Distance from the median, in robust deviations, from which values count as that far in robust means."""


class Standardization(Transform):
    """The bijection from data to their standardised values, in the precision of `loc`.

    Args:
        loc: mean, (*event_shape).
        scale: deviation, (*event_shape).
        check: function that is called with each standardised value, or None.
        event_dim: number of dimensions of an event, by default those of `loc`; 0 for a bijection of single coordinates.
        rounded: False to leave standardised values in the precision of the data, if that is higher.
    """

    bijective = True
    sign = +1
    is_affine = True

    def __init__(
        self, loc: Tensor, scale: Tensor, check: Any = None, *, event_dim: int | None = None, rounded: bool = True
    ) -> None:
        super().__init__()
        self.loc, self.scale, self.check, self.rounded = loc, scale, check, rounded
        self.dims = loc.dim() if event_dim is None else event_dim

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Real events."""
        return constraints.independent(constraints.real, self.dims) if self.dims else constraints.real

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """Real events."""
        return self.domain

    def _call(self, x: Tensor) -> Tensor:
        y = (x - self.loc) / self.scale
        y = y.to(self.loc.dtype) if self.rounded else y
        if self.check is not None:
            self.check(y)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self.scale + self.loc

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant of dy / dx, (batch...), in the precision of `loc`."""
        batch_shape = x.shape[: x.dim() - self.dims]
        return -(self.scale.log().sum() if self.dims else self.scale.log()).expand(batch_shape)


@torch.no_grad()
def estimate(
    x: Tensor,
    y: Tensor,
    like: Tensor,
    *,
    kind: Standardize,
    owner: str,
    inputs: Inputs,
    has_density: bool,
) -> tuple[Tensor, Tensor]:
    """Return location and scale of data. Warn of constant coordinates, outliers and offsets that hide the spread.

    Args:
        x: data in their own units and precision, (N, *event_shape).
        y: the data as real numbers, which are standardised.
        like: tensor of the event shape, in whose precision both will be stored.
        kind: True for mean and standard deviation of each coordinate; see `Family`. Of a constant coordinate the scale is the
            size of the constant, or 1 if that is 0.
        owner: subject of the messages.
        inputs: kind of the data, for the messages.
        has_density: True if a density of the data is trained. It has no maximum if coordinates have many equal values or are
            combinations of others, so this is warned of. So is each constant coordinate, even of data standardised jointly.

    Returns:
        Two tensors of the event shape, in float64.

    Raises:
        ValueError: if the precision of `like` cannot hold location or scale.
    """
    rows, jointly, robust = y.double().reshape(len(y), -1), "jointly" in str(kind), "robust" in str(kind)
    constant = _constant_coordinates(x.reshape(len(x), -1))
    reported = constant if has_density or not jointly else constant.all().expand_as(constant)
    if jointly:
        rows, constant = rows.reshape(-1, 1), constant.all().reshape(1)
    unit = _unit(rows)
    rows = rows / unit  # neither squares nor sums overflow or vanish
    loc, scale = _robust(rows, _rounding(x)) if robust else (rows.mean(0), rows.var(0, correction=min(1, len(rows) - 1)).sqrt())
    loc, scale = loc * unit, scale * unit
    size = loc.abs()
    scale = torch.where(constant, torch.where(size < torch.finfo(like.dtype).tiny, 1.0, size), scale)
    _check_representable(loc, scale, like, owner, inputs)
    if reported.any():
        warn_of_constants(reported, len(y), like, owner, inputs)
    elif has_density and not jointly:
        warn_of_atoms(x.reshape(len(x), -1), like, owner, inputs)
        warn_of_combinations((rows - loc / unit) * (unit / scale), _rounding(x) * size / scale, like, owner, inputs)
    warn_of_steps(loc, scale, ~constant, like, owner, inputs)
    if not robust:
        spread = rows.reshape(len(y), -1) if jointly else rows
        warn_of_outliers(spread - loc / unit, like, owner, inputs, jointly=jointly)
    return loc.expand(like.numel()).reshape(like.shape), scale.expand(like.numel()).reshape(like.shape)


@torch.no_grad()
def estimate_of_all(
    found: ColumnStatistics, like: Tensor, *, kind: Standardize, owner: str, inputs: Inputs
) -> tuple[Tensor, Tensor]:
    """Return location and scale of data by the statistics of all rows, of which `estimate` was given a sample.

    Args:
        found: statistics of the data.
        like: tensor of the event shape, in whose precision both will be stored.
        kind: True for each coordinate, or "jointly".
        owner: subject of the messages.
        inputs: kind of the data, for the messages.

    Returns:
        Two tensors of the event shape, in float64.

    Raises:
        ValueError: if the precision of `like` cannot hold location or scale.

    Example:
        >>> from pyro_genmodels.families.input_warnings import DATA
        >>> found = ColumnStatistics.of(torch.tensor([[1.0, 4.0], [3.0, 4.0]]), "x.npy", 0)
        >>> estimate_of_all(found, torch.zeros(2), kind=True, owner="Flow", inputs=DATA)
        (tensor([2., 4.], dtype=torch.float64), tensor([1.4142, 4.0000], dtype=torch.float64))
    """
    count, loc, spread = (part.flatten() for part in (found.count, found.mean, found.spread))
    rounding = torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0.0
    size = torch.maximum(found.low.abs(), found.high.abs()).flatten()
    constant = spread / count.clamp(min=1).sqrt() <= rounding * size
    if "jointly" in str(kind):
        mean = (count * loc).sum(0, keepdim=True) / count.sum()
        spread = torch.hypot(spread, count.sqrt() * (loc - mean))
        unit = _unit(spread[:, None])  # squares neither overflow nor vanish
        spread = unit * torch.linalg.vector_norm(spread / unit, dim=0, keepdim=True)
        loc, count, constant = mean, count.sum(0, keepdim=True), constant.all().reshape(1)
    tiny = loc.abs() < torch.finfo(like.dtype).tiny
    scale = torch.where(constant, torch.where(tiny, 1.0, loc.abs()), spread / (count - 1).clamp(min=1).sqrt())
    loc, scale = loc.to(like.device), scale.to(like.device)
    _check_representable(loc, scale, like, owner, inputs)
    return loc.expand(like.numel()).reshape(like.shape), scale.expand(like.numel()).reshape(like.shape)


@torch.no_grad()
def mean_and_deviation(y: Tensor, *, robust: bool) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of real numbers (N, ...), without those that are NaN; NaN where all are.

    They are for numbers with many equal values, such as logarithms of counts, where quartiles say little. For robust ones, a
    number more than three robust deviations from the median counts as one at that distance.

    Args:
        y: numbers, in double precision.
        robust: True for robust ones.

    Example:
        >>> y = torch.cat([torch.linspace(-1.0, 1.0, 1000), torch.tensor([1e6])]).double()
        >>> [f"{float(part):.3f}" for part in mean_and_deviation(y, robust=True)]
        ['0.002', '0.582']
    """
    y = _winsorised(y) if robust else y
    mean = y.nanmean(0)
    return mean, (y - mean).square().nanmean(0).sqrt()


def _winsorised(y: Tensor) -> Tensor:
    """Return numbers (N, ...) with those far from the median of their coordinate moved nearer; those that are NaN stay so."""
    columns = y.reshape(len(y), -1).clone()
    for column in columns.unbind(1):
        known = column[~column.isnan()]
        if len(known):
            loc, scale = _robust(known.unsqueeze(1), 0.0)
            column.clamp_(loc - FARTHEST * scale, loc + FARTHEST * scale)
    return columns.reshape(y.shape)


def _constant_coordinates(rows: Tensor) -> Tensor:
    """Return which coordinates of data (N, d) vary by no more than the rounding of their precision, (d,)."""
    doubles = rows.double()
    return (doubles / _unit(doubles)).var(0, correction=0).sqrt() <= _rounding(rows)


def _unit(rows: Tensor) -> Tensor:
    """Return the largest size of each coordinate of (N, d), or 1 where that is 0."""
    size = rows.abs().amax(0)
    return torch.where(size == 0, 1.0, size)


def _rounding(x: Tensor) -> float:
    """Return the relative rounding error of the precision of x; integers have none."""
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def _robust(rows: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Return medians and scaled interquartile ranges of (N, d).

    Where half of the values are one number, the scale is the scaled median distance of the others from it.
    """
    ordered = rows.sort(0).values
    low, loc, high = (_quantile(ordered, q) for q in (0.25, 0.5, 0.75))
    scale = (high - low) / QUARTILES_OF_NORMAL
    atom = rounding * loc.abs()
    for i in (scale <= atom).nonzero().flatten().tolist():
        distance = (rows[:, i] - loc[i]).abs()
        others = distance[distance > atom[i]]
        if len(others):
            scale[i] = others.median() / MEDIAN_OF_NORMAL
    return loc, scale


def _quantile(ordered: Tensor, q: float) -> Tensor:
    """Return a quantile of sorted columns, interpolated. `torch.quantile` takes 16 million values at most."""
    place = q * (len(ordered) - 1)
    low = int(place)
    return torch.lerp(ordered[low], ordered[min(low + 1, len(ordered) - 1)], place - low)


def _check_representable(loc: Tensor, scale: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    limits = torch.finfo(like.dtype)
    wrong = ~((loc.abs() <= limits.max) & (scale <= limits.max) & (scale >= limits.tiny))
    if not wrong.any():
        return
    i = int(wrong.nonzero()[0])
    cure = "" if like.dtype == torch.float64 else ", or use float64 (family.double(), and x.double())"
    raise ValueError(
        f"{owner} computes in {like.dtype}, with numbers from {limits.tiny:.1g} to {limits.max:.1g}, but was given "
        f"{inputs.noun} with mean {float(loc[i]):.3g} and deviation {float(scale[i]):.3g}. Use another unit{cure}."
    )
