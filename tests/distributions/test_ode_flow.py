"""ODE flows: solvers against closed forms, densities against Jacobians, and what an estimate says of itself.

Statistical tests here have a false-alarm rate of 1e-7 each (`assert_means`).
"""

from itertools import pairwise
from math import cos, exp, log, sin, sqrt

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.optim import Adam
from teachers import Gaussian, assert_means, integral, perturb
from torch import nn
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmodels import DenseField, Dopri5, Flow, FlowMatching, Hutchinson, MaximumLikelihood, ODEFlow, UNet, log_likelihood
from pyro_genmodels.distributions.ode import ContinuousFlow
from pyro_genmodels.dynamics.ode import integrate, integrate_with_divergence
from pyro_genmodels.families import RK4, Dopri8, Euler, ExactTrace, GaussianProbes, Midpoint, RademacherProbes
from pyro_genmodels.training import checkpoints

TIGHT = Dopri5(1e-10, 1e-10)
SOLVERS = [TIGHT, Dopri8(1e-10, 1e-10), RK4(40), Midpoint(2000), Euler(3)]


def matrix(d=3):
    return 0.7 * torch.randn(d, d)


def linear(a):
    return lambda t, x: x @ a.T


def net(d=3, hidden=8):
    return perturb(nn.Sequential(nn.Linear(d + 1, hidden), nn.Tanh(), nn.Linear(hidden, d)))


def at_time(module):
    """A network of points and the time, as a velocity of rows."""
    return lambda t, x: module(torch.cat([x, t.expand(len(x), 1)], 1))


def standard(d):
    return dist.Normal(torch.zeros(d), 1.0).to_event(1)


class Smooth(nn.Module):
    """A small network of points, time and context, that does not oscillate."""

    def __init__(self, d=3, context=0):
        super().__init__()
        self.layers = perturb(nn.Sequential(nn.Linear(d + 1 + context, 8), nn.Tanh(), nn.Linear(8, d)))

    def forward(self, x, t, context=None):
        return self.layers(torch.cat([x, t.unsqueeze(1), *([] if context is None else [context])], 1))


def small(event_shape=(3,), **options):
    options = {"network": DenseField(16, blocks=1), "solver": RK4(4), **options}
    return perturb(ODEFlow(event_shape, **options), 0.2)


# Solvers.


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_linear_velocity_solves_to_a_matrix_exponential_whose_log_determinant_is_the_trace(solver, float64):
    a, x = matrix(), torch.randn(5, 3)
    there = integrate_with_divergence(linear(a), x, 0.0, 1.0, solver)
    back = integrate_with_divergence(linear(a), x, 1.0, 0.0, solver)
    if not isinstance(solver, Euler):
        assert_close(there.x, x @ torch.matrix_exp(a).T, rtol=1e-6, atol=1e-6)
        assert_close(back.x, x @ torch.matrix_exp(-a).T, rtol=1e-6, atol=1e-6)
    assert_close(there.divergence, a.trace().expand(5))
    assert_close(back.divergence, -a.trace().expand(5))


@pytest.mark.parametrize(("solver", "order"), [(Euler, 1), (Midpoint, 2), (RK4, 4)])
def test_fixed_steps_have_the_order_they_are_of(solver, order, float64):
    """dx/dt = x cos t has the solution x exp(sin t)."""
    x = torch.tensor([[1.0]])
    error = [
        (integrate(lambda t, x: x * t.cos(), x, 0.0, 2.0, solver(n)).x - exp(sin(2.0))).abs().item() for n in (40, 80, 160)
    ]
    slopes = [log(a / b) / log(2) for a, b in pairwise(error)]
    assert slopes == pytest.approx([order] * 2, abs=0.15)


@pytest.mark.parametrize("solver", [Dopri5, Dopri8])
def test_adaptive_steps_keep_to_their_tolerances(solver, float64):
    x, evaluations = torch.tensor([[1.0]]), []
    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10):
        path = integrate(lambda t, x: x * t.cos(), x, 0.0, 2.0, solver(tolerance, tolerance))
        assert (path.x - exp(sin(2.0))).abs() < 50 * tolerance
        evaluations.append(path.evaluations)
    assert evaluations == sorted(evaluations)
    assert evaluations[0] < evaluations[-1] < 400


def test_the_looser_solver_errs_more(float64):
    x, truth = torch.tensor([[1.0]]), exp(sin(2.0))
    for solver in (Dopri5(), Dopri8(), RK4(10), Midpoint(10), Euler(10)):
        errors = [(integrate(lambda t, x: x * t.cos(), x, 0.0, 2.0, s).x - truth).abs() for s in (solver, solver.coarser)]
        assert errors[0] < errors[1]
    assert Euler(1).coarser == Euler(2)


def test_velocities_are_asked_within_the_times_only(float64):
    """Also where a slow start makes the solver look far ahead."""
    asked = []

    def velocity(t, x):
        asked.append(float(t))
        return 1e-4 * x * (t + 1)

    for start, end in ((0.0, 1.0), (1.0, 0.0)):
        for solver in (Dopri5(), Dopri8(), RK4(3)):
            integrate(velocity, torch.ones(2, 3), start, end, solver)
    assert min(asked) >= 0.0
    assert max(asked) <= 1.0
    assert 0.0 in asked
    assert 1.0 in asked


@pytest.mark.parametrize(("solver", "each"), [(Euler, 1), (Midpoint, 2), (RK4, 4)])
def test_evaluations_are_counted(solver, each):
    asked = []

    def velocity(t, x):
        asked.append(len(x))
        return -x

    assert integrate(velocity, torch.ones(2, 3), 0.0, 1.0, solver(7)).evaluations == len(asked) == 7 * each
    with torch.no_grad():
        path = integrate_with_divergence(velocity, torch.ones(2, 3), 0.0, 1.0, Dopri5())
    assert path.evaluations == len(asked) - 7 * each
    assert set(asked) == {2}


@pytest.mark.parametrize("adjoint", [Dopri5(1e-10, 1e-10, adjoint=True), RK4(60, adjoint=True)], ids=["adaptive", "fixed"])
def test_the_adjoint_has_the_gradients_of_the_steps(adjoint, float64):
    module, x, context = net(), torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def gradients(solver):
        shift = context.tanh()
        path = integrate_with_divergence(
            lambda t, x: at_time(module)(t, x + shift),
            x, 1.0, 0.0, solver, regularize=True, parameters=[*module.parameters(), shift],
        )  # fmt: skip
        loss = path.x.square().sum() + path.divergence.sum() + 0.3 * path.kinetic.sum() + 0.7 * path.jacobian.sum()
        return torch.autograd.grad(loss, [x, context, *module.parameters()])

    for found, wanted in zip(gradients(adjoint), gradients(TIGHT), strict=True):
        assert wanted.abs().max() > 1e-3
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_divergences_can_be_differentiated_twice(float64):
    module, x = net(), torch.randn(2, 3, requires_grad=True)
    f = lambda x: integrate_with_divergence(at_time(module), x, 1.0, 0.0, RK4(3), regularize=True)  # noqa: E731
    assert torch.autograd.gradcheck(lambda x: (f(x).divergence, f(x).kinetic, f(x).jacobian), (x,))
    assert torch.autograd.gradgradcheck(lambda x: f(x).divergence, (x,))


def test_gradients_are_kept_only_where_they_are_wanted():
    module, x = net(), torch.randn(4, 3)

    def both():
        path = integrate_with_divergence(at_time(module), x, 0.0, 1.0, RK4(2))
        return integrate(at_time(module), x, 0.0, 1.0, RK4(2)).x, path.x, path.divergence

    with torch.no_grad():
        silent = both()
    assert all(part.requires_grad for part in both())
    assert not any(part.requires_grad for part in silent)
    for part, wanted in zip(both(), silent, strict=True):
        assert_close(part, wanted)
    module.requires_grad_(False)
    assert not any(part.requires_grad for part in both())


@pytest.mark.parametrize("solver", [Dopri5(), RK4(20)], ids=["adaptive", "fixed"])
def test_a_velocity_that_explodes_is_an_error_with_what_to_change(solver):
    with pytest.raises(FloatingPointError, match=r"(gave up|NaN).*learning rate.*tolerances"):
        integrate(lambda t, x: 1e4 * x**3, torch.ones(2, 3), 0.0, 1.0, solver)
    with pytest.raises(FloatingPointError, match=r"(gave up|NaN).*between time 1 and 0"):
        integrate(lambda t, x: x * float("nan"), torch.ones(2, 3), 1.0, 0.0, solver)


def test_errors_of_the_users_own_pass():
    def velocity(t, x):
        raise AssertionError("mine")

    with pytest.raises(AssertionError, match="mine"):
        integrate(velocity, torch.ones(2, 3), 0.0, 1.0, Dopri5())


@pytest.mark.parametrize("solver", [Dopri5(), RK4(2)], ids=["adaptive", "fixed"])
def test_solvers_refuse_capture_by_name(solver):
    with pytest.raises(NotImplementedError, match=f"{type(solver).__name__}.*captured"):
        make_fx(lambda x: integrate(lambda t, x: -x, x, 0.0, 1.0, solver).x)(torch.ones(2, 3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Dopri5(0.1, 0.0), lambda: Dopri5(-1.0), lambda: Dopri8(float("nan")), lambda: Euler(0), lambda: RK4(True),
        lambda: Midpoint(1.5), lambda: Hutchinson(0), lambda: small(levels=1), lambda: small(kinetic=-1.0),
        lambda: small(jacobian=float("inf")),
        lambda: integrate(lambda t, x: x, torch.ones(1, 1), 1.0, 1.0, RK4(1)),
        lambda: integrate_with_divergence(lambda t, x: x, torch.ones(2, 1), 0.0, 1.0, RK4(1), probes=torch.ones(2, 1)),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match=r"wants|should be"):
        build()


@pytest.mark.parametrize(
    "options",
    [
        {"solver": Dopri5},
        {"solver": "rk4"},
        {"trace": ExactTrace},
        {"network": DenseField},
        {"base": 1.0},
        {"base": dist.Normal},
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(options):
    with pytest.raises(TypeError, match=r"wants a .* but found"):
        ODEFlow((2,), **options)
    with pytest.raises(TypeError, match="RademacherProbes"):
        Hutchinson(distribution="signs")


# Traces and regularisers.


@pytest.mark.parametrize("distribution", [RademacherProbes(), GaussianProbes()], ids=["signs", "Gaussian"])
def test_hutchinsons_trace_and_size_of_the_jacobian_are_unbiased(distribution, float64):
    module, x = net(), torch.randn(1, 3).expand(5000, 3)
    exact = integrate_with_divergence(at_time(module), x[:1], 0.0, 1.0, RK4(4), regularize=True)
    with torch.no_grad():
        probes = Hutchinson(2, distribution).probes(x, fresh=True)
        path = integrate_with_divergence(at_time(module), x, 0.0, 1.0, RK4(4), probes=probes, regularize=True)
    assert path.divergence.std() > 0.01
    assert_means(path.divergence.unsqueeze(1), exact.divergence)
    assert_means(path.jacobian.unsqueeze(1), exact.jacobian)
    assert_close(path.kinetic, exact.kinetic.expand(5000))


def test_signs_are_exact_for_a_diagonal_jacobian_and_gaussians_spread_by_its_size():
    scale, x = torch.tensor([0.5, -1.0, 2.0]), torch.randn(4000, 3)
    spread = {}
    for distribution in (RademacherProbes(), GaussianProbes()):
        probes = Hutchinson(1, distribution).probes(x, fresh=True)
        path = integrate_with_divergence(lambda t, x: x * scale, x, 0.0, 1.0, RK4(2), probes=probes)
        spread[distribution] = path.divergence
    assert_close(spread[RademacherProbes()], torch.full((4000,), 1.5))
    off = (spread[GaussianProbes()] - 1.5).square()  # of variance 2 |J|^2
    assert_means(off.unsqueeze(1), 2 * scale.square().sum())


def test_regularisers_have_their_closed_forms_for_a_spiral(float64):
    """Of dx/dt = (a + rotation w) x: |J|^2 = 2 (a^2 + w^2), and |v|^2 = (a^2 + w^2) |x|^2 exp(2 a t)."""
    a, w, x = 0.4, 1.7, torch.randn(5, 2)
    velocity = linear(torch.tensor([[a, -w], [w, a]]))
    for start, end, rate in ((0.0, 1.0, a), (1.0, 0.0, -a)):
        path = integrate_with_divergence(velocity, x, start, end, TIGHT, regularize=True)
        assert_close(path.jacobian, torch.full((5,), 2 * (a**2 + w**2)))
        energy = (a**2 + w**2) * x.square().sum(1) * (exp(2 * rate) - 1) / (2 * rate)
        assert_close(path.kinetic, energy, rtol=1e-8, atol=1e-8)


def test_maximum_likelihood_counts_the_penalties_in_training_and_log_prob_never():
    x = torch.randn(6, 3)
    flow = small(kinetic=0.3, jacobian=0.2, standardize=False)
    plain = -flow().log_prob(x).sum()
    path = integrate_with_divergence(lambda t, x: flow.network(x, t.expand(6)), x, 1.0, 0.0, flow.solver, regularize=True)
    loss = MaximumLikelihood()(flow)
    assert_close(loss(x), plain + 0.3 * path.kinetic.sum() + 0.2 * path.jacobian.sum())
    flow.eval()
    assert_close(loss(x), plain)
    assert_close(-flow().log_prob(x).sum(), plain)


def test_penalties_are_as_well_of_integers_and_change_what_is_learned():
    flow = small(levels=4, kinetic=10.0)
    x = torch.randint(4, (8, 3))
    flow.standardize(x)
    with_penalty, without = (MaximumLikelihood()(flow.train(mode))(x) for mode in (True, False))
    assert with_penalty > without
    before = flow.network.last.weight.detach().clone()
    MaximumLikelihood()(flow.train())(x).backward()
    assert flow.network.last.weight.grad.abs().sum() > 0
    assert flow.network.last.weight.equal(before)


# Densities.


def test_the_density_under_a_linear_velocity_is_gaussian(float64):
    a = matrix()
    flow = ContinuousFlow(lambda x, t, context: x @ a.T, standard(3), (3,), solver=TIGHT)
    factor, x = torch.matrix_exp(a), torch.randn(4, 2, 3)
    assert_close(flow.log_prob(x), Gaussian(torch.zeros(3), factor @ factor.T).log_prob(x))
    assert flow.density == "exact"
    draws = flow.sample((20_000,))
    assert_means(draws, torch.zeros(3))
    assert_means(draws.unsqueeze(2) * draws.unsqueeze(1), factor @ factor.T)


def test_the_integral_is_one(float64):
    flow = small((2,), solver=RK4(8), context=1)(torch.tensor([[0.5], [-1.0]]))
    with torch.no_grad():
        mass = integral(lambda x: flow.log_prob(x.unsqueeze(1)).exp(), -9.0, 9.0, 80, 2)
    assert_close(mass, torch.ones(2), rtol=0, atol=1e-3)


def test_the_context_moves_what_it_says():
    class Shift(nn.Module):
        def forward(self, x, t, context):
            return context + 0 * x

    flow = ODEFlow((2,), context=2, network=Shift(), standardize=False, solver=Euler(3))
    c, x = torch.randn(5, 2), torch.randn(4, 1, 2)
    assert_close(flow(c).log_prob(x), standard(2).log_prob(x - c))
    assert_means(flow(c).sample((4000,)), c)


TWO_PEAKS = dist.Normal(torch.tensor([[-2.0, 2.0]] * 3), 0.5)


@pytest.mark.parametrize(
    "base",
    [
        dist.MixtureSameFamily(dist.Categorical(torch.ones(3, 2)), TWO_PEAKS).to_event(1),
        dist.StudentT(torch.tensor([3.0, 3.0, 3.0]), 0.0, 1.0).to_event(1),
        dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5),
    ],
    ids=["mixture", "Student", "correlated"],
)  # fmt: skip
def test_a_flow_begins_as_its_base(base):
    flow, x = ODEFlow((3,), base=base, network=DenseField(16), standardize=False), torch.randn(5, 3)
    assert_close(flow().log_prob(x), base.log_prob(x))
    moved = flow.to(torch.float64)()
    assert moved.log_prob(x.double()).dtype == moved.sample().dtype == torch.float64
    assert FlowMatching()(flow)(x.double()).dtype == torch.float64


def test_a_family_is_trained_along_as_the_base():
    flow = ODEFlow((2,), base=Flow((2,)), network=DenseField(16), solver=Euler(2))
    MaximumLikelihood()(flow)(torch.randn(8, 2)).backward()
    assert any(p.grad.abs().sum() > 0 for p in flow.base.parameters())
    assert flow().has_rsample


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (dist.Normal(torch.zeros(3), 1.0), "batch shape"),
        (standard(2), "event shape"),
        (dist.Uniform(torch.zeros(3), 1.0).to_event(1), "all real numbers"),
        (Flow((3,), context=1), "without a context"),
        (ODEFlow((3,), trace=Hutchinson()), "exact density"),
    ],
)
def test_bases_that_cannot_be_are_refused(base, found):
    with pytest.raises(ValueError, match=found):
        ODEFlow((3,), base=base)


def test_a_base_of_batches_is_refused_by_the_distribution():
    with pytest.raises(ValueError, match=r"to_event"):
        ContinuousFlow(lambda x, t, c: x, dist.Normal(torch.zeros(3), 1.0), (3,))


def test_integers_have_the_mass_that_a_fine_integral_gives():
    flow = small((), levels=3, network=DenseField(8, blocks=1)).eval()
    flow.standardize(torch.tensor([0, 1, 1, 2]))
    d = flow()
    with torch.no_grad():
        inner = d.base.log_prob(torch.linspace(0, 3, 3001)[:-1] + 5e-4).exp().reshape(3, -1).mean(1)
        bound = d.log_prob(torch.arange(3).expand(300, 3))
    assert_means(bound.exp(), inner)
    assert (bound.mean(0) - 5 * bound.std(0) / sqrt(300) <= inner.log()).all()
    assert d.density == "lower bound"
    assert set(d.sample((200,)).unique().tolist()) <= {0, 1, 2}


def test_in_float64_log_prob_has_its_gradient(float64):
    flow, x = small(context=2).eval().requires_grad_(False), torch.randn(2, 3, requires_grad=True)
    context = torch.randn(2, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, c: flow(c).log_prob(x), (x, context))


def test_the_score_under_an_adjoint_is_that_without():
    flow = small(solver=Dopri5(1e-6, 1e-6, adjoint=True))
    other = small(solver=Dopri5(1e-6, 1e-6))
    other.load_state_dict(flow.state_dict())
    x = torch.randn(4, 3)
    score = flow().score(x)
    assert score.requires_grad
    assert_close(score, other().score(x), rtol=1e-4, atol=1e-4)


def test_an_adjoint_trains_context_and_parameters(float64):
    grads = []
    for adjoint in (True, False):
        pyro.set_rng_seed(0)
        flow = ODEFlow((3,), network=Smooth(3, 2), solver=Dopri5(1e-8, 1e-8, adjoint=adjoint), context=nn.Linear(1, 2))
        x, c = torch.randn(8, 3), torch.randn(8, 1)
        flow.standardize(x)
        MaximumLikelihood()(flow)(x, c).backward()
        grads.append([p.grad for p in flow.parameters()])
        assert all(g is not None for g in grads[-1])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_exact_trace_of_a_unet_in_training_is_that_of_its_jacobian(float64):
    """Torch cannot batch the second derivative of GroupNorm."""
    flow = small((2, 2), network=UNet((8,), attention=False), solver=Euler(1), standardize=False)
    x = torch.randn(2, 2, 2)
    log_prob = flow().log_prob(x)
    for row, found in zip(x, log_prob, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda r: flow.network(r[None], torch.ones(1))[0], row).reshape(4, 4)
        back = row - flow.network(row[None], torch.ones(1))[0]
        assert_close(found, standard(4).log_prob(back.reshape(4)) - jacobian.trace())
    log_prob.sum().backward()
    assert all(p.grad is not None for p in flow.network.middle.parameters())


def test_time_is_told_per_row_and_shapes_are_those_of_the_event():
    class Watching(nn.Module):
        def forward(self, x, t, context):
            assert x.shape[1:] == (2, 3)
            assert t.shape == (len(x),)
            assert context.shape == (len(x), 1)
            return -x

    flow = ODEFlow((2, 3), context=1, network=Watching())(torch.zeros(4, 1))
    assert flow.log_prob(torch.randn(5, 1, 2, 3)).shape == (5, 4)
    assert flow.sample((2,)).shape == (2, 4, 2, 3)


# Estimates.


def test_probes_are_the_same_outside_of_training_and_fresh_in_it():
    flow, x = small(trace=Hutchinson()), torch.randn(4, 3)
    value = lambda: flow().log_prob(x).detach()  # noqa: E731
    assert flow().density == "estimate"
    assert (value() - value()).abs().max() > 0.01
    with torch.no_grad():
        kept = value()
        assert kept.equal(value())
    assert_close(kept, flow.eval()().log_prob(x).detach())
    d = flow.train()()
    flow.requires_grad_(False)
    assert_close(kept, d.log_prob(x))
    flow.eval().trace = Hutchinson(seed=1)
    assert (kept - value()).abs().max() > 0.01


def test_probes_of_evaluation_leave_the_random_numbers_alone():
    flow, x = small(trace=Hutchinson()).eval(), torch.randn(4, 3)
    before = torch.get_rng_state()
    flow().log_prob(x)
    assert torch.get_rng_state().equal(before)


def test_nuts_runs_with_an_estimated_density_as_prior():
    flow = small((2,), trace=Hutchinson(), solver=RK4(2)).eval()

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=torch.ones(2))

    mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=20, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["z"].isfinite().all()
    assert mcmc.diagnostics()["acceptance rate"]["chain 0"] > 0.6


def test_maximum_likelihood_trains_by_an_unbiased_estimate():
    """The mean gradient over probes is the exact one: an alarm once in 1e7."""
    flow, x = small(standardize=False, solver=RK4(2)), torch.randn(3, 3)
    bias = flow.network.last.bias
    exact = torch.autograd.grad(MaximumLikelihood()(flow)(x), bias)[0]
    flow.trace = Hutchinson()
    loss = MaximumLikelihood()(flow)
    grads = torch.stack([torch.autograd.grad(loss(x), bias)[0] for _ in range(200)])
    assert_means(grads, exact)


def test_an_estimate_says_how_far_off_it_may_be(float64):
    flow, x = ODEFlow((3,), network=Smooth(), trace=Hutchinson()).eval(), torch.randn(40, 3)
    assessed = flow().log_prob_with_error(x, num_probes=64)
    flow.trace = ExactTrace()
    flow.solver = TIGHT
    with torch.no_grad():
        truth = flow().log_prob(x)
    z = (assessed.values - truth) / assessed.probe_error
    assert z.abs().max() < 6  # 40 of Student's t with 63 degrees: an alarm once in 2e5
    assert 0.6 < z.square().mean().sqrt() < 1.6
    assert (assessed.solver_error < 1e-2).all()
    assert assessed.evaluations > 0
    with pytest.raises(ValueError, match="num_probes"):
        small(trace=Hutchinson())().log_prob_with_error(x.float(), num_probes=1)


def test_the_solvers_error_is_told_and_no_less_than_it_is(float64):
    flow, x = ODEFlow((3,), network=Smooth(3, 2), solver=RK4(4), context=2).eval(), torch.randn(30, 3)
    context = torch.randn(30, 2)
    assessed = flow(context).log_prob_with_error(x)
    flow.solver = TIGHT
    with torch.no_grad():
        off = (assessed.values - flow(context).log_prob(x)).abs()
    assert (assessed.probe_error == 0).all()
    assert off.max() > 1e-9
    assert off.square().mean() < assessed.solver_error.square().mean() < 1e-3


def test_many_coordinates_are_estimated_and_few_are_exact():
    assert isinstance(small((16,))().trace, ExactTrace)
    assert isinstance(small((17,))().trace, Hutchinson)
    assert isinstance(small((17,), trace=ExactTrace())().trace, ExactTrace)


def test_a_trajectory_records_its_frames_and_evaluations():
    """The frames are those of the same ODE, and the last are the draws."""
    flow = small((2,), context=2, solver=RK4(4))
    flow.standardize(5 + 3 * torch.randn(50, 2))
    d = flow.eval()(torch.randn(3, 2))
    pyro.set_rng_seed(2)
    found = d.trajectory((4,), num_frames=3)
    pyro.set_rng_seed(2)
    whole = ContinuousFlow(d.field, d.base, (2,), solver=RK4(8), context=d.context, network=flow, pretransform=d.pretransform)
    assert_close(found.x, whole.sample((4,)))  # four steps to each frame
    assert_close(d.pretransform.inv(found.frames[-1]), found.x)
    assert found.frames.shape == (3, 4, 3, 2)
    assert found.times.tolist() == [0.0, 0.5, 1.0]
    assert found.evaluations == flow.evaluations.last == 32
    with pytest.raises(ValueError, match="num_frames of 2 or more"):
        d.trajectory(num_frames=1)


def test_log_likelihood_averages_over_probes_drawn_anew(float64):
    """Also where draws are made one by one; the mean is within its error of the exact one, but for 5e-7 of runs."""
    flow = small((3,), solver=RK4(2), trace=Hutchinson(), standardize=False).double().eval()
    x = torch.randn(6, 3)
    found = log_likelihood(flow, x, num_samples=200, parallel=False)
    assert found.kind == "estimate"
    assert (found.std_error > 0).all()
    flow.trace = ExactTrace()
    exact = log_likelihood(flow, x)
    assert (((found.values - exact.values) / found.std_error).abs() < 5.6).all()


def test_the_family_counts_evaluations():
    flow = small(solver=RK4(5)).eval()
    flow().sample((3,))
    assert flow.evaluations.last == 20
    flow().log_prob(torch.randn(2, 3))
    assert flow.evaluations.last == 20
    assert flow.evaluations.total == 40


def test_log_likelihood_of_an_exact_trace_is_exact():
    flow, x = small().eval(), torch.randn(6, 3)
    found = log_likelihood(flow, x)
    assert found.kind == "exact"
    assert_close(found.values, flow().log_prob(x).detach(), rtol=1e-4, atol=1e-4)


def test_log_likelihood_of_an_estimate_is_a_mean_over_probes_with_its_error():
    flow, x = ODEFlow((3,), network=Smooth(), trace=Hutchinson(), solver=RK4(4)).eval(), torch.randn(5, 3)
    found = log_likelihood(flow, x, num_samples=100)
    flow.trace = ExactTrace()
    assert found.kind == "estimate"
    assert (found.std_error > 0).all()
    z = (found.values - flow().log_prob(x).detach()) / found.std_error
    assert z.abs().max() < 6  # 5 of Student's t with 99 degrees: an alarm once in 6e6


# In Pyro.


def test_dropout_is_for_flow_matching_only():
    flow, x = ODEFlow((2,), network=DenseField(16, dropout=0.5)), torch.randn(8, 2)
    with pytest.raises(ValueError, match=r"dropout.*FlowMatching"):
        flow().log_prob(x)
    with pytest.raises(ValueError, match="dropout"):
        flow().sample()
    FlowMatching()(flow)(x).backward()
    assert flow.eval()().log_prob(x).shape == (8,)


def test_a_network_of_another_shape_is_refused():
    class Wrong(nn.Module):
        def forward(self, x, t, context):
            return x.sum(1, keepdim=True)

    flow, x = ODEFlow((2,), network=Wrong()), torch.randn(8, 2)
    for use in (lambda: flow().log_prob(x), lambda: flow().sample((3,)), lambda: FlowMatching()(flow)(x)):
        with pytest.raises(ValueError, match=r"velocity should have the shape .* \(\d, 2\)"):
            use()


@pytest.mark.slow
def test_it_is_a_guide_that_learns_a_posterior():
    """To 0.15 of a Gaussian posterior N(1, 0.5) after a short run."""
    guide_flow = ODEFlow((1,), network=DenseField(16, blocks=1), solver=RK4(3), standardize=False)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.full((1,), 2.0))

    def guide():
        pyro.sample("z", guide_flow())

    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0))
    for _ in range(120):
        svi.step()
    draws = guide_flow().sample((2000,))
    assert draws.mean() == pytest.approx(1.0, abs=0.15)
    assert draws.std() == pytest.approx(sqrt(0.5), abs=0.15)


def test_a_checkpoint_describes_it(tmp_path):
    flow = small(
        (2,), context=1, network=DenseField(8, blocks=1), solver=Dopri5(1e-4, 1e-4, adjoint=True),
        trace=Hutchinson(2, GaussianProbes(), seed=3), kinetic=0.1, support=constraints.interval(0.0, 1.0),
    )  # fmt: skip
    back = checkpoints.load(checkpoints.save(tmp_path / "flow", flow))
    assert (back.solver, back.trace, back.kinetic, back.support.upper_bound) == (flow.solver, flow.trace, 0.1, 1.0)
    x, context = torch.rand(4, 2), torch.randn(4, 1)
    assert_close(back(context).log_prob(x), flow.eval()(context).log_prob(x))


def test_the_solution_at_a_known_time_by_hand():
    """One step of Euler backwards: x - v(x, 1), and the trace at the data."""
    flow = ContinuousFlow(lambda x, t, c: x * t.cos().unsqueeze(1), standard(2), (2,), solver=Euler(1))
    x = torch.randn(3, 2)
    assert_close(flow.log_prob(x), standard(2).log_prob(x * (1 - cos(1.0))) - 2 * cos(1.0))
