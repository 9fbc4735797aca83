"""Inputs of networks that are not where networks bend: far from 0, or nearly one value."""

from __future__ import annotations

__all__ = ["out_of_range"]

import torch
from torch import Tensor

MAX_INPUT = 30.0
"""Largest median size of an input of a network that passes without a warning; standardised inputs have about 1."""
MIN_SPREAD = 0.02
"""Smallest standard deviation of an input that passes without a warning."""
MIN_ROWS = 16
"""Number of rows from which a standard deviation is judged."""


@torch.no_grad()
def out_of_range(rows: Tensor, *, spread: bool = True) -> str:
    """Return what is wrong with inputs of a network, such as "of size 1e+03", or "" if they are where networks bend.

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
