"""Full precision under `torch.autocast`, which rounds products of matrices and convolutions to half precision.

Networks may be rounded. Densities, Jacobians and energies may not: they are computed in the type of their tensors.
"""

from __future__ import annotations

__all__ = ["FullPrecisionLinear", "full_precision"]

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

P = ParamSpec("P")
Returned = TypeVar("Returned")


def full_precision(method: Callable[Concatenate[Any, Tensor, P], Returned]) -> Callable[Concatenate[Any, Tensor, P], Returned]:
    """Return a method, whose first argument is a tensor, that computes in the types of its tensors, also under autocast.

    Example:
        >>> class Square(nn.Module):
        ...     @full_precision
        ...     def forward(self, x):
        ...         return x @ x
        >>> x = torch.eye(2)
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     (x @ x).dtype, Square()(x).dtype
        (torch.bfloat16, torch.float32)
    """

    @wraps(method)
    def unrounded(self: Any, x: Tensor, *args: P.args, **kwargs: P.kwargs) -> Returned:
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, x, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, x, *args, **kwargs)

    return unrounded


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast does not round, such as the last one of an energy, whose differences are small."""

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))
