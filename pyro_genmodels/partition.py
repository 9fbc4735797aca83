r"""The partition function of an energy, :math:`Z = \int p_0(x)\, e^{-E(x)}\, dx`, with what is known of its error.

A sum over all outcomes where there are few, or over the states of the fewer units of a Boltzmann machine; an integral by the
trapezoidal rule in one and two dimensions; else annealed importance sampling (`samplers.annealing`), whose weights have the
mean Z. Of the logarithm of their average, :math:`\mathrm{se} = \mathrm{sd}(w) / (\bar w \sqrt m)`, and the effective sample
size is :math:`(\sum w)^2 / \sum w^2`.
"""

from __future__ import annotations

__all__ = ["check_energy", "conservative_bound", "log_partition"]

import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.base import unwrap
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.memory import Kind, LogPartition
from pyro_genmodels.samplers import ParallelTempering, Sampler, Target, anneal
from pyro_genmodels.samplers.annealing import schedule, tune

MOST_STATES = 2**20
"""Of a sum over all there is."""
FEW_CONTEXTS = 100
"""For each of which a conditional energy is summed or integrated unasked."""
AT_ONCE = 2**16
"""Rows evaluated together."""


def log_partition(
    energy: Any,
    *,
    num_chains: int = 256,
    num_steps: int = 1000,
    draws: Tensor | None = None,
    exact: bool | None = None,
    batch_size: int = 20_000,
    progress: bool = False,
) -> LogPartition:
    """The log of Z of an energy with its parameters as they are; a family remembers it until they change.

    Args:
        energy: an energy's distribution, or a family without a context.
        num_chains: of annealed importance sampling; of a conditional energy, for each context.
        num_steps: betas of its path, with one step of the sampler each.
        draws: exact draws of the model, (n, *event_shape), if such can be had, from which to anneal backwards as well.
        exact: whether to sum or integrate over all there is; None does where it can.
        batch_size: chains at once, where there are many contexts.
        progress: whether to show a progress bar.

    Returns:
        log Z, () or of the batch shape of a conditional energy.

    Raises:
        ValueError: if an exact value is asked for that cannot be had, or the energy has no sampler.

    Warns:
        RuntimeWarning: if the estimate is unreliable: if hardly any chain carries weight, or forwards and backwards disagree by
            more than three standard errors.

    Example:
        >>> import torch
        >>> from pyro_genmodels.distributions import Energy
        >>> normal = Energy(lambda x: 0.5 * x.square().sum(-1), (2,))
        >>> log_partition(normal)  # log(2 pi)
        LogPartition(value=tensor(1.8379), std_error=tensor(0.), kind='exact', ...)
    """
    dist = check_energy(energy)
    if num_chains < 2 or num_steps < 1:
        raise ValueError(f"num_chains wants 2 or more and num_steps 1 or more, but found {num_chains} and {num_steps}.")
    distinct, place = _distinct(dist)
    with torch.no_grad():
        found = None
        if exact or (exact is None and (place is None or len(place.unique()) <= FEW_CONTEXTS)):
            found = _exactly(distinct)
        if found is None and exact:
            raise ValueError(
                f"log Z of this energy over events {tuple(dist.event_shape)} cannot be had exactly: that takes at most "
                f"{MOST_STATES} outcomes, 20 hidden units of a Boltzmann machine, or two real dimensions. Leave exact out."
            )
        found = found or _annealed(distinct, num_chains, num_steps, draws, batch_size, progress=progress)
    if place is not None:
        each = {name: getattr(found, name) for name in ("value", "std_error", "effective_sample_size")}
        found = replace(found, **{n: v[place].reshape(dist.batch_shape) for n, v in each.items() if v is not None})
    dist.keep(found)
    return found


def _distinct(dist: Energy) -> tuple[Energy, Tensor | None]:
    """The distribution given each context once, (n, c), and where in these each of its own is: labels come again and again."""
    if dist.context is None:
        return dist, None
    rows, place = dist.context.detach().reshape(-1, dist.context.shape[-1]).unique(dim=0, return_inverse=True)
    place = place.reshape(dist.context.shape[:-1]).expand(dist.batch_shape)
    return dist.but(context=rows, _batch_shape=rows.shape[:1]), place


def check_energy(energy: Any) -> Energy:
    """The energy's distribution, given that or what makes it."""
    made = energy() if callable(energy) and not isinstance(energy, Distribution) else energy
    dist = unwrap(made) if isinstance(made, Distribution) else made
    if not isinstance(dist, Energy):
        raise TypeError(f"Wanted an energy's distribution, such as EnergyModel((2,))(), but found {type(dist).__name__}.")
    return dist


# Exactly.


def _exactly(dist: Energy) -> LogPartition | None:
    """By a sum or an integral, for each context in turn; None where there are too many terms."""
    rows = [None] if dist.context is None else list(dist.context.split(1))
    values, errors, terms = [], [], 0
    for context in rows:
        found = _sum(dist, context) or _integral(dist, context)
        if found is None:
            return None
        value, error, terms = found
        values.append(value)
        errors.append(error)
    if dist.context is None:
        return LogPartition(values[0], errors[0], "exact", num_steps=terms)
    return LogPartition(torch.stack(values), torch.stack(errors), "exact", num_steps=terms)


def _sum(dist: Energy, context: Tensor | None) -> tuple[Tensor, Tensor, int] | None:
    path: Any = dist.path
    energy = path.energy
    levels = {"binary": 2, "categorical": path.classes}.get(path.kind, 0)
    coordinates = path.event_shape.numel()
    if levels and coordinates * log(levels) <= log(MOST_STATES) + 1e-9:
        count = levels**coordinates

        def terms(states: Tensor) -> Tensor:
            x = _digits(states, levels, coordinates).reshape(-1, *path.event_shape)
            return path.log_f(path.encode(x), context)

    elif path.tilted and hasattr(energy, "log_sum_visible") and energy.num_hidden <= 20:
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
    """By the trapezoidal rule on a square that holds all but e^-30 of the largest value, refined until two agree to 1e-5."""
    path = dist.path
    dims = path.event_shape.numel()
    if path.kind != "real" or dims > 2:
        return None
    like = path.begin((1,))

    def log_f(points: Tensor) -> Tensor:
        return path.log_f(points.reshape(-1, *path.event_shape), context)

    half = 8.0
    while half < 1e4:
        edge, inside = _axis(half, 257, like), _axis(half, 65, like)
        top = log_f(torch.cartesian_prod(*[inside] * dims).reshape(-1, dims)).max()
        sides = [torch.full((len(edge), dims), half * sign).to(like) for sign in (-1, 1) for _ in range(dims)]
        for i, side in enumerate(sides):
            if dims == 2:
                side[:, 1 - i % 2] = edge
        if all(log_f(side).max() < top - 30 for side in sides):
            break
        half *= 2
    else:
        return None
    counts = [2**k + 1 for k in (range(9, 18, 2) if dims == 1 else range(9, 13))]
    before = None
    for n in counts:
        axis = _axis(half, n, like)
        points = torch.cartesian_prod(*[torch.arange(n, device=like.device)] * dims).reshape(-1, dims)
        total = _log_total(lambda rows, axis=axis: log_f(axis[rows]), points) + dims * log(2 * half / (n - 1))
        if before is not None and (total - before).abs() < 1e-5:
            return total, torch.zeros_like(total), n**dims
        before = total
    return None


def _axis(half: float, n: int, like: Tensor) -> Tensor:
    return torch.linspace(-half, half, n, dtype=like.dtype, device=like.device)


def _log_total(terms: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    return torch.stack([terms(part).logsumexp(0) for part in rows.split(AT_ONCE)]).logsumexp(0)


def _digits(numbers: Tensor, base: int, digits: int) -> Tensor:
    """The digits of whole numbers (n,) in a base, (n, digits)."""
    powers = base ** torch.arange(digits, device=numbers.device)
    return numbers[:, None] // powers % base


def _device(dist: Energy) -> torch.device:
    return dist.path.begin((1,)).device


# By annealing.


def _annealed(dist: Energy, m: int, num_steps: int, draws: Tensor | None, batch_size: int, *, progress: bool) -> LogPartition:
    if dist.context is None:
        return _judged(dist, m, num_steps, *_forwards(dist, None, m, num_steps, progress=progress), draws, progress=progress)
    if draws is not None:
        raise ValueError("Annealing backwards from draws is for energies without a context: leave draws out.")
    parts = [_forwards(dist, part, m, num_steps, progress=progress)[:3] for part in dist.context.split(max(1, batch_size // m))]
    value, error, size = (torch.cat(found) for found in zip(*parts, strict=True))
    return _judged(dist, m, num_steps, value, error, size, None, None, progress=progress)


def _forwards(
    dist: Energy, contexts: Tensor | None, m: int, num_steps: int, *, progress: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Annealed importance sampling for each context (n, c): log Z, error and effective sample size, and step sizes."""
    shape = Size([m]) if contexts is None else Size([m, len(contexts)])
    rows = None if contexts is None else contexts.repeat(m, 1)
    sampler, target = _kernel(dist), dist.path.target(rows)
    betas, sizes = _path(dist, target, sampler, num_steps, shape.numel())
    _, log_w = anneal(target, sampler, dist.path.begin((shape.numel(),)), betas, step_sizes=sizes, progress=progress)
    return *_mean_weight(log_w.reshape(shape)), sizes


def _judged(
    dist: Energy,
    m: int,
    num_steps: int,
    value: Tensor,
    error: Tensor,
    size: Tensor,
    sizes: Tensor | None,
    draws: Tensor | None,
    *,
    progress: bool,
) -> LogPartition:
    """What is said of an estimate, annealed backwards from exact draws too where there are any."""
    kind: Kind = "estimate"
    message, back, back_error = "", None, None
    if bool((size < max(5.0, 0.02 * m)).any()):
        kind, message = "unreliable", f"hardly any chain carries weight (effective sample size {size.min():.1f} of {m})"
    if draws is not None:
        sampler, u = _kernel(dist), dist.path.encode(dist.aligned(draws)[0])
        betas = schedule(num_steps, u).flip(0)
        sizes = None if sizes is None else sizes.flip(0)
        _, log_w = anneal(dist.path.target(), sampler, u, betas, step_sizes=sizes, progress=progress)
        back, back_error, _ = _mean_weight(log_w)
        back = -back
        if (back - value).abs() > 3 * (back_error**2 + error**2).sqrt():
            kind = "unreliable"
            message = f"forwards it is {value:.2f} ± {error:.2f}, backwards {back:.2f} ± {back_error:.2f}"
    if message:
        warnings.warn(
            f"The estimate of log Z is unreliable: {message}. Raise num_steps ({num_steps}) or num_chains ({m}).",
            RuntimeWarning,
            stacklevel=5,
        )
    return LogPartition(value, error, kind, back, back_error, size, m, num_steps)


def _kernel(dist: Energy) -> Sampler:
    """What moves the chains at each beta: of tempered samplers, the one that is tempered."""
    sampler = dist.chains("estimate of log Z")
    return sampler.sampler if isinstance(sampler, ParallelTempering) else sampler


def _path(dist: Energy, target: Target, sampler: Sampler, num_steps: int, chains: int) -> tuple[Tensor, Tensor | None]:
    """Betas, and step sizes tuned by chains that are then thrown away."""
    u = dist.path.begin((chains,))
    betas = schedule(num_steps, u)
    return betas, tune(target, sampler, u, betas)


def _mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the mean weight over the first dimension, its standard error, and the effective sample size."""
    m = len(log_w)
    value = log_w.logsumexp(0) - log(m)
    error = (log_w - value).exp().std(0) / m**0.5
    return value, error, (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def conservative_bound(
    dist: Energy, x: Tensor, *, num_chains: int = 1, num_steps: int = 1000, batch_size: int = 20_000, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """What annealing backwards from data says of their log density: in expectation too little (RAISE).

    Args:
        dist: the energy's.
        x: data, (N, *event_shape), one for each context where there are any.
        num_chains: from each datum, over which weights are averaged.
        num_steps: betas of the path.
        batch_size: chains at once.
        progress: whether to show progress bars.

    Returns:
        Bounds (N,) in nats, and their standard errors, NaN of a single chain.
    """
    sampler, path = _kernel(dist), dist.path
    values, errors = [], []
    with torch.no_grad():
        pilot = path.target(None if dist.context is None else dist.context[:1].expand(min(len(x), 200), -1))
        betas, sizes = _path(dist, pilot, sampler, num_steps, 200 if dist.context is None else min(len(x), 200))
        for start, stop in pairwise([*range(0, len(x), max(1, batch_size // num_chains)), len(x)]):
            part = x[start:stop]
            rows = None if dist.context is None else dist.context[start:stop].repeat(num_chains, 1)
            u = path.encode(part).repeat(num_chains, *(1 for _ in path.position_shape))
            back = None if sizes is None else sizes.flip(0)
            _, log_w = anneal(path.target(rows), sampler, u, betas.flip(0), step_sizes=back, progress=progress)
            log_w = log_w.reshape(num_chains, len(part))
            value, error, _ = _mean_weight(log_w) if num_chains > 1 else (log_w[0], torch.full_like(log_w[0], torch.nan), None)
            values.append(path.log_density(part, None if rows is None else rows[: len(part)]) + value)
            errors.append(error)
    return torch.cat(values), torch.cat(errors)
