"""Sources of the draws of `to_arviz`: every kind of fit, its draws and its densities recomputed by hand."""

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, Importance, Predictive, WeighedPredictive
from pyro.infer.autoguide import (
    AutoDelta,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.nn import PyroModule, PyroParam
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
from torch import nn

from pyro_genmodels import to_arviz, train
from pyro_genmodels.samplers import Chains

OF_A_MODEL = {"posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "log_prior", "observed_data"}


@pytest.fixture
def y():
    return 1 + torch.randn(6)


def check_model_groups(data, y, chain=0):
    """Assert that the groups which need a model beside the draws are those of `mean_model`."""
    mu = draws(data, "mu", chain=chain)
    close(draws(data, "y", "log_likelihood", chain), normal(mu[:, None], 2.0, y))
    close(draws(data, "mu", "log_prior", chain), normal(0.0, 3.0, mu))
    close(stat(data, "log_p", chain), mean_log_p(mu, y))
    assert draws(data, "y", "posterior_predictive", chain).shape == (len(mu), len(y))
    np.testing.assert_array_equal(data["observed_data"]["y"], y)


# Guides.


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), 0.5), obs=y)


def regression_log_p(b, x, y):
    return normal(0.0, 2.0, b).sum(-1) + normal((x * b[:, None]).sum(-1), 0.5, y).sum(-1)


@pytest.mark.parametrize("make", [AutoIAFNormal, AutoMultivariateNormal])
def test_a_guide_of_one_transformed_latent(make, y):
    x, guide = torch.randn(6, 2), make(regression)
    data = to_arviz(svi(regression, guide, x, y, steps=5), x, y, num_samples=9, batch_size=4)
    b = draws(data, "b")
    with torch.no_grad():
        check_weights(data, regression_log_p(b, x, y), guide.get_posterior().log_prob(b), tolerance=1e-3)


def test_a_guide_of_flows_has_the_density_of_the_inverted_flow(y):
    def make(latent_dim):
        return dist.transforms.affine_coupling(latent_dim, hidden_dims=[4])

    x, guide = torch.randn(6, 2), AutoNormalizingFlow(regression, make)
    data = to_arviz(svi(regression, guide, x, y, steps=2), x, y, num_samples=9, batch_size=4)
    b = draws(data, "b")
    with torch.no_grad():
        z = guide.transform.inv(b)
        log_q = normal(0.0, 1.0, z).sum(-1) - guide.transform.log_abs_det_jacobian(z, b)
    check_weights(data, regression_log_p(b, x, y), log_q, tolerance=1e-3)


def test_a_family_as_guide(y):
    flow = affine_flow((2,), standardize=False)

    def guide(x, y):
        pyro.sample("b", flow())

    x = torch.randn(6, 2)
    data = to_arviz((regression, guide), x, y, num_samples=9, batch_size=4)
    b = draws(data, "b")
    with torch.no_grad():
        check_weights(data, regression_log_p(b, x, y), flow().log_prob(b), tolerance=1e-3)


def scale_model(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(0.0, scale), obs=y)


def test_a_laplace_approximation_has_a_density_once_it_is_converted(y):
    """Before, its log_q was the Jacobian of the constrained variable alone."""
    guide = AutoLaplaceApproximation(scale_model)
    fit = svi(scale_model, guide, y, steps=3)
    with pytest.warns(UserWarning, match=r"log_q .*use guide.laplace_approximation\(...\)"):
        data = to_arviz(fit, y, num_samples=3)
    assert variables(data, "sample_stats") == {"log_p"}
    assert len(draws(data, "scale").unique()) == 1
    converted = guide.laplace_approximation(y)
    data = to_arviz((scale_model, converted), y, num_samples=3)
    expected = dist.LogNormal(converted.loc, converted.scale_tril.squeeze() * converted.scale).log_prob(draws(data, "scale"))
    close(stat(data, "log_q"), expected.squeeze())


def test_a_point_mass_has_no_density(y):
    fit = svi(mean_model, AutoDelta(mean_model), y, steps=3)
    with pytest.warns(UserWarning, match="log_q.*a single value of 'mu'"):
        data = to_arviz(fit, y, num_samples=5)
    assert variables(data, "sample_stats") == {"log_p"}
    assert len(draws(data, "mu").unique()) == 1
    check_model_groups(data, y)


def test_a_fit_of_train_to_a_pair_is_a_fit(y):
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    data = to_arviz(train((model, guide), y, epochs=1, progress=False), y, num_samples=5)
    z, loc = draws(data, "z"), pyro.param("loc").detach()
    check_weights(data, (normal(0.0, 1.0, z) + normal(z, 0.5, y)).sum(-1), normal(loc, 1.0, z).sum(-1))


def test_a_latent_that_the_guide_leaves_to_the_model_counts_as_drawn(y):
    """It is drawn from p(scale), so that this cancels in the weight, as it does in importance sampling from the prior."""

    def model(y):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    data = to_arviz((model, mean_guide), y, num_samples=5)
    mu, scale = draws(data, "mu"), draws(data, "scale")
    log_weight = normal(0.0, 3.0, mu) - mean_log_q(mu) + normal(mu[:, None], scale[:, None], y).sum(-1)
    close(stat(data, "log_weight"), log_weight, tolerance=1e-3)


# Markov chains.


def chains_of(model, samples, divergences):
    """Return an object with the methods of `MCMC` and given chains."""
    return SimpleNamespace(
        kernel=SimpleNamespace(model=model),
        get_samples=lambda group_by_chain: samples,
        diagnostics=lambda: {"divergences": divergences},
    )


def test_a_markov_chain(y):
    mcmc = MCMC(NUTS(mean_model), num_samples=8, warmup_steps=8, disable_progbar=True)
    mcmc.run(y)
    data = to_arviz(mcmc, y, batch_size=3)
    assert groups(data) == {*OF_A_MODEL, "sample_stats"}
    assert variables(data, "sample_stats") == {"log_p", "diverging"}
    assert torch.equal(draws(data, "mu"), mcmc.get_samples()["mu"])
    check_model_groups(data, y)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu:UserWarning")  # on a machine of two cores
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # how Pyro starts its processes, from Python 3.12
def test_two_markov_chains_of_pyro(y):
    mcmc = MCMC(NUTS(mean_model), num_samples=8, warmup_steps=8, num_chains=2, disable_progbar=True)
    mcmc.run(y)
    data = to_arviz(mcmc, y, batch_size=3)
    for chain in range(2):
        assert torch.equal(draws(data, "mu", chain=chain), mcmc.get_samples(group_by_chain=True)["mu"][chain])
        check_model_groups(data, y, chain)


def test_two_chains_stay_apart_and_say_where_they_diverged(y):
    mu = torch.randn(2, 7)
    fit = chains_of(mean_model, {"mu": mu}, {"chain 0": [], "chain 1": [0, 5]})
    data = to_arviz(fit, y, batch_size=4)
    assert dict(data["posterior"].sizes) == {"chain": 2, "draw": 7}
    expected = np.zeros((2, 7), bool)
    expected[1, [0, 5]] = True
    np.testing.assert_array_equal(data["sample_stats"]["diverging"], expected)
    for chain in range(2):
        assert torch.equal(draws(data, "mu", chain=chain), mu[chain])
        check_model_groups(data, y, chain)


def test_draws_that_diverge_are_marked():
    class Watched(HMC):
        def sample(self, params):
            before, drawn = len(self._divergences), super().sample(params)
            seen.append((drawn["log_scale"].item(), len(self._divergences) > before))
            return drawn

    def funnel():
        log_scale = pyro.sample("log_scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(9), (log_scale / 2).exp()).to_event(1))

    seen = []
    kernel = Watched(funnel, step_size=0.9, num_steps=5, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = MCMC(kernel, num_samples=60, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    data = to_arviz(mcmc)
    diverging = data["sample_stats"]["diverging"].to_numpy()[0].tolist()
    assert data["sample_stats"]["diverging"].dtype == bool
    assert 0 < sum(diverging) < 60
    assert list(zip(draws(data, "log_scale").tolist(), diverging, strict=True)) == seen[3:]


def test_a_potential_alone_has_a_posterior_alone():
    kernel = NUTS(potential_fn=lambda z: z["mu"].square().sum() / 2)
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=3, initial_params={"mu": torch.zeros(3)}, disable_progbar=True)
    mcmc.run()
    data = to_arviz(mcmc)
    assert groups(data) == {"posterior", "sample_stats"}
    assert variables(data, "sample_stats") == {"diverging"}
    assert data["posterior"]["mu"].dims == ("chain", "draw", "mu_dim_0")
    assert torch.equal(draws(data, "mu"), mcmc.get_samples()["mu"])


def test_a_potential_may_be_given_its_model(y):
    kernel = NUTS(potential_fn=lambda z: -mean_log_p(z["mu"], y))
    mcmc = MCMC(kernel, num_samples=6, warmup_steps=3, initial_params={"mu": torch.tensor(0.0)}, disable_progbar=True)
    mcmc.run()
    check_model_groups(to_arviz(mcmc, y, model=mean_model), y)


@pytest.mark.parametrize("kind", ["mcmc", "importance"])
def test_a_run_that_brings_its_model_wants_no_other(kind, y):
    if kind == "mcmc":
        fit = chains_of(mean_model, {"mu": torch.randn(1, 5)}, {"chain 0": []})
    else:
        fit = Importance(mean_model, mean_guide, num_samples=5).run(y)
    with pytest.raises(ValueError, match="model"):
        to_arviz(fit, y, model=regression)


# Importance.


def test_importance_keeps_its_own_weights(y):
    fit = Importance(mean_model, mean_guide, num_samples=8).run(y)
    data = to_arviz(fit, y, batch_size=3)
    mu = draws(data, "mu")
    assert groups(data) == {*OF_A_MODEL, "sample_stats"}
    assert torch.equal(mu, torch.stack([trace.nodes["mu"]["value"] for trace in fit.exec_traces]))
    torch.testing.assert_close(stat(data, "log_weight"), torch.stack(fit.log_weights), rtol=0, atol=0)
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))
    check_model_groups(data, y)


def test_importance_remembers_its_arguments(y):
    data = to_arviz(Importance(mean_model, mean_guide, num_samples=8).run(y))
    check_model_groups(data, y)

    def scaled(y, *, by):
        mean_model(y / by)

    by = torch.tensor(2.0)
    data = to_arviz(Importance(scaled, lambda y, *, by: mean_guide(y), num_samples=8).run(y, by=by))
    check_model_groups(data, y / by)
    assert variables(data, "constant_data") == {"y", "by"}


def test_importance_without_a_guide_draws_from_the_prior(y):
    data = to_arviz(Importance(mean_model, num_samples=8).run(y))
    mu = draws(data, "mu")
    check_weights(data, mean_log_p(mu, y), normal(0.0, 3.0, mu))


def test_importance_that_has_not_run_is_refused():
    with pytest.raises(ValueError, match="run"):
        to_arviz(Importance(mean_model, mean_guide, num_samples=8))


def subsampled_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y), subsample_size=4) as rows:
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y[rows])


@pytest.mark.parametrize("kind", ["importance", "weighed predictive"])
def test_weighed_draws_of_a_subsampled_model_carry_densities_that_go_together(kind, y):
    """Its own weights are estimates from four rows, so that either all three statistics are, or none."""
    if kind == "importance":
        data = to_arviz(Importance(subsampled_mean, mean_guide, num_samples=5).run(y))
    else:
        run = WeighedPredictive(subsampled_mean, guide=mean_guide, num_samples=5, return_sites=["mu"])
        data = to_arviz(run(y), y, model=subsampled_mean)
    mu = draws(data, "mu")
    close(draws(data, "y", "log_likelihood"), normal(mu[:, None], 2.0, y))
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))


# WeighedPredictive.


@pytest.mark.parametrize("parallel", [True, False])
def test_weighed_predictive(parallel, y):
    run = WeighedPredictive(mean_model, guide=mean_guide, num_samples=8, parallel=parallel, return_sites=["mu"])(y)
    data = to_arviz(run, y, model=mean_model, batch_size=3)
    mu = draws(data, "mu")
    assert groups(data) == {*OF_A_MODEL, "sample_stats"}
    assert torch.equal(mu, run.samples["mu"].reshape(8))
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))
    torch.testing.assert_close(stat(data, "log_weight"), run.log_weights.detach(), rtol=0, atol=0)
    check_model_groups(data, y)


@pytest.mark.parametrize("parallel", [True, False])
def test_weighed_predictive_without_a_model_has_a_posterior_and_its_weights(parallel, y):
    run = WeighedPredictive(mean_model, guide=mean_guide, num_samples=8, parallel=parallel, return_sites=["mu"])(y)
    data = to_arviz(run)
    assert groups(data) == {"posterior", "sample_stats"}
    mu = draws(data, "mu").reshape(8)
    check_weights(data, mean_log_p(mu, y), mean_log_q(mu))


def test_what_weighed_predictive_returns_of_the_data_is_no_posterior(y):
    """By default it returns what the model observes too."""
    run = WeighedPredictive(mean_model, guide=mean_guide, num_samples=8, parallel=True)(y)
    data = to_arviz(run, y, model=mean_model)
    assert variables(data, "posterior") == {"mu"}
    check_model_groups(data, y)


def test_latents_that_weighed_predictive_did_not_return_are_named(y):
    run = WeighedPredictive(mean_model, guide=mean_guide, num_samples=8, return_sites=["y"])(y)
    with pytest.raises(ValueError, match="return_sites"):
        to_arviz(run, y, model=mean_model)


# Plain draws.


@pytest.mark.parametrize("convert", [lambda t: t, lambda t: t.numpy(), lambda t: t.tolist()], ids=["torch", "numpy", "lists"])
def test_plain_draws(convert, y):
    mu = torch.randn(2, 7)
    data = to_arviz({"mu": convert(mu)}, y, model=mean_model, batch_size=3)
    assert groups(data) == {*OF_A_MODEL, "sample_stats"}
    assert variables(data, "sample_stats") == {"log_p"}
    for chain in range(2):
        close(draws(data, "mu", chain=chain), mu[chain])
        check_model_groups(data, y, chain)


def test_plain_draws_without_a_model_are_a_posterior():
    b, k = torch.randn(2, 7, 3), np.arange(14).reshape(2, 7)
    data = to_arviz({"b": b, "k": k}, dims={"b": ["side"]}, coords={"side": ["left", "middle", "right"]})
    assert groups(data) == {"posterior"}
    assert data["posterior"]["b"].dims == ("chain", "draw", "side")
    np.testing.assert_array_equal(data["posterior"]["b"].sel(side="middle"), b[..., 1])
    np.testing.assert_array_equal(data["posterior"]["k"], k)


def test_plain_draws_in_nested_plates(y):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("groups", 3, dim=-2):
            a = pyro.sample("a", dist.Normal(loc.sum(-1), 1.0))
            with pyro.plate("rows", 4, dim=-1):
                b = pyro.sample("b", dist.Normal(a, 1.0))
                pyro.sample("y", dist.Normal(b, 0.5), obs=y)

    y = torch.randn(3, 4)
    loc, a, b = torch.randn(1, 5, 2), torch.randn(1, 5, 3, 1), torch.randn(1, 5, 3, 4)
    data = to_arviz({"loc": loc, "a": a, "b": b}, y, model=model, batch_size=2)
    assert data["posterior"]["a"].dims == ("chain", "draw", "groups")
    assert data["posterior"]["b"].dims == ("chain", "draw", "groups", "rows")
    close(draws(data, "a"), a[0, ..., 0])
    close(draws(data, "a", "log_prior"), normal(loc[0].sum(-1, keepdim=True), 1.0, a[0, ..., 0]))
    close(draws(data, "b", "log_prior"), normal(a[0], 1.0, b[0]))
    close(draws(data, "y", "log_likelihood"), normal(b[0], 0.5, y))


def test_draws_that_the_model_does_not_know_stay_in_the_posterior(y):
    data = to_arviz({"mu": torch.randn(1, 5), "other": torch.randn(1, 5, 2)}, y, model=mean_model)
    assert variables(data, "posterior") == {"mu", "other"}
    check_model_groups(data, y)


def test_draws_of_what_is_observed_are_no_posterior(y):
    """As in the draws of `Predictive`, whose y are replicates."""
    data = to_arviz({"mu": torch.randn(1, 5), "y": torch.randn(1, 5, 6)}, y, model=mean_model)
    assert variables(data, "posterior") == {"mu"}


def test_draws_of_a_predictive_are_read_with_a_chain(y):
    samples = Predictive(mean_model, guide=mean_guide, num_samples=5, return_sites=["mu"])(y)
    data = to_arviz({name: value[None] for name, value in samples.items()}, y, model=mean_model)
    check_model_groups(data, y)


@pytest.mark.parametrize(
    "fit",
    [
        {},
        {"mu": torch.randn(5)},
        {"mu": torch.randn(1, 5), "nu": torch.randn(1, 6)},
        {"mu": torch.randn(2, 5), "nu": torch.randn(1, 5)},
        {"mu": torch.randn(1, 0)},
    ],
)
def test_draws_of_other_shapes_are_refused(fit):
    with pytest.raises(ValueError, match="chain, draw"):
        to_arviz(fit)


def test_missing_draws_are_named(y):
    with pytest.raises(ValueError, match="'mu'"):
        to_arviz({"nu": torch.randn(1, 5)}, y, model=mean_model)


def test_arguments_without_a_model_are_refused(y):
    """Forgetting model= would otherwise leave out seven groups in silence."""
    with pytest.raises((TypeError, ValueError), match="model"):
        to_arviz({"mu": torch.randn(1, 5)}, y)


def test_draws_of_a_subsampled_plate_are_refused(y):
    def model(y):
        with pyro.plate("data", len(y), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match="subsamples"):
        to_arviz({"z": torch.randn(1, 5, 3)}, y, model=model)


def test_what_has_draws_makes_no_others(y):
    with pytest.raises(ValueError, match="num_samples"):
        to_arviz({"mu": torch.randn(1, 5)}, y, model=mean_model, num_samples=5)


def test_what_has_a_model_wants_no_other(y):
    with pytest.raises(ValueError, match="model="):
        to_arviz((mean_model, mean_guide), y, model=mean_model)


# Lists of fits: restarts become chains.


def restarts(y, make=AutoNormal, number=3):
    """Autoguides of one class, trained one after another; the store is left with the last one's parameters."""
    fits = []
    for i in range(number):
        pyro.clear_param_store()
        fits.append(svi(mean_model, make(mean_model), y, steps=10 * i + 1))
    return fits


def test_restarts_become_chains_with_parameters_of_their_own(y):
    fits = restarts(y)
    data = to_arviz(fits, y, num_samples=7, batch_size=3)
    assert dict(data["posterior"].sizes) == {"chain": 3, "draw": 7}
    assert len({fit.guide.locs.mu.item() for fit in fits}) == 3
    for chain, fit in enumerate(fits):
        mu = draws(data, "mu", chain=chain)
        with torch.no_grad():
            log_q = normal(fit.guide.locs.mu, fit.guide.scales.mu, mu)
        check_weights(data, mean_log_p(mu, y), log_q, chain=chain)
        check_model_groups(data, y, chain)


def test_restarts_leave_the_store_and_the_guides_as_they_were(y):
    fits = restarts(y)
    store = {name: (value, value.detach().clone()) for name, value in pyro.get_param_store().named_parameters()}
    held = pyro.param("AutoNormal.locs.mu")
    guides = [[(p, p.detach().clone()) for p in fit.guide.parameters()] for fit in fits]
    to_arviz(fits, y, num_samples=4)
    after = dict(pyro.get_param_store().named_parameters())
    assert after.keys() == store.keys()
    assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in store.items())
    assert all(torch.equal(p, copy) for guide in guides for p, copy in guide)
    assert [list(fit.guide.parameters()) == [p for p, _ in guide] for fit, guide in zip(fits, guides, strict=True)]
    assert held.unconstrained() is after["AutoNormal.locs.mu"]
    fits[-1].step(y)  # goes on training the same parameters
    assert not torch.equal(guides[-1][0][0], guides[-1][0][1])


def test_one_fit_alone_says_what_pyro_says(y):
    """The store as it stands counts for a single fit, as in `SVI` itself."""
    fit = restarts(y, number=2)[1]
    mu = draws(to_arviz(fit, y, num_samples=4), "mu")
    assert mu.shape == (4,)
    close(draws(to_arviz([fit], y, num_samples=400), "mu").mean(), fit.guide.locs.mu.detach(), tolerance=1.0)


def test_fits_that_share_parameters_are_refused(y):
    fits = [svi(mean_model, AutoNormal(mean_model), y) for _ in range(2)]  # the store is not cleared between
    with pytest.raises(ValueError, match="share"):
        to_arviz(fits, y, num_samples=4)


def test_the_same_fit_twice_is_refused(y):
    fit = restarts(y)[0]
    with pytest.raises(ValueError, match="share"):
        to_arviz([fit, fit], y, num_samples=4)


def learned_guide(y):
    pyro.sample("mu", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))


def test_plain_guides_share_their_parameters_by_name(y):
    fits = []
    for _ in range(2):
        pyro.clear_param_store()
        fits.append(svi(mean_model, learned_guide, y))
    with pytest.raises(ValueError, match="'loc'"):
        to_arviz(fits, y, num_samples=4)


def test_models_that_share_their_parameters_are_refused(y):
    """The guides differ, but both runs would be judged under the scale that was learned last."""

    def model(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    fits = []
    for _ in range(2):
        pyro.clear_param_store()
        fits.append(svi(model, AutoNormal(model), y, steps=3))
    with pytest.raises(ValueError, match="'scale'"):
        to_arviz(fits, y, num_samples=4)


def test_a_frozen_prior_may_be_shared(y):
    flow = affine_flow((2,), standardize=False).requires_grad_(False).eval()

    def model(y):
        b = pyro.sample("b", flow())
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(b.sum(-1), 1.0), obs=y)

    fits = []
    for i in range(2):
        pyro.clear_param_store()
        fits.append(svi(model, AutoNormal(model), y, steps=3 * i + 1))
    data = to_arviz(fits, y, num_samples=4)
    for chain in range(2):
        with torch.no_grad():
            close(draws(data, "b", "log_prior", chain), flow().log_prob(draws(data, "b", chain=chain)), tolerance=1e-3)


class Located(PyroModule):
    """A normal distribution somewhere."""

    def __init__(self, loc):
        super().__init__()
        self.loc = loc

    def forward(self):
        return dist.Normal(self.loc, 1.0)


@pytest.mark.parametrize(
    "loc",
    [lambda: PyroParam(torch.tensor(0.1)), lambda: nn.Parameter(torch.tensor(0.1))],
    ids=["PyroParam", "Parameter"],
)
def test_frozen_parameters_may_be_shared_by_guides_and_stay_frozen(loc):
    """Pyro's store turns gradients on for what it takes in, so that one that looks on has to turn them off again."""

    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(0.0, 1.0))

    class Guide(PyroModule):
        def __init__(self, shared):
            super().__init__()
            self.shared, self.own = shared, Located(PyroParam(torch.randn(())))

        def forward(self):
            pyro.sample("a", self.shared())
            pyro.sample("b", self.own())

    frozen = Located(loc()).requires_grad_(False)
    guides = [Guide(frozen) for _ in range(2)]
    data = to_arviz([(model, guide) for guide in guides], num_samples=4)
    assert not any(p.requires_grad for p in frozen.parameters())
    for chain, guide in enumerate(guides):
        a, b = draws(data, "a", chain=chain), draws(data, "b", chain=chain)
        close(stat(data, "log_q", chain), normal(0.1, 1.0, a) + normal(guide.own.loc.detach(), 1.0, b))


def test_families_become_chains():
    vaes, x = [small_vae(standardize=False).eval() for _ in range(2)], torch.randn(4, 3)
    data = to_arviz(vaes, x, num_samples=3)
    for chain, vae in enumerate(vaes):
        with torch.no_grad():
            close(stat(data, "log_q", chain), vae.posterior(x).log_prob(draws(data, "z", chain=chain)).sum(-1))
    assert to_arviz([affine_flow(), affine_flow()], num_samples=3)["posterior_predictive"].sizes["chain"] == 2


def test_lists_of_runs_and_draws(y):
    mcmc = [chains_of(mean_model, {"mu": torch.randn(n, 5)}, {f"chain {i}": [i] for i in range(n)}) for n in (1, 2)]
    data = to_arviz(mcmc, y)
    np.testing.assert_array_equal(np.argwhere(data["sample_stats"]["diverging"].to_numpy()), [[0, 0], [1, 0], [2, 1]])
    check_model_groups(data, y, chain=2)

    runs = [Importance(mean_model, mean_guide, num_samples=5).run(y) for _ in range(2)]
    data = to_arviz(runs)
    for chain, run in enumerate(runs):
        torch.testing.assert_close(stat(data, "log_weight", chain), torch.stack(run.log_weights), rtol=0, atol=0)
        check_model_groups(data, y, chain)

    runs = [WeighedPredictive(mean_model, guide=mean_guide, num_samples=5, return_sites=["mu"])(y) for _ in range(2)]
    data = to_arviz(runs, y, model=mean_model)
    for chain, run in enumerate(runs):
        torch.testing.assert_close(stat(data, "log_weight", chain), run.log_weights.detach(), rtol=0, atol=0)

    data = to_arviz([{"mu": torch.zeros(1, 5)}, {"mu": torch.ones(2, 5)}])
    np.testing.assert_array_equal(data["posterior"]["mu"].mean("draw"), [0, 1, 1])


def test_an_empty_list_is_refused():
    with pytest.raises(ValueError, match="empty"):
        to_arviz([])


def test_fits_to_different_data_are_refused(y):
    runs = [Importance(mean_model, mean_guide, num_samples=5).run(data) for data in (y, y + 1)]
    with pytest.raises(ValueError, match="observed_data"):
        to_arviz(runs)


def test_runs_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        to_arviz([{"mu": torch.randn(1, 5)}, {"mu": torch.randn(1, 6)}])


@pytest.mark.parametrize("order", [(AutoDelta, AutoNormal), (AutoNormal, AutoDelta)], ids=lambda makes: makes[0].__name__)
def test_fits_that_say_different_things_are_refused_in_either_order(order, y):
    """A point mass has no log_q."""
    fits = []
    for make in order:
        pyro.clear_param_store()
        fits.append(svi(mean_model, make(mean_model), y))
    with pytest.raises(ValueError, match="log_q"), pytest.warns(UserWarning, match="a single value of 'mu'"):
        to_arviz(fits, y, num_samples=4)


def test_two_fits_are_no_pair():
    with pytest.raises(TypeError, match=r"pair is \(model, guide\).*its model is a VAE, which has both.*as a list, \[a, b\]"):
        to_arviz((small_vae(), small_vae()), num_samples=3)
    with pytest.raises(TypeError, match=r"its guide is a VAE, which has both: pass VAE.guide"):
        to_arviz((small_vae().model, small_vae()), num_samples=3)


@pytest.mark.parametrize("fit", [small_vae, lambda: Chains(torch.zeros(1, 3), {}, torch.ones(()))])
def test_fits_by_name_are_no_draws_by_name(fit):
    with pytest.raises(TypeError, match=r"holds draws by name, \(chain, draw, ...\), but 'a' is a (VAE|Chains). Call"):
        to_arviz({"a": fit()})
    with pytest.raises(TypeError, match=r"to_arviz, for draws of 'a', wants numbers.*found NoneType"):
        to_arviz({"a": None})
