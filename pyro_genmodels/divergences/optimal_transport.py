r"""Wasserstein distance between two sets of samples: the least cost of transporting one set to the other.

.. math:: W_p^p(x, y) = \min_{\pi \ge 0} \sum_{ij} \pi_{ij} |x_i - y_j|^p = \max_{u_i + v_j \le |x_i - y_j|^p}
    \frac1n \sum_i u_i + \frac1m \sum_j v_j, \qquad \sum_j \pi_{ij} = \tfrac1n,\ \sum_i \pi_{ij} = \tfrac1m .

In one dimension the optimal plan is found by sorting, in more dimensions by a linear programme. A regularisation
:math:`\varepsilon` adds :math:`\varepsilon \mathrm{KL}(\pi \| 1/nm)` to the cost, and the *Sinkhorn divergence* is S(x, y) -
S(x, x)/2 - S(y, y)/2 of that cost S, which is zero between equal sets. The potentials u and v are the contributions of single
samples to the cost, and give its standard error.

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

_MAX_PIVOTS = 10_000_000  # largest number of pivots of the linear programme
_MAX_SWEEPS = 5_000  # largest number of Sinkhorn iterations
_MARGINAL_TOLERANCE = 1e-5  # largest error of the marginals of Sinkhorn's plan

Potentials = tuple[Tensor, Tensor]


def wasserstein(x: Tensor, y: Tensor, *, p: float = 2.0, regularization: float | None = None) -> Divergence:
    """Return the Wasserstein distance of order p between two sets of samples, in the units of the data.

    As an estimate of the distance between the distributions it is too high, by about the distance between two sets from the
    same distribution. In d > 4 dimensions this bias falls only as n^(-1/d). Compare it with the baseline, the distance between
    two sets of real data of the same sizes, or use `sliced_wasserstein`, whose bias falls as n^(-1/2).

    Args:
        x: samples, (n, ...). The dimensions after the first are the event, which is flattened to d numbers.
        y: samples of events of the same shape, (m, ...); n and m may differ. In more than one dimension the n m costs are held
            in memory, and two sets of 1000 samples take about a second.
        p: order, at least 1.
        regularization: None for the exact distance, or epsilon, in units of the data to the power p, for the root of the
            Sinkhorn divergence. It is smoother in the samples and converges to the exact distance as epsilon goes to 0, but
            then takes more steps.

    Returns:
        Value and standard error, scalars of the samples' dtype (at least single precision) and device. The value has gradients
        with respect to x and y, which are zero at zero distance. The error covers the randomness of the samples, by the central
        limit theorem for the dual potentials and the delta method for the root. It does not cover the bias, and is not valid if
        both sets come from the same distribution.

    Raises:
        ValueError: for events of different shapes, two devices, fewer than 2 samples, samples with NaN or infinity, an order
            below 1, a regularisation that is not positive, a regularisation with an order above 2, or if the solver does not
            converge.
        ImportError: if POT, of the extra ``eval``, is missing.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        >>> wasserstein(x, x + torch.tensor([3.0, 4.0])).value
        tensor(5.)
    """
    x, y = as_matrices(x, y, by="wasserstein")
    if not (p >= 1 and isfinite(p)):
        raise ValueError(f"wasserstein wants an order p of at least 1, and finite, but found {p=}.")
    if regularization is not None and not (regularization > 0 and isfinite(regularization)):
        raise ValueError(
            f"wasserstein wants a regularization above 0, and finite, but found {regularization=}. Use None for none."
        )
    if regularization is not None and p > 2:
        raise ValueError(
            f"wasserstein wants an order p of at most 2 with a regularization, but found {p=}: for larger orders the Sinkhorn "
            "divergence can be negative. Use None, or p=2."
        )
    ot = import_extra("ot", extra="eval", by="wasserstein")
    dtype, x, y = x.dtype, x.double(), y.double()  # so that masses of 1 / n sum to one
    if regularization is not None:
        cost, potentials = _debiased(ot, x, y, p, regularization)
    elif x.shape[1] == 1:
        cost, potentials = ot.wasserstein_1d(x, y, p=p)[0], _sorted_potentials(x[:, 0].detach(), y[:, 0].detach(), p)
    else:
        cost, potentials = _linear_programme(ot, _costs(x, y, p))
    positive = cost.detach() > 0
    value = torch.where(positive, cost, 1.0).pow(1 / p) * positive  # the root is not differentiable at zero
    error = sum((part.var() / len(part) for part in potentials), cost.new_zeros(())).sqrt()
    slope = torch.where(positive, cost.detach(), 1.0).pow(1 / p - 1) / p * positive
    return Divergence(value.to(dtype), (slope * error).to(dtype))


def _costs(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Return the costs of all pairs, (n, m)."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").pow(p)


def _masses(n: int, costs: Tensor) -> Tensor:
    """Return equal masses that sum to one, (n,)."""
    return torch.full((n,), 1 / n, dtype=costs.dtype, device=costs.device)


def _sorted_potentials(x: Tensor, y: Tensor, p: float) -> Potentials:
    """Return dual potentials of sorted samples on a line, (n,) and (m,), summed along the staircase of matched pairs.

    If steps in x and y coincide, either can come first. The mean of both solutions is returned, which is a solution too.
    """
    x, y = x.sort().values, y.sort().values
    (u, v), (w, z) = _staircase(x, y, p), _staircase(y, x, p)
    return (u + z) / 2, (v + w) / 2


def _staircase(x: Tensor, y: Tensor, p: float) -> Potentials:
    """Return dual potentials of sorted samples, (n,) and (m,); steps in x come first if steps coincide."""
    n, m = len(x), len(y)
    partner_y = (torch.arange(1, n, device=x.device) * m - 1).div(n, rounding_mode="floor")  # index in y at each step in x
    partner_x = (torch.arange(1, m, device=x.device) * n).div(m, rounding_mode="floor")
    steps_x = (x[1:] - y[partner_y]).abs() ** p - (x[:-1] - y[partner_y]).abs() ** p
    steps_y = (y[1:] - x[partner_x]).abs() ** p - (y[:-1] - x[partner_x]).abs() ** p
    zero, first = x.new_zeros(1), (x[:1] - y[:1]).abs() ** p
    return torch.cat([zero, steps_x.cumsum(0)]), torch.cat([first, first + steps_y.cumsum(0)])


def _linear_programme(ot: Any, costs: Tensor) -> tuple[Tensor, Potentials]:
    """Return the least cost of the linear programme and its dual potentials."""
    n, m = costs.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an error is raised below instead
        cost, found = ot.emd2(_masses(n, costs), _masses(m, costs), costs, numItermax=_MAX_PIVOTS, log=True)
    if found["warning"] is not None:
        raise ValueError(
            f"wasserstein could not solve the linear programme of {n} x {m} samples: {found['warning']} Use fewer samples, a "
            "regularization, or sliced_wasserstein."
        )
    return cost, (found["u"].detach(), found["v"].detach())


def _debiased(ot: Any, x: Tensor, y: Tensor, p: float, regularization: float) -> tuple[Tensor, Potentials]:
    """Return the Sinkhorn divergence and its dual potentials."""
    cost_xy, u, v = _sinkhorn(ot, _costs(x, y, p), regularization)
    cost_xx, *potentials_xx = _sinkhorn(ot, _costs(x, x, p), regularization)
    cost_yy, *potentials_yy = _sinkhorn(ot, _costs(y, y, p), regularization)
    return cost_xy - cost_xx / 2 - cost_yy / 2, (u - sum(potentials_xx) / 2, v - sum(potentials_yy) / 2)


def _sinkhorn(ot: Any, costs: Tensor, regularization: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least regularised cost, whose gradient is the plan, and the dual potentials, whose means sum to it.

    The regularisation is halved step by step, and each solution starts the next.
    """
    n, m = costs.shape
    a, b, fixed = _masses(n, costs), _masses(m, costs), costs.detach()
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    halvings = max(0, ceil(log2(max(float(fixed.max()), regularization) / regularization)))
    for epsilon in (regularization * 2.0**k for k in range(halvings, -1, -1)):
        plan, found = ot.bregman.sinkhorn_log(
            a, b, fixed, epsilon, numItermax=_MAX_SWEEPS if epsilon == regularization else 20, stopThr=_MARGINAL_TOLERANCE,
            log=True, warn=False, warmstart=(u / epsilon, v / epsilon),
        )  # fmt: skip
        u, v = epsilon * found["log_u"], epsilon * found["log_v"]
    error = (plan.sum(0) - b).norm() + (plan.sum(1) - a).norm()
    if not error <= 10 * _MARGINAL_TOLERANCE:
        raise ValueError(
            f"wasserstein: Sinkhorn's iteration did not converge. After {_MAX_SWEEPS} sweeps with {regularization=} and costs "
            f"up to {fixed.max():.3g} the error of the masses is {float(error):.1g}. Use a larger regularization, or None."
        )
    transported = (plan * costs).sum()
    u, v = u - regularization * a.log(), v - regularization * b.log()
    return u.mean() + v.mean() + transported - transported.detach(), u, v
