"""Vector-quantised VAEs, against bounds, gradients and moving averages that are computed by hand."""

import pickle
from functools import partial
from math import log

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import PyroOptim
from torch import nn
from torch.testing import assert_close

from pyro_genmodels import (
    Autoregressive,
    BernoulliLikelihood,
    CategoricalLikelihood,
    Flow,
    Labels,
    NormalLikelihood,
    log_likelihood,
    to_arviz,
    train,
)
from pyro_genmodels.evaluation import diagnose_vae
from pyro_genmodels.families import VectorQuantizedVAE
from pyro_genmodels.infer import ImportanceWeightedELBO
from pyro_genmodels.infer.compiled import Captured, CompiledSVI
from pyro_genmodels.nn.codebook import Codebook
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import Checkpoint, checkpoints

BETA = 0.7


def autoregressive(shape, codes, **options):
    return Autoregressive(shape, likelihood=CategoricalLikelihood(codes), hidden=(16,), **options)


def small(*, event_shape=(3,), codes=5, latent_shape=(2, 2), **options):
    options = {"hidden": (8,), "code_dim": 3, "commitment": BETA, **options}
    return VectorQuantizedVAE(event_shape, codes=codes, latent_shape=latent_shape, **options)


def parts_by_hand(vae, x, context=None):
    """Return the encoder's vectors of standardised data, their codes, and the vectors of these."""
    inputs = ((x - vae.loc) / vae.scale,) if context is None else ((x - vae.loc) / vae.scale, context)
    e = vae.encoder(*inputs).reshape(len(x), *vae.latent_shape, -1)
    gaps = (e.unsqueeze(-2) - vae.codebook.vectors).square().sum(-1)
    z = gaps.argmin(-1)
    return e, z, vae.codebook.vectors[z]


def reconstruction_by_hand(vae, x, c, *context):
    """Return log p(x | c) under a normal of a known deviation of the standardised data."""
    loc = vae.decoder(c, *context).squeeze(-1)
    return dist.Normal(vae.loc + vae.scale * loc, vae.scale * 0.5).log_prob(x).sum(-1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("conditional", [False, True])
def test_the_likelihood_is_the_log_probability_of_the_codes_and_of_the_data_given_them(conditional):
    context, options = torch.randn(20, 2) if conditional else None, {"context": 2, "standardize_context": False}
    prior = autoregressive((2, 2), 5, **options) if conditional else None
    vae = small(likelihood=NormalLikelihood(scale=0.5), prior=prior, **(options if conditional else {}))
    x = 3 + 2 * torch.randn(20, 3)
    args = (x,) if context is None else (x, context)
    vae.standardize(x)
    _, z, c = parts_by_hand(vae, *args)
    log_p = prior(context).log_prob(z) if conditional else torch.full((20,), -4 * log(5))
    expected = log_p + reconstruction_by_hand(vae, x, c, *args[1:])
    found = log_likelihood(vae, *args)
    assert_close(found.values, expected.detach())
    assert (found.kind, found.num_samples, found.std_error.max()) == ("lower bound", 1, 0)
    assert vae.codes(*args).equal(z)
    for mode in (vae.train, vae.eval):  # also of a loss with gradients
        mode()
        weights = [*vae.encoder.parameters(), *vae.decoder.parameters()]
        losses = [loss.differentiable_loss(vae.model, vae.guide, *args) for loss in (Trace_ELBO(), ImportanceWeightedELBO(3))]
        assert_close(torch.stack(losses), -expected.sum().expand(2))
        if mode == vae.eval:  # otherwise codes move in between
            for one, other in zip(*(torch.autograd.grad(loss, weights) for loss in losses), strict=True):
                assert_close(one, other)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("decay", [0.99, None])
def test_the_gradient_of_the_encoder_is_that_of_the_decoder_and_of_the_commitment(decay, elbo):
    vae, x = small(likelihood=NormalLikelihood(scale=0.5), decay=decay, restart=0.0), torch.randn(6, 3)
    vae.standardize(x)
    e, z, c = parts_by_hand(vae, x)
    c = c.detach().requires_grad_()
    weights = list(vae.encoder.parameters())
    at_code, *of_decoder = torch.autograd.grad(-reconstruction_by_hand(vae, x, c).sum(), [c, *vae.decoder.parameters()])
    by_hand = torch.autograd.grad(e, weights, at_code + 2 * BETA * (e - c).detach())
    elbo().differentiable_loss(vae.model, vae.guide, x).backward()
    for found, expected in zip([*weights, *vae.decoder.parameters()], [*by_hand, *of_decoder], strict=True):
        assert_close(found.grad, expected)
    if decay is None:  # the codebook loss, and nothing of the decoder
        distance = (e.detach() - vae.codebook.vectors[z]).square().sum()
        assert_close(vae.codebook.shifts.grad, *torch.autograd.grad(distance, vae.codebook.shifts))


@pytest.mark.usefixtures("float64")
def test_a_minibatch_scales_the_commitment_as_it_scales_the_bound():
    vae, x = small(), torch.randn(6, 3)
    vae.standardize(x)
    gradients = []
    for size in (6, 18):
        loss = Trace_ELBO().differentiable_loss(vae.eval().model, vae.guide, x, size=size)
        gradients.append(torch.autograd.grad(loss, [*vae.encoder.parameters()]))
    for one, three in zip(*gradients, strict=True):
        assert_close(three, 3 * one)


@pytest.mark.usefixtures("float64")
def test_codes_are_the_moving_averages_of_the_vectors_they_stand_for():
    """The paper's formulas with numbers N and sums m, which the codebook does not store."""
    decay, vae = 0.9, small(decay=0.9, restart=0.0, codes=4, latent_shape=(1,))
    x = torch.randn(3, 30, 3)
    vae.standardize(x.flatten(0, 1))
    counts, sums, vectors = torch.zeros(4), torch.zeros(4, 3), vae.codebook.vectors.clone()
    for batch in x:
        e, z, _ = parts_by_hand(vae, batch)
        chosen = torch.nn.functional.one_hot(z[:, 0], 4).to(e)
        counts = decay * counts + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ e[:, 0].detach()
        vectors = torch.where(counts[:, None] > 0, sums / counts[:, None], vectors)
        before = vae.codebook.vectors.clone()
        loss = Trace_ELBO().differentiable_loss(vae.model, vae.guide, batch)
        assert vae.codebook.vectors.equal(before)  # by a loss alone
        loss.backward()
        assert_close(vae.codebook.vectors, vectors)
        assert_close(vae.codebook.usage, counts)
    vae.eval()
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, batch).backward()
    assert_close(vae.codebook.vectors, vectors)


def test_autocast_does_not_change_the_nearest_codes():
    codebook, e = Codebook("Test", 512, 16), torch.randn(2000, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = codebook.nearest(e)
    assert z.equal(torch.cdist(e.double(), codebook.vectors.double()).argmin(-1))


def test_unused_codes_are_moved_to_vectors_that_are_far_from_their_codes():
    codebook = Codebook("Test", 4, 2, decay=0.9, restart=0.5)
    codebook.vectors.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [50.0, 0.0], [0.0, 50.0]]))
    codebook.usage.copy_(torch.tensor([4.0, 4.0, 0.5, 0.0]))
    e = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 7.0], [0.0, 0.0]])
    codebook.update(e, codebook.nearest(e))
    usage = torch.tensor([0.9 * 4 + 0.2, 0.9 * 4 + 0.2, 0.45, 0.0])
    assert codebook.vectors[2:].equal(torch.tensor([[1.0, 7.0], [1.0, 7.0]]))  # of the other vectors the distance is 0
    assert_close(codebook.vectors[:2], torch.tensor([[0.0, 0.0], [1.0, 0.1 * 7 / 3.8]]))
    assert_close(codebook.usage, torch.where(usage < 0.5 * usage.mean(), usage.mean(), usage))


def test_restarted_codes_are_drawn_in_proportion_to_squared_distances():
    """Of 2000 codes a share of .9 goes to the vector at distance 3, within 6 standard errors: a false alarm of 2e-9."""
    codebook = Codebook("Test", 2000, 1)
    codebook.vectors.copy_(100.0 + torch.arange(2000.0).unsqueeze(-1))
    codebook.vectors[0] = 0.0
    pyro.set_rng_seed(0)
    codebook.update(torch.tensor([[1.0], [3.0], [0.0]]), torch.tensor([0, 0, 0]))
    drawn = codebook.vectors[1:, 0]
    assert set(drawn.tolist()) == {1.0, 3.0}
    assert abs((drawn == 3).float().mean() - 0.9) < 6 * (0.9 * 0.1 / 1999) ** 0.5


@pytest.mark.slow
def test_prototypes_with_noise_are_learned_to_near_their_entropy():
    """The bound is within .6 nats of the exact entropy, with codes that stand for one prototype each."""
    generator = torch.Generator().manual_seed(0)
    prototypes = 3 * torch.randn(8, 6, generator=generator)
    truth = dist.MixtureSameFamily(dist.Categorical(torch.ones(8)), dist.Normal(prototypes, 0.3).to_event(1))
    pyro.set_rng_seed(0)
    x, test = truth.sample((2000,)), truth.sample((2000,))
    vae = VectorQuantizedVAE((6,), codes=12, latent_shape=(1,), code_dim=8, prior=autoregressive((1,), 12), hidden=(32,))
    train(vae, x, epochs=80, batch_size=100, optim=partial(torch.optim.Adam, lr=3e-3), seed=0, progress=False)
    train(vae.prior, vae.codes(x), epochs=20, progress=False)
    z, kinds = vae.codes(test)[:, 0], (test[:, None] - prototypes).square().sum(-1).argmin(-1)
    table = torch.zeros(12, 8).index_put_((z, kinds), torch.ones(2000), accumulate=True)
    used = table[table.sum(1) > 0]
    assert (used > 0).sum() == len(used)
    assert set(used.argmax(1).tolist()) == set(range(8))
    gap = truth.log_prob(test) - log_likelihood(vae, test).values
    assert -0.05 < gap.mean() < 0.6


class Identity(nn.Module):
    """An encoder of two numbers as two vectors of length 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x.unsqueeze(-1)


def test_an_autoregressive_prior_reaches_the_entropy_of_the_codes():
    """The divergence of the prior from the true table of two codes is computed over all nine outcomes."""
    pyro.set_rng_seed(0)
    table = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.03, 0.25], [0.10, 0.15, 0.05]])
    pairs = dist.Categorical(table.flatten()).sample((4000,))
    codes = torch.stack([pairs // 3, pairs % 3], -1)
    prior = Autoregressive((2,), likelihood=CategoricalLikelihood(3), hidden=(32,))
    vae = VectorQuantizedVAE((2,), codes=3, latent_shape=(2,), code_dim=1, prior=prior, encoder=Identity(), standardize=False)
    vae.codebook.vectors.copy_(torch.tensor([[-1.0], [0.0], [1.0]]))
    x = codes - 1.0 + 0.1 * torch.randn(4000, 2)
    assert vae.codes(x).equal(codes)
    encoder = [p.clone() for p in vae.encoder.parameters()]
    train(vae.prior, vae.codes(x), epochs=25, batch_size=500, optim=partial(torch.optim.Adam, lr=1e-2), seed=0, progress=False)
    outcomes = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_p = prior().log_prob(outcomes).detach()
    assert_close(log_p.logsumexp(0), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert (table.flatten() * (table.flatten().log() - log_p)).sum() < 0.01  # 8 / (2 * 4000) is what 4000 pairs cost
    assert [p.equal(q) for p, q in zip(encoder, vae.encoder.parameters(), strict=True)] == [True]
    assert_close(log_likelihood(vae, x).values - vae.decode(codes).log_prob(x).detach(), prior().log_prob(codes).detach())


@pytest.mark.parametrize("decay", [pytest.param(0.9, marks=pytest.mark.slow), None])
def test_captured_steps_train_it_and_move_the_codebook_as_eager_steps_do(decay):
    vae, x = small(decay=decay, restart=0.3), torch.randn(20, 3)
    vae.standardize(x)
    twin = pickle.loads(pickle.dumps(vae))
    svi = [
        kind(family.model, family.guide, PyroOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO(), **options)
        for kind, family, options in ((SVI, twin, {}), (CompiledSVI, vae, {"mode": Captured()}))
    ]
    for seed in range(3):  # each is compared with the program itself
        losses = []
        for each in svi:
            pyro.set_rng_seed(seed)
            losses.append(float(each.step(x)))
        assert_close(*losses, atol=1e-3, rtol=1e-5)
    for name, value in twin.state_dict().items():
        assert_close(vae.state_dict()[name], value, atol=1e-4, rtol=1e-4)
    assert vae.codebook.usage.sum() > 0


def test_a_run_is_saved_resumed_and_rebuilt_with_its_codebook(tmp_path):
    x = torch.randn(60, 3)
    options = {"batch_size": 20, "valid": 0.2, "seed": 1, "progress": False, "ema_decay": 0.9}
    whole, halves = (small(prior=autoregressive((2, 2), 5)) for _ in range(2))
    halves.load_state_dict(whole.state_dict())
    train(whole, x, epochs=4, **options)
    train(halves, x, epochs=2, checkpoint=tmp_path / "run", **options)
    fresh = small(prior=autoregressive((2, 2), 5))
    fit = train(fresh, x, epochs=4, checkpoint=Checkpoint(tmp_path / "run", resume=True), **options)
    for name, value in whole.state_dict().items():
        assert_close(fresh.state_dict()[name], value)
    loaded = checkpoints.load(tmp_path / "run")
    assert_close(log_likelihood(loaded, x).values, log_likelihood(fresh, x).values)
    held_out = log_likelihood(fresh, x[fit.held_out])
    assert_close(held_out.nats, fit.best["valid"], atol=1e-4, rtol=0)  # validation is by the bound


@pytest.mark.parametrize("decay", [0.9, None])
def test_averages_of_the_parameters_average_the_codes_too(decay):
    vae = small(decay=decay)
    weights, book = TrainedWeights(dict(vae.named_parameters()), [vae], 0.5), vae.codebook
    history = []
    for step in range(4):
        with torch.no_grad():
            book.places.add_(1.0 + step)
            book.usage.add_(1.0)
            if decay is None:
                book.shifts.mul_(0.5).add_(torch.randn(5, 3))
        history.append(book.vectors.detach().clone())
        weights.update()
    average = history[0]
    for step, value in enumerate(history[1:], 1):
        rate = min(0.5, (1 + step) / (10 + step))
        average = rate * average + (1 - rate) * value
    with weights.averaged():
        assert_close(book.vectors.detach(), average)
    assert_close(book.vectors.detach(), history[-1])
    weights.keep_best()
    assert_close(weights.best_state()["codebook.usage"], torch.full((5,), 4.0))
    weights.restore_best()
    assert_close(book.vectors.detach(), average)


def test_codes_are_drawn_exported_and_diagnosed():
    vae, x = small(codes=4), torch.randn(30, 3)
    train(vae, x, epochs=2, progress=False)
    draws = Predictive(vae.model, num_samples=3, parallel=True)(size=7)
    assert [draws[name].shape for name in "zx"] == [(3, 7, 2, 2), (3, 7, 3)]
    assert set(draws["z"].unique().tolist()) <= {0, 1, 2, 3}
    found = to_arviz(vae, x, num_samples=2)
    assert (found.posterior["z"].values[0, 1] == vae.codes(x).numpy()).all()
    diagnosis = diagnose_vae(vae, x)
    assert_close(diagnosis.rate, 4 * log(4), atol=0, rtol=1e-5)
    assert_close(diagnosis.elbo, log_likelihood(vae, x).mean, atol=0, rtol=1e-5)
    _, counts = vae.codes(x).flatten(1).unique(dim=0, return_counts=True)
    assert_close(diagnosis.mutual_information, -(counts / 30 * (counts / 30).log()).sum().item(), atol=1e-4, rtol=0)
    assert diagnosis.traversals is None
    assert_close(diagnosis.activity["z"], vae.codes(x).float().var(0))
    assert vae.guide(None) is None


@pytest.mark.parametrize(
    "prior",
    [
        lambda: dist.Categorical(torch.rand(2, 5)).to_event(1),
        lambda: Flow((2,), levels=5),
        lambda: autoregressive((2,), 5, context=Labels(3)),
    ],
    ids=["distribution", "flow", "labels"],
)
def test_any_distribution_of_codes_can_be_the_prior(prior):
    prior = prior()
    vae, x = small(latent_shape=(2,), prior=prior, context=Labels(3)), torch.randn(20, 3)
    labels = torch.randint(3, (20,))
    train(vae, x, context=labels, epochs=2, batch_size=10, progress=False)
    found = log_likelihood(vae, x, labels, num_samples=20)
    assert found.kind == "lower bound"
    assert found.num_samples == (20 if isinstance(prior, Flow) else 1)
    assert vae(labels).sample((3,)).shape == (3, 20, 3)
    assert vae.codes(x, labels).shape == (20, 2)


def test_networks_of_ones_own_read_images_contexts_and_missing_values():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.of_context = nn.Conv2d(2, 3, 2, stride=2), nn.Linear(2, 3)

        def forward(self, x, context):
            e = self.layer(x.movedim(-1, 1)) + self.of_context(context)[:, :, None, None]
            return e.movedim(1, -1)

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ConvTranspose2d(3, 1, 2, stride=2)

        def forward(self, c, context):
            return self.layer(c.movedim(-1, 1)).squeeze(1)

    vae = small(
        event_shape=(4, 4),
        context=2,
        missing=True,
        likelihood=BernoulliLikelihood(),
        encoder=Encoder(),
        decoder=Decoder(),
    )
    x, context = torch.randint(2, (6, 4, 4)).float(), torch.randn(6, 2)
    x[:3, 0] = torch.nan
    train(vae, x, context=context, epochs=1, progress=False)
    complete = vae.decode(vae.codes(x, context), context)
    assert complete.batch_shape == (6,)
    assert log_likelihood(vae, x, context).values.isfinite().all()
    with pytest.raises(ValueError, match=r"decode wants z of shape \(..., 2, 2\), but found \(6, 2\)"):
        vae.decode(torch.zeros(6, 2).long(), context)


def test_an_encoder_of_the_wrong_shape_is_refused():
    vae = small(encoder=nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"encoder should return a tensor of shape \(2, 2, 2, 3\), but it returned \(2, 4\)"):
        vae.guide(torch.randn(2, 3))


def test_a_scalar_code_and_scalar_data():
    vae, x = small(event_shape=(), latent_shape=(), prior=autoregressive((), 5)), torch.randn(10)
    train(vae, x, epochs=1, progress=False)
    assert vae.codes(x).shape == (10,)
    assert vae().sample((4,)).shape == (4,)


def test_svi_trains_it_without_the_training_loop():
    vae, x = small(), torch.randn(50, 3)
    svi = SVI(vae.model, vae.guide, PyroOptim(torch.optim.Adam, {"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    before = vae.codebook.vectors.clone()
    assert svi.evaluate_loss(x) < losses[0] - 10
    assert vae.codebook.vectors.equal(before)
    vae.encoder.requires_grad_(False).eval()  # an encoder that is fixed keeps its codes
    Trace_ELBO().differentiable_loss(vae.model, vae.guide, x).backward()
    assert vae.codebook.vectors.equal(before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codes": 1}, ValueError, "codes of 2 or more"),
        ({"code_dim": 0}, ValueError, "code_dim of 1 or more"),
        ({"latent_shape": 3}, TypeError, "latent_shape as a sequence of positive integers"),
        ({"decay": 1.0}, ValueError, "decay as a number of at least 0 and less than 1"),
        ({"restart": -0.1}, ValueError, "restart as a number of at least 0 and less than 1"),
        ({"commitment": -1}, ValueError, "commitment as a number of 0 or more"),
        ({"commitment": True}, ValueError, "commitment as a number of 0 or more"),
        ({"encoder": nn.Linear}, TypeError, "a torch.nn.Module as its encoder.*the class Linear"),
        ({"prior": "uniform"}, TypeError, r"such as Autoregressive\(\(2, 2\), likelihood=CategoricalLikelihood\(5\)\)"),
        ({"prior": autoregressive}, TypeError, "a Pyro distribution or a family as its prior"),
        ({"prior": autoregressive((2, 2), 5)()}, ValueError, "the family that made this Autoregression"),
        ({"prior": autoregressive((4,), 5)}, ValueError, r"codes of shape \(2, 2\), but found one of event shape \(4,\)"),
        ({"prior": dist.Categorical(torch.ones(2, 2, 5))}, ValueError, r"event shape \(\) and batch shape \(2, 2\)"),
        ({"prior": autoregressive((2, 2), 6)}, ValueError, r"the integers 0 \.\. 4, but found"),
        ({"prior": autoregressive((2, 2), 4)}, ValueError, r"the integers 0 \.\. 4, but found"),
        ({"prior": Flow((2, 2))}, ValueError, r"the integers 0 \.\. 4, but found"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        small(**options)
