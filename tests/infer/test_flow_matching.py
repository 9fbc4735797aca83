"""Flow matching: its minimiser for Gaussians, its couplings and its paths.

Statistical tests here have a false-alarm rate of 1e-7 each (`assert_means`).
"""

import sys
from itertools import permutations
from math import pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import Adam
from teachers import Gaussian, assert_means, perturb
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from pyro_genmodels import (
    VAE,
    Autoregressive,
    DenseField,
    Dopri5,
    EnergyModel,
    Flow,
    FlowMatching,
    Labels,
    MaximumLikelihood,
    ODEFlow,
    train,
)
from pyro_genmodels.distributions.ode import ContinuousFlow
from pyro_genmodels.families import RK4
from pyro_genmodels.infer import (
    GaussianTargetCoupling,
    IndependentCoupling,
    LinearInterpolant,
    OptimalTransportCoupling,
    TrigonometricInterpolant,
)

PATHS = [LinearInterpolant(), TrigonometricInterpolant()]
COUPLINGS = [IndependentCoupling(), GaussianTargetCoupling(0.1), OptimalTransportCoupling()]
LOC, SCALE = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])


def standard(d):
    return dist.Normal(torch.zeros(d), 1.0).to_event(1)


def weights(path, t):
    """a, b and their derivatives, of x_t = a x0 + b x1."""
    if isinstance(path, LinearInterpolant):
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    return (pi / 2 * t).cos(), (pi / 2 * t).sin(), -pi / 2 * (pi / 2 * t).sin(), pi / 2 * (pi / 2 * t).cos()


def best_velocity(path, sigma=0.0):
    """E[dx_t/dt | x_t] for x0 ~ N(0, 1) and x1 ~ N(LOC, SCALE^2) + sigma x0, in each coordinate."""

    def velocity(x, t, context=None):
        a, b, da, db = weights(path, t.unsqueeze(1))
        a, da = a + sigma * b, da + sigma * db  # the noise that the target has of x0
        loc, scale = LOC.to(x), SCALE.to(x)
        gain = (a * da + b * db * scale**2) / (a**2 + b**2 * scale**2)
        return db * loc + gain * (x - b * loc)

    return velocity


def small(event_shape=(2,), **options):
    return ODEFlow(event_shape, network=DenseField(16, blocks=1), solver=RK4(4), **options)


def observed(flow, x):
    """A model of rows x under a distribution."""
    with pyro.plate("data", len(x)):
        pyro.sample("x", flow, obs=x)


def loss_of(flow, x, **options):
    return FlowMatching(**options).differentiable_loss(observed, lambda *_: None, flow, x)


# The minimiser.


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("coupling", [IndependentCoupling(), GaussianTargetCoupling(0.3)], ids=repr)
def test_the_loss_is_least_at_the_mean_velocity_of_gaussians(path, coupling, float64):
    """There its gradient is 0 in any direction: here constants and multiples of x and of t, added to the velocity."""
    best = best_velocity(path, getattr(coupling, "sigma_min", 0.0))
    x, slopes = LOC + SCALE * torch.randn(40, 1000, 2), []
    for rows in x:
        theta = torch.zeros(3, 2, requires_grad=True)

        def velocity(x, t, context, theta=theta):
            return best(x, t) + theta[0] + theta[1] * x + theta[2] * t.unsqueeze(1)

        flow = ContinuousFlow(velocity, standard(2), (2,))
        slopes.append(torch.autograd.grad(loss_of(flow, rows, coupling=coupling, path=path), theta)[0])
    assert_means(torch.stack(slopes), 0.0)


def test_another_velocity_has_a_gradient(float64):
    """So that the test above can fail: at the best velocity of the other path."""
    theta = torch.zeros(2, requires_grad=True)
    flow = ContinuousFlow(lambda x, t, c: best_velocity(TrigonometricInterpolant())(x, t) + theta * x, standard(2), (2,))
    slopes = [torch.autograd.grad(loss_of(flow, LOC + SCALE * torch.randn(1000, 2)), theta)[0] for _ in range(20)]
    with pytest.raises(AssertionError, match="standard errors"):
        assert_means(torch.stack(slopes), 0.0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_the_mean_velocity_carries_the_base_to_the_data(path, float64):
    flow = ContinuousFlow(best_velocity(path), standard(2), (2,), solver=Dopri5(1e-9, 1e-9))
    x = LOC + SCALE * torch.randn(20, 2)
    assert_close(flow.log_prob(x), Gaussian(LOC.double(), SCALE.double().square().diag()).log_prob(x), rtol=1e-6, atol=1e-6)


def test_the_least_loss_is_the_variance_that_the_place_leaves(float64):
    """Of standard normal ends, straight: the integral over t of Var(x1 - x0 | x_t) = 1 / (t^2 + (1 - t)^2), which is pi / 2."""

    def velocity(x, t, context):
        t = t.unsqueeze(1)
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    flow = ContinuousFlow(velocity, standard(1), (1,))
    losses = torch.stack([loss_of(flow, torch.randn(500, 1)) / 500 for _ in range(100)])
    assert_means(losses.unsqueeze(1), pi / 2)


def test_other_bases_are_drawn_from(float64):
    """With a velocity of 0 and data at 0 the loss is the mean square of the base."""
    base = dist.Laplace(torch.full((2,), 3.0), 1.0).to_event(1)
    flow = ContinuousFlow(lambda x, t, c: 0 * x, base, (2,))
    losses = torch.stack([loss_of(flow, torch.zeros(500, 2)) / 500 for _ in range(100)])
    assert_means(losses.unsqueeze(1), 2 * (9.0 + 2.0))


# Couplings and paths.


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_path_joins_its_ends_at_the_speed_it_says(path, float64):
    x0, x1 = torch.randn(5, 3), torch.randn(5, 3)
    assert_close(path(x0, x1, torch.zeros(5, 1))[0], x0)
    assert_close(path(x0, x1, torch.ones(5, 1))[0], x1)
    t = torch.rand(())
    speed = torch.autograd.functional.jacobian(lambda t: path(x0, x1, t)[0], t)
    assert_close(path(x0, x1, t)[1], speed)


def test_the_trigonometric_path_keeps_the_variance():
    x0, x1 = torch.randn(2, 20_000, 1)
    for t in (0.2, 0.5, 0.8):
        x, _ = TrigonometricInterpolant()(x0, x1, torch.tensor(t))
        assert_means(x.square(), 1.0)


def test_transport_costs_least_of_all_permutations():
    x0, x1 = torch.randn(6, 2), torch.randn(6, 2)
    paired, data = OptimalTransportCoupling()(x0, x1, None)
    costs = [(x0[list(order)] - x1).square().sum() for order in permutations(range(6))]
    assert_close((paired - data).square().sum(), min(costs))
    assert data is x1


@pytest.mark.parametrize(("size", "offset"), [(1e-20, 0.0), (1e-150, 0.0), (1e20, 0.0), (1.0, 1e6), (1e-3, 1e4)])
def test_transport_pairs_alike_in_any_unit_and_at_any_offset(size, offset):
    """POT's tolerances are absolute: of data of size 1e-20 the pairs were arbitrary."""
    x0, x1 = torch.randn(2, 40, 2, dtype=torch.float64)
    usual, _ = OptimalTransportCoupling()(x0, x1, None)
    other, _ = OptimalTransportCoupling()(size * x0 + offset, size * x1 + offset, None)
    assert_close((other - offset) / size, usual, atol=1e-5, rtol=0)


def test_transport_of_rows_with_nan_leaves_the_loss_nan():
    x0, x1 = torch.randn(2, 5, 2)
    x1[2] = float("nan")
    paired, _ = OptimalTransportCoupling()(x0, x1, None)
    assert paired.equal(x0)


def test_transport_permutes_draws_and_shortens_ways():
    x0, x1 = torch.randn(200, 3), torch.randn(200, 3) + 1
    paired, data = OptimalTransportCoupling()(x0, x1, None)
    assert data.equal(x1)
    assert paired.unique(dim=0).equal(x0.unique(dim=0))
    assert (paired - data).square().sum() < 0.8 * (x0 - x1).square().sum()


def test_transport_keeps_to_rows_of_one_context():
    """Or the draws of a context would no longer be those of the base."""
    x0, x1 = torch.randn(60, 2), torch.randn(60, 2)
    context = torch.eye(3)[torch.arange(60) % 3]
    paired, _ = OptimalTransportCoupling()(x0, x1, context)
    for label in range(3):
        rows = context[:, label] == 1
        assert paired[rows].unique(dim=0).equal(x0[rows].unique(dim=0))
        assert paired[rows].equal(OptimalTransportCoupling()(x0[rows], x1[rows], None)[0])
    assert OptimalTransportCoupling()(x0, x1, torch.randn(60, 4))[0].equal(x0)


def test_the_target_is_the_data_with_little_noise(float64):
    """And its way the straight one of Lipman et al.: t x1 + (1 - (1 - sigma) t) x0."""
    x0, x1, t = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, 1)
    x, speed = LinearInterpolant()(*GaussianTargetCoupling(0.1)(x0, x1, None), t)
    assert_close(x, t * x1 + (1 - 0.9 * t) * x0)
    assert_close(speed, x1 - 0.9 * x0)


@pytest.mark.parametrize("build", [lambda: GaussianTargetCoupling(0.0), lambda: GaussianTargetCoupling(1.0)])
def test_targets_of_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="sigma_min"):
        build()


@pytest.mark.parametrize(
    "options",
    [
        {"coupling": OptimalTransportCoupling},
        {"path": LinearInterpolant},
        {"coupling": LinearInterpolant()},
        {"path": "straight"},
    ],
    ids=str,
)
def test_what_is_no_choice_is_refused(options):
    with pytest.raises(TypeError, match=r"wants a (coupling|path) such as .* but found"):
        FlowMatching(**options)


def test_transport_without_pot_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"OptimalTransportCoupling needs POT: pip install 'pyro-genmodels\[eval\]'"):
        FlowMatching(OptimalTransportCoupling())(small())(torch.randn(4, 2))


# As a Pyro loss.


def test_the_loss_is_in_the_coordinates_of_the_network():
    """With a velocity of 0: of the squares of the noise and of the standardised data; an alarm once in 1e7."""
    flow, x = small(), 100.0 + 50.0 * torch.randn(2000, 2)
    flow.standardize(x)
    losses = torch.stack([FlowMatching()(flow)(x).detach() / len(x) for _ in range(20)])
    assert_means(losses.unsqueeze(1), 2.0 + 2 * (1999 / 2000))


@pytest.mark.parametrize("coupling", slow_unless([OptimalTransportCoupling()], COUPLINGS), ids=repr)
@pytest.mark.parametrize("path", slow_unless([LinearInterpolant()], PATHS), ids=repr)
def test_one_flow_trains_by_either_objective(coupling, path):
    """A correlated Gaussian: flow matching comes near its entropy, and maximum likelihood goes on from there."""
    truth = Gaussian(torch.tensor([3.0, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    x = truth.distribution().sample((1000,))
    flow = small()
    flow.standardize(x)
    before = -flow().log_prob(x).mean()
    for objective, steps, rate in ((FlowMatching(coupling, path), 150, 1e-2), (MaximumLikelihood(), 10, 1e-3)):
        svi = SVI(flow.model, flow.guide, Adam({"lr": rate}), objective)
        for _ in range(steps):
            svi.step(x[torch.randint(len(x), (128,))])
        with torch.no_grad():
            after = -flow().log_prob(x).mean()
        assert after < before - 0.25
        assert after > truth.entropy() - 0.2


@pytest.mark.parametrize("coupling", slow_unless([IndependentCoupling()], COUPLINGS), ids=repr)
def test_classes_are_learned_apart(coupling):
    flow = small(context=Labels(2))
    labels = torch.arange(400) % 2
    x = torch.randn(400, 2) * 0.3 + torch.where(labels == 0, -2.0, 2.0).unsqueeze(1)
    svi = SVI(flow.model, flow.guide, Adam({"lr": 1e-2}), FlowMatching(coupling))
    for _ in range(150):
        svi.step(x, labels)
    draws = flow.eval()(torch.arange(2)).sample((200,)).mean((0, 2))
    assert draws.tolist() == pytest.approx([-2.0, 2.0], abs=0.5)


def test_plates_scale_and_masks_drop():
    flow, x = perturb(small()), torch.randn(6, 2)
    flow.standardize(x)

    def loss(model, *args, **kwargs):
        pyro.set_rng_seed(3)
        return FlowMatching().differentiable_loss(model, flow.guide, *args, **kwargs)

    whole = loss(flow.model, x)
    assert_close(loss(flow.model, x, size=60), 10 * whole)
    assert_close(loss(poutine.scale(flow.model, scale=0.5), x), 0.5 * whole)
    assert loss(poutine.mask(flow.model, mask=torch.zeros(6, dtype=torch.bool)), x) == 0


def test_batches_of_every_shape_have_a_loss_each():
    flow = small(context=2)
    d, x = flow(torch.randn(4, 1, 2)), torch.randn(3, 2)
    for coupling in COUPLINGS:
        assert FlowMatching(coupling).per_datum(d, x).shape == (4, 3)
    assert FlowMatching().per_datum(small(())(), torch.randn(5)).shape == (5,)


def test_integers_are_matched_with_their_noise():
    flow, x = small(levels=4), torch.randint(4, (16, 2))
    flow.standardize(x)
    loss = FlowMatching()(flow)
    assert not loss(x).equal(loss(x))
    loss(x).backward()
    assert all(p.grad is not None for p in flow.parameters())


def test_nothing_is_differentiated_or_solved_without_gradients():
    flow, x = small(), torch.randn(8, 2)
    assert isinstance(FlowMatching().loss(flow.model, flow.guide, x), float)
    assert flow.evaluations.total == 0
    assert all(p.grad is None for p in flow.parameters())


def test_validation_is_on_the_same_noise_every_time():
    x = torch.randn(64, 2)
    flow = small()
    fit = train(
        flow, x, valid=x[:32], objective=FlowMatching(), epochs=3, progress=False, seed=0,
        optim=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
    )  # fmt: skip
    losses = [row["valid"] for row in fit.history]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_a_loss_is_captured_as_one_graph():
    flow, x = perturb(small()).eval(), torch.randn(4, 2)
    step = lambda x: FlowMatching().differentiable_loss(flow.model, flow.guide, x)  # noqa: E731
    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        fresh = torch.randn(4, 2)
        pyro.set_rng_seed(5)
        wanted = step(fresh)
        pyro.set_rng_seed(5)
        assert_close(graph(fresh), wanted)


@pytest.mark.parametrize(
    ("build", "cure"),
    [
        (lambda: Flow((2,)), r"NormalizingFlow.*MaximumLikelihood\(\)"),
        (lambda: Autoregressive((2,)), r"Autoregression.*MaximumLikelihood\(\)"),
        (lambda: EnergyModel((2,), sampler=None), r"Energy.*ContrastiveDivergence.*DenoisingScoreMatching"),
        (lambda: Flow((2,), levels=3), r"Dequantized.*MaximumLikelihood\(\)"),
    ],
    ids=["flow", "autoregressive", "energy", "dequantized"],
)
def test_what_has_no_velocity_is_refused_with_what_fits(build, cure):
    family = build()
    x = torch.randint(3, (4, 2)) if getattr(family, "levels", None) else torch.randn(4, 2)
    with pytest.raises(ValueError, match=f"FlowMatching needs a velocity, but site 'x' holds {cure}"):
        FlowMatching()(family)(x)


def test_a_plain_distribution_is_refused_too():
    with pytest.raises(ValueError, match=r"site 'x' holds Normal.*MaximumLikelihood"):
        FlowMatching().loss(lambda: pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(())), lambda: None)


def test_latent_variables_are_refused():
    vae = VAE((2,), latent_dim=2, prior=small())
    with pytest.raises(ValueError, match=r"latent variables.*'z'.*Trace_ELBO"):
        FlowMatching()(vae)(torch.randn(4, 2))
