r"""The likelihood of draws that have no density, seen through Gaussian noise.

An implicit distribution draws z and makes :math:`g(z)` of it. Data are scored as if they were these draws seen with noise,

.. math:: p_\sigma(x) = \int p(z)\, N\bigl(x; g(z), \sigma^2 I\bigr)\, dz, \qquad
    f_\beta(z) = p(z)\, N\bigl(x; g(z), \sigma^2 I\bigr)^\beta, \quad 0 \le \beta \le 1,

by chains that are annealed from the prior to the posterior of z, for each datum its own. The mean of their weights is
:math:`p_\sigma(x)` on average, so that its logarithm is too low, in expectation, by less the longer the path is.

Wu, Burda, Salakhutdinov and Grosse, *On the Quantitative Analysis of Decoder-Based Generative Models* (arXiv 1611.04273).
"""

from __future__ import annotations

__all__ = ["gaussian_observation_likelihood"]

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log, pi
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.energy.annealed import mean_weight
from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.evaluation.likelihood import LogLikelihood
from pyro_genmodels.samplers import Hamiltonian, Sampler, Target, anneal
from pyro_genmodels.samplers.annealing import schedule, tune
from pyro_genmodels.utils.distributions import density_of, sum_event, unwrap

Start = Callable[[Sequence[int]], Tensor]

NUM_PILOT = 32
"""Rows by which sigma is chosen."""
SHARES = tuple(2.0**-k for k in range(7))
"""Of the data's deviation, among which it is chosen."""


def gaussian_observation_likelihood(
    fit: Any,
    x: Tensor,
    context: Tensor | None = None,
    *,
    sigma: float | None = None,
    valid: Tensor | tuple[Tensor, Tensor] | None = None,
    num_chains: int = 16,
    num_steps: int = 500,
    batch_size: int = 2000,
    sampler: Sampler | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """Log-likelihood (nats) of each row of x under what a fit draws, seen with Gaussian noise: a lower bound in expectation.

    It is of another model than the fit's, with noise that this does not have, and depends on its size: compare fits by one
    sigma, or each by its best. Of a likelihood with noise of its own the mean is taken; of integers, which a `Dequantized`
    rounds down to, the density at the middle of their unit.

    Args:
        fit: a family whose distribution is an `Implicit`; or an `SVI` or a pair (model, guide) that observes one and nothing
            else. Its prior has a density.
        x: data, (N, *event_shape).
        context: one per row, (N, ...).
        sigma: deviation of the noise, in the units of the data. None takes, of 7 shares of the data's deviation from 1 to
            1/64, the one with the highest bound on up to 32 rows: of valid, or else of x itself, which then is judged a little
            too well, by one number.
        valid: rows by which sigma is chosen, with their context if there is one.
        num_chains: for each datum.
        num_steps: betas of the path; the more, the tighter.
        batch_size: chains at once.
        sampler: of positions in the prior's space, or in that of real numbers it is mapped to; by default `Hamiltonian`.
        seed: of all random numbers.
        progress: whether to show progress bars.

    Returns:
        Values, standard errors (delta method), the kind "lower bound", num_chains as their number of draws, and sigma as their
        ``observation``.

    Raises:
        ValueError: if the fit has no such distribution, its prior no density over real numbers, or x another shape.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         law = Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Delta(2 * z), ())
        ...         pyro.sample("x", law, obs=x)
        >>> found = gaussian_observation_likelihood((model, lambda x: None), torch.randn(5), sigma=1.0, num_steps=50)
        >>> found.kind, found.observation
        ('lower bound', 1.0)
    """
    if num_chains < 1 or num_steps < 1 or batch_size < 1:
        found = f"{num_chains}, {num_steps} and {batch_size}"
        raise ValueError(f"num_chains, num_steps and batch_size must be positive, got {found}.")
    if not (sigma is None or 0 < sigma < float("inf")):
        raise ValueError(f"sigma wants a positive deviation, in the units of the data, or None, but found {sigma!r}.")
    if seed is not None:
        pyro.set_rng_seed(seed)
    sampler = Hamiltonian() if sampler is None else sampler
    x, valid = _middle(x), (_middle(valid[0]), valid[1]) if isinstance(valid, tuple) else _middle(valid)

    def judged(rows: Tensor, told: Tensor | None, sigma: float, chains: int, *, progress: bool) -> tuple[Tensor, Tensor]:
        parts = []
        for start, stop in pairwise([*range(0, len(rows), max(1, batch_size // chains)), len(rows)]):
            part = rows[start:stop]
            dist = _implicit(fit, part, None if told is None else told[start:stop])
            log_w = _weights(dist, part, sigma, chains, num_steps, sampler, progress=progress)
            parts.append(mean_weight(log_w)[:2] if chains > 1 else (log_w[0], torch.full_like(log_w[0], torch.nan)))
        values, errors = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(errors)

    with handlers.side_effect_free():
        if sigma is None:
            rows, told = (x, context) if valid is None else valid if isinstance(valid, tuple) else (valid, None)
            rows, told = rows[:NUM_PILOT], None if told is None else told[:NUM_PILOT]
            sigmas = [share * _spread(rows if valid is None else x) for share in SHARES]
            bounds = [judged(rows, told, s, min(num_chains, 4), progress=False)[0].mean().item() for s in sigmas]
            sigma = sigmas[max(range(len(sigmas)), key=bounds.__getitem__)]
        values, errors = judged(x, context, sigma, num_chains, progress=progress)
    return LogLikelihood(values, errors, "lower bound", num_chains, observation=sigma)


def _middle(x: Any) -> Any:
    """Of integers the middle of the unit that each stands for."""
    return x if x is None or x.is_floating_point() else x + 0.5


def _spread(x: Tensor) -> float:
    """The deviation of data, the root mean square over their coordinates."""
    if len(x) < 2 or not (x != x[0]).any():
        raise ValueError("sigma is chosen by how data are spread, but all rows are the same. Pass sigma=...")
    return x.to(torch.float64).var(0).mean().sqrt().item()


def _implicit(fit: Any, x: Tensor, context: Tensor | None) -> Implicit:
    """The implicit distribution that a fit draws rows from."""
    model, guide = traces.as_pair(fit)
    if traces.is_family(model):
        family: Any = getattr(model, "__self__", None)
        dist: Any = unwrap(family() if context is None else family(context))
        names = [type(dist).__name__]
    else:
        trace, _ = traces.run_pair(model, guide, (x,) if context is None else (x, context), {})
        names = list(traces.sample_sites(trace))
        dist = unwrap(traces.sample_sites(trace)[names[0]]["fn"]) if len(names) == 1 else None
    if isinstance(dist, Dequantized):
        dist = dist.base
    if not isinstance(dist, Implicit):
        raise ValueError(
            "gaussian_observation_likelihood wants a fit that draws from one Implicit distribution and nothing else, but found "
            f"{', '.join(names) or 'no sites'}. Use log_likelihood for what has a density or a guide."
        )
    prior, support = dist.prior, dist.prior.support
    if density_of(prior)[0] != "exact" or support is None or support.is_discrete:
        raise ValueError(
            "gaussian_observation_likelihood moves z by the gradient of its prior's density, but the prior is a "
            f"{type(unwrap(prior)).__name__} over {support}. Build the fit with a density over real numbers, such as a Normal."
        )
    if tuple(x.shape[1:]) != tuple(dist.event_shape):
        raise ValueError(f"x wants the shape (N, *{tuple(dist.event_shape)}), but found {tuple(x.shape)}.")
    return dist


def _weights(dist: Implicit, x: Tensor, sigma: float, chains: int, steps: int, sampler: Sampler, *, progress: bool) -> Tensor:
    """Log weights of annealed chains, (chains, rows)."""
    rows = len(x)
    target, start = _target(dist, x, sigma, chains)
    u = start((chains * rows,))
    betas = schedule(steps, u)
    sizes = tune(target, sampler, start((chains * rows,)), betas)
    _, log_w = anneal(target, sampler, u, betas, step_sizes=sizes, progress=progress)
    return log_w.reshape(chains, rows)


def _target(dist: Implicit, x: Tensor, sigma: float, chains: int) -> tuple[Target, Start]:
    """The path from the prior to the posterior of z, of all rows' chains side by side, in unbounded coordinates."""
    prior = dist.prior.expand((chains, len(x)))
    to_z = biject_to(prior.support)
    flat = prior.sample().flatten(0, 1)
    u_shape = to_z.inv(flat).shape[1:]
    context = None if dist.context is None else dist.context.expand(len(x), dist.context.shape[-1]).repeat(chains, 1)
    x = x.to(flat.dtype if not x.is_floating_point() else x.dtype)
    seen = x.repeat(chains, *(1 for _ in dist.event_shape))
    constant = -0.5 * dist.event_shape.numel() * log(2 * pi * sigma**2)
    event_dim = len(u_shape)

    def log_prob(u: Tensor, beta: Any) -> Tensor:
        z = to_z(u)
        log_det = sum_event(to_z.log_abs_det_jacobian(u, z), event_dim - to_z.domain.event_dim)
        log_prior = prior.log_prob(z.reshape(chains, -1, *z.shape[1:])).flatten() + log_det
        distances = sum_event((seen - _mean(dist, z, context)).square(), len(dist.event_shape))
        return log_prior + beta * (constant - distances / (2 * sigma**2))

    def start(shape: Sequence[int]) -> Tensor:
        return to_z.inv(prior.sample().flatten(0, 1)).reshape(*shape, *u_shape)

    return Target(log_prob, event_dim, start=start), start


def _mean(dist: Implicit, z: Tensor, context: Tensor | None) -> Tensor:
    """What is made of z, in the units of the data, (chains, *event_shape)."""
    made: Distribution = dist.likelihood(z, context)
    try:
        y = made.mean
    except NotImplementedError as error:
        raise ValueError(
            f"gaussian_observation_likelihood takes what z leads to for the mean of its likelihood, but {type(made).__name__} "
            "knows none. Let the likelihood be a Delta, or a distribution with a mean."
        ) from error
    return y if dist.pretransform is None else dist.pretransform.inv(y)
