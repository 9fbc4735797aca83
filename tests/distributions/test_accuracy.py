"""Accuracy of the densities and draws of ODEs, diffusions and energies with the default options."""

from math import exp, log, pi

import pyro.distributions as dist
import pytest
import torch
from teachers import Mixture, NoisedMixture
from torch import nn
from torch.testing import assert_close

from pyro_genmodels import Diffusion, DPMSolver, FlowDensity, VariancePreserving
from pyro_genmodels.distributions import Energy
from pyro_genmodels.distributions.ode import ContinuousFlow
from pyro_genmodels.distributions.sampler_gap import default_reverse_sampler
from pyro_genmodels.dynamics.ode import Dopri5, Dopri8, Euler, integrate, integrate_with_divergence
from pyro_genmodels.dynamics.reverse import simulate_reverse
from pyro_genmodels.families import RK4, ProbabilityFlow

WIDE = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-1.4, 0.6]), torch.tensor([0.5, 0.35]))
NARROW = Mixture(torch.tensor([0.3, 0.3, 0.4]), torch.tensor([-1.2, 0.0, 1.1]), torch.tensor([0.05, 0.1, 0.2]))
PROCESS = VariancePreserving()
FAR = torch.tensor([[10.0, -8.0], [-20.0, 5.0], [15.0, 15.0]])


def with_noise(law, level):
    """Return the mixture with normal noise added."""
    return Mixture(law.weights, law.loc, (law.scale**2 + level**2).sqrt())


def as_learned(law):
    """Return the mixture as a diffusion knows it: with the least noise of the process."""
    return with_noise(law, exp(-PROCESS.log_snr_range[1]))


# ODEs, row by row.


@pytest.fixture
def velocity():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2)).requires_grad_(False)
    for layer in network[::2]:
        layer.weight.mul_(2.5)
    return network


def flow_of(network, solver=None):
    base = dist.Normal(torch.zeros(2, dtype=network[0].weight.dtype), 1.0).to_event(1)
    return ContinuousFlow(lambda x, t, c: network(torch.cat([x, t[:, None]], -1)), base, (2,), solver=solver, network=network)


def test_far_rows_have_the_same_density_alone_and_among_others(velocity):
    """Right values: double precision and tolerances of 1e-9. Errors were 0.064 nats among 100 rows, and 0.005 alone."""
    batch = torch.cat([FAR, torch.randn(100, 2)])
    flow = flow_of(velocity)
    among, alone = flow.log_prob(batch), torch.cat([flow.log_prob(row[None]) for row in FAR])
    truth = flow_of(velocity.double(), Dopri8(1e-9, 1e-9)).log_prob(batch.double()).float()
    assert (among - truth).abs().max() < 0.01
    assert (alone - truth[:3]).abs().max() < 0.01
    assert_close(among[:3], alone, rtol=0.0, atol=0.01)


def test_far_rows_move_alike_alone_and_among_others(velocity):
    """Draws: right values are those of double precision and small tolerances."""

    def moved(rows, solver):
        return integrate(lambda t, x: velocity(torch.cat([x, t.expand(len(x), 1)], -1)), rows, 0.0, 1.0, solver).x

    batch = torch.cat([FAR, torch.randn(100, 2)])
    among, alone = moved(batch, Dopri5()), torch.cat([moved(row[None], Dopri5()) for row in FAR])
    velocity.double()

    def slope(t, x):
        return velocity(torch.cat([x, t.double().expand(len(x), 1)], -1))

    truth = integrate(slope, batch.double(), 0.0, 1.0, Dopri8(1e-9, 1e-9)).x.float()
    assert (among - truth).abs().max() < 0.01
    assert (alone - truth[:3]).abs().max() < 0.01


@pytest.mark.parametrize("adjoint", [False, True])
def test_gradients_of_far_rows_do_not_depend_on_others(velocity, adjoint):
    flow = flow_of(velocity, Dopri5(1e-5, 1e-5, adjoint=adjoint))
    rows = torch.cat([FAR, torch.randn(100, 2)]).requires_grad_()
    few = FAR.clone().requires_grad_()
    flow.log_prob(rows)[:3].sum().backward()
    flow.log_prob(few).sum().backward()
    assert_close(rows.grad[:3], few.grad, rtol=0.02, atol=0.02)


def test_a_diffusion_knows_far_rows_among_others():
    diffusion = NoisedMixture(WIDE).diffusion(PROCESS, (2,))
    law = as_learned(WIDE)
    far = torch.tensor([[6.0, -5.0], [-8.0, 8.0]])
    batch = torch.cat([far, law.distribution().sample((100, 2))])
    found = diffusion.log_prob(batch)
    assert ((found - law.log_prob(batch).sum(-1)).abs() < 0.01 + 1e-4 * found.abs()).all()


def test_an_infinite_divergence_is_an_error_even_with_fixed_steps():
    """The velocity is finite, and its Jacobian is not; the density was NaN."""
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        integrate_with_divergence(lambda t, x: (x * 0).sqrt(), torch.ones(3, 2), 0.0, 1.0, Euler(2))


# Samplers of diffusions.


@pytest.mark.parametrize("law", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("d", [1, 2, 10, 16])
def test_default_draws_meet_their_density(law, d):
    """Right value: the closed form at the draws of an accurate ODE, from the same noise. 20 steps were up to 0.6 nats off."""
    noise, denoise, density = torch.randn(500, d), NoisedMixture(law).denoise(PROCESS), as_learned(law)
    accurate = simulate_reverse(ProbabilityFlow(Dopri5(1e-5, 1e-5)), denoise, PROCESS, noise).x
    found = simulate_reverse(default_reverse_sampler((d,)), denoise, PROCESS, noise).x
    differences = (density.log_prob(found) - density.log_prob(accurate)).sum(-1)
    assert abs(differences.mean()) < 0.03


@pytest.mark.parametrize("sampler", [DPMSolver(20), DPMSolver(71)], ids=str)
def test_the_gap_of_a_sampler_is_that_of_the_closed_form(sampler):
    """The closed form gives -0.069 nats with 20 steps. False alarms: 6e-7, at five standard errors."""
    diffusion, law = NoisedMixture(WIDE).diffusion(PROCESS, (2,), sampler=sampler), as_learned(WIDE)
    noise = torch.randn(5_000, 2)
    ends = [simulate_reverse(s, NoisedMixture(WIDE).denoise(PROCESS), PROCESS, noise).x for s in (sampler, ProbabilityFlow())]
    known = (law.log_prob(ends[0]) - law.log_prob(ends[1])).sum(-1)
    found = diffusion.sampler_gap(200)
    error = (found.std_error**2 + known.var() / len(known)).sqrt()
    assert abs(found.value - known.mean()) < 5 * error + 1e-3
    assert found.evaluations == sampler.num_steps
    assert str(found).endswith(f"nats, with {sampler.num_steps} evaluations")


def test_the_gap_of_the_density_itself_is_zero():
    diffusion = NoisedMixture(WIDE).diffusion(PROCESS, (2,), sampler=ProbabilityFlow())
    assert abs(diffusion.sampler_gap(50).value) < 1e-4


def test_the_gap_of_a_conditional_diffusion_is_the_mean_over_its_contexts():
    diffusion = Diffusion((2,), context=1, levels=4, sampler=DPMSolver(3), likelihood=FlowDensity(RK4(2))).eval()
    gap = diffusion(torch.zeros(3, 1)).sampler_gap(20)
    assert gap.value.shape == gap.std_error.shape == ()
    assert gap.std_error > 0


@pytest.mark.parametrize("wrong", [1, 0, 2.5, "many"])
def test_a_gap_wants_two_samples(wrong):
    with pytest.raises(ValueError, match="sampler_gap wants"):
        NoisedMixture(WIDE).diffusion(PROCESS, (2,)).sampler_gap(wrong)


def test_large_events_keep_the_cheap_default():
    assert default_reverse_sampler((3, 32, 32)) == DPMSolver(20)
    assert Diffusion((2,)).sampler == Diffusion((2,))().sampler == default_reverse_sampler((2,))


# Energies.


@pytest.mark.parametrize("law", [WIDE, NARROW], ids=["wide", "narrow"])
def test_chains_do_not_stand_still_in_narrow_parts(law):
    """The mean log density of draws is at most 0.1 below the truth, and 0.2 is five standard errors; it was 0.7 below."""
    energy = Energy(lambda x: -law.log_prob(x).sum(-1), (1,), num_steps=200)
    found = law.log_prob(energy.sample((800,))).mean()
    truth = law.log_prob(law.distribution().sample((100_000,))).mean()
    assert -0.3 < found - truth < 0.2


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("low", [0.01, 0.05])
def test_energies_with_noise_are_drawn_from_their_own_density(d, low):
    """That at the lowest level of noise. The last position was replaced by a mean: 0.15 nats off for each coordinate."""
    law, density = NARROW, with_noise(NARROW, low)

    def energy(x, context):
        level = context[:, -1].exp()[:, None, None]
        scale = (law.scale**2 + level**2).sqrt()
        z = (x[..., None] - law.loc) / scale
        return -(law.weights.log() - scale.log() - 0.5 * z**2 - 0.5 * log(2 * pi)).logsumexp(-1).sum(-1)

    log_p = density.log_prob(Energy(energy, (d,), noise=(low, 3.0)).sample((1000,))).sum(-1)
    truth = density.log_prob(density.distribution().sample((100_000, d))).sum(-1).mean()
    assert abs(log_p.mean() - truth) < 5 * log_p.std() / 1000**0.5 + 0.03  # five standard errors: 6e-7
