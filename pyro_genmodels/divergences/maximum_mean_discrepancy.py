r"""Maximum mean discrepancy (MMD): the mean similarity within two distributions minus the similarity between them.

.. math:: \mathrm{MMD}^2(p, q) = \mathbb{E}\,k(x, x') + \mathbb{E}\,k(y, y') - 2\, \mathbb{E}\,k(x, y), \qquad
    x, x' \sim p, \quad y, y' \sim q .

Its unbiased estimate is the sum of the means of two *witness* functions, which leave out the similarity of a sample to itself,

.. math:: a_i = \frac{1}{n-1} \sum_{j \ne i} k(x_i, x_j) - \frac1m \sum_j k(x_i, y_j), \qquad
    \widehat{\mathrm{MMD}}^2 = \overline{a} + \overline{b}, \qquad
    \mathrm{se}^2 = \frac{4}{n} \operatorname{var}(a) + \frac{4}{m} \operatorname{var}(b),

and b likewise for y. Since the estimate is unbiased, it can be negative. Gretton et al., *A Kernel Two-Sample Test* (JMLR
2012).
"""

from __future__ import annotations

__all__ = ["mmd", "witnesses"]

from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.kernels import GaussianKernel, Kernel, check_kernel, check_kernel_values
from pyro_genmodels.divergences.means import tail_of_sums
from pyro_genmodels.divergences.samples import Samples, as_matrices

_MAX_BLOCK_SIZE = 2**24  # largest number of entries of the kernel matrix in memory


def mmd(x: Samples, y: Samples, *, kernel: Kernel = GaussianKernel()) -> Divergence:  # noqa: B008 (immutable)
    """Return an unbiased estimate of the squared maximum mean discrepancy between two sets of samples.

    Its expectation is zero for equal distributions.

    Args:
        x: samples, (n, ...). The dimensions after the first are the event, which is flattened to d numbers.
        y: samples of events of the same shape, (m, ...); n and m may differ.
        kernel: kernel of pairs of samples. A bandwidth of None is the median distance within both sets together, without
            gradient.

    Returns:
        The squared value (in the units of the data for `EnergyKernel`, otherwise without unit), with gradients to x and y, and
        its standard error, scalars. The error is correct for many samples of distributions that differ. For equal distributions
        the estimate is not normally distributed and the error is only a rough guide: use `mmd_test`. For a kernel that is not
        bounded the result has k-hat of the witnesses; a RuntimeWarning is issued if it is above 0.7.

    Raises:
        TypeError: if kernel is no `Kernel`, or a set no tensor, array or frame of numbers.
        ValueError: for events of different shapes, two devices, fewer than 2 samples, samples with NaN or infinity, or a kernel
            that returns them.

    Example:
        >>> x = torch.randn(500, 2)
        >>> value, std_error = mmd(x, torch.randn(500, 2) + 1)
        >>> value > 5 * std_error
        tensor(True)
    """
    check_kernel(kernel, by="mmd")
    x, y, dtype = as_matrices(x, y, by="mmd")
    a, b = witnesses(kernel.fitted(x.detach(), y.detach()), x, y)
    variance = 4 * (a.detach().var() / len(a) + b.detach().var() / len(b))
    value = a.mean() + b.mean()
    check_kernel_values(value, kernel, by="mmd")
    if kernel.bounded:
        return Divergence(value.to(dtype), variance.sqrt().to(dtype))
    found = Divergence(value.to(dtype), variance.sqrt().to(dtype), tail_of_sums(a, b).to(dtype), min(len(x), len(y)))
    return warn_unless_reliable(found, by="mmd", cure="a kernel of bounded values such as GaussianKernel(), or logarithms")


def witnesses(kernel: Kernel, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms a (n,) and b (m,) of the discrepancy, for samples (n, d) and (m, d) and a fitted kernel."""
    n, m = len(x), len(y)
    xx, _ = _sums(kernel, x, x, skip_diagonal=True)
    yy, _ = _sums(kernel, y, y, skip_diagonal=True)
    xy, yx = _sums(kernel, x, y, skip_diagonal=False)
    return xx / (n - 1) - xy / m, yy / (m - 1) - yx / n


def _sums(kernel: Kernel, x: Tensor, y: Tensor, *, skip_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Return the row sums (n,) and column sums (m,) of the kernel matrix; the row sums can leave out the diagonal.

    A large matrix is computed in blocks, and recomputed for the gradient.
    """
    blocks = x.split(max(1, _MAX_BLOCK_SIZE // len(y)))
    starts = accumulate(map(len, blocks), initial=0)

    def sums(block: Tensor, y: Tensor, start: int) -> tuple[Tensor, Tensor]:
        k = kernel(block, y)
        rows, columns = k.sum(1), k.sum(0)
        return rows - k.diagonal(start) if skip_diagonal else rows, columns

    if len(blocks) == 1:
        return sums(x, y, 0)
    recompute = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    rows, columns = [], y.new_zeros(len(y))
    for block, start in zip(blocks, starts, strict=False):
        of_rows, of_columns = checkpoint(sums, block, y, start, use_reentrant=False) if recompute else sums(block, y, start)
        rows.append(of_rows)
        columns = columns + of_columns  # blocks are as many as rows are: kept apart, their sums would fill the memory
    return torch.cat(rows), columns
