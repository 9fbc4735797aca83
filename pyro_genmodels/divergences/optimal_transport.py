r"""The Wasserstein distance between two sets of draws: the least cost of carrying the one to the other.

.. math:: W_p^p(x, y) = \min_{\pi \ge 0} \sum_{ij} \pi_{ij} |x_i - y_j|^p = \max_{u_i + v_j \le |x_i - y_j|^p}
    \frac1n \sum_i u_i + \frac1m \sum_j v_j, \qquad \sum_j \pi_{ij} = \tfrac1n,\ \sum_i \pi_{ij} = \tfrac1m .

Along a line the plan is a matter of sorting, in more dimensions a linear programme. With a regularisation
:math:`\varepsilon` the plan pays :math:`\varepsilon \mathrm{KL}(\pi \| 1/nm)` too, and the *Sinkhorn divergence* is
S(x, y) - S(x, x)/2 - S(y, y)/2 of that cost, so that it is zero between equal sets. The potentials u and v say what each draw
adds, and so how uncertain the sum is.

Villani, *Optimal Transport* (2009); del Barrio and Loubes (arXiv 1705.01299); Feydy et al. (arXiv 1810.08278). Computed by POT
(JMLR 2021).
"""

from __future__ import annotations

__all__ = ["wasserstein"]

import warnings
from math import ceil, isfinite, log2
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.divergences.kullback_leibler import Divergence
from pyro_genmodels.divergences.samples import as_matrices
from pyro_genmodels.utils.errors import import_extra

_PIVOTS = 10_000_000  # of the linear programme
_SWEEPS = 5_000  # of Sinkhorn's iteration
_TOLERANCE = 1e-5  # of its marginals

Potentials = tuple[Tensor, Tensor]


def wasserstein(x: Tensor, y: Tensor, *, p: float = 2.0, regularization: float | None = None) -> Divergence:
    """The Wasserstein distance of order p between two sets of draws, in the units of the data.

    It is the distance of the draws, and as an estimate of that of their laws too high: by about what it is between two
    sets from one law. In d > 4 dimensions that falls only as n^(-1/d). Read it beside the distance of real draws from other
    real draws, with as many rows, or use `sliced_wasserstein`, whose floor falls as n^(-1/2).

    Args:
        x: draws, (n, ...). The first dimension counts them, all others are the event, which is flattened to d numbers.
        y: draws of events of the same shape, (m, ...); n and m may differ. In more than one dimension the n m costs are held in
            memory, and 1000 draws on each side take about a second.
        p: the order, at least 1.
        regularization: None for the exact distance, else epsilon, in units of the data to the power p: the root of the Sinkhorn
            divergence, which is smoother in the draws, and nears the exact distance as epsilon goes to 0, in ever more steps.

    Returns:
        Value and standard error, scalars of the draws' dtype (at least single precision) and device. The value carries
        gradients to x and y, which are zero where the distance is. The error is that of the chance of the draws, by the central
        limit theorem for the dual potentials and the delta method for the root; it knows nothing of the bias, and
        does not hold where both sets come from one law.

    Raises:
        ValueError: for events of different shapes, two devices, fewer than 2 draws, draws with NaN or infinity, orders below 1,
            a regularisation that is not positive, one with an order above 2, and where the solver does not end.
        ImportError: without POT, of the extra ``eval``.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> wasserstein(x, x + torch.tensor([3.0, 4.0])).value
        tensor(5.)
    """
    x, y = as_matrices(x, y, by="wasserstein")
    if not (p >= 1 and isfinite(p)):
        raise ValueError(f"wasserstein wants an order p of at least 1, and finite, got {p=}.")
    if regularization is not None and not (regularization > 0 and isfinite(regularization)):
        raise ValueError(f"wasserstein wants a regularization above 0, and finite, got {regularization=}. Use None for none.")
    if regularization is not None and p > 2:
        raise ValueError(
            f"wasserstein wants an order p of at most 2 with a regularization, got {p=}: beyond, it may be negative."
        )
    ot = import_extra("ot", extra="eval", by="wasserstein")
    dtype, x, y = x.dtype, x.double(), y.double()  # masses 1 / n are to add up
    if regularization is not None:
        cost, potentials = _debiased(ot, x, y, p, regularization)
    elif x.shape[1] == 1:
        cost, potentials = ot.wasserstein_1d(x, y, p=p)[0], _sorted_potentials(x[:, 0].detach(), y[:, 0].detach(), p)
    else:
        cost, potentials = _linear_programme(ot, _costs(x, y, p))
    apart = cost.detach() > 0
    value = torch.where(apart, cost, 1.0).pow(1 / p) * apart  # the root has no slope at zero
    error = sum((part.var() / len(part) for part in potentials), cost.new_zeros(())).sqrt()
    slope = torch.where(apart, cost.detach(), 1.0).pow(1 / p - 1) / p * apart
    return Divergence(value.to(dtype), (slope * error).to(dtype))


def _costs(x: Tensor, y: Tensor, p: float) -> Tensor:
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").pow(p)


def _masses(n: int, costs: Tensor) -> Tensor:
    return torch.full((n,), 1 / n, dtype=costs.dtype, device=costs.device)


def _sorted_potentials(x: Tensor, y: Tensor, p: float) -> Potentials:
    """Of draws on a line, (n,) and (m,), in their order there: what rises along the staircase of matches.

    Where two steps of it coincide either may be the first: the mean of both, since any mean of solutions is one.
    """
    x, y = x.sort().values, y.sort().values
    (u, v), (w, z) = _staircase(x, y, p), _staircase(y, x, p)
    return (u + z) / 2, (v + w) / 2


def _staircase(x: Tensor, y: Tensor, p: float) -> Potentials:
    n, m = len(x), len(y)
    of_x = (torch.arange(1, n, device=x.device) * m - 1).div(n, rounding_mode="floor")  # where y is as x moves on
    of_y = (torch.arange(1, m, device=x.device) * n).div(m, rounding_mode="floor")
    rises_x = (x[1:] - y[of_x]).abs() ** p - (x[:-1] - y[of_x]).abs() ** p
    rises_y = (y[1:] - x[of_y]).abs() ** p - (y[:-1] - x[of_y]).abs() ** p
    zero, first = x.new_zeros(1), (x[:1] - y[:1]).abs() ** p
    return torch.cat([zero, rises_x.cumsum(0)]), torch.cat([first, first + rises_y.cumsum(0)])


def _linear_programme(ot: Any, costs: Tensor) -> tuple[Tensor, Potentials]:
    n, m = costs.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error is raised instead
        cost, found = ot.emd2(_masses(n, costs), _masses(m, costs), costs, numItermax=_PIVOTS, log=True)
    if found["warning"] is not None:
        raise ValueError(
            f"wasserstein wants the linear programme of {n} x {m} draws solved, but POT says: {found['warning']} Use fewer "
            "draws, a regularization, or sliced_wasserstein."
        )
    return cost, (found["u"].detach(), found["v"].detach())


def _debiased(ot: Any, x: Tensor, y: Tensor, p: float, regularization: float) -> tuple[Tensor, Potentials]:
    between, u, v = _sinkhorn(ot, _costs(x, y, p), regularization)
    within_x, *of_x = _sinkhorn(ot, _costs(x, x, p), regularization)
    within_y, *of_y = _sinkhorn(ot, _costs(y, y, p), regularization)
    return between - within_x / 2 - within_y / 2, (u - sum(of_x) / 2, v - sum(of_y) / 2)


def _sinkhorn(ot: Any, costs: Tensor, regularization: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least cost with its entropy, and the potentials, whose means add up to it; its gradient is the plan.

    Each regularisation begins where the one before, of twice its size, came to.
    """
    n, m = costs.shape
    a, b, fixed = _masses(n, costs), _masses(m, costs), costs.detach()
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    halvings = max(0, ceil(log2(max(float(fixed.max()), regularization) / regularization)))
    for epsilon in (regularization * 2.0**k for k in range(halvings, -1, -1)):
        plan, found = ot.bregman.sinkhorn_log(
            a, b, fixed, epsilon, numItermax=_SWEEPS if epsilon == regularization else 20, stopThr=_TOLERANCE, log=True,
            warn=False, warmstart=(u / epsilon, v / epsilon),
        )  # fmt: skip
        u, v = epsilon * found["log_u"], epsilon * found["log_v"]
    off = (plan.sum(0) - b).norm() + (plan.sum(1) - a).norm()
    if not off <= 10 * _TOLERANCE:
        raise ValueError(
            f"wasserstein wants Sinkhorn's iteration to end, but after {_SWEEPS} sweeps the masses are off by {float(off):.1g} "
            f"with {regularization=}, of costs up to {fixed.max():.3g}. Use a larger one, or None."
        )
    moved = (plan * costs).sum()
    u, v = u - regularization * a.log(), v - regularization * b.log()
    return u.mean() + v.mean() + moved - moved.detach(), u, v
