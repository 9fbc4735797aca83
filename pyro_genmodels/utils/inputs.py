"""A check of the scale of a network's inputs: those far from 0 or nearly constant are hard to learn from.

A network with usual initial weights is nonlinear where its inputs are about 1. Inputs of size 1000 lie far outside, and with a
deviation of 0.001 the network is linear in them.
"""

from __future__ import annotations

__all__ = ["out_of_range"]

import torch
from torch import Tensor

MAX_INPUT = 30.0
"""Largest median magnitude of an input that is accepted; that of standardised inputs is about 1."""
MIN_SPREAD = 0.02
"""Smallest standard deviation of an input that is accepted."""
MIN_ROWS = 16
"""Smallest number of rows whose standard deviation is judged."""


@torch.no_grad()
def out_of_range(rows: Tensor, *, spread: bool = True) -> str:
    """Return what is wrong with the scale of inputs of a network, such as "of size 1e+03", or "" if nothing is.

    Coordinates of which half of the values are one number, such as one-hot classes, are not judged by their spread.

    Args:
        rows: inputs, (n, d).
        spread: False to judge the size alone.

    Example:
        >>> x = torch.linspace(-1.0, 1.0, 50)[:, None]
        >>> out_of_range(x), out_of_range(1000 + x), out_of_range(1e-6 * x)
        ('', 'of size 1e+03', 'that deviate by 5.95e-07')
    """
    middle = rows.median(0).values
    size = float(rows.abs().median(0).values.max())
    if size > MAX_INPUT:
        return f"of size {size:.3g}"
    if not spread or len(rows) < MIN_ROWS:
        return ""
    unit = rows.abs().amax(0)
    deviation = (rows / torch.where(unit == 0, 1.0, unit)).std(0) * unit  # squares of small numbers vanish
    varied = (rows == middle).sum(0) < len(rows) / 2
    small = varied & (deviation < MIN_SPREAD)
    narrow = varied & (middle.abs() > MAX_INPUT * deviation)
    if narrow.any():
        i = int((middle.abs() / deviation).where(narrow, -1.0).argmax())
        return f"of size {float(middle[i].abs()):.3g} that deviate by {float(deviation[i]):.3g}"
    return f"that deviate by {float(deviation[small].min()):.3g}" if small.any() else ""
