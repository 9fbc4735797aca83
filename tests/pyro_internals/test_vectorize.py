"""Particles sampled together are compared with runs of one particle, whatever the other particles are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_genmodels._pyro.vectorize import can_vectorize


def guide(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


def with_far_particles(far: float, *, mixes: bool):
    """Build a model that gives particles with z < -1.0 `far` nats, and may take particles for coordinates."""

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("support", torch.where(z > -1.0, 0.0, far))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z.mean() if mixes else z, 0.1), obs=x)

    return model


@pytest.mark.parametrize("far", [-1e7, -float("inf")])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_far_or_impossible_particle_hides_no_difference_of_the_others(far, mixes):
    for seed in range(30):
        pyro.set_rng_seed(seed)
        found = can_vectorize(with_far_particles(far, mixes=mixes), guide, (torch.linspace(-1.0, 1.0, 20),), {}, 1)
        assert found is not mixes, seed


def test_particles_that_are_all_impossible_prove_nothing():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.full_like(z, -torch.inf))
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)

    assert not can_vectorize(model, guide, (torch.tensor(0.0),), {}, 0)


@pytest.mark.parametrize("far", [float("inf"), float("nan")])
@pytest.mark.parametrize("mixes", [True, False])
def test_a_computed_value_is_compared_on_the_scale_of_finite_particles(far, mixes):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        value = torch.where(z > -1.0, z, far)
        pyro.deterministic("value", value.roll(1) if mixes else value)

    for seed in range(30):
        pyro.set_rng_seed(seed)
        assert can_vectorize(model, guide, (0.0,), {}, 0) is not mixes, seed
