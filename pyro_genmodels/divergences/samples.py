"""Two sets of draws as two matrices, checked where they come in."""

from __future__ import annotations

__all__ = ["as_matrices"]

import torch
from torch import Tensor
from torch.distributions import Distribution


def as_matrices(x: Tensor, y: Tensor, *, by: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """Two sets of draws as matrices of one dtype, one draw a row.

    The first dimension counts the draws, and all others are the event, which is flattened; so (n,) are n numbers, and draws of
    several chains, (chains, n, d), are to be joined before by ``flatten(0, 1)``.

    Args:
        x: draws, (n, ...).
        y: draws of events of the same shape, (m, ...).
        by: what asks, as the error says.
        least: draws that are wanted on each side.

    Returns:
        (n, d) and (m, d), with their graphs; the wider of the two dtypes, at least single precision, integers as torch's
        default.

    Raises:
        TypeError: for anything but tensors.
        ValueError: for events of different shapes or without elements, complex numbers, two devices, too few draws, and draws
            with NaN or infinity.

    Example:
        >>> x, y = as_matrices(torch.zeros(5, 2, 2), torch.zeros(3, 2, 2), by="mine")
        >>> x.shape, y.shape
        (torch.Size([5, 4]), torch.Size([3, 4]))
    """
    for name, draws in (("x", x), ("y", y)):
        if not isinstance(draws, Tensor):
            cure = "Pass draws of it, p.sample((1000,))" if isinstance(draws, Distribution) else "Use torch.as_tensor"
            raise TypeError(f"{by} wants tensors, but {name} is of {type(draws).__name__}. {cure}.")
        if draws.is_complex():
            raise ValueError(f"{by} wants real numbers, but {name} is of {draws.dtype}. Use torch.view_as_real.")
        if draws.ndim == 0 or len(draws) < least:
            raise ValueError(f"{by} wants at least {least} draws on each side, (n, ...), but {name} has shape {_shape(draws)}.")
    if x.shape[1:] != y.shape[1:] or x[0].numel() == 0:
        raise ValueError(
            f"{by} wants draws of one event shape, (n, ...) and (m, ...), but x has shape {_shape(x)} and y {_shape(y)}. "
            "Numbers may be (n,) or (n, 1), the same on both sides."
        )
    if x.device != y.device:
        raise ValueError(
            f"{by} wants draws on one device, but x is on {x.device} and y on {y.device}. Use .to({str(x.device)!r})."
        )
    dtype = torch.promote_types(*(d.dtype if d.is_floating_point() else torch.get_default_dtype() for d in (x, y)))
    x, y = (draws.reshape(len(draws), -1).to(torch.promote_types(dtype, torch.float32)) for draws in (x, y))
    for name, draws in (("x", x), ("y", y)):
        if not (finite := draws.detach().isfinite().all(1)).all():
            raise ValueError(
                f"{by} wants finite draws, but of the {len(draws)} of {name} {int((~finite).sum())} hold NaN or infinity, the "
                f"first at {int((~finite).nonzero()[0])}. See where they come from, or leave them out and say so."
            )
    return x, y


def _shape(draws: Tensor) -> tuple[int, ...]:
    return tuple(draws.shape)
