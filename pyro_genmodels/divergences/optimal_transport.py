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

__all__ = ["HEAVY_TAIL_CURE", "check_order", "sorted_potentials", "wasserstein"]

import warnings
from collections.abc import Callable
from math import ceil, inf, isfinite, log, log2
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.means import tail_of_sums
from pyro_genmodels.divergences.samples import Samples, as_matrices, centred
from pyro_genmodels.utils.distances import distances
from pyro_genmodels.utils.errors import import_extra

_MAX_PIVOTS = 10_000_000  # largest number of pivots of the linear programme
_SWEEPS = 5  # Sinkhorn's sweeps at each regularisation
_MAX_STEPS = 100  # largest number of steps at the last one
_MASS_TOLERANCE = 1e-6  # largest relative error of the masses of Sinkhorn's plan
_STEP_TOLERANCE = 1e-3  # largest step of Newton's method, in units of the regularisation, that could still follow
_LOOSE_TOLERANCE = 0.02  # largest relative error of the masses after the last of all steps
_ROUNDING = 1e-12  # relative error of the masses at which the plan is exact up to rounding
_RIDGE = 0.01  # damping of Newton's step, relative to the error of the masses

Potentials = tuple[Tensor, Tensor]
HEAVY_TAIL_CURE = (
    "a smaller order p, mmd with a kernel of bounded values such as GaussianKernel(), or logarithms of the samples"
)
"""Advice for a distance whose value a few samples decide."""


def wasserstein(x: Samples, y: Samples, *, p: float = 2.0, regularization: float | None = None) -> Divergence:
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
        both sets come from the same distribution. The potentials are solved to rounding with a regularization, and are in the
        middle of the optimal ones without, so that it is right for close sets too. The result has k-hat of the potentials; a
        RuntimeWarning is issued if it is above 0.7, as it is where no mean of the costs exists.

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
    x, y, dtype = as_matrices(x, y, by="wasserstein")
    check_order(p, by="wasserstein")
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
    x, y, unit = centred(x, y)
    if regularization is not None:
        cost, potentials = _debiased(x, y, p, regularization / unit**p)
    elif x.shape[1] == 1:
        cost, potentials = ot.wasserstein_1d(x, y, p=p)[0], sorted_potentials(x[:, 0].detach(), y[:, 0].detach(), p)
    else:
        cost, potentials = _linear_programme(ot, _costs(x, y, p))
    positive = cost.detach() > 0  # the root is not differentiable at zero
    root = torch.where(positive, cost, 1.0)
    value = root.pow(1 / p).masked_fill(~positive, 0.0) * unit
    error = sum((part.var() / len(part) for part in potentials), cost.new_zeros(())).sqrt()
    slope = root.detach().pow(1 / p - 1).masked_fill(~positive, 0.0) / p * unit
    found = Divergence(value.to(dtype), (slope * error).to(dtype), tail_of_sums(*potentials).to(dtype), min(len(x), len(y)))
    return warn_unless_reliable(found, by="wasserstein", cure=HEAVY_TAIL_CURE)


def check_order(p: float, *, by: str) -> None:
    """Raise a ValueError unless the order of a distance is at least 1 and finite."""
    if not (p >= 1 and isfinite(p)):
        raise ValueError(f"{by} wants an order p of at least 1, and finite, but found {p=}.")


def _costs(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Return the costs of all pairs, (n, m)."""
    return distances(x, y).pow(p)


def _masses(n: int, costs: Tensor) -> Tensor:
    """Return equal masses that sum to one, (n,)."""
    return torch.full((n,), 1 / n, dtype=costs.dtype, device=costs.device)


def sorted_potentials(x: Tensor, y: Tensor, p: float) -> Potentials:
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
        cost, found = ot.emd2(_masses(n, costs), _masses(m, costs), costs, numItermax=_MAX_PIVOTS, log=True, return_matrix=True)
    if found["warning"] is not None:
        raise ValueError(
            f"wasserstein could not solve the linear programme of {n} x {m} samples: {found['warning']} Use fewer samples, a "
            "regularization, or sliced_wasserstein."
        )
    return cost, _central_potentials(costs.detach(), found["u"].detach(), found["v"].detach(), found["G"].detach() > 0)


def _central_potentials(costs: Tensor, u: Tensor, v: Tensor, used: Tensor) -> Potentials:
    """Return the mean of the highest and the lowest optimal potentials that agree with u and v at the first sample.

    Where the plan falls apart into groups of samples that exchange no mass, as between sets of the same size, the potentials of
    a group may be shifted as far as u + v stays below the costs. The solver returns a corner of what is possible; the mean of
    opposite ends cancels, up to the direction of transport. The ends are shortest paths, by Bellman and Ford.

    Args:
        costs: costs of all pairs, (n, m).
        u: optimal potential of the rows, (n,).
        v: optimal potential of the columns, (m,).
        used: pairs between which the plan transports mass, (n, m).
    """
    slack = (costs - u[:, None] - v).clamp(min=0)
    rows, columns = used.nonzero().T

    def along(shift: Tensor, start: Tensor, end: Tensor, like: Tensor) -> Tensor:
        """Return the least shift of the samples with which each sample at the other end exchanges mass."""
        return torch.full_like(like, torch.inf).scatter_reduce(0, end, shift[start], "amin")

    def shortest(step: Callable[[Tensor], Tensor]) -> Tensor:
        shift = torch.full_like(u, torch.inf)
        shift[0] = 0.0
        for _ in range(len(u)):
            shorter = torch.minimum(shift, step(shift))
            if torch.equal(shorter, shift):
                break
            shift = shorter
        return shift

    highest = shortest(lambda shift: (along(shift, rows, columns, v) + slack).min(1).values)
    lowest = -shortest(lambda shift: along((shift + slack.T).min(1).values, columns, rows, u))
    shift = (highest + lowest) / 2
    return u + shift, v - along(shift, rows, columns, v)


def _debiased(x: Tensor, y: Tensor, p: float, regularization: Tensor) -> tuple[Tensor, Potentials]:
    """Return the Sinkhorn divergence and its dual potentials."""
    cost_xy, u, v = _sinkhorn(_costs(x, y, p), regularization)
    cost_xx, *potentials_xx = _sinkhorn(_costs(x, x, p), regularization)
    cost_yy, *potentials_yy = _sinkhorn(_costs(y, y, p), regularization)
    return cost_xy - cost_xx / 2 - cost_yy / 2, (u - sum(potentials_xx) / 2, v - sum(potentials_yy) / 2)


def _sinkhorn(costs: Tensor, regularization: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the least regularised cost, whose gradient is the plan, and the dual potentials, whose means sum to it.

    With the best u for each v, the dual is a concave function of v, :math:`\operatorname{mean} v + \operatorname{mean} u(v)`.
    Sinkhorn's sweeps climb it slowly if the regularisation is small, and the masses look right long before the potentials are.
    So the regularisation is halved step by step, by sweeps, and the last stage takes what climbs most: a sweep, or a step of
    Newton's method, full or damped (Sun and Tran-Dinh, *Generalized Self-Concordant Functions*, arXiv 1703.04599).
    """
    n, m = costs.shape
    fixed = costs.detach()
    v = fixed.new_zeros(m)
    halvings = max(0, ceil(log2(max(float(fixed.max() / regularization), 1.0))))
    for epsilon in (regularization * 2.0**k for k in range(halvings, -1, -1)):
        for _ in range(_SWEEPS):
            v = _best_response(fixed.T, _best_response(fixed, v, epsilon), epsilon)
    for k in range(_MAX_STEPS + 1):
        u = _best_response(fixed, v, regularization)
        plan = ((u[:, None] + v - fixed) / regularization).exp() / (n * m)
        missing = 1 / m - plan.sum(0)
        step = _newton_step(plan, missing)
        length = step.abs().max()
        tolerance = _MASS_TOLERANCE if length <= _STEP_TOLERANCE else _LOOSE_TOLERANCE if k == _MAX_STEPS else _ROUNDING
        if m * missing.abs().max() <= tolerance:
            transported = (plan * costs).sum()
            return u.mean() + v.mean() + transported - transported.detach(), u, v
        damped = length.log1p() / length  # climbs for certain
        steps = (_best_response(fixed.T, u, regularization), *(v + t * regularization * step for t in (1, damped)))
        v = max(steps, key=lambda v: float((_best_response(fixed, v, regularization).mean() + v.mean()).nan_to_num(-inf)))
    raise ValueError(
        f"wasserstein: Sinkhorn's iteration did not converge. After {_MAX_STEPS} steps with a regularization of "
        f"{float(regularization / fixed.max()):.1g} of the largest cost the error of the masses is "
        f"{float(missing.abs().max() * m):.1g}. Use a larger regularization, or None."
    )


def _best_response(costs: Tensor, v: Tensor, epsilon: Tensor) -> Tensor:
    """Return the potential (n,) that gives each row of the plan its mass, for costs (n, m) and the columns' potential (m,)."""
    return -epsilon * (((v - costs) / epsilon).logsumexp(1) - log(len(v)))


def _newton_step(plan: Tensor, missing: Tensor) -> Tensor:
    """Return Newton's step of the columns' potential, (m,), in regularisations, from the masses that are missing, (m,)."""
    n, m = plan.shape
    ridge = _RIDGE * missing.abs().max()  # keeps steps short where the plan falls apart into samples that exchange no mass
    curvature = torch.diag(plan.sum(0) + ridge) - n * plan.T @ plan + 1 / m**2  # the last term fixes the free constant
    return torch.linalg.solve_ex(curvature, missing)[0].nan_to_num(0.0, 0.0, 0.0)
