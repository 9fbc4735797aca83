r"""Partition functions by sums and integrals.

Over all outcomes where these are few; over the states of the hidden units of a restricted Boltzmann machine, the visible ones
summed out; by the trapezoidal rule on a square, refined until it stands still, in one and two real dimensions. For a density
that is smooth and falls off on all sides the rule's error falls faster than any power of the spacing.
"""

from __future__ import annotations

__all__ = ["MAX_STATES", "exact_log_partition"]

from collections.abc import Callable
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.state import LogPartition

MAX_STATES = 2**20
"""Of a sum over all there is."""
NUM_SQUARES = 13
"""Of squares that are looked at, each twice as wide as the one before."""
ROWS_AT_ONCE = 2**16
"""Rows evaluated together."""


def exact_log_partition(dist: Energy, most: int | None = None, *, progress: bool = False) -> LogPartition | None:
    """By a sum or an integral, for each context in turn; None where one takes too many terms, or all more than `most`."""
    rows = [None] if dist.context is None else list(dist.context.split(1))
    if most is not None and len(rows) * _terms(dist) > most:
        return None
    values, errors, terms = [], [], 0
    for context in tqdm(rows, desc="log Z", unit="context", disable=not progress or len(rows) == 1, leave=False):
        found = _sum(dist, context) or _integral(dist, context)
        if found is None:
            return None
        value, error, terms = found
        values.append(value)
        errors.append(error)
    value, error = torch.stack(values), torch.stack(errors)
    value, error = (value[0], error[0]) if dist.context is None else (value, error)
    return LogPartition(value, error, "exact" if not error.any() else "estimate", num_steps=terms)


def _terms(dist: Energy) -> int:
    """About how many evaluations one context takes."""
    path: Any = dist.path
    if path.kind == "real":
        return 2**18 if path.event_shape.numel() == 1 else 2**23
    return min(MAX_STATES, {"binary": 2, "categorical": path.classes}[path.kind] ** path.event_shape.numel())


def _sum(dist: Energy, context: Tensor | None) -> tuple[Tensor, Tensor, int] | None:
    path: Any = dist.path
    energy = path.energy
    levels = {"binary": 2, "categorical": path.classes}.get(path.kind, 0)
    coordinates = path.event_shape.numel()
    if levels and coordinates * log(levels) <= log(MAX_STATES) + 1e-9:
        count = levels**coordinates

        def terms(states: Tensor) -> Tensor:
            x = _digits(states, levels, coordinates).reshape(-1, *path.event_shape)
            return path.log_f(path.encode(x), context)

    elif path.is_conjugate and hasattr(energy, "log_sum_visible") and energy.num_hidden <= 20:
        count = 2**energy.num_hidden
        natural, constant = (0.0, 0.0) if path.kind == "real" else (path.start.logits.flatten(), _log_normalizer(path))

        def terms(states: Tensor) -> Tensor:
            h = _digits(states, 2, energy.num_hidden).to(energy.visible)
            return energy.log_sum_visible(h, context, natural) - constant

    else:
        return None
    total = _log_total(terms, torch.arange(count, device=_device(dist)))
    return total, torch.zeros_like(total), count


def _log_normalizer(path: Any) -> Tensor:
    """The log of the sum over all outcomes of exp(natural parameters of the start . outcome)."""
    logits = path.start.logits
    return F.softplus(logits).sum() if path.kind == "binary" else logits.logsumexp(-1).sum()


def _integral(dist: Energy, context: Tensor | None) -> tuple[Tensor, Tensor, int] | None:
    """By the trapezoidal rule on a square that holds all but e^-30 of the largest value, refined until two agree to 1e-5.

    Where the last two do not, but to 0.1, their difference is the error; else there is no value.
    What is narrower than a thousandth of the square's side, or a hundredth of its distance, may be missed.
    """
    path = dist.path
    dims = path.event_shape.numel()
    if path.kind != "real" or dims > 2:
        return None
    like = path.begin((1,))

    def log_f(points: Tensor) -> Tensor:
        return path.log_f(points.reshape(-1, *path.event_shape), context)

    def on_grid(half: float, n: int) -> tuple[Tensor, Tensor]:
        axis = _axis(half, n, like)
        points = torch.cartesian_prod(*[axis] * dims).reshape(-1, dims)
        height = torch.cat([log_f(part) for part in points.split(ROWS_AT_ONCE)])
        return points.abs().amax(-1), height.nan_to_num(nan=-torch.inf)  # where data overflow

    looks = [on_grid(8.0 * 2**k, 4097 if dims == 1 else 257) for k in range(NUM_SQUARES)]
    radius, height = (torch.cat(part) for part in zip(*looks, strict=True))
    high = radius[height > height.max() - 30]
    half = next((8.0 * 2**k for k in range(NUM_SQUARES) if high.max() < 8.0 * 2**k), None)
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
    return torch.stack([terms(part).logsumexp(0) for part in rows.split(ROWS_AT_ONCE)]).logsumexp(0)


def _digits(numbers: Tensor, base: int, digits: int) -> Tensor:
    """The digits of whole numbers (n,) in a base, (n, digits)."""
    powers = base ** torch.arange(digits, device=numbers.device)
    return numbers[:, None] // powers % base


def _device(dist: Energy) -> torch.device:
    return dist.path.begin((1,)).device
