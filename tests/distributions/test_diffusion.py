"""Diffusions as distributions: predictions, guidance, two densities, scores, and how they are trained.

Statistical tests here have a false-alarm rate of 1e-7 each (`assert_means`).
"""

import copy
import pickle
from math import exp, log, pi

import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.optim import Adam
from scipy.stats import norm
from teachers import Gaussian, Mixture, NoisedGaussian, NoisedMixture, assert_means, perturb
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_genmodels import (
    VAE,
    BernoulliLikelihood,
    DenoisingScoreMatching,
    DenseEnergy,
    DenseField,
    Diffusion,
    Dopri5,
    DPMSolver,
    EnergyModel,
    Flow,
    FlowDensity,
    FlowMatching,
    Hutchinson,
    ImplicitScoreMatching,
    Labels,
    MaximumLikelihood,
    NormalLikelihood,
    VariancePreserving,
    VariationalBound,
    log_likelihood,
    train,
)
from pyro_genmodels.distributions.diffusion import DiffusionLikelihood, ReverseDiffusion
from pyro_genmodels.dynamics.denoiser import Denoiser
from pyro_genmodels.families import (
    DDIM,
    RK4,
    Ancestral,
    CosineVariancePreserving,
    DataPrediction,
    Heun,
    Karras,
    NoisePrediction,
    Preconditioned,
    ProbabilityFlow,
    ScorePrediction,
    SubVariancePreserving,
    VarianceExploding,
    VelocityPrediction,
)
from pyro_genmodels.infer import LikelihoodWeighting, LogNormalWeighting, TrigonometricInterpolant, UniformWeighting
from pyro_genmodels.training import checkpoints

PROCESSES = [VariancePreserving(), SubVariancePreserving(), CosineVariancePreserving(), VarianceExploding(), Karras()]
PREDICTIONS = [
    NoisePrediction(),
    DataPrediction(),
    VelocityPrediction(),
    ScorePrediction(),
    Preconditioned(),
    Preconditioned(0.5),
]
WEIGHTINGS = [UniformWeighting(), LikelihoodWeighting(), LikelihoodWeighting(importance=False), LogNormalWeighting()]
TIGHT = FlowDensity(Dopri5(1e-9, 1e-9))
LAW = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-1.4, 0.6]), torch.tensor([0.5, 0.35]))
COV = torch.tensor([[1.2, 0.7], [0.7, 0.9]], dtype=torch.float64)
LOC = torch.tensor([0.3, -0.2], dtype=torch.float64)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def small(event_shape=(2,), **options):
    return perturb(Diffusion(event_shape, **{"network": DenseField(16, 1), "sampler": DPMSolver(4), **options}), 0.2)


class Seen(nn.Module):
    """A network that keeps the contexts it was asked with."""

    def __init__(self):
        super().__init__()
        self.scale, self.contexts = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x, t, context=None):
        self.contexts.append(context)
        return self.scale * x


def gaussian(process, **options):
    return NoisedGaussian(Gaussian(LOC, COV)).diffusion(process, (2,), **options)


def left_over(process):
    """The variance of the noise that is left in data at the start, in their scale."""
    return exp(-2 * process.log_snr_range[1])


def shrunk(process, by=0.8, scale=1.0, **options):
    """A diffusion on the line whose denoiser says too little: by times that of N(0, scale^2)."""
    teacher = NoisedMixture(Mixture(torch.ones(1), torch.zeros(1), torch.full((1,), scale)))

    class Less(type(teacher)):
        def data(self, x, alpha, sigma):
            return by * super().data(x, alpha, sigma)

    return Less(teacher.law).diffusion(process, (1,), **options)


# Predictions.


@every_process
@pytest.mark.parametrize("one", PREDICTIONS, ids=repr)
@pytest.mark.parametrize("other", PREDICTIONS, ids=repr)
def test_predictions_convert_exactly(process, one, other, float64):
    """A network that says one thing, wrapped to say another, is the same denoiser and the same estimate of the noise."""
    network = perturb(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)))
    t = process.time(torch.linspace(*process.log_snr_range, 9))
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = torch.hypot(alpha, sigma).unsqueeze(1) * torch.randn(9, 2)
    first = Denoiser(lambda x, t, context: network(torch.cat([x, t.unsqueeze(1)], 1)), process, one)

    def converted(scaled, told, context):
        return other.output(first(x, t), x, alpha, sigma)

    second = Denoiser(converted, process, other)
    assert_close(second(x, t), first(x, t), rtol=1e-6, atol=1e-6)
    scale = (alpha / sigma).unsqueeze(1)
    assert ((second.noise(x, t) - first.noise(x, t)) / (1 + scale)).abs().max() < 1e-6


@every_process
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_estimates_of_data_and_noise_make_up_what_was_seen(process, prediction, float64):
    t = process.time(torch.linspace(*process.log_snr_range, 9))
    alpha, sigma = (part(t).unsqueeze(1) for part in (process.alpha, process.sigma))
    x = torch.hypot(alpha, sigma) * torch.randn(9, 2)
    denoiser = Denoiser(lambda x, t, context: x.sin() + t.unsqueeze(1).cos(), process, prediction)
    assert_close(alpha * denoiser(x, t) + sigma * denoiser.noise(x, t), x, rtol=1e-9, atol=1e-9)


@every_process
def test_predictions_are_what_they_are_called(process, float64):
    """Of data and noise that are known: what the network should say."""
    data, noise = torch.randn(2, 9, 2)
    t = process.time(torch.linspace(*process.log_snr_range, 9))
    alpha, sigma = process.alpha(t), process.sigma(t)
    x, a, s = process.noised(data, t, noise), alpha.unsqueeze(1), sigma.unsqueeze(1)
    r = torch.hypot(a, s)
    truths = {
        NoisePrediction(): noise, DataPrediction(): data, ScorePrediction(): -noise / s,
        VelocityPrediction(): (a * noise - s * data) / r, Preconditioned(): -(a * noise - s * data) / r,
    }  # fmt: skip
    for prediction, truth in truths.items():
        assert_close(prediction.output(data, x, alpha, sigma), truth, rtol=1e-5, atol=1e-5)


@every_process
@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
def test_preconditioning_has_inputs_and_targets_of_deviation_one(process, deviation, float64):
    prediction, n = Preconditioned(deviation), 20_000
    for log_snr in torch.linspace(*process.log_snr_range, 3):
        t = process.time(log_snr).expand(n)
        data, noise = deviation * torch.randn(n, 1), torch.randn(n, 1)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = process.noised(data, t, noise)
        assert_means((prediction.scale(alpha, sigma).unsqueeze(1) * x) ** 2, 1.0)
        assert_means(prediction.output(data, x, alpha, sigma) ** 2, 1.0)


def test_networks_are_told_the_noise_or_the_time():
    told, process = [], Karras()

    def network(x, t, context):
        told.append(t)
        return x

    for clock in (True, False):
        Denoiser(network, process, NoisePrediction(), clock)(torch.randn(3, 2), torch.tensor([0.1, 1.0, 10.0]))
    assert_close(told[0], torch.tensor([0.1, 1.0, 10.0]).log() / 4)
    assert_close(told[1], torch.tensor([0.1, 1.0, 10.0]))


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"should return \(3, 2\).*not \(3, 1\)"):
        Denoiser(lambda x, t, c: x[:, :1], Karras(), NoisePrediction())(torch.randn(3, 2), torch.tensor(1.0))


# Guidance.


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=repr)
def test_guidance_of_one_is_the_conditional_and_of_nothing_the_unconditional(prediction, float64):
    diffusion = perturb(small(context=2, drop_context=0.3, prediction=prediction, likelihood=FlowDensity(RK4(3)))).eval()
    c, x = torch.randn(5, 2), torch.randn(5, 2)
    given, without = diffusion(c), diffusion(c)._with(context=diffusion.null.expand(5, 2))
    plain = ReverseDiffusion(
        Denoiser(diffusion.network, diffusion.process, prediction), (2,),
        context=c, likelihood=diffusion.likelihood, sampler=diffusion.sampler,
    )  # fmt: skip
    for d, weight, wanted in ((given, 1.0, plain), (given, 0.0, without)):
        guided = d.guided(weight)
        assert_close(guided.log_prob(x), wanted.log_prob(x))
        assert_close(guided.score(x), wanted.score(x))
        draws = []
        for one in (guided, wanted):
            pyro.set_rng_seed(1)
            draws.append(one.sample((2,)))
        assert_close(*draws)
    assert (given.log_prob(x) - without.log_prob(x)).abs().min() > 1e-4


@pytest.mark.parametrize("weight", [0.5, 3.0])
def test_guided_scores_lie_on_the_line_through_both(weight, float64):
    diffusion = small(context=Labels(3), drop_context=0.2).eval()
    d, x, t = diffusion(torch.tensor([0, 2])), torch.randn(2, 2), torch.tensor(0.4)
    given, without, guided = (d.guided(w).noisy_score(x, t) for w in (1.0, 0.0, weight))
    assert_close(guided, without + weight * (given - without))
    diffusion.guidance = weight
    assert_close(diffusion(torch.tensor([0, 2])).noisy_score(x, t), guided)


def test_contexts_are_dropped_in_training_as_often_as_told():
    diffusion, c, x = small(context=2, drop_context=0.25, network=Seen()), torch.randn(20_000, 2), torch.randn(20_000, 2)
    seen, null = diffusion.network.contexts, diffusion.null
    diffusion.standardize(x, c)
    for objective in (DenoisingScoreMatching(), FlowMatching()):
        objective.loss(diffusion.eval().model, diffusion.guide, x, c)  # as in validation
        assert seen[-1].equal(diffusion.context(c))
        diffusion.train()
        objective.differentiable_loss(diffusion.model, diffusion.guide, x, c)
        assert_means((seen[-1] == null).all(1).double().unsqueeze(1), 0.25)
    with torch.no_grad():
        diffusion(c).sample()
    assert not (torch.cat(seen[4:]) == null).any()  # draws go by what they are told, in training mode too


def test_training_goes_without_guidance():
    """Or the network would learn to take back what guidance adds."""
    losses = []
    for guidance in (1.0, 3.0):
        torch.manual_seed(0)
        diffusion = perturb(small(context=2, drop_context=0.2, guidance=guidance, likelihood=VariationalBound()))
        x, c = torch.randn(8, 2), torch.randn(8, 2)
        for objective in (DenoisingScoreMatching(), FlowMatching(), MaximumLikelihood()):
            pyro.set_rng_seed(1)
            losses.append(objective.differentiable_loss(diffusion.model, diffusion.guide, x, c))
    assert_close(losses[:3], losses[3:])
    assert diffusion.eval()(c).denoiser.guidance == 3.0


@pytest.mark.parametrize("wrapped", [False, True])
def test_pyro_draws_by_the_sampler_where_no_gradient_is_wanted(wrapped):
    diffusion = small(sampler=DDIM(7), network=Seen()).eval()
    asked = diffusion.network.contexts

    def model():
        return pyro.sample("x", diffusion().mask(True) if wrapped else diffusion())

    def calls(run):
        before = len(asked)
        run()
        return len(asked) - before

    with torch.no_grad():
        assert calls(model) == 7
    assert calls(lambda: Predictive(model, num_samples=3)()) <= 5 * 7
    assert calls(model) > 7  # of parameters that learn, by the ODE
    assert model().requires_grad
    diffusion.requires_grad_(False)
    assert calls(model) == 7
    assert not model().requires_grad


def test_a_null_context_is_learned():
    diffusion, x, c = small(context=2, drop_context=0.5), torch.randn(32, 2), torch.randn(32, 2)
    DenoisingScoreMatching()(diffusion)(x, c).backward()
    assert diffusion.null.grad.abs().sum() > 0


def test_guidance_without_what_it_takes_is_refused():
    with pytest.raises(ValueError, match=r"drop_context=0\.1"):
        small(context=2)(torch.randn(2)).guided(2.0)
    with pytest.raises(ValueError, match="drop_context"):
        small(drop_context=0.1)
    with pytest.raises(ValueError, match="drop_context"):
        small(context=2, drop_context=1.0)
    with pytest.raises(ValueError, match=r"drop_context=0\.1"):
        small(context=2, guidance=2.0)


# Densities.


@every_process
def test_both_densities_meet_the_closed_form_with_the_exact_score(process, float64):
    """Of Gaussian data with the least noise: the flow at a point, the bound on average over its own noise at the point."""
    noise, x = left_over(process), LOC + torch.randn(3, 2)
    truth = Gaussian(LOC, COV + noise * torch.eye(2))
    flow = gaussian(process, likelihood=TIGHT).log_prob(x)
    # what is left of the data at the end moves the prior by at most e^low, and less in log densities
    assert_close(flow, truth.log_prob(x), rtol=0, atol=5 * exp(process.log_snr_range[0]) + 1e-6)
    bound = gaussian(process, likelihood=VariationalBound(4)).log_prob(x.expand(4000, 3, 2))
    wanted = truth.log_prob(x) - 0.5 * noise * truth.cov.inverse().trace()  # of x with that noise once more
    end = torch.cat([wanted - 2 * exp(2 * process.log_snr_range[0]), wanted + 2 * exp(2 * process.log_snr_range[0])]).reshape(
        2, 3
    )
    error = 6 * bound.std(0) / 4000**0.5  # 2e-9
    assert ((bound.mean(0) > end[0] - error) & (bound.mean(0) < end[1] + error)).all()


@every_process
def test_the_flow_has_the_density_of_a_mixture(process, float64):
    x, noise = torch.linspace(-3, 2, 9).unsqueeze(1), left_over(process)
    law = Mixture(LAW.weights, LAW.loc, (LAW.scale**2 + noise).sqrt())
    found = NoisedMixture(LAW).diffusion(process, (1,), likelihood=TIGHT).log_prob(x)
    assert_close(found, law.log_prob(x[:, 0]), rtol=0, atol=5 * exp(process.log_snr_range[0]) + 1e-6)


@pytest.mark.parametrize("num_times", [1, 5])
def test_the_bound_is_the_same_on_average_at_any_number_of_times(num_times, float64):
    process, x = VariancePreserving(), torch.tensor([[0.4], [-1.5]])
    many = shrunk(process, likelihood=VariationalBound(64)).log_prob(x.expand(2000, 2, 1)).mean(0)
    few = shrunk(process, likelihood=VariationalBound(num_times)).log_prob(x.expand(4000, 2, 1))
    assert ((few.mean(0) - many).abs() < 6 * few.std(0) * (1 / 4000 + 1 / 2000) ** 0.5).all()


def test_more_times_err_less(float64):
    x = torch.zeros(4000, 1)
    spread = [shrunk(VariancePreserving(), likelihood=VariationalBound(k)).log_prob(x).std() for k in (1, 16)]
    assert spread[1] < 0.3 * spread[0]


def test_kinds_are_told():
    diffusion = small((20,))
    kinds = [FlowDensity(), FlowDensity(trace=Hutchinson()), VariationalBound()]
    assert [diffusion().with_likelihood(kind).density for kind in kinds] == ["estimate", "estimate", "lower bound"]
    assert [small()().with_likelihood(kind).density for kind in kinds] == ["exact", "estimate", "lower bound"]
    assert [small()().with_likelihood(kind).mean_inside_log for kind in kinds] == [True, False, False]
    x = torch.randn(3, 2)
    for kind, name in zip(kinds, ["exact", "estimate", "lower bound"], strict=True):
        assert log_likelihood(small(likelihood=kind), x, num_samples=3).kind == name


def test_a_likelihood_of_your_own():
    class NormalLikelihood(DiffusionLikelihood):
        flow_density = FlowDensity()

        def density(self, diffusion):
            return "exact"

        def mean_inside_log(self, diffusion):
            return True

        def log_prob(self, diffusion, value):
            return diffusion.base.log_prob(value)

    family, x = Diffusion((2,), likelihood=NormalLikelihood()), torch.randn(5, 2)
    for d in (family(), Diffusion((2,))().with_likelihood(NormalLikelihood())):
        assert d.density == "exact"
        assert_close(d.log_prob(x), dist.Normal(0.0, 1.0).log_prob(x).sum(-1))


def test_log_likelihood_takes_the_mean_of_bounds():
    """The log of their mean exponential is no bound: it lies above."""
    diffusion, x = small(likelihood=VariationalBound(), standardize=False).eval(), torch.randn(3, 2)
    pyro.set_rng_seed(4)
    found = log_likelihood(diffusion, x, num_samples=2000)
    draws = diffusion().log_prob(x.expand(2000, 3, 2)).detach()
    error = draws.std(0) / 2000**0.5
    assert ((found.values - draws.mean(0)).abs() < 6 * 2**0.5 * error).all()
    assert_close(found.std_error, error, rtol=0.2, atol=0)
    assert (found.values < draws.logsumexp(0) - log(2000) - 0.5).all()


def test_how_exact_a_flow_density_is_is_told(float64):
    d, x = small()().with_likelihood(FlowDensity(Dopri5(1e-4, 1e-4))), torch.randn(4, 2)
    found = d.flow.log_prob_with_error(x)
    assert_close(found.values, d.log_prob(x), rtol=1e-5, atol=1e-5)
    assert found.evaluations > 0
    assert (found.probe_error == 0).all()
    assert (d.with_likelihood(FlowDensity(RK4(4), Hutchinson())).flow.log_prob_with_error(x).probe_error > 0).any()


def test_integers_have_a_bound_of_either_density(float64):
    """A diffusion of known density, dequantised: its own density, averaged over the noise."""
    diffusion = small((1,), levels=4, standardize=False, likelihood=FlowDensity(RK4(10))).eval()
    x = torch.tensor([[0], [3]])
    d = diffusion()
    u = (torch.arange(400) + 0.5) / 400
    with torch.no_grad():
        wanted = d.base.log_prob(x[:, None] + u[None, :, None]).mean(1)
        assert_means(d.log_prob(x.expand(2000, 2, 1)), wanted)
    assert set(d.sample((100,)).unique().tolist()) <= {0, 1, 2, 3}
    bound = small((1,), levels=4, likelihood=VariationalBound())
    assert bound().log_prob(x).isfinite().all()
    assert bound().density == "lower bound"


# Scores.


@every_process
def test_scores_are_those_of_data_with_noise(process, float64):
    d, x = gaussian(process), LOC + torch.randn(4, 2)
    assert_close(d.score(x), -torch.linalg.solve(COV + left_over(process) * torch.eye(2), (x - LOC).T).T, rtol=1e-7, atol=1e-9)
    for share in (0.2, 0.5, 0.9):
        low, high = process.log_snr_range
        t = process.time(torch.tensor(low + share * (high - low)))
        a, s = process.alpha(t), process.sigma(t)
        wanted = -torch.linalg.solve(a**2 * COV + s**2 * torch.eye(2), (x - a * LOC).T).T
        assert_close(d.noisy_score(x, t), wanted, rtol=1e-7, atol=1e-9)
        assert_close(d.noisy_score(x.expand(3, 4, 2), t.expand(3, 4)), wanted.expand(3, 4, 2), rtol=1e-7, atol=1e-9)


def test_scores_follow_units_and_bounds(float64):
    """The gradient of the density of data that are standardised, and of those on an interval, at the least noise."""
    process = VariancePreserving()

    class Exact(nn.Module):
        def forward(self, x, t, context):
            return process.alpha(t).unsqueeze(1) * x  # of standard normal data

    free = Diffusion((2,), network=Exact(), prediction=DataPrediction(), likelihood=TIGHT)
    free.standardize(5 + 3 * torch.randn(50, 2))
    bounded = Diffusion(
        (2,), network=Exact(), prediction=DataPrediction(), likelihood=TIGHT, support=constraints.interval(-1.0, 3.0)
    )
    for diffusion, x in ((free, 5 + torch.randn(4, 2)), (bounded, 2 * torch.rand(4, 2))):
        x = x.requires_grad_()
        (wanted,) = torch.autograd.grad(diffusion().log_prob(x).sum(), x)
        assert_close(diffusion().score(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_score_can_be_differentiated(float64):
    diffusion = small()
    d, x = diffusion(), torch.randn(3, 2, requires_grad=True)
    assert torch.autograd.gradcheck(d.score, (x,))
    d.score(x).square().sum().backward()
    assert all(p.grad is not None for p in diffusion.parameters())
    with torch.no_grad():
        assert not d.score(x).requires_grad


# Draws.


def test_a_draw_carries_the_gradient_of_the_flow(float64):
    """By finite differences of the same noise; and `rsample` draws what the probability flow does."""
    diffusion = small(likelihood=FlowDensity(RK4(20)), standardize=False)
    d, p = diffusion(), diffusion.network.last.bias

    def draw():
        pyro.set_rng_seed(6)
        return d.rsample((3,)).sum()

    (slope,) = torch.autograd.grad(draw(), p)
    for i in range(2):
        p.data[i] += 1e-5
        up = draw()
        p.data[i] -= 2e-5
        down = draw()
        p.data[i] += 1e-5
        assert_close(slope[i], (up - down) / 2e-5, rtol=1e-5, atol=1e-7)
    pyro.set_rng_seed(6)
    assert_close(d.with_sampler(ProbabilityFlow(RK4(20))).sample((3,)).sum(), draw(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [DPMSolver(30), Ancestral(200), None], ids=str)
def test_draws_have_the_moments_of_the_data(sampler, float64):
    d = gaussian(Karras(), sampler=sampler or DPMSolver(), likelihood=FlowDensity())
    x = d.sample((4000,)) if sampler else d.rsample((4000,))
    assert_means(
        torch.cat([x - LOC, (x - LOC) ** 2, (x - LOC).prod(1, keepdim=True)], 1), torch.cat([0 * LOC, COV.diag(), COV[:1, 1]])
    )


def test_a_trajectory_records_its_frames_and_evaluations(capsys):
    diffusion = small(context=2, sampler=DDIM(8))
    diffusion.standardize(5 + torch.randn(50, 2))
    d = diffusion.eval()(torch.randn(3, 2))
    pyro.set_rng_seed(2)
    found = d.trajectory((4,), num_frames=5, progress=True)
    assert "DDIM" in capsys.readouterr().err
    pyro.set_rng_seed(2)
    assert_close(found.x, d.sample((4,)))
    assert found.evaluations == 8
    assert found.frames.shape == (5, 4, 3, 2)
    assert found.times.shape == (5,)
    assert_close(d.pretransform.inv(found.frames[-1] / diffusion.process.alpha(found.times[-1])), found.x)


@pytest.mark.parametrize("sampler", [ProbabilityFlow(Dopri5(1e-6, 1e-6)), DPMSolver(3), Ancestral(30)], ids=repr)
def test_a_trajectory_has_as_many_frames_as_asked_for(sampler):
    d = small(sampler=sampler).eval()()
    pyro.set_rng_seed(2)
    found = d.trajectory((4,), num_frames=6)
    assert found.frames.shape == (6, 4, 2)
    assert (found.times.diff() <= 0).all()
    assert_close(found.times[[0, -1]], torch.tensor([1.0, 1e-5]))
    pyro.set_rng_seed(2)
    assert_close(found.x, d.sample((4,)), rtol=1e-3, atol=1e-3)
    for bad in (1, -1):
        with pytest.raises(ValueError, match="num_frames of 2 or more"):
            d.trajectory((4,), num_frames=bad)
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        small(network=DenseField(8, 1, dropout=0.5)).train()().trajectory((4,))


def test_draws_of_nothing_have_a_shape():
    for draw in ("sample", "rsample"):
        assert getattr(small(context=2)(torch.randn(3, 2)), draw)((0,)).shape == (0, 3, 2)


def test_integers_keep_the_choices_of_a_diffusion():
    diffusion = small((2,), levels=4, context=2, drop_context=0.1, standardize=False).eval()
    d, x = diffusion(torch.randn(3, 2)), torch.randint(4, (3, 2))
    assert d.with_sampler(DDIM(3)).trajectory(num_frames=2).evaluations == 3
    drawn = d.trajectory(num_frames=2).x
    assert drawn.dtype == torch.long
    assert d.support.check(drawn).all()
    flow, bound = (d.with_likelihood(likelihood).expand((5, 3)) for likelihood in (FlowDensity(RK4(2)), VariationalBound()))
    assert flow.log_prob(x).shape == bound.log_prob(x).shape == (5, 3)
    assert isinstance(bound.base.likelihood, VariationalBound)
    assert d.guided(2.0).base.denoiser.guidance == 2.0
    assert (d.density, small((5, 5), levels=4)().density) == ("lower bound", "estimate")
    for made in (d, d.base):
        with pytest.raises(TypeError, match="class VariationalBound; call it"):
            made.with_likelihood(VariationalBound)
        with pytest.raises(TypeError, match="wants a sampler such as"):
            made.with_sampler(VariationalBound())


@pytest.mark.slow
def test_the_probability_flow_is_pickled_and_its_adjoint_knows_all_that_learns(float64):
    gradients = []
    for adjoint in (False, True):
        torch.manual_seed(0)
        likelihood = FlowDensity(RK4(100, adjoint=adjoint))
        diffusion = small(context=2, drop_context=0.2, guidance=2.0, likelihood=likelihood).eval()
        d, x = diffusion(torch.randn(3, 2)), torch.randn(3, 2)
        assert_close(pickle.loads(pickle.dumps(d.flow)).log_prob(x), d.log_prob(x))
        d.log_prob(x).sum().backward()
        gradients.append(diffusion.null.grad)
    assert gradients[0].abs().min() > 1e-4
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_precision_is_that_of_the_network():
    diffusion = small().double()
    for d in (diffusion(), diffusion().with_likelihood(VariationalBound())):
        assert d.sample().dtype == d.rsample().dtype == torch.float64
        assert d.log_prob(torch.randn(2).double()).dtype == torch.float64
        assert d.trajectory((2,)).frames.dtype == torch.float64


# In a Pyro model.


def seen(prior, y, scale=0.5):
    z = pyro.sample("z", prior())
    pyro.sample("y", dist.Normal(z, scale).to_event(1), obs=y)


@pytest.mark.slow
def test_nuts_over_a_frozen_diffusion_finds_the_posterior():
    """Of the exact score of a Gaussian; the error of NUTS is taken as that of 15 independent draws, and 5 of them."""
    prior, y = gaussian(VariancePreserving(), likelihood=FlowDensity(RK4(5))), torch.tensor([3.0, -3.0])
    mcmc = MCMC(NUTS(lambda: seen(lambda: prior, y), max_tree_depth=2), num_samples=40, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"]
    gain = COV.float() @ (COV.float() + 0.25 * torch.eye(2)).inverse()
    mean, var = LOC.float() + gain @ (y - LOC.float()), (COV.float() - gain @ COV.float()).diag()
    error = 5 * (var / 15).sqrt()
    assert ((draws.mean(0) - mean).abs() < error).all()
    assert ((LOC - mean).abs() > 2 * error).all()  # the prior would not do


@pytest.mark.slow
def test_svi_over_a_frozen_diffusion_leaves_it_alone_and_finds_the_posterior():
    prior, y = gaussian(VariancePreserving(), likelihood=VariationalBound(8)), torch.tensor([1.0, -1.0])

    def guide():
        loc, scale = pyro.param("loc", torch.zeros(2)), pyro.param("scale", torch.ones(2), constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    svi = SVI(lambda: seen(lambda: prior, y), guide, Adam({"lr": 0.03}), Trace_ELBO(num_particles=8, vectorize_particles=False))
    for _ in range(150):
        svi.step()
    gain = COV.float() @ (COV.float() + 0.25 * torch.eye(2)).inverse()
    assert_close(pyro.param("loc").detach(), LOC.float() + gain @ (y - LOC.float()), rtol=0, atol=0.2)


def test_predictive_plates_copies_and_pickles():
    diffusion = small(context=2).eval()
    c, x = torch.randn(4, 2), torch.randn(4, 2)

    def model():
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, dim=-1):
            return pyro.sample("x", diffusion(c))

    assert Predictive(model, num_samples=2, parallel=True)()["x"].shape == (2, 3, 4, 2)
    d = diffusion(c)
    for same in (
        copy.deepcopy(d),
        pickle.loads(pickle.dumps(d)),
        pickle.loads(pickle.dumps(d.with_likelihood(VariationalBound()))),
    ):
        assert type(same.sampler) is DPMSolver
        assert same.denoiser.process == d.denoiser.process
        assert_close(same.with_likelihood(FlowDensity(RK4(2))).log_prob(x), d.with_likelihood(FlowDensity(RK4(2))).log_prob(x))
    assert copy.deepcopy(d).denoiser.network is d.denoiser.network


def test_a_checkpoint_describes_it(tmp_path):
    diffusion = small(
        context=2, process=Karras(0.01, 50.0), prediction=Preconditioned(0.5), sampler=DDIM(7, eta=0.5), drop_context=0.2,
        likelihood=VariationalBound(3), guidance=1.5, support=constraints.interval(0.0, 1.0),
    )  # fmt: skip
    back = checkpoints.load(checkpoints.save(tmp_path / "diffusion", diffusion))
    for name in ("process", "prediction", "sampler", "likelihood", "drop_context", "guidance", "clock"):
        assert getattr(back, name) == getattr(diffusion, name)
    x, c, diffusion = torch.rand(4, 2), torch.randn(4, 2), diffusion.eval()
    assert_close(back(c).score(x), diffusion(c).score(x))


# Training.


def error_of_shrunk(log_snr):
    """E|e' - e|^2 of standard normal data, where e' = (1 - k) x_t / sigma."""
    k = 0.8 / (1 + torch.exp(-2 * log_snr))  # D = k x_t / alpha
    return ((1 - k) * torch.exp(log_snr)) ** 2 + k**2


def integral_of_errors(weighting, process):
    """What each weighting is said to be, in the log of the signal-to-noise ratio."""
    log_snr = torch.linspace(*process.log_snr_range, 20_001)
    t, error = process.time(log_snr), error_of_shrunk(log_snr)
    rate = process.squared_diffusion(t) / (2 * process.sigma(t) ** 2)  # |d lambda / dt|
    if isinstance(weighting, UniformWeighting):
        return torch.trapezoid(error / rate / (process.end - process.start), log_snr)
    if isinstance(weighting, LikelihoodWeighting):
        return torch.trapezoid(error, log_snr)
    away = (-log_snr - weighting.loc) / weighting.scale
    edm = error * (1 + torch.exp(-2 * log_snr))
    outside = torch.as_tensor([norm.cdf(away[-1]), norm.sf(away[0])]) @ edm[[-1, 0]]  # taken at the ends of the process
    return torch.trapezoid(edm * torch.exp(-0.5 * away**2) / weighting.scale / (2 * pi) ** 0.5, log_snr) + outside


@every_process
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_each_weighting_draws_and_counts_times_as_its_integral_says(process, weighting, float64):
    """By quadrature over the uniform number that a time is made of, finer towards 0, where much may lie."""
    v = (torch.arange(400_000) + 0.5) / 400_000
    t, weight = weighting(process, v**4)
    found = (weight * error_of_shrunk(process.log_snr(t)) * 4 * v**3).mean()
    assert_close(found, integral_of_errors(weighting, process), rtol=1e-4, atol=0)


def test_a_process_of_mostly_noise_is_weighted_by_default_where_the_data_are(float64):
    """Of uniform times on the clock of `Karras` less than one in a hundred have less noise than half of the data."""
    x = torch.randn(500, 1)
    losses = []
    for weighting in (None, LogNormalWeighting()):
        pyro.set_rng_seed(1)
        losses.append(DenoisingScoreMatching(weighting=weighting).per_datum(shrunk(Karras()), x))
    assert_close(*losses)


BRIEF = VarianceExploding(0.3, 5.0)  # of few levels, so that no weighting has rare terms that count for much


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_loss_of_each_weighting_is_its_integral(weighting, float64):
    d, objective = shrunk(BRIEF), DenoisingScoreMatching(weighting=weighting)
    losses = torch.stack([objective.per_datum(d, torch.randn(500, 1)).mean() for _ in range(60)])
    assert_means(losses.unsqueeze(1), integral_of_errors(weighting, BRIEF))


def test_the_likelihood_weighting_is_the_bound_but_for_a_constant(float64):
    """On average, for any denoiser: of two their differences agree."""
    process, x = VariancePreserving(), torch.randn(20_000, 1)
    one, two = shrunk(process, by=0.8), shrunk(process, by=0.5)
    for weighting in (LikelihoodWeighting(), LikelihoodWeighting(importance=False)):
        parts = []
        for d in (one, two):
            pyro.set_rng_seed(1)
            loss = DenoisingScoreMatching(weighting=weighting).per_datum(d, x)
            parts.append(loss + d.with_likelihood(VariationalBound()).log_prob(x))
        assert_means((parts[0] - parts[1]).unsqueeze(1), 0.0)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=repr)
def test_the_gradient_is_least_at_the_exact_denoiser(weighting, float64):
    """In any direction: here in a multiple of the data's estimate and in a shift of it; and elsewhere it is not."""
    exact = NoisedMixture(LAW)

    def slopes(by):
        found = []
        for _ in range(60):
            theta = torch.zeros(2, requires_grad=True)

            class Moved(NoisedMixture):
                def data(self, x, alpha, sigma, theta=theta):
                    return (by + theta[0]) * exact.data(x, alpha, sigma) + theta[1]

            d = Moved(LAW).diffusion(BRIEF, (1,))
            loss = DenoisingScoreMatching(weighting=weighting).per_datum(d, LAW.distribution().sample((300, 1))).mean()
            found.append(torch.autograd.grad(loss, theta)[0])
        return torch.stack(found)

    assert_means(slopes(1.0), 0.0)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_means(slopes(0.5), 0.0)


def test_a_noise_error_has_the_mean_it_would_have_without_what_is_taken_off(float64):
    process, n = VariancePreserving(), 40_000
    d, x = shrunk(process), torch.full((n, 1), 0.7)
    for share in (0.1, 0.5, 0.95):
        low, high = process.log_snr_range
        log_snr = torch.tensor(low + share * (high - low))
        found = d.noise_error(x, process.time(log_snr).expand(n), None)
        k = 0.8 / (1 + torch.exp(-2 * log_snr))
        assert_means(found.unsqueeze(1), ((1 - k) * torch.exp(log_snr) * 0.7) ** 2 + k**2)


@pytest.mark.parametrize("likelihood", [NormalLikelihood(), BernoulliLikelihood()], ids=repr)
def test_a_diffusion_as_the_prior_of_a_vae_trains_by_one_loss(likelihood):
    """By denoising score matching, which is minus the ELBO with the bound, whatever the prior's own density is."""
    x = torch.randint(2, (40, 3)).float() if isinstance(likelihood, BernoulliLikelihood) else torch.randn(40, 3)
    vae = VAE((3,), latent_dim=2, hidden=(16,), likelihood=likelihood, prior=small())
    vae.standardize(x)
    losses = []
    for objective, density in ((DenoisingScoreMatching(), FlowDensity()), (Trace_ELBO(), VariationalBound())):
        vae.prior.likelihood = density
        pyro.set_rng_seed(3)
        loss = objective.differentiable_loss(vae.model, vae.guide, x)
        losses.append((loss, *torch.autograd.grad(loss, list(vae.parameters()))))
    for mine, theirs in zip(*losses, strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("objective", slow_unless([DenoisingScoreMatching], [DenoisingScoreMatching, Trace_ELBO]))
def test_a_vae_with_a_diffusion_as_prior_learns(objective):
    z = torch.randn(200, 1)
    x = torch.cat([z, z.tanh(), -z], 1) + 0.1 * torch.randn(200, 3)
    vae = VAE((3,), latent_dim=1, hidden=(16,), prior=Diffusion((1,), network=DenseField(16, 1), likelihood=VariationalBound()))
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.01}), objective())
    losses = [svi.step(x) / 200 for _ in range(120)]
    assert sum(losses[-20:]) < sum(losses[:20]) - 20 * 0.5


def test_a_diffusion_in_a_mixed_model_counts_beside_other_observations():
    """An observed diffusion by denoising, and, without a diffusion that is latent, others by the same objective's word."""
    one, two, x = small(standardize=False), small((1,), standardize=False), torch.randn(8, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", one(), obs=x)
            pyro.sample("b", two(), obs=x[:, :1])

    def alone(d, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", d, obs=x)

    pyro.set_rng_seed(5)
    both = DenoisingScoreMatching().differentiable_loss(model, lambda x: None, x)
    pyro.set_rng_seed(5)
    parts = [
        DenoisingScoreMatching().differentiable_loss(alone, lambda *_: None, d(), y) for d, y in ((one, x), (two, x[:, :1]))
    ]
    assert_close(both, sum(parts))


@pytest.mark.parametrize("weighting", slow_unless(WEIGHTINGS[1:2], [WEIGHTINGS[0], WEIGHTINGS[1], WEIGHTINGS[3]]), ids=repr)
@pytest.mark.parametrize("process", slow_unless([VariancePreserving()], [VariancePreserving(), Karras()]), ids=repr)
def test_a_diffusion_learns_what_it_is_shown(process, weighting):
    law = Gaussian(torch.tensor([3.0, -1.0]), torch.tensor([[1.0, 0.8], [0.8, 1.0]]))
    x = law.distribution().sample((1000,))
    diffusion = Diffusion((2,), network=DenseField(32, 1), process=process)
    diffusion.standardize(x)
    before = -diffusion().log_prob(x[:200]).mean()
    svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-2}), DenoisingScoreMatching(weighting=weighting))
    for _ in range(150):
        svi.step(x[torch.randint(len(x), (256,))])
    with torch.no_grad():
        after = -diffusion.eval()().log_prob(x[:200]).mean()
    assert after < before - 0.25
    assert after > law.entropy() - 0.3


def test_training_takes_its_objective_by_default():
    fit = train(small(), torch.randn(64, 2), epochs=2, progress=False, seed=0)
    assert len(fit.history) == 2


# What is refused.


@pytest.mark.parametrize(
    ("options", "role"),
    [
        ({"process": VariancePreserving}, "process"), ({"process": "vp"}, "process"),
        ({"prediction": NoisePrediction}, "prediction"),
        ({"sampler": DPMSolver}, "sampler"), ({"likelihood": Dopri5()}, "likelihood"),
        ({"likelihood": VariationalBound}, "likelihood"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_choice_is_refused(options, role):
    with pytest.raises(TypeError, match=f"Diffusion wants a {role} such as .* but found"):
        Diffusion((2,), **options)


@pytest.mark.parametrize(
    "build",
    [
        lambda: small(levels=1), lambda: VariationalBound(0), lambda: VariationalBound(1.5),
        lambda: small(levels=2.5), lambda: Heun(churn_range=(2.0, 1.0)), lambda: Heun(churn_range=None),
        lambda: ProbabilityFlow(num_steps=0), lambda: small(context=2, drop_context=0.1, guidance=None),
        lambda: small(context=2, drop_context=-0.1), lambda: Preconditioned(0.0), lambda: LogNormalWeighting(scale=0.0),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="wants"):
        build()


def energy(**options):
    return EnergyModel((2,), energy=DenseEnergy((8,)), **options)


@pytest.mark.parametrize(
    ("objective", "family", "found"),
    [
        (DenoisingScoreMatching(0.1), small, r"levels of its own process.*Leave noise out"),
        (DenoisingScoreMatching(weighting=torch.square), small, r"UniformWeighting\(\).*ReverseDiffusion"),
        (DenoisingScoreMatching(weighting=UniformWeighting()), energy, r"torch\.square.*Energy"),
        (FlowMatching(path=TrigonometricInterpolant()), small, r"path=LinearInterpolant\(\)"),
        (DenoisingScoreMatching(weighting=UniformWeighting()), lambda: Flow((2,)), r"torch\.square.*NormalizingFlow"),
    ],
)
def test_objectives_that_do_not_go_with_it_say_what_does(objective, family, found):
    with pytest.raises(ValueError, match=found):
        objective(family())(torch.randn(4, 2))


def test_maximum_likelihood_is_of_either_density():
    for likelihood in (FlowDensity(RK4(2)), VariationalBound()):
        diffusion = small(likelihood=likelihood)
        MaximumLikelihood()(diffusion)(torch.randn(4, 2)).backward()
        assert all(p.grad is not None for p in diffusion.parameters())


def test_implicit_score_matching_is_of_the_flow_density(float64):
    diffusion = small(likelihood=FlowDensity(RK4(2)), standardize=False)
    assert ImplicitScoreMatching()(diffusion)(torch.randn(4, 2)).isfinite()


def test_masks_and_scales_count():
    diffusion, x = small(), torch.randn(6, 2)
    diffusion.standardize(x)

    def loss(model, **kwargs):
        pyro.set_rng_seed(3)
        return DenoisingScoreMatching().differentiable_loss(model, diffusion.guide, x, **kwargs)

    whole = loss(diffusion.model)
    assert_close(loss(diffusion.model, size=60), 10 * whole)
    assert_close(loss(poutine.scale(diffusion.model, scale=0.5)), 0.5 * whole)
    assert loss(poutine.mask(diffusion.model, mask=torch.zeros(6, dtype=torch.bool))) == 0
