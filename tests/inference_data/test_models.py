"""Models as they come in Pyro: reparametrised, enumerated, without plates, with guides that run the model inside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from pyro.infer.reparam import LocScaleReparam
from readings import draws, groups, stat, variables

from pyro_genmodels import to_arviz


def nuts(model, *args, **kwargs):
    mcmc = MCMC(NUTS(model, **kwargs), num_samples=6, warmup_steps=4, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def test_eight_schools_without_plates():
    """As in Pyro's own example."""
    y, sigma = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]), torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def model(sigma):
        eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)))
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(25.0))
        return pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    data = to_arviz(nuts(model, sigma), sigma)
    eta, mu, tau = (draws(data, name) for name in ("eta", "mu", "tau"))
    log_likelihood = dist.Normal(mu[:, None] + tau[:, None] * eta, sigma).log_prob(y)
    torch.testing.assert_close(draws(data, "obs", "log_likelihood"), log_likelihood, check_dtype=False)
    log_prior = dist.Normal(0.0, 1.0).log_prob(eta).sum(-1) + dist.Normal(0.0, 10.0).log_prob(mu)
    log_p = log_likelihood.sum(-1) + log_prior + dist.HalfCauchy(25.0).log_prob(tau)
    torch.testing.assert_close(stat(data, "log_p"), log_p, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["nuts", "svi"])
def test_what_is_reparametrised_is_a_latent_and_nothing_else(by):
    y = torch.randn(5)

    @poutine.reparam(config={"z": LocScaleReparam(0.0)})
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 2.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    if by == "nuts":
        data = to_arviz(nuts(model, y), y)
    else:
        svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        svi.step(y)
        data = to_arviz(svi, y, num_samples=6)
    assert variables(data, "posterior") == {"mu", "z", "z_decentered"}
    assert variables(data, "log_likelihood") == variables(data, "observed_data") == {"y"}
    z = draws(data, "mu")[:, None] + 2 * draws(data, "z_decentered")
    torch.testing.assert_close(draws(data, "z"), z)


def test_a_guide_that_runs_the_model_inside_is_scored_by_its_own_density():
    y = torch.randn(4)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    guide = AutoNormalMessenger(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(y)
    data = to_arviz(svi, y, num_samples=5)
    store = pyro.get_param_store()
    loc, scale = (next(v for k, v in store.items() if part in k).detach() for part in ("locs", "scales"))
    log_q = dist.Normal(loc, scale).log_prob(draws(data, "mu"))
    torch.testing.assert_close(stat(data, "log_q"), log_q, rtol=1e-4, atol=1e-4)


def test_a_joint_guide_of_a_subsample_is_refused():
    y = torch.randn(8)

    def model(y):
        with pyro.plate("data", len(y), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    svi = SVI(model, AutoMultivariateNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(y)
    with pytest.raises(ValueError, match=r"AutoMultivariateNormal .*'z'.* AutoNormal"):
        to_arviz(svi, y, num_samples=4)


# Discrete variables that are summed out.

LOCS = torch.tensor([-3.0, 3.0])


def test_a_latent_that_hangs_on_a_summed_out_one_leaves_nothing_to_chance():
    def model(y):
        k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        w = pyro.sample("w", dist.Normal(LOCS[k], 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def guide(y):
        pyro.sample("w", dist.Normal(y, 0.1))

    with pytest.warns(UserWarning, match=r"log_prior\['w'\]"):
        data = to_arviz((model, guide), torch.tensor(1.0), num_samples=4)
    assert variables(data, "posterior") == {"w"}
    assert not {"log_likelihood", "log_prior", "sample_stats"} & groups(data)


def test_what_is_computed_from_a_summed_out_variable_is_left_out():
    x = torch.tensor([-2.0, -2.0, 2.0, 5.0])

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            mean = pyro.deterministic("mean", loc[..., k] if loc.dim() == 1 else loc[:, 0][..., k])
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    guide = AutoDelta(poutine.block(model, hide=["k"]))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnum_ELBO(max_plate_nesting=1))
    svi.step(x)
    with pytest.warns(UserWarning, match=r"posterior\['mean'\]"):
        data = to_arviz(svi, x, num_samples=3)
    assert variables(data, "posterior") == {"loc"}
    loc = draws(data, "loc")
    exact = dist.Normal(loc[:, :, None], 1.0).log_prob(x).logsumexp(1) - torch.tensor(2.0).log()
    torch.testing.assert_close(draws(data, "x", "log_likelihood"), exact, rtol=1e-4, atol=1e-4, check_dtype=False)


def test_a_markov_chain_is_not_summed_out_row_by_row():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        k = 0
        for t in pyro.markov(range(4)):
            k = pyro.sample(f"k{t}", dist.Bernoulli(0.2 + 0.6 * k), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu + k, 1.0), obs=y)

    def guide(y):
        pyro.sample("mu", dist.Normal(0.0, 1.0))

    with pytest.warns(UserWarning, match="cannot be summed out"):
        data = to_arviz((model, guide), torch.tensor(0.5), num_samples=3)
    assert not {"log_likelihood", "sample_stats"} & groups(data)


def test_a_site_that_is_there_in_some_runs_only_is_refused():
    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k.all():
            pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    def guide(y):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        if k.all():
            pyro.sample("a", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'a' in some runs only"):
        to_arviz((model, guide), torch.tensor(0.5), num_samples=20, parallel=False)
