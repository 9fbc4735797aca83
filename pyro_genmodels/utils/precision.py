"""Precision: tensors converted to doubles to compute with, and the data type of what is returned."""

from __future__ import annotations

__all__ = ["common_dtype", "in_doubles", "step_in_errors"]

import torch
from torch import Tensor


def in_doubles(x: Tensor) -> Tensor:
    """Return x in double precision, or in single precision on devices without doubles (Apple's MPS)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the wider of the two dtypes, with integers counted as torch's default dtype."""
    return torch.promote_types(*(t.dtype if t.is_floating_point() else torch.get_default_dtype() for t in (x, y)))


def step_in_errors(x: Tensor, dtype: torch.dtype) -> float:
    """Return how far apart the numbers of a dtype are near some data, in standard errors of the data's mean.

    It is the largest of all columns. Integers, single rows, and columns that are constant or not finite have 0.

    Args:
        x: data, (rows, ...).
        dtype: dtype of floats.

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).repeat(50)
        >>> [round(step_in_errors(x + offset, torch.float32), 4) for offset in (0.0, 1e6)]
        [0.0, 0.6219]
    """
    if not x.is_floating_point() or not x.dim() or len(x) < 2:
        return 0.0
    rows = in_doubles(x.detach()).reshape(len(x), -1)
    rows = rows[:, rows.isfinite().all(0)]
    largest = rows.abs().amax(0).to(dtype) if rows.numel() else rows.new_zeros(1, dtype=dtype)
    step = torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest
    error = rows.std(0) / len(rows) ** 0.5 if rows.numel() else rows.new_zeros(1)
    return float((step.to(error) / error).where(error > 0, 0.0).max())
