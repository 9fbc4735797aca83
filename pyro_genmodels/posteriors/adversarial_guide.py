r"""Adversarial variational Bayes: a guide without a density, whose evidence lower bound is known through a critic.

.. math:: u = b + L\, G_\phi(\epsilon), \qquad
    \mathrm{ELBO} = \mathbb{E}_q\Bigl[\log p(y, u) - \log r(u) - v(u)\Bigr], \qquad v \approx \log \frac{q(u)}{r(u)} .

The network G of noise may fold and branch, since nothing need be inverted. The critic v discriminates between draws of q and
of a reference r that has their mean and covariance (adaptive contrast), so that it has to learn only how q differs from that.
It is trained by logistic regression, a few steps for each step of the guide. The paper's reference is a normal distribution.
Here half of it is Student's t, so that it also covers draws far out, where the ratio to a normal density is so large that no
draw of the reference bounds it: the arms of a bent posterior became too heavy otherwise. At the exact critic the gradient of
the bound is :math:`\mathbb{E}[(\nabla_u \log p - \nabla_u \log r - \nabla_u v)^T\, \partial u / \partial\phi]`.

Mescheder, Nowozin and Geiger, *Adversarial Variational Bayes* (arXiv 1701.04722).
"""

from __future__ import annotations

__all__ = ["AdversarialGuide"]

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, log, pi

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.optim import Adam
from tqdm.auto import tqdm

from pyro_genmodels.families import GAN, DenseCritic
from pyro_genmodels.infer.adversarial import NonSaturating
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.posteriors.approximations import Whitened
from pyro_genmodels.posteriors.bound import MAX_NORM, warn_of_lost_draws
from pyro_genmodels.posteriors.fits import NUM_SAMPLES, GuidePosterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.pathfinder import find_start
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.weighted import Psis, psis
from pyro_genmodels.utils.errors import check_positive_int

BETAS = (0.5, 0.99)
"""Betas of Adam for both networks."""
DECAY = 0.9
"""Factor by which earlier draws count less, at each step, in the moments of the reference."""
DEGREES_OF_FREEDOM = 3.0
"""Degrees of freedom of Student's t in the reference."""
FINAL_SHARE = 0.5
"""Number of steps of the critic after training, as a share of the guide's steps."""
FINAL_FACTOR = 4
"""Factor by which there are more draws in these."""
NUM_MOMENT_DRAWS = 10_000
"""Number of draws for the moments of the reference after training."""
RIDGE = 1e-6
"""Share by which variances of the reference are raised, so that it is not singular."""


class ImplicitPosterior(GuidePosterior):
    """A guide without a density: its draws are independent, and a critic estimates their log density.

    So `psis` gives estimates: the bound and the evidence are off by the critic's error, and k-hat is that of the guide and the
    critic together.

    Args:
        problem: the model with its arguments.
        method: the method that made it.
        approximation: module whose call returns a distribution over the unconstrained coordinates, without a density.
        estimate: module with a method ``log_prob``, the estimate of its log density.
        losses: minus the estimated evidence lower bound at each step, (steps,), in nats.

    Attributes:
        estimate: the module.
    """

    def __init__(
        self, problem: Problem, method: AdversarialGuide, approximation: nn.Module, estimate: DensityEstimate, losses: Tensor
    ) -> None:
        super().__init__(problem, method, approximation, losses)
        self.estimate = estimate.eval().requires_grad_(False)

    @torch.no_grad()
    def psis(self, num_samples: int = NUM_SAMPLES) -> Psis:
        """Return draws of the guide with smoothed importance weights, of which the guide's density is an estimate.

        Args:
            num_samples: number of draws.
        """
        z = self.approximation().sample((num_samples,))
        log_p, _ = self.problem.batched(z)
        return psis(self.problem.coordinates.constrain(z), log_p, self.estimate.log_prob(z), is_estimate=True)


class DensityEstimate(nn.Module):
    """An estimate of the log density of draws: that of a reference with their moments, plus a critic's log ratio to it.

    Half of the reference is a normal distribution, half Student's t with the same location and scale.

    Args:
        critic: module from (n, dim) to (n,).
        loc: mean at the start, (dim,), in float64.
        covariance: covariance at the start, (dim, dim), in float64.
    """

    loc: Tensor
    covariance: Tensor
    scale_tril: Tensor

    def __init__(self, critic: nn.Module, loc: Tensor, covariance: Tensor) -> None:
        super().__init__()
        self.critic, self.objective = critic, NonSaturating()
        self.register_buffer("loc", loc)
        self.register_buffer("covariance", covariance)
        self.register_buffer("scale_tril", _cholesky(covariance))

    @property
    def reference(self) -> tuple[dist.TorchDistribution, dist.TorchDistribution]:
        """Both halves of the reference."""
        freedom = self.loc.new_tensor(DEGREES_OF_FREEDOM)
        return (
            dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False),
            dist.MultivariateStudentT(freedom, self.loc, self.scale_tril, validate_args=False),
        )

    @torch.no_grad()
    def adapt(self, z: Tensor, decay: float) -> None:
        """Move the moments of the reference towards those of draws.

        Args:
            z: draws, (n, dim); those that are not finite are left out.
            decay: factor of the earlier moments, from 0 to 1.
        """
        z = z[z.isfinite().all(1)].to(self.loc)
        mean, step = z.mean(0), z.mean(0) - self.loc
        centred = z - mean
        covariance = centred.T @ centred / len(z) + decay * torch.outer(step, step)
        self.loc, self.covariance = torch.lerp(mean, self.loc, decay), torch.lerp(covariance, self.covariance, decay)
        self.scale_tril = _cholesky(self.covariance)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the estimated log density of points, (n, dim), (n,), in nats."""
        parts = torch.stack([part.log_prob(z.to(self.loc)) for part in self.reference])
        return (parts.logsumexp(0) - log(2)).to(z) + self.log_ratio(z)

    def log_ratio(self, z: Tensor) -> Tensor:
        """Return the critic's estimate of the log of the ratio of the draws' density to the reference, (n,)."""
        white = torch.linalg.solve_triangular(self.scale_tril, (z.to(self.loc) - self.loc).T, upper=False).T
        return self.objective.log_ratio(self.critic(white.to(z)).to(z.dtype))

    def loss(self, z: Tensor) -> Tensor:
        """Return the loss of the critic for draws, (n, dim), with as many of the reference, ()."""
        numbers = (len(z) // 2, len(z) - len(z) // 2)
        other = torch.cat([part.sample((n,)) for part, n in zip(self.reference, numbers, strict=True)]).to(z)
        return self.objective.critic_loss(self.log_ratio(z), self.log_ratio(other)).mean()


@dataclass(frozen=True, repr=False)
class AdversarialGuide(Method):
    """A guide without a density, by adversarial variational Bayes (arXiv 1701.04722).

    A network maps noise to the unconstrained coordinates, after the linear map that a normal approximation of the posterior
    gives, so that it starts near it. It is more flexible than a flow of its size. But a critic estimates the log density of the
    guide, so that k-hat, the bound and the evidence of the fit's ``psis()`` are estimates too. `diagnose_posterior` and
    `compare_posteriors` leave these numbers out, and tell if the estimated k-hat is large. Judge the draws by a reference, such
    as chains, or by `simulation_based_calibration`. If the density is wanted, take `FlowGuide`.

    Attributes:
        hidden: widths of the hidden layers of the guide's network and of the critic's.
        extra_noise: number of coordinates of noise in addition to one for each coordinate of the posterior.
        num_steps: number of steps of Adam for the guide.
        num_draws: number of draws for each step.
        num_critic_steps: number of steps of the critic for each of these.
        step_size: step size at the beginning, from which that of the guide falls to zero as a cosine.

    Example:
        >>> import pyro
        >>> from pyro_genmodels.posteriors import posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> method = AdversarialGuide(num_steps=20)
        >>> fit = posterior(model, torch.tensor([1.0, 2.0, 3.0]), method=method, progress=False)
        >>> fit.get_samples(500)["loc"].shape
        torch.Size([500])
        >>> fit.psis().is_estimate
        True
    """

    hidden: Sequence[int] = (64, 64)
    extra_noise: int = 8
    num_steps: int = 1000
    num_draws: int = 256
    num_critic_steps: int = 5
    step_size: float = 3e-3

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("extra_noise", "num_steps", "num_draws", "num_critic_steps")}
        check_positive_int("AdversarialGuide", **counts)
        if not 0 < self.step_size < float("inf"):
            raise ValueError(f"AdversarialGuide wants a positive step_size, but found {self.step_size!r}.")

    def fit(self, problem: Problem) -> GuidePosterior:
        density = problem.batched
        start = find_start(density)
        n, like = len(start.loc), torch.zeros(0, dtype=problem.density.dtype, device=problem.density.device)
        loc, covariance = start.loc.to(like.device), start.covariance().to(like.device)
        generator, critic = NoiseNetwork(n, self.extra_noise, self.hidden), DenseCritic(hidden=self.hidden)
        gan = GAN((n,), latent_dim=n + self.extra_noise, generator=generator, critic=critic, standardize=False)
        guide = Whitened(gan, loc.to(like), torch.linalg.cholesky(covariance).to(like))
        estimate = DensityEstimate(gan.critic, loc, covariance)
        losses = self._train(guide, generator, estimate, density, progress=problem.progress)
        fit = ImplicitPosterior(problem, self, guide, estimate, losses)
        fit.num_gradients = density.num_gradients
        return fit

    def _train(
        self, guide: Whitened, generator: nn.Module, estimate: DensityEstimate, density: BatchedDensity, *, progress: bool
    ) -> Tensor:
        """Train guide and critic, then the critic alone, and return minus the estimated bound at each step, (steps,)."""
        networks = generator, estimate.critic
        optimizer, critic_optimizer = (Adam(net.parameters(), self.step_size, betas=BETAS, fused=True) for net in networks)
        num_final = max(1, round(FINAL_SHARE * self.num_steps))
        losses, num_lost = [], 0

        def step_of_critic(z: Tensor) -> None:
            critic_optimizer.zero_grad()
            estimate.loss(z).backward()
            critic_optimizer.step()

        with tqdm(total=self.num_steps + num_final, desc="AdversarialGuide", unit="step", disable=not progress) as bar:
            for i in range(self.num_steps):
                for z in guide().sample((self.num_critic_steps, self.num_draws)):
                    step_of_critic(z)
                optimizer.zero_grad()
                loss, lost = _backward(guide, estimate, density, self.num_draws)
                nn.utils.clip_grad_norm_(generator.parameters(), MAX_NORM)
                optimizer.param_groups[0]["lr"] = self.step_size * (1 + cos(pi * i / self.num_steps)) / 2
                optimizer.step()
                losses.append(loss)
                num_lost += lost
                bar.update()
                if i % 100 == 99:
                    bar.set_postfix_str(f"ELBO about {-sum(losses[-100:]) / 100:.5g}", refresh=False)
            estimate.adapt(guide().sample((NUM_MOMENT_DRAWS,)), decay=0.0)
            for i in range(num_final):
                critic_optimizer.param_groups[0]["lr"] = self.step_size * (1 + cos(pi * i / num_final)) / 2
                step_of_critic(guide().sample((FINAL_FACTOR * self.num_draws,)))
                bar.update()
        warn_of_lost_draws(num_lost, self.num_steps * self.num_draws)
        return torch.tensor(losses)


def _backward(guide: Whitened, estimate: DensityEstimate, density: BatchedDensity, num_draws: int) -> tuple[float, int]:
    """Add the gradient of minus the estimated bound to that of the guide's parameters, and adapt the reference to its draws.

    Returns:
        Minus the bound in nats, and the number of draws without a finite density, which are left out.
    """
    z = guide().rsample((num_draws,))
    estimate.adapt(z.detach(), DECAY)
    log_p, score_p = density(z)
    point = z.detach().requires_grad_()
    log_q = estimate.log_prob(point)
    (score_q,) = torch.autograd.grad(log_q.sum(), point)
    log_weight, direction = log_p - log_q.detach(), score_p - score_q
    finite = log_weight.isfinite() & direction.isfinite().all(1)
    if finite.any():
        direction = torch.where(finite[:, None], direction, 0.0)
        (-(z * direction).sum() / finite.sum()).backward()
    return -float(log_weight[finite].mean()), num_draws - int(finite.sum())


def _cholesky(covariance: Tensor) -> Tensor:
    """Return the Cholesky factor of a covariance, (dim, dim), whose variances are raised a little."""
    deviations = covariance.diagonal().sqrt()
    correlations = covariance / (deviations[:, None] * deviations)
    return deviations[:, None] * torch.linalg.cholesky(correlations + RIDGE * torch.eye(len(deviations)).to(correlations))


class NoiseNetwork(nn.Module):
    """A network of noise, which is the identity of its first coordinates at the start.

    Args:
        dim: number of coordinates of the output.
        extra_noise: number of further coordinates of the input.
        hidden: widths of the hidden layers.
    """

    def __init__(self, dim: int, extra_noise: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [dim + extra_noise, *hidden]
        layers = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in zip(widths, hidden, strict=False)]
        self.dim, self.hidden, self.last = dim, nn.Sequential(*layers), nn.Linear(widths[-1], dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, noise: Tensor) -> Tensor:
        return noise[:, : self.dim] + self.last(self.hidden(noise))
