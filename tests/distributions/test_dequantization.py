"""Variational dequantisation: the density of learned noise, the bound, and how tight it is after training."""

from functools import partial
from math import log

import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from teachers import assert_means, outcomes, perturb
from torch import Size
from torch.testing import assert_close

from pyro_genmodels import MAF, NCSF, NSF, Dequantized, Flow, RealNVP, log_likelihood, train
from pyro_genmodels.distributions import LearnedNoise
from pyro_genmodels.families import Glow

LOC, SCALE = torch.tensor([1.3, 2.6]), torch.tensor([0.3, 0.5])


def noise_of(choice, features, **options):
    """Return noise of a perturbed flow that is given the integers alone."""
    return LearnedNoise(perturb(choice.build(features, features), 0.3), Size([features]), **options)


def narrow(noise=None):
    """Return integers 0 .. 3 in two dimensions under a normal density that is narrow beside a level."""
    return Dequantized(dist.Normal(LOC, SCALE).to_event(1), 4, dequantizer=noise)


def masses():
    """Return all 16 outcomes and their probabilities before clipping, by the distribution function."""
    x, cdf = outcomes(4, 2), dist.Normal(LOC.double(), SCALE.double()).cdf
    return x, (cdf(x + 1.0) - cdf(x.double())).prod(-1)


def test_draws_of_noise_follow_the_density_that_comes_with_them():
    """Right values: the density integrates to 1, and its distribution function gives uniform ranks (false alarms: 1e-6)."""
    noise, n = noise_of(NSF(transforms=2, hidden=(8,)), 1), 5000
    with torch.no_grad():
        u, log_q = noise(torch.full((n, 1), 2.0))
    u, order = u.squeeze(-1).double().sort()
    q = log_q[order].double().exp()
    assert 0 < u[0] < u[-1] < 1
    assert q.std() > 0.1
    cdf = torch.cat([q[0:1] * u[0], torch.trapezoid(torch.stack([q[:-1], q[1:]]), dim=0) * u.diff()]).cumsum(0)
    assert cdf[-1] + q[-1] * (1 - u[-1]) == pytest.approx(1.0, abs=5e-3)
    assert stats.kstest(cdf.numpy(), "uniform").statistic < (log(2e6) / (2 * n)) ** 0.5


@pytest.mark.parametrize("given_context", [False, True])
def test_noise_depends_on_the_integer_and_on_the_context(given_context):
    transform = perturb(MAF(transforms=1, hidden=(8,)).build(2, 5 if given_context else 2), 0.3)
    context = torch.randn(3).requires_grad_() if given_context else None
    noise = LearnedNoise(transform, Size([2]), context=context)
    x = torch.randint(4, (6, 5, 2)).float().requires_grad_()
    u, log_q = noise(x)
    assert (u.shape, log_q.shape) == (x.shape, (6, 5))
    gradients = torch.autograd.grad(log_q.sum() + u.sum(), (x, context) if given_context else x)
    assert all(g.any() for g in gradients)


def test_noise_of_the_identity_is_uniform():
    def identity(given):
        return dist.transforms.AffineTransform(torch.zeros(3), 1.0, event_dim=1)

    u, log_q = LearnedNoise(identity, Size([3]))(torch.zeros(4000, 3))
    assert_close(log_q, torch.zeros(4000), atol=1e-5, rtol=0)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-6


@pytest.mark.parametrize("choice", [MAF(transforms=2, hidden=(8,)), RealNVP(transforms=2, hidden=(8,))])
def test_weights_are_unbiased_estimates_of_the_mass(choice):
    x, mass = masses()
    with torch.no_grad():
        draws = narrow(noise_of(choice, 2)).log_prob(x.expand(20_000, 16, 2))
    likely = mass > 1e-3  # of others the weights have heavy tails
    assert_means(draws.exp()[:, likely], mass[likely])
    assert (draws.mean(0)[likely] < mass[likely].log()).all()


def test_trained_noise_makes_the_bound_tight():
    """A known density and known masses: the gap of the uniform noise nearly goes when noise alone is trained."""
    transform = RealNVP(transforms=3, hidden=(16,)).build(2, 2)
    learned, uniform = narrow(LearnedNoise(transform, Size([2]))), narrow()
    x, mass = masses()
    weights = (mass / mass.sum()).float()
    optimiser = torch.optim.Adam(transform.parameters(), lr=0.01)
    for _ in range(200):
        optimiser.zero_grad()
        loss = -(weights * learned.log_prob(x.expand(16, 16, 2))).sum(-1).mean()
        loss.backward()
        optimiser.step()
    exact = (weights * mass.log()).sum()
    with torch.no_grad():
        gaps = [exact - (weights * d.log_prob(x.expand(2000, 16, 2))).sum(-1) for d in (learned, uniform)]
    assert gaps[1].mean() > 0.5
    assert -5 * gaps[0].std() / 2000**0.5 < gaps[0].mean() < 0.1 * gaps[1].mean()


def test_the_bound_that_trains_contains_the_noise():
    flow = Flow((3,), transform=MAF(transforms=1, hidden=(8,)), levels=4, dequantization=RealNVP(transforms=2, hidden=(8,)))
    perturb(flow, 0.3)
    x, values = torch.randint(4, (5, 3)), []
    for bound in (flow().log_prob, flow().training_log_prob):
        torch.manual_seed(0)
        values.append(bound(x))
    assert values[0].equal(values[1])
    gradients = torch.autograd.grad(values[0].sum(), list(flow.noise_transform.parameters()))
    assert any(g.any() for g in gradients)


def test_other_objectives_see_uniform_noise():
    flow = Flow((3,), levels=4, dequantization=RealNVP(transforms=2, hidden=(8,)))
    x = torch.randint(4, (4000, 3))
    _, noisy = flow().dequantize(x)
    assert stats.kstest((noisy - x).flatten().numpy(), "uniform").pvalue > 1e-6


def test_noise_in_double_precision_stays_below_the_next_integer():
    flow = Flow((2,), levels=2**16, dequantization=RealNVP(transforms=2, hidden=(8,)), standardize=False)
    x = torch.randint(2**16, (4000, 2))
    values, log_q = flow()._noisy(x)
    assert (values.dtype, log_q.dtype) == (torch.float64, torch.float32)
    assert (x <= values).all()
    assert (values < x + 1).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dequantization": RealNVP()}, ValueError, "give levels=K"),
        ({"dequantization": NCSF(), "levels": 4}, ValueError, "layers over all real numbers .* NCSF has the support"),
        ({"dequantization": "uniform", "levels": 4}, TypeError, "Flow wants a dequantization such as RealNVP"),
        ({"dequantization": Glow(), "levels": 4}, ValueError, r"Glow\(levels=2\) wants images"),
    ],
)
def test_a_choice_of_noise_that_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Flow((3,), **options)


@pytest.mark.slow
def test_a_flow_with_learned_noise_has_a_tighter_bound_than_one_with_uniform_noise():
    """Right values: the entropy of data whose masses are known, and each flow's own masses by quadrature."""
    x, mass = masses()
    law = torch.distributions.Categorical(mass / mass.sum())
    data, test = x[law.sample((2000,))], x[law.sample((1000,))]
    bounds, gaps = {}, {}
    for name, dequantization in (("uniform", None), ("learned", NSF(transforms=2, hidden=(32,)))):
        torch.manual_seed(0)
        flow = Flow((2,), transform=RealNVP(transforms=4, hidden=(32,)), levels=4, dequantization=dequantization)
        train(flow, data, epochs=20, batch_size=100, optim=partial(torch.optim.Adam, lr=3e-3), progress=False)
        one, ten = (log_likelihood(flow, test, num_samples=k) for k in (1, 10))
        with torch.no_grad():
            u = torch.cartesian_prod(*2 * [(torch.arange(200) + 0.5) / 200])
            cells = flow().base.log_prob(x.unsqueeze(1) + u).logsumexp(1) - 2 * log(200)
            many = flow().log_prob(x.expand(1000, 16, 2)).logsumexp(0) - log(1000)
        at = test[:, 0] * 4 + test[:, 1]
        assert (one.kind, ten.kind) == ("lower bound", "lower bound")
        assert one.mean < ten.mean < float(cells[at].mean()) + 0.01
        assert float(many[at].mean()) == pytest.approx(float(cells[at].mean()), abs=0.01)
        bounds[name], gaps[name] = one.mean, float(cells[at].mean()) - one.mean
    assert gaps["learned"] < 0.5 * gaps["uniform"]
    assert bounds["uniform"] < bounds["learned"] < float(law.logits[at].mean()) + 0.05


@pytest.mark.parametrize("options", [{}, {"transform": RealNVP(transforms=1, hidden=(8,))}, {"context": 2}])
def test_probabilities_of_a_flow_over_levels_sum_to_one_and_are_those_of_its_draws(options):
    """Right values: 1, and shares of draws; false alarms below 1e-5 by five standard errors of 16 outcomes each."""
    flow, x = Flow((2,), levels=4, **options), outcomes(4, 2)
    flow.prepare(torch.randint(4, (500, 2)), torch.randn(500, 2) if "context" in options else None)
    flow.eval()
    d = flow(torch.zeros(2)) if "context" in options else flow()
    n = 4000
    with torch.no_grad():
        p = d.log_prob(x.expand(n, 16, 2)).exp().double()
        draws = d.sample((n,))
    error = p.std(0) / n**0.5
    assert abs(p.mean(0).sum().item() - 1) < 5 * error.square().sum().sqrt().item()
    share = (draws[:, None] == x).all(-1).double().mean(0)
    spread = (p.mean(0) * (1 - p.mean(0)).clamp(min=0) / n + error.square()).sqrt()
    assert ((share - p.mean(0)).abs() < 5.5 * spread + 5 / n).all()
