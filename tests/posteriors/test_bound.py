"""Gradients of the bounds that variational inference maximises."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import LowerCholeskyAffine
from torch.testing import assert_close

from pyro_genmodels import RealNVP
from pyro_genmodels.infer.compiled import Eager
from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.posteriors import FlowGuide, FullRank, LowRank, MeanField
from pyro_genmodels.posteriors.approximations import _LinearMap
from pyro_genmodels.posteriors.bound import _BoundGradient
from pyro_genmodels.posteriors.pathfinder import QuasiNewtonNormal
from pyro_genmodels.posteriors.problem import Problem

METHODS = [(MeanField(), 1), (FullRank(), 8), (LowRank(2), 1), (FlowGuide(transform=RealNVP(transforms=2)), 8)]


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, noise), obs=y)


def truncated(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.factor("half", torch.where(loc > 0, 0.0, -torch.inf))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def start(method, dim, dtype=torch.float32):
    basis = torch.eye(dim, 1, dtype=torch.float64)
    normal = QuasiNewtonNormal(torch.zeros(dim).double(), torch.ones(dim).double(), basis, torch.eye(1).double())
    return method.build(normal, torch.zeros(0, dtype=dtype))


@pytest.fixture(scope="module")
def regression_problem():
    return Problem(regression, (torch.linspace(-1, 1, 18).reshape(9, 2), torch.linspace(0, 1, 9)), progress=False)


@pytest.mark.parametrize(("method", "num_weighted"), METHODS, ids=lambda m: type(m).__name__)
def test_a_captured_gradient_is_that_of_eager_code(method, num_weighted, regression_problem):
    approximation = start(method, 3)
    for p in approximation.parameters():
        torch.nn.init.normal_(p, std=0.1)
    captured, eager = (
        _BoundGradient(approximation, density, 32, num_weighted)
        for density in (regression_problem.batched, BatchedDensity(regression_problem.density, mode=Eager()))
    )
    assert captured._captured is not None
    assert eager._captured is None
    results = []
    for gradient in (captured, eager):
        pyro.set_rng_seed(1)
        results.append((gradient(), [p.grad for p in gradient.parameters]))
    (found, found_gradients), (expected, expected_gradients) = results
    assert found == pytest.approx(expected, rel=1e-5)
    for a, b in zip(found_gradients, expected_gradients, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_the_bound_is_that_of_the_closed_form():
    """False-alarm rate of 1e-6: the mean of 60 gradients is within five standard errors of the closed form."""
    y = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0).expand([2]).to_event(1), obs=y)

    approximation = start(MeanField(), 1, torch.float64)
    approximation.loc.data.fill_(0.2)
    approximation.log_scale.data.fill_(-0.3)
    gradient = _BoundGradient(approximation, Problem(model, progress=False).batched, 1000, 1)
    pyro.set_rng_seed(2)
    draws = []
    for _ in range(60):
        gradient()
        draws.append(torch.cat([p.grad for p in gradient.parameters]))
    draws = torch.stack(draws)
    loc, log_scale = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, -0.3))
    q = dist.Normal(loc, log_scale.exp())
    likelihood = dist.Normal(loc, 1.0).log_prob(y).sum() - log_scale.exp().square()
    bound = likelihood - torch.distributions.kl_divergence(q, dist.Normal(torch.zeros_like(loc), 1.0))
    expected = torch.stack(torch.autograd.grad(-bound, (loc, log_scale)))
    assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / len(draws) ** 0.5).all()


@pytest.mark.parametrize(("loc", "lost"), [(0.0, range(1, 1000)), (-100.0, range(1000, 1001))])
def test_draws_without_a_density_are_left_out_and_counted(loc, lost):
    problem = Problem(truncated, (torch.zeros(3),), progress=False)
    approximation = start(MeanField(), 1)
    approximation.loc.data.fill_(loc)
    gradient = _BoundGradient(approximation, problem.batched, 1000, 1)
    loss, found = gradient()
    assert found in lost
    assert torch.tensor(loss).isfinite() == (found < 1000)
    for p in gradient.parameters:
        assert p.grad.isfinite().all()
        assert p.grad.any() == (found < 1000)
    assert problem.batched.num_gradients == 1000


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_the_linear_map_of_a_flow_is_that_of_pyro(shape):
    loc, tril = torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64).tril()
    tril.diagonal().abs_().add_(0.5)
    ours, theirs = _LinearMap(loc, tril), LowerCholeskyAffine(loc, tril)
    x = torch.randn(*shape, 3, dtype=torch.float64)
    y = ours(x)
    assert_close(y, theirs(x))
    assert_close(ours.inv(y), x)
    assert_close(ours.log_abs_det_jacobian(x, y), theirs.log_abs_det_jacobian(x, y).expand(shape))


def test_gradients_lie_in_memory_as_their_parameters_do(regression_problem):
    """The fused Adam goes through the memory of both, side by side."""
    for method in (FullRank(), FlowGuide(transform=RealNVP(transforms=2))):
        gradient = _BoundGradient(start(method, 3), regression_problem.batched, 32, 1)
        gradient()
        assert all(p.grad.stride() == p.stride() for p in gradient.parameters)


def test_training_finds_the_covariance_of_a_normal_density():
    """At a normal density the gradient along the draws has no noise, so that Adam ends there."""
    wanted = torch.tensor([[1.0, 0.9, 0.2], [0.9, 1.0, 0.5], [0.2, 0.5, 1.0]])

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.ones(3), wanted))

    approximation = start(FullRank(), 3)
    pyro.set_rng_seed(3)
    FullRank(num_steps=600, step_size=0.05).train(approximation, Problem(model, progress=False).batched, progress=False)
    found = approximation()
    assert_close(found.covariance_matrix, wanted, rtol=0, atol=0.02)
    assert_close(found.loc, torch.ones(3), rtol=0, atol=0.02)


def test_a_step_too_far_is_taken_back(regression_problem):
    """Steps of ten in the weights of a flow leave every draw without a density, or with one that is far too low."""
    pyro.set_rng_seed(5)
    approximation = start(FlowGuide(transform=RealNVP(transforms=2)), 3)
    method = FlowGuide(num_steps=400, num_draws=32, step_size=10.0)
    losses = method.train(approximation, regression_problem.batched, progress=False)
    assert not (losses < losses[:5].max() + 100).all()  # it was thrown away, nan among them
    assert losses[-25:].median() < losses[:5].median()
    assert approximation().sample((100,)).isfinite().all()
