"""What a critic sees beside the data: the arguments of the model, all with one row per datum or those that are named."""

import pyro
import pyro.distributions as dist
import pyro_examples as examples
import pytest
import torch
from torch import nn

from pyro_genmodels import GAN, VAE, Adversarial, Labels
from pyro_genmodels.infer.adversarial import AggregatePairing, JointPairing


class Critic(nn.Module):
    """A critic of any number of inputs, which remembers their shapes."""

    def __init__(self, inputs):
        super().__init__()
        self.layer, self.shapes = nn.Linear(inputs, 1), []

    def forward(self, *inputs):
        self.shapes.append([tuple(x.shape) for x in inputs])
        return self.layer(torch.cat([x.reshape(len(x), -1).float() for x in inputs], 1)).squeeze(-1)


class UnconditionalCritic(Critic):
    def forward(self, x):
        return super().forward(x)


NOTES = (5, 12)  # 3 time steps of 4 notes, for 5 sequences


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (None, [NOTES, (5, 3, 4), (5, 3), (5,)]),
        ((), [NOTES]),
        (("mini_batch_mask",), [NOTES, (5, 3)]),
        (["mini_batch_seq_lengths", "mini_batch"], [NOTES, (5,), (5, 3, 4)]),
    ],
    ids=["by default", "nothing", "the mask", "two"],
)
def test_a_deep_markov_model_shows_the_critic_what_is_named(names, shapes):
    """The model has four arguments with a row per sequence; the first holds the data."""
    model, args = examples.DeepMarkov().model, examples.music()
    critic = Critic(sum(torch.Size(shape[1:]).numel() for shape in shapes))
    trainer = Adversarial(model, critic, critic_context=names)
    losses = trainer.step(*args)
    assert all(torch.tensor(loss).isfinite() for loss in losses.values())
    assert critic.shapes[0] == shapes
    trainer.evaluate_loss(*args)
    trainer.critic_outputs(*args)
    assert all(seen == shapes for seen in critic.shapes)


def test_a_critic_without_room_is_told_what_it_is_given():
    with pytest.raises(ValueError, match=r"4 tensors, of which 3 .*mini_batch_reversed, .*critic_context=\(\) for none"):
        Adversarial(examples.DeepMarkov().model, UnconditionalCritic(12)).step(*examples.music())


def test_keywords_and_modules_are_found_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x, *, weight, shift=0.0):
            pyro.module("model", self)
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc + shift, 1.0), obs=x)

    critic = Critic(2)
    Adversarial(Model(), critic, critic_context=["weight"]).step(torch.randn(6), weight=torch.ones(6), shift=0.5)
    assert critic.shapes[0] == [(6,), (6,)]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (("mini_batch_msk",), ValueError, "mini_batch_msk, but the model's arguments are mini_batch, mini_batch_reversed"),
        ("mini_batch_mask", TypeError, "found 'mini_batch_mask'"),
        ((2,), TypeError, r"found \(2,\)"),
        (("annealing_factor",), ValueError, "'annealing_factor'.* one row for each of the 5 data, but found float"),
    ],
)
def test_names_that_cannot_be_shown_are_refused(names, error, message):
    with pytest.raises(error, match=message):
        Adversarial(examples.DeepMarkov().model, Critic(12), critic_context=names).step(*examples.music())


def test_a_critic_of_latent_variables_sees_no_arguments():
    vae = VAE((3,), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match="critic of AggregatePairing compares no data"):
        Adversarial(vae.model, Critic(2), guide=vae.guide, pairing=AggregatePairing(), critic_context=())


def test_a_joint_critic_sees_named_arguments_too():
    vae, critic = VAE((3,), latent_dim=2, hidden=(8,), context=1), Critic(6)
    trainer = Adversarial(vae.model, critic, guide=vae.guide, pairing=JointPairing(), critic_context=["context"])
    trainer.step(torch.randn(8, 3), torch.randn(8, 1))
    assert critic.shapes[0] == [(8, 3), (8, 2), (8, 1)]


def test_an_unconditional_critic_of_a_conditional_family():
    """With the labels left out, the critic compares marginal distributions only."""
    gan = GAN((2,), context=Labels(3))
    critic = UnconditionalCritic(2)
    Adversarial(gan.model, critic, critic_context=()).step(torch.randn(8, 2), torch.arange(8) % 3)
    assert critic.shapes[0] == [(8, 2)]
