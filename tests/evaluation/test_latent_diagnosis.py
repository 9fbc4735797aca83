"""Diagnoses of latent variables, where information, divergence and unused coordinates are known."""

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints
from torch.testing import assert_close

from pyro_genmodels import VAE, BernoulliLikelihood, CategoricalLikelihood, Flow, Mixed, NormalLikelihood
from pyro_genmodels.evaluation import diagnose_vae
from pyro_genmodels.families import FlowPosterior

SLOPES, SCALES = torch.tensor([2.0, 0.5, 0.0]), torch.tensor([0.5, 1.0, 1.0])


def model(x):
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)


def guide(x):
    loc = SLOPES * torch.cat([x, x[:, :1]], 1)
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(loc, SCALES).to_event(1))


def test_values_are_those_of_a_linear_guide():
    """Right values: closed forms. Information and distortion within 5 standard errors: a false alarm in 1e-6 of the seeds."""
    x = torch.randn(1500, 2)
    found = diagnose_vae((model, guide), x, num_samples=4)
    moments = torch.stack([x[:, 0], x[:, 1], x[:, 0]], 1).square().mean(0)
    kl = (SCALES**2 + SLOPES**2 * moments - 1) / 2 - SCALES.log()
    assert_close(found.kl["z"], kl)
    assert_close(found.activity["z"], SLOPES**2 * torch.stack([x[:, 0], x[:, 1], x[:, 0]], 1).var(0))
    assert found.active["z"].tolist() == [True, True, False]
    assert found.inactive == {"z": [2]}
    information = (1 + SLOPES**2 / SCALES**2).log().sum().item() / 2
    assert found.mutual_information == pytest.approx(information, abs=5 * 1.5 / 1500**0.5)
    gap = (SLOPES[:2] - 1) * x
    distortion = (gap.square() + SCALES[:2] ** 2).sum(1).mean() / 2 + torch.log(torch.tensor(2 * torch.pi))
    assert found.distortion == pytest.approx(distortion.item(), abs=5 * 3 / 6000**0.5)
    assert found.elbo == pytest.approx(-found.rate - found.distortion)
    assert "2 of 3 coordinates active; inactive: 2" in str(found)
    assert repr(found).startswith("<bound ")
    assert len(repr(found)) < 300


def test_a_decoder_that_ignores_z_lets_its_coordinates_die():
    vae, x = VAE((4,), latent_dim=2, hidden=(8,), standardize=False), torch.randn(200, 4)
    for p in vae.encoder.parameters():
        torch.nn.init.zeros_(p)
    found = diagnose_vae(vae, x)
    assert found.rate == pytest.approx(0.0, abs=1e-6)
    assert found.inactive == {"z": [0, 1]}
    assert found.mutual_information == pytest.approx(0.0, abs=1e-5)


def test_means_by_draws_have_no_activity_where_they_are_the_same_for_all_rows():
    """A flow knows no mean: the variance of the means of draws, less its expectation, is 0 but for chance."""
    posterior = FlowPosterior(num_features=3)
    vae, x = VAE((4,), latent_dim=2, hidden=(8,), posterior=posterior, standardize=False), torch.randn(400, 4)
    for p in vae.encoder.parameters():
        torch.nn.init.zeros_(p)
    found = diagnose_vae(vae, x, num_samples=8)
    assert found.kl["z"].shape == ()
    assert found.inactive == {"z": [0, 1]}
    # of 400 means of 8 draws of variance 1, five standard errors
    assert found.activity["z"].max() < 5 * (1 / 8) * (2 / 400) ** 0.5


@pytest.mark.parametrize("context", [0, 2])
def test_images_are_reconstructed_and_traversed_and_plotted(context):
    vae = VAE((1, 4, 4), context=context, latent_dim=3, likelihood=BernoulliLikelihood(), hidden=(8,))
    x = torch.randint(2, (20, 1, 4, 4)).float()
    args = (torch.randn(20, 2),) if context else ()
    found = diagnose_vae(vae, x, *args, num_samples=2, batch_size=7)
    assert found.reconstructions.shape == (8, 1, 4, 4)
    assert found.traversals.shape == (3, 9, 1, 4, 4)
    assert (found.traversals[:, 4] - found.traversals[0, 4]).abs().max() < 1  # probabilities
    assert len((figure := found.plot()).axes) == 3
    assert plt.fignum_exists(figure.number)  # plt.show() shows it
    assert len(diagnose_vae((vae.model, vae.guide), x, *args).plot().axes) == 2
    plt.close("all")


def test_contexts_by_name_are_traversed_as_those_by_position():
    vae = VAE((4,), context=2, latent_dim=3, likelihood=BernoulliLikelihood(), hidden=(8,))
    x, context = torch.randint(2, (20, 4)).float(), torch.randn(20, 2)
    found = diagnose_vae(vae, x, context=context, num_samples=2).traversals
    assert_close(found, diagnose_vae(vae, x, context, num_samples=2).traversals)


UNITS, MEANS = torch.tensor([0.001, 1.0, 1000.0]), torch.tensor([1.0, -0.5, 2.0])


class Linear(nn.Module):
    """A decoder whose means are linear in z, with a deviation of about 1."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(MEANS.clone())

    def forward(self, z):
        return torch.stack([self.slope * z, torch.zeros_like(self.slope * z)], -1)


@pytest.mark.parametrize("missing", [False, True])
def test_reconstructions_and_traversals_are_means_where_these_are_known(missing):
    """Means are on a line, along which z goes. Those of 100 draws are off by a tenth of the deviation."""
    vae, x = VAE((3,), latent_dim=1, missing=missing, decoder=Linear()), UNITS * (5 + torch.randn(30, 3))
    vae.standardize(x)
    z = torch.randn(50, 1)
    assert_close(vae.decode(z).mean, vae.loc + vae.scale * MEANS * z)
    found = diagnose_vae(vae, x, num_samples=1)
    for means in (found.reconstructions, found.traversals[0]):
        of_each = (means - vae.loc) / (vae.scale * MEANS)
        assert_close(of_each, of_each[:, :1].expand(-1, 3), atol=1e-4, rtol=1e-4)
        assert of_each.std() > 0.01


def test_classes_and_data_on_an_interval_have_means_of_draws():
    kinds = Mixed([NormalLikelihood(), CategoricalLikelihood(3)])
    vae, x = VAE((2,), latent_dim=1, likelihood=kinds, hidden=(8,)), torch.stack([torch.randn(30), torch.arange(30.0) % 3], 1)
    vae.standardize(x)
    classes = diagnose_vae(vae, x, num_samples=1).traversals[..., 1]
    assert ((classes > 0) & (classes < 2)).all()
    vae, x = VAE((2,), latent_dim=1, support=constraints.unit_interval, hidden=(8,)), torch.rand(20, 2)
    vae.standardize(x)
    with pytest.raises(NotImplementedError, match="mean under the transform"):
        vae.decode(torch.zeros(1, 1)).mean  # noqa: B018
    found = diagnose_vae(vae, x, num_samples=1).reconstructions
    assert ((found > 0) & (found < 1)).all()


def test_batches_of_rows_give_the_values_of_all():
    vae, x = VAE((4,), latent_dim=2, hidden=(8,)), torch.randn(50, 4)
    whole, parts = (diagnose_vae(vae, x, batch_size=size) for size in (50, 7))
    assert_close(whole.kl["z"], parts.kl["z"])
    assert_close(whole.activity["z"], parts.activity["z"])


def test_fits_without_latent_variables_of_rows_are_refused():
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match="latent variables in the plate of the rows"):
        diagnose_vae(Flow((2,)), x)

    def shared(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="diagnose_posterior"):
        diagnose_vae((shared, lambda x: pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))), x)
