r"""Generative adversarial networks as a family: noise through a network, and a critic to train it by.

.. math:: x = G(z, c), \qquad z \sim \mathcal{N}(0, I)

There is no density. Trained by `Adversarial`. Goodfellow et al., *Generative Adversarial Nets* (arXiv 1406.2661).
"""

from __future__ import annotations

__all__ = ["GAN"]

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyro.distributions as dist
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Standardize
from pyro_genmodels.nn.gan import CriticChoice, DenseCritic, DenseGenerator, GeneratorChoice
from pyro_genmodels.nn.mlp import call_batched
from pyro_genmodels.utils.errors import check_choice


class GAN(ContinuousFamily):
    """A generator, and the critic that trains it.

    Args:
        event_shape: shape of one datum.
        context: see `Family`; generator and critic are both told. A module of one's own that embeds is copied for the critic,
            so that each player trains its own.
        latent_dim: coordinates of the noise.
        generator: a choice, `DenseGenerator()`, the default, or `ConvolutionalGenerator()`; or a module of your own,
            ``generator(z)`` or ``generator(z, context)`` -> (n, *event_shape), z (n, latent_dim).
        critic: a choice, `DenseCritic()`, the default, with five octaves of sines up to four coordinates, or
            `ConvolutionalCritic()`; or a module of your own, ``critic(x)`` or ``critic(x, context)`` -> (n,). It sees what the
            generator makes: data of mean 0 and deviation 1.
        pack: rows that the critic sees at once, (n, pack, *event_shape), so that it sees a lack of variety (PacGAN, arXiv
            1712.04086); its context is (n, pack * c).
        support: where one coordinate lies; see `Family`.
        levels: with K given, data are integers 0 .. K - 1: the players see these with uniform noise, and draws are rounded.
        standardize: see `Family`; by default jointly for convolutions, and in each coordinate else.
        name: see `Family`.

    Attributes:
        critic: the module to pass to `Adversarial`; with a context, it takes labels or vectors as they come.

    Raises:
        TypeError: for a generator or critic that is none.
        ValueError: for sizes that are not positive, and by networks of your own whose output has another shape.

    Example:
        >>> from pyro_genmodels import GAN, train
        >>> import torch
        >>> gan = GAN((2,), latent_dim=4)
        >>> fit = train(gan, torch.randn(256, 2), epochs=2, progress=False)
        >>> gan().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        latent_dim: int = 16,
        generator: GeneratorChoice | nn.Module | None = None,
        critic: CriticChoice | nn.Module | None = None,
        pack: int = 1,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        standardize: Standardize | None = None,
        name: str | None = None,
    ) -> None:
        if standardize is None:
            standardize = True if isinstance(generator, DenseGenerator | None) else "jointly"
        super().__init__(event_shape, context=context, support=support, levels=levels, standardize=standardize, name=name)
        for role, value in (("latent_dim", latent_dim), ("pack", pack)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"GAN wants {role} as a positive integer, but found {value!r}.")
        self.latent_dim = latent_dim
        few = self.event_shape.numel() <= 4
        generator = check_choice("GAN", "generator", generator, DenseGenerator(), GeneratorChoice | nn.Module)
        critic = check_choice("GAN", "critic", critic, DenseCritic(octaves=5 if few else 0), CriticChoice | nn.Module)
        own = isinstance(generator, nn.Module)
        self.generator = generator if own else generator.build(self.event_shape, latent_dim, self.context_size)
        network = critic if isinstance(critic, nn.Module) else critic.build(self.event_shape, pack, pack * self.context_size)
        self.critic = Critic(network, copy.deepcopy(self.context), pack)

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        zero = self.loc.new_zeros(self.latent_dim)
        implicit = Implicit(
            dist.Normal(zero, zero + 1).to_event(1),
            _Generate(self.generator, self.event_shape),
            self.event_shape,
            context=self.embed(context),
            support=self.support,
            pretransform=self.pretransform,
            reparametrised=True,
            advice="Train it by Adversarial. Judge its draws by c2st, mmd_test or sliced_wasserstein, or see "
            "gaussian_observation_likelihood.",
        )
        return self._of_data(implicit)


class Critic(nn.Module):
    """A critic that embeds its context.

    Args:
        network: (x, embedded context) -> (n,).
        context: a module that embeds, or None.
        pack: rows it sees at once.
    """

    def __init__(self, network: nn.Module, context: nn.Module | None, pack: int) -> None:
        super().__init__()
        self.network, self.context, self.pack = network, context, pack

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """What it says of rows x (n, *event_shape), or of packs (n, pack, *event_shape): (n,)."""
        if self.context is None:
            return self.network(x)
        if context is None:
            raise ValueError("This critic wants a context beside x, and was given none. Call it as critic(x, context).")
        return self.network(x, self.context(context).reshape(len(x), -1))


@dataclass(frozen=True)
class _Generate:
    """z (batch..., latent) and context (batch..., c) -> x, a point."""

    generator: Callable[..., Tensor]
    event_shape: Size

    def __call__(self, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        batch = z.shape[:-1]
        x = call_batched(self.generator, batch, z, context)
        if x.shape != batch + self.event_shape:
            raise ValueError(f"The generator should return {(*batch, *self.event_shape)}, but returned {tuple(x.shape)}.")
        return dist.Delta(x, event_dim=len(self.event_shape))
