"""Log densities of many points at once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from pyro_genmodels import log_density
from pyro_genmodels.infer.compiled import Captured
from pyro_genmodels.infer.compiled import batched as batched_density
from pyro_genmodels.infer.compiled.batched import BatchedDensity

DATA = torch.linspace(-1, 1, 6)


def observed(likelihood, y):
    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", likelihood(z), obs=torch.as_tensor(y))

    return model


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rows", 6):
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 1, 2, 2, 2, 1]))


def hidden_markov(z):
    transition = torch.stack([z, torch.zeros(2)])
    return dist.DiscreteHMM(torch.zeros(2), transition, dist.Normal(torch.tensor([0.0, 1.0]), 1.0))


def in_place(z):
    loc = torch.zeros(3, 3)
    loc[:, 1] = z[0]
    loc[0, ::2] = z
    loc.t().add_(z.sum().exp())
    loc.diagonal().copy_(z[1] * torch.ones(3))
    return dist.Normal(loc.mul_(z[0]), 1.0).to_event(2)


def triangular(z):
    tril = torch.zeros(2, 2)
    tril[tuple(torch.tril_indices(2, 2))] = torch.cat([z.exp(), z[:1].exp()])
    return dist.MultivariateNormal(torch.zeros(2), scale_tril=tril)


MODELS = {
    "simplex": simplex,
    "multinomial": observed(lambda z: dist.Multinomial(5, logits=z), [2.0, 3.0]),
    "ordered logistic": observed(lambda z: dist.OrderedLogistic(z[0], torch.tensor([-1.0, 1.0])), 1),
    "hidden Markov": observed(hidden_markov, DATA[:3]),
    "in place": observed(in_place, torch.zeros(3, 3)),
    "triangular": observed(triangular, DATA[:2]),
    "a mask": observed(lambda z: dist.Normal(torch.zeros(2).masked_fill(z > 0, 1.0) + z, 1.0).to_event(1), DATA[:2]),
    "an embedding": observed(
        lambda z: dist.Normal(torch.nn.functional.embedding(torch.tensor([0, 1]), z.expand(3, 2)), 1.0).to_event(2),
        torch.zeros(2, 2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_many_points_at_once_have_the_densities_of_each(name):
    density = log_density(MODELS[name], mode=Captured(script=False))
    batched = BatchedDensity(density, mode=Captured(script=False))
    z = torch.linspace(-0.7, 0.9, 5 * density.dim).reshape(5, -1)
    values, gradients = batched(z)
    assert batched.graph(z) is not None  # mapped, without a warning of a loop over points
    for point, value, gradient in zip(z, values, gradients, strict=True):
        expected, expected_gradient = density(point)
        assert_close(value, expected, rtol=1e-5, atol=1e-5)
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_more_points_than_a_block_have_no_graph():
    model = observed(lambda z: dist.Normal(z, 1.0).to_event(1), DATA[:2])
    density = log_density(model, mode=Captured(script=False))
    batched = BatchedDensity(density, mode=Captured(script=False), block=4)
    z = torch.linspace(-0.7, 0.9, 10).reshape(5, 2)
    assert batched.graph(z) is None
    assert_close(batched(z)[0], torch.stack([density(point)[0] for point in z]))
    assert batched.num_gradients == 5


def test_points_that_make_large_tensors_are_computed_in_smaller_blocks(monkeypatch):
    monkeypatch.setattr(batched_density, "MAX_ELEMENTS", 2 * len(DATA))
    table = torch.ones(40, len(DATA))  # what is not computed from the point does not count

    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0)) + table.square().sum() - table.sum()
        with pyro.plate("rows", len(DATA)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=DATA)

    density = log_density(model, mode=Captured(script=False))
    z = torch.linspace(-1, 1, 5)[:, None]
    sizes = []
    mapped_over = BatchedDensity._mapped_over
    monkeypatch.setattr(BatchedDensity, "_mapped_over", lambda self, z: sizes.append(len(z)) or mapped_over(self, z))
    batched = BatchedDensity(density, mode=Captured(script=False))
    values, gradients = batched(z)
    assert sizes == [2, 2, 1]
    assert_close(values, torch.stack([density(point)[0] for point in z]))
    assert_close(gradients, torch.stack([density(point)[1] for point in z]))
    for in_parts, at_once in zip(batched.graph(z)(z), (values, gradients), strict=True):
        assert_close(in_parts, at_once)
    assert sizes == 2 * [2, 2, 1]


def drawn_inside():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.randn(()))


def with_dropout():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(torch.nn.functional.dropout(loc), 1.0).to_event(1), obs=DATA[:3])


@pytest.mark.parametrize("model", [drawn_inside, with_dropout])
def test_a_density_that_draws_random_numbers_is_refused(model):
    density = log_density(model, mode=Captured())
    with pytest.raises(ValueError, match="random numbers that are not those of a sample site"):
        density(torch.zeros(density.dim))


def test_random_numbers_without_an_effect_are_no_matter():
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        torch.randn(3)
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    value, _ = log_density(model, mode=Captured())(torch.zeros(1))
    assert_close(value, 2 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)) - 0.5)
