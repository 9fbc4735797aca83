"""`reloo` on a conjugate regression with an outlier, whose leave-one-out densities are known in closed form."""

from functools import cache

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_genmodels import to_arviz
from pyro_genmodels.infer.compiled.modes import Captured
from pyro_genmodels.posteriors import AmortizedPosterior, FullRank, GuidePosterior, Laplace, NoUTurn, posterior, reloo
from pyro_genmodels.posteriors.approximations import FullRankGaussian
from pyro_genmodels.posteriors.moment_matching import match_moments
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.utils.pareto import smooth_log_weights

X = torch.linspace(-1, 1, 15)[:, None] ** torch.arange(2)
Y = torch.tensor([0.1, -0.2, 0.3, 0.2, 0.0, 0.4, 0.3, 0.1, 0.5, 0.6, 0.2, 0.7, 0.9, 0.6, 5.0])
NOISE, PRIOR = 0.7, 2.0


def regression(x, y):
    weights = pyro.sample("weights", dist.Normal(torch.zeros(2), PRIOR).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weights, NOISE), obs=y)


def moments(x, y):
    """Return the mean and the covariance of the posterior, in float64."""
    x, y = x.double(), y.double()
    covariance = (x.T @ x / NOISE**2 + torch.eye(2).double() / PRIOR**2).inverse()
    return covariance @ x.T @ y / NOISE**2, covariance


def exact():
    """Return the log predictive density of each row given the others, in closed form."""
    found = []
    for i in range(len(Y)):
        others = [j for j in range(len(Y)) if j != i]
        mean, covariance = moments(X[others], Y[others])
        x = X[i].double()
        found.append(torch.distributions.Normal(x @ mean, (x @ covariance @ x + NOISE**2).sqrt()).log_prob(Y[i].double()))
    return torch.stack(found)


def closed_form(width):
    """Return the posterior in closed form, with an error of its width."""
    mean, covariance = moments(X, Y)
    scale_tril = width * torch.linalg.cholesky(covariance).float()
    return GuidePosterior(Problem(regression, (X, Y), progress=False), Laplace(), FullRankGaussian(mean.float(), scale_tril))


def amortised():
    """Return a posterior for any data, trained on simulations."""
    found = AmortizedPosterior(regression, X, Y, observed=["y"])
    found.train(num_simulations=2000, max_epochs=30, progress=False)
    return found


FITS = {
    "NoUTurn": lambda: posterior(regression, X, Y, method=NoUTurn(num_chains=2, mode=Captured()), progress=False),
    "Laplace": lambda: posterior(regression, X, Y, method=Laplace(), progress=False),
    "FullRank": lambda: posterior(regression, X, Y, method=FullRank(num_steps=200, step_size=0.01), progress=False),
    "amortised": lambda: amortised().given(y=Y),
    "too wide": lambda: closed_form(1.4),
}


@cache
def fitted(name):
    pyro.set_rng_seed(1)
    return FITS[name]()


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


@cache
def left_out(name, **options):
    """Return what `reloo` finds for a posterior, with refits by Laplace's approximation, which is exact here."""
    number = {} if name == "NoUTurn" else {"num_samples": 1000}
    return reloo(fitted(name), method=Laplace(), seed=0, progress=False, **number, **options)


@pytest.mark.parametrize("name", [*map(slow, ["NoUTurn", "FullRank", "amortised", "too wide"]), "Laplace"])
@pytest.mark.parametrize("moment_matching", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["refitted", "matched"])
def test_every_kind_of_posterior_has_the_closed_form(name, moment_matching):
    """T29. Within 6 standard errors, and 0.02 nats for the bias of smoothed weights; chains are worth 2/3 of their draws."""
    found = left_out(name, moment_matching=moment_matching)
    error = (found.pointwise - exact()).abs()
    assert (error < 6 * 1.3 * found.mc_error + 0.02).all()
    assert found.mc_error.max() < 0.5
    assert found.matched[-1] == moment_matching
    assert found.refitted[-1] != moment_matching
    few = len(Y) / 2 if name == "amortised" else 4  # weights of an approximation by simulations are less even
    assert (found.refitted | found.matched).sum() < few
    assert found.is_reliable
    chance = 6 * 1.3 * float(found.mc_error.square().sum().sqrt()) + 0.1
    assert found.elpd == pytest.approx(float(exact().sum()), abs=chance)


@pytest.mark.slow
def test_a_refitted_row_that_few_draws_explain_is_told():
    """Thirty predictive standard errors away, where 500 draws of a refit hold none that explains the row."""
    y = torch.cat([Y[:-1], torch.tensor([25.0])])
    fit = posterior(regression, X, y, method=Laplace(num_starts=1), progress=False)
    with pytest.warns(RuntimeWarning, match=r"Few draws of the refits explain \d of \d rows"):
        found = reloo(fit, num_samples=500, seed=0, progress=False)
    mean, covariance = moments(X[:-1], y[:-1])
    x = X[-1].double()
    right = torch.distributions.Normal(x @ mean, (x @ covariance @ x + NOISE**2).sqrt()).log_prob(y[-1].double())
    assert found.pointwise[-1] < right - 1.0
    assert found.mc_error[-1] > 0.5
    assert not found.is_reliable


def test_without_refits_the_outlier_is_wrong_and_told():
    found = left_out("Laplace", max_pareto_k=float("inf"))
    assert not found.refitted.any()
    k = found.pareto_k
    assert k.argmax() == len(Y) - 1
    assert k[-1] > 0.7
    assert abs(found.pointwise - exact()).argmax() == len(Y) - 1


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # az.compare under pandas 3.1
def test_arviz_takes_the_result_and_agrees_without_refits():
    """ArviZ's own estimate from draws of equal weight differs by its smoothing only."""
    fit = fitted("Laplace")
    chains = {"weights": fit.get_samples(1000)["weights"][None]}

    class Drawn:
        model, args, kwargs, stats = staticmethod(regression), (X, Y), {}, {}

        def get_samples(self, group_by_chain=False):
            return chains

    drawn = Drawn()
    kept = {"max_pareto_k": float("inf"), "progress": False}
    data = to_arviz(drawn, groups=("posterior", "log_likelihood"), progress=False)
    with pytest.warns(UserWarning, match="Pareto"):
        theirs = az.loo(data, pointwise=True)
    ours = reloo(drawn, **kept)
    rows = theirs.loo_i if hasattr(theirs, "loo_i") else theirs.elpd_i
    torch.testing.assert_close(ours.pointwise[:-1], torch.as_tensor(rows.values)[:-1], atol=0.02, rtol=0)
    found = left_out("Laplace", moment_matching=False)
    refitted = found.to_arviz()
    total = refitted.elpd_loo if hasattr(refitted, "elpd_loo") else refitted.elpd
    assert total == pytest.approx(found.elpd)
    assert not refitted.warning
    table = az.compare({"refitted": refitted, "plain": ours.to_arviz()})
    assert set(table.index) == {"refitted", "plain"}


@pytest.mark.slow
def test_refits_do_not_depend_on_the_number_of_processes():
    fit = fitted("Laplace")
    options = {"max_pareto_k": 0.3, "seed": 0, "progress": False}
    torch.manual_seed(0)
    first = reloo(fit, **options)
    torch.manual_seed(0)
    second = reloo(fit, n_jobs=2, **options)
    assert first.refitted.sum() > 1
    torch.testing.assert_close(first.pointwise, second.pointwise, rtol=0, atol=0)


def test_wrong_calls_are_refused():
    fit = closed_form(1.0)
    fit.method = None
    with pytest.raises(TypeError, match=r"1 of 15 rows have a k-hat above 0\.\d+ and are to be refitted: give method="):
        reloo(fit, num_samples=500, progress=False)
    with pytest.raises(ValueError, match="the observed site 'z', but found y"):
        reloo(fit, num_samples=100, var_name="z", progress=False)
    with pytest.raises(ValueError, match="num_samples of 100 or more"):
        reloo(fit, num_samples=10)
    with pytest.raises(ValueError, match="these are draws only"):
        reloo({"weights": torch.zeros(1, 100, 2)})

    def two(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(loc, 1.0), obs=y)
        pyro.sample("b", dist.Normal(loc, 1.0), obs=y)

    def guide(y):
        pyro.sample("loc", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="one observed site: give var_name=, but found a, b"):
        reloo((two, guide), torch.tensor(0.0), num_samples=100, progress=False)


# Moment matching.


def normal(mean, covariance):
    return torch.distributions.MultivariateNormal(torch.tensor(mean).double(), torch.tensor(covariance).double())


POSTERIOR = normal([0.0, 0.0], [[1.0, 0.5], [0.5, 1.0]])
TARGETS = {
    "mean": normal([4.0, -3.0], [[1.0, 0.5], [0.5, 1.0]]),
    "variances": normal([2.0, 1.0], [[9.0, 2.0], [2.0, 6.0]]),
    "covariance": normal([2.0, -2.0], [[3.0, -2.0], [-2.0, 3.0]]),
}


@pytest.mark.parametrize("name", TARGETS)
def test_matched_draws_stand_for_the_target(name):
    """Moments of the target within 6 standard errors, each missed with probability 2e-9, and 0.05 for the bias of smoothing."""
    target = TARGETS[name]
    z = POSTERIOR.sample((4000,))
    raw = smooth_log_weights(target.log_prob(z) - POSTERIOR.log_prob(z))[1]
    found = match_moments(z, torch.zeros(4000).double(), POSTERIOR.log_prob, target.log_prob, 0.5)
    assert raw > 0.5 > found.pareto_k
    weights = found.log_weights.softmax(0)
    for function, exact_value in (
        (lambda x: x, target.mean),
        (lambda x: (x - target.mean).square(), target.variance),
        (lambda x: (x - target.mean).prod(1, keepdim=True), target.covariance_matrix[:1, 1]),
    ):
        values = function(found.z)
        mean = weights @ values
        std_error = (weights.square() @ (values - mean).square()).sqrt()
        assert ((mean - exact_value).abs() < 6 * std_error + 0.05).all()
    assert torch.equal(found.z[1::2], z[1::2])  # half of the draws stay


def test_weights_of_draws_count_in_matching():
    """Draws of another distribution with weights stand for the posterior, and matched ones for the target."""
    wide = torch.distributions.MultivariateNormal(POSTERIOR.mean, 2 * POSTERIOR.covariance_matrix)
    z, target = wide.sample((8000,)), TARGETS["mean"]
    found = match_moments(z, POSTERIOR.log_prob(z) - wide.log_prob(z), POSTERIOR.log_prob, target.log_prob, 0.7)
    weights = found.log_weights.softmax(0)
    std_error = (weights.square() @ (found.z - target.mean).square()).sqrt()
    assert ((weights @ found.z - target.mean).abs() < 6 * std_error + 0.05).all()
    covariance = (weights[:, None] * (found.z - target.mean)).T @ (found.z - target.mean)
    torch.testing.assert_close(covariance, target.covariance_matrix, atol=0.25, rtol=0)


def test_a_target_that_no_map_reaches_is_not_matched():
    z = POSTERIOR.sample((500,))
    zeros = torch.zeros(500).double()
    assert match_moments(z, zeros, POSTERIOR.log_prob, TARGETS["mean"].log_prob, -10.0) is None
    nowhere = torch.full_like(zeros, -torch.inf)
    assert match_moments(z, zeros, POSTERIOR.log_prob, lambda x: nowhere, 0.7) is None
    assert match_moments(z, zeros, POSTERIOR.log_prob, lambda x: nowhere * 0, 0.7) is None


@pytest.mark.slow
def test_matched_rows_of_overdispersed_counts_are_those_of_refits():
    """A Poisson regression of counts that vary far more, as those of roaches in the literature, in constrained coordinates too.

    Each row within 6 standard errors of both, and 0.05 nats for the bias of smoothed weights.
    """
    number = 40
    x = torch.randn(number, 2)
    rate = (1.5 + x @ torch.tensor([0.8, -0.5])).exp() * dist.Gamma(0.4, 0.4).sample((number,))
    counts = torch.poisson(rate)

    def model(x, counts):
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), scale).to_event(1))
        offset = pyro.sample("offset", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", number):
            pyro.sample("counts", dist.Poisson((offset + x @ weights).exp()), obs=counts)

    method = NoUTurn(num_chains=2, num_warmup=300, mode=Captured())
    fit = posterior(model, x, counts, method=method, progress=False)
    refitted = reloo(fit, seed=0, progress=False)
    matched = reloo(fit, moment_matching=True, seed=0, progress=False)
    assert refitted.refitted.sum() >= 2
    assert torch.equal(matched.matched, refitted.refitted)
    rows = matched.matched
    error = (matched.pointwise - refitted.pointwise)[rows].abs()
    chance = (matched.mc_error.square() + refitted.mc_error.square()).sqrt()[rows]
    assert (error < 6 * 1.3 * chance + 0.05).all()
