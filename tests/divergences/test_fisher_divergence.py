"""The Fisher divergence: value, error and gradient against closed forms.

A comparison at six standard errors has a false-alarm rate of 2e-9; where a test says otherwise, it gives its own.
"""

import pyro.distributions as dist
import pytest
import torch
from normals import FORMS, not_reparametrised

from pyro_genmodels import VAE, Autoregressive, BernoulliLikelihood, Dequantized, EnergyModel, Flow
from pyro_genmodels.distributions import Energy
from pyro_genmodels.divergences import fisher

pytestmark = pytest.mark.usefixtures("float64")


def fisher_of_normals(loc_p, scale_p, loc_q, scale_q):
    return (scale_p**-2 - scale_q**-2) ** 2 * scale_p**2 + (loc_p - loc_q) ** 2 / scale_q**4


@pytest.mark.parametrize("form", FORMS)
def test_fisher_meets_the_closed_form_and_its_standard_error_is_calibrated(form):
    """2000 independent estimates."""
    repeats, numbers = 2000, torch.tensor([0.3, 0.8, 0.5, 1.4])
    loc_p, scale_p, loc_q, scale_q = (n.expand(repeats) for n in numbers)
    value, error = fisher(form(loc_p, scale_p), form(loc_q, scale_q), num_samples=1000)
    assert abs(value.mean() - fisher_of_normals(*numbers)) < 6 * value.std() / repeats**0.5
    torch.testing.assert_close(error.mean(), value.std(), rtol=6 / (2 * repeats) ** 0.5, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_fisher_is_of_the_parameters_of_q_and_that_of_the_closed_form(form):
    repeats, numbers = 2000, torch.tensor([0.3, 0.8, 0.5, 1.4])
    exact = torch.autograd.functional.jacobian(fisher_of_normals, tuple(numbers))[2:]
    many = [n.expand(repeats).clone().requires_grad_() for n in numbers]
    value = fisher(form(*many[:2]), form(*many[2:]), num_samples=50).value
    of_p, of_q = (torch.autograd.grad(value.sum(), part, allow_unused=True, retain_graph=True) for part in (many[:2], many[2:]))
    assert of_p == (None, None)
    for truth, estimates in zip(exact, of_q, strict=True):
        assert abs(estimates.mean() - truth) < 6 * estimates.std() / repeats**0.5


def test_a_family_can_be_fitted_by_fisher():
    p, energy = dist.Normal(torch.zeros(2), 1.0).to_event(1), EnergyModel((2,), standardize=False)
    value = fisher(p, energy(), num_samples=50).value
    value.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in energy.parameters())
    with torch.no_grad():
        assert not fisher(p, energy(), num_samples=50).value.requires_grad


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_fisher_of_every_event_shape_and_of_energies(shape):
    n = torch.Size(shape).numel()
    p, q = (dist.Normal(torch.full(shape, loc), 1.0).to_event(len(shape)) for loc in (0.0, 0.5))
    assert abs(fisher(p, q, num_samples=10).value - n / 4) < 1e-12
    energy = Energy(lambda x: 0.5 * x.square().reshape(len(x), -1).sum(-1), shape, num_steps=20)
    assert abs(fisher(energy, q, num_samples=10).value - n / 4) < 1e-12


def test_fisher_is_of_scores_in_the_units_of_the_data():
    flat, normal = dist.Uniform(torch.tensor(0.0), 1.0), dist.Normal(torch.tensor(0.0), 1.0)
    value, error = fisher(flat, normal)
    assert abs(value - 1 / 3) < 6 * error
    assert fisher(flat, flat) == (0, 0)


def test_missing_mass_makes_fisher_infinite_without_error():
    p = not_reparametrised(torch.tensor([0.0, 0.5]), torch.tensor([1.0, 1e-3]))
    value, error = fisher(p, dist.Uniform(torch.zeros(2), 1.0), num_samples=1000)
    assert value[0] == torch.inf
    assert error[0] == 0
    assert value[1].isfinite()
    assert error[1].isfinite()


def test_fisher_broadcasts_batches_and_contexts():
    p, q = not_reparametrised(torch.zeros(3, 1), torch.ones(3, 1)), dist.Normal(torch.arange(4.0), 1.0)
    value, error = fisher(p, q, num_samples=10)
    assert value.shape == error.shape == (3, 4)
    torch.testing.assert_close(value, (torch.arange(4.0) ** 2).expand(3, 4))
    assert fisher(Flow((2,), context=1)(torch.zeros(5, 1)), EnergyModel((2,))(), num_samples=10).value.shape == (5,)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: dist.Normal(torch.zeros(3), 1.0).to_event(1), r"\(2,\) and q \(3,\)"),
        (lambda: Autoregressive((2,), likelihood=BernoulliLikelihood())(), "q is an Autoregression over.*Use kl"),
        (lambda: Dequantized(Flow((2,))(), levels=4), "q is a Dequantized over"),
        (lambda: VAE((2,), latent_dim=1)(), "q is an Implicit.*Trace_ELBO"),
    ],
    ids=["event shape", "discrete", "dequantized", "no density"],
)
def test_distributions_without_a_score_are_refused_by_fisher(build, match):
    with pytest.raises(ValueError, match=match):
        fisher(Flow((2,))(), build())


@pytest.mark.parametrize("num_samples", [0, 1])
def test_a_standard_error_of_fisher_takes_two_samples(num_samples):
    with pytest.raises(ValueError, match="num_samples"):
        fisher(dist.Normal(torch.zeros(()), 1.0), dist.Normal(0.0, 1.0), num_samples=num_samples)
