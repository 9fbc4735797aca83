"""Validation of two sets of samples, and their conversion to matrices."""

from __future__ import annotations

__all__ = ["as_matrices"]

import torch
from torch import Tensor
from torch.distributions import Distribution


def as_matrices(x: Tensor, y: Tensor, *, by: str, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return two sets of samples as matrices of one dtype, with one sample per row.

    The dimensions after the first are the event, which is flattened. A shape (n,) is n numbers. Join samples of several chains,
    (chains, n, d), by ``flatten(0, 1)`` before.

    Args:
        x: samples, (n, ...).
        y: samples of events of the same shape, (m, ...).
        by: name of the calling function, for error messages.
        least: smallest number of samples in each set.

    Returns:
        (n, d) and (m, d), with their graphs, of the wider of the two dtypes, which is at least single precision; integers are
        converted to torch's default dtype.

    Raises:
        TypeError: for anything but tensors.
        ValueError: for events of different shapes or without elements, complex numbers, two devices, too few samples, or
            samples with NaN or infinity.

    Example:
        >>> x, y = as_matrices(torch.zeros(5, 2, 2), torch.zeros(3, 2, 2), by="mine")
        >>> x.shape, y.shape
        (torch.Size([5, 4]), torch.Size([3, 4]))
    """
    for name, samples in (("x", x), ("y", y)):
        if not isinstance(samples, Tensor):
            cure = "Pass samples, p.sample((1000,))" if isinstance(samples, Distribution) else "Use torch.as_tensor"
            raise TypeError(f"{by} wants tensors, but {name} is a {type(samples).__name__}. {cure}.")
        if samples.is_complex():
            raise ValueError(f"{by} wants real numbers, but {name} has dtype {samples.dtype}. Use torch.view_as_real.")
        if samples.ndim == 0 or len(samples) < least:
            raise ValueError(
                f"{by} wants at least {least} samples in each set, (n, ...), but {name} has shape {_shape(samples)}."
            )
    if x.shape[1:] != y.shape[1:] or x[0].numel() == 0:
        raise ValueError(
            f"{by} wants samples of one event shape, (n, ...) and (m, ...), but x has shape {_shape(x)} and y {_shape(y)}. "
            "Numbers may be (n,) or (n, 1), the same in both sets."
        )
    if x.device != y.device:
        raise ValueError(
            f"{by} wants samples on one device, but x is on {x.device} and y on {y.device}. Use .to({str(x.device)!r})."
        )
    dtype = torch.promote_types(*(d.dtype if d.is_floating_point() else torch.get_default_dtype() for d in (x, y)))
    x, y = (samples.reshape(len(samples), -1).to(torch.promote_types(dtype, torch.float32)) for samples in (x, y))
    for name, samples in (("x", x), ("y", y)):
        if not (finite := samples.detach().isfinite().all(1)).all():
            raise ValueError(
                f"{by} wants finite samples, but {int((~finite).sum())} of the {len(samples)} samples of {name} hold NaN or "
                f"infinity, the first at {int((~finite).nonzero()[0])}. Find out why, or leave them out and report it."
            )
    return x, y


def _shape(samples: Tensor) -> tuple[int, ...]:
    return tuple(samples.shape)
