"""Renyi's bound as a differentiable loss: value and gradients are those of Pyro's `RenyiELBO.loss_and_grads`."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import RenyiELBO
from torch import tensor
from torch.distributions import constraints

from pyro_genmodels._pyro.renyi import renyi_loss

X = tensor([0.3, -1.2, 0.8, 2.0])


def loc():
    return pyro.param("loc", tensor(0.2))


def one_latent(x):
    """The latent variable is outside of the plate: the bound is that of all data."""
    z = pyro.sample("z", dist.Normal(pyro.param("prior", tensor(0.5)), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_one(x):
    pyro.sample("z", dist.Normal(loc(), pyro.param("scale", tensor(0.7), constraint=constraints.positive)))


def one_for_each(x):
    """All sites are inside of the plate: a bound for each row."""
    with pyro.plate("data", 8, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("prior", tensor(0.5)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_of_each(x):
    with pyro.plate("data", 8, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(loc() * x, 0.5))


def discrete(x):
    k = pyro.sample("k", dist.Categorical(logits=pyro.param("prior", torch.zeros(3))))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("locs", tensor([-1.0, 0.0, 1.0]))[k], 1.0), obs=x)


def scored_guide(x):
    pyro.sample("k", dist.Categorical(logits=pyro.param("logits", tensor([0.1, 0.5, -0.3]))))


def mixed(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Bernoulli(0.4))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)


def mixed_guide(x):
    pyro.sample("z", dist.Normal(loc(), 1.0))
    pyro.sample("b", dist.Bernoulli(pyro.param("p", tensor(0.3), constraint=constraints.unit_interval)))


def without_gradient(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


PAIRS = {
    "latent": (one_latent, guide_of_one),
    "local": (one_for_each, guide_of_each),
    "discrete": (discrete, scored_guide),
    "mixed": (mixed, mixed_guide),
}


def value_and_gradients(run):
    pyro.set_rng_seed(3)
    parameters = dict(pyro.get_param_store().named_parameters())
    for p in parameters.values():
        p.grad = None
    value = run()
    return value, {name: p.grad for name, p in parameters.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, -1.0])
@pytest.mark.parametrize("particles", [(1, False), (3, False), (3, True)], ids=["one", "several", "vectorised"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_value_and_gradients_are_those_of_pyro(pair, particles, alpha):
    number, vectorize = particles
    loss = RenyiELBO(alpha=alpha, num_particles=number, vectorize_particles=vectorize, max_plate_nesting=1)
    for fn in pair:
        fn(X)
    wanted, wanted_gradients = value_and_gradients(lambda: loss.loss_and_grads(*pair, X))

    def ours():
        value = renyi_loss(loss, *pair, X)
        value.backward()
        return value.item()

    found, gradients = value_and_gradients(ours)
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in wanted_gradients.values()) or number == 1


def test_a_program_without_parameters_has_a_value():
    loss = RenyiELBO(num_particles=2)
    assert renyi_loss(loss, without_gradient, without_gradient, X).item() == pytest.approx(0.0, abs=1e-6)


def test_a_site_that_is_reparametrised_in_part_is_refused():
    def model(x):
        pyro.sample("z", dist.Gamma(2.0, 1.0))

    def guide(x):
        pyro.sample("z", ShapeAugmentedGamma(pyro.param("a", tensor(2.0)), tensor(1.0)))

    loss = RenyiELBO(num_particles=2)
    with pytest.raises(NotImplementedError, match=r"'z'.*Trace_ELBO"):
        renyi_loss(loss, model, guide, X)
