r"""The maximum mean discrepancy: how much better one law's draws like each other than they like the other's.

.. math:: \mathrm{MMD}^2(p, q) = \mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\, \mathbb{E}\,k(x, y), \qquad
    x, x' \sim p, \quad y, y' \sim q .

Of draws it is the mean of the *witnesses* that leave out a draw's likeness to itself,

.. math:: a_i = \frac{1}{n-1} \sum_{j \ne i} k(x_i, x_j) - \frac1m \sum_j k(x_i, y_j), \qquad
    \widehat{\mathrm{MMD}}^2 = \overline{a} + \overline{b}, \qquad
    \mathrm{se}^2 = \frac{4}{n} \operatorname{var}(a) + \frac{4}{m} \operatorname{var}(b),

and b likewise of the y. Unbiased, so that it may be negative. Gretton et al., *A Kernel Two-Sample Test* (JMLR 2012).
"""

from __future__ import annotations

__all__ = ["mmd", "witnesses"]

from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_genmodels.divergences.kernels import GaussianKernel, Kernel, check_kernel
from pyro_genmodels.divergences.kullback_leibler import Divergence
from pyro_genmodels.divergences.samples import as_matrices

_BLOCK = 2**24  # entries of a kernel's matrix that are held at once


def mmd(x: Tensor, y: Tensor, *, kernel: Kernel = GaussianKernel()) -> Divergence:  # noqa: B008 (immutable)
    """The squared maximum mean discrepancy between two sets of draws, without bias: it is zero on average for one law.

    Args:
        x: draws, (n, ...). The first dimension counts them, all others are the event, which is flattened to d numbers.
        y: draws of events of the same shape, (m, ...); n and m may differ.
        kernel: of pairs of draws. A bandwidth of None is the median distance among both sets, a number without gradient.

    Returns:
        Value, squared (of `EnergyKernel` in the units of the data, else without unit), with gradients to x and y, and its
        standard error, scalars. The error is right in the limit of many draws where the laws differ. For one law the value is
        not normal about zero, and the error, of the same order 1 / n, no more than a hint: there use `mmd_test`.

    Raises:
        ValueError: for events of different shapes, two devices, fewer than 2 draws, and draws with NaN or infinity.

    Example:
        >>> x = torch.randn(500, 2)
        >>> value, std_error = mmd(x, torch.randn(500, 2) + 1)
        >>> value > 5 * std_error
        tensor(True)
    """
    check_kernel(kernel, by="mmd")
    x, y = as_matrices(x, y, by="mmd")
    a, b = witnesses(kernel.fitted(x.detach(), y.detach()), x, y)
    variance = 4 * (a.detach().var() / len(a) + b.detach().var() / len(b))
    return Divergence(a.mean() + b.mean(), variance.sqrt())


def witnesses(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """What each draw adds to the discrepancy, (n,) and (m,), of draws (n, d) and (m, d) by a kernel that is fitted."""
    n, m = len(x), len(y)
    xx, _ = _sums(kernel, x, x, apart=True)
    yy, _ = _sums(kernel, y, y, apart=True)
    xy, yx = _sums(kernel, x, y, apart=False)
    return xx / (n - 1) - xy / m, yy / (m - 1) - yx / n


def _sums(kernel: Kernel, x: Tensor, y: Tensor, *, apart: bool) -> tuple[Tensor, Tensor]:
    """The sums of rows (n,) and of columns (m,) of the kernel's matrix, but for its diagonal if draws are to be apart.

    A matrix that is large is made in blocks, and made again for the gradient.
    """
    blocks = x.split(max(1, _BLOCK // len(y)))
    starts = accumulate(map(len, blocks), initial=0)

    def of(block: Tensor, y: Tensor, start: int) -> tuple[Tensor, Tensor]:
        k = kernel(block, y)
        rows, columns = k.sum(1), k.sum(0)
        return rows - k.diagonal(start) if apart else rows, columns

    if len(blocks) == 1:
        return of(x, y, 0)
    again = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    made = [
        checkpoint(of, block, y, start, use_reentrant=False) if again else of(block, y, start)
        for block, start in zip(blocks, starts, strict=False)
    ]
    rows, columns = zip(*made, strict=True)
    return torch.cat(rows), torch.stack(columns).sum(0)
