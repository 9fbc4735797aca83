"""A latent variable that Pyro reparametrises is no data, under every method that Pyro has; data stay data."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import DiscreteCosineTransform, HaarTransform
from pyro.infer import MCMC, NUTS
from pyro.infer import reparam as methods
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoStructured
from pyro.infer.autoguide.initialization import InitMessenger
from readings import draws, groups, stat, variables

from pyro_genmodels import MaximumLikelihood, log_likelihood, to_arviz
from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.reparam import replaceable
from pyro_genmodels.infer.adversarial.inputs import draw_observations

ROWS, SIZE = 5, 4


def normal_prior():
    return dist.Normal(torch.zeros(SIZE), 2.0).to_event(1)


PRIORS = {
    "normal": normal_prior,
    "log normal": lambda: dist.LogNormal(torch.zeros(SIZE), 0.5).to_event(1),
    "projected": lambda: dist.ProjectedNormal(torch.arange(1.0, SIZE + 1)),
    "simplex": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.7), logits=torch.zeros(SIZE)),
    "student": lambda: dist.StudentT(torch.tensor(5.0), torch.zeros(SIZE), 2.0).to_event(1),
    "stable": lambda: dist.Stable(torch.full((SIZE,), 1.8), torch.tensor(0.3), 1.0, 0.0).to_event(1),
    "symmetric stable": lambda: dist.Stable(torch.full((SIZE,), 1.8), torch.zeros(SIZE), 1.0, 0.0).to_event(1),
}


def model_with(prior):
    def model(y):
        x = pyro.sample("x", PRIORS[prior]())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)

    return model


@pytest.fixture
def y():
    return torch.randn(ROWS, SIZE) + torch.tensor([1.0, 0.0, -1.0, 2.0])


def prepared(guide, y):
    guide(y)  # its shapes are those of its first run
    return guide


def counts(y):
    x = pyro.sample("x", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Poisson(x), obs=y)


def conjugate(y):
    return dist.Gamma(y.sum() + 1, float(len(y)))


BY_MODEL = {
    "haar": ("normal", lambda model, y: methods.HaarReparam()),
    "cosine": ("normal", lambda model, y: methods.DiscreteCosineReparam()),
    "unit jacobian": ("normal", lambda model, y: methods.UnitJacobianReparam(HaarTransform(), "u")),
    "split": ("normal", lambda model, y: methods.SplitReparam([1, 3], -1)),
    "location and scale": ("normal", lambda model, y: methods.LocScaleReparam(0.3)),
    "learnt location and scale": ("normal", lambda model, y: methods.LocScaleReparam()),
    "neural transport": ("normal", lambda model, y: methods.NeuTraReparam(prepared(AutoMultivariateNormal(model), y))),
    "structured": ("normal", lambda model, y: methods.StructuredReparam(prepared(AutoStructured(model), y))),
    "transform": ("log normal", lambda model, y: methods.TransformReparam()),
    "projected normal": ("projected", lambda model, y: methods.ProjectedNormalReparam()),
    "gumbel": ("simplex", lambda model, y: methods.GumbelSoftmaxReparam()),
    "student": ("student", lambda model, y: methods.StudentTReparam()),
    "latent stable": ("stable", lambda model, y: methods.LatentStableReparam()),
    "stable": ("stable", lambda model, y: methods.StableReparam()),
    "symmetric stable": ("symmetric stable", lambda model, y: methods.SymmetricStableReparam()),
}
STRATEGIES = {
    "auto": ("normal", methods.AutoReparam),
    "auto, transformed": ("log normal", methods.AutoReparam),
    "minimal": ("stable", methods.MinimalReparam),
    "minimal, projected": ("projected", methods.MinimalReparam),
    "by a function": ("normal", lambda: lambda fn: poutine.reparam(fn, lambda site: HAAR if site["name"] == "x" else None)),
}
HAAR = methods.HaarReparam()
WEIGHTED = ["split", "neural transport", "structured"]  # no samples of the prior


def reparametrised(name, y):
    if name in STRATEGIES:
        prior, strategy = STRATEGIES[name]
        return strategy()(model_with(prior))
    prior, method = BY_MODEL[name]
    model = model_with(prior)
    return poutine.reparam(model, {"x": method(model, y)})


def test_no_method_of_pyro_is_left_out():
    used = {type(method(model_with(prior), torch.randn(ROWS, SIZE))).__name__ for prior, method in BY_MODEL.values()}
    elsewhere = {"AutoReparam", "MinimalReparam", "LinearHMMReparam", "ConjugateReparam"}
    assert used | elsewhere == set(methods.__all__)


def check_groups(data, y):
    """The latent variable is in the posterior, only y is data, and its log-likelihood is that of x."""
    x = draws(data, "x")
    assert x.shape[1:] == (SIZE,)
    assert data["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")
    for group in ("observed_data", "log_likelihood", "posterior_predictive"):
        assert variables(data, group) == {"y"}
    torch.testing.assert_close(draws(data, "y", "observed_data"), y)
    expected = dist.Normal(x[:, None], 1.0).to_event(1).log_prob(y)
    torch.testing.assert_close(draws(data, "y", "log_likelihood"), expected, rtol=1e-4, atol=1e-4, check_dtype=False)
    return x


@pytest.mark.parametrize("name", [*BY_MODEL, *STRATEGIES])
@pytest.mark.filterwarnings("ignore:to_arviz leaves out. prior:UserWarning")
def test_a_reparametrised_latent_is_no_data_under_svi(name, y):
    model = reparametrised(name, y)
    data = to_arviz((model, AutoNormal(model)), y, num_samples=6)
    check_groups(data, y)
    assert ("prior" in groups(data)) == (name not in WEIGHTED)
    if "prior" in groups(data):
        assert "x" in variables(data, "prior")
        assert variables(data, "prior_predictive") == {"y"}


AUXILIARY = {
    "haar": lambda x: {"x_haar": HaarTransform()(x)},
    "cosine": lambda x: {"x_dct": DiscreteCosineTransform()(x)},
    "unit jacobian": lambda x: {"x_u": HaarTransform()(x)},
    "split": lambda x: {"x_split_0": x[..., :1], "x_split_1": x[..., 1:]},
    "location and scale": lambda x: {"x_decentered": x / 2**0.7},
    "learnt location and scale": lambda x: {"x_decentered": x / 2**0.5},
    "auto": lambda x: {"x_decentered": x / 2**0.5},
}
LOG_DET = {"location and scale": 0.7, "learnt location and scale": 0.5, "auto": 0.5}


def joint(x, y):
    return normal_prior().log_prob(x) + dist.Normal(x[:, None], 1.0).log_prob(y).sum((-1, -2))


@pytest.mark.parametrize("name", AUXILIARY)
@pytest.mark.filterwarnings("ignore:to_arviz leaves out. prior:UserWarning")
def test_given_draws_of_the_auxiliary_variables_are_draws_of_the_latent(name, y, float64):
    """As of MCMC. The joint density is that of the model without reparametrisation, times the Jacobian of a linear map."""
    y = y.double()
    x = torch.randn(1, 7, SIZE)
    data = to_arviz(AUXILIARY[name](x), y, model=reparametrised(name, y))
    torch.testing.assert_close(check_groups(data, y), x[0])
    log_det = SIZE * LOG_DET.get(name, 0.0) * torch.tensor(2.0).log()
    torch.testing.assert_close(stat(data, "log_p"), joint(x[0], y) + log_det)
    prior = sum(draws(data, variable, "log_prior") for variable in variables(data, "log_prior"))
    torch.testing.assert_close(prior, normal_prior().log_prob(x[0]) + log_det)


@pytest.mark.parametrize("name", ["haar", "cosine", "neural transport", "structured", "gumbel"])
@pytest.mark.filterwarnings("ignore:to_arviz leaves out. prior:UserWarning")
def test_a_reparametrised_latent_is_no_data_under_mcmc(name, y):
    mcmc = MCMC(NUTS(reparametrised(name, y)), num_samples=8, warmup_steps=4, disable_progbar=True)
    mcmc.run(y)
    check_groups(to_arviz(mcmc, y), y)


def test_the_posterior_under_an_exact_conjugate_update(float64):
    """x ~ Gamma(a, b); 5 standard errors of the mean, 1e-6 with the skewness of 1000 draws. Every weight is the evidence."""
    y, n = torch.tensor([3.0, 0.0, 4.0, 2.0, 5.0]), 1000
    a, b = y.sum() + 2, ROWS + 1.0
    model = poutine.reparam(counts, {"x": methods.ConjugateReparam(conjugate)})
    with pytest.warns(UserWarning, match=r"leaves out: prior \(the reparametrisation of 'x'"):
        data = to_arviz((model, traces.no_latents), y, num_samples=n, parallel=True)
    x = draws(data, "x")
    assert abs(x.mean() - a / b) < 5 * (a / n) ** 0.5 / b
    assert variables(data, "posterior") == {"x"}
    assert variables(data, "observed_data") == {"y"} == variables(data, "log_likelihood")
    torch.testing.assert_close(draws(data, "y", "log_likelihood"), dist.Poisson(x[:, None]).log_prob(y))
    evidence = a.lgamma() - a * torch.tensor(b).log() - (y + 1).lgamma().sum()
    torch.testing.assert_close(stat(data, "log_weight"), evidence.expand(n))


# Data.


def stable_data(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Stable(torch.tensor(1.8), torch.tensor(0.2), 1.0, loc), obs=y)


def student_data(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(5.0, loc, 1.0), obs=y)


def chain_data(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    noise, eye = dist.Normal(torch.zeros(1), 1.0).to_event(1), torch.eye(1)
    observation = dist.StudentT(5.0, torch.zeros(1), scale).to_event(1)
    pyro.sample("y", dist.LinearHMM(noise, eye, noise, eye, observation, duration=len(y)), obs=y[:, None])


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (stable_data, methods.StableReparam()),
        (student_data, methods.StudentTReparam()),
        (chain_data, methods.LinearHMMReparam(obs=methods.StudentTReparam())),
    ],
)
def test_data_under_a_method_for_data_stay_data(model, method):
    y = torch.randn(ROWS)
    model = poutine.reparam(model, {"y": method})
    data = to_arviz((model, AutoNormal(model)), y, num_samples=3, groups=["posterior", "observed_data", "log_likelihood"])
    assert variables(data, "observed_data") == {"y"} == variables(data, "log_likelihood")
    assert "y" not in variables(data, "posterior")
    torch.testing.assert_close(draws(data, "y", "observed_data").squeeze(), y)


@pytest.mark.parametrize("method", [methods.HaarReparam(), methods.LocScaleReparam(0.0), methods.SplitReparam([1, 3], -1)])
def test_data_under_a_method_for_latents_are_refused(method, y):
    """Pyro's density is then that of other coordinates, and replicated data would be the data."""
    model = poutine.reparam(model_with("normal"), {"y": method})
    with pytest.raises(ValueError, match=r"observed site 'y' is reparametrised .* Leave 'y' out"):
        to_arviz((model, traces.no_latents), y, num_samples=2)


def test_a_latent_whose_auxiliary_variable_is_fixed_is_no_data(y):
    def two(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(mean, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0).expand([SIZE]).to_event(1), obs=y)

    model = poutine.reparam(two, {"x": methods.LocScaleReparam(0.0)})
    model = poutine.condition(model, {"x_decentered": torch.tensor(0.5)})
    data = to_arviz((model, AutoNormal(model)), y, num_samples=3)
    assert variables(data, "posterior") == {"mean", "x"}
    assert variables(data, "observed_data") == {"x_decentered", "y"}
    torch.testing.assert_close(draws(data, "x"), draws(data, "mean") + 1.0)


def test_a_delta_of_data_is_data(y):
    """A likelihood of one's own, written as a Delta with a density."""

    def model(y):
        x = pyro.sample("x", normal_prior())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Delta(y, dist.Normal(x, 1.0).to_event(1).log_prob(y), event_dim=1), obs=y)

    model = poutine.reparam(model, {"x": methods.HaarReparam()})
    check_groups(to_arviz((model, AutoNormal(model)), y, num_samples=3), y)


# Other readers of traces.


def local(y):
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", normal_prior())
        pyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


LOCAL = {
    "haar": methods.HaarReparam(),
    "cosine": methods.DiscreteCosineReparam(),
    "split": methods.SplitReparam([1, 3], -1),
    "location and scale": methods.LocScaleReparam(0.3),
}


@pytest.mark.parametrize("name", LOCAL)
def test_log_likelihood_integrates_over_a_reparametrised_latent(name, y, float64):
    """With the exact posterior N(0.8 y, 0.8) as the guide, every weight is the evidence N(y; 0, 5)."""
    y = y.double()

    def guide(y):
        with pyro.plate("data", len(y)):
            for site, loc in AUXILIARY[name](0.8 * y).items():
                scale = 0.8**0.5 / 2 ** LOG_DET.get(name, 0.0)
                pyro.sample(site, dist.Normal(loc, scale).to_event(1))

    found = log_likelihood((poutine.reparam(local, {"x": LOCAL[name]}), guide), y, num_samples=3)
    torch.testing.assert_close(found.values, dist.Normal(0.0, 5**0.5).log_prob(y).sum(-1))
    assert found.kind == "lower bound"


def test_maximum_likelihood_takes_no_reparametrised_latent_for_data(y):
    for model, method, data in (
        (local, methods.HaarReparam(), y),
        (counts, methods.ConjugateReparam(conjugate), y[:, 0].abs().round()),
    ):
        with pytest.raises(ValueError, match="cannot integrate over latent variables, but the model has 'x"):
            MaximumLikelihood().loss(poutine.reparam(model, {"x": method}), traces.no_latents, data)


def test_a_critic_sees_data_only(y):
    found = draw_observations(poutine.reparam(local, {"x": methods.HaarReparam()}), (y,), {})
    torch.testing.assert_close(found.real, y)
    assert found.fake.shape == y.shape
    assert not torch.allclose(found.fake, y)


class ToZero(methods.reparam.Reparam):
    """A reparametrisation that keeps no initial value."""

    def apply(self, msg):
        return {"fn": dist.Delta(torch.zeros(())), "value": torch.zeros(()), "is_observed": True}


def test_a_reparametrisation_warns_unless_the_initial_value_is_replaceable():
    @poutine.reparam(config={"x": ToZero()})
    def model():
        return pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.warns(RuntimeWarning, match="does not commute with initialization"):
        InitMessenger(lambda site: torch.ones(()))(model)()
    assert InitMessenger(lambda site: replaceable(torch.ones(())))(model)() == 0
    assert replaceable("no tensor") == "no tensor"
