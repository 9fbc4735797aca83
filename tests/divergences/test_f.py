"""f-divergences of densities: value, error and gradient against closed forms and quadrature.

A comparison at six standard errors has a false-alarm rate of 2e-9.
"""

from math import inf, log

import pyro.distributions as dist
import pytest
import torch
from convex_functions import NAMED, TRIANGULAR
from normals import FORMS, not_reparametrised, reparametrised
from teachers import integral

from pyro_genmodels import Autoregressive, BernoulliLikelihood, Dequantized, Flow
from pyro_genmodels.divergences import (
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
    f_divergence,
    js,
    kl,
    reverse_kl,
    tv,
)

pytestmark = pytest.mark.usefixtures("float64")
FUNCTIONS = [*NAMED, TRIANGULAR]
NUMBERS = torch.tensor([0.3, 0.9, -0.5, 1.1]).double()  # loc and scale of p, of q


def by_quadrature(f, loc_p, scale_p, loc_q, scale_q):
    def term(x):
        log_p, log_q = dist.Normal(loc_p, scale_p).log_prob(x[:, 0]), dist.Normal(loc_q, scale_q).log_prob(x[:, 0])
        return log_q.exp() * f((log_p - log_q).exp())

    return integral(term, -9, 9)


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat")  # Neyman's terms have k = 0.8
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_the_estimate_and_its_gradient_meet_quadrature(f, form):
    """And the error is calibrated: 500 independent estimates of each."""
    repeats = 500
    exact = by_quadrature(f, *NUMBERS)
    slopes = torch.autograd.functional.jacobian(lambda *n: by_quadrature(f, *n), tuple(NUMBERS))
    many = [n.expand(repeats).clone().requires_grad_() for n in NUMBERS]
    value, error = f_divergence(form(*many[:2]), form(*many[2:]), f, num_samples=500)
    assert abs(value.mean() - exact) < 6 * value.std() / repeats**0.5
    if not isinstance(f, PearsonChiSquared | NeymanChiSquared):  # whose terms have heavy tails
        torch.testing.assert_close(error.mean(), value.detach().std(), rtol=6 / (2 * repeats) ** 0.5, atol=0)
    assert not error.requires_grad
    for truth, estimates in zip(slopes, torch.autograd.grad(value.sum(), many), strict=True):
        assert abs(estimates.mean() - truth) < 6 * estimates.std() / repeats**0.5


def test_closed_forms_are_used_and_have_no_error():
    p, q = dist.Normal(*NUMBERS[:2]), dist.Normal(*NUMBERS[2:])
    assert f_divergence(p, q, KullbackLeibler()) == kl(p, q)
    assert f_divergence(p, q, ReverseKullbackLeibler()) == reverse_kl(p, q)
    assert f_divergence(p, q, Jeffreys()) == (kl(p, q).value + kl(q, p).value, 0)
    assert js(p, q).std_error > 0


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_numbers_with_the_same_finite_support_are_summed(f):
    p, q = dist.Categorical(torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8]])), dist.Categorical(torch.tensor([0.6, 0.3, 0.1]))
    value, error = f_divergence(p, q, f)
    torch.testing.assert_close(value, (q.probs * f(p.probs / q.probs)).sum(-1))
    assert (error == 0).all()


def test_sums_are_taken_across_kinds_of_distribution_and_across_supports():
    value, error = tv(dist.Bernoulli(torch.tensor(0.2)), dist.Categorical(torch.tensor([0.5, 0.5])))
    assert abs(value - 0.3) < 1e-12
    assert error == 0
    few, many = dist.Binomial(2, torch.tensor(0.5)), dist.Binomial(5, torch.tensor(0.5))
    value, error = tv(few, many)
    x = torch.arange(6.0)
    truth = (torch.cat([few.log_prob(x[:3]).exp(), torch.zeros(3)]) - many.log_prob(x).exp()).abs().sum() / 2
    torch.testing.assert_close(value, truth)
    assert error == 0
    assert kl(many, few) == f_divergence(many, few, KullbackLeibler()) == (inf, 0)


def test_the_gradient_of_a_sum_is_exact_also_with_impossible_outcomes():
    logits = torch.tensor([0.3, -0.2, 0.1]).requires_grad_()
    p = dist.Categorical(logits=torch.cat([logits, torch.tensor([-inf])]))
    q = dist.Categorical(logits=torch.tensor([0.0, 0.0, -inf, -inf]))
    probs = logits.softmax(0)
    truth = (probs - torch.tensor([0.5, 0.5, 0.0])).abs().sum() / 2
    value = tv(p, q).value
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, truth)))


LIMITS = {"KullbackLeibler": inf, "JensenShannon": log(2), "TotalVariation": 1.0, "SquaredHellinger": 1.0, "Convex": 2.0}


@pytest.mark.parametrize("f", [f for f in FUNCTIONS if type(f).__name__ in LIMITS], ids=lambda f: type(f).__name__)
def test_disjoint_supports_are_at_the_largest_distance_without_error(f):
    low, high = (dist.Uniform(torch.tensor(loc), loc + 1) for loc in (0.0, 2.0))
    for apart in ((low, high), (not_reparametrised(torch.tensor(0.5), torch.tensor(1e-3)), high)):
        value, error = f_divergence(*apart, f)
        torch.testing.assert_close(value, torch.tensor(LIMITS[type(f).__name__]), check_dtype=False)
        assert error < 1e-7


def test_points_outside_of_one_support_contribute_the_limits():
    """U(0, 1) and U(0, 4): half of p's ratio is known, and three quarters of q are outside."""
    p, q = dist.Uniform(torch.tensor(0.0), 1.0), dist.Uniform(torch.tensor(0.0), 4.0)
    for f in (JensenShannon(), TotalVariation(), SquaredHellinger(), PearsonChiSquared(), TRIANGULAR):
        for one, other, truth in (
            (p, q, f(torch.tensor(4.0)) / 4 + 0.75 * f.at_zero),
            (q, p, f(torch.tensor(0.25)) + 0.75 * f.slope_at_infinity),
        ):
            value, error = f_divergence(one, other, f)
            assert value == truth == inf or abs(value - truth) < 6 * error
            assert error.isfinite()
    assert f_divergence(p, q, ReverseKullbackLeibler()) == (inf, 0)


@pytest.mark.parametrize("f", FUNCTIONS, ids=lambda f: type(f).__name__)
def test_nothing_diverges_from_itself_and_batches_broadcast(f):
    flow = Flow((2,))()
    value, error = f_divergence(flow, flow, f, num_samples=50)
    assert abs(value) < 1e-12
    assert error < 1e-6
    p, q = reparametrised(torch.zeros(3, 1), torch.ones(3, 1)), dist.Normal(torch.arange(2.0), 1.0)
    value, error = f_divergence(p, q, f, num_samples=7)
    assert value.shape == error.shape == (3, 2)


def test_discrete_vectors_are_sampled():
    made, q = Autoregressive((2,), likelihood=BernoulliLikelihood())(), dist.Bernoulli(torch.tensor([0.2, 0.7])).to_event(1)
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 2)
    truth = (made.log_prob(x).exp() - q.log_prob(x).exp()).abs().sum() / 2
    value, error = tv(made, q)
    assert abs(value - truth) < 6 * error


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: js(Flow((2,))(), dist.Normal(0.0, 1.0)), r"\(2,\) and q \(\).*to_event"),
        (lambda: js(dist.Normal(0.0, 1.0), dist.Normal(1.0, 1.0), num_samples=3), "at least 4 samples"),
        (lambda: js(Flow((2,))(), Dequantized(Flow((2,))(), levels=4)), "Dequantized, whose density is: lower bound"),
        (lambda: kl(dist.Poisson(1.0), dist.Normal(0.0, 1.0)), "kl wants two continuous or two discrete.*Dequantized"),
        (lambda: js(dist.Normal(0.0, 1.0), dist.Poisson(1.0)), "two continuous or two discrete distributions.*Dequantized"),
    ],
)
def test_distributions_without_a_density_ratio_are_refused(build, match):
    with pytest.raises(ValueError, match=f"f_divergence wants.*{match}|{match}"):
        build()
