"""Readers of ArviZ data for tests, for the InferenceData of ArviZ 0.23 and the DataTree of 1.x; and small fits."""

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam

from pyro_genmodels import MAF, VAE, Flow

ARVIZ_1 = not az.__version__.startswith("0.")


# Contents of the data.


def groups(data):
    """Return the names of the groups."""
    return set(data.children if ARVIZ_1 else data.groups())


def variables(data, group):
    """Return the names of the variables of a group."""
    return set(data[group].data_vars)


def draws(data, name, group="posterior", chain=0):
    """Return a variable of one chain, (draws, ...), or the whole variable if it has no chains."""
    array = data[group][name]
    return torch.as_tensor((array.isel(chain=chain) if "chain" in array.dims else array).to_numpy())


def stat(data, name, chain=0):
    """Return a statistic of each draw of one chain."""
    return draws(data, name, "sample_stats", chain).to(torch.get_default_dtype())


def close(found, expected, tolerance=1e-4):
    """Assert that sums of tens of terms in single precision are equal."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def check_weights(data, log_p, log_q, tolerance=1e-4, chain=0):
    """Assert that log_p, log_q and log_weight of each draw have these values."""
    close(stat(data, "log_p", chain), log_p, tolerance)
    close(stat(data, "log_q", chain), log_q, tolerance)
    torch.testing.assert_close(
        stat(data, "log_weight", chain), log_p - log_q, rtol=tolerance, atol=10 * tolerance, check_dtype=False
    )


def normal(loc, scale, value):
    """Return the log density of a normal distribution."""
    return dist.Normal(loc, scale).log_prob(value)


# Fits.


def affine_flow(shape=(2,), **kwargs):
    return Flow(shape, transform=MAF(transforms=1, hidden=(8,)), **kwargs)


def small_vae(shape=(3,), **kwargs):
    return VAE(shape, latent_dim=2, hidden=(8,), **kwargs)


def svi(model, guide, *args, steps=1, loss=None, **kwargs):
    fit = SVI(model, guide, Adam({"lr": 0.05}), loss or Trace_ELBO())
    for _ in range(steps):
        fit.step(*args, **kwargs)
    return fit


def mean_model(y):
    """Model the mean of normal data."""
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 2.0), obs=y)


def mean_guide(y):
    pyro.sample("mu", dist.Normal(0.5, 1.5))


def mean_log_p(mu, y):
    """Return log p(mu, y) for each mu."""
    return normal(0.0, 3.0, mu) + normal(mu[..., None], 2.0, y).sum(-1)


def mean_log_q(mu):
    return normal(0.5, 1.5, mu)
