"""A semi-supervised VAE: its context is a class, which Pyro enumerates where it is unknown (Kingma et al., arXiv 1406.5298)."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.testing import assert_close

from pyro_genmodels import VAE, BernoulliLikelihood, Labels
from pyro_genmodels.families import FlowPosterior, FullNormalPosterior, NormalPosterior

CLASSES, UNKNOWN = 3, 7


def parts(posterior, likelihood=None, event_shape=(4,)):
    """Return a VAE of events given their class, and a classifier of events."""
    vae = VAE(
        event_shape,
        context=Labels(CLASSES),
        latent_dim=2,
        hidden=(8,),
        likelihood=likelihood,
        posterior=posterior,
        standardize=False,
    )
    return vae, nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(event_shape).numel(), CLASSES))


def program(vae, classifier):
    """Return a model and guide of rows whose class is known and rows whose class is enumerated."""

    def model(x, y, more):
        for name, rows, known in (("labelled", x, y), ("unlabelled", more, None)):
            with pyro.plate(name, len(rows)):
                label = pyro.sample(f"y_{name}", dist.Categorical(torch.ones(CLASSES)), obs=known)
                z = pyro.sample(f"z_{name}", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample(f"x_{name}", vae.decode(z, label), obs=rows)

    @config_enumerate
    def guide(x, y, more):
        with pyro.plate("labelled", len(x)):
            pyro.sample("z_labelled", vae.posterior(x, y))
        with pyro.plate("unlabelled", len(more)):
            label = pyro.sample("y_unlabelled", dist.Categorical(logits=classifier(more)))
            pyro.sample("z_unlabelled", vae.posterior(more, label))

    return model, guide


def by_hand(vae, classifier, x, y, more, z, z_more):
    """Return minus the bound, with a sum over classes, for draws z (n, 2) and z_more (classes, m, 2)."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def bound(x, y, z):
        p, q = prior.log_prob(z) + vae.decode(z, y).log_prob(x), vae.posterior(x, y).log_prob(z)
        return p - q - torch.tensor(float(CLASSES)).log()

    log_q = classifier(more).log_softmax(-1)
    total = bound(x, y, z).sum()
    for k in range(CLASSES):
        label = torch.full((len(more),), k)
        total = total + (log_q[:, k].exp() * (bound(more, label, z_more[k]) - log_q[:, k])).sum()
    return -total


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("posterior", "likelihood", "event_shape"),
    [
        (NormalPosterior(), None, (4,)),
        (FullNormalPosterior(), BernoulliLikelihood(), (2, 2)),
        pytest.param(FlowPosterior(num_features=4), None, (4,), marks=pytest.mark.slow),
    ],
    ids=["normal", "full, images", "flow"],
)
def test_the_enumerated_bound_and_its_gradient_are_those_of_a_sum_over_classes(posterior, likelihood, event_shape):
    vae, classifier = parts(posterior, likelihood, event_shape)
    x, more = (torch.randint(2, (n, *event_shape)).to(torch.float64) for n in (5, UNKNOWN))
    y = torch.randint(CLASSES, (5,))
    model, guide = program(vae, classifier)
    parameters = [*vae.parameters(), *classifier.parameters()]

    pyro.set_rng_seed(0)
    found = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, guide, x, y, more)
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(pyro.poutine.enum(guide, first_available_dim=-2)).get_trace(x, y, more)
    z, z_more = (trace.nodes[name]["value"] for name in ("z_labelled", "z_unlabelled"))
    assert z_more.shape == (CLASSES, UNKNOWN, 2)
    wanted = by_hand(vae, classifier, x, y, more, z, z_more)

    assert_close(found, wanted)
    for one, other in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert_close(one, other)


def test_decode_and_posterior_broadcast_a_class_for_all_rows():
    vae, _ = parts(None)
    labels, z, x = torch.arange(CLASSES).unsqueeze(1), torch.randn(5, 2), torch.randn(5, 4)
    decoded, encoded = vae.decode(z, labels), vae.posterior(x, labels)
    assert decoded.batch_shape == encoded.batch_shape == (CLASSES, 5)
    for k in range(CLASSES):
        label = torch.full((5,), k)
        assert_close(decoded.log_prob(x)[k], vae.decode(z, label).log_prob(x))
        assert_close(encoded.mean[k], vae.posterior(x, label).mean)
    assert vae.decode(torch.randn(2), labels).batch_shape == (CLASSES, 1)
    with pytest.raises(ValueError, match=r"rows of batch shape \(5,\) and contexts of batch shape \(4,\)"):
        vae.posterior(x, torch.zeros(4, dtype=torch.long))
