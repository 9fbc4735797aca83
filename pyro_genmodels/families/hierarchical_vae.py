r"""Hierarchical variational autoencoders: latent variables in layers, from the whole, :math:`z_L`, to the detail, :math:`z_1`.

.. math:: p(x, z_{1:L}) = p(x \mid z_{1:L}) \prod_{l=1}^{L} p(z_l \mid z_{l+1:L}), \qquad
    q(z_{1:L} \mid x) = \prod_{l=1}^{L} q(z_l \mid z_{l+1:L}, x)

Model and guide sample in the same order, from the top down. Each layer of the guide is that of the model plus a correction,
which is computed from x and is 0 at the start: a layer that the data do not need stays at its prior and costs nothing. Each
layer is conditioned on all layers above it, and the decoder on all of them (skip connections), so that none has to hand on what
another one knows.

Sønderby et al., *Ladder Variational Autoencoders* (arXiv 1602.02282); Dieng et al. (arXiv 1807.04863, skip connections); Vahdat
and Kautz, *NVAE* (arXiv 2007.03898, corrections of the prior); Child (arXiv 2011.10650).
"""

from __future__ import annotations

__all__ = ["HierarchicalVAE"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Size, Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.decoding import ADVICE, Decode, DecodedFamily, draw_weights
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.families.latents import positive_scale
from pyro_genmodels.nn.checks import check_widths
from pyro_genmodels.nn.mlp import MLP, call_batched
from pyro_genmodels.utils.errors import check_positive_int


class HierarchicalVAE(DecodedFamily):
    """A variational autoencoder with layers of latent variables, with sites ``z1``, ``z2``, ..., ``x`` in the plate ``data``.

    The last variable is standard normal, the others are normal given those after it, with independent coordinates. Both model
    and guide sample the last one first, so that `KLWeightedELBO` knows the divergence of each exactly.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        latent_dims: lengths of z1, next to the data, z2, ...; two or more.
        likelihood: distribution of one coordinate given all latent variables, as for `VAE`.
        num_features: length of the vector by which the guide of each layer reads the datum.
        encoder: your own network, called as ``encoder(x)`` or ``encoder(x, context)``, as that of `VAE`. It returns features,
            (batch, num_features).
        decoder: your own network, called as ``decoder(z)`` or ``decoder(z, context)`` with all latent variables,
            (batch, sum(latent_dims)), z1 first. It returns what that of `VAE` does.
        hidden: widths of the hidden layers of all dense networks.
        dropout: rate at which hidden units of these are dropped in training.
        missing: True if coordinates of the data may be missing, which are NaN, as for `VAE`.
        support: set in which one coordinate lies; only with likelihoods of real numbers.
        standardize: see `Family`; only with likelihoods of real numbers and those that have a scale.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `likelihood`, `encoder` or `decoder` is of the wrong kind, or `latent_dims` no sequence of lengths.
        ValueError: if there are fewer than two latent variables; later, if your own network's output has another shape.

    Example:
        >>> import pyro, torch
        >>> from pyro_genmodels.families import HierarchicalVAE
        >>> vae, x = HierarchicalVAE((4,), latent_dims=(3, 2), hidden=(16,)), torch.randn(10, 4)
        >>> guide = pyro.poutine.trace(vae.guide).get_trace(x)
        >>> [(name, tuple(guide.nodes[name]["value"].shape)) for name in guide.stochastic_nodes if name != "data"]
        [('z2', (10, 2)), ('z1', (10, 3))]
        >>> vae().sample((5,)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        latent_dims: Sequence[int] = (32, 16),
        likelihood: Likelihood | None = None,
        num_features: int = 128,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden: Sequence[int] = (256, 256),
        dropout: float = 0.0,
        missing: bool = False,
        support: constraints.Constraint = constraints.real,
        standardize: Standardize = True,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        super().__init__(
            event_shape,
            likelihood=likelihood,
            missing=missing,
            context=context,
            support=support,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        check_widths("HierarchicalVAE", latent_dims=latent_dims)
        check_positive_int("HierarchicalVAE", num_features=num_features)
        if len(latent_dims) < 2:
            raise ValueError(
                "HierarchicalVAE wants the lengths of two or more latent variables, such as latent_dims=(32, 16), but found "
                f"{latent_dims!r}. Use VAE(..., latent_dim={latent_dims[0]}) for one."
            )
        self._check_networks(encoder=encoder, decoder=decoder)
        self.latent_shape, self.num_features = Size((sum(latent_dims),)), num_features
        self.encoder = encoder or self._flat_encoder(num_features, hidden, dropout)
        self.decoder = decoder or self._flat_decoder(self.latent_shape.numel(), hidden, dropout)
        self.up = nn.ModuleList(MLP(num_features, num_features, hidden, dropout=dropout) for _ in latent_dims[1:])
        self.layers = nn.ModuleList(
            _Layer(size, sum(latent_dims[i + 1 :]), self.context_size, num_features, hidden, dropout)
            for i, size in enumerate(latent_dims)
        )

    def forward(self, context: Tensor | None = None) -> Implicit:
        embedded, layers = self.embed(context), self._layers()
        return Implicit(
            layers[-1].prior([], embedded),
            _TopDown(layers[:-1], self._decoding()),
            self.event_shape,
            context=embedded,
            support=self.support,
            reparametrised=self.likelihood.has_rsample,
            owner=type(self).__name__,
            advice=ADVICE,
        )

    @pyro_method
    def model(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Draw the latent variables from the last to the first, then x given all. The arguments are those of `Family.model`."""
        x, context = self._accept_scored(x, context)
        plate, embedded, layers = self.plate(x, context, size), self.embed(context), self._layers()
        decode, z = self._decoding(), list[Tensor]()
        draw_weights(decode.decoder)
        with plate:
            for number, layer in reversed(list(enumerate(layers, 1))):
                z.insert(0, pyro.sample(f"z{number}", layer.prior(z, embedded)))
            return pyro.sample("x", decode(_joined(z), embedded), obs=x)

    @pyro_method
    def guide(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> list[Tensor] | None:
        """Draw the latent variables given x from the last to the first, and return them; without x, nothing is drawn."""
        if x is None:
            return None
        x, context = self._accept(x, context)
        plate, embedded, layers = self.plate(x, context, size), self.embed(context), self._layers()
        features, z = self._bottom_up(x, embedded), list[Tensor]()
        with plate:
            for number, layer in reversed(list(enumerate(layers, 1))):
                z.insert(0, pyro.sample(f"z{number}", layer.posterior(features[number - 1], z, embedded)))
        return z

    def _layers(self) -> list[Any]:
        """Return the layers, from z1 on. They are read from `self` at each call, so that Pyro sees their parameters."""
        return list(self.layers)

    def _bottom_up(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        """Return what each layer of the guide reads of data (batch..., *event_shape), (batch..., num_features) each."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        first = call_batched(self.encoder, batch, self._features(x), context)
        wanted = (*batch, self.num_features)
        if not isinstance(first, Tensor) or first.shape != wanted:
            found = tuple(first.shape) if isinstance(first, Tensor) else f"a {type(first).__name__}"
            raise ValueError(f"The encoder should return a tensor of shape {wanted}, but it returned {found}.")
        features = [first]
        for layer in list(self.up):
            features.append(features[-1] + layer(features[-1]))
        return features


class _Layer(nn.Module):
    """One latent variable: its distribution in the model, and the guide's correction.

    Args:
        size: length of the variable.
        above: sum of the lengths of all variables above it; 0 for the last one.
        context_size: length of the embedded context.
        num_features: length of the features of a datum.
        hidden: widths of the hidden layers of the networks.
        dropout: rate at which hidden units are dropped in training.
    """

    def __init__(
        self, size: int, above: int, context_size: int, num_features: int, hidden: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.size = size
        self.down = MLP(above + context_size, 2 * size, hidden, dropout=dropout) if above else None
        self.correction = MLP(num_features + above + context_size, 2 * size, hidden, dropout=dropout)
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)

    def prior(self, above: Sequence[Tensor], context: Tensor | None) -> dist.TorchDistribution:
        """Return the model's distribution, given the variables above, (batch..., length) each, and an embedded context."""
        if self.down is None:
            like = next(self.correction.parameters())
            return dist.Normal(like.new_zeros(self.size), like.new_ones(())).to_event(1)
        return _normal(_output(self.down, _joined(above, context)))

    def posterior(self, features: Tensor, above: Sequence[Tensor], context: Tensor | None) -> dist.TorchDistribution:
        """Return the guide's distribution, given features of the datum too, (batch..., num_features)."""
        correction = _output(self.correction, _joined([features, *above], context))
        return _normal(correction if self.down is None else correction + _output(self.down, _joined(above, context)))


@dataclass(frozen=True)
class _TopDown:
    """The map from the last latent variable (batch..., length) to the distribution of x, with the others drawn in between."""

    layers: list[Any]
    decode: Decode

    def __call__(self, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        drawn = [z]
        for layer in reversed(self.layers):
            drawn.insert(0, layer.prior(drawn, context).rsample())
        return self.decode(_joined(drawn), context)


def _output(network: nn.Module, x: Tensor) -> Tensor:
    """Return a network's output for vectors, in their type, also where `torch.autocast` has rounded it."""
    out: Tensor = network(x)
    return out.to(x.dtype)


def _normal(params: Tensor) -> dist.TorchDistribution:
    """Return the normal distribution of parameters (batch..., 2 * length): locations, then unconstrained deviations."""
    loc, raw = params.chunk(2, -1)
    return dist.Normal(loc, positive_scale(raw)).to_event(1)


def _joined(parts: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
    """Return vectors (batch..., length) each, and a context, as one vector, with their batch shapes broadcast."""
    parts = [*parts] if context is None else [*parts, context]
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
