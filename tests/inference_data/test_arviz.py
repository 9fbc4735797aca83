"""Functions of ArviZ 0.23 and 1.x on the result of `to_arviz`: leave-one-out, summaries, pictures and files."""

from math import log, pi

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from readings import ARVIZ_1, affine_flow, draws, groups, mean_guide, mean_model, stat, svi, variables

from pyro_genmodels import Dequantized, to_arviz

only_1 = pytest.mark.skipif(not ARVIZ_1, reason="ArviZ has it since 1.0")


class Regression:
    """y_n ~ N(x_n . b, s^2) with b ~ N(0, t^2 I): posterior, evidence and leave-one-out densities in closed form."""

    def __init__(self, x, y, s=0.5, t=3.0):
        self.x, self.y, self.s, self.t = x, y, s, t
        self.loc, self.cov = self.posterior(torch.ones(len(y), dtype=torch.bool))

    def posterior(self, rows):
        x, y = self.x[rows], self.y[rows]
        cov = (x.T @ x / self.s**2 + torch.eye(x.shape[1]) / self.t**2).inverse()
        return cov @ x.T @ y / self.s**2, cov

    def leave_one_out(self):
        """log p(y_n | all others), of every row."""
        found = []
        for n in range(len(self.y)):
            loc, cov = self.posterior(torch.arange(len(self.y)) != n)
            sd = (self.x[n] @ cov @ self.x[n] + self.s**2).sqrt()
            found.append(dist.Normal(self.x[n] @ loc, sd).log_prob(self.y[n]))
        return torch.stack(found)

    def leave_one_out_deviation(self):
        """The standard deviation over the posterior of r_n = p(y_n | others) / p(y_n | b), whose mean is 1.

        With f = x_n . b ~ N(m, v) it is a Gaussian integral: E exp(u (y - f)^2 / s^2), for u = 1/2 and 1.
        """
        residual, v = self.y - self.x @ self.loc, ((self.x @ self.cov) * self.x).sum(-1)

        def moment(u):  # of p(y_n | b)^(-2u)
            shrunk = 1 - 2 * u * v / self.s**2
            assert (shrunk > 0).all()
            return u * log(2 * pi * self.s**2) - shrunk.log() / 2 + u * residual.square() / (self.s**2 * shrunk)

        return (moment(1.0) - 2 * moment(0.5)).expm1().sqrt()

    def evidence(self):
        cov = self.t**2 * self.x @ self.x.T + self.s**2 * torch.eye(len(self.y))
        return dist.MultivariateNormal(torch.zeros(len(self.y)), cov).log_prob(self.y)

    def model(self, x, y, batch=None):
        b = pyro.sample("b", dist.Normal(torch.zeros(x.shape[1]), self.t).to_event(1))
        with pyro.plate("data", len(y), subsample_size=batch) as rows:
            pyro.sample("y", dist.Normal((x[rows] * b).sum(-1), self.s), obs=y[rows])

    def guide(self, x, y, batch=None):
        pyro.sample("b", dist.MultivariateNormal(self.loc, self.cov))

    def wide_guide(self, x, y, batch=None):
        pyro.sample("b", dist.MultivariateNormal(self.loc, 1.5 * self.cov))


def regression(rows=40):
    x = torch.stack([torch.ones(rows), torch.linspace(-1, 1, rows)], 1)
    return Regression(x, x @ torch.tensor([1.0, -2.0]) + 0.5 * torch.randn(rows))


def pointwise(data):
    """The leave-one-out density of every row, as ArviZ estimates it."""
    found = az.loo(data, pointwise=True)
    return torch.as_tensor(np.asarray(found.elpd_i if ARVIZ_1 else found.loo_i)), found


def elpd(found):
    return float(found.elpd if ARVIZ_1 else found.elpd_loo)


# Statistics.


@pytest.mark.parametrize("batch", [None, 7])
def test_leave_one_out_under_an_exact_guide_is_the_closed_form(batch, float64):
    """The estimate is 1 / mean of 1 / p(y_n | b_s): its log errs by mean(r_n) - 1, of standard error sd(r_n) / sqrt(4000).

    Six standard errors: 2e-9 for each of 40 rows, were the mean exactly normal. It has the skewness of r_n over sqrt(4000),
    below 0.1 (measured: 0.08), which makes its tail heavier by exp(0.1 * 6^3 / 6) = 37; and Pareto smoothing only replaces
    the largest weights by the sizes expected of them. In all 3e-6.
    """
    truth, draws_made = regression(), 4000
    data = to_arviz((truth.model, truth.guide), truth.x, truth.y, batch, num_samples=draws_made, batch_size=1000)
    values, found = pointwise(data)
    error = (values - truth.leave_one_out()).abs()
    assert (error < 6 * truth.leave_one_out_deviation() / draws_made**0.5).all()
    assert elpd(found) == pytest.approx(values.sum().item())
    assert (torch.as_tensor(np.asarray(found.pareto_k)) < 0.7).all()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # one row cannot be left out
def test_a_row_whose_density_spreads_by_thousands_of_nats():
    """The same draws in double precision are the truth. A sum of exponentials in single precision is 0, and its log NaN."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([0.0, 1.0, 2.0, 300.0])
    data = to_arviz((model, lambda y: pyro.sample("mu", dist.Normal(1.0, 0.7))), y, num_samples=1000)
    for group in ("log_likelihood", "log_prior", "sample_stats"):
        assert {data[group][name].dtype for name in variables(data, group)} == {np.dtype("float64")}
    exact = to_arviz({"mu": draws(data, "mu")[None].double()}, y.double(), model=model)
    assert elpd(az.loo(data)) == pytest.approx(elpd(az.loo(exact)), abs=0.01)
    assert elpd(az.loo(data)) == pytest.approx(-45192, rel=0.02)


@pytest.mark.parametrize("batch", [None, 7])
def test_every_weight_under_an_exact_guide_is_the_evidence(batch, float64):
    truth = regression()
    data = to_arviz((truth.model, truth.guide), truth.x, truth.y, batch, num_samples=20)
    torch.testing.assert_close(stat(data, "log_weight"), truth.evidence().expand(20))


def test_weights_correct_a_wide_guide(float64):
    """Self-normalised weights w = p / q, of a guide half again as wide: the mean under them is the posterior's.

    The error of coordinate i is the mean of w (b_i - m_i) over E w, of standard error sqrt(E w^2 (b_i - m_i)^2 / S), a
    Gaussian integral: in two dimensions w = c exp(-u |z|^2 / 2) with c = 1.5 and u = 1 / 3 for z of the posterior's scale.
    Six standard errors, twice: 4e-9, as the weights are bounded.
    """
    truth, n = regression(), 4000
    data = to_arviz((truth.model, truth.wide_guide), truth.x, truth.y, num_samples=n, batch_size=1000)
    weights = stat(data, "log_weight").softmax(0)
    error = (weights[:, None] * (draws(data, "b") - truth.loc)).sum(0)
    # E_q w^2 z^2 = E_p w z^2 with w = 1.5 exp(-|z|^2 / 6): precision 4 / 3, so 1.5 (3 / 4) (3 / 4)
    variance = 1.5 * 0.75**2 * truth.cov.diagonal()
    assert (error.abs() < 6 * (variance / n).sqrt()).all()


@only_1
def test_leave_one_out_of_an_approximate_posterior(float64):
    """ArviZ takes log_p and log_q as they are; of an exact guide they say nothing new, and a wide one they correct."""
    truth, n = regression(), 4000
    exact = to_arviz((truth.model, truth.guide), truth.x, truth.y, num_samples=n, batch_size=1000)
    wide = to_arviz((truth.model, truth.wide_guide), truth.x, truth.y, num_samples=n, batch_size=1000)

    def approximate(data):
        stats = data["sample_stats"]
        found = az.loo_approximate_posterior(data, log_p=stats["log_p"], log_q=stats["log_q"], pointwise=True)
        return torch.as_tensor(np.asarray(found.elpd_i))

    # the same smoothing of the same weights, up to how many draws it counts as independent
    torch.testing.assert_close(approximate(exact), pointwise(exact)[0], rtol=0, atol=1e-3)
    # weights p / q are at most 1.5, so the squared error is at most 1.5 times that of an exact guide: 8 of its errors
    error = (approximate(wide) - truth.leave_one_out()).abs()
    assert (error < 8 * truth.leave_one_out_deviation() / n**0.5).all()


@only_1
def test_power_scaling_tells_a_strong_prior_from_a_weak_one():
    def shifts(prior_scale):
        base = regression()
        truth = Regression(base.x, base.y, t=prior_scale)
        data = to_arviz((truth.model, truth.guide), truth.x, truth.y, num_samples=2000, batch_size=1000)
        by_prior, by_likelihood = az.psense(data), az.psense(data, group="likelihood")
        return by_prior["b"].to_numpy(), by_likelihood["b"].to_numpy()

    weak, by_likelihood = shifts(10.0)
    strong, _ = shifts(0.2)
    # the measure's own threshold is 0.05; here it comes out below 0.001 and at 0.6
    assert (weak < 0.05).all()
    assert strong.max() > 0.05
    assert by_likelihood.max() > 0.05


@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame:DeprecationWarning")  # ArviZ 0.23 on pandas 3.1
def test_compare_prefers_the_model_that_made_the_data(float64):
    """A line and a constant, whose true leave-one-out densities differ by 98 nats.

    Even if all rows erred alike, the standard error of a sum were below 40 * 0.3 / sqrt(1000) = 0.4 nats: 5 is ten of them.
    """
    line = regression()
    constant = Regression(line.x[:, :1], line.y)
    fits = {
        name: to_arviz((truth.model, truth.guide), truth.x, truth.y, num_samples=1000)
        for name, truth in (("line", line), ("constant", constant))
    }
    table = az.compare(fits)
    assert list(table.index) == ["line", "constant"]
    column = table["elpd" if ARVIZ_1 else "elpd_loo"]
    truth = (line.leave_one_out() - constant.leave_one_out()).sum().item()
    assert float(column.iloc[0]) - float(column.iloc[1]) == pytest.approx(truth, abs=5)
    az.plot_compare(table)
    assert plt.get_fignums()
    plt.close("all")


def local(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mu + b.sum(-1), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def test_a_summary_holds_means_and_names():
    y = torch.randn(6)
    data = to_arviz(svi(local, AutoNormal(local), y, steps=2), y, num_samples=50, dims={"b": ["side"]})
    summary = az.summary(data, kind="stats", round_to="none")
    mu = draws(data, "mu").double()
    assert summary.loc["mu", "mean"] == pytest.approx(mu.mean().item(), abs=1e-5)
    assert summary.loc["mu", "sd"] == pytest.approx(mu.std().item(), rel=1e-4)
    assert {"mu", "b[0]", "b[1]", "z[0]", "z[5]"} <= set(summary.index)
    assert len(summary) == 1 + 2 + 6


def test_chains_can_be_judged():
    """Restarts of one fit: ArviZ finds their chains alike."""
    truth = regression()

    def fit():
        return truth.model, lambda *args: truth.guide(*args)

    data = to_arviz([fit(), fit()], truth.x, truth.y, num_samples=500)
    r_hat = az.rhat(data)["b"].to_numpy()
    assert r_hat.shape == (2,)
    assert (r_hat < 1.05).all()


@pytest.mark.skipif(ARVIZ_1, reason="ArviZ 1.x smooths inside its own functions")
def test_its_weights_can_be_smoothed(float64):
    truth = regression()
    data = to_arviz((truth.model, truth.wide_guide), truth.x, truth.y, num_samples=200)
    smoothed, k = az.psislw(stat(data, "log_weight").numpy())
    assert np.isfinite(smoothed).all()
    assert k < 0.7


# Pictures.

PICTURES = {
    False: ["plot_trace", "plot_posterior", "plot_forest", "plot_ppc", "plot_density", "plot_loo_pit"],
    True: ["plot_trace_dist", "plot_dist", "plot_forest", "plot_ppc_dist", "plot_prior_posterior", "plot_loo_pit"],
}


@pytest.fixture(scope="module")
def fitted():
    pyro.set_rng_seed(0)
    truth = regression(rows=12)
    return to_arviz((truth.model, truth.guide), truth.x, truth.y, num_samples=60)


@pytest.mark.parametrize("name", PICTURES[ARVIZ_1])
@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping:DeprecationWarning")  # ArviZ 0.23, matplotlib 3.11
def test_it_can_be_drawn(name, fitted):
    options = {"y": "y"} if name == "plot_loo_pit" and not ARVIZ_1 else {}
    getattr(az, name)(fitted, **options)
    assert plt.get_fignums()
    plt.close("all")


# Files.


def labelled():
    """Plates and labelled events."""
    y = torch.randn(3, 4, 2)

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.deterministic("exp_mu", mu.exp())
        with pyro.plate("groups", 3, dim=-2):
            k = pyro.sample("k", dist.Poisson(3.0))
            with pyro.plate("rows", 4, dim=-1):
                pyro.sample("y", dist.Normal((mu + k)[..., None], torch.ones(2)).to_event(1), obs=y)

    def guide(x, y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("k", dist.Poisson(2.0))

    names = {"y": ["side"]}
    labels = {"side": ["left", "right"], "groups": ["a", "b", "c"], "draw": range(10, 15)}
    return to_arviz((model, guide), torch.randn(4), y, num_samples=5, dims=names, coords=labels)


def marked():
    """A Markov chain with its divergences."""
    y = torch.randn(4)
    mcmc = MCMC(NUTS(mean_model), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(y)
    return to_arviz(mcmc, y)


def bounded():
    """A lower bound, of integers."""
    flow, x = affine_flow((2,), context=1), torch.randint(0, 8, (4, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", Dequantized(flow(z[..., None]), levels=8), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    return to_arviz((model, guide), x, num_samples=5)


def chained():
    """Chains of a subsampled plate."""
    y = torch.randn(5)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])

    return to_arviz([(model, mean_guide), (model, lambda y: mean_guide(y))], y, num_samples=5)


@pytest.mark.parametrize("make", [labelled, marked, bounded, chained])
def test_it_survives_a_file(make, tmp_path):
    data, path = make(), str(tmp_path / "fit.nc")
    data.to_netcdf(path, engine="h5netcdf")
    again = az.from_netcdf(path, engine="h5netcdf")
    assert groups(again) == groups(data)
    for group in groups(data):
        assert variables(again, group) == variables(data, group)
        assert set(again[group].coords) == set(data[group].coords)
        for name in (*variables(data, group), *data[group].coords):
            before, after = data[group][name], again[group][name]
            np.testing.assert_array_equal(after, before)
            assert after.dims == before.dims
            assert after.dtype.kind.replace("O", "U") == before.dtype.kind.replace("O", "U").replace("T", "U")
        for name in variables(data, group):
            assert again[group][name].attrs.get("kind") == data[group][name].attrs.get("kind")
        assert again[group].attrs["inference_library"] == "pyro-ppl"
    again.close()


def test_each_group_says_where_it_comes_from():
    data = to_arviz((mean_model, mean_guide), torch.randn(4), num_samples=3)
    for group in groups(data):
        attrs = data[group].attrs
        assert attrs["inference_library"] == "pyro-ppl"
        assert attrs["inference_library_version"] == pyro.__version__
        assert attrs["creation_library"] == "pyro_genmodels"
        assert attrs["created_at"]


def test_it_is_what_this_arviz_calls_its_data():
    data = to_arviz((mean_model, mean_guide), torch.randn(4), num_samples=3)
    assert type(data).__name__ == ("DataTree" if ARVIZ_1 else "InferenceData")
