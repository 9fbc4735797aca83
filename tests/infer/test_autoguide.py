"""A family as the guide of a model, `AutoFamily`: the models it takes. Its training: test_adversarial.py."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from readings import affine_flow

from pyro_genmodels import AutoFamily

y = torch.arange(60.0)


def local(y, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=batch) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def fixed(y, rows):
    with pyro.plate("data", len(y), subsample=rows):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def shared(y, batch):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=batch) as rows:
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y[rows])


def build(n):
    return affine_flow((n,))


@pytest.mark.parametrize(("model", "batch"), [(local, 10), (fixed, torch.arange(10))])
def test_latent_variables_of_subsampled_rows_are_refused_at_each_run(model, batch):
    """It would train 10 coordinates, or 11, for 60 rows."""
    guide = AutoFamily(model, build)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"10 of 60 rows of plate 'data', in which 'z' lies.*conditioned on each row"):
            guide(y, batch)


def test_a_family_of_another_shape_is_refused_at_each_run():
    guide = AutoFamily(shared, lambda n: affine_flow((n + 1,)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"a family over \(1,\).* over \(2,\)"):
            guide(y, None)


@pytest.mark.parametrize(("model", "batch", "coordinates"), [(local, None, 61), (shared, 10, 1)])
def test_all_rows_or_shared_latent_variables_are_taken(model, batch, coordinates):
    guide = AutoFamily(model, build)
    guide(y, batch)
    assert guide.family.event_shape == (coordinates,)
