"""The groups of `to_arviz`, each against the same recomputed by hand; and what cannot be computed is said, once."""

import warnings

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from readings import (
    affine_flow,
    check_weights,
    close,
    draws,
    groups,
    mean_guide,
    mean_log_p,
    mean_log_q,
    mean_model,
    normal,
    small_vae,
    stat,
    svi,
    variables,
)
from torch.distributions import constraints

from pyro_genmodels import VAE, Autoregressive, CategoricalLikelihood, Dequantized, Flow, to_arviz
from pyro_genmodels.inference_data.groups import GROUPS


@pytest.fixture
def y():
    return 1 + torch.randn(6)


def warned(call):
    """Return the texts of the warnings of a call, and its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = call()
    return [str(w.message) for w in caught if issubclass(w.category, UserWarning)], data


# Log-likelihood and log-prior.


def test_the_log_likelihood_of_rows_of_vectors_in_nested_plates():
    y, scale = torch.randn(3, 4, 2), torch.tensor([0.5, 2.0])

    def model(y):
        with pyro.plate("groups", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("rows", 4, dim=-1):
                pyro.sample("y", dist.Normal(a, scale).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("groups", 3, dim=-2):
            pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    data = to_arviz((model, guide), y, num_samples=5, batch_size=3)
    a = draws(data, "a")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "groups", "rows")
    assert data["log_prior"]["a"].dims == ("chain", "draw", "groups")
    close(draws(data, "y", "log_likelihood"), normal(a[:, :, None], scale, y).sum(-1))
    close(draws(data, "a", "log_prior"), normal(0.0, 1.0, a).sum(-1))


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
def test_masks_count_and_scales_do_not(outside, y):
    mask = torch.tensor([True, False, True, True, False, True])

    def handled(fn):
        return poutine.scale(fn, scale=3.0)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask), poutine.scale(scale=1.0 if outside else 3.0):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    pair = (handled(model), handled(mean_guide)) if outside else (model, mean_guide)
    data = to_arviz(pair, y, num_samples=5)
    mu = draws(data, "mu")
    assert (draws(data, "y", "log_likelihood")[:, ~mask] == 0).all()
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y) * mask)
    close(draws(data, "mu", "log_prior"), normal(0.0, 3.0, mu))
    over = 3 if outside else 1
    log_p = over * normal(0.0, 3.0, mu) + 3 * normal(mu[:, None], 2.0, y[mask]).sum(-1)
    check_weights(data, log_p, over * mean_log_q(mu))


def test_a_masked_distribution(y):
    mask = y > 1

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0).mask(mask), obs=y)

    data = to_arviz((model, mean_guide), y, num_samples=5)
    mu = draws(data, "mu")
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y) * mask)
    check_weights(data, normal(0.0, 3.0, mu) + normal(mu[:, None], 2.0, y[mask]).sum(-1), mean_log_q(mu))


def test_rows_that_are_missing(y):
    """Masked rows may hold nan; these are data all the same, and no constants."""
    y = torch.where(torch.arange(6) == 2, torch.nan, y)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=~y.isnan()):
            pyro.sample("y", dist.Normal(mu, 2.0, validate_args=False), obs=y)

    data = to_arviz((model, mean_guide), y, num_samples=5)
    mu, seen = draws(data, "mu"), ~y.isnan()
    close(draws(data, "y", "log_likelihood"), (normal(mu[:, None], 2.0, y.nan_to_num()) * seen))
    check_weights(data, normal(0.0, 3.0, mu) + normal(mu[:, None], 2.0, y[seen]).sum(-1), mean_log_q(mu))
    np.testing.assert_array_equal(data["observed_data"]["y"], y)
    assert "constant_data" not in groups(data)


def test_rows_that_pyro_imputes(y):
    mask = torch.tensor([True, False, True, True, False, True])

    def model(y, mask):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y, obs_mask=mask)

    data = to_arviz(svi(model, AutoNormal(model), y, mask), y, mask, num_samples=5)
    mu, imputed, whole = draws(data, "mu"), draws(data, "y_unobserved"), draws(data, "y")
    close(draws(data, "y_observed", "log_likelihood"), normal(mu[:, None], 2.0, y) * mask)
    close(draws(data, "y_unobserved", "log_prior"), normal(mu[:, None], 2.0, imputed) * ~mask)
    close(whole, torch.where(mask, y, imputed))


def test_two_observed_sites_of_their_own_plates():
    x, y = torch.randn(4), torch.randint(2, (7,)).float()

    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("first", 4):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        with pyro.plate("second", 7):
            pyro.sample("y", dist.Bernoulli(logits=mu), obs=y)

    data = to_arviz((model, lambda x, y: mean_guide(y)), x, y, num_samples=5)
    mu = draws(data, "mu")[:, None]
    assert variables(data, "log_likelihood") == variables(data, "posterior_predictive") == {"x", "y"}
    close(draws(data, "x", "log_likelihood"), normal(mu, 1.0, x))
    close(draws(data, "y", "log_likelihood"), dist.Bernoulli(logits=mu).log_prob(y))
    assert data["log_likelihood"]["x"].dims == ("chain", "draw", "first")
    assert data["log_likelihood"]["y"].dims == ("chain", "draw", "second")


def test_an_observation_without_rows():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    data = to_arviz((model, mean_guide), torch.tensor(1.0), num_samples=5)
    assert data["log_likelihood"]["y"].dims == ("chain", "draw")
    assert data["observed_data"]["y"].dims == ()
    close(draws(data, "y", "log_likelihood"), normal(draws(data, "mu"), 2.0, torch.tensor(1.0)))


def test_factors_and_deterministic_sites_are_neither_data_nor_prior(y):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        pyro.deterministic("exp_mu", mu.exp())
        pyro.factor("bonus", -mu.square())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)
            pyro.deterministic("residual", y - mu)

    data = to_arviz((model, mean_guide), y, num_samples=5)
    mu = draws(data, "mu")
    assert variables(data, "posterior") == variables(data, "prior") == {"mu", "exp_mu", "residual"}
    assert variables(data, "log_prior") == {"mu"}
    for group in ("log_likelihood", "posterior_predictive", "prior_predictive", "observed_data"):
        assert variables(data, group) == {"y"}
    close(draws(data, "residual"), y - mu[:, None])
    close(draws(data, "exp_mu", "prior"), draws(data, "mu", "prior").exp())
    check_weights(data, mean_log_p(mu, y) - mu.square(), mean_log_q(mu))


def test_a_model_without_latents_has_no_log_likelihood():
    """Its parameters have seen the data."""
    data = to_arviz(affine_flow(), torch.randn(5, 2), num_samples=3)
    assert groups(data) == {"posterior_predictive", "observed_data"}


# The prior.


def test_the_laws_of_prior_and_prior_predictive(y):
    """Neither the guide nor the data count: N(0, 9) and N(0, 9 + 4)."""
    n = 4000
    data = to_arviz((mean_model, mean_guide), 50 + y, num_samples=n, batch_size=1000)
    for values, variance in ((draws(data, "mu", "prior"), 9), (draws(data, "y", "prior_predictive")[:, 3], 13)):
        # 5 standard errors of mean and of variance, two tails, four times: 2e-6 in all
        assert abs(values.mean()) < 5 * (variance / n) ** 0.5
        assert abs(values.var() / variance - 1) < 5 * (2 / n) ** 0.5
    replicates = draws(data, "y", "prior_predictive") - draws(data, "mu", "prior")[:, None]
    assert abs(replicates.var() / 4 - 1) < 5 * (2 / (6 * n)) ** 0.5  # they belong to the mu of their draw


def test_the_prior_of_a_vae_is_that_of_its_rows():
    data = to_arviz(small_vae(), torch.randn(5, 3), num_samples=4)
    assert data["prior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert data["prior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0")


@pytest.mark.parametrize("parallel", [None, False])
def test_an_improper_prior_is_reported(parallel, y):
    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 2.0), obs=y)

    def call():
        return to_arviz((model, mean_guide), y, num_samples=5, parallel=parallel)

    said, data = warned(call)
    assert len(said) == 1
    assert "prior" in said[0]
    assert groups(data) == set(GROUPS) - {"prior", "prior_predictive", "constant_data"}
    mu = draws(data, "mu")
    check_weights(data, normal(mu[:, None], 2.0, y).sum(-1), mean_log_q(mu))


# Constants.


def regression(x, y, *more, offset=0.0, **others):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu * x[:, 0] + offset, 2.0), obs=torch.as_tensor(y))


def regression_guide(x, y, *more, offset=0.0, **others):
    mean_guide(y)


def test_constants_by_their_names(y):
    x, offset, more, other = torch.randn(6, 2), torch.tensor(0.5), torch.randn(3), torch.randn(6)
    data = to_arviz(
        (regression, regression_guide), x, y, more, "a word", offset=offset, weight=other, flag=True,
        num_samples=3, dims={"x": ["side"]}, coords={"side": ["left", "right"], "data": list("abcdef")},
    )  # fmt: skip
    constants = data["constant_data"]
    assert {n: constants[n].dims for n in constants.data_vars} == {
        "x": ("data", "side"),
        "offset": (),
        "more_0": ("more_0_dim_0",),
        "weight": ("data",),
    }
    for name, value in (("x", x), ("offset", offset), ("more_0", more), ("weight", other)):
        np.testing.assert_array_equal(constants[name], value)
    np.testing.assert_array_equal(constants["x"].sel(side="right", data="c"), x[2, 1])


def test_the_data_are_no_constants_whatever_holds_them(y):
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    for data in (
        to_arviz((regression, regression_guide), torch.as_tensor(x), y.numpy(), num_samples=3),
        to_arviz((regression, regression_guide), y=y, x=torch.as_tensor(x), num_samples=3),
    ):
        assert variables(data, "constant_data") == {"x"}
        assert variables(data, "observed_data") == {"y"}


def test_numpy_arrays_are_constants(y):
    def model(x, y):
        mean_model(y + 0 * torch.as_tensor(x))

    x = np.arange(6.0)
    data = to_arviz((model, lambda x, y: mean_guide(y)), x, y, num_samples=3)
    np.testing.assert_array_equal(data["constant_data"]["x"], x)
    assert data["constant_data"]["x"].dims == ("data",)


def test_rows_are_named_where_one_plate_is_as_long():
    def model(x, v, w, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", 3, dim=-2), pyro.plate("rows", 4, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    args = torch.randn(4, 2), torch.randn(3), torch.randn(5), torch.randn(3, 4)
    constants = to_arviz((model, lambda *args: mean_guide(None)), *args, num_samples=3)["constant_data"]
    assert {n: constants[n].dims for n in constants.data_vars} == {
        "x": ("rows", "x_dim_0"),
        "v": ("groups",),
        "w": ("w_dim_0",),
    }


def test_rows_of_two_plates_as_long_as_each_other_are_not_guessed():
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("groups", 4, dim=-2), pyro.plate("rows", 4, dim=-1):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    data = to_arviz((model, lambda *args: mean_guide(None)), torch.randn(4), torch.randn(4, 4), num_samples=3)
    assert data["constant_data"]["x"].dims == ("x_dim_0",)


def test_constants_of_a_subsampled_plate_have_all_rows(y):
    def model(x, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y), subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(mu * x[rows], 2.0), obs=y[rows])

    x = torch.randn(6)
    data = to_arviz((model, lambda x, y: mean_guide(y)), x, y, num_samples=3)
    assert variables(data, "constant_data") == {"x"}
    assert data["constant_data"]["x"].dims == ("data",)


def test_a_constant_may_have_the_name_of_its_plate(y):
    """A plate over time, say, and the times."""

    def model(time, y):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("time", len(y)):
            pyro.sample("y", dist.Normal(mu * time, 2.0), obs=y)

    time = torch.linspace(0, 1, 6)
    data = to_arviz((model, lambda time, y: mean_guide(y)), time, y, num_samples=3)
    np.testing.assert_array_equal(data["constant_data"]["time"], time)


@pytest.mark.parametrize("wrap", [lambda m: poutine.scale(m, scale=1.0), lambda m: poutine.block(m, hide=["nothing"])])
def test_constants_of_a_model_under_handlers(wrap, y):
    x = torch.randn(6, 2)
    data = to_arviz((wrap(regression), regression_guide), x, y, num_samples=3)
    assert variables(data, "constant_data") == {"x"}


def test_constants_of_a_module(y):
    class Module(pyro.nn.PyroModule):
        def forward(self, x, y):
            regression(x, y)

    data = to_arviz((Module(), regression_guide), torch.randn(6, 2), y, num_samples=3)
    assert variables(data, "constant_data") == {"x"}


def test_the_context_of_a_family_is_constant():
    flow, x, c = affine_flow(context=2), torch.randn(5, 2), torch.randn(5, 2)
    data = to_arviz(flow, x, c, num_samples=3)
    np.testing.assert_array_equal(data["constant_data"]["context"], c)
    assert data["constant_data"]["context"].dims == ("data", "context_dim_0")


# Which groups.


@pytest.mark.parametrize("group", GROUPS)
def test_one_group_alone(group, y):
    x = torch.randn(6, 2)
    alone = to_arviz((regression, regression_guide), x, y, num_samples=3, groups=[group])
    assert groups(alone) == {group}
    whole = to_arviz((regression, regression_guide), x, y, num_samples=3)
    assert variables(alone, group) == variables(whole, group)
    if group == "constant_data":
        assert variables(alone, group) == {"x"}


def test_groups_that_are_wanted_belong_together(y):
    data = to_arviz(
        (mean_model, mean_guide), y, num_samples=9, batch_size=4, groups=("posterior", "log_likelihood", "log_prior")
    )
    assert groups(data) == {"posterior", "log_likelihood", "log_prior"}
    mu = draws(data, "mu")
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y))
    close(draws(data, "mu", "log_prior"), normal(0.0, 3.0, mu))
    data = to_arviz((mean_model, mean_guide), y, num_samples=9, batch_size=4, groups={"posterior", "sample_stats"})
    mu = draws(data, "mu")
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))


def test_what_is_not_wanted_is_not_reported(y):
    """A VAE as likelihood has no density; who wants its draws alone need not hear of it."""
    vae, x = small_vae(context=2), torch.randn(4, 3)
    data = to_arviz((of_family(vae), row_guide), x, num_samples=3, groups=["posterior", "posterior_predictive"])
    assert groups(data) == {"posterior", "posterior_predictive"}


@pytest.mark.parametrize("wanted", [["posteriors"], ["posterior", "warmup"]])
def test_unknown_groups_are_refused(wanted, y):
    with pytest.raises(ValueError, match=r"Unknown groups.*posterior_predictive"):
        to_arviz((mean_model, mean_guide), y, groups=wanted)


# Densities that are not exact, or none.


def row_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def of_family(family):
    """A model whose likelihood is a family, given a latent variable of each row."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", family(z), obs=x)

    return model


def test_an_exact_density_needs_no_remark():
    flow, x = affine_flow((2,), context=2, standardize=False).eval(), torch.randn(4, 2)
    data = to_arviz((of_family(flow), row_guide), x, num_samples=3)
    assert data["log_likelihood"]["x"].attrs == {}
    with torch.no_grad():
        close(draws(data, "x", "log_likelihood"), flow(draws(data, "z")).log_prob(x), tolerance=1e-3)


def test_a_lower_bound_is_called_one():
    flow, x = affine_flow((2,), context=2, standardize=False).eval(), torch.randint(0, 8, (4, 2))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", Dequantized(flow(z), levels=8), obs=x)

    data = to_arviz((model, row_guide), x, num_samples=3)
    assert data["log_likelihood"]["x"].attrs == {"kind": "lower bound"}
    assert data["log_prior"]["z"].attrs == {}


def test_a_family_of_levels_is_a_lower_bound_too():
    flow, x = Flow((2,), levels=8, context=2), torch.randint(0, 8, (4, 2))
    assert to_arviz((of_family(flow), row_guide), x, num_samples=3)["log_likelihood"]["x"].attrs == {"kind": "lower bound"}


def test_a_likelihood_without_density_is_reported_by_name():
    vae, x = small_vae(context=2), torch.randn(4, 3)
    said, data = warned(lambda: to_arviz((of_family(vae), row_guide), x, num_samples=3))
    assert len(said) == 1
    for what in ("log_likelihood['x']", "sample_stats.log_p['x']", "no density"):
        assert said[0].count(what) >= 1, said[0]
    assert "log_likelihood" not in groups(data)
    assert variables(data, "sample_stats") == {"log_q"}
    assert variables(data, "log_prior") == {"z"}
    assert draws(data, "x", "posterior_predictive").shape == (3, 4, 3)


def test_a_prior_without_density_is_reported_by_name(y):
    vae = small_vae((2,))

    def model(y):
        b = pyro.sample("b", vae())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 2.0), obs=y)

    def guide(y):
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    said, data = warned(lambda: to_arviz((model, guide), y, num_samples=3))
    assert len(said) == 1
    assert "log_prior['b']" in said[0]
    assert "sample_stats.log_p['b']" in said[0]
    assert "log_likelihood" not in said[0]
    close(draws(data, "y", "log_likelihood"), normal(draws(data, "b").sum(-1, keepdim=True), 2.0, y))
    assert draws(data, "b", "prior").shape == (3, 2)


def test_a_guide_without_density_is_reported_by_name(y):
    vae = small_vae((2,))

    def model(y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 2.0), obs=y)

    def guide(y):
        pyro.sample("b", vae())

    said, data = warned(lambda: to_arviz((model, guide), y, num_samples=3))
    assert len(said) == 1
    assert "sample_stats.log_q['b']" in said[0]
    assert variables(data, "sample_stats") == {"log_p"}
    b = draws(data, "b")
    close(stat(data, "log_p"), normal(0.0, 1.0, b).sum(-1) + normal(b.sum(-1, keepdim=True), 2.0, y).sum(-1))


def test_everything_left_out_is_said_once():
    """However many blocks of draws and rows there are, and however many fits."""
    vae, x = small_vae(context=2).requires_grad_(False).eval(), torch.randn(7, 3)

    def model(x):
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(2), scale[..., None]).to_event(1))
            pyro.sample("x", vae(z), obs=x[rows])

    def guide(x):
        pyro.sample("scale", dist.LogNormal(0.0, 0.1))
        with pyro.plate("data", len(x), subsample_size=3):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    for fit in ((model, guide), [(model, guide), (model, lambda x: guide(x))]):
        said, _ = warned(lambda fit=fit: to_arviz(fit, x, num_samples=6, batch_size=2))
        assert len(said) == 1
        assert said[0].startswith("to_arviz leaves out: ")
        for what in ("log_likelihood['x']", "sample_stats.log_p['x']", "prior ("):
            assert said[0].count(what) == 1, said[0]


# Discrete latent variables that inference sums out.


@pytest.fixture
def x():
    return torch.cat([torch.randn(8) - 2, torch.randn(7) + 2])


def mixture(x, batch=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("components", 3):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.plate("data", len(x), subsample_size=batch) as rows:
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(Vindex(loc)[..., k], 1.0), obs=x[rows])


def mixture_log_likelihood(data, x):
    weights, loc = draws(data, "weights")[:, None], draws(data, "loc")[:, None]
    return (weights.log() + normal(loc, 1.0, x[:, None])).logsumexp(-1)


def mixture_log_p(data, x):
    weights, loc = draws(data, "weights"), draws(data, "loc")
    log_prior = dist.Dirichlet(torch.ones(3)).log_prob(weights) + normal(0.0, 5.0, loc).sum(-1)
    return log_prior + mixture_log_likelihood(data, x).sum(-1)


def check_mixture(data, said, x):
    assert len(said) == 1
    assert "posterior['k'] (inference has summed it out" in said[0]
    assert variables(data, "posterior") == variables(data, "log_prior") == {"weights", "loc"}
    close(draws(data, "x", "log_likelihood"), mixture_log_likelihood(data, x), tolerance=1e-3)
    close(stat(data, "log_p"), mixture_log_p(data, x), tolerance=1e-3)
    # each replicate is of one of the components: 6 standard deviations
    distance = (draws(data, "x", "posterior_predictive")[..., None] - draws(data, "loc")[:, None]).abs()
    assert (distance.min(-1).values < 6).all()
    assert variables(data, "prior") == {"weights", "loc", "k"}


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("parallel", [None, False])
def test_a_mixture_fitted_by_svi(batch, parallel, x):
    guide = AutoNormal(poutine.block(mixture, hide=["k"]), init_loc_fn=pyro.infer.autoguide.init_to_sample)
    fit = svi(mixture, guide, x, batch, steps=3, loss=TraceEnum_ELBO(max_plate_nesting=1))
    said, data = warned(lambda: to_arviz(fit, x, batch, num_samples=7, batch_size=3, parallel=parallel))
    check_mixture(data, said, x)
    weights, loc = draws(data, "weights"), draws(data, "loc")
    with torch.no_grad():
        unconstrained = dist.transforms.StickBreakingTransform().inv(weights)
        log_q = normal(guide.locs.loc, guide.scales.loc, loc).sum(-1)
        log_q = log_q + normal(guide.locs.weights, guide.scales.weights, unconstrained).sum(-1)
        log_q = log_q - dist.transforms.StickBreakingTransform().log_abs_det_jacobian(unconstrained, weights)
    check_weights(data, mixture_log_p(data, x), log_q, tolerance=1e-3)


def test_a_mixture_sampled_by_nuts(x):
    mcmc = MCMC(NUTS(mixture, max_plate_nesting=1), num_samples=4, warmup_steps=2, disable_progbar=True)
    mcmc.run(x)
    said, data = warned(lambda: to_arviz(mcmc, x, batch_size=3))
    check_mixture(data, said, x)


def test_a_mixture_of_a_point_mass(x):
    guide = AutoDelta(poutine.block(mixture, hide=["k"]))
    fit = svi(mixture, guide, x, loss=TraceEnum_ELBO(max_plate_nesting=1))
    said, data = warned(lambda: to_arviz(fit, x, num_samples=3))
    check_mixture(data, said, x)


def test_a_mixture_whose_rows_are_masked_and_vectors():
    mask = torch.tensor([True, False, True, True])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2, 3), 5.0).to_event(2))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Normal(Vindex(loc)[..., k, :], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("loc", dist.Normal(torch.zeros(2, 3), 2.0).to_event(2))

    x = torch.randn(4, 3)
    _, data = warned(lambda: to_arviz((model, guide), x, num_samples=5))
    loc = draws(data, "loc")
    log_p = torch.tensor([0.3, 0.7]).log() + normal(loc[:, None], 1.0, x[:, None]).sum(-1)
    close(draws(data, "x", "log_likelihood"), log_p.logsumexp(-1) * mask, tolerance=1e-3)
    log_prior = normal(0.0, 5.0, loc).sum((-1, -2))
    log_q = normal(0.0, 2.0, loc).sum((-1, -2))
    check_weights(data, log_prior + (log_p.logsumexp(-1) * mask).sum(-1), log_q, tolerance=1e-3)


@pytest.mark.parametrize("batch", [None, 4])
def test_two_discrete_variables_of_each_row(batch, x):
    table = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.7, 0.3]])

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x), subsample_size=batch) as rows:
            j = pyro.sample("j", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer={"enumerate": "parallel"})
            k = pyro.sample("k", dist.Bernoulli(Vindex(table)[j, 1]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu + j + 5 * k, 1.0), obs=x[rows])

    said, data = warned(lambda: to_arviz((model, lambda x: mean_guide(x)), x, num_samples=5, batch_size=3))
    assert "posterior['j']" in said[0]
    assert "posterior['k']" in said[0]
    mu = draws(data, "mu")
    j, k = torch.arange(3)[:, None], torch.arange(2)
    log_joint = (
        torch.tensor([0.2, 0.3, 0.5]).log()[:, None]
        + table.log()
        + normal(mu[:, None, None, None] + j + 5 * k, 1.0, x[:, None, None])
    )
    log_likelihood = log_joint.logsumexp((-1, -2))
    close(draws(data, "x", "log_likelihood"), log_likelihood)
    check_weights(data, normal(0.0, 3.0, mu) + log_likelihood.sum(-1), mean_log_q(mu))


def test_a_scaled_mixture_has_an_unscaled_log_likelihood(x):
    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(x)), poutine.scale(scale=2.0):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu + 3 * k, 1.0), obs=x)

    _, data = warned(lambda: to_arviz((model, mean_guide), x, num_samples=5))
    mu = draws(data, "mu")
    log_joint = torch.tensor([0.3, 0.7]).log() + normal(mu[:, None, None] + 3 * torch.arange(2), 1.0, x[:, None])
    close(draws(data, "x", "log_likelihood"), log_joint.logsumexp(-1))
    check_weights(data, normal(0.0, 3.0, mu) + 2 * log_joint.logsumexp(-1).sum(-1), mean_log_q(mu))


def test_a_discrete_variable_of_all_rows_is_reported(x):
    """The rows are not independent without it."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu + k, 1.0), obs=x)

    said, data = warned(lambda: to_arviz((model, mean_guide), x, num_samples=3))
    assert len(said) == 1
    assert said[0].count("'k' cannot be summed out row by row") >= 1
    assert "log_likelihood" not in groups(data)
    assert "log_likelihood" in said[0]
    assert "log_p" in said[0]
    assert not {"log_p", "log_weight"} & (variables(data, "sample_stats") if "sample_stats" in groups(data) else set())
    assert variables(data, "posterior") == {"mu"}


def test_a_discrete_variable_that_the_guide_draws_is_a_latent_like_others(x):
    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(3.0 * k, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.8])))

    data = to_arviz((model, guide), x, num_samples=5)
    k = draws(data, "k")
    log_q = torch.tensor([0.2, 0.8]).log()[k].sum(-1)
    check_weights(data, (np.log(0.5) + normal(3.0 * k, 1.0, x)).sum(-1), log_q)


def test_a_discrete_likelihood():
    x = torch.randint(0, 5, (4, 2))
    family = Autoregressive((2,), hidden=(8,), likelihood=CategoricalLikelihood(5), context=2)
    data = to_arviz((of_family(family), row_guide), x, num_samples=3)
    assert data["posterior_predictive"]["x"].dtype.kind == data["observed_data"]["x"].dtype.kind
    with torch.no_grad():
        close(draws(data, "x", "log_likelihood"), family.eval()(draws(data, "z")).log_prob(x), tolerance=1e-3)


# Covariates in containers.


def as_floats(values):
    return torch.tensor(np.asarray(values).tolist())


class Covariates:
    """Linear regression whose columns come in containers of any kind."""

    def __init__(self, read):
        self.read = read

    def model(self, y, covariates, batch=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        target = as_floats(y)
        with pyro.plate("data", len(target), subsample_size=batch) as rows:
            x = as_floats(self.read(covariates))
            pyro.sample("y", dist.Normal(slope * x[rows], 1.0), obs=target[rows])

    def guide(self, y, covariates, batch=None):
        pyro.sample("slope", dist.Normal(0.0, 1.0))


CONTAINERS = {
    "list": (lambda x, z: [x, z], lambda found: found[0], {"covariates_0": "data", "covariates_1": "data column"}),
    "tuple": (lambda x, z: (x, z), lambda found: found[0], {"covariates_0": "data", "covariates_1": "data column"}),
    "dictionary": (lambda x, z: {"x": x, "z": z}, lambda found: found["x"],
                   {"covariates_x": "data", "covariates_z": "data column"}),
    "nested": (lambda x, z: {"a": [x], "b": {"z": z}}, lambda found: found["a"][0],
               {"covariates_a_0": "data", "covariates_b_z": "data column"}),
    "array": (lambda x, z: x.numpy(), lambda found: found, {"covariates": "data"}),
    "numbers": (lambda x, z: x.tolist(), lambda found: found, {"covariates": "data"}),
    "frame": (lambda x, z: pandas.DataFrame({"x": x.numpy(), "name": list("abcdef")}), lambda found: found["x"],
              {"covariates_x": "data", "covariates_name": "data"}),
    "series": (lambda x, z: pandas.Series(x.numpy()), lambda found: found, {"covariates": "data"}),
}  # fmt: skip


@pytest.mark.parametrize("batch", [None, 4])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_covariates_in_a_container_are_constants(kind, batch):
    build, read, expected = CONTAINERS[kind]
    fit, x, y = Covariates(read), torch.randn(6), torch.randn(6)
    names = {name: ["column"] for name, dims in expected.items() if "column" in dims}
    data = to_arviz((fit.model, fit.guide), y, build(x, torch.randn(6, 2)), batch, num_samples=3, dims=names)
    assert {name: " ".join(array.dims) for name, array in data["constant_data"].data_vars.items()} == expected
    np.testing.assert_array_equal(data["constant_data"][next(iter(expected))], x)
    slope = draws(data, "slope")
    close(draws(data, "y", "log_likelihood"), normal(slope[:, None] * x, 1.0, y))


@pytest.mark.parametrize("of", [lambda y: y.double().numpy() + 1e-9, lambda y: pandas.Series(y.numpy()), lambda y: y.tolist()])
def test_data_that_the_model_converts_are_no_constants(of):
    fit, y = Covariates(lambda found: found), torch.randn(6)
    data = to_arviz((fit.model, fit.guide), of(y), torch.randn(6), num_samples=2)
    assert variables(data, "constant_data") == {"covariates"}


def test_a_covariate_that_rounds_to_counts_is_a_constant():
    def model(y, x):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    counts = torch.tensor([1, 0, 2])
    data = to_arviz((model, lambda y, x: pyro.sample("rate", dist.Gamma(1.0, 1.0))), counts, counts + 0.5, num_samples=2)
    assert variables(data, "constant_data") == {"x"}


# Groups that are asked for in vain.


def test_groups_that_are_named_and_missing_are_said():
    flow, x = Flow((2,)), torch.randn(3, 2)
    with pytest.warns(UserWarning, match=r"log_likelihood \(the model has no latent variables: see pyro_genmodels.log_likel"):
        assert not groups(to_arviz(flow, x, num_samples=3, groups=["log_likelihood"]))
    with pytest.warns(UserWarning, match=r"posterior \(the fit has nothing for it\); log_likelihood \(the model observes"):
        to_arviz(flow, num_samples=3, groups=["posterior", "posterior_predictive", "log_likelihood"])

    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(y=None):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0)) if y is None else None

    with pytest.warns(UserWarning, match=r"log_likelihood \(the model observes nothing in this call: give it its data\)"):
        to_arviz((model, guide), num_samples=3, groups=["posterior", "log_likelihood"])
    with pytest.warns(UserWarning, match=r"prior \(these draws come without a model: pass it as model=\)"):
        to_arviz({"w": torch.zeros(1, 3)}, groups=["posterior", "prior"])
    data = to_arviz((model, guide), torch.zeros(3), num_samples=3, groups=["log_likelihood"])
    assert "left_out" not in data.log_likelihood.attrs  # w is shared by the rows


def test_a_log_likelihood_of_latents_of_single_rows_says_that_loo_means_nothing():
    x = torch.randn(3, 2)
    assert (
        "loo, waic, compare: every latent variable is of one row of 'data'"
        in (to_arviz(VAE((2,)), x, num_samples=3).log_likelihood.attrs["left_out"])
    )
    with pytest.warns(UserWarning, match="log_likelihood is not for loo, waic, compare: every latent variable is of one row"):
        to_arviz(VAE((2,)), x, num_samples=3, groups=["log_likelihood"])
