"""Validation of two sets of samples, and their conversion to matrices of doubles."""

from __future__ import annotations

__all__ = ["Samples", "as_matrices", "as_samples", "centred"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_genmodels.utils.errors import type_with_article
from pyro_genmodels.utils.precision import common_dtype, in_doubles
from pyro_genmodels.utils.tensors import as_tensor

if TYPE_CHECKING:
    import pandas as pd

Samples: TypeAlias = "Tensor | np.ndarray | pd.DataFrame | pd.Series"
"""A set of samples, one in each row: a tensor, an array, or a frame of pandas."""

MAX_MAGNITUDE = 1e150
"""Largest magnitude of a sample, whose square is still a double."""


def as_samples(samples: Samples, name: str = "x", *, by: str) -> Tensor:
    """Return a set of samples as a tensor, (n, ...).

    Args:
        samples: tensor, NumPy array, data frame, series or list of real numbers.
        name: name of the argument, for error messages.
        by: name of the calling function, for error messages.

    Raises:
        TypeError: for anything else, and for frames with columns that are no numbers.
        ValueError: for complex numbers.

    Example:
        >>> as_samples(np.ones((2, 1)), by="mine")
        tensor([[1.],
                [1.]], dtype=torch.float64)
    """
    if isinstance(samples, Distribution):
        raise TypeError(
            f"{by} wants samples, but {name} is {type_with_article(samples)}. Pass samples of it, {name}.sample((1000,))."
        )
    if isinstance(samples, nn.Module):
        raise TypeError(f"{by}: {name} is {type_with_article(samples)}; call it: {name}() is the distribution.")
    samples = as_tensor(samples, f"{by}, as {name},")
    if samples.is_complex():
        raise ValueError(f"{by} wants real numbers, but {name} has dtype {samples.dtype}. Use torch.view_as_real.")
    return samples


def as_matrices(
    x: Samples, y: Samples, *, by: str, least: int = 2, names: Sequence[str] = ("x", "y")
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return two sets of samples as matrices of doubles, with one sample per row, and the dtype of a result.

    The dimensions after the first are the event, which is flattened. A shape (n,) is n numbers. Join samples of several chains,
    (chains, n, d), by ``flatten(0, 1)`` before.

    Args:
        x: samples, (n, ...).
        y: samples of events of the same shape, (m, ...).
        by: name of the calling function, for error messages.
        least: smallest number of samples in each set.
        names: names of the arguments, for error messages.

    Returns:
        (n, d) and (m, d) in double precision, with their graphs, and the wider of the two dtypes, which is at least single
        precision; integers and booleans count as torch's default dtype.

    Raises:
        TypeError: for anything but tensors, arrays and frames of numbers.
        ValueError: for events of different shapes or without elements, complex numbers, two devices, too few samples, or
            samples with NaN, infinity, numbers beyond 1e150, or integers that doubles round.

    Example:
        >>> x, y, dtype = as_matrices(torch.zeros(5, 2, 2), torch.zeros(3, 2, 2), by="mine")
        >>> x.shape, y.shape, dtype
        (torch.Size([5, 4]), torch.Size([3, 4]), torch.float32)
    """
    x, y = (as_samples(samples, name, by=by) for samples, name in zip((x, y), names, strict=True))
    for name, samples in zip(names, (x, y), strict=True):
        if samples.ndim == 0 or len(samples) < least:
            raise ValueError(
                f"{by} wants at least {least} samples in each set, (n, ...), but {name} has shape {_shape(samples)}."
            )
    if x.shape[1:] != y.shape[1:] or x[0].numel() == 0:
        raise ValueError(
            f"{by} wants samples of one event shape, (n, ...) and (m, ...), but {names[0]} has shape {_shape(x)} and "
            f"{names[1]} {_shape(y)}. Numbers may be (n,) or (n, 1), the same in both sets."
        )
    if x.device != y.device:
        raise ValueError(
            f"{by} wants samples on one device, but {names[0]} is on {x.device} and {names[1]} on {y.device}. Use "
            f".to({str(x.device)!r})."
        )
    dtype = torch.promote_types(common_dtype(x, y), torch.float32)
    x, y = (_as_matrix(samples, name, by=by) for samples, name in zip((x, y), names, strict=True))
    return x, y, dtype


def _as_matrix(samples: Tensor, name: str, *, by: str) -> Tensor:
    """Return a set of samples as a matrix of doubles; raise a ValueError if they are not finite, too large or rounded."""
    rows = in_doubles(samples.reshape(len(samples), -1))
    fixed = rows.detach()
    if samples.dtype == torch.int64 and not torch.equal(fixed.long(), samples.reshape(fixed.shape)):
        raise ValueError(
            f"{by} computes in doubles, but {name} holds integers of magnitude {float(fixed.abs().max()):.1e}, which they "
            f"round. Subtract an offset from both sets before, such as {name}.min()."
        )
    if not (finite := fixed.isfinite().all(1)).all():
        raise ValueError(
            f"{by} wants finite samples, but {int((~finite).sum())} of the {len(rows)} samples of {name} hold NaN or "
            f"infinity, the first at {int((~finite).nonzero()[0])}. Find out why, or leave them out and report it."
        )
    if not (largest := fixed.abs().max()) <= MAX_MAGNITUDE:
        raise ValueError(
            f"{by} wants samples whose squares are doubles, but {name} holds a number of magnitude {largest:.1e}. Divide "
            "both sets by it."
        )
    return rows


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both sets, (n, d) and (m, d), minus a common centre and divided by their largest magnitude, and that unit, ().

    Powers of distances then neither overflow nor underflow, and rounding errors are relative to the extent of the sets, not to
    their distance from zero. Centre and unit are constants for gradients.

    Example:
        >>> centred(torch.tensor([[7.0]]), torch.tensor([[11.0]]))
        (tensor([[-1.]]), tensor([[1.]]), tensor(2.))
    """
    centre = (x.detach().mean(0) + y.detach().mean(0)) / 2
    x, y = x - centre, y - centre
    unit = torch.maximum(x.detach().abs().max(), y.detach().abs().max())
    unit = torch.where(unit == 0, 1.0, unit)
    return x / unit, y / unit, unit


def _shape(samples: Tensor) -> tuple[int, ...]:
    return tuple(samples.shape)
