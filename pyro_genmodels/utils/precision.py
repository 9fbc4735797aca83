"""Precision: tensors converted to doubles to compute with, and the data type of what is returned."""

from __future__ import annotations

__all__ = ["common_dtype", "in_doubles"]

import torch
from torch import Tensor


def in_doubles(x: Tensor) -> Tensor:
    """Return x in double precision, or in single precision on devices without doubles (Apple's MPS)."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def common_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Return the wider of the two dtypes, with integers counted as torch's default dtype."""
    return torch.promote_types(*(t.dtype if t.is_floating_point() else torch.get_default_dtype() for t in (x, y)))
