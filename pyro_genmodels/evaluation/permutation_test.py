r"""Whether two sets of draws are from one law: the maximum mean discrepancy, judged by permutations.

If they are, it makes no difference which draw is of which set, and the discrepancy is but one among those of sets dealt anew,

.. math:: p = \frac{1 + \#\{b : \mathrm{MMD}^2_b \ge \mathrm{MMD}^2\}}{1 + B}, \qquad
    \Pr(p \le \alpha) \le \alpha \text{ for one law, of whatever size the sets are.}

Gretton et al., *A Kernel Two-Sample Test* (JMLR 2012); Phipson and Smyth, *Permutation P-values Should Never Be Zero*
(arXiv 1603.05766).
"""

from __future__ import annotations

__all__ = ["MMDTest", "mmd_test"]

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.divergences.kernels import GaussianKernel, Kernel, check_kernel
from pyro_genmodels.divergences.samples import as_matrices

MAX_ROWS = 10_000
"""Draws of both sets, whose kernel's matrix takes 800 MB in double precision."""


@dataclass(frozen=True)
class MMDTest:
    """A squared maximum mean discrepancy, and how often chance alone gives as much.

    Attributes:
        value: the squared discrepancy, without bias; about zero for one law.
        std_error: of it, where the laws differ (see `mmd`).
        p_value: the share of dealings that are at least as far apart, this one among them.
        num_permutations: dealings.
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
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = GaussianKernel(),  # noqa: B008 (immutable)
    num_permutations: int = 1000,
    seed: int = 1,
) -> MMDTest:
    """Tests whether two sets of draws are from one law.

    Args:
        x: draws, (n, ...). The first dimension counts them, all others are the event, which is flattened to d numbers.
        y: draws of events of the same shape, (m, ...); n and m may differ. Draws of each set are independent: of chains, thin
            them first.
        kernel: of pairs of draws. A bandwidth of None is the median distance among both sets together.
        num_permutations: dealings, at least 1; no p-value is below 1 / (1 + num_permutations).
        seed: of the dealings.

    Returns:
        The squared discrepancy, its standard error and the p-value.

    Raises:
        ValueError: for events of different shapes, two devices, draws with NaN or infinity, fewer than 2 draws on a side, and
            more than 10,000 on both.

    Example:
        >>> mmd_test(torch.randn(100, 2), torch.randn(100, 2) + 1).p_value < 0.01
        True
    """
    check_kernel(kernel, by="mmd_test")
    if num_permutations < 1:
        raise ValueError(f"mmd_test wants at least one permutation, got {num_permutations=}.")
    x, y = (draws.detach().double() for draws in as_matrices(x, y, by="mmd_test"))
    n, m = len(x), len(y)
    if n + m > MAX_ROWS:
        raise ValueError(
            f"mmd_test holds a matrix of all pairs, of at most {MAX_ROWS} draws, but found {n} and {m}. Test some of them: "
            f"x[torch.randperm(len(x))[:{MAX_ROWS // 2}]], and y likewise. The value alone, of any number, is mmd's."
        )
    both = torch.cat([x, y])
    with torch.no_grad():
        k = kernel.fitted(both)(both, both).fill_diagonal_(0)
        sides = _dealt(n, m, num_permutations, seed).to(both)
        values = _discrepancies(k, sides, n, m)
        a = k[:n, :n].sum(1) / (n - 1) - k[:n, n:].mean(1)
        b = k[n:, n:].sum(1) / (m - 1) - k[n:, :n].mean(1)
    slack = 1e-10 * k.abs().mean()  # the same sets, dealt again, differ by rounding
    as_far = int((values[1:] >= values[0] - slack).sum())
    std_error = 2 * (a.var() / n + b.var() / m).sqrt().item()
    return MMDTest(values[0].item(), std_error, (1 + as_far) / (1 + num_permutations), num_permutations)


def _dealt(n: int, m: int, times: int, seed: int) -> Tensor:
    """Which of all draws are on the first side: as they are, then dealt so many times, (n + m, 1 + times) of zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(times, n + m, generator=generator).argsort(1)
    first = torch.cat([torch.arange(n + m)[None], order])[:, :n]
    return torch.zeros(1 + times, n + m).scatter_(1, first, 1.0).T


def _discrepancies(k: Tensor, sides: Tensor, n: int, m: int) -> Tensor:
    """The squared discrepancy of each dealing (columns of sides), by a matrix whose diagonal is zero."""
    within = (sides * (k @ sides)).sum(0)  # the sum over pairs on the first side
    across = k.sum(0) @ sides - within
    beyond = k.sum() - within - 2 * across
    return within / (n * (n - 1)) + beyond / (m * (m - 1)) - 2 * across / (n * m)
