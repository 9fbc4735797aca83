"""Adversarial training: losses and penalties against closed forms, inputs of the critic, guides, and failures."""

import copy
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.optim import Adam as PyroAdam
from torch import nn
from torch.distributions import constraints
from torch.optim import SGD, Adam
from torch.testing import assert_close

from pyro_genmodels import (
    GAN,
    MAF,
    NSF,
    VAE,
    Adversarial,
    AutoFamily,
    ConvolutionalCritic,
    ConvolutionalGenerator,
    DenseCritic,
    DenseGenerator,
    Flow,
    Labels,
    NormalLikelihood,
    train,
)
from pyro_genmodels.divergences import (
    Alpha,
    Jeffreys,
    JensenShannon,
    KullbackLeibler,
    PearsonChiSquared,
    ReverseKullbackLeibler,
    SquaredHellinger,
    TotalVariation,
)
from pyro_genmodels.infer.adversarial import (
    FGAN,
    R1,
    R2,
    WGAN,
    AggregatePairing,
    GradientPenalty,
    Hinge,
    JointPairing,
    LeastSquares,
    LostGameError,
    Minimax,
    NonSaturating,
    ObservationsPairing,
    PosteriorPairing,
    Relativistic,
    WeightClipping,
    spectral_normalized,
)
from pyro_genmodels.infer.adversarial.pairings import _normal_fit
from pyro_genmodels.training import Checkpoint, checkpoints

LOSSES = [Minimax(), NonSaturating(), LeastSquares(), Hinge(), WGAN(), Relativistic(), FGAN(JensenShannon())]
FS = [
    KullbackLeibler(),
    ReverseKullbackLeibler(),
    JensenShannon(),
    TotalVariation(),
    SquaredHellinger(),
    PearsonChiSquared(),
    Jeffreys(),
    Alpha(0.5),
]


SMALL = {"generator": DenseGenerator((32, 32)), "critic": DenseCritic((32, 32)), "standardize": False}


def mlp(inputs, width=32, outputs=1):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, outputs)
    )


class PairCritic(nn.Module):
    """A critic of all its inputs, flattened and joined."""

    def __init__(self, inputs):
        super().__init__()
        self.network = mlp(inputs)

    def forward(self, *parts):
        return self.network(torch.cat([part.reshape(len(part), -1) for part in parts], -1))


class LocationScale(pyro.nn.PyroModule):
    """A simulator of one's own: rows of a normal law whose location and scale are unknown."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("x", dist.Normal(self.loc, self.log_scale.exp()), obs=x)


def scalars():
    return nn.Sequential(nn.Unflatten(0, (-1, 1)), mlp(1))


# Losses.


def test_losses_equal_their_formulas():
    real, fake = torch.tensor([0.3]), torch.tensor([-1.2])
    d, g = real.sigmoid(), fake.sigmoid()
    cases = [
        (Minimax(), -d.log() - (1 - g).log(), d.log() + (1 - g).log()),
        (NonSaturating(), -d.log() - (1 - g).log(), -g.log() - (1 - d).log()),
        (LeastSquares(), ((real - 1) ** 2 + fake**2) / 2, ((fake - 1) ** 2 + real**2) / 2),
        (Hinge(), torch.tensor([0.7]), torch.tensor([1.5])),
        (WGAN(), fake - real, real - fake),
        (Relativistic(), -(real - fake).sigmoid().log(), -(fake - real).sigmoid().log()),
    ]
    for loss, critic, model in cases:
        assert_close(loss.critic_loss(real, fake), critic)
        assert_close(loss.model_loss(real, fake), model)


@pytest.mark.parametrize("f", FS, ids=lambda f: type(f).__name__)
def test_the_optimal_critic_of_any_f_attains_its_divergence(f, float64):
    """A false-alarm rate of 5.7e-7 each: five standard errors, beside which quadrature is exact."""
    p, q = dist.Normal(0.0, 1.0), dist.Normal(0.7, 1.3)
    x = torch.linspace(-14, 14, 20_001)
    exact = torch.trapezoid(q.log_prob(x).exp() * f((p.log_prob(x) - q.log_prob(x)).exp()), x)

    def best(x):
        r = p.log_prob(x) - q.log_prob(x)
        return 2 * (r.exp() - 1) if isinstance(f, PearsonChiSquared) else 100 * r if isinstance(f, TotalVariation) else r

    found = FGAN(f).divergence(best(p.sample((100_000,))), best(q.sample((100_000,))))
    assert (found.value - exact).abs() < 5 * found.std_error + 1e-3 * isinstance(f, TotalVariation)
    assert found.std_error < 0.05 * exact + 0.01


def test_losses_without_a_ratio_or_a_divergence_raise():
    for loss in (Hinge(), WGAN(), Relativistic(), FGAN(TotalVariation())):
        assert not loss.estimates_ratio
        with pytest.raises(ValueError, match=r"ratio|JensenShannon"):
            loss.log_ratio(torch.zeros(1))
    for loss in (Hinge(), LeastSquares(), Relativistic()):
        assert not loss.bounds_divergence
        with pytest.raises(ValueError, match="bounds no divergence"):
            loss.divergence(torch.zeros(2), torch.zeros(2))


# Penalties.


def test_penalties_of_a_linear_critic_are_in_closed_form():
    w, real, fake = torch.tensor([3.0, 4.0]), torch.randn(7, 2), torch.randn(7, 2)
    for penalty, value in ((R1(0.2), 2.5), (R2(0.2), 2.5), (GradientPenalty(10.0), 160.0)):
        assert_close(penalty(lambda x: x @ w, (real,), (fake,)), torch.tensor(value))
    square = lambda x: x.square().sum(1) / 2  # noqa: E731 (slopes are x itself)
    assert_close(R1(2.0)(square, (real,), (fake,)), real.square().sum(1).mean())
    assert_close(R2(2.0)(square, (real,), (fake,)), fake.square().sum(1).mean())


@pytest.mark.parametrize("size", [1.0, 1e6, 1e9, 1e-6])
def test_the_gradient_penalty_has_a_gradient_in_any_unit(size):
    """A critic with the gradient (1, 1) / (2 size): the penalty (1 / sqrt(2) / size - 1)^2 was flat beyond size = 1e6."""
    weight = torch.full((2,), 0.5 / size, requires_grad=True)
    real, fake = size * torch.randn(2, 8, 2)
    GradientPenalty(1.0)(lambda x: x @ weight, (real,), (fake,)).backward()
    norm = 0.5**0.5 / size
    assert_close(weight.grad, torch.full((2,), 2 * (norm - 1) * 0.5**0.5))


def test_a_clipped_critic_stays_within_its_bound():
    critic = mlp(2)
    trainer = Adversarial(GAN((2,)).model, critic, WGAN(), penalties=[WeightClipping(0.05)])
    trainer.step(torch.randn(16, 2))
    assert max(p.abs().max() for p in critic.parameters()) <= 0.05


def test_a_spectrally_normalised_critic_is_1_lipschitz_layer_by_layer():
    critic = spectral_normalized(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    for _ in range(2000):  # one step of the power iteration each
        critic(torch.randn(3, 4))
    for layer in (critic[0], critic[2]):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), True])
def test_weights_of_penalties_are_positive(bad):
    with pytest.raises(ValueError, match="positive number"):
        R1(bad)


# Steps.


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_step_changes_only_the_network_it_is_of(loss):
    gan, x = GAN((2,), standardize=False), torch.randn(32, 2)
    still = partial(SGD, lr=0.0)
    for optims, moving in (((still, partial(Adam, lr=0.1)), gan.critic), ((partial(Adam, lr=0.1), still), gan.generator)):
        before = {name: p.clone() for name, p in gan.named_parameters()}
        Adversarial(gan.model, gan.critic, loss, optims).step(x)
        own = {id(p) for p in moving.parameters()}
        for name, p in gan.named_parameters():
            assert torch.equal(before[name], p) == (id(p) not in own) or "bias" in name
            assert p.grad is None


def test_evaluation_has_no_side_effects():
    gan, x = GAN((2,)), torch.randn(64, 2)
    trainer = Adversarial(gan.model, gan.critic)
    trainer.step(x)
    before = copy.deepcopy(trainer.state_dict())
    assert sorted(trainer.evaluate_loss(x)) == ["critic", "generator"]
    trainer.critic_outputs(x)
    for name, parameters in trainer.state_dict()["parameters"].items():
        assert all(torch.equal(a, b) for a, b in zip(parameters, before["parameters"][name], strict=True))
    assert gan.training


def test_more_steps_of_the_critic():
    calls = []
    critic = mlp(2)
    critic.register_forward_hook(lambda *_: calls.append(1))
    steps = []
    for number in (1, 3):
        trainer = Adversarial(GAN((2,)).model, critic, NonSaturating(), num_critic_steps=number)
        trainer.prepare(torch.randn(8, 2))
        calls.clear()
        trainer.step(torch.randn(8, 2))
        steps.append(len(calls))
    assert steps[1] - steps[0] == 2 * 2  # data and draws, in each of two more steps


# Any Pyro model.


@pytest.mark.parametrize("by", ["SVI", "Adversarial"])
def test_one_pyro_model_is_fitted_by_svi_and_by_a_critic(by):
    """The mean of 4,000 data is within .03 of the truth (3 sd); the tolerance leaves .12 more for the noise of training."""
    x, model = 1.5 + 0.5 * torch.randn(4000), LocationScale()
    if by == "SVI":
        svi = SVI(model, lambda x: None, PyroAdam({"lr": 0.05}), Trace_ELBO())
        for _ in range(200):
            svi.step(x)
    else:
        trainer = Adversarial(model, scalars(), NonSaturating(), partial(Adam, lr=1e-2, betas=(0.0, 0.99)), penalties=[R1(0.1)])
        for _ in range(400):
            trainer.step(x[torch.randint(len(x), (128,))])
    assert model.loc.item() == pytest.approx(1.5, abs=0.15)
    assert model.log_scale.exp().item() == pytest.approx(0.5, abs=0.15)


def test_the_score_function_is_an_unbiased_gradient(float64):
    """Against the exact gradient of E[v(x)] for draws without gradient; five standard errors of 400 steps."""
    logit = nn.Parameter(torch.tensor(0.4))

    def model(x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=pyro.param("logit", logit)))
            pyro.sample("x", dist.Normal(3 * k, 1e-3), obs=x)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x + self.zero

    p = logit.detach().sigmoid()
    exact = -3 * p * (1 - p)  # the model loses -E[v] = -3 p
    grads = []
    for _ in range(400):
        trainer = Adversarial(model, Fixed(), WGAN(), partial(SGD, lr=1.0), penalties=[])
        pyro.clear_param_store()
        before = logit.detach().clone()
        trainer.optims = (partial(SGD, lr=1.0), partial(SGD, lr=0.0))
        trainer.step(torch.zeros(20))
        grads.append(before - logit.detach())
        with torch.no_grad():
            logit.copy_(before)
    grads = torch.stack(grads)
    assert (grads.mean() - exact).abs() < 5 * grads.std() / len(grads) ** 0.5


def test_several_sites_and_plates_are_one_row_each():
    seen = []

    def model(x, y):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", 6, dim=-1):
            with pyro.plate("times", 4, dim=-2):
                pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = mlp(6)

        def forward(self, rows):
            seen.append(rows.detach())
            return self.network(rows)

    x, y = torch.randn(4, 6), torch.randn(6, 2)
    Adversarial(model, Critic(), NonSaturating()).evaluate_loss(x, y)
    assert_close(seen[0], torch.cat([x.T, y], 1))


def test_a_subsampled_plate_shows_its_rows():
    x = torch.randn(50)

    def model(x):
        with pyro.plate("data", 50, subsample_size=10) as rows:
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x[rows])

    inputs, _ = Adversarial(model, scalars()).critic_outputs(x)
    assert all(value in x for value in inputs.real[0])
    assert len(inputs.fake[0]) == 10


def test_generator_and_critic_see_the_context():
    """Rows of class k lie at 4 k: the conditional GAN finds where, within the noise of 400 steps."""
    c = torch.randint(2, (1000,))
    x = 4.0 * c[:, None] + 0.3 * torch.randn(1000, 1)
    small = {"generator": DenseGenerator((32,)), "critic": DenseCritic((32,))}
    gan = GAN((1,), context=Labels(2), latent_dim=2, **small)
    train(gan, (x, c), epochs=40, batch_size=100, optim=partial(Adam, lr=5e-3, betas=(0.0, 0.99)), progress=False)
    draws = gan(torch.arange(2).repeat(500)).sample()
    assert draws[::2].mean().item() == pytest.approx(0.0, abs=0.5)
    assert draws[1::2].mean().item() == pytest.approx(4.0, abs=0.5)


def test_integers_are_seen_with_noise_and_drawn_as_integers():
    gan, x = GAN((3,), levels=5), torch.randint(5, (40, 3))
    gan.standardize(x)
    inputs, _ = Adversarial(gan.model, gan.critic).critic_outputs(x)
    assert_close((gan.pretransform.inv(inputs.real[0])).floor().long(), x)
    assert gan().sample((4,)).dtype == torch.long


@pytest.mark.parametrize("level", [0, 2])
@pytest.mark.parametrize("support", [constraints.real, constraints.interval(0.0, 5.0)], ids=["reals", "interval"])
def test_early_stopping_compares_integers_after_rounding(support, level):
    """All samples are 2, and all held-out data one level: the squared energy distance is twice the distance of these."""
    drawn, x = (
        torch.tensor([k + 0.5]) if support is constraints.real else torch.tensor([(k + 0.5) / 5]).logit() for k in (2, level)
    )
    generator = nn.Linear(1, 1)
    generator.load_state_dict({"weight": torch.zeros(1, 1), "bias": drawn + 0.1})
    gan = GAN((1,), latent_dim=1, generator=generator, levels=5, support=support, standardize=False)
    held_out = torch.full((9, 1), level)
    fit = train(gan, torch.arange(30)[:, None] % 5, valid=held_out, epochs=1, optim=partial(SGD, lr=1e-20), progress=False)
    assert fit.best["valid"] == pytest.approx(2 * (drawn - x).abs().item(), abs=1e-6)


@pytest.mark.parametrize(("held_out", "passes"), [(7, 10), (400, 3), (950, 1)])
def test_early_stopping_draws_many_samples_for_few_rows(held_out, passes):
    rows = []
    gan = GAN((2,), context=Labels(3), generator=DenseGenerator((4,)), critic=DenseCritic((4,)))
    gan.generator.register_forward_pre_hook(lambda network, inputs: None if network.training else rows.append(len(inputs[0])))
    x, labels = torch.randn(20 + held_out, 2), torch.arange(20 + held_out) % 3
    train(gan, (x[:20], labels[:20]), valid=(x[20:], labels[20:]), epochs=2, progress=False)
    assert sum(rows) == 2 * passes * held_out  # in two epochs


def test_a_critic_of_packs_sees_so_many_rows_at_once():
    shapes = []
    for gan, c in ((GAN((2,), pack=4), ()), (GAN((2,), pack=4, context=Labels(3)), (torch.randint(3, (18,)),))):
        gan.critic.network.register_forward_pre_hook(lambda _, inputs: shapes.append([tuple(i.shape) for i in inputs]))
        Adversarial(gan.model, gan.critic).step(torch.randn(18, 2), *c)
    assert shapes[0] == [(4, 4, 2)]
    assert shapes[-1] == [(4, 4, 2), (4, 12)]


def small_gan(**options):
    return GAN((2,), latent_dim=2, generator=DenseGenerator((16,)), critic=DenseCritic((16,)), **options)


@pytest.mark.parametrize("moved", [lambda gan: gan, copy.deepcopy, lambda gan: gan.double()], ids=["", "copied", "in double"])
def test_train_changes_every_parameter_of_both_networks(moved):
    original = small_gan()
    gan = moved(original)
    dtype = next(gan.parameters()).dtype
    before = {name: p.clone() for name, p in gan.named_parameters()}
    kept = [p.clone() for p in original.parameters()]
    fit = train(gan, torch.randn(96, 2, dtype=dtype), epochs=2, batch_size=32, seed=1, progress=False)
    assert fit.history[-1].keys() >= {"train", "critic"}
    assert all(not p.equal(before[name]) for name, p in gan.named_parameters() if "bias" not in name)
    assert gan().sample((3,)).dtype == dtype
    assert gan is original or all(p.equal(q) for p, q in zip(original.parameters(), kept, strict=True))


def test_draws_on_an_interval_lie_inside_after_training():
    gan, x = small_gan(support=dist.constraints.interval(-1.0, 3.0)), 4 * torch.rand(200, 2).square() - 1
    train(gan, x, epochs=10, batch_size=50, progress=False)
    draws = gan().sample((2000,))
    assert gan().support.check(draws).all()
    assert draws.std(0).min() > 0.1


def test_two_gans_in_one_model_learn_from_one_critic():
    first, second = small_gan(), small_gan()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", first(), obs=x)
            pyro.sample("y", second(), obs=1 - x)

    before = [[p.clone() for p in gan.generator.parameters()] for gan in (first, second)]
    Adversarial(model, mlp(4), NonSaturating()).step(torch.randn(20, 2))
    for gan, old in zip((first, second), before, strict=True):
        assert all(not p.equal(q) for p, q in zip(gan.generator.parameters(), old, strict=True))


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8)], ids=str)
def test_images_by_convolutions(shape):
    gan = GAN(shape, generator=ConvolutionalGenerator((8, 8)), critic=ConvolutionalCritic((8, 8)), context=2, pack=2)
    losses = Adversarial(gan.model, gan.critic).step(torch.randn(6, *shape), torch.randn(6, 2))
    assert all(torch.tensor(list(losses.values())).isfinite())
    assert gan(torch.randn(5, 2)).sample().shape == (5, *shape)
    with pytest.raises(ValueError, match="DenseGenerator"):
        GAN((3,), generator=ConvolutionalGenerator())


# With a guide.


def linear_gaussian(n=2000):
    z = torch.randn(n, 1)
    return 2 * z + 1 + 0.5 * torch.randn(n, 1)


def linear_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(2 * z + 1, 0.5).to_event(1), obs=x)


class LinearGuide(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = nn.Linear(1, 1)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            return pyro.sample("z", dist.Normal(self.loc(x), self.log_scale.exp()).to_event(1))


@pytest.mark.parametrize(
    ("pairing", "slope", "scale"),
    [
        (JointPairing(), 2 / 4.25, 4.25**-0.5),
        pytest.param(AggregatePairing(), 0.5, None, marks=pytest.mark.slow),
    ],
    ids=["joint", "aggregate"],
)
def test_a_guide_is_trained_by_a_critic(pairing, slope, scale):
    """Of a model that is known, x = 2 z + 1 + .5 e, a joint pairing finds the posterior, and an aggregate one inverts the mean.

    The tolerances are three times the largest distance over ten seeds, but for the scale, which is still on its way from 1.
    """
    x, guide = linear_gaussian(), LinearGuide()
    trainer = Adversarial(
        linear_model, PairCritic(2 if pairing == JointPairing() else 1), NonSaturating(),
        partial(Adam, lr=1e-2, betas=(0.5, 0.99)), guide=guide, pairing=pairing, penalties=[R1(0.1), R2(0.1)], ema_decay=0.99,
    )  # fmt: skip
    for _ in range(400):
        trainer.step(x[torch.randint(len(x), (128,))])
    with trainer.averaged():
        assert guide.loc.weight.item() == pytest.approx(slope, abs=0.02)
        assert guide.loc.bias.item() == pytest.approx(-slope, abs=0.05)
        if scale is not None:
            assert guide.log_scale.exp().item() == pytest.approx(scale, abs=0.3)


@pytest.mark.slow
def test_adversarial_variational_bayes_finds_a_posterior_that_is_not_normal():
    """b given a is near 2 a^2 - 2: the guide's b follows a^2, which an AutoNormal cannot do."""

    def banana(y):
        with pyro.plate("data", 1):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(0.0, 3.0))
            pyro.sample("y", dist.Normal(b - 2 * a**2 + 2, 0.5), obs=y)

    y = torch.zeros(1)
    guide = AutoFamily(banana, lambda n: GAN((n,), latent_dim=4, **SMALL))
    guide(y)
    trainer = Adversarial(
        banana,
        guide.family.critic,
        NonSaturating(),
        guide=guide,
        pairing=PosteriorPairing(num_particles=128),
        num_critic_steps=2,
    )
    for _ in range(400):
        trainer.step(y)
    draws = Predictive(guide, num_samples=1000)(y)
    a, b = (draws[name].flatten() for name in ("a", "b"))
    assert torch.corrcoef(torch.stack([a**2, b]))[0, 1] > 0.8
    assert (b - 2 * a**2 + 2).abs().median() < 1.0


@pytest.mark.slow
def test_a_posterior_of_a_model_without_plates_is_learned_from_its_draws():
    """Of z given y = 2, by a prior and noise of unit variance: normal of mean 1 and variance 1/2."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(2.0))

    guide = AutoFamily(model, lambda n: GAN((n,), latent_dim=1, **SMALL))
    guide()
    trainer = Adversarial(model, guide.family.critic, NonSaturating(), guide=guide, pairing=PosteriorPairing(num_particles=128))
    for _ in range(300):
        trainer.step()
    draws = Predictive(guide, num_samples=1000)()["z"]
    assert draws.mean().item() == pytest.approx(1.0, abs=0.3)
    assert draws.std().item() == pytest.approx(0.5**0.5, abs=0.3)


@pytest.mark.slow
def test_a_guide_inside_the_plate_is_compared_together_with_its_data():
    class Guide(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.gan = GAN((1,), context=1, latent_dim=1, generator=DenseGenerator((32,)), standardize=False)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", self.gan(x))

    guide, x = Guide(), linear_gaussian()
    trainer = Adversarial(
        linear_model,
        PairCritic(2),
        NonSaturating(),
        guide=guide,
        pairing=PosteriorPairing(),
        num_critic_steps=2,
        ema_decay=0.99,
    )
    for _ in range(400):
        losses = trainer.step(x[torch.randint(len(x), (128,))])
    points = torch.tensor([[-3.0], [1.0], [5.0]]).repeat(500, 1)
    with trainer.averaged():
        z = guide.gan(points).sample().reshape(500, 3)
    assert_close(z.mean(0), (points[:3, 0] - 1) * 2 / 4.25, atol=0.3, rtol=0)
    entropy = dist.Normal(1.0, 4.25**0.5).entropy().item()  # E[-log p(x)], nats
    assert losses["generator"] == pytest.approx(entropy, abs=0.7)


def test_a_flow_over_all_latent_variables_is_a_guide_with_a_density():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("groups", 2):
            z = pyro.sample("z", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.tensor([1.0, -2.0])
    guide = AutoFamily(model, lambda n: Flow((n,), transform=MAF(transforms=1, hidden=(8,))))
    svi = SVI(model, guide, PyroAdam({"lr": 0.01}), Trace_ELBO(num_particles=4, vectorize_particles=True))
    losses = [svi.step(y) for _ in range(150)]
    assert sum(losses[-20:]) < sum(losses[:20])
    assert Predictive(guide, num_samples=5)(y)["z"].shape == (5, 2)
    with pytest.raises(ValueError, match=r"over \(3,\)"):
        AutoFamily(model, lambda n: Flow((n + 1,)))(y)


def test_the_adversarial_loss_and_the_elbo_add_up():
    vae, x = VAE((2,), latent_dim=1, likelihood=NormalLikelihood(), standardize=False), torch.randn(16, 2)
    trainer = Adversarial(vae.model, mlp(2), NonSaturating(), guide=vae.guide, extra_loss=Trace_ELBO(), weight=0.5)
    torch.manual_seed(0)
    both = trainer.evaluate_loss(x)["generator"]
    torch.manual_seed(0)
    inputs = trainer.pairing.critic_inputs(vae.model, vae.guide, (x,), {})
    alone = NonSaturating().model_loss(*trainer.game.outputs(inputs)).mean()
    elbo = Trace_ELBO().differentiable_loss(vae.model, vae.guide, x) / 16
    assert both == pytest.approx((0.5 * alone + elbo).item(), rel=1e-5)
    before = [p.clone() for p in vae.encoder.parameters()]
    trainer.step(x)
    assert any(not torch.equal(a, b) for a, b in zip(before, vae.encoder.parameters(), strict=True))


def test_a_flow_takes_an_adversarial_loss_with_its_likelihood():
    from pyro_genmodels import MaximumLikelihood

    flow, x = Flow((2,), transform=NSF(transforms=1, hidden=(8,))), torch.randn(32, 2)
    trainer = Adversarial(flow.model, mlp(2), NonSaturating(), extra_loss=MaximumLikelihood())
    assert torch.tensor(trainer.step(x)["generator"]).isfinite()


# Failures.


def test_a_critic_that_has_won_ends_training_in_the_last_good_state():
    model = LocationScale()
    with torch.no_grad():
        model.loc.fill_(50.0)
    trainer = Adversarial(
        model, scalars(), NonSaturating(), (partial(SGD, lr=0.0), partial(Adam, lr=1e-2)), penalties=[]
    )  # fmt: skip

    def run():
        for _ in range(1000):
            trainer.step(torch.randn(64))

    with pytest.raises(LostGameError, match=r"the critic has won.*Parameters and optimisers are back as they were at step"):
        run()
    assert trainer.evaluate_loss(torch.randn(64))["critic"] > 0


@pytest.mark.parametrize("network", ["model", "critic"])
def test_an_explosion_is_an_error_and_leaves_finite_parameters(network):
    gan, x = GAN((2,), standardize=False), torch.randn(32, 2)
    blown, calm = partial(SGD, lr=1e30), partial(SGD, lr=1e-3)
    trainer = Adversarial(gan.model, gan.critic, WGAN(), (blown, calm) if network == "model" else (calm, blown))

    def run():
        for _ in range(10):
            trainer.step(x)

    with pytest.raises(LostGameError, match=r"the (generator|critic)'s loss is .* at step"):
        run()
    assert all(p.isfinite().all() for p in gan.parameters())


def test_train_keeps_the_best_epoch_before_an_explosion(tmp_path):
    gan, x = GAN((2,)), torch.randn(64, 2)
    rate = iter([1e-3] * 4 + [1e30] * 100)

    class Blown(SGD):
        def step(self):
            self.param_groups[0]["lr"] = next(rate)
            super().step()

    trainer = Adversarial(gan.model, gan.critic, WGAN(), (partial(Blown, lr=1e-3), partial(SGD, lr=1e-3)))
    with pytest.warns(RuntimeWarning, match="Training stopped: the (generator|critic)'s loss"):
        fit = train(gan, x, valid=x, objective=trainer, epochs=20, batch_size=32, checkpoint=tmp_path / "gan", progress=False)
    assert all(p.isfinite().all() for p in gan.parameters())
    assert "is kept" in fit.stopped
    assert torch.equal(checkpoints.load(tmp_path / "gan").generator.mlp[0].weight, gan.generator.mlp[0].weight)


# States.


def test_training_resumes_from_a_state_exactly():
    x = torch.randn(64, 2)

    def start():
        torch.manual_seed(0)
        gan = GAN((2,))
        return gan, Adversarial(gan.model, gan.critic, ema_decay=0.9)

    whole, uninterrupted = start()
    for _ in range(6):
        uninterrupted.step(x)
    first, interrupted = start()
    for _ in range(3):
        interrupted.step(x)
    state = copy.deepcopy(interrupted.state_dict())
    other, resumed = start()
    resumed.prepare(x)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step(x)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with uninterrupted.averaged(), resumed.averaged():
        assert torch.equal(whole.generator.mlp[0].weight, other.generator.mlp[0].weight)
    with pytest.raises(ValueError, match="prepare"):
        Adversarial(first.model, first.critic).load_state_dict(state)


@pytest.mark.parametrize("optim", [None, (partial(Adam, lr=1e-3), partial(SGD, lr=1e-2))], ids=["Adam", "two kinds"])
def test_train_resumes_both_networks_and_optimisers(optim, tmp_path):
    x = torch.randn(96, 2)

    def run(name, epochs, *, resume=False):
        torch.manual_seed(0)
        gan = GAN((2,), name="gan")
        trainer = Adversarial(gan.model, gan.critic, optim=optim)
        checkpoint = Checkpoint(tmp_path / name, resume=resume)
        train(gan, x, objective=trainer, epochs=epochs, batch_size=32, checkpoint=checkpoint, progress=False)
        return gan

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_train_takes_an_adversarial_loss_and_validates_by_the_energy_distance():
    x = torch.randn(128, 2)
    fit = train(GAN((2,)), x, valid=x, objective=Hinge(), epochs=2, progress=False)
    assert {"train", "critic", "valid"} <= fit.history[0].keys()
    with pytest.raises(ValueError, match="Pass objective=Adversarial"):
        train(Flow((2,)), x, objective=Hinge(), epochs=1, progress=False)
    gan = GAN((2,))
    with pytest.raises(ValueError, match="pass optim= and mode= to Adversarial"):
        train(gan, x, objective=Adversarial(gan.model, gan.critic), optim=partial(Adam, lr=1e-3), epochs=1, progress=False)


# Errors.


def test_bad_arguments_are_refused():
    gan, x = GAN((2,)), torch.randn(8, 2)
    with pytest.raises(TypeError, match="critic"):
        Adversarial(gan.model, lambda x: x)
    with pytest.raises(TypeError, match="the class Hinge; call it"):
        Adversarial(gan.model, gan.critic, Hinge)
    with pytest.raises(ValueError, match="num_critic_steps"):
        Adversarial(gan.model, gan.critic, num_critic_steps=0)
    with pytest.raises(ValueError, match="a number for each row"):
        Adversarial(gan.model, mlp(2, outputs=2)).step(x)
    with pytest.raises(ValueError, match="larger batches"):
        Adversarial(gan.model, mlp(18), pack=9).step(x)
    with pytest.raises(ValueError, match="must be sampled, but it has none"):
        Adversarial(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0)), gan.critic).step(x)
    with pytest.raises(ValueError, match="a plate of the data's rows"):
        Adversarial(lambda x: pyro.sample("x", dist.Normal(x.new_zeros(8, 2), 1.0).to_event(2), obs=x), gan.critic).step(x)
    with pytest.raises(ValueError, match="no moving average"):
        Adversarial(gan.model, gan.critic).averaged()
    vae = VAE((2,), likelihood=NormalLikelihood())
    with pytest.raises(ValueError, match="Use SVI with Trace_ELBO"):
        Adversarial(vae.model, gan.critic, NonSaturating(), guide=vae.guide, pairing=PosteriorPairing()).step(x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="outside the data's plate"):
        Adversarial(gan.model, gan.critic, guide=guide).step(x)
    with pytest.raises(ValueError, match="nothing to train"):
        Adversarial(gan.requires_grad_(False).eval().model, mlp(2)).step(x)


def test_a_gan_has_no_density_and_says_what_to_use():
    with pytest.raises(NotImplementedError, match="Adversarial"):
        GAN((2,))().log_prob(torch.zeros(2))
    for bad in ({"latent_dim": 0}, {"pack": 1.5}):
        with pytest.raises(ValueError, match="GAN wants an integer"):
            GAN((2,), **bad)
    with pytest.raises(ValueError, match="The generator should return"):
        GAN((2,), generator=nn.Linear(16, 3))().sample((4,))


# Regressions.


def gradients(trainer, *args, draws=1, **kwargs):
    trainer.prepare(*args, **kwargs)
    total = dict.fromkeys(trainer.parameters["generator"], 0.0)
    for _ in range(draws):
        inputs = trainer.pairing.critic_inputs(trainer.model, trainer.guide, args, kwargs)
        loss = trainer.game.model_loss(inputs, args, kwargs)
        found = torch.autograd.grad(loss, list(trainer.parameters["generator"].values()))
        total = {name: total[name] + g.abs().sum().item() for name, g in zip(total, found, strict=True)}
    return total


def test_shared_samples_get_the_score_function_of_all_rows():
    def model(x):
        far = pyro.sample("far", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.0))))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))
            pyro.sample("x", dist.Normal(3 * far + k, 1.0), obs=x)

    found = gradients(Adversarial(model, scalars(), WGAN()), torch.zeros(16), draws=5)
    assert found["logit"] > 1e-4
    assert found["rate"] > 1e-4


def test_masked_values_are_zero_for_the_critic():
    x, mask = torch.tensor([1.0, 99.0, 2.0, 99.0]), torch.tensor([True, False, True, False])

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", 4), pyro.poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    inputs, _ = Adversarial(model, scalars()).critic_outputs(x)
    assert torch.equal(inputs.real[0], torch.tensor([1.0, 0.0, 2.0, 0.0]))
    assert torch.equal(inputs.fake[0] == 0, ~mask)


def test_a_learned_prior_is_trained_by_an_aggregate_pairing():
    def model(x):
        loc = pyro.param("prior", torch.zeros(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 0.5).to_event(1), obs=x)

    guide = LinearGuide()
    assert gradients(Adversarial(model, mlp(1), guide=guide, pairing=AggregatePairing()), torch.ones(8, 1))["prior"] > 0


def test_a_generator_without_a_gradient_is_an_error():
    first, x = LocationScale(), torch.randn(8)
    Adversarial(first, scalars()).step(x)
    with pytest.raises(ValueError, match="store holds parameters of these names"):
        Adversarial(LocationScale(), scalars()).step(x)


def test_train_passes_the_number_of_rows():
    sizes = []

    def model(x, size=None):
        sizes.append(size)
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    x = torch.randn(12)
    trainer = Adversarial(model, scalars(), extra_loss=Trace_ELBO(), weight=1e-9)
    train((model, lambda x, size=None: None), x, objective=trainer, epochs=1, batch_size=4, progress=False)
    assert set(sizes) == {12}
    losses = trainer.evaluate_loss(x[:4], size=12)["generator"]
    assert losses == pytest.approx(-dist.Normal(pyro.param("loc"), 1.0).log_prob(x[:4]).mean().item(), rel=1e-4)


def test_a_fit_with_a_separate_critic_is_loaded_again(tmp_path):
    flow, x = Flow((2,), transform=NSF(transforms=1, hidden=(8,))), torch.randn(32, 2)
    trainer = Adversarial(flow.model, nn.Sequential(nn.BatchNorm1d(2), mlp(2)), NonSaturating())
    train(flow, x, objective=trainer, epochs=1, checkpoint=tmp_path / "flow", progress=False)
    assert_close(checkpoints.load(tmp_path / "flow")().log_prob(x), flow().log_prob(x))
    with pytest.raises(ValueError, match="another model than this fit"):
        train(Flow((2,)), x, objective=trainer, epochs=1, progress=False)


def test_scalars_are_rows_of_one_number():
    def model(x, y):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
            pyro.sample("y", dist.Poisson(loc.exp()), obs=y)

    Adversarial(model, mlp(2)).step(torch.randn(8), torch.randint(3, (8,)))
    train(GAN((), **SMALL), torch.randn(16), valid=torch.randn(16), epochs=1, progress=False)


def test_arguments_that_do_not_go_together_are_refused():
    gan, x = GAN((2,), pack=2, **SMALL), torch.randn(8, 2)
    with pytest.raises(ValueError, match="bounds the divergence of packs"):
        Adversarial(gan.model, gan.critic, Minimax()).divergence(x)
    with pytest.raises(ValueError, match="this critic sees packs"):
        Adversarial(gan.model, gan.critic, NonSaturating(), guide=gan.guide, pairing=PosteriorPairing())
    with pytest.raises(ValueError, match="does not use a guide"):
        Adversarial(gan.model, gan.critic, guide=gan.guide, pairing=ObservationsPairing())
    with pytest.raises(ValueError, match="relative to another loss"):
        Adversarial(gan.model, gan.critic, weight=2.0)
    with pytest.raises(ValueError, match="at least 0 and less than 1"):
        Adversarial(gan.model, gan.critic, ema_decay=2.0)

    def guide(y):
        pyro.sample("w", GAN((1,), **SMALL)())
        pyro.sample("b", dist.Bernoulli(0.5))

    with pytest.raises(ValueError, match=r"carry gradients, but site 'b'"):
        Adversarial(guide, gan.critic, NonSaturating(), guide=guide, pairing=PosteriorPairing(8), pack=1).step(x)


def test_a_state_is_a_copy():
    gan, x = GAN((2,), **SMALL), torch.randn(16, 2)
    trainer = Adversarial(gan.model, gan.critic, ema_decay=0.9)
    trainer.step(x)
    state = trainer.state_dict()
    runs = []
    for _ in range(2):
        trainer.load_state_dict(state)
        runs.append([trainer.step(x) for _ in range(3)])
    assert runs[0] == runs[1]


def test_values_that_depend_on_integers_match_them():
    gan = GAN((1,), levels=9, **SMALL).requires_grad_(True)

    def model(x, y):
        with pyro.plate("data", len(x)):
            k = pyro.sample("x", gan(), obs=x)
            pyro.sample("y", dist.Normal(k.squeeze(-1).float(), 1e-3), obs=y)

    with torch.no_grad():
        gan.generator.mlp[-1].bias.fill_(4.0)
    x = torch.randint(9, (64, 1))
    inputs, _ = Adversarial(model, mlp(2)).critic_outputs(x, x.squeeze(-1).float())
    assert_close(inputs.fake[0][:, 0].floor(), inputs.fake[0][:, 1].round())


def test_the_reference_of_a_guide_is_in_its_units():
    """Coordinates of units 1e-12 and 1e6 with an offset are whitened alike; a constant one does no harm."""
    z = torch.randn(500, 3, dtype=torch.float64) * torch.tensor([1e-12, 1.0, 1e6]) + torch.tensor([0.0, 1e4, 0.0])
    z[:, 2] += z[:, 1] * 1e5
    found = _normal_fit(z)
    white = torch.linalg.solve_triangular(found.scale_tril, (z - found.loc).T, upper=False)
    torch.testing.assert_close(white.cov(), torch.eye(3, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    z[:, 0] = 3.0
    assert _normal_fit(z).scale_tril.isfinite().all()
    single = _normal_fit((torch.randn(500, 2) + 1e6).float())
    torch.testing.assert_close(single.covariance_matrix, torch.eye(2), rtol=0.3, atol=0.3)


@pytest.mark.parametrize("loss", [WGAN(), Minimax(), FGAN(KullbackLeibler())], ids=repr)
def test_a_bound_of_a_divergence_is_refused_for_outputs_that_are_nan_and_has_a_k(loss):
    with pytest.raises(ValueError, match="found 1 with NaN or infinity among the 3 on fake inputs"):
        loss.divergence(torch.zeros(3), torch.tensor([0.0, torch.nan, 1.0]))
    good, heavy = torch.randn(500), dist.StudentT(2.0).sample((500,)) * 3
    assert loss.divergence(good, good).reliable
    if isinstance(loss, FGAN):  # whose conjugate is exp(v)
        assert not loss.divergence(good, heavy).reliable


@pytest.mark.parametrize(
    ("size", "message"), [(1e6, "critic sees inputs of size .*e"), (1e-6, "critic sees inputs that deviate by"), (1.0, "")]
)
def test_a_critic_that_sees_the_units_of_a_simulator_is_told(size, message):
    class Simulator(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            pyro.module("simulator", self)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc * size, size).to_event(1), obs=x)

    def dense():
        return nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1))

    x = size * torch.randn(64, 2)
    Adversarial(Simulator(), nn.Sequential(nn.BatchNorm1d(2), dense()), penalties=()).step(x)
    pyro.clear_param_store()
    trainer = Adversarial(Simulator(), dense(), penalties=())
    if message:
        with pytest.warns(UserWarning, match=message):
            trainer.step(x)
    trainer.step(x)
