"""Hierarchical VAEs, against a linear Gaussian one whose evidence and posterior are known."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.testing import assert_close

from pyro_genmodels import BernoulliLikelihood, Labels, NormalLikelihood, log_likelihood, train
from pyro_genmodels.evaluation import diagnose_vae
from pyro_genmodels.families import HierarchicalVAE
from pyro_genmodels.infer import KLWeightedELBO
from pyro_genmodels.infer.compiled import Captured, CapturedLoss
from pyro_genmodels.training import checkpoints

SCALE = 0.5
A = {2: [0.8], 1: [0.6, -0.5]}
"""Weights of the location of z2 given z3, and of z1 given z2 and z3."""
DEVIATIONS = {3: 1.0, 2: 0.7, 1: 0.4}
B = [[1.0, 0.3, 0.0], [-0.5, 0.8, 0.2], [0.0, 0.4, -1.0]]
"""Weights of the location of x given z1, z2 and z3."""


def raw(scale):
    """Return the unconstrained number that stands for a deviation."""
    return (torch.as_tensor(scale) - 1e-5).expm1().log() - (torch.tensor(1.0).expm1()).log()


def linear_vae(**options):
    """Return a VAE of three layers of length 1 whose variables and data are jointly normal."""
    vae = HierarchicalVAE(
        (3,),
        latent_dims=(1, 1, 1),
        likelihood=NormalLikelihood(scale=SCALE),
        num_features=3,
        hidden=(),
        standardize=False,
        **options,
    )
    with torch.no_grad():
        vae.decoder.mlp[-1].weight.copy_(torch.tensor(B))
        vae.decoder.mlp[-1].bias.zero_()
        for number, weights in A.items():
            weights = torch.tensor(weights)
            down = vae.layers[number - 1].down[-1]
            down.weight.copy_(torch.stack([weights, torch.zeros_like(weights)]))
            down.bias.copy_(torch.stack([torch.tensor(0.0), raw(DEVIATIONS[number])]))
    return vae


def joint_covariance():
    """Return the covariance of (z1, z2, z3, x), (6, 6)."""
    noise = torch.diag(torch.tensor([DEVIATIONS[1], DEVIATIONS[2], DEVIATIONS[3], SCALE, SCALE, SCALE]))
    weights = torch.zeros(6, 6)
    weights[0, 1:3], weights[1, 2:3], weights[3:, :3] = (torch.tensor(part) for part in (A[1], A[2], B))
    mixed = torch.linalg.solve(torch.eye(6) - weights, noise)
    return mixed @ mixed.T


def set_exact_posterior(vae):
    """Set the guide to the posterior: each variable given x and those above it is normal, with a location linear in them."""
    covariance = joint_covariance()
    with torch.no_grad():
        vae.encoder.mlp[-1].weight.copy_(torch.eye(3))
        vae.encoder.mlp[-1].bias.zero_()
        for up in vae.up:
            up[-1].weight.zero_(), up[-1].bias.zero_()
        for i, layer in enumerate(vae.layers):
            given = [3, 4, 5, *range(i + 1, 3)]
            weights = torch.linalg.solve(covariance[given][:, given], covariance[given, i])
            deviation = (covariance[i, i] - weights @ covariance[given, i]).sqrt()
            prior = torch.cat([torch.zeros(3), torch.tensor(A.get(i + 1, []))])
            layer.correction[-1].weight.copy_(torch.stack([weights - prior, torch.zeros_like(weights)]))
            before = raw(DEVIATIONS[i + 1]) if i < 2 else torch.tensor(0.0)
            layer.correction[-1].bias.copy_(torch.stack([torch.tensor(0.0), raw(deviation) - before]))
    return vae


def evidence():
    return dist.MultivariateNormal(torch.zeros(3), joint_covariance()[3:, 3:])


def assert_bracketed(found, truth):
    """Log-likelihoods are within six standard errors of the truth, and their bias, half the square of an error."""
    assert found.std_error.max() < 0.1
    assert ((found.values - truth).abs() < 6 * found.std_error + found.std_error.square()).all()


@pytest.mark.usefixtures("float64")
def test_with_the_posterior_as_guide_every_draw_has_the_evidence_as_its_weight():
    vae, x = set_exact_posterior(linear_vae()), evidence().sample((20,))
    found = log_likelihood(vae, x, num_samples=2)
    assert_close(found.values, evidence().log_prob(x), atol=1e-8, rtol=0)
    found = diagnose_vae(vae, x, num_samples=1)
    posterior = joint_covariance()[3:, 2] @ torch.linalg.inv(joint_covariance()[3:, 3:])
    q = dist.Normal(x @ posterior, (1 - posterior @ joint_covariance()[3:, 2]).sqrt())
    kl = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros(()), 1.0)).mean()
    assert_close(found.kl["z3"], kl[None], atol=1e-8, rtol=0)  # of the first variable that is sampled, without an error
    assert list(found.kl) == ["z3", "z2", "z1"]
    assert found.traversals is None


@pytest.mark.usefixtures("float64")
def test_the_likelihood_brackets_the_evidence_where_the_guide_is_the_prior():
    """Six standard errors of the log of a mean of 20 000 weights, and its bias: a false alarm of 1e-8 for five rows."""
    vae, x = linear_vae(), evidence().sample((5,))
    found = log_likelihood(vae, x, num_samples=20_000)
    assert found.kind == "lower bound"
    assert_bracketed(found, evidence().log_prob(x))
    bound = Trace_ELBO(num_particles=500, vectorize_particles=True, max_plate_nesting=1).loss(vae.model, vae.guide, x)
    assert -bound < evidence().log_prob(x).sum() - 0.5


@pytest.mark.parametrize("context", [0, 2, Labels(3)], ids=["none", "vectors", "labels"])
def test_the_guide_begins_as_the_prior_and_samples_in_the_order_of_the_model(context):
    vae, x = HierarchicalVAE((2, 2), latent_dims=(3, 2, 2), context=context, hidden=(8,)), torch.randn(10, 2, 2)
    args = (x,) if context == 0 else (x, torch.randn(10, 2) if context == 2 else torch.randint(3, (10,)))
    guide = pyro.poutine.trace(vae.guide).get_trace(*args)
    model = pyro.poutine.trace(pyro.poutine.replay(vae.model, guide)).get_trace(*args)
    names = [[name for name in trace.stochastic_nodes if name != "data"] for trace in (guide, model)]
    assert names == [["z3", "z2", "z1"]] * 2
    guide.compute_log_prob(), model.compute_log_prob()
    for name in names[0]:
        assert_close(guide.nodes[name]["log_prob"], model.nodes[name]["log_prob"], atol=1e-4, rtol=1e-4)
    assert vae(*args[1:]).sample((4,)).shape == ((4, 2, 2) if context == 0 else (4, 10, 2, 2))
    assert [z.shape for z in vae.guide(*args)] == [(10, 3), (10, 2), (10, 2)]
    assert vae.guide(None, *args[1:]) is None


def test_variables_that_are_set_reach_the_data_and_what_is_below_them():
    vae = linear_vae()
    with pyro.plate("draws", 4000, dim=-2), pyro.condition(data={"z3": torch.full((4000, 1, 1), 2.0)}):
        x = vae.model(size=1)
    given = [2]
    covariance = joint_covariance()
    mean = covariance[3:, given] @ torch.full((1,), 2.0)
    error = (covariance[3:, 3:].diagonal() / 4000).sqrt()
    assert ((x.mean((0, 1)) - mean).abs() < 6 * error).all()  # a false alarm of 1e-8


@pytest.mark.parametrize("context", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_captured_pickled_and_rebuilt_from_a_checkpoint(context, tmp_path):
    vae = HierarchicalVAE((2, 3), context=context, latent_dims=(3, 2), likelihood=BernoulliLikelihood(), hidden=(8,))
    x = torch.randint(2, (20, 2, 3)).float()
    args = (x, torch.randn(20, 2)) if context else (x,)
    train(vae, x, **({"context": args[1]} if context else {}), epochs=1, progress=False)
    run = CapturedLoss(vae.model, vae.guide, Trace_ELBO(), mode=Captured())
    run(*args)  # the capture
    checkpoints.save(tmp_path / "vae", vae)
    losses = []
    for family in (vae, pickle.loads(pickle.dumps(vae)), checkpoints.load(tmp_path / "vae")):
        pyro.set_rng_seed(0)
        losses.append(Trace_ELBO().differentiable_loss(family.model, family.guide, *args))
    pyro.set_rng_seed(0)
    assert_close(torch.stack(losses), run(*args)[0].expand(3))
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_networks_of_ones_own_read_images_and_contexts():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 4 + 2, 5))

        def forward(self, x, context):
            flat = self.layers[1](self.layers[0](x))
            return self.layers[2](torch.cat([flat, context], -1))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 + 2, 16)

        def forward(self, z, context):
            return self.layer(torch.cat([z, context], -1)).unflatten(-1, (1, 4, 4))

    vae = HierarchicalVAE(
        (1, 4, 4),
        context=2,
        latent_dims=(2, 1),
        likelihood=BernoulliLikelihood(),
        num_features=5,
        encoder=Encoder(),
        decoder=Decoder(),
    )
    x, context = torch.randint(2, (6, 1, 4, 4)).float(), torch.randn(6, 2)
    loss = KLWeightedELBO(free_bits=0.1).differentiable_loss(vae.model, vae.guide, x, context)
    loss.backward()
    assert vae.encoder.layers[2].weight.grad is not None
    assert vae(context).sample((3,)).shape == (3, 6, 1, 4, 4)
    assert vae.decode(torch.zeros(7, 6, 3), context).batch_shape == (7, 6)
    with pytest.raises(ValueError, match=r"decode wants z of shape \(..., 3\), but found \(6, 2\)"):
        vae.decode(torch.zeros(6, 2), context)


@pytest.mark.usefixtures("float64")
def test_missing_coordinates_have_no_part_in_the_likelihood():
    vae, x = linear_vae(missing=True), evidence().sample((4,))
    x[:, 1] = torch.nan
    some = [0, 2]
    truth = dist.MultivariateNormal(torch.zeros(2), joint_covariance()[3:, 3:][some][:, some]).log_prob(x[:, some])
    assert_bracketed(log_likelihood(vae, x, num_samples=20_000), truth)  # a false alarm of 1e-8


@pytest.mark.slow
def test_trained_on_linear_gaussian_data_the_bound_reaches_the_evidence():
    pyro.set_rng_seed(0)
    x = evidence().sample((4000,))
    vae = HierarchicalVAE((3,), latent_dims=(2, 2), hidden=(16,), num_features=16)
    train(vae, x, epochs=60, batch_size=100, objective=KLWeightedELBO(), seed=0, progress=False)
    test = evidence().sample((1000,))
    gap = evidence().log_prob(test) - log_likelihood(vae, test, num_samples=100).values
    assert gap.mean() < 0.05


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"latent_dims": (3,)}, ValueError, r"two or more latent variables.*Use VAE\(..., latent_dim=3\)"),
        ({"latent_dims": 3}, TypeError, "latent_dims as a sequence of positive integers"),
        ({"latent_dims": (3, 0)}, TypeError, "latent_dims as a sequence of positive integers"),
        ({"num_features": 0}, ValueError, "num_features"),
        ({"encoder": nn.Linear}, TypeError, "HierarchicalVAE wants a torch.nn.Module as its encoder.*the class Linear"),
        ({"decoder": 3}, TypeError, "HierarchicalVAE wants a torch.nn.Module as its decoder.*int"),
        ({"likelihood": "normal"}, TypeError, "likelihood"),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        HierarchicalVAE((3,), **options)


def test_an_encoder_of_the_wrong_shape_is_refused():
    vae = HierarchicalVAE((3,), num_features=5, encoder=nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"encoder should return a tensor of shape \(2, 5\), but it returned \(2, 4\)"):
        vae.guide(torch.randn(2, 3))
