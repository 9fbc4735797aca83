"""Posteriors under a diffusion as prior: particles against closed forms, and the bias of what has no weights.

Of a Gaussian prior and a linear likelihood everything is Gaussian: also the law of an ancestral walk of few steps, which is
what the particles are exact for, and that of a walk with a guided score, which is not the posterior's.
Statistical tests here have a false-alarm rate of 1e-7 each (`assert_means`).
"""

import warnings
from dataclasses import replace
from math import exp, log, pi

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from pyro import poutine
from scipy.stats import chi2, norm, t
from teachers import Gaussian, Mixture, NoisedGaussian, NoisedMixture, assert_means, integral
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_genmodels import DenseField, Diffusion, Flow, VariancePreserving, to_arviz
from pyro_genmodels.distributions import GenerativeDistribution
from pyro_genmodels.dynamics.guided import _curvature, sample_guided, sample_twisted
from pyro_genmodels.dynamics.resampling import effective_size
from pyro_genmodels.dynamics.spacing import UniformLogSNR
from pyro_genmodels.families import Karras, SubVariancePreserving
from pyro_genmodels.infer.guided_posterior import GuidedDiffusion, TwistedDiffusion, diffusion_posterior, inpaint
from pyro_genmodels.utils.pareto import pareto_k

PROCESSES = [VariancePreserving(), SubVariancePreserving(), Karras()]
COV = torch.tensor([[1.2, 0.7], [0.7, 0.9]], dtype=torch.float64)
PRIOR = NoisedGaussian(Gaussian(torch.zeros(2, dtype=torch.float64), COV))
WEIGHT, SCALE, SEEN = torch.tensor([0.6, -1.0], dtype=torch.float64), 0.4, 1.5
ONE = NoisedMixture(Mixture(torch.ones(1), torch.zeros(1), torch.ones(1)))
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def walked(process, steps, variances):
    """Variances of the draws of an ancestral walk of that many steps, from the exact denoisers of normal variances."""
    times = UniformLogSNR()(process, steps)
    a, v = process.alpha(times), process.sigma(times) ** 2
    now = (a[0] ** 2 + v[0]) * torch.ones_like(variances)
    for i in range(steps):
        kept = a[i] ** 2 / v[i] * v[i + 1] / a[i + 1] ** 2
        gain = a[i] * variances / (a[i] ** 2 * variances + v[i])
        now = (a[i + 1] * (1 - kept) * gain + kept * a[i + 1] / a[i]) ** 2 * now + v[i + 1] * (1 - kept)
    return now / a[-1] ** 2


def law_of_walk(process, steps):
    variances, axes = torch.linalg.eigh(COV)
    return axes @ walked(process, steps, variances).diag() @ axes.T


def posterior(cov):
    """Mean and covariance of x given y = w x + noise, and log p(y)."""
    total = WEIGHT @ cov @ WEIGHT + SCALE**2
    gain = cov @ WEIGHT / total
    return gain * SEEN, cov - torch.outer(gain, WEIGHT @ cov), norm.logpdf(SEEN, scale=total.sqrt())


def log_likelihood(x):
    return dist.Normal(x @ WEIGHT, SCALE).log_prob(torch.tensor(SEEN, dtype=x.dtype))


def linear(prior):
    """As a Pyro model."""

    def model(y):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x @ WEIGHT.to(x), SCALE), obs=y)

    return model


# Particles.


@pytest.mark.parametrize(
    ("process", "resample_below"),
    [
        pytest.param(VariancePreserving(), 0.0, marks=pytest.mark.slow),
        (VariancePreserving(), 0.5),
        pytest.param(SubVariancePreserving(), 1.0, marks=pytest.mark.slow),
        pytest.param(Karras(), 0.5, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_particles_estimate_evidence_and_moments_without_bias(process, resample_below, float64):
    """Of the walk's own law, for any number of steps and particles: over 100 seeds the sums of their weights."""
    steps, parts = 10, []
    mean, cov, evidence = posterior(law_of_walk(process, steps))
    for _ in range(100):
        found = sample_twisted(
            PRIOR.denoise(process), process, log_likelihood, torch.randn(40, 2), num_steps=steps, resample_below=resample_below
        )
        weights = (found.log_weights + found.log_evidence - evidence).exp() / 40
        parts.append(
            torch.cat([weights.sum()[None], weights @ found.x, weights @ found.x**2, (weights @ found.x.prod(1))[None]])
        )
    assert_means(
        torch.stack(parts), torch.cat([torch.ones(1), mean, cov.diag() + mean**2, (cov[0, 1] + mean[0] * mean[1])[None]])
    )


def test_the_walk_comes_near_the_prior_at_the_rate_of_its_steps(float64):
    for process in PROCESSES:
        true = COV + exp(-2 * process.log_snr_range[1]) * torch.eye(2)
        error = [(law_of_walk(process, steps) - true).norm() for steps in (400, 800, 1600)]
        assert error[2] < 0.02
        assert log(error[0] / error[1]) / log(2) == pytest.approx(1.0, abs=0.1)
        assert log(error[1] / error[2]) / log(2) == pytest.approx(1.0, abs=0.1)


@every_process
@pytest.mark.parametrize("seed", slow_unless([0], [0, 1, 2]))
def test_many_particles_meet_the_closed_form_within_their_error(process, seed, float64):
    """Mean, variance and evidence of the true posterior; the errors by the effective size, 6 of them: 2e-9 for each number."""
    pyro.set_rng_seed(seed)
    prior = PRIOR.diffusion(process, (2,))
    found = diffusion_posterior(linear(prior), torch.tensor(SEEN), method=TwistedDiffusion(300), num_samples=800)
    mean, cov, evidence = posterior(COV)
    n, weights = found.effective_sample_size, found.log_weight.softmax(0)
    assert 200 < n <= 800
    off = weights @ found.draws - mean
    assert (off.abs() < 6 * (cov.diag() / n).sqrt() + 0.01).all()
    spread = weights @ (found.draws - mean).square()
    assert ((spread / cov.diag() - 1).abs() < 6 * (2 / n) ** 0.5 + 0.02).all()
    assert abs(found.log_evidence - evidence) < 0.25


def test_the_error_of_the_evidence_falls_with_the_particles(float64):
    process, spread = VariancePreserving(), []
    evidence = posterior(law_of_walk(process, 10))[2]
    for n in (20, 320):
        off = [
            sample_twisted(PRIOR.denoise(process), process, log_likelihood, torch.randn(n, 2), num_steps=10).log_evidence
            - evidence
            for _ in range(40)
        ]
        spread.append(torch.stack(off).square().mean().sqrt())
    assert spread[1] < 0.5 * spread[0]  # a quarter is expected, and each is known within a fifth at two standard errors


def test_weights_have_mean_one_and_sizes_are_told_at_every_step(float64):
    process = VariancePreserving()
    found = sample_twisted(PRIOR.denoise(process), process, log_likelihood, torch.randn(100, 2), num_steps=30)
    assert_close(found.log_weights.exp().mean(), torch.tensor(1.0))
    assert found.effective_sizes.shape == (30,)
    assert ((found.effective_sizes >= 1) & (found.effective_sizes <= 100 + 1e-9)).all()
    assert_close(found.effective_sizes[-1], effective_size(found.log_weights))
    assert found.evaluations == 30


def test_the_effective_size_is_that_of_kish(float64):
    w = torch.tensor([0.1, 2.0, 3.0, 0.0])
    assert_close(effective_size(w.log()), w.sum() ** 2 / w.square().sum())
    assert_close(effective_size(torch.full((7,), -1000.0)), torch.tensor(7.0))


def test_a_likelihood_that_says_nothing_leaves_the_prior(float64):
    """All weights alike, and an evidence of what it says."""
    process = VariancePreserving()
    found = sample_twisted(
        PRIOR.denoise(process), process, lambda x: torch.full((len(x),), -3.0), torch.randn(2000, 2), num_steps=40
    )
    assert_close(found.log_weights, torch.zeros(2000), rtol=0, atol=1e-10)
    assert found.log_evidence.item() == pytest.approx(-3.0)
    assert_means(found.x.square(), law_of_walk(process, 40).diag())


def test_two_modes_are_weighed_as_the_posterior_weighs_them(float64):
    """A mixture as prior, seen with noise: quadrature, within their error (1e-7) and the two per cent of 150 steps."""
    law, process, steps = Mixture(torch.tensor([0.3, 0.7]), torch.tensor([-1.4, 0.6]), torch.tensor([0.5, 0.35])), Karras(), 150
    likelihood = lambda x: dist.Normal(x[:, 0], 1.0).log_prob(torch.tensor(-0.6))  # noqa: E731
    joint = lambda x: (law.log_prob(x[:, 0]) + likelihood(x)).exp()  # noqa: E731
    evidence = integral(joint, -8.0, 8.0)
    left = integral(lambda x: joint(x) * (x[:, 0] < -0.4), -8.0, 8.0)
    parts = []
    for _ in range(12):
        found = sample_twisted(NoisedMixture(law).denoise(process), process, likelihood, torch.randn(200, 1), num_steps=steps)
        weights = (found.log_weights + found.log_evidence).exp() / 200
        parts.append(torch.stack([weights.sum(), weights @ (found.x[:, 0] < -0.4).double()]))
    parts, truth = torch.stack(parts), torch.stack([evidence, left])
    assert ((parts.mean(0) - truth).abs() < t.isf(1e-7 / 4, 11) * parts.std(0) / 12**0.5 + 0.02 * truth).all()


@pytest.mark.parametrize("last", [True, False])
def test_particles_without_any_likelihood_are_told(last):
    """Also where only the last step finds it out."""
    asked = []

    def never(x):
        asked.append(len(x))
        return x.sum(1) * 0 + (0.0 if last and len(asked) < 5 else -torch.inf)

    with pytest.raises(FloatingPointError, match="No particle has a finite likelihood"):
        sample_twisted(ONE.denoise(Karras()), Karras(), never, torch.randn(10, 2), num_steps=4)
    assert len(asked) == 5


@pytest.mark.parametrize("cut", [0.0, 1.0])
def test_what_the_model_rules_out_is_left_out_and_no_more(cut, float64):
    """Of a standard normal prior its upper part: no particle is lost while its estimate lies below."""
    above, parts = lambda x: torch.where(x[:, 0] > cut, 0.0, -torch.inf), []
    for _ in range(20):
        found = sample_twisted(ONE.denoise(Karras()), Karras(), above, torch.randn(400, 1), num_steps=60)
        weights = (found.log_weights + found.log_evidence).exp() / 400
        assert (found.x[weights > 0] > cut).all()
        parts.append(torch.stack([weights.sum(), weights @ found.x[:, 0]]))
    spread = walked(Karras(), 60, torch.ones(1)).sqrt().item()
    assert_means(torch.stack(parts), [norm.sf(cut / spread), spread * norm.pdf(cut / spread)])


# A guided score alone.


def law_of_guided(process, steps, scale):
    """Mean and variance of the walk of `guided`, for a standard normal prior seen with noise SCALE at SEEN."""
    times = UniformLogSNR()(process, steps)
    a, v = process.alpha(times), process.sigma(times) ** 2
    mean, var = torch.zeros(()), a[0] ** 2 + v[0]
    for i in range(steps):
        kept = a[i] ** 2 / v[i] * v[i + 1] / a[i + 1] ** 2
        gain, noise = a[i] / (a[i] ** 2 + v[i]), v[i + 1] * (1 - kept)
        size = scale * noise / SCALE**2
        pull = gain * size / (1 + size / a[i] ** 2)
        rate = a[i + 1] * (1 - kept) * gain + kept * a[i + 1] / a[i] - pull * gain
        mean, var = rate * mean + pull * SEEN, rate**2 * var + noise
    return mean / a[-1], var / a[-1] ** 2


def seen_once(x):
    return dist.Normal(x[:, 0], SCALE).log_prob(torch.tensor(SEEN, dtype=x.dtype))


@every_process
def test_a_guided_score_is_biased_by_what_its_law_says(process, float64):
    """Its draws follow their own law and not the posterior's, from which they are many standard errors away."""
    found = sample_guided(ONE.denoise(process), process, seen_once, torch.randn(4000, 1), num_steps=200)
    mean, var = law_of_guided(process, 200, 1.0)
    assert_means(found.x, mean)
    assert_means((found.x - mean) ** 2, var)
    true_mean, true_var = SEEN / (1 + SCALE**2), SCALE**2 / (1 + SCALE**2)
    for values, wanted in ((found.x, true_mean), ((found.x - mean) ** 2, true_var)):
        with pytest.raises(AssertionError, match="standard errors"):
            assert_means(values, wanted)


@pytest.mark.slow
def test_the_bias_of_a_guided_score_does_not_go_away_with_its_steps(float64):
    """Of a standard normal prior seen with noise of deviation 0.4: told in the documentation of `GuidedDiffusion`."""
    true_mean, true_var = SEEN / (1 + SCALE**2), SCALE**2 / (1 + SCALE**2)
    coarse, fine = (law_of_guided(VariancePreserving(), steps, 1.0) for steps in (4000, 16_000))
    assert abs(coarse[1] / fine[1] - 1) < 0.01
    assert [round(float(part), 2) for part in (*fine, true_mean, true_var)] == [1.5, 0.08, 1.29, 0.14]


@pytest.mark.parametrize("deviation", [0.05, 0.02, 0.001])
def test_sharp_likelihoods_do_not_blow_a_guided_walk_up(deviation):
    """What is known is met to within a few of its deviations."""
    process, noise = VariancePreserving(), torch.randn(500, 1)
    found = sample_guided(ONE.denoise(process), process, lambda x: -((x[:, 0] - 1) ** 2) / (2 * deviation**2), noise)
    assert (found.x - 1).abs().max() < 10 * deviation


def test_a_guided_walk_that_is_lost_is_told():
    with pytest.raises(FloatingPointError, match="Guided sampling has reached NaN or infinite values"):
        sample_guided(lambda x, t: x / 0, VariancePreserving(), lambda x: -x[:, 0].square(), torch.randn(5, 1), num_steps=5)


def test_a_guided_score_has_no_weights_and_no_evidence():
    found = sample_guided(ONE.denoise(Karras()), Karras(), seen_once, torch.randn(50, 1), num_steps=7)
    assert found.log_weights.equal(torch.zeros(50))
    assert found.log_evidence.isnan()
    assert found.effective_sizes.equal(torch.full((7,), 50.0))
    assert found.evaluations == 7


def test_a_guidance_of_nothing_is_the_ancestral_walk(float64):
    process = VariancePreserving()
    found = sample_guided(ONE.denoise(process), process, seen_once, torch.randn(4000, 1), num_steps=40, scale=0.0)
    assert_means(found.x**2, walked(process, 40, torch.ones(1)))


# Under a Pyro model.


def exact(process=None, event_shape=(2,), **options) -> GenerativeDistribution:
    return PRIOR.diffusion(process or VariancePreserving(), event_shape, **options)


def test_plates_in_the_likelihood_count_every_row(float64):
    """n rows of deviation s are one of s / sqrt(n), but for a constant."""
    y, s = torch.tensor([1.0, 2.0, 1.2, 1.8]), 0.8

    def model(y):
        x = pyro.sample("x", exact())
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(x @ WEIGHT, s), obs=y)

    pyro.set_rng_seed(1)
    many = diffusion_posterior(model, y, method=TwistedDiffusion(20), num_samples=50)
    pyro.set_rng_seed(1)
    one = diffusion_posterior(linear(exact()), y.mean(), method=TwistedDiffusion(20), num_samples=50)  # s / 2 = SCALE
    assert_close(many.draws, one.draws)
    assert_close(many.log_weight, one.log_weight)
    joint = dist.Normal(0.0, s).log_prob(y - y.mean()).sum() - norm.logpdf(0.0, scale=SCALE)
    assert_close(many.log_evidence - one.log_evidence, joint)


def test_masks_scales_and_nested_plates_count_as_pyro_counts_them(float64):
    def model(y, keep):
        x = pyro.sample("x", exact())
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2, dim=-1), pyro.poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(x @ WEIGHT, 0.7).mask(keep), obs=y)

    y, keep = torch.randn(3, 2), torch.tensor([[True, False], [True, True], [False, True]])

    def by_hand(x):
        return 0.5 * (dist.Normal(x @ WEIGHT, 0.7).log_prob(y.flatten()[:, None]) * keep.flatten()[:, None]).sum(0)

    pyro.set_rng_seed(2)
    torch.randn(1, 2)  # for the run that looks at the model
    noise = torch.randn(6, 2)
    wanted = sample_twisted(PRIOR.denoise(VariancePreserving()), VariancePreserving(), by_hand, noise, num_steps=5)
    pyro.set_rng_seed(2)
    found = diffusion_posterior(model, y, keep, method=TwistedDiffusion(5), num_samples=6)
    assert_close(found.draws, wanted.x)
    assert_close(found.log_weight, wanted.log_weights)
    assert_close(found.log_evidence, wanted.log_evidence)


def test_a_likelihood_of_another_law_agrees_with_quadrature(float64):
    """Counts with a rate of exp(x)."""
    prior, y = exact(), torch.tensor([2.0, 0.0])

    def model():
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Poisson(x.exp()).to_event(1), obs=y)

    found = diffusion_posterior(model, method=TwistedDiffusion(200), num_samples=1000)
    points = torch.cartesian_prod(torch.linspace(-5, 5, 300), torch.linspace(-5, 5, 300))
    log_p = PRIOR.law.log_prob(points) + dist.Poisson(points.exp()).log_prob(y).sum(1)
    truth = log_p.softmax(0) @ points
    spread = (log_p.softmax(0) @ points.square() - truth**2).sqrt()
    off = (found.log_weight.softmax(0) @ found.draws - truth).abs()
    assert (off < 6 * spread / found.effective_sample_size**0.5 + 0.01).all()
    cell = log((10 / 299) ** 2)
    assert found.log_evidence.item() == pytest.approx((log_p.logsumexp(0) + cell).item(), abs=0.2)


def test_data_that_are_standardised_and_bounded_come_back_in_their_units():
    diffusion = Diffusion((2,), network=DenseField(16, 1), support=constraints.interval(10.0, 20.0))
    diffusion.standardize(10 + 10 * torch.rand(100, 2))
    diffusion.eval()

    def model(y):
        x = pyro.sample("x", diffusion())
        pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y)

    found = diffusion_posterior(model, torch.tensor(33.0), method=TwistedDiffusion(60), num_samples=200)
    assert diffusion().support.check(found.draws).all()
    assert (found.log_weight.softmax(0) @ found.draws.sum(1)).item() == pytest.approx(33.0, abs=1.0)


def test_a_context_of_the_prior_counts():
    class Shift(nn.Module):
        def forward(self, x, t, context):
            process = VariancePreserving()
            alpha, sigma = process.alpha(t).unsqueeze(1), process.sigma(t).unsqueeze(1)
            return context + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * context)

    from pyro_genmodels.families import DataPrediction

    diffusion = Diffusion((2,), context=2, network=Shift(), prediction=DataPrediction(), standardize=False).eval()
    where = torch.tensor([1.0, -1.0])

    def model():
        x = pyro.sample("x", diffusion(where))
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=torch.zeros(2))

    found = diffusion_posterior(model, method=TwistedDiffusion(100), num_samples=500)
    off = found.log_weight.softmax(0) @ found.draws - where / 2
    assert (off.abs() < 6 * (0.125 / found.effective_sample_size) ** 0.5 + 0.01).all()


def test_methods_are_told_apart_and_draws_are_plain_tensors():
    for method in (TwistedDiffusion(4), GuidedDiffusion(4)):
        found = diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=method, num_samples=9)
        assert found.draws.shape == (9, 2)
        assert not found.draws.requires_grad
        assert found.evaluations == 4
        assert found.log_evidence.isnan() == isinstance(method, GuidedDiffusion)
        assert found.get_samples()["x"] is found.draws
        assert found.get_samples(group_by_chain=True)["x"].shape == (1, 9, 2)
        assert found.resampled(30).shape == (30, 2)


def test_resampled_draws_follow_the_weights():
    found = diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=TwistedDiffusion(4), num_samples=5)
    drawn = found.resampled(5000)
    counts = (drawn[:, None] == found.draws).all(2).double().sum(0)
    expected = 5000 * found.log_weight.softmax(0)
    assert ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum() < chi2.isf(1e-7, 4)


def test_progress_is_shown_where_it_is_asked_for(capsys):
    for method, name in ((TwistedDiffusion(3), "twisted"), (GuidedDiffusion(3), "guided")):
        diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=method, num_samples=5, progress=True)
        assert name in capsys.readouterr().err
        diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=method, num_samples=5)
        assert capsys.readouterr().err == ""


def test_draws_tell_how_few_were_the_parents_of_all(float64):
    found = diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=TwistedDiffusion(20), num_samples=50)
    assert found.effective_sizes.shape == (20,)
    assert_close(found.effective_sizes[-1].item(), found.effective_sample_size)
    assert repr(found).startswith("WeightedDraws('x', 50 draws, effective sample size ")
    assert len(repr(found)) < 100


def test_draws_and_evidence_have_a_k():
    found = diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=TwistedDiffusion(20), num_samples=200)
    assert found.pareto_k == pareto_k(found.log_weight)
    assert found.pareto_k <= found.evidence_pareto_k < torch.inf
    assert to_arviz(found, torch.tensor(SEEN), model=linear(exact())).sample_stats.log_weight.pareto_k == pytest.approx(
        found.pareto_k.item(), abs=1e-5
    )
    heavy = replace(found, pareto_k=torch.tensor(0.9), evidence_pareto_k=torch.tensor(1.2))
    assert repr(heavy).endswith("; the weights unreliable, Pareto k-hat 0.90; the evidence unreliable, Pareto k-hat 1.20)")
    guided = diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=GuidedDiffusion(3), num_samples=30)
    assert guided.pareto_k == -torch.inf
    assert guided.evidence_pareto_k.isnan()


def test_draws_go_to_arviz_with_their_weights():
    y = torch.tensor(SEEN)
    found = diffusion_posterior(linear(exact()), y, method=TwistedDiffusion(20), num_samples=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        data = to_arviz(found, y, model=linear(exact()), progress=False)
    assert data.posterior["x"].shape == (1, 30, 2)
    assert data.sample_stats["log_weight"].shape == (1, 30)
    assert_close(torch.tensor(data.sample_stats["log_weight"].values[0]).to(found.log_weight), found.log_weight)
    wanted = dist.Normal(found.draws @ WEIGHT.to(found.draws), SCALE).log_prob(y)
    assert_close(torch.tensor(data.log_likelihood["y"].values[0]).to(wanted), wanted, rtol=1e-5, atol=1e-5)
    assert data.observed_data["y"].values == pytest.approx(SEEN)


# What is refused.


def nothing_latent(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def nothing_observed(y):
    pyro.sample("x", exact())


def two_latents(y):
    x, z = pyro.sample("x", exact()), pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x.sum() + z, 1.0), obs=y)


def another_prior(y):
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def a_flow(y):
    x = pyro.sample("x", Flow((2,))())
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def in_a_plate(y):
    with pyro.plate("rows", 3):
        x = pyro.sample("x", exact())
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


def of_integers(y):
    x = pyro.sample("x", Diffusion((2,), levels=4, network=DenseField(16, 1)).eval()())
    pyro.sample("y", dist.Normal(x.sum().float(), 1.0), obs=y)


def on_some_rows(y):
    x = pyro.sample("x", exact())
    with pyro.plate("rows", 10, subsample_size=5):
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y.expand(5))


def on_chosen_rows(y):
    x = pyro.sample("x", exact())
    with pyro.plate("rows", 10, subsample=torch.arange(3)):
        pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y.expand(3))


def by_numpy(y):
    x = pyro.sample("x", exact())
    pyro.sample("y", dist.Normal(float(x.numpy().sum()), 1.0), obs=y)


def with_an_if(y):
    x = pyro.sample("x", exact())
    pyro.sample("y", dist.Normal(x.sum() if x[0] > 0 else -x.sum(), 1.0), obs=y)


def at_random(y):
    x = pyro.sample("x", exact())
    pyro.sample("y", dist.Normal(x.sum() + torch.randn(()), 1.0), obs=y)


def masked(y):
    x = pyro.sample("x", exact().mask(False))
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def tempered(y):
    with poutine.scale(scale=0.5):
        x = pyro.sample("x", exact())
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


def hidden(y):
    with poutine.mask(mask=False):
        x = pyro.sample("x", exact())
    pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (on_some_rows, "all the data, but plate 'rows' takes 5 of 10 rows"),
        (on_chosen_rows, "all the data, but plate 'rows' takes 3 of 10 rows"),
        (by_numpy, "by torch.vmap, which this model does not allow"),
        (with_an_if, "torch.where instead of if"),
        (at_random, "random numbers by pyro.sample only"),
        (masked, "'x' is masked or scaled"),
        (hidden, "'x' is masked or scaled"),
        (tempered, "'x' is masked or scaled"),
        (nothing_latent, "one latent variable and at least one observed variable, but found latent none and observed 'y'"),
        (nothing_observed, "found latent 'x' and observed none"),
        (two_latents, "found latent 'x', 'z' and observed 'y'.*SVI or NUTS"),
        (another_prior, "diffusion over one event at site 'x'.*Normal.*NUTS or SVI"),
        (a_flow, "NormalizingFlow.*NUTS or SVI"),
        (in_a_plate, r"outside of plates.*batch_shape=\(3,\)"),
        (of_integers, "Dequantized"),
    ],
    ids=lambda part: getattr(part, "__name__", None),
)
def test_models_of_another_kind_are_refused_with_what_to_use(model, found):
    with pytest.raises(ValueError, match=found):
        diffusion_posterior(model, torch.tensor(SEEN), method=TwistedDiffusion(3), num_samples=5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: TwistedDiffusion(0), lambda: TwistedDiffusion(resample_below=1.5),
        lambda: TwistedDiffusion(resample_below=-0.1),
        lambda: TwistedDiffusion(1.5), lambda: GuidedDiffusion(1.5), lambda: GuidedDiffusion(scale=float("nan")),
        lambda: GuidedDiffusion(0), lambda: GuidedDiffusion(scale=-1.0),
        lambda: diffusion_posterior(linear(exact()), torch.tensor(SEEN), num_samples=0),
        lambda: diffusion_posterior(linear(exact()), torch.tensor(SEEN), num_samples=2.5),
    ],
)  # fmt: skip
def test_choices_that_make_no_sense_are_refused(build):
    with pytest.raises(ValueError, match="wants"):
        build()


def test_what_is_no_choice_and_no_distribution_is_told_so():
    with pytest.raises(TypeError, match="class TwistedDiffusion; call it"):
        diffusion_posterior(linear(exact()), torch.tensor(SEEN), method=TwistedDiffusion)
    with pytest.raises(TypeError, match=r"family\(\), but found a Diffusion\. For images"):
        inpaint(Diffusion((2,)), torch.zeros(2), torch.tensor([True, False]))


# Inpainting.


def test_coordinates_that_are_known_leave_the_conditional_of_the_others(float64):
    values, known = torch.tensor([0.8, torch.nan]), torch.tensor([True, False])
    found = inpaint(exact(), values, known, method=TwistedDiffusion(300), num_samples=600, tolerance=0.05)
    weights, n = found.log_weight.softmax(0), found.effective_sample_size
    total = COV[0, 0] + 0.05**2
    mean, var = COV[0, 1] / total * 0.8, COV[1, 1] - COV[0, 1] ** 2 / total
    assert n > 100
    assert abs(weights @ found.draws[:, 1] - mean) < 6 * (var / n) ** 0.5 + 0.01
    assert abs(weights @ (found.draws[:, 1] - mean).square() / var - 1) < 6 * (2 / n) ** 0.5 + 0.03
    assert abs(weights @ found.draws[:, 0] - 0.8) < 0.02
    assert found.log_evidence.item() == pytest.approx(-0.5 * (0.64 / total + total.log() + log(2 * pi)).item(), abs=0.3)


def test_images_are_inpainted():
    diffusion = Diffusion((1, 2, 2), network=DenseField(16, 1)).eval()
    known = torch.tensor([[[True, False], [False, True]]])
    found = inpaint(diffusion(), torch.full((1, 2, 2), 0.3), known, method=TwistedDiffusion(150), num_samples=100)
    assert found.draws.shape == (100, 1, 2, 2)
    assert (found.draws[:, known] - 0.3).abs().max() < 0.2


@pytest.mark.parametrize(
    ("values", "known"),
    [
        (torch.zeros(3), torch.ones(2, dtype=torch.bool)), (torch.zeros(2), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(2), torch.ones(2)),
    ],
)  # fmt: skip
def test_masks_of_another_shape_are_refused(values, known):
    with pytest.raises(ValueError, match=r"boolean mask of shape \(2,\)"):
        inpaint(exact(), values, known)


# Arguments, and what is shown.


def sum_of_two(y):
    x = pyro.sample("x", PRIOR.diffusion(VariancePreserving(), (2,)))
    pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=y)


WRONG = {
    "a family": (lambda: (Diffusion((2,)), torch.tensor(1.0)), {}, "a family of type Diffusion.*inpaint"),
    "a distribution": (lambda: (Diffusion((2,))(), torch.tensor(1.0)), {}, "a distribution of type ReverseDiffusion"),
    "data": (lambda: (torch.ones(2),), {}, "a value of type Tensor"),
    "nothing": (lambda: (None,), {}, "a value of type NoneType"),
    "no data": (lambda: (sum_of_two,), {}, r"takes \(y\): missing a required argument: 'y'"),
    "another keyword": (lambda: (sum_of_two, 1.0), {"num_particles": 5}, "unexpected keyword argument 'num_particles'"),
    "a class as method": (lambda: (sum_of_two, 1.0), {"method": GuidedDiffusion}, "the class GuidedDiffusion; call it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_refused_before_the_model_runs(case):
    arguments, keywords, message = WRONG[case]
    with pytest.raises(TypeError, match=message):
        diffusion_posterior(*arguments(), **keywords)


def test_an_evidence_that_is_not_computed_says_so():
    found = diffusion_posterior(sum_of_two, torch.tensor(1.0), method=GuidedDiffusion(3), num_samples=5)
    assert repr(found).endswith("log evidence not computed)")
    found = diffusion_posterior(sum_of_two, torch.tensor(1.0), method=TwistedDiffusion(3), num_samples=5)
    assert float(repr(found).removesuffix(")").split()[-1]) == pytest.approx(found.log_evidence.item(), abs=1e-3)


@pytest.mark.parametrize(("unit", "offset"), [(1.0, 0.0), (1e-6, 0.0), (1e6, 0.0), (1.0, 1e4)])
def test_inpainting_observes_to_a_share_of_the_spread_in_any_unit(unit, offset):
    """Right values: those of unit 1. A deviation of 0.02 in units of the data is none at all for data of size 1e-6."""
    transform = torch.distributions.AffineTransform(torch.full((2,), offset), torch.full((2,), unit), event_dim=1)
    prior = PRIOR.diffusion(VariancePreserving(), (2,), pretransform=transform.inv)
    known = torch.tensor([True, False])
    found = inpaint(prior, transform(torch.tensor([0.7, 0.0])), known, method=TwistedDiffusion(100), num_samples=100)
    assert ((found.resampled(100)[:, 0] - offset) / unit - 0.7).abs().max() < 0.12  # six deviations


def test_an_invalid_tolerance_is_refused():
    with pytest.raises(ValueError, match=r"positive tolerance, or None, but found -1.0"):
        inpaint(PRIOR.diffusion(VariancePreserving(), (2,)), torch.ones(2), torch.tensor([True, False]), tolerance=-1.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e15])
def test_the_curvature_of_a_likelihood_is_right_in_any_unit(scale):
    """Right value: the second derivative, 3 scale. In single precision, squares of slopes below 1e-22 vanished."""
    x = torch.randn(5, 4).requires_grad_()
    slope = torch.autograd.grad((-1.5 * scale * x.square()).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(_curvature(slope, x), torch.full((5,), 3.0 * scale), rtol=1e-4, atol=0.0)


def test_posterior_draws_lie_inside_of_the_support():
    near = torch.distributions.constraints.greater_than(1e6)
    diffusion = Diffusion((1,), support=near, network=DenseField(8, 1)).eval()

    def model():
        x = pyro.sample("x", diffusion())
        pyro.sample("y", dist.Normal(x.sum(), 10.0), obs=torch.tensor(1e6))

    assert near.check(diffusion_posterior(model, method=TwistedDiffusion(10), num_samples=500).draws).all()


@pytest.mark.parametrize("unit", [1e-25, 1e25])
def test_inpainting_takes_any_unit_and_arrays(unit):
    """At 1e-25 no particle had a finite likelihood, since the squared deviation vanished."""
    found = []
    for size in (1.0, unit):
        torch.manual_seed(0)
        diffusion = Diffusion((2,))
        diffusion.standardize(torch.randn(100, 2) * size)
        values, known = np.array([size, 0.0]), np.array([True, False])
        found.append(inpaint(diffusion.eval()(), values, known, method=TwistedDiffusion(10), num_samples=20))
    assert_close(found[1].draws / unit, found[0].draws, rtol=1e-3, atol=1e-3)
    assert float(found[1].log_evidence) + log(unit) == pytest.approx(float(found[0].log_evidence), abs=1e-2)
