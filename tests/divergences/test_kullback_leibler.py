"""The Kullback-Leibler divergence: value, error and gradient against closed forms.

A comparison at six standard errors has a false-alarm rate of 2e-9; where a test says otherwise, it gives its own.
"""

from math import log

import pyro.distributions as dist
import pytest
import torch
from normals import FORMS, not_reparametrised, reparametrised
from teachers import Gaussian

from pyro_genmodels import Autoregressive, BernoulliLikelihood, Dequantized, Flow, NormalLikelihood
from pyro_genmodels.divergences import kl, reverse_kl
from pyro_genmodels.families import VAE

pytestmark = pytest.mark.usefixtures("float64")


def closed_form(loc_p, scale_p, loc_q, scale_q):
    return (scale_q / scale_p).log() + (scale_p**2 + (loc_p - loc_q) ** 2) / (2 * scale_q**2) - 0.5


@pytest.mark.parametrize("divergence", [kl, reverse_kl])
@pytest.mark.parametrize("form", FORMS)
def test_the_estimate_meets_the_closed_form(form, divergence):
    numbers = torch.tensor([0.3, 0.8, -0.5, 1.4])
    truth = closed_form(*numbers) if divergence is kl else closed_form(*numbers[[2, 3, 0, 1]])
    p = form(*numbers[:2]) if divergence is kl else dist.Normal(*numbers[:2])
    q = dist.Normal(*numbers[2:]) if divergence is kl else form(*numbers[2:])
    value, error = divergence(p, q, num_samples=20_000)
    assert 0 < error < 0.03
    assert abs(value - truth) < 6 * error


def test_closed_forms_are_used_and_have_no_error():
    p, q = dist.Normal(torch.tensor(0.3), 0.8), dist.Normal(torch.tensor(-0.5), 1.4)
    value, error = kl(p, q)
    torch.testing.assert_close(value, closed_form(*torch.tensor([0.3, 0.8, -0.5, 1.4])))
    assert error == 0
    assert kl(p, p).value == 0
    torch.testing.assert_close(kl(p.expand((3,)).to_event(1), q.expand((3,)).to_event(1)).value, 3 * value)


def test_a_family_does_not_diverge_from_itself():
    for family in (
        Flow((2,)),
        Autoregressive((2,), likelihood=NormalLikelihood()),
        Autoregressive((3,), likelihood=BernoulliLikelihood()),
    ):
        value, error = kl(family(), family(), num_samples=100)
        assert value == 0
        assert error == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_standard_error_is_calibrated(form):
    """2000 independent estimates: z has mean 0 and deviation 1, within six of their own errors."""
    repeats = 2000
    shape = torch.zeros(repeats)
    value, error = kl(form(shape, shape + 1), dist.Normal(shape + 1, shape + 1), num_samples=400)
    z = (value - 0.5) / error
    assert abs(z.mean()) < 6 / repeats**0.5
    assert abs(z.std() - 1) < 6 / (2 * repeats) ** 0.5
    torch.testing.assert_close(error.mean(), torch.tensor(1 / 400**0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_the_closed_form(form):
    """By reparametrised draws or by the score function: 2000 independent estimates each."""
    repeats, numbers = 2000, torch.tensor([0.3, 0.8, -0.5, 1.4])
    exact = torch.autograd.functional.jacobian(closed_form, tuple(numbers))
    many = [n.expand(repeats).clone().requires_grad_() for n in numbers]
    value = kl(form(*many[:2]), dist.Normal(*many[2:]), num_samples=50).value
    for truth, estimates in zip(exact, torch.autograd.grad(value.sum(), many), strict=True):
        assert abs(estimates.mean() - truth) < 6 * estimates.std() / repeats**0.5


def test_the_gradient_of_a_discrete_family_is_that_of_the_sum():
    """The score function of an Autoregressive, 100 estimates of each gradient."""
    made, q = (
        Autoregressive((2,), likelihood=BernoulliLikelihood(), hidden=(4,)),
        dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1),
    )
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    exact = (made().log_prob(x).exp() * (made().log_prob(x) - q.log_prob(x))).sum()
    bias = made.conditionals.output.bias
    (truth,) = torch.autograd.grad(exact, bias)
    found = torch.stack([torch.autograd.grad(kl(made(), q, num_samples=100).value, bias)[0] for _ in range(100)])
    assert ((found.mean(0) - truth).abs() < 6 * found.std(0) / 10).all()


@pytest.mark.parametrize("form", FORMS)
def test_missing_mass_makes_kl_infinite_without_error(form):
    loc = torch.tensor([0.0, 0.5]).requires_grad_()
    value, error = kl(form(loc, torch.tensor([1.0, 1e-3])), dist.Uniform(torch.zeros(2), 1.0))
    assert value[0] == torch.inf
    assert error[0] == 0
    assert value[1].isfinite()
    assert error[1].isfinite()


def test_missing_mass_in_one_coordinate_makes_kl_of_vectors_infinite():
    p = Gaussian(torch.tensor([0.5, 0.0]), torch.eye(2) * 1e-2).without_closed_forms()
    inside = dist.Uniform(torch.tensor([-9.0, -9.0]), torch.tensor([9.0, 9.0])).to_event(1)
    outside = dist.Uniform(torch.tensor([-9.0, 5.0]), torch.tensor([9.0, 9.0])).to_event(1)
    assert kl(p, inside).value.isfinite()
    assert kl(p, outside) == (torch.inf, 0)


def test_missing_mass_of_a_discrete_model_makes_kl_infinite():
    made = Autoregressive((1,), likelihood=BernoulliLikelihood())
    assert kl(made(), dist.Bernoulli(torch.ones(1)).to_event(1)) == (torch.inf, 0)


@pytest.mark.parametrize("divergence", [kl, reverse_kl])
def test_batch_shapes_broadcast(divergence):
    p = not_reparametrised(torch.zeros(3, 1), torch.ones(3, 1))
    q = dist.Normal(torch.arange(4.0), 1.0)
    value, error = divergence(p, q, num_samples=2000)
    assert value.shape == error.shape == (3, 4)
    truth = (torch.arange(4.0) ** 2 / 2).expand(3, 4)
    assert ((value - truth).abs() <= 6 * error + 1e-12).all()


def test_families_broadcast_over_their_context():
    p, q = Flow((2,), context=1), Flow((2,))
    value, error = kl(p(torch.zeros(5, 1)), q(), num_samples=10)
    assert value.shape == error.shape == (5,)


def test_summary_of_the_result():
    divergence = kl(dist.Normal(0.0, 1.0), dist.Normal(0.0, 2.0))
    assert divergence.value is divergence[0]
    assert divergence.std_error is divergence[1]
    torch.testing.assert_close(divergence.value, torch.tensor(log(2) - 3 / 8))


def test_different_event_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and q \(\).*to_event"):
        kl(Flow((2,))(), dist.Normal(0.0, 1.0))


def test_a_lower_bound_is_no_density_for_kl():
    bound = Dequantized(dist.Uniform(torch.zeros(2), 4.0).to_event(1), levels=4)
    with pytest.raises(ValueError, match="Dequantized, whose density is: lower bound"):
        kl(bound, bound)


def test_implicit_distributions_have_no_density_for_kl():
    vae = VAE((2,), latent_dim=1)
    with pytest.raises(ValueError, match="Implicit, whose density is: none"):
        kl(Flow((2,))(), vae())


@pytest.mark.parametrize("num_samples", [0, 1])
def test_a_standard_error_takes_two_samples(num_samples):
    with pytest.raises(ValueError, match="num_samples"):
        kl(reparametrised(torch.zeros(()), torch.ones(())), dist.Normal(0.0, 1.0), num_samples=num_samples)
