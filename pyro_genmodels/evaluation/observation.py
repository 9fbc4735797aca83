r"""Log-likelihoods of samples without a density, observed with Gaussian noise.

An implicit distribution samples z and computes :math:`g(z)`. Data are scored as such samples with added noise,

.. math:: p_\sigma(x) = \int p(z)\, N\bigl(x; g(z), \sigma^2 I\bigr)\, dz, \qquad
    f_\beta(z) = p(z)\, N\bigl(x; g(z), \sigma^2 I\bigr)^\beta, \quad 0 \le \beta \le 1.

For each datum, chains are annealed from the prior to the posterior of z. The mean of their weights is an unbiased estimate of
:math:`p_\sigma(x)`, so its logarithm is too low in expectation, and by less the longer the path is.

Wu, Burda, Salakhutdinov and Grosse, *On the Quantitative Analysis of Decoder-Based Generative Models* (arXiv 1611.04273).
"""

from __future__ import annotations

__all__ = ["gaussian_observation_likelihood"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution, biject_to

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.evaluation.arguments import row_arguments
from pyro_genmodels.evaluation.result import LogLikelihood, lower_bound
from pyro_genmodels.samplers import Hamiltonian, Sampler, Target, anneal
from pyro_genmodels.samplers.annealing import schedule, tune
from pyro_genmodels.utils.distributions import density_of, sum_event, unwrap
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.log_mean import LogMean, log_mean_weight
from pyro_genmodels.utils.precision import in_doubles

Start = Callable[[Sequence[int]], Tensor]

MAX_PILOT_ROWS = 32
"""Number of rows on which sigma is chosen."""
MAX_PILOT_CHAINS = 4
"""Number of chains per row while sigma is chosen."""
SIGMA_RATIOS = tuple(2.0**-k for k in range(7))
"""Candidates for sigma, as multiples of the data's standard deviation."""


def gaussian_observation_likelihood(
    fit: Any,
    x: Any,
    context: Any = None,
    *,
    sigma: float | None = None,
    valid: Any = None,
    num_chains: int = 16,
    num_steps: int = 500,
    batch_size: int = 2000,
    sampler: Sampler | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> LogLikelihood:
    """Return a lower bound, in expectation, of the log-likelihood (nats) of each row of x under a fit's samples plus noise.

    The noise makes it the likelihood of another model than the fit, and the values depend on the size of the noise: compare
    fits with one sigma, or each with its best sigma. A likelihood with noise of its own is replaced by its mean. Integers,
    which a `Dequantized` rounds down to, are scored at the middle of their unit. The fit's modules run in evaluation mode, and
    their mode is restored afterwards.

    Args:
        fit: family whose distribution is an `Implicit`, or an `SVI` or a pair (model, guide) that observes one and nothing
            else. The prior of z needs a density.
        x: data, (N, *event_shape): tensor, numpy array or data frame.
        context: one context per row, (N, ...), or None.
        sigma: standard deviation of the noise, in the units of the data. None chooses among 7 multiples, from 1 to 1/64, of the
            data's standard deviation: the one with the highest bound on up to 32 rows of valid, or of x itself without valid,
            which makes the values slightly too high.
        valid: rows on which sigma is chosen, or a pair (rows, context).
        num_chains: number of chains per datum.
        num_steps: number of betas of the annealing path; a longer path gives a tighter bound.
        batch_size: largest number of chains that run at once.
        sampler: sampler of z, or of the unbounded coordinates it is mapped to; by default `Hamiltonian`.
        seed: seed of Pyro's random number generators; None leaves them as they are.
        progress: True to show progress bars.

    Returns:
        Values, standard errors (delta method), k-hat, the kind "lower bound" (or "unreliable" if k-hat says so), num_chains as
        ``num_samples``, and sigma as ``observation_noise``.

    Raises:
        TypeError: if x holds no numbers.
        ValueError: if the fit has no such distribution, if its prior has no density over real numbers, if x has another shape
            or no rows, or if a row of x or valid is not finite.

    Warns:
        RuntimeWarning: if the bounds are unreliable, by k-hat or because some are no numbers.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         doubled = Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Delta(2 * z), ())
        ...         pyro.sample("x", doubled, obs=x)
        >>> found = gaussian_observation_likelihood((model, lambda x: None), torch.randn(5), sigma=1.0, num_steps=50)
        >>> found.kind, found.observation_noise
        ('lower bound', 1.0)
    """
    sizes = {"num_chains": num_chains, "num_steps": num_steps, "batch_size": batch_size}
    check_positive_int("gaussian_observation_likelihood", **sizes)
    if isinstance(sigma, (bool, str)) or not (sigma is None or 0 < sigma < float("inf")):
        raise ValueError(f"sigma must be a positive number, in the units of the data, or None, but found {sigma!r}.")
    if seed is not None:
        pyro.set_rng_seed(seed)
    data = row_arguments("gaussian_observation_likelihood", x, (context, valid), {})
    x, context, valid = data.args
    pilot = (x, context) if valid is None else valid if isinstance(valid, tuple) else (valid, None)
    _check_finite("x", x)
    _check_finite("valid", pilot[0])
    annealing = _Annealing(fit, num_steps, batch_size, Hamiltonian() if sampler is None else sampler)
    x = _centred(x)
    with handlers.side_effect_free(*traces.as_pair(fit)):
        if sigma is None:
            rows = _centred(pilot[0][:MAX_PILOT_ROWS])
            pilot_context = None if pilot[1] is None else pilot[1][:MAX_PILOT_ROWS]
            scale = _standard_deviation(rows if valid is None else x)
            sigma = annealing.best_sigma(rows, pilot_context, scale, min(num_chains, MAX_PILOT_CHAINS))
        found = annealing.estimate(x, context, sigma, num_chains, progress=progress)
    cure = "Raise num_steps or num_chains."
    return lower_bound("gaussian_observation_likelihood", found, num_chains, x, cure=cure, observation_noise=sigma)


def _check_finite(name: str, x: Tensor) -> None:
    """Raise a ValueError if rows of the data are not finite, since chains could not tell them from others."""
    bad = (~x.isfinite()).flatten(1).any(1) if x.dim() > 1 else ~x.isfinite()
    if bad.any():
        raise ValueError(f"{name} has {int(bad.sum())} of {len(x)} rows with values that are NaN or infinite. Leave them out.")


def _centred(x: Tensor) -> Tensor:
    """Return integers moved to the middle of the unit that each stands for, and real numbers unchanged."""
    return x if x.is_floating_point() else x + 0.5


def _standard_deviation(x: Tensor) -> float:
    """Return the root mean square of the coordinates' standard deviations."""
    if len(x) < 2 or not (x != x[0]).any():
        raise ValueError("sigma is chosen from the standard deviation of the data, but all rows are the same. Pass sigma=...")
    return x.to(torch.float64).var(0).mean().sqrt().item()


@dataclass(frozen=True)
class _Annealing:
    """Annealed importance sampling of rows under a fit's samples plus noise.

    Attributes:
        fit: fit whose samples have no density.
        num_steps: number of betas of the path.
        batch_size: largest number of chains that run at once.
        sampler: sampler that moves the chains.
    """

    fit: Any
    num_steps: int
    batch_size: int
    sampler: Sampler

    def best_sigma(self, x: Tensor, context: Tensor | None, scale: float, num_chains: int) -> float:
        """Return the candidate for sigma, a multiple of scale, with the highest mean bound on x."""
        candidates = [ratio * scale for ratio in SIGMA_RATIOS]
        bounds = [self.estimate(x, context, s, num_chains, progress=False).value.double().mean().item() for s in candidates]
        return candidates[max(range(len(candidates)), key=bounds.__getitem__)]

    def estimate(self, x: Tensor, context: Tensor | None, sigma: float, num_chains: int, *, progress: bool) -> LogMean:
        """Return log mean weights of the rows of x, with standard errors (NaN for one chain) and k-hat, (N,) each."""
        parts = []
        size = max(1, self.batch_size // num_chains)
        for start in range(0, len(x), size):
            rows = x[start : start + size]
            dist = _implicit(self.fit, rows, None if context is None else context[start : start + size])
            log_w = self._log_weights(dist, rows, sigma, num_chains, progress=progress)
            parts.append(log_mean_weight(log_w))
        return LogMean(*map(torch.cat, zip(*parts, strict=True)))

    def _log_weights(self, dist: Implicit, x: Tensor, sigma: float, num_chains: int, *, progress: bool) -> Tensor:
        """Return log weights of annealed chains, (num_chains, rows)."""
        rows = len(x)
        target, start = _target(dist, x, sigma, num_chains)
        u = start((num_chains * rows,))
        betas = schedule(self.num_steps, u)
        step_sizes = tune(target, self.sampler, start((num_chains * rows,)), betas)
        _, log_w = anneal(target, self.sampler, u, betas, step_sizes=step_sizes, progress=progress)
        return log_w.reshape(num_chains, rows)


def _implicit(fit: Any, x: Tensor, context: Tensor | None) -> Implicit:
    """Return the implicit distribution that a fit samples rows from; raise a ValueError if there is none."""
    model, guide = traces.as_pair(fit)
    if traces.is_family(model):
        family: Any = getattr(model, "__self__", None)
        dist: Any = unwrap(family() if context is None else family(context))
        names = [type(dist).__name__]
    else:
        trace, _ = traces.run_pair(model, guide, (x,) if context is None else (x, context), {})
        names = list(traces.sample_sites(trace))
        dist = unwrap(traces.sample_sites(trace)[names[0]]["fn"]) if len(names) == 1 else None
    if dist is not None and capabilities(dist).is_dequantized:
        dist = dist.base
    if dist is None or not capabilities(dist).is_implicit:
        raise ValueError(
            "gaussian_observation_likelihood wants a fit that samples from one Implicit distribution and nothing else, but "
            f"found {', '.join(names) or 'no sites'}. Use log_likelihood for a fit that has a density or a guide."
        )
    prior, support = dist.prior, dist.prior.support
    if density_of(prior)[0] != "exact" or support is None or support.is_discrete:
        raise ValueError(
            "gaussian_observation_likelihood needs the gradient of the prior's density, but the prior is a "
            f"{type(unwrap(prior)).__name__} over {support}. Build the fit with a density over real numbers, such as a Normal."
        )
    if tuple(x.shape[1:]) != tuple(dist.event_shape):
        raise ValueError(f"x must have shape (N, *{tuple(dist.event_shape)}), but found {tuple(x.shape)}.")
    return dist


def _target(dist: Implicit, x: Tensor, sigma: float, num_chains: int) -> tuple[Target, Start]:
    """Return the path from the prior to the posterior of z, in unbounded coordinates, and a function that samples its start.

    The chains of all rows are stacked, (num_chains * rows, ...).
    """
    prior = dist.prior.expand((num_chains, len(x)))
    to_z = biject_to(prior.support)
    flat = prior.sample().flatten(0, 1)
    u_shape = to_z.inv(flat).shape[1:]
    context = None if dist.context is None else dist.context.expand(len(x), dist.context.shape[-1]).repeat(num_chains, 1)
    data = in_doubles(x).repeat(num_chains, *(1 for _ in dist.event_shape))
    log_normaliser = -dist.event_shape.numel() * (0.5 * log(2 * pi) + log(sigma))
    event_dim = len(u_shape)

    def log_prob(u: Tensor, beta: Any) -> Tensor:
        z = to_z(u)
        log_det = sum_event(to_z.log_abs_det_jacobian(u, z), event_dim - to_z.domain.event_dim)
        log_prior = prior.log_prob(z.reshape(num_chains, -1, *z.shape[1:])).flatten() + log_det
        distances = (data - _mean(dist, z, context)) / sigma  # in doubles, and divided first: no unit overflows or vanishes
        squares = sum_event(distances.square(), len(dist.event_shape))
        return log_prior + beta * (log_normaliser - squares / 2).to(log_prior.dtype)

    def start(shape: Sequence[int]) -> Tensor:
        return to_z.inv(prior.sample().flatten(0, 1)).reshape(*shape, *u_shape)

    return Target(log_prob, event_dim, start=start), start


def _mean(dist: Implicit, z: Tensor, context: Tensor | None) -> Tensor:
    """Return g(z), the mean of the likelihood at z, in the units of the data, (chains, *event_shape)."""
    likelihood: Distribution = dist.likelihood(z, context)
    try:
        y = likelihood.mean
    except NotImplementedError as error:
        raise ValueError(
            f"gaussian_observation_likelihood uses the mean of the likelihood, but {type(likelihood).__name__} has none. Use a "
            "Delta, or a distribution with a mean."
        ) from error
    return y if dist.pretransform is None else dist.pretransform.inv(y)
