r"""Partition functions by sums and integrals.

Discrete data are summed over all outcomes, if these are few. Restricted Boltzmann machines are summed over the states of their
hidden units, with the visible ones summed out in closed form. One and two real dimensions are integrated by the trapezoidal
rule on a square that is refined until the value is stable. For a smooth density that decays on all sides the error of the rule
decays faster than any power of the spacing.
"""

from __future__ import annotations

__all__ = ["MAX_STATES", "exact_log_partition"]

from collections.abc import Callable
from math import log
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.distributions.energy.distribution import Energy
from pyro_genmodels.distributions.energy.path import AnnealingPath
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.utils.errors import warn_caller

MAX_STATES = 2**20
"""Largest number of terms of a sum."""
MAX_HIDDEN_UNITS = 20
"""Largest number of hidden units that are summed over."""
NUM_SQUARES = 13
"""Number of squares, each twice as wide as the one before, that are searched for the density."""
BATCH_ROWS = 2**16
"""Number of energies that are evaluated together."""


def exact_log_partition(dist: Energy, max_terms: int | None = None, *, progress: bool = False) -> LogPartition | None:
    """Compute log Z of each context by a sum or an integral.

    Args:
        dist: distribution of the energy, with contexts (n, c) or none.
        max_terms: largest number of energies to evaluate, over all contexts; None has no such limit.
        progress: True to show a progress bar over contexts.

    Returns:
        log Z, or None if that takes too many terms. A sum that is not finite is "unreliable".

    Warns:
        RuntimeWarning: if a sum is NaN or infinite.
    """
    rows = [None] if dist.context is None else list(dist.context.split(1))
    if max_terms is not None and len(rows) * _num_terms(dist.path) > max_terms:
        return None
    values, errors, terms = [], [], 0
    for context in tqdm(rows, desc="log Z", unit="context", disable=not progress or len(rows) == 1, leave=False):
        result = _sum(dist.path, context) or _integral(dist.path, context)
        if result is None:
            return None
        value, error, terms = result
        values.append(value)
        errors.append(error)
    dtype = dist.path.begin((1,)).dtype
    value, error = torch.stack(values).to(dtype), torch.stack(errors).to(dtype)
    value, error = (value[0], error[0]) if dist.context is None else (value, error)
    if not bool((value < torch.inf).all()):  # also if it is NaN
        warn_caller(
            f"log Z is unreliable: it is {value[~(value < torch.inf)].reshape(-1)[0]:.0f}, so the energy is NaN or minus "
            "infinity for some data.",
        )
        return LogPartition(value, error, "unreliable", num_steps=terms)
    return LogPartition(value, error, "exact" if not error.any() else "estimate", num_steps=terms)


def _num_terms(path: AnnealingPath) -> int:
    """Return about how many energies one context takes."""
    coordinates = path.event_shape.numel()
    if path.space.is_discrete:
        return min(MAX_STATES, path.space.num_levels**coordinates)
    return 2**18 if coordinates == 1 else 2**23


def _sum(path: AnnealingPath, context: Tensor | None) -> tuple[Tensor, Tensor, int] | None:
    """Return log Z by a sum over outcomes or hidden states, its error 0 and the number of terms; None if they are too many."""
    energy: Any = path.energy
    levels, coordinates = path.space.num_levels, path.event_shape.numel()
    if levels and coordinates * log(levels) <= log(MAX_STATES) + 1e-9:
        count, terms = levels**coordinates, _outcomes(path, context)
    elif path.is_conjugate and hasattr(energy, "log_sum_visible") and energy.num_hidden <= MAX_HIDDEN_UNITS:
        count, terms = 2**energy.num_hidden, _hidden_states(path, context)
    else:
        return None
    total = _log_total(terms, torch.arange(count, device=path.begin((1,)).device))
    return total, torch.zeros_like(total), count


def _outcomes(path: AnnealingPath, context: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function from numbers of outcomes (n,) to their log weights (n,)."""

    def terms(numbers: Tensor) -> Tensor:
        x = _digits(numbers, path.space.num_levels, path.event_shape.numel()).reshape(-1, *path.event_shape)
        return path.log_f(path.encode(x), context)

    return terms


def _hidden_states(path: AnnealingPath, context: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function from numbers of hidden states (n,) to their log weights (n,), visible units summed out."""
    machine: Any = path.energy
    natural = path.space.natural(path.start)

    def terms(numbers: Tensor) -> Tensor:
        h = _digits(numbers, 2, machine.num_hidden).to(machine.visible)
        return machine.log_sum_visible(h, context, natural) - path.space.log_sum(natural)

    return terms


def _integral(path: AnnealingPath, context: Tensor | None) -> tuple[Tensor, Tensor, int] | None:
    """Return log Z by the trapezoidal rule on a square outside of which the density is below e^-30 of its maximum.

    The grid is refined until two values agree to 1e-5. If the last two agree to 0.1 only, their difference is the error; if
    they do not, or the density does not decay, there is no value. Modes that are narrower than a thousandth of the square's
    side, or than a hundredth of their distance, may be missed.
    """
    dims = path.event_shape.numel()
    if path.space.is_discrete or dims > 2:
        return None
    like = path.begin((1,))

    def log_f(points: Tensor) -> Tensor:
        return path.log_f(points.reshape(-1, *path.event_shape), context)

    def on_grid(half: float, n: int) -> tuple[Tensor, Tensor]:
        axis = _axis(half, n, like)
        points = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
        height = torch.cat([log_f(part) for part in points.split(BATCH_ROWS)])
        return points.abs().amax(-1), height.nan_to_num(nan=-torch.inf)  # NaN where data overflow

    grids = [on_grid(8.0 * 2**k, 4097 if dims == 1 else 257) for k in range(NUM_SQUARES)]
    radius, height = (torch.cat(part) for part in zip(*grids, strict=True))
    significant = radius[height > height.max() - 30]
    half = next((8.0 * 2**k for k in range(NUM_SQUARES) if significant.max() < 8.0 * 2**k), None)
    if half is None or not height.max().isfinite():
        return None
    before = None
    for n in [2**k + 1 for k in ((15, 17, 19) if dims == 1 else (10, 11, 12))]:
        axis = _axis(half, n, like)
        points = torch.cartesian_prod(*[torch.arange(n, device=like.device)] * dims).reshape(-1, dims)
        total = _log_total(lambda rows, axis=axis: log_f(axis[rows]), points) + dims * log(2 * half / (n - 1))
        if before is not None and (total - before).abs() < 1e-5:
            return total, torch.zeros_like(total), n**dims
        before, error = total, torch.full_like(total, torch.inf) if before is None else (total - before).abs()
    return (total, error, n**dims) if error < 0.1 else None


def _axis(half: float, n: int, like: Tensor) -> Tensor:
    return torch.linspace(-half, half, n, dtype=like.dtype, device=like.device)


def _log_total(terms: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Return the log of a sum of terms, added in double precision."""
    return torch.stack([terms(part).double().logsumexp(0) for part in rows.split(BATCH_ROWS)]).logsumexp(0)


def _digits(numbers: Tensor, base: int, digits: int) -> Tensor:
    """Return the digits of integers (n,) in a base, (n, digits)."""
    powers = base ** torch.arange(digits, device=numbers.device)
    return numbers[:, None] // powers % base
