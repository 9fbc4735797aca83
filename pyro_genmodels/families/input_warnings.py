"""Warnings of data and contexts that standardisation cannot help, and of networks that see inputs which are not standardised.

The likelihood of data has no maximum if a coordinate is constant, has one value in many rows, or is a linear combination of
others. A few far rows can decide the standard deviation of all. Far from 0, floating-point numbers may be too coarse for the
data. All messages name the coordinates.
"""

from __future__ import annotations

__all__ = [
    "CONTEXTS",
    "DATA",
    "InputCheck",
    "Inputs",
    "warn_of_atoms",
    "warn_of_combinations",
    "warn_of_constants",
    "warn_of_outliers",
    "warn_of_steps",
]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.inputs import out_of_range

MAX_STEP = 0.01
"""Largest step between neighbouring floats at the mean, in deviations, that passes without a warning."""
OUTLIER_SHARE, MAX_OUTLIER_EFFECT, MIN_ROWS = 0.01, 10.0, 20
"""Share of rows that may be outliers, their largest effect on the deviation without a warning, and rows needed to judge."""
ATOM_SHARE, MAX_ATOM_ROWS = 0.25, 1000
"""Smallest share of rows with the same value that is warned of, and number of rows among which this value is looked for."""
MAX_COLUMNS = 100
"""Largest number of coordinates among which combinations are looked for."""


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


def warn_of_constants(found: Tensor, n: int, like: Tensor, owner: str, inputs: Inputs) -> None:
    """Warn of the constant coordinates `found`, (d,), of data with n rows."""
    where = f"all {n} rows" if n > 1 else "the only row"
    _warn(f"{_named(found, like, owner, inputs)} constant in {where}. {inputs.if_constant}")


def warn_of_steps(loc: Tensor, scale: Tensor, varying: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    """Warn of coordinates, among the `varying` ones, (d,), whose floating-point numbers are far apart near the mean `loc`."""
    near = loc.to(like.dtype)
    step = (torch.nextafter(near.abs(), near.new_tensor(torch.inf)) - near.abs()).double()
    allowed = max(MAX_STEP, 16 * torch.finfo(like.dtype).eps)  # in half precision all steps are long
    coarse = varying & (step > allowed * scale)
    if coarse.any():
        i = int(coarse.nonzero()[0])
        _warn(
            f"{_named(coarse, like, owner, inputs)} far from 0 for their spread: near {float(loc[i]):.6g} the numbers of "
            f"{like.dtype} are {float(step[i]):.2g} apart, but the deviation is {float(scale[i]):.2g}. {inputs.if_rounded} "
            "Subtract an offset in float64 first, or call family.double() before anything else and pass float64."
        )


def warn_of_atoms(rows: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
    """Warn of coordinates of (N, d) in which many rows have exactly the same value, such as 0."""
    if len(rows) < MIN_ROWS:
        return
    some = rows[:: -(-len(rows) // MAX_ATOM_ROWS)]
    values = some.mode(0).values  # a value of many rows is frequent among some of them too
    share = (rows == values).sum(0) / len(rows)
    found = share >= ATOM_SHARE
    if found.any():
        i = int(share.argmax())
        value, percent = float(values[i]), float(share[i])
        _warn(
            f"{_named(found, like, owner, inputs)} one value in many rows, such as {value:.6g} in {percent:.0%} of them. "
            f"{inputs.if_constant}"
        )


def warn_of_combinations(rows: Tensor, rounding: Tensor, like: Tensor, owner: str, inputs: Inputs) -> None:
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


def warn_of_outliers(centred: Tensor, like: Tensor, owner: str, inputs: Inputs, *, jointly: bool) -> None:
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
