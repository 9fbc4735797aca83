"""Checks of a family's constructor, its data and the number of its contexts."""

from __future__ import annotations

__all__ = ["check_constructor", "check_dtype", "check_one_per_row", "check_shape", "check_values"]

from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import biject_to, constraints

from pyro_genmodels.families.angles import angles_of
from pyro_genmodels.nn.checks import are_positive_integers
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.supports import ByColumn, support_by_column
from pyro_genmodels.utils.tensors import all_finite

IF_AT_END = "map to infinity. Squeeze the data into the interior, or model integers: Flow(..., levels=K)."
"""Reason and advice for values at an end of a support that is mapped to the real line."""


def check_constructor(kind: str, event_shape: Any, support: Any, *, angles: bool = False) -> constraints.Constraint:
    """Check the shape of one datum and the set in which its coordinates lie.

    Args:
        kind: name of the class.
        event_shape: positive integers.
        support: constraint.
        angles: True if coordinates may be angles.

    Returns:
        The set in which one coordinate lies, `ByColumn` if there is one for each.

    Raises:
        TypeError: if the support is no constraint.
        ValueError: if the shape is not a sequence of positive integers, or the support has no map to as many real numbers, or
            has circles that this class does not know.
    """
    if not isinstance(support, constraints.Constraint):
        raise TypeError(f"support wants a constraint such as constraints.interval(0.0, 1.0), but found {support!r}.")
    if not are_positive_integers(event_shape):
        raise ValueError(f"{kind} wants an event_shape of positive integers like (3,), but found {event_shape!r}.")
    support = support_by_column(support, event_shape)
    if not angles and angles_of(support, event_shape) is not None:
        raise ValueError(
            f"{kind} has no coordinates on a circle, but found support={support}. Use Flow, or constraints.interval(-pi, pi) "
            "for a density that may jump where the ends meet."
        )
    if not (support.is_discrete or _keeps_shape(support, Size(event_shape))):
        raise ValueError(
            f"{kind} cannot map the support {support} of events {tuple(event_shape)} to as many real numbers. Use an interval, "
            "or transform the data beforehand."
        )
    return support


def _keeps_shape(support: constraints.Constraint, event_shape: Size) -> bool:
    return support.event_dim <= len(event_shape) and biject_to(support).forward_shape(event_shape) == event_shape


def check_shape(owner: str, x: Tensor, event_shape: Size) -> None:
    """Raise a ValueError unless x, the data of a family called `owner`, is of shape (N, *event_shape) with N at least 1."""
    if x.shape[1:] == event_shape and len(x) and x.dim() == 1 + len(event_shape):
        return
    wanted = f"{owner} wants data of shape (N, {', '.join(map(str, event_shape))})"
    if x.dim() != 1 + len(event_shape) or x.shape[1:] != event_shape:
        raise ValueError(f"{wanted}, but found {tuple(x.shape)}. Reshape the data or change the family's event_shape.")
    raise ValueError(f"{wanted}, but found no rows at all.")


def check_dtype(owner: str, x: Tensor, support: constraints.Constraint) -> None:
    """Raise a ValueError if x holds integers, but the support real numbers."""
    if not x.is_floating_point() and not support.is_discrete:
        raise ValueError(
            f"{owner} models real numbers, but was given data of {x.dtype}. Convert with .float() (arrays and data frames with "
            ".astype(float)), or model integers: levels=K for Flow, ODEFlow and Diffusion, a discrete likelihood, or "
            "EnergyModel(..., support=integer_interval(0, K - 1))."
        )


def check_values(
    owner: str,
    x: Tensor,
    support: constraints.Constraint,
    *,
    dtype: torch.dtype | None,
    mapped: bool,
    if_missing: str = "Drop or impute these rows first.",
    if_outside: str = "",
) -> None:
    """Check the values of data.

    Args:
        owner: name of the family.
        x: the data, (N, *event_shape).
        support: set in which one coordinate lies.
        dtype: precision that must hold the values, or None if they are standardised first.
        mapped: True if the support is mapped to the real line, so that its ends become infinite.
        if_missing: what to do about values that are not finite.
        if_outside: what to do about values outside of the support or at its end; by default advice about the support.

    Raises:
        ValueError: if values are not finite, too large for the precision, at an end of the support, or outside it.
    """
    largest = torch.inf if dtype is None else torch.finfo(dtype).max
    may_overflow = x.is_floating_point() and largest < torch.finfo(x.dtype).max
    if support.is_discrete and not may_overflow and _all_inside(x, support):  # then they are finite
        return
    if x.is_floating_point() and not all_finite(x):
        rows = (~x.isfinite()).reshape(len(x), -1).any(1)
        wrong = "NaN or infinite" if x.isnan().any() else "infinite"
        raise ValueError(
            f"{owner} was given data with {wrong} values in {int(rows.sum())} of {len(x)} rows, the first of them row "
            f"{int(rows.nonzero()[0])}. {if_missing}"
        )
    if may_overflow and (x.abs() > largest).any():
        raise ValueError(
            f"{owner} computes in {dtype}, with numbers up to {largest:.2g}, but was given data of {x.dtype} up to "
            f"{float(x.abs().max()):.2g}. Use another unit, or call family.double()."
        )
    if is_real(support):
        return
    if isinstance(support, ByColumn):
        for column, each in enumerate(support.cseq):
            where = f"{owner}, in column {column},"
            check_values(where, x[..., column], each, dtype=dtype, mapped=mapped, if_outside=if_outside)
        return
    ends = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    at_end = [x == end for end in ends if end is not None and not support.is_discrete]
    if mapped and getattr(support, "has_ends", True) and any(hit.any() for hit in at_end):
        raise ValueError(
            f"{owner} was given {sum(int(hit.sum()) for hit in at_end)} values at an end of its support {support}, which "
            f"{f'have no density. {if_outside}' if if_outside else IF_AT_END}"
        )
    inside = support.check(x)
    if not inside.all():
        outside = x[~inside] if inside.shape == x.shape else x
        low, high = float(outside.min()), float(outside.max())
        values = f"the value {low:g}" if low == high else f"values from {low:g} to {high:g}"
        raise ValueError(
            f"{owner} was given data outside its support {support}: {values} in {int((~inside).sum())} places. "
            f"{if_outside or getattr(support, 'if_outside', 'Rescale the data or widen the support.')}"
        )


def _all_inside(x: Tensor, support: constraints.Constraint) -> bool:
    """Return True if all values lie in the support."""
    if x.is_floating_point() and isinstance(support, type(constraints.boolean)):
        return bool(torch.addcmul(x, x, x, value=-1).abs_().sum() == 0)  # x - x^2; several times faster than comparisons
    return bool(support.check(x).all())


def check_one_per_row(module: nn.Module | None, context: Tensor | None, rows: int) -> None:
    """Check that there is one context per row of data.

    Args:
        module: the family's context module; its `event_dim`, if it has one, is the number of dimensions of one context.
        context: (rows, ...), or None.
        rows: number of rows of data.

    Raises:
        ValueError: if there are more or fewer contexts than rows, or a context has too many dimensions.
    """
    if context is None:
        return
    if isinstance(context, Tensor) and not context.dim():
        raise ValueError(f"There are {rows} rows of x but one context, {context.item()}. Pass one context per row.")
    if len(context) != rows:
        raise ValueError(f"There are {rows} rows of x but {len(context)} of context. Pass one context per row.")
    event_dim = getattr(module, "event_dim", None)
    if event_dim is not None and context.dim() > 1 + event_dim:
        wanted = "labels as (N,)" if event_dim == 0 else f"contexts with {1 + event_dim} dimensions"
        raise ValueError(
            f"The model wants {wanted}, one per row, but found {tuple(context.shape)}. Use .squeeze(-1) or .reshape(N, ...)."
        )
