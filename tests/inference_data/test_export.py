"""The result of `to_arviz` agrees with the fit: families and SVI, names and labels; nothing it touches is changed.

Sources of draws: test_sources.py; all rows: test_replay.py; each group: test_groups.py; ArviZ: test_arviz.py.
"""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from readings import affine_flow, check_weights, close, draws, groups, small_vae, stat, svi, variables
from torch.distributions import constraints

from pyro_genmodels import Autoregressive, BernoulliLikelihood, Labels, to_arviz, train

GROUPS, ROWS = 3, 4


# A family without data.


def test_a_family_gives_draws_of_x():
    data = to_arviz(affine_flow(), num_samples=7)
    assert groups(data) == {"posterior_predictive"}
    assert dict(data["posterior_predictive"].sizes) == {"chain": 1, "draw": 7, "x_dim_0": 2}
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "x_dim_0")


def test_the_draws_are_the_familys():
    flow = affine_flow(standardize=True)
    flow.standardize(5 + 2 * torch.randn(1000, 2))
    x = draws(to_arviz(flow, num_samples=2000), "x", "posterior_predictive")
    expected = flow.eval()().sample((2000,))
    # two means of 2000 draws of deviation about 2: 6 standard errors of the difference, 2e-9 a coordinate
    assert ((x.mean(0) - expected.mean(0)).abs() < 6 * (2 / 2000) ** 0.5 * expected.std(0)).all()
    assert len(x.unique(dim=0)) == 2000


def test_a_vae_gives_its_latents_too():
    data = to_arviz(small_vae((2, 3), likelihood=BernoulliLikelihood()), num_samples=6, batch_size=4)
    assert data["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")
    assert data["posterior"]["z"].shape == (1, 6, 2)
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "x_dim_0", "x_dim_1")
    assert data["posterior_predictive"]["x"].shape == (1, 6, 2, 3)
    assert set(data["posterior_predictive"]["x"].to_numpy().ravel()) <= {0, 1}
    assert groups(data) == {"posterior", "posterior_predictive"}


def test_rows_of_context_are_the_plate():
    labels = torch.tensor([0, 1, 1])
    flow = affine_flow(context=Labels(2))
    for data in (to_arviz(flow, num_samples=5, context=labels), to_arviz(flow, None, labels, num_samples=5)):
        assert groups(data) == {"posterior_predictive"}
        assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
        assert data["posterior_predictive"]["x"].shape == (1, 5, 3, 2)


def test_each_row_is_drawn_under_its_context():
    flow = affine_flow((1,), context=1)
    c = torch.tensor([0.0, 1.0])[torch.randint(0, 2, (200,))][:, None]
    x = 10 * c + torch.randn(200, 1)
    train(flow, x, context=c, optim=partial(torch.optim.Adam, lr=3e-2), epochs=20, batch_size=20, progress=False)
    with torch.no_grad():
        expected = flow(torch.tensor([[1.0], [0.0]])).sample((500,)).mean(0).squeeze()
    data = to_arviz(flow, num_samples=500, context=torch.tensor([[1.0], [0.0]]))
    found = draws(data, "x", "posterior_predictive").mean(0).squeeze()
    assert found[0] > found[1] + 4
    torch.testing.assert_close(found, expected, atol=2.0, rtol=0.0)


def test_many_rows_may_be_drawn_at_once():
    data = to_arviz(affine_flow(), num_samples=5, size=4)
    assert data["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert data["posterior_predictive"]["x"].shape == (1, 5, 4, 2)


def test_event_dimensions_are_named_and_labelled():
    names = {"x": ["row", "column"]}
    data = to_arviz(affine_flow((2, 3)), num_samples=5, dims=names, coords={"column": ["a", "b", "c"]})
    x = data["posterior_predictive"]["x"]
    assert x.dims == ("chain", "draw", "row", "column")
    assert x.coords["column"].to_numpy().tolist() == ["a", "b", "c"]
    assert x.sel(column="b").shape == (1, 5, 2)


@pytest.mark.parametrize("names", [["row"], ["row", "column", "depth"], []])
def test_as_many_names_as_dimensions(names):
    with pytest.raises(ValueError, match=r"dims\['x'\]"):
        to_arviz(affine_flow((2, 3)), num_samples=2, dims={"x": names})


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match="column"):
        to_arviz(affine_flow((2, 3)), num_samples=2, dims={"x": ["row", "column"]}, coords={"column": ["a", "b"]})


@pytest.mark.parametrize("option", ["num_samples", "batch_size"])
def test_counts_are_positive(option):
    for count in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"to_arviz wants an integer {option} of 1 or more, but found {count}"):
            to_arviz(affine_flow(), **{option: count})


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 1), (7, 3), (6, 3), (5, 100)])
def test_blocks_add_up_and_differ(num_samples, batch_size):
    vae, x = small_vae(), torch.randn(4, 3)
    for data in (to_arviz(vae, num_samples=num_samples, batch_size=batch_size),
                 to_arviz(vae, x, num_samples=num_samples, batch_size=batch_size)):  # fmt: skip
        for name, group in (("z", "posterior"), ("x", "posterior_predictive")):
            values = draws(data, name, group)
            assert len(values) == num_samples == len(values.unique(dim=0))
        assert data["posterior"]["draw"].to_numpy().tolist() == list(range(num_samples))
    assert all(data["sample_stats"][name].shape == (1, num_samples) for name in ("log_p", "log_q", "log_weight"))
    assert data["observed_data"]["x"].shape == (4, 3)


# A family with data.


def test_a_vae_with_data_gives_its_posterior():
    vae, x = small_vae(standardize=False).eval(), torch.randn(5, 3)
    data = to_arviz(vae, x, num_samples=9, batch_size=4)
    drawn = {"posterior", "posterior_predictive", "prior", "prior_predictive"}
    assert groups(data) == {*drawn, "log_likelihood", "log_prior", "sample_stats", "observed_data"}
    for group in drawn:
        name = "x" if "predictive" in group else "z"
        assert variables(data, group) == {name}
        assert data[group][name].dims == ("chain", "draw", "data", f"{name}_dim_0")
    assert data["log_likelihood"]["x"].dims == data["log_prior"]["z"].dims == ("chain", "draw", "data")
    assert data["observed_data"]["x"].dims == ("data", "x_dim_0")
    np.testing.assert_array_equal(data["observed_data"]["x"], x)
    z = draws(data, "z")
    with torch.no_grad():
        log_q = vae.posterior(x).log_prob(z).sum(-1)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
        log_likelihood = vae.decode(z).log_prob(x)
    close(draws(data, "z", "log_prior"), log_prior)
    close(draws(data, "x", "log_likelihood"), log_likelihood)
    check_weights(data, (log_prior + log_likelihood).sum(-1), log_q)


def test_a_vae_with_data_and_context():
    vae, x, c = small_vae(context=2), torch.randn(5, 3), torch.randn(5, 2)
    data = to_arviz(vae, x, c, num_samples=3)
    assert data["posterior"]["z"].shape == (1, 3, 5, 2)
    assert data["posterior_predictive"]["x"].shape == (1, 3, 5, 3)


def test_a_fit_of_train_is_a_fit():
    fit = train(small_vae(), torch.randn(20, 3), epochs=1, progress=False)
    assert to_arviz(fit, num_samples=3)["posterior"]["z"].shape == (1, 3, 2)


def test_a_family_without_latents_has_no_posterior():
    data = to_arviz(Autoregressive((2,), hidden=(4,)), torch.randn(5, 2), num_samples=3)
    assert groups(data) == {"posterior_predictive", "observed_data"}
    assert data["posterior_predictive"]["x"].shape == (1, 3, 5, 2)


# An SVI: global, local and nested latents.


def nested(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    pyro.deterministic("exp_mu", mu.exp())
    with pyro.plate("groups", GROUPS, dim=-2):
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("rows", ROWS, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 2.0))
            w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(b + w.sum(-1), 0.5), obs=y)


def nested_guide(y):
    loc = pyro.param("loc", torch.tensor(0.3))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    mu = pyro.sample("mu", dist.Normal(loc, scale))
    with pyro.plate("groups", GROUPS, dim=-2):
        a = pyro.sample("a", dist.Normal(mu + y.mean(-1, keepdim=True), scale))
        with pyro.plate("rows", ROWS, dim=-1):
            pyro.sample("b", dist.Normal(a, scale))
            pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))


@pytest.fixture
def y():
    return torch.randn(GROUPS, ROWS)


def nested_log_p(data, y):
    mu, a, b, w = (draws(data, name) for name in ("mu", "a", "b", "w"))
    return (
        dist.Normal(0.0, 1.0).log_prob(mu)
        + dist.Normal(mu[:, None], 1.0).log_prob(a).sum(-1)
        + dist.Normal(a[..., None], 2.0).log_prob(b).sum((-1, -2))
        + dist.Normal(0.0, 1.0).log_prob(w).sum((-1, -2, -3))
        + dist.Normal(b + w.sum(-1), 0.5).log_prob(y).sum((-1, -2))
    )


def nested_log_q(data, y, loc, scale):
    mu, a, b, w = (draws(data, name) for name in ("mu", "a", "b", "w"))
    return (
        dist.Normal(loc, scale).log_prob(mu)
        + dist.Normal(mu[:, None] + y.mean(-1), scale).log_prob(a).sum(-1)
        + dist.Normal(a[..., None], scale).log_prob(b).sum((-1, -2))
        + dist.Normal(0.0, scale).log_prob(w).sum((-1, -2, -3))
    )


def check_nested_names(data):
    expected = {
        "mu": (),
        "exp_mu": (),
        "a": ("groups",),
        "b": ("groups", "rows"),
        "w": ("groups", "rows", "w_dim_0"),
    }
    sizes = {"groups": GROUPS, "rows": ROWS, "w_dim_0": 2}
    for name, dims in expected.items():
        variable = data["posterior"][name]
        trailing = variable.dims[2:]
        assert variable.dims[:2] == ("chain", "draw")
        assert tuple(d for d in trailing if d in dims) == dims
        assert all(variable.sizes[d] == sizes[d] for d in dims)
        assert trailing == dims, f"{name} has the dimensions {trailing}"
    assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "groups", "rows")
    assert data["observed_data"]["y"].dims == ("groups", "rows")
    assert variables(data, "posterior_predictive") == {"y"} == variables(data, "observed_data")


def test_global_local_and_nested_latents_by_a_guide_of_ones_own(y):
    data = to_arviz(svi(nested, nested_guide, y, steps=3), y, num_samples=11, batch_size=4)
    check_nested_names(data)
    loc, scale = pyro.param("loc").detach(), pyro.param("scale").detach()
    check_weights(data, nested_log_p(data, y), nested_log_q(data, y, loc, scale))
    np.testing.assert_allclose(data["posterior"]["exp_mu"], np.exp(data["posterior"]["mu"]), rtol=1e-6)
    np.testing.assert_array_equal(data["observed_data"]["y"], y)


def test_global_local_and_nested_latents_by_an_autoguide(y):
    guide = AutoNormal(nested)
    data = to_arviz(svi(nested, guide, y, steps=3), y, num_samples=11, batch_size=4)
    check_nested_names(data)
    log_q = torch.zeros(11)
    for name in ("mu", "a", "b", "w"):
        loc, scale = (t.detach() for t in guide._get_loc_and_scale(name))
        value = draws(data, name)
        loc, scale = (t.reshape(value.shape[1:]) for t in (loc, scale))
        log_q = log_q + dist.Normal(loc, scale).log_prob(value).reshape(11, -1).sum(1)
    check_weights(data, nested_log_p(data, y), log_q)


@pytest.mark.parametrize("make", [AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoDelta])
def test_other_autoguides(make, y):
    guide = make(nested)
    fit = svi(nested, guide, y, steps=3)
    with pytest.warns(UserWarning, match="point mass") if make is AutoDelta else nullcontext():
        data = to_arviz(fit, y, num_samples=11, batch_size=4)
    check_nested_names(data)
    assert variables(data, "posterior") == {"mu", "exp_mu", "a", "b", "w"}
    torch.testing.assert_close(stat(data, "log_p"), nested_log_p(data, y), rtol=1e-4, atol=1e-4)
    if make is AutoMultivariateNormal:
        flat = torch.cat([draws(data, name).reshape(11, -1) for name in ("mu", "a", "b", "w")], -1)
        with torch.no_grad():
            log_q = guide.get_posterior().log_prob(flat)
        torch.testing.assert_close(stat(data, "log_q"), log_q, rtol=1e-4, atol=1e-3)


def test_a_constrained_latent_carries_its_jacobian():
    def model(y):
        tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, tau), obs=y)

    y, guide = torch.randn(6), AutoNormal(model)
    data = to_arviz(svi(model, guide, y, steps=3), y, num_samples=9)
    tau = draws(data, "tau")
    loc, scale = (t.detach() for t in guide._get_loc_and_scale("tau"))
    log_p = dist.Gamma(2.0, 1.0).log_prob(tau) + dist.Normal(0.0, tau[:, None]).log_prob(y).sum(-1)
    assert (tau > 0).all()
    check_weights(data, log_p, dist.LogNormal(loc, scale).log_prob(tau))


def test_the_conjugate_posterior(float64):
    """y ~ N(mu, 1), mu ~ N(0, 1): posterior N(sum / (n + 1), 1 / (n + 1)), and every weight is the evidence."""
    y = 1 + torch.randn(8)
    mean, sd, n = y.sum() / 9, 1 / 3, 5000

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 8):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(mean, sd))

    data = to_arviz((model, guide), y, num_samples=n, batch_size=2000)
    mu = draws(data, "mu")
    assert abs(mu.mean() - mean) < 4.5 * sd / n**0.5  # 7e-6
    assert abs(mu.std() - sd) < 4.5 * sd / (2 * n) ** 0.5  # 7e-6
    covariance = torch.eye(8) + 1
    evidence = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(y)
    torch.testing.assert_close(stat(data, "log_weight"), evidence.expand(n))
    predicted = draws(data, "y", "posterior_predictive")
    assert predicted.shape == (n, 8)
    # variance 1 + 1 / 9 about the posterior mean, rows equal in law: 4.5 standard errors each
    assert ((predicted.mean(0) - mean).abs() < 5 * (10 / 9 / n) ** 0.5).all()  # 8 rows: 5e-6
    assert abs(predicted[:, 0].var() / (10 / 9) - 1) < 4.5 * (2 / n) ** 0.5


def test_the_draw_predicted_is_that_of_the_draw_of_its_latents():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mu, 1e-3), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 10.0))

    data = to_arviz((model, guide), torch.zeros(3), num_samples=20, batch_size=7)
    predicted = draws(data, "y", "posterior_predictive")
    assert ((predicted - draws(data, "mu")[:, None]).abs() < 0.01).all()


def test_a_deterministic_site_inside_a_plate():
    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * z, event_dim=1)
            pyro.deterministic("norm", z.norm(dim=-1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    data = to_arviz((model, guide), torch.randn(3), num_samples=5)
    assert data["posterior"]["twice"].dims == ("chain", "draw", "data", "twice_dim_0")
    assert data["posterior"]["norm"].dims == ("chain", "draw", "data")
    np.testing.assert_allclose(data["posterior"]["twice"], 2 * data["posterior"]["z"].to_numpy(), rtol=1e-6)


def test_a_latent_without_its_own_plate_shape_is_expanded():
    def model(y):
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        pyro.sample("mu", dist.Delta(torch.tensor(2.0)))

    def guide(y):
        pyro.sample("mu", dist.Delta(torch.tensor(2.0)))

    data = to_arviz((model, guide), torch.zeros(3), num_samples=5)
    np.testing.assert_array_equal(data["posterior"]["mu"], np.full((1, 5), 2.0))
    assert stat(data, "log_p").shape == (5,)


def test_integer_latents_keep_their_type():
    def model(y):
        with pyro.plate("data", 3):
            k = pyro.sample("k", dist.Categorical(torch.ones(4)))
            pyro.sample("y", dist.Normal(k.float(), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 3):
            pyro.sample("k", dist.Categorical(torch.ones(4)))

    data = to_arviz((model, guide), torch.zeros(3), num_samples=5)
    assert data["posterior"]["k"].dtype.kind == "i"


# What it leaves alone.


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back_and_dropout_is_off(training):
    vae, x = small_vae(dropout=0.5, standardize=False).train(training), torch.randn(4, 3)
    data = to_arviz(vae, x, num_samples=5)
    assert all(module.training == training for module in vae.modules())
    with torch.no_grad():
        log_q = vae.eval().posterior(x).log_prob(draws(data, "z")).sum(-1)
    torch.testing.assert_close(stat(data, "log_q"), log_q, rtol=1e-4, atol=1e-4)


def test_the_mode_is_put_back_on_failure():
    flow = affine_flow().train()
    with pytest.raises(ValueError, match="dims"):
        to_arviz(flow, dims={"x": []})
    assert flow.training


def test_drawing_does_not_standardise():
    flow = affine_flow().train()
    to_arviz(flow, 5 + torch.randn(20, 2), num_samples=2)
    assert torch.equal(flow.loc, torch.zeros(2))


@pytest.mark.parametrize("with_data", [True, False])
def test_the_param_store_is_left_alone(with_data, y):
    vae = small_vae()
    to_arviz(vae, *([torch.randn(4, 3)] if with_data else []), num_samples=2)
    assert len(pyro.get_param_store()) == 0

    fit = svi(nested, AutoNormal(nested), y)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    to_arviz(fit, y, num_samples=5)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None or not p.grad.any() for _, p in pyro.get_param_store().named_parameters())


def test_a_trace_around_it_sees_nothing():
    with poutine.trace() as outer:
        to_arviz(affine_flow(), num_samples=2)
    assert not [name for name in outer.trace.nodes if not name.startswith("_")]


def test_what_is_no_fit_is_refused():
    with pytest.raises(TypeError, match="fit"):
        to_arviz(torch.nn.Linear(1, 1))


def sums_from_the_left(y):
    b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    pyro.sample("y", dist.Normal(b.sum(), 0.01), obs=y)


def indexes_from_the_left(y):
    b = pyro.sample("b", dist.Normal(torch.tensor([0.0, 5.0]), 0.1).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(b[1], 0.5), obs=y)


@pytest.mark.parametrize(
    ("model", "y", "mean"),
    [
        (sums_from_the_left, torch.tensor(0.0), lambda b: b.sum(-1)),
        (indexes_from_the_left, torch.full((2,), 5.0), lambda b: b[..., 1:].repeat(2, axis=-1)),
        (indexes_from_the_left, torch.full((3,), 5.0), lambda b: b[..., 1:].repeat(3, axis=-1)),
    ],
    ids=["sum", "two rows", "three rows"],
)
def test_a_model_that_does_not_vectorise_is_run_draw_by_draw(model, y, mean):
    guide = AutoNormal(model, init_scale=0.5)
    guide(y)
    data = to_arviz((model, guide), y, num_samples=50)
    b, drawn = data["posterior"]["b"].to_numpy(), data["posterior_predictive"]["y"].to_numpy()
    assert abs(drawn - mean(b)).max() < 0.5 * 6  # six standard deviations: below 1e-6 in all
    one = pyro.poutine.trace(pyro.poutine.condition(model, data={"b": torch.as_tensor(b[0, 7])})).get_trace(y)
    assert data["sample_stats"]["log_p"].to_numpy()[0, 7] == pytest.approx(one.log_prob_sum().item(), rel=1e-4)
