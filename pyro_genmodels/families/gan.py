r"""Generative adversarial networks: a generator turns noise into data, and a critic trains it.

.. math:: x = G(z, c), \qquad z \sim \mathcal{N}(0, I)

The model has no density. Trained by `Adversarial`. Goodfellow et al., *Generative Adversarial Nets* (arXiv 1406.2661).
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
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.nn.gan import CriticChoice, DenseCritic, DenseGenerator, GeneratorChoice
from pyro_genmodels.nn.mlp import call_batched
from pyro_genmodels.utils.errors import check_choice, check_positive_int


class GAN(ContinuousFamily):
    """A generator, and the critic that trains it.

    Args:
        event_shape: shape of one datum.
        context: see `Family`; generator and critic are both given the context. Your own embedding module is copied for the
            critic, so that generator and critic each train their own.
        latent_dim: number of coordinates of the noise.
        generator: choice, `DenseGenerator()`, the default, or `ConvolutionalGenerator()`; or your own module, called as
            ``generator(z)`` or ``generator(z, context)`` with z (n, latent_dim), which returns (n, *event_shape).
        critic: choice, `DenseCritic()`, the default (with five octaves of sines for up to four coordinates), or
            `ConvolutionalCritic()`; or your own module, called as ``critic(x)`` or ``critic(x, context)``, which returns (n,).
            Its inputs are on the generator's scale: data of mean 0 and deviation 1.
        pack: number of rows that the critic is given together, as (n, pack, *event_shape), so that it can notice a lack of
            variety (PacGAN, arXiv 1712.04086); its context is then (n, pack * c).
        support: set in which one coordinate lies; see `Family`.
        levels: number K of levels, for data that are integers 0 .. K - 1. Generator and critic are trained on these with
            uniform noise added, and draws are rounded.
        standardize: see `Family`; by default True for a `DenseGenerator` and "jointly" otherwise.
        standardize_context: see `Family`.
        name: see `Family`.

    Attributes:
        critic: module to pass to `Adversarial`; with a context, it takes the labels or vectors themselves.

    Raises:
        TypeError: if the generator or critic is neither a choice nor a module.
        ValueError: if a size is not positive; later, if your own network's output has another shape.

    Example:
        >>> from pyro_genmodels import GAN, train
        >>> import torch
        >>> gan = GAN((2,), latent_dim=4)
        >>> fit = train(gan, torch.randn(256, 2), epochs=2, progress=False)
        >>> gan().sample((5,)).shape
        torch.Size([5, 2])
    """

    _trains_by_density = _has_density = False

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
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        check_positive_int("GAN", latent_dim=latent_dim, pack=pack)
        generator = check_choice("GAN", "generator", generator, DenseGenerator(), GeneratorChoice | nn.Module)
        if standardize is None:
            standardize = generator.standardize if isinstance(generator, GeneratorChoice) else "jointly"
        super().__init__(
            event_shape,
            context=context,
            support=support,
            levels=levels,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        self.latent_dim = latent_dim
        default = DenseCritic(octaves=5 if self.event_shape.numel() <= 4 else 0)
        critic = check_choice("GAN", "critic", critic, default, CriticChoice | nn.Module)
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
            owner=type(self).__name__,
            advice="Train it by Adversarial. Judge its draws by c2st, mmd_test or sliced_wasserstein, or see "
            "gaussian_observation_likelihood.",
        )
        return self._over_data(implicit)

    def _context_modules(self) -> list[nn.Module | None]:
        # not self.critic, which would make the critic's parameters those of the model that asks
        return [self.context, self._modules["critic"].context]  # type: ignore[union-attr, list-item]


class Critic(nn.Module):
    """A critic network with a module that embeds its context.

    Args:
        network: network called as network(x) or network(x, embedded context), which returns (n,).
        context: module that embeds the context, or None.
        pack: number of rows that the network is given together.
    """

    def __init__(self, network: nn.Module, context: nn.Module | None, pack: int) -> None:
        super().__init__()
        self.network, self.context, self.pack = network, context, pack

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the critic's values (n,) at rows x, (n, *event_shape), or at packs of rows, (n, pack, *event_shape)."""
        if self.context is None:
            return self.network(x)
        if context is None:
            raise ValueError("This critic wants a context, but was given none. Call it as critic(x, context).")
        return self.network(x, self.context(context).reshape(len(x), -1))


@dataclass(frozen=True)
class _Generate:
    """The map from z (batch..., latent) and context (batch..., c) to a point mass at x."""

    generator: Callable[..., Tensor]
    event_shape: Size

    def __call__(self, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        batch = z.shape[:-1]
        x = call_batched(self.generator, batch, z, context)
        if x.shape != batch + self.event_shape:
            wanted = (*batch, *self.event_shape)
            raise ValueError(f"The generator should return a tensor of shape {wanted}, but it returned {tuple(x.shape)}.")
        return dist.Delta(x, event_dim=len(self.event_shape))
