"""Likelihoods of draws without a density, through Gaussian noise: closed forms, tightness, what is read and what is refused."""

from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless

from pyro_genmodels import GAN, DenseCritic, DenseGenerator, Flow, compare
from pyro_genmodels.distributions import Implicit
from pyro_genmodels.evaluation import gaussian_observation_likelihood
from pyro_genmodels.families.family import Family
from pyro_genmodels.samplers import Hamiltonian

pytestmark = pytest.mark.usefixtures("float64")
SMALL = {"generator": DenseGenerator((8,)), "critic": DenseCritic((8,)), "latent_dim": 2}


class Linear(Family):
    """x = W z + b + V c, without noise."""

    def __init__(self, dims, latent, context=0):
        super().__init__((dims,), context=context)
        generator = torch.Generator().manual_seed(3)
        self.w = torch.nn.Parameter(torch.randn(dims, latent, generator=generator) / latent**0.5)
        self.b = torch.nn.Parameter(torch.arange(1.0, dims + 1))

    def forward(self, context=None):
        context = self.embed(context)

        def likelihood(z, c):
            x = z @ self.w.T + self.b
            return dist.Delta(x if c is None else x + c.sum(-1, keepdim=True), event_dim=1)

        prior = dist.Normal(torch.zeros(self.w.shape[1]), 1.0).to_event(1)
        return Implicit(prior, likelihood, self.event_shape, context=context)

    def truth(self, sigma):
        return dist.MultivariateNormal(self.b, self.w @ self.w.T + sigma**2 * torch.eye(len(self.b)))


@pytest.mark.parametrize(("dims", "latent", "steps"), [(3, 2, 150), pytest.param(25, 20, 300, marks=pytest.mark.slow)])
def test_a_linear_map_meets_the_closed_form(dims, latent, steps):
    """Each mean weight is right on average: within six of its errors, and what the path is too short for."""
    fit = Linear(dims, latent)
    with torch.no_grad():
        truth = fit.truth(0.5)
        x = truth.sample((10,))
        found = gaussian_observation_likelihood(fit, x, sigma=0.5, num_steps=steps, num_chains=32, seed=1)
        gap = truth.log_prob(x) - found.values
    assert (found.kind, found.num_samples, found.observation_noise) == ("lower bound", 32, 0.5)
    assert (gap.abs() < 6 * found.std_error + 0.1).all()
    assert abs(gap.mean()) < 0.15
    assert "(lower bound, k=32, n=10, with Gaussian observation noise 0.5" in str(found)


@pytest.mark.slow
def test_more_steps_are_tighter_and_it_is_low_on_average():
    fit = Linear(25, 20)
    with torch.no_grad():
        x = fit.truth(0.2).sample((20,))
        steps = (10, 20, 40, 80)
        found = [gaussian_observation_likelihood(fit, x, sigma=0.2, num_steps=n, num_chains=2, seed=1) for n in steps]
        gaps = [fit.truth(0.2).log_prob(x) - one.values for one in found]
    means = [gap.mean().item() for gap in gaps]
    assert means == sorted(means, reverse=True)
    assert means[-1] > -0.2


def test_each_row_has_its_own_context_in_batches_of_any_size():
    short = {"num_steps": 100, "num_chains": 16}
    fit, context = Linear(3, 2, context=1), torch.arange(6.0)[:, None]
    with torch.no_grad():
        truth = dist.MultivariateNormal(fit.b + context, fit.truth(0.5).covariance_matrix)
        x = truth.sample()
        for batch_size in (1000, 70):
            found = gaussian_observation_likelihood(fit, x, context, sigma=0.5, batch_size=batch_size, **short)
            assert (truth.log_prob(x) - found.values).abs().max() < 0.3


@pytest.mark.parametrize("of", slow_unless(["valid"], ["itself", "valid"]))
def test_sigma_is_chosen_near_that_of_the_data(of):
    """Among halves: of noise 0.3 on data of deviation near 1."""
    fit = Linear(8, 2)
    with torch.no_grad():
        x, valid = fit.truth(0.3).sample((20,)), fit.truth(0.3).sample((20,))
    options = {"num_steps": 15, "num_chains": 2, "seed": 1, "sampler": Hamiltonian(num_leapfrog=3)}
    found = gaussian_observation_likelihood(fit, x, valid=valid if of == "valid" else None, **options)
    assert 0.15 < found.observation_noise < 0.6


def bounded(x):
    prior = dist.Uniform(torch.zeros(2), 1.0).to_event(1)
    with pyro.plate("data", len(x)):
        pyro.sample("x", Implicit(prior, lambda z, c: dist.Normal(z, 9.0).to_event(1), (2,)), obs=x)


def test_a_model_with_a_bounded_prior_and_a_noisy_likelihood():
    """A uniform square, blurred."""
    x = torch.tensor([[0.5, 0.5], [0.0, 1.2]])
    found = gaussian_observation_likelihood((bounded, lambda x: None), x, sigma=0.3, num_steps=100, num_chains=64, seed=1)
    normal = dist.Normal(0.0, 1.0)
    truth = (normal.cdf((1 - x) / 0.3) - normal.cdf(-x / 0.3)).log().sum(-1)
    assert (found.values - truth).abs().max() < 0.15


def test_a_comparison_shows_the_noise():
    x = torch.randn(6, 3)
    noisy = gaussian_observation_likelihood(Linear(3, 2), x, sigma=0.5, num_steps=20, num_chains=2)
    comparison = compare({"linear": noisy, "flow": Flow((3,))}, x)
    assert comparison.table.loc["linear", "observation_noise"] == 0.5
    assert "linear: Gaussian observation noise 0.5 was added" in str(comparison)


class Dropping(Linear):
    """A linear map of z, of which half is dropped in training mode."""

    def __init__(self, dims, latent):
        super().__init__(dims, latent)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, context=None):
        made = super().forward(context)
        return Implicit(made.prior, lambda z, c: made.likelihood(self.dropout(z), c), self.event_shape)


def test_dropout_is_off_and_the_mode_is_put_back():
    fit, x = Dropping(3, 2), torch.randn(4, 3)
    options = {"sigma": 0.5, "num_steps": 10, "num_chains": 2, "seed": 1}
    found = gaussian_observation_likelihood(fit, x, **options)
    assert fit.training
    assert fit.dropout.training
    assert torch.equal(found.values, gaussian_observation_likelihood(Linear(3, 2), x, **options).values)


def test_a_seed_fixes_the_values_and_one_chain_has_no_error():
    x = torch.randn(4, 3)
    a, b = (gaussian_observation_likelihood(Linear(3, 2), x, sigma=0.5, num_steps=10, num_chains=1, seed=7) for _ in range(2))
    assert torch.equal(a.values, b.values)
    assert a.std_error.isnan().all()
    assert not a.values.requires_grad


# What is refused.


def model_of(law):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", law, obs=x)

    return model, lambda x: None


def test_fits_without_an_implicit_distribution_are_refused():
    x = torch.randn(4, 2)
    discrete = Implicit(dist.Bernoulli(0.5), lambda z, c: dist.Delta(torch.stack([z, z], -1), event_dim=1), (2,))
    cases = [
        (Flow((2,)), x, r"samples from one Implicit.*found NormalizingFlow.*log_likelihood"),
        (model_of(discrete), x, "prior is a Bernoulli over Boolean"),
        (Linear(3, 2), x, r"\(N, \*\(3,\)\), but found \(4, 2\)"),
    ]
    for fit, data, found in cases:
        with pytest.raises(ValueError, match=found):
            gaussian_observation_likelihood(fit, data, sigma=1.0)


@pytest.mark.parametrize("options", [{"sigma": 0.0}, {"sigma": -1.0}, {"num_chains": 0}, {"num_steps": 0}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=r"positive|of 1 or more"):
        gaussian_observation_likelihood(Linear(3, 2), torch.randn(4, 3), **{"sigma": 1.0, **options})


def test_integers_are_scored_at_the_middle_of_their_unit():
    gan, x = GAN((2,), levels=5, **SMALL), torch.randint(5, (6, 2))
    reals = GAN((2,), **SMALL)
    reals.load_state_dict(gan.state_dict())
    options = {"sigma": 1.0, "num_chains": 4, "num_steps": 20, "seed": 0}
    found = gaussian_observation_likelihood(gan, x, **options)
    assert torch.equal(found.values, gaussian_observation_likelihood(reals, x + 0.5, **options).values)


@pytest.mark.parametrize(("unit", "dtype"), [(1e-21, torch.float32), (1e21, torch.float32), (1.0, torch.float64)])
def test_the_unit_and_precision_of_the_data_change_no_observation_likelihood(unit, dtype):
    """Squares in single precision were NaN or infinite, and rows in doubles ended in an error of torch."""
    values = {}
    for size, kind in ((1.0, torch.float32), (unit, dtype)):
        torch.manual_seed(0)
        gan, x = GAN((2,), latent_dim=2), torch.randn(20, 2)
        gan.standardize(x * size)
        found = gaussian_observation_likelihood(
            gan.eval(), (x[:5] * size).to(kind), sigma=0.5 * size, num_steps=20, num_chains=4, seed=1
        )
        values[kind, size] = found.values.double() + 2 * log(size)
    first, second = values.values()
    torch.testing.assert_close(second, first, rtol=0, atol=1e-3)
