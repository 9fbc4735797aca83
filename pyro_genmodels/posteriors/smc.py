r"""Sequential Monte Carlo: particles that go from the prior to the posterior through tempered densities.

.. math:: \pi_t(u) \propto p(u)\, p(y \mid u)^t, \qquad 0 = t_0 < t_1 < \dots < 1.

At each temperature the particles are weighted by :math:`p(y \mid u)^{t_{k+1} - t_k}`, resampled, and moved by Hamiltonian Monte
Carlo. The next temperature is the one at which the weights have a given effective sample size. The product of the mean weights
estimates the evidence. Prior draws lie in all modes, so modes are found that chains would not travel between.

Del Moral, Doucet and Jasra, *Sequential Monte Carlo Samplers* (2006); Buchholz, Chopin and Jacob, *Adaptive Tuning of
Hamiltonian Monte Carlo Within Sequential Monte Carlo* (arXiv 1808.07730).
"""

from __future__ import annotations

__all__ = ["SMC"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, log, nan
from typing import Any, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.poutine.messenger import Messenger
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro.messages import text_of
from pyro_genmodels.dynamics.resampling import effective_size, systematic_index
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.posteriors.bound import warn_of_lost_draws
from pyro_genmodels.posteriors.fits import DrawnPosterior, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.errors import check_positive_int, listed

ACCEPTANCE = 0.8
"""Mean acceptance probability that the step size of the moves adapts to."""
NUM_BISECTIONS = 50
"""Number of bisections for the next temperature."""
MAX_TEMPERATURES = 1000
"""Largest number of temperatures."""


class Particles(NamedTuple):
    """Points of several islands, with the log densities of prior and joint and their gradients.

    Attributes:
        z: points, (island, particle, dim).
        prior: log density of the prior, (island, particle), in nats.
        joint: log joint density with the data, (island, particle), in nats.
        prior_score: gradient of the first, (island, particle, dim).
        joint_score: gradient of the second, (island, particle, dim).
    """

    z: Tensor
    prior: Tensor
    joint: Tensor
    prior_score: Tensor
    joint_score: Tensor

    @property
    def log_likelihood(self) -> Tensor:
        """Log likelihood, (island, particle), in nats; -inf where a density is not finite."""
        difference = (self.joint - self.prior).double()
        return torch.where(difference.isfinite(), difference, -torch.inf)

    def tempered(self, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density at a temperature, (island, particle), and its gradient, (island, particle, dim).

        Args:
            temperature: temperature of each island, (island,).
        """
        t = temperature[:, None].to(self.prior)
        value, score = torch.lerp(self.prior, self.joint, t), torch.lerp(self.prior_score, self.joint_score, t[..., None])
        return value.nan_to_num(nan=-torch.inf), score

    def where(self, condition: Tensor, other: Particles) -> Particles:
        """Return these particles where a condition, (island, particle), is true, and others elsewhere."""
        return Particles(
            *(
                torch.where(condition if mine.dim() == 2 else condition[..., None], mine, its)
                for mine, its in zip(self, other, strict=True)
            )
        )

    def at(self, index: Tensor) -> Particles:
        """Return the particles of these indices, (island, particle)."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return Particles(*(x[rows, index] for x in self))


@dataclass(frozen=True, repr=False)
class SMC(Method):
    """Sequential Monte Carlo from the prior to the posterior, for several modes and for the evidence (arXiv 1808.07730).

    Islands of particles do not know of each other. They are the chains of the posterior, so R-hat tells if they disagree, for
    instance about the weights of modes. The error of the log evidence is that of the mean over islands.

    Attributes:
        num_islands: number of islands.
        num_particles: number of particles of each.
        num_moves: number of moves of each particle at each temperature.
        num_final_moves: number of moves of each particle at the end.
        num_leapfrog: number of gradients of each move.
        min_effective: effective sample size of the weights at each temperature, as a share of the particles.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model():  # two modes, at 2 and -2
        ...     z = pyro.sample("z", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=torch.tensor(2.0))
        >>> fit = posterior(model, method=SMC(num_islands=4, num_particles=100), progress=False)
        >>> share = (fit.get_samples()["z"] > 0).float().mean()
        >>> bool(abs(share - 0.5) < 0.2), fit.get_samples(group_by_chain=True)["z"].shape  # islands are chains
        (True, torch.Size([4, 100]))
        >>> value, std_error = fit.log_evidence
    """

    num_islands: int = 8
    num_particles: int = 256
    num_moves: int = 3
    num_final_moves: int = 10
    num_leapfrog: int = 8
    min_effective: float = 0.5

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if name != "min_effective"}
        check_positive_int("SMC", **counts)
        if self.num_particles < 2:
            raise ValueError("SMC wants at least 2 particles, but found num_particles=1.")
        if not 0 < self.min_effective < 1:
            raise ValueError(f"SMC wants a min_effective between 0 and 1, but found {self.min_effective!r}.")

    def fit(self, problem: Problem) -> Posterior:
        """Return the posterior of a problem.

        Args:
            problem: a model with its arguments.

        Raises:
            ValueError: if the prior cannot be drawn from, naming it; if the likelihood is zero or not finite at all of an
                island's prior draws, naming the site; or if it is so sharp that a thousand temperatures do not reach the
                posterior.

        Warns:
            RuntimeWarning: if the density is NaN at many draws of the prior.
        """
        prior = BatchedDensity(LogDensity(_prior_of(problem.model), problem.args, problem.kwargs))

        def evaluate(z: Tensor) -> Particles:
            flat = z.flatten(0, 1)
            pairs = [prior(flat), problem.batched(flat)]
            (prior_value, joint_value), (prior_score, joint_score) = zip(*pairs, strict=True)
            shape = z.shape[:2]
            return Particles(
                z, prior_value.view(shape), joint_value.view(shape), prior_score.view_as(z), joint_score.view_as(z)
            )

        particles = evaluate(self.prior_draws(problem))
        if not bool(particles.log_likelihood.isfinite().any(1).all()):
            raise ValueError(_no_likelihood(problem.density.not_finite()))
        warn_of_lost_draws(int(particles.joint.isnan().sum()), particles.joint.numel())
        particles, log_evidence = self.run(evaluate, particles, progress=problem.progress)
        scaled = (log_evidence - log_evidence.max()).exp()
        value = float(scaled.mean().log() + log_evidence.max())
        error = float(scaled.std() / scaled.mean() / self.num_islands**0.5) if self.num_islands > 1 else nan
        fit = DrawnPosterior(problem, self, particles.z, log_evidence=(value, error))
        fit.num_gradients = problem.batched.num_gradients + prior.num_gradients
        return fit

    def prior_draws(self, problem: Problem) -> Tensor:
        """Return draws of the prior in unconstrained coordinates, (island, particle, dim).

        Args:
            problem: a model with its arguments.

        Raises:
            ValueError: if a variable has no distribution that can be drawn from.
        """
        density, draws = problem.density, []
        with torch.no_grad(), poutine.block(), validation_enabled(is_validate=False):  # a draw without a density has no weight
            for _ in range(self.num_islands * self.num_particles):
                with poutine.trace() as run:
                    try:
                        problem.model(*problem.args, **problem.kwargs)
                    except NotImplementedError as error:
                        undrawn = next((name for name in density.names if name not in run.trace), "a site")
                        raise ValueError(
                            f"SMC starts from draws of the prior, but the distribution of {undrawn} has none: {text_of(error)}"
                            ". Give it a proper prior, or take NoUTurn() or FlowGuide()."
                        ) from error
                draws.append({name: run.trace.nodes[name]["value"] for name in density.names})
            z = density.unconstrain({name: torch.stack([draw[name] for draw in draws]) for name in density.names})
        return z.view(self.num_islands, self.num_particles, density.dim)

    def run(self, evaluate: Callable[[Tensor], Particles], particles: Particles, *, progress: bool) -> tuple[Particles, Tensor]:
        """Return particles at temperature 1, and the log evidence of each island, (island,), in nats.

        Args:
            evaluate: function of points, (island, particle, dim).
            particles: draws of the prior, of which each island has one with a finite likelihood.
            progress: True for a progress bar.

        Raises:
            ValueError: see `fit`.
        """
        num_islands, num_particles = particles.joint.shape
        temperature = torch.zeros(num_islands, dtype=torch.float64, device=particles.z.device)
        log_evidence, step_size = torch.zeros_like(temperature), torch.full_like(temperature, 0.5)
        with tqdm(total=1.0, desc="SMC", disable=not progress, bar_format="{l_bar}{bar}| temperature {n:.3g}") as bar:
            for _ in range(MAX_TEMPERATURES):
                log_likelihood = particles.log_likelihood
                rise = self.next_rise(log_likelihood, temperature)
                log_weights = torch.where(rise[:, None] > 0, rise[:, None] * log_likelihood, 0.0)
                log_evidence = log_evidence + log_weights.logsumexp(1) - log(num_particles)
                particles = particles.at(torch.stack([systematic_index(w, len(w)) for w in log_weights]))
                temperature = temperature + rise
                bar.update(float(temperature.min()) - bar.n)
                is_last = bool((temperature == 1).all())
                scale_tril = _scale_tril(particles.z)
                for _ in range(self.num_final_moves if is_last else self.num_moves):
                    particles, accepted = self.move(evaluate, particles, temperature, scale_tril, step_size)
                    step_size = step_size * (accepted - ACCEPTANCE).exp()
                if is_last:
                    return particles, log_evidence
        raise ValueError(
            f"SMC has reached temperature {float(temperature.min()):.2g} after {MAX_TEMPERATURES} temperatures: the "
            "likelihood is too sharp for these particles. Take more of them, or NoUTurn()."
        )

    def next_rise(self, log_likelihood: Tensor, temperature: Tensor) -> Tensor:
        """Return the rise to the next temperature of each island, (island,).

        Args:
            log_likelihood: log likelihoods, (island, particle), in nats.
            temperature: temperatures, (island,).
        """
        share = log_likelihood.isfinite().double().mean(1)
        wanted = share * self.min_effective  # particles of zero likelihood go at any rise

        def effective(rise: Tensor) -> Tensor:
            log_weights = torch.where(log_likelihood.isfinite(), rise[:, None] * log_likelihood, -torch.inf)
            return effective_size(log_weights, dim=1) / log_weights.shape[1]

        low, high = torch.zeros_like(temperature), 1 - temperature
        is_end = effective(high) >= wanted
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            enough = effective(middle) >= wanted
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return torch.where(is_end, 1 - temperature, low)

    def move(
        self,
        evaluate: Callable[[Tensor], Particles],
        particles: Particles,
        temperature: Tensor,
        scale_tril: Tensor,
        step_size: Tensor,
    ) -> tuple[Particles, Tensor]:
        """Return particles after a move of Hamiltonian Monte Carlo, and the mean acceptance probability, (island,).

        Args:
            evaluate: function of points, (island, particle, dim).
            particles: the particles.
            temperature: temperatures, (island,).
            scale_tril: Cholesky factor of the inverse mass matrix of each island, (island, dim, dim).
            step_size: step sizes, (island,).
        """
        z = particles.z
        value, score = particles.tempered(temperature)
        momentum = torch.randn_like(z)
        energy = value - momentum.square().sum(-1) / 2
        step = step_size.to(z)[:, None, None] * (0.5 + torch.rand_like(z[..., :1]))
        new = particles
        for _ in range(self.num_leapfrog):
            momentum = momentum + step / 2 * (score @ scale_tril)
            new = evaluate(new.z + step * momentum @ scale_tril.mT)
            value, score = new.tempered(temperature)
            momentum = momentum + step / 2 * (score @ scale_tril)
        log_ratio = value - momentum.square().sum(-1) / 2 - energy
        probability = log_ratio.exp().clamp(max=1).nan_to_num(nan=0.0)
        return new.where(torch.rand_like(probability) < probability, particles), probability.double().mean(1)


def _no_likelihood(found: Mapping[str, float]) -> str:
    """Return the text of an error about log densities that are not finite, by the names of their sites."""
    wrong = {name: value for name, value in found.items() if value != -inf}
    where = f", such as that of {listed(f'{name} ({value})' for name, value in (wrong or found).items())}" if found else ""
    cure = (
        "Look for a logarithm, a root or a division in it."
        if wrong
        else "Take a narrower prior, more particles, or a method that starts from a mode, such as FlowGuide()."
    )
    return f"SMC found a likelihood of zero, or none that is finite, at all prior draws of an island{where}. {cure}"


class _PriorMessenger(Messenger):
    """A handler that takes the density of observed sites, and of factors, out of a model."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


def _prior_of(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model without the density of its data. Pyro's handlers have a keyword of their own, which it may have too."""
    return lambda *args, **kwargs: _PriorMessenger()(lambda: model(*args, **kwargs))()


def _scale_tril(z: Tensor) -> Tensor:
    """Return the Cholesky factor of the covariance of each island, (island, dim, dim), with correlations a little shrunk.

    Args:
        z: points, (island, particle, dim).
    """
    num_particles, dim = z.shape[1:]
    centred = (z - z.mean(1, keepdim=True)).double()
    covariance = centred.mT @ centred / num_particles
    variances = covariance.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30)
    share = (dim + 1) / (dim + 1 + num_particles)
    return torch.linalg.cholesky((1 - share) * covariance + share * variances.diag_embed()).to(z)
