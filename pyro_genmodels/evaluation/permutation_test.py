r"""Permutation test of the maximum mean discrepancy: do two sets of samples come from the same distribution?

If they do, the discrepancy is exchangeable with those of B random permutations of all samples into two sets,

.. math:: p = \frac{1 + \#\{b : \mathrm{MMD}^2_b \ge \mathrm{MMD}^2\}}{1 + B}, \qquad
    \Pr(p \le \alpha) \le \alpha \text{ for equal distributions and any sizes of the sets.}

Gretton et al., *A Kernel Two-Sample Test* (JMLR 2012); Phipson and Smyth, *Permutation P-values Should Never Be Zero*
(arXiv 1603.05766).
"""

from __future__ import annotations

__all__ = ["MMDTest", "mmd_test"]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.divergences.kernels import GaussianKernel, Kernel, check_kernel, check_kernel_values
from pyro_genmodels.divergences.samples import Samples, as_matrices
from pyro_genmodels.utils.errors import check_positive_int

MAX_SAMPLES = 10_000
"""Largest number of samples in both sets together; their kernel matrix takes 800 MB in double precision."""


@dataclass(frozen=True)
class MMDTest:
    """Squared maximum mean discrepancy and its p-value.

    Attributes:
        value: unbiased estimate of the squared discrepancy; about zero for equal distributions.
        std_error: standard error of the value, valid for distributions that differ (see `mmd`).
        p_value: share of permutations, the observed one included, with at least this discrepancy.
        num_permutations: number of random permutations.
    """

    value: float
    std_error: float
    p_value: float
    num_permutations: int

    def __str__(self) -> str:
        least = self.p_value <= 1 / (1 + self.num_permutations)
        p = f"p {'≤' if least else '='} {self.p_value:.2g}"
        return f"squared MMD {self.value:.3g} ± {self.std_error:.2g} ({p}, {self.num_permutations} permutations)"


def mmd_test(
    x: Samples,
    y: Samples,
    *,
    kernel: Kernel = GaussianKernel(),  # noqa: B008 (immutable)
    num_permutations: int = 1000,
    seed: int = 1,
) -> MMDTest:
    """Test the hypothesis that two sets of samples come from the same distribution.

    Args:
        x: samples, (n, ...). The dimensions after the first are the event, which is flattened to d numbers.
        y: samples of events of the same shape, (m, ...); n and m may differ. Samples within a set must be independent: thin
            Markov chains first.
        kernel: kernel of pairs of samples. A bandwidth of None is the median distance within both sets together.
        num_permutations: number of random permutations; no p-value is below 1 / (1 + num_permutations).
        seed: seed of the permutations.

    Returns:
        The squared discrepancy, its standard error and the p-value.

    Raises:
        ValueError: for events of different shapes, two devices, samples with NaN or infinity, fewer than 2 samples in a set,
            more than 10,000 in both, and a kernel that returns NaN or infinity.

    Example:
        >>> mmd_test(torch.randn(100, 2), torch.randn(100, 2) + 1).p_value < 0.01
        True
    """
    check_kernel(kernel, by="mmd_test")
    check_positive_int("mmd_test", num_permutations=num_permutations)
    x, y, _ = as_matrices(x, y, by="mmd_test")
    n, m = len(x), len(y)
    if n + m > MAX_SAMPLES:
        raise ValueError(
            f"mmd_test holds a matrix of all pairs, of at most {MAX_SAMPLES} samples, but found {n} and {m}. Test a part: "
            f"x[torch.randperm(len(x))[:{MAX_SAMPLES // 2}]], and y likewise. mmd gives the value alone, for any number."
        )
    both = torch.cat([x, y]).detach()
    with torch.no_grad():
        k = kernel.fitted(both)(both, both).fill_diagonal_(0)
        check_kernel_values(k, kernel, by="mmd_test")
        in_first = _permutations(n, m, num_permutations, seed).to(both)
        values = _discrepancies(k, in_first, n, m)
        a = k[:n, :n].sum(1) / (n - 1) - k[:n, n:].mean(1)
        b = k[n:, n:].sum(1) / (m - 1) - k[n:, :n].mean(1)
    rounding = 1e-10 * k.abs().mean()  # a permutation that gives the same two sets differs by rounding
    as_large = int((values[1:] >= values[0] - rounding).sum())
    std_error = 2 * (a.var() / n + b.var() / m).sqrt().item()
    return MMDTest(values[0].item(), std_error, (1 + as_large) / (1 + num_permutations), num_permutations)


def _permutations(n: int, m: int, num_permutations: int, seed: int) -> Tensor:
    """Return indicators of the samples in the first set, (n + m, 1 + num_permutations), starting with the observed sets."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(num_permutations, n + m, generator=generator).argsort(1)
    first = torch.cat([torch.arange(n + m)[None], order])[:, :n]
    return torch.zeros(1 + num_permutations, n + m).scatter_(1, first, 1.0).T


def _discrepancies(k: Tensor, in_first: Tensor, n: int, m: int) -> Tensor:
    """Return the squared discrepancy of each permutation, (1 + num_permutations,).

    Args:
        k: kernel matrix of all samples, (n + m, n + m), with a zero diagonal.
        in_first: indicators of the samples in the first set, (n + m, 1 + num_permutations).
        n: size of the first set.
        m: size of the second set.
    """
    xx = (in_first * (k @ in_first)).sum(0)  # the sum over pairs within the first set
    xy = k.sum(0) @ in_first - xx
    yy = k.sum() - xx - 2 * xy
    return xx / (n * (n - 1)) + yy / (m * (m - 1)) - 2 * xy / (n * m)
