"""Training loops in plain PyTorch, beside which `benchmarks/gpu.py` measures `train`: the same networks, losses and batches.

Nothing here uses Pyro or a distribution of this package. A loop borrows the networks of a family, and computes the loss that
`train` minimises by the formula in its docstring, from the same random numbers. `tests/test_benchmarks_gpu.py` compares the
values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import expm1, log, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from pyro_genmodels import (
    GAN,
    NSF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    ConvolutionalCritic,
    ConvolutionalGenerator,
    DenoisingScoreMatching,
    Diffusion,
    EnergyModel,
    Flow,
    FlowMatching,
    ODEFlow,
    UNet,
)
from pyro_genmodels.families import Family, Persistent, Transformer

Loss = Callable[[Tensor], Tensor]
CLIP_NORM, LEARNING_RATE = 10.0, 1e-3
"""Largest norm of a gradient, and rate of Adam: the defaults of `train`."""


class Loop:
    """Steps of Adam down the gradient of a loss, as `train` takes them by default.

    Args:
        loss: function x (n, ...) -> mean loss per datum, ().
        parameters: parameters to train.
    """

    def __init__(self, loss: Loss, parameters: Sequence[Tensor]) -> None:
        self.loss, self.parameters = loss, list(parameters)
        self.optimiser = Adam(self.parameters, lr=LEARNING_RATE)

    def step(self, x: Tensor) -> float:
        """Take a step, and return the loss before it."""
        self.optimiser.zero_grad()
        loss = self.loss(x)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimiser.step()
        return loss.item()


class Game:
    """Steps of a relativistic GAN with both gradient penalties (R3GAN, arXiv 2501.05441): of the critic, then the generator.

    Args:
        generator: network z (n, latent) -> (n, *event_shape).
        critic: network x (n, *event_shape) -> (n,).
        latent: length of z.
        standardized: function of the data that returns what the critic sees.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module, latent: int, standardized: Callable[[Tensor], Tensor]) -> None:
        self.generator, self.critic, self.latent, self.standardized = generator, critic, latent, standardized
        self.optimisers = [Adam(net.parameters(), lr=LEARNING_RATE, betas=(0.0, 0.99)) for net in (generator, critic)]

    def step(self, x: Tensor) -> float:
        """Take a step of each, and return the loss of the generator before its step."""
        of_generator, of_critic = self.optimisers
        fake = self.generator(torch.randn(len(x), self.latent, device=x.device))
        real, detached = self.standardized(x).requires_grad_(), fake.detach().requires_grad_()
        on_real, on_fake = self.critic(real), self.critic(detached)
        loss = F.softplus(on_fake - on_real).mean()
        for output, inputs in ((on_real, real), (on_fake, detached)):
            (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
            loss = loss + 0.1 / 2 * slope.flatten(1).square().sum(1).mean()
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        loss = F.softplus(self.critic(real) - self.critic(fake)).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
        return loss.item()


# Losses per datum. Each reads the networks and the mean and deviation of the data from a family, once.


def standardized(family: Family) -> Callable[[Tensor], Tensor]:
    """Return the function from data to standardised data."""
    loc, scale = family.loc.clone(), family.scale.clone()
    return lambda x: (x - loc) / scale


def autoregressive(family: Any) -> Loop:
    r"""Return a loop of :math:`-\sum_i \log N(x_i; \mu_i(x_{<i}), \sigma_i(x_{<i}))`."""
    network, standard, order = family.conditionals, standardized(family), family.order.clone()
    log_det = family.scale.log().sum()

    def loss(x: Tensor) -> Tensor:
        u = standard(x)
        loc, raw = network(u.unsqueeze(-1), None, order).unbind(-1)
        scale = 1e-3 + F.softplus(raw + log(expm1(1.0)))
        log_p = -((u - loc) / scale).square() / 2 - scale.log() - log(2 * pi) / 2
        return log_det - log_p.sum(1).mean()

    return Loop(loss, list(network.parameters()))


def flow(family: Any) -> Loop:
    r"""Return a loop of :math:`-\log N(f(x)) - \log |\det f'(x)|`, by zuko's layers."""
    network, standard, log_det = family.transform, standardized(family), family.scale.log().sum()

    def loss(x: Tensor) -> Tensor:
        z, log_slope = network(None).call_and_ladj(standard(x))
        log_p = (-z.square() / 2 - log(2 * pi) / 2).sum(1) + log_slope
        return log_det - log_p.mean()

    return Loop(loss, list(network.parameters()))


def ode_flow(family: Any) -> Loop:
    r"""Return a loop of :math:`|v(x_t, t) - (x_1 - x_0)|^2`, with :math:`x_t = (1 - t) x_0 + t x_1`."""
    network, standard = family.network, standardized(family)

    def loss(x: Tensor) -> Tensor:
        x1 = standard(x)
        x0, t = torch.randn_like(x1), even_times(x1)
        s = t.reshape(-1, *[1] * (x.dim() - 1))
        error = network((1 - s) * x0 + s * x1, t, None) - (x1 - x0)
        return error.square().flatten(1).sum(1).mean()

    return Loop(loss, list(network.parameters()))


def even_times(x: Tensor) -> Tensor:
    """Return times in [0, 1) for the rows of x, (n,), spread evenly, with one random shift."""
    return (torch.rand((), device=x.device) + torch.arange(len(x), device=x.device) / len(x)) % 1


def vae(family: Any) -> Loop:
    r"""Return a loop of :math:`\log q(z \mid x) - \log p(z) - \log p(x \mid z)`, of one z for each datum."""
    encoder, decoder, mean_logits = family.encoder, family.decoder, family.loc.clone()

    def loss(x: Tensor) -> Tensor:
        loc, raw = encoder(2 * x - 1).chunk(2, -1)
        scale = 1e-5 + F.softplus(raw + log(expm1(1.0)))
        z = loc + scale * torch.randn_like(loc)
        logits = mean_logits + decoder(z).squeeze(-1)
        log_q = (-((z - loc) / scale).square() / 2 - scale.log()).sum(1)
        log_p = (-z.square() / 2).sum(1)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
        return (log_q - log_p + reconstruction).mean()

    return Loop(loss, [*encoder.parameters(), *decoder.parameters()])


def energy(family: Any) -> Loop:
    r"""Return a loop of :math:`\log f(x') - \log f(x)`, with chains x' that go on by adjusted Langevin steps."""
    network, standard, negatives = family.energy, standardized(family), family.negatives
    buffer = family.replay_buffer
    chains, step_size = buffer.chains.clone(), buffer.step_size.clone()
    if not buffer.is_started:
        chains = torch.randn_like(chains)

    def log_f(u: Tensor) -> Tensor:
        return (-u.square() / 2 - log(2 * pi) / 2).sum(1) - network(u)

    def with_score(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = u.detach().requires_grad_()
        value = log_f(u)
        return u.detach(), value.detach(), torch.autograd.grad(value.sum(), u)[0]

    def langevin(state: tuple[Tensor, Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        u, value, score = state
        small, factor = torch.rand_like(value) < 0.25, 0.01 ** torch.rand_like(value)
        step = (step_size * torch.where(small, factor, 1.0)).unsqueeze(-1)
        proposed = u + step * score + (2 * step).sqrt() * torch.randn_like(u)
        new = with_score(proposed)
        forward, backward = (proposed - u - step * score).square(), (u - proposed - step * new[2]).square()
        log_ratio = new[1] - value + ((forward - backward) / (4 * step)).sum(1)
        accept = torch.rand_like(log_ratio).log() < log_ratio
        chosen = [torch.where(accept.unsqueeze(-1) if a.dim() > 1 else accept, a, b) for a, b in zip(new, state, strict=True)]
        return (chosen[0], chosen[1], chosen[2]), log_ratio.clamp(max=0).exp().mean()

    def loss(x: Tensor) -> Tensor:
        nonlocal chains, step_size
        state = with_score(chains)
        for _ in range(negatives.steps):
            state, accepted = langevin(state)
            step_size = step_size * (0.05 * (accepted - 0.66)).exp()
        chains = state[0]
        return log_f(chains).mean() - log_f(standard(x)).mean()

    return Loop(loss, list(network.parameters()))


def diffusion(family: Any) -> Loop:
    r"""Return a loop of the error of the noise that a network of velocities predicts, in a variance-preserving process."""
    network, standard = family.network, standardized(family)

    def loss(x: Tensor) -> Tensor:
        x0 = standard(x)
        t = 1e-5 + (1 - 1e-5) * even_times(x0)
        log_alpha = -0.05 * t - 0.25 * 19.9 * t.square()
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        log_snr = log_alpha - sigma.log()
        noise = torch.randn_like(x0)
        a, s = (c.reshape(-1, *[1] * (x.dim() - 1)) for c in (alpha, sigma))
        x_t = a * x0 + s * noise
        error = s * x_t + a * network(x_t, -log_snr / 4, None) - noise
        known = torch.sigmoid(2 * log_snr).square() * (noise.square() - 1).flatten(1).sum(1)  # less variance, the same mean
        return (error.square().flatten(1).sum(1) - known).mean()

    return Loop(loss, list(network.parameters()))


def gan(family: Any) -> Game:
    """Return a loop of the generator and the critic of a GAN."""
    return Game(family.generator, family._modules["critic"].network, family.latent_dim, standardized(family))


@dataclass(frozen=True)
class Work:
    """A family, data for it, and its training in plain PyTorch.

    Attributes:
        name: family, network and size of a batch, as it is printed.
        build: function that builds the family.
        event_shape: shape of one datum.
        batch: rows of a step.
        by_hand: function of a family, whose networks are trained, that returns the loop.
        binary: True for data of zeros and ones.
        objective: function that makes the loss, or None for the default of the family.
    """

    name: str
    build: Callable[[], Family]
    event_shape: tuple[int, ...]
    batch: int
    by_hand: Callable[[Any], Loop | Game]
    binary: bool = False
    objective: Callable[[], Any] = field(default=lambda: None)

    def data(self, rows: int) -> Tensor:
        """Return rows of data with correlated coordinates, (rows, *event_shape), on the CPU."""
        x = torch.randn(rows, *self.event_shape)
        x = 1 + 2 * x + x.roll(1, -1)
        return (x > 1).float() if self.binary else x


def works(*, quick: bool = False) -> list[Work]:
    """Return a work for each family, and two large networks; or small ones of each family, which take a CPU a moment."""
    if quick:
        hidden, channels, side, d, batch = (32, 32), (8, 8), 4, 6, 32
    else:
        hidden, channels, side, d, batch = (512, 512), (32, 64, 64), 28, 64, 512
    image, images = (side, side), f"{side} x {side}"
    convolutional = {"generator": ConvolutionalGenerator(channels[::-1]), "critic": ConvolutionalCritic(channels)}
    dense = f"{d} coordinates, {' x '.join(map(str, hidden))}"
    u_net = f"{images}, U-Net {channels}"
    found = [
        Work(f"Autoregressive, {dense}", lambda: Autoregressive((d,), hidden=hidden), (d,), batch, autoregressive),
        Work(f"Flow (NSF), {dense}", lambda: Flow((d,), transform=NSF(transforms=3, hidden=hidden)), (d,), batch, flow),
        Work(
            f"ODEFlow (flow matching), {u_net}",
            lambda: ODEFlow(image, network=UNet(channels)),
            image,
            batch // 4,
            ode_flow,
            objective=FlowMatching,
        ),
        Work(
            f"VAE (Bernoulli), {images}, {' x '.join(map(str, hidden))}",
            lambda: VAE(image, likelihood=BernoulliLikelihood(), hidden=hidden, latent_dim=32),
            image,
            batch,
            vae,
            binary=True,
        ),
        Work(
            f"EnergyModel (persistent chains), {d} coordinates",
            lambda: EnergyModel(
                (d,), negatives=Persistent(batch // 2, steps=5 if quick else 20), num_steps=20 if quick else 200
            ),
            (d,),
            batch,
            energy,
        ),
        Work(
            f"Diffusion, {u_net}",
            lambda: Diffusion(image, network=UNet(channels)),
            image,
            batch // 4,
            diffusion,
            objective=DenoisingScoreMatching,
        ),
        Work(f"GAN (R3GAN), {images}, convolutional", lambda: GAN(image, **convolutional), image, batch // 4, gan),  # type: ignore[arg-type]
    ]
    if quick:
        return found
    transformer, large = Transformer(layers=6, width=512, heads=8), UNet((64, 128, 256))
    return [
        *found,
        Work(
            "Autoregressive, 256 coordinates, transformer 6 x 512",
            lambda: Autoregressive((256,), network=transformer),
            (256,),
            64,
            autoregressive,
        ),
        Work(
            "Diffusion, 3 x 32 x 32, U-Net (64, 128, 256)",
            lambda: Diffusion((3, 32, 32), network=large),
            (3, 32, 32),
            128,
            diffusion,
            objective=DenoisingScoreMatching,
        ),
    ]
