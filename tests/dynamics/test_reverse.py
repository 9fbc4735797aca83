"""Reverse diffusion: exact denoisers in, exact draws out; orders of convergence; what is counted and kept on the way.

Statistical tests here have a false-alarm rate of 1e-7 each (`assert_means`), unless they say otherwise.
"""

import sys
from dataclasses import replace
from itertools import pairwise, product
from math import exp, log

import pyro
import pytest
import torch
from marks import slow_unless
from scipy.stats import chi2
from teachers import Mixture, NoisedMixture, NoisedPoints, assert_means
from torch.testing import assert_close

from pyro_genmodels import Dopri5, DPMSolver, VariancePreserving
from pyro_genmodels.dynamics import reverse as reverse_module
from pyro_genmodels.dynamics.denoiser import (
    DataPrediction,
    Denoiser,
    NoisePrediction,
    Preconditioned,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_genmodels.dynamics.probability_flow import flow_velocity
from pyro_genmodels.dynamics.reverse import CountedDenoiser, prior_scale, simulate_reverse
from pyro_genmodels.families import (
    DDIM,
    Ancestral,
    CosineVariancePreserving,
    EulerMaruyama,
    Heun,
    Karras,
    PredictorCorrector,
    ProbabilityFlow,
    SubVariancePreserving,
    UniformLogSNR,
    UniformSigma,
    UniformTime,
    VarianceExploding,
)

PROCESSES = [VariancePreserving(), SubVariancePreserving(), CosineVariancePreserving(), VarianceExploding(), Karras()]
SAMPLERS = [
    EulerMaruyama(400), Ancestral(300), DDIM(100), DDIM(200, eta=0.5), Heun(40), Heun(50, churn=10.0), DPMSolver(40),
    PredictorCorrector(200), ProbabilityFlow(Dopri5(1e-5, 1e-5)),
]  # fmt: skip
DETERMINISTIC = [DDIM(20), Heun(20), DPMSolver(20), ProbabilityFlow()]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
some_processes = pytest.mark.parametrize(
    "process", slow_unless([VariancePreserving(), Karras()], PROCESSES), ids=lambda p: type(p).__name__
)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)

LAW = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-1.4, 0.6]), torch.tensor([0.5, 0.35]))
TEACHER = NoisedMixture(LAW)
POINTS = torch.tensor([[-1.5, 0.0], [-0.5, 1.0], [0.0, -1.2], [0.8, 0.9], [1.2, -0.7]])


def draws(sampler, process, teacher, n, shape, **options):
    return simulate_reverse(sampler, teacher.denoise(process), process, torch.randn(n, *shape), **options)


# Exact knowledge in, exact draws out.


@some_processes
@every_sampler
def test_the_exact_denoiser_of_a_mixture_gives_its_moments_and_weights(process, sampler, float64):
    """Of the data with the least noise; the bias of the steps is far below what 2000 draws show."""
    x = draws(sampler, process, TEACHER, 1000, (2,)).x.reshape(-1, 1)
    noise = exp(-2 * process.log_snr_range[1])
    left = torch.distributions.Normal(LAW.loc, (LAW.scale**2 + noise).sqrt()).cdf(torch.tensor(-0.4)) @ LAW.weights
    assert_means(torch.cat([x, x**2, (x < -0.4).double()], 1), [LAW.mean, LAW.variance + LAW.mean**2 + noise, left])


@pytest.mark.parametrize(
    ("process", "sampler"),
    [*((VariancePreserving(), sampler) for sampler in SAMPLERS), *product(PROCESSES[1:], [Ancestral(200), DPMSolver(40)])],
    ids=repr,
)
def test_the_ideal_denoiser_of_a_data_set_samples_its_points_uniformly(process, sampler, float64):
    """The noise that is left stays within what its law allows, and Pearson's statistic too: 1e-7 each."""
    x = draws(sampler, process, NoisedPoints(POINTS), 500, (2,)).x
    distance, which = torch.cdist(x, POINTS.to(x)).min(1)
    counts = torch.bincount(which, minlength=5)
    # deterministic steps may end nearer, and Euler's noise of its last step is that of the level before
    allowed = chi2.isf(1e-7 / 500, 2) ** 0.5 * exp(-process.log_snr_range[1])
    assert distance.max() < (1.05 if not isinstance(sampler, EulerMaruyama) else 1.2) * allowed
    assert ((counts - 100) ** 2 / 100).sum() < chi2.isf(1e-7, 4)


def test_an_inexact_denoiser_gives_other_draws(float64):
    """The tests above can therefore fail."""
    process = VariancePreserving()
    denoise = TEACHER.denoise(process)
    x = simulate_reverse(DPMSolver(60), lambda x, t: 0.9 * denoise(x, t), process, torch.randn(2000, 2)).x.reshape(-1, 1)
    with pytest.raises(AssertionError, match="standard errors"):
        assert_means(x**2, LAW.variance)


@every_process
def test_events_of_any_shape_are_drawn(process):
    for shape in ((), (3,), (1, 2, 2)):
        for sampler in (replace(s, num_steps=3) if hasattr(s, "num_steps") else s for s in SAMPLERS):
            x = draws(sampler, process, TEACHER, 4, shape).x
            assert x.shape == (4, *shape)
            assert x.isfinite().all()


# Deterministic samplers.


@some_processes
@pytest.mark.parametrize(
    ("build", "order", "fewest"),
    [
        (DDIM, 1, 64),
        (Heun, 2, 64),
        (DPMSolver, 2, 64),
        (lambda n: DPMSolver(n, UniformSigma(3.0)), 2, 200),
    ],
    ids=["DDIM", "Heun", "DPMSolver", "DPMSolver, sigma"],
)
def test_samplers_have_their_order_of_convergence(process, build, order, fewest, float64):
    """Measured by the mean distance to a fine solution of the probability flow, from the same noise."""
    noise, denoise = torch.randn(50, 2), TEACHER.denoise(process)
    fine = simulate_reverse(ProbabilityFlow(Dopri5(1e-10, 1e-10)), denoise, process, noise).x
    error = [
        (simulate_reverse(build(n), denoise, process, noise).x - fine).abs().mean().item()
        for n in (fewest, 2 * fewest, 4 * fewest)
    ]
    slopes = [log(a / b) / log(2) for a, b in pairwise(error)]
    assert slopes == pytest.approx([order] * 2, abs=0.2)


@every_process
def test_the_probability_flow_moves_a_gaussian_by_its_scale(process, float64):
    """For normal data of deviation s, x_s divided by its deviation is constant."""
    for scale in (0.3, 1.0, 2.0):
        teacher = NoisedMixture(Mixture(torch.ones(1), torch.zeros(1), torch.full((1,), scale)))
        noise = torch.randn(10, 2)
        x = simulate_reverse(ProbabilityFlow(Dopri5(1e-10, 1e-10)), teacher.denoise(process), process, noise).x
        low, high = process.log_snr_range
        first, last = ((scale**2 + exp(-2 * at)) ** 0.5 for at in (low, high))
        assert_close(x, noise * (1 + exp(-2 * low)) ** 0.5 / first * last, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("sampler", DETERMINISTIC, ids=repr)
def test_deterministic_samplers_draw_no_noise(sampler):
    noise, denoise = torch.randn(5, 2), TEACHER.denoise(Karras())
    once, again = (simulate_reverse(sampler, denoise, Karras(), noise).x for _ in range(2))
    assert once.equal(again)
    state = torch.get_rng_state()
    simulate_reverse(sampler, denoise, Karras(), noise)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("sampler", [EulerMaruyama(20), Ancestral(20), DDIM(20, eta=0.1), Heun(20, churn=5.0)], ids=repr)
def test_stochastic_samplers_draw_noise(sampler):
    noise, denoise = torch.randn(5, 2), TEACHER.denoise(Karras())
    assert not simulate_reverse(sampler, denoise, Karras(), noise).x.equal(
        simulate_reverse(sampler, denoise, Karras(), noise).x
    )


# Single steps.


@every_process
def test_ancestral_is_ddim_with_all_of_its_noise(process):
    noise, found = torch.randn(20, 2), []
    for sampler in (Ancestral(30), DDIM(30, eta=1.0), PredictorCorrector(30, num_corrections=0)):
        pyro.set_rng_seed(3)
        found.append(simulate_reverse(sampler, TEACHER.denoise(process), process, noise).x)
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


@every_process
def test_an_ancestral_step_draws_what_the_process_leaves_open(process, float64):
    """The conditional of x_s given x_t and x_0, by regression of Gaussians: for one datum, whose denoiser is itself."""
    low, high = process.log_snr_range
    t, s = process.time(torch.tensor([0.5 * low + 0.5 * high, 0.4 * low + 0.6 * high]))
    one, x = torch.tensor([[0.7]]), torch.full((100_000, 1), 1.1)
    found = Ancestral(1).step(CountedDenoiser(NoisedPoints(one).denoise(process), process), x, t, s)
    a, b = process.alpha(t), process.alpha(s)
    kernel = process.sigma(t) ** 2 - (a / b) ** 2 * process.sigma(s) ** 2  # variance of x_t given x_s
    gain = (a / b) * process.sigma(s) ** 2 / process.sigma(t) ** 2
    mean = b * 0.7 + gain * (1.1 - a * 0.7)
    assert_means(found, mean)
    assert_means((found - mean) ** 2, process.sigma(s) ** 2 * kernel / process.sigma(t) ** 2)


@every_process
def test_one_step_of_dpm_solver_is_one_of_ddim(process, float64):
    noise = torch.randn(5, 2)
    found = [simulate_reverse(sampler(1), TEACHER.denoise(process), process, noise).x for sampler in (DPMSolver, DDIM)]
    assert_close(*found)


@every_process
def test_churn_keeps_within_the_process_and_its_range(process, float64):
    """Also where it would lead beyond the first time; and where its range is empty it adds nothing."""
    seen, teacher = [], TEACHER.denoise(process)

    def denoise(x, t):
        seen.append(t.item())
        return teacher(x, t)

    noise = torch.randn(5, 2)
    simulate_reverse(Heun(18, churn=40.0), denoise, process, noise)
    assert max(seen) <= process.end * (1 + 1e-9)
    assert min(seen) >= process.start * (1 - 1e-9)
    plain = simulate_reverse(Heun(18), denoise, process, noise).x
    assert_close(simulate_reverse(Heun(18, churn=40.0, churn_range=(1e9, 1e10)), denoise, process, noise).x, plain)
    assert not torch.allclose(simulate_reverse(Heun(18, churn=40.0, churn_range=(0.1, 1.0)), denoise, process, noise).x, plain)


# Counts, frames, times.


@every_process
@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [
        (EulerMaruyama(7), 7), (Ancestral(7), 7), (DDIM(7), 7), (DDIM(7, eta=0.5), 7), (Heun(7), 14), (Heun(7, churn=3.0), 14),
        (DPMSolver(7), 7), (PredictorCorrector(7), 14), (PredictorCorrector(7, num_corrections=3), 28),
        (ProbabilityFlow(), None),
    ],
    ids=repr,
)  # fmt: skip
def test_evaluations_are_counted(process, sampler, evaluations):
    asked, teacher = [], TEACHER.denoise(process)

    def denoise(x, t):
        asked.append(t)
        return teacher(x, t)

    found = simulate_reverse(sampler, denoise, process, torch.randn(3, 2))
    assert found.evaluations == len(asked) == (evaluations or len(asked)) > 0
    assert all(t.shape == () for t in asked)
    slack = 1e-4 * process.end
    assert all(process.start - slack <= t <= process.end + slack for t in asked)


@every_process
@every_sampler
def test_frames_lead_from_noise_to_data(process, sampler, float64):
    sampler = replace(sampler, num_steps=12) if hasattr(sampler, "num_steps") else sampler
    noise = torch.randn(3, 2)
    found = simulate_reverse(sampler, TEACHER.denoise(process), process, noise, num_frames=4)
    assert found.frames.shape == (4, 3, 2)
    assert found.times.shape == (4,)
    assert (found.times.diff() < 0).all()
    assert_close(found.times[[0, -1]], torch.tensor([process.end, process.start]))
    assert_close(found.frames[0], noise * prior_scale(process))
    assert_close(found.frames[-1] / process.alpha(torch.tensor(process.start)), found.x)
    assert_close(found.times, getattr(sampler, "spacing", UniformLogSNR())(process, 12)[::4])


def test_frames_are_returned_only_if_asked_for():
    found = draws(DPMSolver(5), Karras(), TEACHER, 3, (2,))
    assert found.frames.shape == (0, 3, 2)
    assert found.times.shape == (0,)
    many = draws(DPMSolver(5), Karras(), TEACHER, 3, (2,), num_frames=100)
    assert many.frames.shape == (100, 3, 2)
    assert len(many.times.unique()) == 6


@every_process
@pytest.mark.parametrize("spacing", [UniformTime(), UniformLogSNR(), UniformSigma(), UniformSigma(2.0)], ids=repr)
def test_spacings_are_uniform_in_their_measure(process, spacing):
    times = spacing(process, 30)
    assert times.shape == (31,)
    assert times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times[[0, -1]].tolist() == pytest.approx([process.end, process.start], rel=1e-8)
    measures = {UniformTime: lambda t: t, UniformLogSNR: process.log_snr}
    root = lambda t: (-process.log_snr(t) / spacing.rho).exp()  # noqa: E731
    steps = measures.get(type(spacing), root)(times).diff()
    assert_close(steps, steps.mean().expand(30), rtol=1e-6, atol=0)


@every_process
@every_sampler
def test_precision_is_that_of_the_noise(process, sampler):
    sampler = replace(sampler, num_steps=5) if hasattr(sampler, "num_steps") else sampler
    for dtype in (torch.float32, torch.float64):
        found = simulate_reverse(sampler, TEACHER.denoise(process), process, torch.randn(3, 2, dtype=dtype), num_frames=2)
        assert found.x.dtype == found.frames.dtype == found.times.dtype == dtype


@every_process
@pytest.mark.parametrize("sampler", [DDIM(50), Heun(30), DPMSolver(30)], ids=repr)
def test_single_precision_follows_double(process, sampler):
    noise = torch.randn(50, 2, dtype=torch.float64)
    single, double = (simulate_reverse(sampler, TEACHER.denoise(process), process, n).x for n in (noise.float(), noise))
    assert (single - double).abs().median() < 1e-4


PREDICTIONS = [NoisePrediction(), DataPrediction(), VelocityPrediction(), ScorePrediction(), Preconditioned()]


def gaussian_denoiser(prediction, process, dtype):
    """The exact denoiser of standard normal data, by any parametrisation: its network is linear, and computed in float64."""

    def network(x, t, _):
        alpha, sigma = process.alpha(t.double()), process.sigma(t.double())
        slope = alpha / (alpha.square() + sigma.square())  # of the estimate of the data
        skip, out = prediction.coefficients(alpha, sigma)
        return (((slope - skip) / out / prediction.scale(alpha, sigma))[:, None] * x.double()).to(dtype)

    return Denoiser(network, process, prediction, clock=False)


@every_process
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: type(p).__name__)
def test_estimates_in_single_precision_do_not_cancel(prediction, process):
    """Noise, data and flow velocity agree with double precision to 3e-6; the noise by (x - alpha D) / sigma only to about 1e-4.

    Exceptions: at high noise the data of a network that predicts noise, and at low noise the noise of one that predicts data.
    """
    z, worst = torch.randn(50, 2, dtype=torch.float64), dict.fromkeys(["noise", "data", "velocity", "difference"], 0.0)
    single, double = (gaussian_denoiser(prediction, process, dtype) for dtype in (torch.float32, torch.float64))
    for t in UniformLogSNR()(process, 20).float():
        x = (z * torch.hypot(process.alpha(t.double()), process.sigma(t.double()))).float()
        log_snr = process.log_snr(t.double()).float()
        exact, found = double.estimate(x.double(), t.double()), CountedDenoiser(single.estimate, process)(x, t)
        velocities = [flow_velocity(d.estimate, process)(log_snr.to(y), y) for d, y in ((single, z.float()), (double, z))]
        pairs = {
            "noise": (found.noise, exact.noise),
            "data": (found.data, exact.data),
            "velocity": velocities,
            "difference": (CountedDenoiser(single, process)(x, t).noise, exact.noise),
        }
        for name, (ours, truth) in pairs.items():
            worst[name] = max(worst[name], (ours - truth).abs().max().item())
    assert worst["velocity"] < 3e-6
    assert worst["noise"] < 3e-6 or isinstance(prediction, DataPrediction)
    assert worst["data"] < 3e-6 or isinstance(prediction, NoisePrediction | ScorePrediction)
    assert worst["difference"] > 3e-5


@every_process
@pytest.mark.parametrize("sampler", [EulerMaruyama(5), Heun(5)], ids=repr)
def test_samplers_use_the_estimate_of_the_noise(sampler, process):
    """The data of an estimate do not matter where only the noise is needed."""
    denoise = gaussian_denoiser(VelocityPrediction(), process, torch.float32).estimate
    noise = torch.randn(5, 2)
    assert simulate_reverse(sampler, lambda x, t: denoise(x, t)._replace(data=x * torch.nan), process, noise).x.isfinite().all()


def test_gradients_pass_through_deterministic_steps(float64):
    process, noise = VariancePreserving(), torch.randn(3, 2)
    for sampler in (DDIM(5), Heun(5), DPMSolver(5)):

        def moved(shift, sampler=sampler):
            denoise = TEACHER.denoise(process)
            return simulate_reverse(sampler, lambda x, t: denoise(x, t) + shift, process, noise).x.sum()

        assert torch.autograd.gradcheck(moved, torch.tensor(0.1, requires_grad=True))


# Progress and errors.


def test_progress_is_shown_if_asked_for(capsys):
    draws(DPMSolver(5), Karras(), TEACHER, 3, (2,), progress=True)
    assert "DPMSolver" in capsys.readouterr().err
    for quiet in (False, None):
        draws(DPMSolver(5), Karras(), TEACHER, 3, (2,), progress=quiet)
        assert capsys.readouterr().err == ""


def test_progress_is_shown_on_a_terminal_after_a_delay(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(reverse_module, "PROGRESS_DELAY", 3600.0)
    draws(DPMSolver(5), Karras(), TEACHER, 3, (2,))
    assert "DPMSolver" not in capsys.readouterr().err
    monkeypatch.setattr(reverse_module, "PROGRESS_DELAY", 0.0)
    draws(DPMSolver(5), Karras(), TEACHER, 3, (2,))
    assert "DPMSolver" in capsys.readouterr().err


@pytest.mark.parametrize(
    "build",
    [
        lambda: EulerMaruyama(0), lambda: Ancestral(-1), lambda: DDIM(1.5), lambda: DPMSolver("20"), lambda: DDIM(eta=1.1),
        lambda: DDIM(eta=-0.1), lambda: Heun(churn=-1.0), lambda: Heun(churn_scale=0.0), lambda: PredictorCorrector(0),
        lambda: PredictorCorrector(num_corrections=-1), lambda: PredictorCorrector(signal_to_noise=0.0),
        lambda: UniformSigma(0.0), lambda: DDIM(True), lambda: DDIM(eta=float("nan")),
        lambda: Heun(churn=float("nan")),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="wants"):
        build()


@pytest.mark.parametrize("sampler", [DPMSolver, "ddim", None], ids=str)
def test_values_that_are_no_sampler_are_refused(sampler):
    with pytest.raises(TypeError, match=r"DPMSolver\(20\).*but found"):
        draws(sampler, Karras(), TEACHER, 3, (2,))


@pytest.mark.parametrize("spacing", [UniformTime, "karras", None], ids=str)
def test_values_that_are_no_spacing_are_refused(spacing):
    with pytest.raises(TypeError, match=r"DDIM wants a spacing such as UniformLogSNR\(\)"):
        DDIM(5, spacing)


def test_dpm_solver_has_no_single_step():
    """A step needs the one before."""
    assert not hasattr(DPMSolver(5), "step")
    assert hasattr(DDIM(5), "step")
