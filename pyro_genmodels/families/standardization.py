r"""Standardisation: networks are given data and contexts of mean 0 and deviation 1, whatever their units and offset.

.. math:: y = (x - m) / s

Networks learn from inputs of order 1. Years, Unix times and lengths in nanometres are far larger or smaller. The mean m and the
deviation s are computed in float64, and x - m in the precision of x, so that nothing is lost before y is rounded to the
precision of the networks. Robust standardisation takes the median and the interquartile range instead: Huber, *Robust
Statistics* (1981).
"""

from __future__ import annotations

__all__ = ["CONTEXTS", "DATA", "InputCheck", "Inputs", "Standardization", "Standardize", "estimate"]

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.inputs import out_of_range

Standardize = bool | Literal["jointly", "robust", "jointly robust"]

MAX_STEP = 0.01
"""Largest step between neighbouring floats at the mean, in deviations, that passes without a warning."""
OUTLIER_SHARE, MAX_OUTLIER_EFFECT, MIN_ROWS = 0.01, 10.0, 20
"""Share of rows that may be outliers, their largest effect on the deviation without a warning, and rows needed to judge."""
ATOM_SHARE, MAX_ATOM_ROWS = 0.25, 1000
"""Smallest share of rows with the same value that is warned of, and number of rows among which this value is looked for."""
MAX_COLUMNS = 100
"""Largest number of coordinates among which combinations are looked for."""
QUARTILES_OF_NORMAL, MEDIAN_OF_NORMAL = 1.3489795, 0.6744898
"""Interquartile range and median distance from the centre of a standard normal."""


@dataclass(frozen=True)
class Inputs:
    """A kind of inputs of networks, with the words for it in messages.

    Args:
        noun: plural noun for the inputs.
        option: argument of the families that says how to standardise them.
        if_constant: consequence of a constant coordinate, and the way out.
        if_rounded: consequence of a precision in which neighbouring numbers are far apart.
        cure: advice if they were not standardised.
    """

    noun: str
    option: str
    if_constant: str
    if_rounded: str
    cure: str


DATA = Inputs(
    "data",
    option="standardize",
    if_constant="A density can become arbitrarily high there, so that the loss falls for ever and means nothing. Drop them, "
    "add noise, or model integers (levels=K, or a discrete likelihood).",
    if_rounded="Draws are rounded to these steps.",
    cure="Call family.standardize(x) with all data before training.",
)
"""The data, of which a density is trained."""
CONTEXTS = Inputs(
    "contexts",
    option="standardize_context",
    if_constant="Their effect cannot be learned; distributions given other values of them are an extrapolation.",
    if_rounded="Networks see them shifted by up to such a step.",
    cure="Call family.standardize(x, context) before training.",
)
"""The float contexts, which are never drawn."""


class Standardization(Transform):
    """The bijection from data to their standardised values, in the precision of `loc`.

    Args:
        loc: mean, (*event_shape).
        scale: deviation, (*event_shape).
        check: function that is called with each standardised value, or None.
    """

    bijective = True
    sign = +1

    def __init__(self, loc: Tensor, scale: Tensor, check: Any = None) -> None:
        super().__init__()
        self.loc, self.scale, self.check = loc, scale, check

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        """Real events of the shape of `loc`."""
        return constraints.independent(constraints.real, self.loc.dim()) if self.loc.dim() else constraints.real

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        """Real events of the shape of `loc`."""
        return self.domain

    def _call(self, x: Tensor) -> Tensor:
        y = ((x - self.loc) / self.scale).to(self.loc.dtype)
        if self.check is not None:
            self.check(y)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return y * self.scale + self.loc

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log determinant of dy / dx, (batch...), in the precision of `loc`."""
        return -self.scale.log().sum().expand(x.shape[: x.dim() - self.loc.dim()])


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
        has_density: True if a density of the data is trained. Then it has no maximum where coordinates have many equal values,
            or are combinations of others, which is warned of; and so is each constant coordinate, also of data that are
            standardised jointly.

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
    loc = rows.mean(0)
    deviation = rows.var(0).sqrt() if len(rows) > 1 else torch.zeros_like(loc)
    loc, scale = _robust(rows, _rounding(x)) if robust else (loc, deviation)
    loc, scale = loc * unit, scale * unit
    size = loc.abs()
    scale = torch.where(constant, torch.where(size < torch.finfo(like.dtype).tiny, 1.0, size), scale)
    _check_representable(loc, scale, like, owner, inputs)
    if reported.any():
        where = f"all {len(y)} rows" if len(y) > 1 else "the only row"
        _warn(f"{_named(reported, like, owner, inputs)} constant in {where}. {inputs.if_constant}")
    elif has_density and not jointly:
        _warn_of_atoms(x.reshape(len(x), -1), like, owner, inputs)
        _warn_of_combinations((rows - loc / unit) * (unit / scale), _rounding(x) * size / scale, like, owner, inputs)
    _warn_of_steps(loc, scale, ~constant, like, owner, inputs)
    if not robust:
        spread = rows.reshape(len(y), -1) if jointly else rows
        _warn_of_outliers(spread - loc / unit, like, owner, inputs, jointly=jointly)
    return loc.expand(like.numel()).reshape(like.shape), scale.expand(like.numel()).reshape(like.shape)


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


def _warn_of_steps(loc: Tensor, scale: Tensor, varying: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    near = loc.to(like.dtype)
    step = (torch.nextafter(near.abs(), near.new_tensor(torch.inf)) - near.abs()).double()
    allowed = max(MAX_STEP, 16 * torch.finfo(like.dtype).eps)  # of half precision all steps are long
    coarse = varying & (step > allowed * scale)
    if coarse.any():
        i = int(coarse.nonzero()[0])
        _warn(
            f"{_named(coarse, like, owner, inputs)} far from 0 for their spread: near {float(loc[i]):.6g} the numbers of "
            f"{like.dtype} are {float(step[i]):.2g} apart, but the deviation is {float(scale[i]):.2g}. {inputs.if_rounded} "
            "Subtract an offset in float64 first, or call family.double() before anything else and pass float64."
        )


def _warn_of_atoms(rows: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    """Warn of coordinates of (N, d) in which a value, such as 0, is that of many rows exactly."""
    if len(rows) < MIN_ROWS:
        return
    some = rows[:: -(-len(rows) // MAX_ATOM_ROWS)]
    values = some.mode(0).values  # a value of many rows is also that of many of some
    share = (rows == values).sum(0) / len(rows)
    found = share >= ATOM_SHARE
    if found.any():
        i = int(share.argmax())
        value, percent = float(values[i]), float(share[i])
        _warn(
            f"{_named(found, like, owner, inputs)} one value in many rows, such as {value:.6g} in {percent:.0%} of them. "
            f"{inputs.if_constant}"
        )


def _warn_of_combinations(rows: Tensor, rounding: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    """Warn of coordinates that are sums of multiples of others, such as copies, or shares that add up to 1.

    Args:
        rows: standardised data, (N, d).
        rounding: rounding error of each coordinate, (d,).
        like: tensor of the event shape.
        owner: subject of the message.
        inputs: kind of the data.
    """
    n, d = rows.shape
    if like.dim() != 1 or not 1 < d <= MAX_COLUMNS or n < max(MIN_ROWS, 2 * d):
        return
    some = rows[:: -(-n // max(MAX_ATOM_ROWS, 4 * d))]
    _, lengths, directions = torch.linalg.svd(some, full_matrices=False)
    error = (rounding + torch.finfo(like.dtype).eps * rows.abs().amax(0)).amax()
    suspicious = directions[lengths <= 4 * error * (d * len(some)) ** 0.5]
    constant = suspicious[(rows @ suspicious.T).square().mean(0).sqrt() <= 4 * error * d**0.5]
    found = (constant.abs() > 0.01).any(0)
    if found.any():
        _warn(f"{_named(found, like, owner, inputs)} combinations of one another, such as copies or sums. {inputs.if_constant}")


def _warn_of_outliers(centred: Tensor, like: Tensor, owner: str, inputs: Inputs, *, jointly: bool) -> None:
    """Warn if the few rows that are farthest from the mean make most of the deviation.

    Args:
        centred: data minus their mean, (N, d).
        like: tensor of the event shape.
        owner: subject of the message.
        inputs: kind of the data.
        jointly: True if all coordinates share one deviation.
    """
    squares = centred.square().mean(1, keepdim=True) if jointly else centred.square()
    n = len(squares)
    few = max(1, int(OUTLIER_SHARE * n))
    if n < MIN_ROWS:
        return
    total = squares.sum(0)
    suspicious = (squares.amax(0) * few >= 0.9 * total) & (total > 0)  # cheap, and true wherever there is something to find
    far = torch.zeros_like(suspicious)
    for i in suspicious.nonzero().flatten().tolist():
        column = centred[:, i] if not jointly else squares[:, i].sqrt()
        middle = 0.0 if jointly else column.median()
        kept = column[(column - middle).abs().argsort()[: n - few]]
        rest = kept.square().mean().sqrt() if jointly else kept.std()
        far[i] = (rest > 0) & (squares[:, i].mean().sqrt() > MAX_OUTLIER_EFFECT * rest)
    if far.any():
        robust = f'{inputs.option}="{"jointly " if jointly else ""}robust"'
        _warn(
            f"{_named(far, like, owner, inputs)} spread by a few far rows: without {few} of {n} rows the standard deviation "
            f"would be less than a {MAX_OUTLIER_EFFECT:.0f}th. Networks see all other rows as nearly one value. Drop these "
            f"rows, transform the {inputs.noun} (such as by a logarithm), or build the family with {robust}."
        )


def _named(which: Tensor, like: Tensor, owner: str, inputs: Inputs) -> str:
    """Return the beginning of a message about some coordinates, (d,) or (1,) for all of them together."""
    if len(which) == 1 or which.all():
        return f"{owner} was given {inputs.noun} that are"
    places = [tuple(int(k) for k in torch.unravel_index(i, like.shape)) for i in which.nonzero().flatten()[:5]]
    names = ", ".join(str(place[0] if len(place) == 1 else place) for place in places)
    total = int(which.sum())
    more = f" and {total - 5} more" if total > 5 else ""
    noun, verb = ("coordinates", "are") if total > 1 else ("coordinate", "is")
    return f"{owner} was given {inputs.noun} of which the {noun} {names}{more} {verb}"


class InputCheck:
    """A check, made at the first value only, that the inputs of networks are of order 1.

    It warns at most once. It is skipped where values cannot be looked at: in a captured graph or under `torch.func`.

    Attributes:
        inputs: kind of the inputs, for the warning.
        due: True until it was made.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.due = inputs, True

    def __call__(self, y: Tensor, *, owner: str, event_dim: int, standardized: bool, jointly: bool = False) -> None:
        """Warn if the inputs y (batch..., *event_shape) are far outside, or nearly one value.

        Args:
            y: inputs of a network.
            owner: subject of the warning.
            event_dim: number of dimensions of one input.
            standardized: True if they were standardised. Then their spread is not checked, because batches may be sorted.
            jointly: True if all coordinates are of one kind.
        """
        if not self.due or not y.numel() or not can_be_read(y):
            return
        self.due = False
        rows = y.detach().reshape(-1, 1 if jointly else y.shape[y.dim() - event_dim :].numel())
        found = out_of_range(rows, spread=not standardized)
        if not found:
            return
        cure, noun = self.inputs.cure, self.inputs.noun
        if standardized:
            cure = (
                f"They were standardised by other {noun}, or {y.dtype} cannot hold their mean: standardise by these, or "
                "subtract an offset in float64 first."
            )
        _warn(f"{owner}: the networks see {noun} {found}, but can learn only from inputs of order 1. {cure}")


def _warn(message: str) -> None:
    warn_caller(message, UserWarning)
