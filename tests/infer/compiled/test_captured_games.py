"""`Adversarial` by captured rounds: losses and parameters of eager steps, for losses, penalties, pairings and optimisers."""

import copy
import pickle
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_genmodels import GAN, Adversarial, DenseCritic, DenseGenerator, train
from pyro_genmodels.infer.adversarial import (
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
    WeightClipping,
    spectral_normalized,
)
from pyro_genmodels.infer.compiled import Captured, CaptureError, Compiled, Eager

STEPS = 4
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))
SMALL = {"generator": DenseGenerator((8,)), "critic": DenseCritic((8,))}


class Joined(nn.Module):
    """A critic of all its inputs, joined."""

    def __init__(self, inputs):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(inputs, 8), nn.SiLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def forward(self, *parts):
        return self.network(torch.cat(parts, -1))


class Latent(pyro.nn.PyroModule):
    """A model with a latent variable and its guide."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 2), nn.Linear(3, 1)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, torch.ones(len(x), 1)).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc = self.encoder(torch.cat([x, torch.randn(len(x), 1)], -1))
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))


def coin(x):
    """A model whose samples carry no gradient."""
    logit = pyro.param("logit", torch.tensor(0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Bernoulli(logits=logit.expand(2)).to_event(1), obs=(x > 0).float())


def of_gan(**options):
    def build(mode):
        gan = GAN((2,), **SMALL)
        return Adversarial(gan.model, gan.critic, mode=mode, **options)

    return build


def of_latent(inputs, **options):
    def build(mode):
        fit = Latent()
        return Adversarial(fit.model, Joined(inputs), guide=fit.guide, mode=mode, **options)

    return build


def normalised(mode):
    gan = GAN((2,), **SMALL)
    return Adversarial(gan.model, spectral_normalized(gan.critic), Hinge(), mode=mode)


ADAM = partial(torch.optim.Adam, lr=1e-2)
PLAIN = of_gan(penalties=())  # quick to capture; the rows of GAMES have the penalties
GAMES = {
    "relativistic, both penalties": of_gan(),
    "minimax, R1": of_gan(loss=Minimax(), penalties=R1(0.5)),
    "R2": of_gan(loss=NonSaturating(), penalties=R2(0.5)),
    "WGAN, clipped": of_gan(loss=WGAN(), penalties=WeightClipping(0.05), num_critic_steps=3),
    "WGAN, gradient penalty": of_gan(loss=WGAN(), penalties=GradientPenalty(), num_critic_steps=2),
    "spectral normalisation": normalised,
    "packs": lambda mode: Adversarial(GAN((2,), **SMALL).model, nn.Sequential(nn.Flatten(), Joined(4)), pack=2, mode=mode),
    "no penalty, average": of_gan(loss=LeastSquares(), penalties=(), ema_decay=0.9),
    "two optimisers": of_gan(optim=(partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.RMSprop, lr=1e-3))),
    "AdamW": of_gan(optim=partial(torch.optim.AdamW, lr=1e-2, amsgrad=True)),
    "optimiser of Pyro": of_gan(optim=pyro.optim.Adam({"lr": 1e-2})),
    "joint": of_latent(3, pairing=JointPairing(), optim=ADAM),
    "aggregate": of_latent(1, pairing=AggregatePairing(), optim=ADAM),
    "with an ELBO": of_latent(2, extra_loss=Trace_ELBO(), weight=0.5, optim=ADAM),
    "score function": lambda mode: Adversarial(coin, Joined(2), NonSaturating(), ADAM, mode=mode),
}


def played(build, mode, steps=STEPS):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    trainer = build(mode)
    pyro.set_rng_seed(1)
    losses = [trainer.step(X) for _ in range(steps)]
    return losses, trainer, torch.get_rng_state()


def assert_same_losses(found, wanted):
    for losses, other in zip(found, wanted, strict=True):
        assert losses == pytest.approx(other, rel=1e-4, abs=1e-5)


SHOWN = {"relativistic, both penalties", "two optimisers", "joint", "score function"}
ROWS = [pytest.param(build, id=name, marks=() if name in SHOWN else pytest.mark.slow) for name, build in GAMES.items()]


@pytest.mark.parametrize("build", ROWS)
def test_a_captured_game_is_the_eager_one(build):
    wanted, eager, state = played(build, Eager())
    found, captured, found_state = played(build, Captured(script=False))
    assert_same_losses(found, wanted)
    assert torch.equal(found_state, state)
    for name in ("generator", "critic"):  # the names of a family's parameters are new in each run
        for p, q in zip(*(trainer.parameters[name].values() for trainer in (captured, eager)), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert wanted[0] != wanted[-1]


@pytest.mark.slow
def test_a_game_by_torchscript():
    assert_same_losses(played(of_gan(), Captured())[0], played(of_gan(), Eager())[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["relativistic, both penalties", "WGAN, gradient penalty"])
def test_a_compiled_game(name):
    assert_same_losses(played(GAMES[name], Compiled())[0], played(GAMES[name], Eager())[0])


def test_the_first_step_alone_is_eager(monkeypatch):
    calls = []
    original = Adversarial._update
    monkeypatch.setattr(Adversarial, "_update", lambda self, name, loss: (calls.append(name), original(self, name, loss)))
    played(PLAIN, Captured(script=False))
    assert calls == ["critic", "generator"]


@pytest.mark.slow
def test_a_learning_rate_and_a_weight_may_change():
    def losses(mode):
        build = of_latent(2, extra_loss=Trace_ELBO(), optim=ADAM)
        found, trainer, _ = played(build, mode, 3)
        trainer.weight = 0.1
        trainer.optimisers["critic"].param_groups[0]["lr"] = 0.1
        return found + [trainer.step(X) for _ in range(2)]

    assert_same_losses(losses(Captured(script=False)), losses(Eager()))


def test_a_state_is_saved_and_loaded():
    def losses(mode):
        _, trainer, _ = played(PLAIN, mode, 3)
        state = trainer.state_dict()
        first = [trainer.step(X) for _ in range(2)]
        trainer.load_state_dict(state)
        return first, [trainer.step(X) for _ in range(2)]

    first, second = losses(Captured(script=False))
    assert_same_losses(second, first)
    assert_same_losses(first, losses(Eager())[0])


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(copied):
    _, trainer, _ = played(of_gan(), Captured(script=False), 3)
    twin = copied(trainer)
    before = [p.clone() for p in trainer.critic.parameters()]
    pyro.clear_param_store()  # the twin's parameters have the names of the original's
    twin.step(X)
    twin.step(X)
    for p, value in zip(trainer.critic.parameters(), before, strict=True):
        torch.testing.assert_close(p, value, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [Eager(), Captured(script=False)], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(mode):
    _, trainer, _ = played(PLAIN, mode, 3)
    before = [p.clone() for p in trainer.critic.parameters()]
    trainer._last_good = trainer.state_dict()
    with torch.no_grad():
        next(trainer.critic.parameters()).fill_(torch.nan)
    with pytest.raises(LostGameError, match="the critic's loss is nan and the norm of its gradient nan at step 4"):
        trainer.step(X)
    for p, value in zip(trainer.critic.parameters(), before, strict=True):
        torch.testing.assert_close(p, value, rtol=0, atol=0)


class Branching(nn.Module):
    """A critic that reads values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_what_cannot_be_captured_is_refused_by_name():
    with pytest.raises(CaptureError, match="reads the value of a tensor"):
        played(lambda mode: Adversarial(GAN((2,), **SMALL).model, Branching(), mode=mode), Captured())
    with pytest.raises(CaptureError, match=r"optimiser of the critic.*Rprop has no formula"):
        played(of_gan(optim=torch.optim.Rprop), Captured())
    with pytest.raises(TypeError, match="mode"):
        of_gan()("captured")


def test_training_by_captured_rounds():
    """Batches of 8, 8 and 7 rows."""
    x = torch.randn(23, 2)

    def fitted(mode):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        fit = train(GAN((2,), **SMALL), x, valid=x, epochs=2, batch_size=8, seed=1, mode=mode, progress=False)
        return [{name: value for name, value in record.items() if name != "seconds"} for record in fit.history], fit.mode

    (wanted, eager), (found, captured) = fitted(None), fitted(Captured(script=False))
    assert (eager, captured) == (Eager(), Captured(script=False))
    assert_same_losses(found, wanted)


def test_a_trainer_has_a_mode_of_its_own():
    gan = GAN((2,), **SMALL)
    with pytest.raises(ValueError, match="a mode of its own"):
        train(gan, X, objective=Adversarial(gan.model, gan.critic), mode=Captured(), progress=False)
