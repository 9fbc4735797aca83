r"""Euclidean distances between the rows of two matrices, computed from differences in double precision.

The textbook form :math:`|x|^2 + |y|^2 - 2 x \cdot y` loses the squared distance to rounding if rows are far from the origin:
at an offset of 1e4 in single precision its error is 10. Squares of single-precision numbers also overflow from 2e19 and vanish
below 1e-23. Neither happens here.
"""

from __future__ import annotations

__all__ = ["distances"]

import torch
from torch import Tensor

from pyro_genmodels.utils.precision import common_dtype, in_doubles


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance of each row of x from each row of y.

    Args:
        x: rows, (n, d). Integers and booleans are converted to torch's default dtype.
        y: rows, (m, d).

    Returns:
        Distances (n, m), of the wider dtype of both, with a gradient that is zero at zero distance. Memory is of this size.
        A row with NaN has the distance NaN from all rows.

    Raises:
        ValueError: if x and y are not two matrices with rows of the same length.

    Example:
        >>> distances(torch.tensor([[1e6, 0.0], [1e6, 1.0]]), torch.tensor([[1e6, 0.0]]))
        tensor([[0.],
                [1.]])
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Distances are taken between rows of one length, (n, d) and (m, d), but found shapes {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    found = torch.cdist(in_doubles(x), in_doubles(y), compute_mode="donot_use_mm_for_euclid_dist")
    return found.to(common_dtype(x, y))
