"""Learned likelihoods and ratios of linear Gaussian simulators, against the posterior in closed form."""

from functools import cache, partial
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal

from pyro_genmodels import MAF, Autoregressive, BernoulliLikelihood, CategoricalLikelihood, Flow, to_arviz
from pyro_genmodels.infer.compiled.modes import Captured
from pyro_genmodels.posteriors import (
    AmortizedLikelihood,
    AmortizedRatio,
    DenseEmbedding,
    MeanField,
    NoUTurn,
    diagnose_posterior,
    simulation_based_calibration,
)
from pyro_genmodels.posteriors.learned_ratio import _Contrastive, _Critic
from pyro_genmodels.posteriors.observation_encoder import ObservationEncoder

NOISE = 0.5
SMALL = partial(Flow, transform=MAF(transforms=1, hidden=(32,)))
CHAINS = NoUTurn(num_chains=2, num_warmup=200, num_samples=500, mode=Captured())
X = torch.tensor([[1.0, -1.5], [0.3, -0.2], [0.9, -1.1]])


def conjugate():
    """A normal mean with a standard normal prior and two coordinates that a simulator returns."""
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.deterministic("x", loc + NOISE * torch.randn_like(loc), event_dim=1)


def exact(x):
    """Return the mean and the deviation of the posterior of `conjugate`, given independent rows x."""
    precision = 1 + len(x) / NOISE**2
    return x.sum(0) / NOISE**2 / precision, precision**-0.5


@cache
def trained(kind):
    """Return a learned likelihood or ratio of `conjugate`, trained once."""
    pyro.set_rng_seed(0)
    if kind == "likelihood":
        learned = AmortizedLikelihood(conjugate, observed=["x"], family=SMALL)
        return learned.train(2000, step_size=5e-3, max_epochs=30, progress=False)
    learned = AmortizedRatio(conjugate, observed=["x"], hidden=(64, 64))
    return learned.train(5000, step_size=3e-3, max_epochs=30, progress=False)


def errors(fit, x):
    """Return the errors of the means in deviations and of the deviations as shares."""
    draws, (mean, deviation) = fit.get_samples()["loc"], exact(x)
    return ((draws.mean(0) - mean) / deviation).abs().max(), (draws.std(0) / deviation - 1).abs().max()


@pytest.mark.parametrize("kind", ["likelihood", pytest.param("ratio", marks=pytest.mark.slow)])
def test_means_and_deviations_are_those_of_the_closed_form(kind):
    """Within 0.3 deviations and 20 per cent; 400 effective draws of the exact posterior miss it once in 10^5 seeds or less."""
    pyro.set_rng_seed(1)
    fit = trained(kind).given(x=X[0], method=CHAINS, progress=False)
    mean, deviation = errors(fit, X[:1])
    assert mean < 0.3
    assert deviation < 0.2


def counts(shape, rate):
    """Return a model of one count with a Gamma prior of its mean, whose posterior is a Gamma distribution."""

    def model():
        mean = pyro.sample("mean", dist.Gamma(shape, rate))
        pyro.sample("x", dist.Poisson(mean))

    return model


@pytest.mark.parametrize(("shape", "rate"), [(1.0, 2.0), pytest.param(2.0, 0.5, marks=pytest.mark.slow)])
def test_the_default_likelihood_of_counts_is_that_of_the_conjugate_posterior(shape, rate):
    """For a few values it has their probabilities, for more a density with noise: the posterior of log mean, on a grid.

    Its mean divergence from the exact one over counts as the model makes them is below 0.015 nats. That of a flow over the
    numbers themselves is 0.04 to 0.06.
    """
    pyro.set_rng_seed(0)
    learned = AmortizedLikelihood(counts(shape, rate), observed=["x"])
    learned.train(2000, max_epochs=60, step_size=2e-3, patience=15, progress=False)
    log_mean = torch.linspace(-8.0, 4.0, 1000)
    x = dist.Poisson(dist.Gamma(shape, rate).sample((100,))).sample().clamp(max=learned.simulations["x"].max())
    log_prior = dist.Gamma(shape, rate).log_prob(log_mean.exp()) + log_mean
    with torch.no_grad():
        found = learned.family(log_mean[:, None]).log_prob(learned._prepared(learned.family, {"x": x})[:, None])
    exact = (dist.Poisson(log_mean.exp()).log_prob(x[:, None]) + log_prior).log_softmax(1)
    assert (exact.exp() * (exact - (found + log_prior).log_softmax(1))).sum(1).mean() < 0.015


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "rate"), [(1.0, 2.0), (2.0, 0.5)])
def test_several_counts_have_the_conjugate_posterior(shape, rate):
    """Within 0.3 deviations and 20 per cent, what 400 effective draws miss once in 10^5 seeds or less."""
    pyro.set_rng_seed(0)
    learned = AmortizedLikelihood(counts(shape, rate), observed=["x"])
    learned.train(4000, max_epochs=60, step_size=2e-3, patience=15, progress=False)
    x = torch.tensor([0, 2, 1, 0, 1])
    draws = learned.given(x=x, method=CHAINS, progress=False).get_samples()["mean"]
    exact = dist.Gamma(shape + x.sum(), rate + len(x))
    assert (draws.mean() - exact.mean).abs() < 0.3 * exact.variance.sqrt()
    assert (draws.std() / exact.variance.sqrt() - 1).abs() < 0.2


def test_the_default_family_follows_the_values_of_the_simulations():
    def learned(x, family=None):
        simulations = {"mean": torch.rand(len(x)) + 0.1, "x": x}
        made = AmortizedLikelihood(counts(1.0, 1.0), observed=["x"], family=family, simulations=simulations)
        return made.train(len(x), max_epochs=1, progress=False)

    few = learned(torch.arange(40) % 2)
    assert few.family.likelihood == BernoulliLikelihood()
    unlike = pytest.warns(RuntimeWarning, match="outside of the range of the 40 simulations")
    with unlike, pytest.raises(ValueError, match="values from 2 to 2, but the family was trained on"):
        few.given(x=2)
    few._made.values["x"][3] = 4.0  # as further simulations may have it
    assert few.train(40, max_epochs=1, progress=False).family.likelihood == CategoricalLikelihood(5)
    many = learned(torch.arange(40))
    assert isinstance(many.family, Flow)
    assert many._prepared(many.family, {"x": torch.tensor([3])}).item() == 3.5
    _, _, rows, _ = many._task()
    assert rows.floor().flatten().equal(torch.arange(40.0))
    assert not rows.equal(rows.floor())
    own = learned(torch.arange(40) % 2, family=partial(Autoregressive, likelihood=CategoricalLikelihood(3)))
    assert own._prepared(own.family, {"x": torch.tensor([2])}).item() == 2
    with pytest.warns(
        RuntimeWarning, match="In 10% of the simulations a number that is observed is 0.5.*family=.*AmortizedRatio"
    ):
        learned(torch.cat([torch.full((4,), 0.5), torch.randn(36)]), family=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["likelihood", "ratio"])
def test_independent_observations_are_added(kind):
    """Three rows have the deviation (1 + 3 / noise^2)^-1/2: within 0.5 deviations and 20 per cent."""
    pyro.set_rng_seed(2)
    fit = trained(kind).given(x=X, method=CHAINS, progress=False)
    mean, deviation = errors(fit, X)
    assert mean < 0.5
    assert deviation < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["likelihood", "ratio"])
def test_a_fit_is_one_like_any_other(kind):
    pyro.set_rng_seed(3)
    fit = trained(kind).given(x=X[0], method=CHAINS, progress=False)
    if kind == "ratio":
        with pytest.warns(UserWarning, match="pyro.factor 'log_ratio', which has no rows"):
            data = to_arviz(fit, progress=False)
    else:
        data = to_arviz(fit, progress=False)
        assert data.log_likelihood["x"].shape[:2] == (2, 500)
        assert torch.tensor(data.observed_data["x"].values).equal(X[0])
    assert data.posterior["loc"].shape == (2, 500, 2)
    assert "diverging" in data.sample_stats
    assert diagnose_posterior(fit, progress=False).table["ess_bulk"].min() > 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["likelihood", "ratio"])
def test_calibration_fits_one_simulation_after_another(kind):
    """Ranks of 20 simulations have the mean of uniform ones within 5 deviations."""
    pyro.set_rng_seed(5)
    learned = trained(kind)
    chain = NoUTurn(num_chains=1, num_warmup=100, num_samples=100, mode=Captured())
    assert learned.samples_given(7, method=chain, x=X)["loc"].shape == (7, 3, 2)
    by_chains = SimpleNamespace(samples_given=partial(learned.samples_given, method=chain))
    found = simulation_based_calibration(
        conjugate, method=by_chains, observed=["x"], num_simulations=20, num_draws=19, seed=1, progress=False
    )
    ranks = found.ranks["loc"].double() / 19
    assert (ranks.mean(0) - 0.5).abs().max() < 5 * (20 * 12) ** -0.5


@pytest.mark.slow
def test_a_log_ratio_is_that_of_the_densities():
    """log p(x | z) - log p(x) within 0.25 nats on average over pairs: its evidence is normalised, as NRE-C promises."""
    pyro.set_rng_seed(4)
    pairs = AmortizedRatio(conjugate, observed=["x"]).simulate(2000, progress=False).simulations
    z, x = pairs["loc"], pairs["x"]
    true = (Normal(z, NOISE).log_prob(x) - Normal(0.0, (1 + NOISE**2) ** 0.5).log_prob(x)).sum(1)
    assert (trained("ratio").critic(z, x) - true).abs().mean() < 0.25


def test_the_loss_of_two_classes_is_their_cross_entropy():
    """For K = 1 and gamma = 1 it is half of softplus(-f) of pairs and half of softplus(f) of others, here of all shifts."""
    z, x = torch.randn(2, 1), torch.randn(2, 1)  # two pairs: there is one shift
    found = _Contrastive(1, 1.0)(lambda z, x: (z * x).sum(-1))(z, x)
    together, apart = (z * x)[:, 0], (z.flip(0) * x)[:, 0]
    wanted = (torch.nn.functional.softplus(-together) + torch.nn.functional.softplus(apart)).sum() / 2
    torch.testing.assert_close(found, wanted)
    assert _Contrastive(3, 1.0)(lambda z, x: (z * x).sum(-1))(z[:1], x[:1]) == 0


def test_the_loss_of_three_classes_is_that_of_the_paper():
    """Each z is another one's contrast; of its two, one is in the second term, by the order of the shifts."""
    gamma, z, x = 1.5, torch.randn(3, 1), torch.randn(3, 1)
    found = _Contrastive(2, gamma)(lambda z, x: (z * x).sum(-1))(z, x)
    ratio = (z * x.T).exp()  # of z_i and x_j
    wanted = []
    for shift in (1, 2):
        joint, one = ratio.diagonal(), torch.stack([ratio[(j + shift) % 3, j] for j in range(3)])
        none = -(2 / (2 + gamma * (ratio.sum(0) - joint))).log()
        wanted.append(((none - gamma * (gamma * joint / (2 + gamma * (joint + one))).log()) / (1 + gamma)).sum())
    assert min(abs(found - loss) for loss in wanted) < 1e-5
    assert abs(wanted[0] - wanted[1]) > 1e-4


def test_a_critic_embeds_an_observation_once_for_many_coordinates():
    z, x = torch.randn(5, 2), torch.randn(5, 3)
    critic = _Critic(z, ObservationEncoder({"x": torch.Size([3])}, {"x": DenseEmbedding(4)}, {"x": x}), (8,)).eval()
    sizes = []
    critic.context.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    many = torch.randn(7, 5, 2)
    torch.testing.assert_close(critic(many, x), critic(many, x.expand(7, 5, 3)))
    assert sizes == [5, 7]
    sizes.clear()
    _Contrastive(3, 1.0)(critic)(z, x)
    assert sizes == [5]


def test_latent_variables_end_before_the_simulator():
    """The density needs no run of the simulator, and observations between latent variables do not count twice."""
    runs = []

    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        runs.append("prior")
        x = scale + torch.randn(3)
        runs.append("simulator")
        pyro.deterministic("x", x, event_dim=1)

    learned = AmortizedLikelihood(model, observed=["x"], family=SMALL)
    learned.train(30, max_epochs=1, progress=False)
    runs.clear()
    fit = learned.given(x=torch.zeros(3), method=NoUTurn(1, 5, 5, mode=Captured()), progress=False)
    assert fit.get_samples()["scale"].shape == (5,)
    assert "simulator" not in runs


def test_wrong_names_shapes_and_kinds_are_refused():
    for error, message, call in [
        (TypeError, r"such as observed=\[", lambda: AmortizedRatio(conjugate, observed="x")),
        (TypeError, "such as family=Flow", lambda: AmortizedLikelihood(conjugate, observed=["x"], family=Flow((2,)))),
        (ValueError, "positive gamma", lambda: AmortizedRatio(conjugate, observed=["x"], gamma=0.0)),
        (ValueError, "has not been trained", lambda: AmortizedRatio(conjugate, observed=["x"]).given(x=X[0])),
        (ValueError, "wants the observations x by name, but found y", lambda: trained("likelihood").given(y=X[0])),
        (ValueError, r"\(2,\), or \(observation", lambda: trained("likelihood").given(x=torch.zeros(3))),
        (ValueError, "NaN or infinite", lambda: trained("likelihood").given(x=[0.0, torch.nan])),
    ]:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("kind", [partial(AmortizedLikelihood, family=SMALL), AmortizedRatio])
def test_simulations_that_fail_or_have_nan_are_counted_and_left_out(kind):
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if loc > 1:
            raise ZeroDivisionError("no population")
        x = loc + torch.randn(2)
        pyro.deterministic("x", x.log() if loc < -1 else x, event_dim=1)

    pyro.set_rng_seed(0)
    with pytest.warns(RuntimeWarning, match=r"of 200 simulations were left out: .*ZeroDivisionError: no population"):
        learned = kind(model, observed=["x"]).train(200, max_epochs=1, progress=False)
    assert set(learned.failures) == {"ZeroDivisionError: no population", "NaN or infinite values"}
    assert len(learned.simulations["x"]) == 200 - learned.failures.total()


def test_a_ratio_that_was_trained_with_missing_values_takes_them():
    simulations = {"loc": torch.randn(40, 2), "x": torch.randn(40, 2)}
    learned = AmortizedRatio(conjugate, observed=["x"], embedding=DenseEmbedding(missing=0.5), simulations=simulations)
    learned.train(num_simulations=40, max_epochs=1, progress=False)
    fit = learned.given(x=[0.3, torch.nan], method=MeanField(num_steps=20, step_size=0.01), progress=False)
    assert fit.get_samples(10)["loc"].isfinite().all()
