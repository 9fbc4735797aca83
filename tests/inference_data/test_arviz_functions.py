"""Every function of ArviZ 0.23 on the result of an SVI, an MCMC and a VAE: it works, or the group says why not."""

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from marks import slow_unless
from matplotlib import pyplot as plt
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from readings import ARVIZ_1, small_vae, svi

from pyro_genmodels import to_arviz, train
from pyro_genmodels.inference_data import record_statistics

pytestmark = [
    pytest.mark.skipif(ARVIZ_1, reason="ArviZ 1.x has other names"),
    pytest.mark.filterwarnings("ignore"),  # those of ArviZ 0.23 on newer libraries, and of few draws
]
DRAWS = 60


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), scale), obs=y)


@pytest.fixture(scope="module")
def results():
    """Return {name: (data, observed variable, latent variable)}."""
    pyro.set_rng_seed(0)
    x = torch.randn(12, 2)
    y = x.sum(-1) + 0.3 * torch.randn(12)
    fit = svi(regression, AutoNormal(regression), x, y)
    mcmc = MCMC(record_statistics(NUTS(regression)), num_samples=DRAWS, warmup_steps=30, disable_progbar=True)
    mcmc.run(x, y)
    vae, rows = small_vae(), torch.randn(10, 3)
    train(vae, rows, epochs=2, progress=False)
    return {
        "svi": (to_arviz(fit, x, y, num_samples=DRAWS), "y", "scale"),
        "mcmc": (to_arviz(mcmc), "y", "scale"),
        "vae": (to_arviz(vae, rows, num_samples=DRAWS), "x", "z"),
    }


def flat(data, name):
    return data.posterior[name].to_numpy().ravel()


def one_coordinate(data, y):
    """Return a variable's data and predictions, one number for each row: (rows,) and (rows, draws)."""
    observed, predicted = data.observed_data[y].to_numpy(), data.posterior_predictive[y].to_numpy()[0]
    return (observed, predicted.T) if observed.ndim == 1 else (observed[:, 0], predicted[..., 0].T)


def loo_pit(data, y):
    """Return the probabilities by the recipe in the group's attributes, which also serves where there is no event."""
    observed, predicted = one_coordinate(data, y)
    log_weights = az.psislw(-data.log_likelihood[y].to_numpy()[0].T)[0]
    return az.loo_pit(y=observed, y_hat=predicted, log_weights=log_weights)


STATISTICS = {
    "apply_test_function": lambda d, y, z: az.apply_test_function(
        d, lambda y, z: y.mean(), var_names={"posterior": z}, inplace=False
    ),
    "autocorr": lambda d, y, z: az.autocorr(flat(d, z)),
    "bayes_factor": lambda d, y, z: az.bayes_factor(d, var_name=z, ref_val=0.5),
    "bfmi": lambda d, y, z: az.bfmi(d),
    "compare": lambda d, y, z: az.compare({"a": d, "b": d}),
    "concat": lambda d, y, z: az.concat(d, d, dim="chain"),
    "ess": lambda d, y, z: az.ess(d),
    "extract": lambda d, y, z: az.extract(d),
    "hdi": lambda d, y, z: az.hdi(d),
    "loo": lambda d, y, z: az.loo(d),
    "loo_pit": lambda d, y, z: loo_pit(d, y),
    "mcse": lambda d, y, z: az.mcse(d),
    "psens, prior": lambda d, y, z: az.psens(d, component="prior"),
    "psens, likelihood": lambda d, y, z: az.psens(d, component="likelihood"),
    "psislw": lambda d, y, z: az.psislw(-d.log_likelihood[y].to_numpy()[0].T),
    "r2_score": lambda d, y, z: az.r2_score(one_coordinate(d, y)[0], one_coordinate(d, y)[1].T),
    "rhat": lambda d, y, z: az.rhat(az.concat(d, d, dim="chain")),
    "summary": lambda d, y, z: az.summary(d),
    "to_datatree": lambda d, y, z: d.to_datatree() if hasattr(d, "to_datatree") else None,
    "waic": lambda d, y, z: az.waic(d),
    "weight_predictions": lambda d, y, z: az.weight_predictions([d, d], weights=[0.5, 0.5]),
}
PLOTS = {
    "autocorr": lambda d, y, z: az.plot_autocorr(d, var_names=[z]),
    "bf": lambda d, y, z: az.plot_bf(d, var_name=z, ref_val=0.5),
    "bpv": lambda d, y, z: az.plot_bpv(d),
    "compare": lambda d, y, z: az.plot_compare(az.compare({"a": d, "b": d})),
    "density": lambda d, y, z: az.plot_density(d, var_names=[z]),
    "dist": lambda d, y, z: az.plot_dist(flat(d, z)),
    "dist_comparison": lambda d, y, z: az.plot_dist_comparison(d, var_names=[z]),
    "dot": lambda d, y, z: az.plot_dot(flat(d, z)),
    "ecdf": lambda d, y, z: az.plot_ecdf(flat(d, z)),
    "elpd": lambda d, y, z: az.plot_elpd({"a": d, "b": d}),
    "energy": lambda d, y, z: az.plot_energy(d),
    "ess": lambda d, y, z: az.plot_ess(d, var_names=[z], kind="evolution"),
    "forest": lambda d, y, z: az.plot_forest(d, var_names=[z]),
    "hdi": lambda d, y, z: az.plot_hdi(np.arange(len(one_coordinate(d, y)[0])), one_coordinate(d, y)[1].T[None]),
    "kde": lambda d, y, z: az.plot_kde(flat(d, z)),
    "khat": lambda d, y, z: az.plot_khat(az.loo(d, pointwise=True)),
    "lm": lambda d, y, z: az.plot_lm(y=y, x=np.arange(len(d.observed_data[y])), idata=d, **plot_dim(d, y)),
    "loo_pit": lambda d, y, z: az.plot_loo_pit(
        y=one_coordinate(d, y)[0], y_hat=one_coordinate(d, y)[1], log_weights=az.psislw(-d.log_likelihood[y].to_numpy()[0].T)[0]
    ),
    "mcse": lambda d, y, z: az.plot_mcse(d, var_names=[z]),
    "pair": lambda d, y, z: az.plot_pair(d),
    "parallel": lambda d, y, z: az.plot_parallel(d),
    "posterior": lambda d, y, z: az.plot_posterior(d, var_names=[z]),
    "ppc": lambda d, y, z: az.plot_ppc(d),
    "rank": lambda d, y, z: az.plot_rank(d, var_names=[z]),
    "trace": lambda d, y, z: az.plot_trace(d, var_names=[z]),
    "ts": lambda d, y, z: az.plot_ts(d, y=y, num_samples=20, **plot_dim(d, y)),
    "violin": lambda d, y, z: az.plot_violin(d, var_names=[z]),
}
NO_CHAIN = {"bfmi", "energy", "parallel"}
"""Functions that read statistics of a Markov chain, which draws of a guide do not have."""


def plot_dim(data, y):
    return {} if data.observed_data[y].ndim == 1 else {"plot_dim": "data"}


def check(function, result, name):
    data, y, z = result
    if name in NO_CHAIN and "energy" not in data.sample_stats:
        assert name in data.sample_stats.attrs["left_out"]
        with pytest.raises((AttributeError, TypeError, IndexError)):
            function(data, y, z)
    else:
        function(data, y, z)


FITS = ("svi", "mcmc", "vae")


@pytest.mark.parametrize("name", slow_unless(["bfmi", "loo", "loo_pit", "summary", "psens, prior", "extract"], STATISTICS))
def test_statistics(name, results):
    for fit in FITS:
        check(STATISTICS[name], results[fit], name)


@pytest.mark.parametrize("name", slow_unless(["energy", "parallel", "loo_pit"], PLOTS))
def test_plots(name, results):
    for fit in FITS:
        check(PLOTS[name], results[fit], name)
        plt.close("all")


def test_the_recipe_for_events_is_that_of_arviz_where_there_are_none(results):
    data, y, _ = results["mcmc"]
    np.testing.assert_allclose(loo_pit(data, y), az.loo_pit(data, y=y), atol=1e-6)
    assert "left_out" not in data.log_likelihood.attrs
    assert "loo_pit" in results["vae"][0].log_likelihood.attrs["left_out"]
