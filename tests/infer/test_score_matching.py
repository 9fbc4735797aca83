"""Score matching: each objective against its own target, by hand, by quadrature and in closed form.

Where an estimate is compared with the truth at six standard errors, the false-alarm rate is 2e-9 for each number compared.
"""

import re
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from marks import slow_unless
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.optim import SGD
from scipy.stats import kstest
from teachers import Mixture, grid, perturb
from torch import nn
from torch.distributions import biject_to, constraints
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmodels import (
    MAF,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    DenoisingScoreMatching,
    DenseEnergy,
    EnergyModel,
    Flow,
    ImplicitScoreMatching,
    Labels,
    RealNVP,
    SlicedScoreMatching,
)
from pyro_genmodels.families import NICE

pytestmark = pytest.mark.usefixtures("float64")

OBJECTIVES = [ImplicitScoreMatching, SlicedScoreMatching, DenoisingScoreMatching]
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
MODES = Mixture(*torch.tensor([[0.3, 0.7], [-2.0, 1.5], [0.6, 0.9]]).double())
PRECISION = torch.tensor([[1.5, 0.4, -0.2], [0.4, 0.8, 0.1], [-0.2, 0.1, 1.1]]).double()


def no_latents(*args, **kwargs):
    pass


def gradients(loss, parameters):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(parameters), retain_graph=True)])


def model_of(make):
    """Independent data of a distribution that is made anew at every run."""

    def model(x, *args):
        with pyro.plate("data", len(x)):
            pyro.sample("x", make(*args), obs=x)

    return model


def loss_of(objective, model, *args, seed=None, **kwargs):
    if seed is not None:
        pyro.set_rng_seed(seed)
    return objective.differentiable_loss(model, no_latents, *args, **kwargs)


class Quadratic(nn.Module):
    """E(x) = x' A x / 2, of events of any shape."""

    def __init__(self, precision):
        super().__init__()
        self.precision = nn.Parameter(precision.clone())

    def forward(self, x):
        x = x.reshape(len(x), -1)
        return 0.5 * ((x @ self.precision) * x).sum(-1)


def gaussian(precision=PRECISION, **options):
    shape = (len(precision),)
    return EnergyModel(shape, energy=Quadratic(precision), standardize=False, sampler=None, **options)


def smooth(event_shape=(2,), **options):
    """An energy, of standardised data, of no particular form."""
    return perturb(EnergyModel(event_shape, energy=DenseEnergy((16,)), **{"sampler": None, **options}))


def by_hand(log_f, u, *contexts):
    """Half the square of the gradient and the trace of the Hessian of log_f, one row after the other."""
    terms = []
    for row in zip(u, *contexts, strict=True):
        at = row[0].detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(log_f(at[None], *row[1:]).sum(), at, create_graph=True)
        parts = score.reshape(-1)
        trace = sum(torch.autograd.grad(s, at, create_graph=True)[0].reshape(-1)[i] for i, s in enumerate(parts))
        terms.append(parts.square().sum() / 2 + trace)
    return torch.stack(terms)


def mean_within(estimates, truth, errors=6):
    """Whether the mean over the first dimension is the truth, within that many of its standard errors."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return bool(((estimates.mean(0) - truth).abs() <= errors * error + 1e-12).all())


# Implicit.


def test_the_implicit_loss_of_a_gaussian_energy_is_in_closed_form():
    family, x = gaussian(), torch.randn(5, 3)
    loss = loss_of(ImplicitScoreMatching(), family.model, x)
    a = family.energy.precision
    half = (a + a.T) / 2
    wanted = ((x @ half).square().sum(-1) / 2 - half.trace()).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, [a]), gradients(wanted, [a]))


def test_the_implicit_loss_of_a_plain_normal_is_in_closed_form():
    x = torch.randn(7)

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(1.4), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    value = ImplicitScoreMatching().loss_and_grads(model, no_latents, x)
    assert value == pytest.approx((((x - 0.3) ** 2 / 1.4**4) / 2 - 1 / 1.4**2).sum().item())
    store = pyro.get_param_store()
    found = [store["loc"].unconstrained().grad, store["scale"].unconstrained().grad]
    slope = (-2 * (x - 0.3) ** 2 / 1.4**5 + 2 / 1.4**3).sum() * 1.4  # of log scale
    torch.testing.assert_close(torch.stack(found), torch.stack([-((x - 0.3) / 1.4**4).sum(), slope]))


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("context", [0, 2, Labels(3)], ids=["no context", "context", "labels"])
def test_the_implicit_loss_and_its_gradient_are_exact_for_energies_of_every_shape(event_shape, context):
    family, x = smooth(event_shape, context=context), 2 * torch.randn(4, *event_shape) + 1
    c = [torch.randn(4, 2) if context == 2 else torch.tensor([0, 2, 1, 1])] if context else []
    family.standardize(x)
    loss = loss_of(ImplicitScoreMatching(), family.model, x, *c)
    u = family.pretransform(x)

    def log_f(u, *c):
        return dist.Normal(0.0, 1.0).log_prob(u).sum() - family.energy(u, *(family.embed(c) for c in c)).sum()

    wanted = by_hand(log_f, u, *(c[:, None] for c in c)).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, family.energy.parameters()), gradients(wanted, family.energy.parameters()))


class Normalised(nn.Module):
    """A convolutional energy of images, with a layer whose second derivative torch may be unable to batch."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Conv2d(1, 4, 3, padding=1), layer

    def forward(self, x):
        return self.layer(torch.tanh(self.first(x[:, None]))).tanh().flatten(1).square().sum(1)


LAYERS = {
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm((4, 2, 3)),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True),
    "group and dropout": lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Dropout(0.0)),
}


def normalised(name):
    return EnergyModel((2, 3), energy=Normalised(LAYERS[name]()), sampler=None, standardize=False)


@pytest.mark.parametrize("name", LAYERS)
def test_normalisation_layers_keep_the_implicit_loss_and_its_gradient_exact(name):
    family, x = normalised(name), torch.randn(3, 2, 3)
    parameters = [p for p in family.energy.parameters() if p is not family.energy.first.bias]
    loss = loss_of(ImplicitScoreMatching(), family.model, x)
    wanted = by_hand(lambda u: -family.energy(u).sum(), x).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, parameters), gradients(wanted, parameters))


@pytest.mark.parametrize("num_projections", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_normalisation_layers_keep_the_sliced_loss_and_its_gradient_exact(name, num_projections):
    """The curvature along a sign vector is the second derivative along a line, differentiated one row at a time."""
    family, x = normalised(name), torch.randn(3, 2, 3)
    parameters = [p for p in family.energy.parameters() if p is not family.energy.first.bias]
    loss = loss_of(SlicedScoreMatching(num_projections=num_projections), family.model, x, seed=7)
    pyro.set_rng_seed(7)
    signs = torch.randint(2, (num_projections, *x.shape)).to(x) * 2 - 1
    wanted = 0.0
    for row, v in zip(x, signs.movedim(1, 0), strict=True):
        at = row.clone().requires_grad_()
        (score,) = torch.autograd.grad(-family.energy(at[None]).sum(), at, create_graph=True)
        wanted = wanted + score.square().sum() / 2
        for one in v:
            t = torch.zeros((), requires_grad=True)
            (slope,) = torch.autograd.grad(-family.energy((row + t * one)[None]).sum(), t, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, t, create_graph=True)
            wanted = wanted + curvature / num_projections
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, parameters), gradients(wanted, parameters))


def small_flow(transform=MAF, **options):
    return perturb(Flow((2,), transform=transform(transforms=2, hidden=(8,)), **options))


def smooth_flow(**options):
    """An affine flow whose networks have no kinks."""
    return perturb(Flow((2,), transform=zuko.flows.MAF(2, transforms=2, hidden_features=(8,), activation=nn.SiLU), **options))


def test_the_implicit_loss_of_a_flow_is_that_of_its_density_in_standardised_coordinates():
    family, x = smooth_flow(), 3 * torch.randn(4, 2) + 5
    family.standardize(x)
    to_u = family.pretransform
    loss = loss_of(ImplicitScoreMatching(), family.model, x)
    wanted = by_hand(lambda u: family().log_prob(to_u.inv(u)), to_u(x)).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, family.parameters()), gradients(wanted, family.parameters()))


@pytest.mark.parametrize(
    ("objective", "transform", "tolerance"),  # of the midpoint rule; of signs, six of their errors are 2%
    [(ImplicitScoreMatching, t, 3e-3) for t in (MAF, NICE, RealNVP, NSF)] + [(SlicedScoreMatching, NSF, 0.05)],
)
def test_a_flow_is_trained_towards_the_scores_of_the_data_or_refused(objective, transform, tolerance):
    """Scores with jumps, as those of splines and of rectified units have, can only be matched by denoising."""
    family, loc = small_flow(transform, standardize=False), torch.tensor([0.5, -1.0])
    points, volume = grid(-6, 6, 120, dims=2)
    weight = dist.MultivariateNormal(loc, 0.5 * torch.eye(2)).log_prob(points).exp() * volume
    try:
        loss = loss_of(objective(), poutine.scale(family.model, scale=weight), points)
    except ValueError as error:
        assert "DenoisingScoreMatching" in str(error)  # noqa: PT017 (either will do)
        return
    explicit = (weight * (family().score(points) + 2 * (points - loc)).square().sum(-1)).sum() / 2
    found, wanted = (gradients(each, family.parameters()) for each in (loss, explicit))
    assert (found - wanted).norm() < tolerance * wanted.norm()


# Sliced.


def test_sliced_is_unbiased_for_implicit():
    """Eight rows, with and without the exact square: 16 comparisons."""
    family, x = smooth((3,), standardize=False), torch.randn(8, 3)
    wanted = ImplicitScoreMatching().per_datum(family(), x)
    for reduced in (False, True):
        one = SlicedScoreMatching(variance_reduced=reduced).per_datum(family(), x.expand(4000, 8, 3))
        assert mean_within(one, wanted)
        many = SlicedScoreMatching(num_projections=5, variance_reduced=reduced).per_datum(family(), x.expand(4000, 8, 3))
        assert mean_within(many, wanted)
        assert one.std(0).min() > 0
        ratio = one.var(0) / many.var(0)  # with a kurtosis below 5 its error is below 0.25
        assert ((ratio - 5).abs() < 1.5).all()


def test_the_variance_of_sliced_is_that_of_its_closed_form_and_less_where_reduced():
    """Of a Gaussian energy: the sum over pairs i < j of 4 A_ij^2, or of (s_i s_j - 2 A_ij)^2."""
    family, x = gaussian(), torch.tensor([1.0, -0.5, 2.0])
    score, n = -x @ PRECISION, 100_000
    pairs = torch.triu_indices(3, 3, 1).unbind()
    whole, reduced = (score.outer(score) - 2 * PRECISION)[pairs].square().sum(), 4 * PRECISION[pairs].square().sum()
    assert reduced < whole
    for truth, option in ((whole, False), (reduced, True)):
        draws = SlicedScoreMatching(variance_reduced=option).per_datum(family(), x.expand(n, 3)).detach()
        squares = (draws - draws.mean()).square()
        assert abs(squares.mean() - truth) < 6 * squares.std() / n**0.5


def test_signs_are_exact_where_coordinates_are_independent():
    family, x = gaussian(torch.diag(torch.tensor([0.5, 2.0]))), torch.randn(6, 2)
    torch.testing.assert_close(
        loss_of(SlicedScoreMatching(), family.model, x), loss_of(ImplicitScoreMatching(), family.model, x)
    )


# Denoising.


def test_denoising_adds_noise_and_asks_for_it_back():
    family, x = gaussian(), torch.randn(5, 3)
    pyro.set_rng_seed(4)
    epsilon = [torch.randint(1, (5,)), torch.randn(5, 3)][1]  # the level comes first
    wanted = 0.5 * 0.7**2 * (-(x + 0.7 * epsilon) @ PRECISION + epsilon / 0.7).square().sum()
    torch.testing.assert_close(loss_of(DenoisingScoreMatching(0.7), family.model, x, seed=4), wanted)


def test_the_weight_multiplies_the_loss_at_its_level():
    family, x = smooth((2,), noise=(0.1, 2.0)), torch.randn(6, 2)
    family.standardize(x)
    seen = []

    def weighting(sigma):
        seen.append(sigma)
        return 1 / sigma

    def terms(**options):
        pyro.set_rng_seed(3)
        return DenoisingScoreMatching(**options).per_datum(family(), x)

    plain, weighed, default = terms(weighting=torch.ones_like), terms(weighting=weighting), terms()
    torch.testing.assert_close(weighed, plain / seen[0])
    torch.testing.assert_close(default, plain * seen[0] ** 2)


def levels_of(objective, family, n=5000):
    """The levels that n data are given."""
    seen = []
    objective.weighting = lambda sigma: seen.append(sigma) or sigma**2
    objective.per_datum(family(), torch.randn(n, 2))
    return seen[0]


def test_levels_of_a_model_that_is_told_are_even_in_each_order_of_magnitude():
    """Kolmogorov and Smirnov, at a false-alarm rate of 1e-6."""
    sigma = levels_of(DenoisingScoreMatching(), smooth(noise=(0.01, 10.0)))
    assert sigma.shape == (5000,)
    assert kstest((sigma / 0.01).log() / log(1000), "uniform").pvalue > 1e-6


def test_levels_that_are_given_are_taken_alike_and_one_is_taken_always():
    sigma = levels_of(DenoisingScoreMatching([0.1, 0.5, 2.0]), smooth(noise=(0.01, 10.0)))
    counts = torch.stack([(sigma == level).sum() for level in (0.1, 0.5, 2.0)])
    assert counts.sum() == 5000
    assert ((counts - 5000 / 3).abs() < 6 * (5000 * 2 / 9) ** 0.5).all()
    assert (levels_of(DenoisingScoreMatching(0.3), smooth(noise=(0.01, 10.0))) == 0.3).all()
    assert (levels_of(DenoisingScoreMatching(), smooth()) == 0.1).all()


@pytest.mark.parametrize("make", [smooth, smooth_flow, lambda: gaussian(PRECISION[:2, :2])])
def test_several_levels_are_refused_by_models_that_are_told_none(make):
    with pytest.raises(ValueError, match=r"at 2 levels.*'x'.*EnergyModel\(\.\.\., noise="):
        loss_of(DenoisingScoreMatching([0.1, 0.5]), make().model, torch.randn(4, 2))


@pytest.mark.slow
def test_an_energy_told_the_noise_learns_the_scores_at_every_level():
    """Trained on fresh draws of a mixture; the mean square of the error is within a twentieth of that of the score."""
    family, data = EnergyModel((), energy=DenseEnergy((32, 32)), noise=(0.2, 3.0), sampler=None), MODES.distribution()
    family.standardize(data.sample((10_000,)))
    optimiser, steps = torch.optim.Adam(family.parameters(), lr=1e-2), 1500
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of(DenoisingScoreMatching(), family.model, data.sample((500,))).div(500).backward()
        optimiser.step()
        decay.step()
    for sigma in torch.tensor([0.2, 0.5, 1.0, 3.0]):
        noisy = Mixture(MODES.weights, MODES.loc, (MODES.scale**2 + (sigma * family.scale) ** 2).sqrt())
        x = torch.linspace(-14.0, 14.0, 2000, requires_grad=True)
        (truth,) = torch.autograd.grad(noisy.log_prob(x).sum(), x)
        weight, error = noisy.log_prob(x).exp(), family().at_noise(sigma).score(x) - truth
        assert (weight * error.square()).sum() < 0.05 * (weight * truth.square()).sum()


# Coordinates.


def test_on_an_interval_coordinates_are_the_log_odds():
    a, x = torch.tensor(2.0, requires_grad=True), torch.rand(6)
    loss = loss_of(ImplicitScoreMatching(), model_of(lambda: dist.Beta(a, 1.3)), x)
    torch.testing.assert_close(loss, ((2 - 3.3 * x).square() / 2 - 3.3 * x * (1 - x)).sum())
    torch.testing.assert_close(gradients(loss, [a]), ((2 - 3.3 * x) * (1 - x) - x * (1 - x)).sum().reshape(1))


def test_of_positive_numbers_coordinates_are_the_logarithms():
    x = torch.rand(6) + 0.1
    loss = loss_of(ImplicitScoreMatching(), model_of(lambda: dist.Gamma(2.0, 0.7)), x)
    torch.testing.assert_close(loss, ((2 - 0.7 * x).square() / 2 - 0.7 * x).sum())


def test_on_a_simplex_coordinates_are_one_fewer():
    p, x, to_x = dist.Dirichlet(torch.tensor([2.0, 1.5, 3.0])), torch.rand(4, 3), biject_to(constraints.simplex)
    x = x / x.sum(-1, keepdim=True)

    def log_f(u):
        return p.log_prob(to_x(u)) + to_x.log_abs_det_jacobian(u, to_x(u))

    torch.testing.assert_close(loss_of(ImplicitScoreMatching(), model_of(lambda: p), x), by_hand(log_f, to_x.inv(x)).sum())


def test_an_energy_on_an_interval_is_matched_in_log_odds():
    family, x = smooth(**interval(-1.0, 3.0)), 4 * torch.rand(5, 2) - 1
    loss = loss_of(ImplicitScoreMatching(), family.model, x)

    def log_f(u):
        unit = u.sigmoid()
        return (unit.log() + (1 - unit).log()).sum() - family.energy(2 * unit - 1).sum()

    wanted = by_hand(log_f, ((x + 1) / 4).logit()).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, family.parameters()), gradients(wanted, family.parameters()))


def interval(low, high):
    return {"support": constraints.interval(low, high)}


@each_objective
@pytest.mark.parametrize("build", [smooth, smooth_flow])
@pytest.mark.parametrize(
    "units",
    [
        (({}, lambda x: x), ({}, lambda x: 50 * x - 7)),
        ((interval(0.0, 1.0), lambda x: x.sigmoid()), (interval(-2.0, 6.0), lambda x: 8 * x.sigmoid() - 2)),
    ],
    ids=["standardised", "interval"],
)
def test_units_of_the_data_do_not_weigh(objective, build, units):
    found = []
    for options, to_data in units:
        pyro.set_rng_seed(1)
        family, x = build(**options), to_data(torch.randn(6, 2))
        family.standardize(x)
        loss = loss_of(objective(), family.model, x, seed=2)
        found.append((loss, gradients(loss, family.parameters())))
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


# What can be trained so.


@each_objective
@pytest.mark.parametrize(
    ("build", "x", "cure"),
    [
        (
            lambda: Autoregressive((2,), likelihood=BernoulliLikelihood(), hidden=(4,)),
            torch.ones(3, 2),
            r"MaximumLikelihood\(\)",
        ),
        (lambda: small_flow(levels=4), torch.ones(3, 2).long(), r"MaximumLikelihood\(\)"),
        (lambda: EnergyModel((2,), support=constraints.boolean), torch.ones(3, 2), r"ContrastiveDivergence\(\).*energies"),
        (lambda: VAE((2,), latent_dim=1, hidden=(4,), likelihood=BernoulliLikelihood()), torch.ones(3, 2), "Trace_ELBO"),
    ],
    ids=["discrete", "dequantized", "discrete energy", "discrete VAE"],
)
def test_discrete_data_are_refused(objective, build, x, cure):
    family = build()
    x = x if x.dtype == torch.long else x.to(torch.get_default_dtype())
    with pytest.raises(ValueError, match=re.compile(f"{objective.__name__}.*'x'.*({cure})", re.S)):
        objective().differentiable_loss(family.model, family.guide, x)


@each_objective
def test_a_vae_as_likelihood_is_refused_and_trace_elbo_is_named(objective):
    vae = VAE((2,), latent_dim=1, hidden=(4,))
    with pytest.raises(ValueError, match=f"{objective.__name__} needs a density, but site 'x' has none.*Trace_ELBO"):
        loss_of(objective(), model_of(vae), torch.randn(3, 2))


@pytest.mark.parametrize("noise", [0.0, [0.1, -1.0], [], float("nan"), float("inf")], ids=str)
def test_noise_and_projections_that_make_no_sense_are_refused(noise):
    with pytest.raises(ValueError, match="positive standard deviations"):
        DenoisingScoreMatching(noise)
    with pytest.raises(ValueError, match=r"num_projections of 1 or more.*0"):
        SlicedScoreMatching(num_projections=0)


# The contract of objectives.


@each_objective
@pytest.mark.parametrize("build", [smooth, smooth_flow, lambda: smooth(())], ids=["energy", "flow", "scalar energy"])
def test_both_doors_follow_the_same_gradient(objective, build):
    family = build()
    x = torch.randn(6, *family.event_shape)
    family.standardize(x)
    loss = loss_of(objective(), family.model, x, seed=5)
    wanted, before = gradients(loss, family.parameters()), [p.detach().clone() for p in family.parameters()]
    module = objective()(family)
    assert {id(p) for p in module.parameters()} == {id(p) for p in family.parameters()}
    pyro.set_rng_seed(5)
    torch.testing.assert_close(gradients(module(x), module.parameters()), wanted)
    svi = SVI(family.model, family.guide, SGD({"lr": 1e-2}), objective())
    for step in (svi.evaluate_loss, svi.step):
        pyro.set_rng_seed(5)
        assert step(x) == pytest.approx(loss.item())
    moved = torch.cat([(b - p).flatten() for b, p in zip(before, family.parameters(), strict=True)])
    torch.testing.assert_close(moved, 1e-2 * wanted)


@each_objective
def test_no_negatives_are_drawn(objective):
    family, x = smooth(sampler="default"), torch.randn(6, 2)
    before = {name: t.clone() for name, t in family.replay_buffer.state_dict().items()}
    loss_of(objective(), family.model, x).backward()
    objective().loss(family.model, family.guide, x)
    assert all(torch.equal(t, before[name]) for name, t in family.replay_buffer.state_dict().items())
    assert not family.replay_buffer.is_started


@each_objective
def test_scales_masks_and_minibatches_count(objective):
    family, x, c = smooth(context=1), torch.randn(5, 2), torch.randn(5, 1)
    present, weight = torch.tensor([True, False, True, True, False]), torch.rand(5)
    family.standardize(x, c)
    pyro.set_rng_seed(3)
    each = objective().per_datum(family(c), x)
    model = poutine.mask(poutine.scale(family.model, scale=weight), mask=present)
    torch.testing.assert_close(loss_of(objective(), model, x, c, seed=3, size=20), 4 * (each * weight)[present].sum())

    def subsampled(x, c):
        with pyro.plate("all", 10, subsample=torch.arange(5)):
            pyro.sample("x", family(c).mask(present), obs=x)

    torch.testing.assert_close(loss_of(objective(), subsampled, x, c, seed=3), 2 * each[present].sum())
    several = objective(num_particles=4)
    vectorised = objective(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    found = loss_of(several, family.model, x, c, seed=3), loss_of(vectorised, family.model, x, c, seed=3)
    pyro.set_rng_seed(3)
    wanted = sum(objective().per_datum(family(c), x).sum() for _ in range(4)) / 4
    torch.testing.assert_close(found[0], wanted)
    if objective is ImplicitScoreMatching:
        torch.testing.assert_close(found[1], wanted)


class Hidden(PyroModule):
    """A global latent variable, one for each row, and data given both."""

    def __init__(self):
        super().__init__()
        self.family, self.shift = smooth(context=1), PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, x):
        shift = self.shift
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.family((z + shift)[:, None]), obs=x)


@each_objective
def test_terms_of_latent_variables_stay(objective):
    model, x = Hidden(), torch.randn(5, 2)
    guide = AutoNormal(model)
    guide(x)
    parameters = [*model.family.energy.parameters(), *guide.parameters()]
    pyro.set_rng_seed(3)
    loss = objective().differentiable_loss(model, guide, x)
    pyro.set_rng_seed(3)
    q = poutine.trace(guide).get_trace(x)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(x)
    q.compute_log_prob()
    p.compute_log_prob(lambda name, site: name in ("shift", "z"))
    latent = sum(q.nodes[n]["log_prob_sum"] for n in q.stochastic_nodes) - sum(
        p.nodes[n]["log_prob_sum"] for n in ("shift", "z")
    )
    wanted = latent + objective().per_datum(p.nodes["x"]["fn"], x).sum()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradients(loss, parameters), gradients(wanted, parameters))


CAPTURED = {
    "energy": smooth,
    "told the noise": lambda: smooth(noise=(0.1, 2.0)),
    "flow": smooth_flow,
    "image": lambda: smooth((2, 2)),
}


@each_objective
@pytest.mark.parametrize("name", slow_unless([name for name in CAPTURED if name != "flow"], CAPTURED))
def test_a_loss_and_its_gradient_are_captured_as_one_graph(objective, name):
    family = CAPTURED[name]()
    x, fresh = torch.randn(2, 6, *family.event_shape)
    family.standardize(x)
    family.eval()

    def step(x):
        loss = loss_of(objective(), family.model, x)
        return loss, gradients(loss, family.parameters())

    with pyro.validation_enabled(False):
        graph = make_fx(step)(x)
        perturb(family)
        pyro.set_rng_seed(6)
        wanted = step(fresh)
        pyro.set_rng_seed(6)
        torch.testing.assert_close(graph(fresh), wanted)


def test_denoising_is_captured_while_validation_is_on():
    """The look at the data for the warning about the default noise was in the way."""
    x, fresh = torch.randn(2, 6)
    normal = dist.Normal(0.0, 1.0, validate_args=False)  # whose own validation reads values too
    with pyro.validation_enabled(True):
        objective = DenoisingScoreMatching()
        graph = make_fx(lambda x: objective.per_datum(normal, x))(x)
        pyro.set_rng_seed(6)
        wanted = objective.per_datum(normal, fresh)
        pyro.set_rng_seed(6)
        torch.testing.assert_close(graph(fresh), wanted)


def test_score_coordinates_are_computed_once_a_step(monkeypatch):
    calls = []
    family, x = smooth(), torch.randn(6, 2)
    kind = type(family())
    own = kind.score_coordinates
    monkeypatch.setattr(kind, "score_coordinates", lambda self, x: calls.append(1) or own(self, x))
    DenoisingScoreMatching().score_loss(family(), x)
    assert len(calls) == 1


def test_a_default_noise_that_hides_the_data_is_warned_of_once():
    """Data of deviation 1e-3 under noise of 0.1: the best fit has a deviation of 0.1, 100 times that of the data."""
    x, objective = 1e-3 * torch.randn(200), DenoisingScoreMatching()
    model = model_of(lambda: dist.Normal(0.0, pyro.param("scale", torch.tensor(1e-3), constraint=constraints.positive)))
    with pytest.warns(RuntimeWarning, match=r"noise of 0\.1 by default, but the data deviate by 0\.001 at most"):
        loss_of(objective, model, x)
    loss_of(objective, model, x)  # once
    loss_of(DenoisingScoreMatching(1e-4), model, x)  # a choice
    loss_of(DenoisingScoreMatching(), model, 1000 * x)
    with pyro.validation_enabled(False):
        loss_of(DenoisingScoreMatching(), model, x)
