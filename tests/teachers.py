"""Exact answers: closed forms, quadrature and sums that the library is judged against, written without it."""

from dataclasses import dataclass
from math import log, pi

import pyro.distributions as dist
import torch
from scipy import stats
from torch import nn

from pyro_genmodels.distributions.diffusion import ReverseDiffusion
from pyro_genmodels.dynamics.denoiser import DataPrediction, Denoiser


@dataclass(frozen=True)
class Gaussian:
    """N(loc, cov) in d dimensions: loc (d,), cov (d, d)."""

    loc: torch.Tensor
    cov: torch.Tensor

    def log_prob(self, x):
        d = x - self.loc
        quadratic = (d * torch.linalg.solve(self.cov, d.unsqueeze(-1)).squeeze(-1)).sum(-1)
        return -0.5 * (quadratic + self.cov.logdet() + len(self.loc) * log(2 * pi))

    def entropy(self):
        return 0.5 * (self.cov.logdet() + len(self.loc) * (1 + log(2 * pi)))

    def cross_entropy(self, q):
        d = self.loc - q.loc
        inverse = q.cov.inverse()
        return 0.5 * (q.cov.logdet() + len(self.loc) * log(2 * pi) + (inverse @ self.cov).trace() + d @ inverse @ d)

    def kl(self, q):
        return self.cross_entropy(q) - self.entropy()

    def distribution(self):
        return dist.MultivariateNormal(self.loc, self.cov)

    def without_closed_forms(self):
        """The same law as a mixture of one component, for which no closed form is registered."""
        one = torch.ones(1, dtype=self.loc.dtype)
        return dist.MixtureSameFamily(dist.Categorical(one), dist.MultivariateNormal(self.loc[None], self.cov[None]))


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line: weights, loc and scale (k,)."""

    weights: torch.Tensor
    loc: torch.Tensor
    scale: torch.Tensor

    def log_prob(self, x):
        z = (x[..., None] - self.loc) / self.scale
        return (self.weights.log() - self.scale.log() - 0.5 * z**2 - 0.5 * log(2 * pi)).logsumexp(-1)

    @property
    def mean(self):
        return self.weights @ self.loc

    @property
    def variance(self):
        return self.weights @ (self.loc**2 + self.scale**2) - self.mean**2

    def distribution(self):
        return dist.MixtureSameFamily(dist.Categorical(self.weights), dist.Normal(self.loc, self.scale))


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, I), x | z ~ N(W z + b, s^2 I): weight (d, l), bias (d,), scale s."""

    weight: torch.Tensor
    bias: torch.Tensor
    scale: float

    def marginal(self):
        d = len(self.bias)
        return Gaussian(self.bias, self.weight @ self.weight.T + self.scale**2 * torch.eye(d, dtype=self.bias.dtype))

    def posterior(self, x):
        """Of each row of x: means (n, l) and the covariance (l, l) they share."""
        precision = torch.eye(self.weight.shape[1], dtype=x.dtype) + self.weight.T @ self.weight / self.scale**2
        cov = precision.inverse()
        return (x - self.bias) @ self.weight @ cov / self.scale**2, cov

    def decoder(self):
        layer = nn.Linear(*reversed(self.weight.shape))
        layer.weight.data, layer.bias.data = self.weight.clone(), self.bias.clone()
        return layer

    def encoder(self, *, shift=0.0, spread=1.0):
        """The exact posterior where its covariance is diagonal, moved by `shift` and widened by `spread`."""
        return _Posterior(self, shift, spread)


class _Posterior(nn.Module):
    def __init__(self, teacher, shift, spread):
        super().__init__()
        self.teacher, self.shift, self.spread = teacher, shift, spread

    def forward(self, x):
        loc, cov = self.teacher.posterior(x)
        return loc + self.shift, (self.spread * cov.diagonal().sqrt()).expand_as(loc)


def orthogonal_linear_gaussian():
    """Three dimensions, two latent ones, and a posterior with a diagonal covariance."""
    weight = torch.tensor([[1.0, 0.5], [-1.0, 0.5], [0.0, 1.5]])
    return LinearGaussian(weight, torch.tensor([0.3, -0.2, 1.0]), 0.7)


def grid(low, high, n, dims=1):
    """Midpoints of n^dims cells of the cube [low, high]^dims, (n^dims, dims), and the volume of a cell."""
    width = (high - low) / n
    axis = low + width * (torch.arange(n) + 0.5)
    points = torch.cartesian_prod(*[axis] * dims)
    return points.reshape(-1, dims), width**dims


def integral(function, low, high, n=4000, dims=1):
    """The midpoint rule for a function of points (m, dims) on [low, high]^dims."""
    points, volume = grid(low, high, n, dims)
    return sum(function(part).sum(0) for part in points.split(20_000)) * volume


def outcomes(levels, dims):
    """All vectors of `dims` integers 0 .. levels - 1, (levels^dims, dims)."""
    return torch.cartesian_prod(*[torch.arange(levels)] * dims).reshape(-1, dims)


def perturb(module, scale=0.3):
    """Moves every parameter away from its initial value, so that nothing holds by luck of the start."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module


def assert_means(values, truth, alarm=1e-7):
    """Independent rows (n, ...) have these means: Student's t with Bonferroni's correction, a false alarm with this chance."""
    values = values.reshape(len(values), -1).double()
    truth = torch.as_tensor(truth, dtype=values.dtype).reshape(-1).expand(values.shape[1:])
    error = values.std(0) / len(values) ** 0.5
    bound = stats.t.isf(alarm / 2 / truth.numel(), len(values) - 1)
    off = (values.mean(0) - truth).abs()
    assert (off <= bound * error + 1e-10).all(), f"off by {(off / error).max():.1f} standard errors, of {bound:.1f} allowed"


def energy_of_machine(v, visible, hidden, pairs):
    """-log sum_h exp(s^T (visible, hidden) + s^T J s / 2) for s = (v, h): v (n, V), J symmetric, by a loop over h."""
    bias, terms = torch.cat([visible, hidden]), []
    for h in outcomes(2, len(hidden)) if len(hidden) else torch.zeros(1, 0):
        s = torch.cat([v, h.to(v).expand(len(v), -1)], 1)
        terms.append(s @ bias + 0.5 * torch.einsum("ni,ij,nj->n", s, pairs, s))
    return -torch.stack(terms).logsumexp(0)


class Noised:
    """What is known of data under noise x = alpha x_0 + sigma e: `data(x, alpha, sigma)`, the mean of x_0 given x (n, ...)."""

    def denoise(self, process):
        """As samplers ask it: (x (n, ...), t ()) -> estimates of the data."""
        return lambda x, t: self.data(x, process.alpha(t), process.sigma(t))

    def diffusion(self, process, event_shape, **options):
        """The diffusion whose network knows it, told the time of the process."""

        def network(x, t, context):
            alpha, sigma = (part.reshape(-1, *(1 for _ in x.shape[1:])) for part in (process.alpha(t), process.sigma(t)))
            return self.data(x * torch.hypot(alpha, sigma), alpha, sigma)

        return ReverseDiffusion(Denoiser(network, process, DataPrediction(), clock=False), event_shape, **options)


@dataclass(frozen=True)
class NoisedMixture(Noised):
    """Coordinates, each for itself of a mixture of Gaussians on the line."""

    law: Mixture

    def data(self, x, alpha, sigma):
        alpha, sigma, x = torch.as_tensor(alpha).unsqueeze(-1), torch.as_tensor(sigma).unsqueeze(-1), x.unsqueeze(-1)
        loc, variance = self.law.loc.to(x), self.law.scale.to(x) ** 2
        total, off = alpha**2 * variance + sigma**2, x - alpha * loc
        weights = (self.law.weights.to(x).log() - 0.5 * total.log() - 0.5 * off**2 / total).softmax(-1)
        return (weights * (loc + alpha * variance / total * off)).sum(-1)


@dataclass(frozen=True)
class NoisedGaussian(Noised):
    """Vectors (d,) of a Gaussian."""

    law: Gaussian

    def data(self, x, alpha, sigma):
        loc, (variance, axes) = self.law.loc.to(x), torch.linalg.eigh(self.law.cov.to(x))
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return loc + (gain * ((x - alpha * loc) @ axes)) @ axes.T


@dataclass(frozen=True)
class NoisedPoints(Noised):
    """The ideal denoiser of a finite data set, all of it as likely: points (m, *event_shape)."""

    points: torch.Tensor

    def data(self, x, alpha, sigma):
        points, rows = self.points.to(x).flatten(1), x.flatten(1)
        alpha, sigma = (torch.as_tensor(part).reshape(-1, 1) for part in (alpha, sigma))
        off = torch.cdist(rows / alpha, points).square() * (alpha / sigma) ** 2
        return ((-0.5 * off).softmax(1) @ points).reshape(x.shape)
