"""The base of families that decode latent variables: what an encoder reads, what a decoder returns, and dense networks."""

from __future__ import annotations

__all__ = ["ADVICE", "Decode", "DecodedFamily", "FlatNetwork", "broadcast", "check_prior", "draw_weights"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from torch import Size, Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from pyro_genmodels._pyro.params import random_parameters
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.distributions.partly_observed import PartlyObserved
from pyro_genmodels.families.context import VectorContext
from pyro_genmodels.families.coordinates import CoordinateFamily
from pyro_genmodels.families.family import Family
from pyro_genmodels.nn.mlp import MLP, call_batched
from pyro_genmodels.nn.padding import Padding
from pyro_genmodels.utils.distributions import mean_in_data
from pyro_genmodels.utils.errors import repr_or_class

ADVICE = "Train it by Trace_ELBO with vae.model and vae.guide; for its likelihood use log_likelihood(vae, x)."
"""Advice for a family whose distribution has no density."""


class DecodedFamily(CoordinateFamily):
    """Base of families whose data are independent coordinates given latent variables.

    A subclass sets `latent_shape`, the shape of the latent variables of one datum, and `decoder`, the network that returns the
    parameters of the likelihood of each coordinate. It may set `prior`, which may be a family.

    Args:
        args: passed to `CoordinateFamily`.
        kwargs: passed to `CoordinateFamily`.

    Attributes:
        feature_shape: shape of what the encoder is given of one datum.
    """

    decoder: nn.Module
    latent_shape: Size
    if_missing = (
        "Drop or impute these rows first, or build the family with missing=True, so that its likelihood leaves out missing "
        "values (NaN, not infinity)."
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels = self.likelihood.num_inputs + int(self.missing)
        self.feature_shape = Size((*self.event_shape, channels)) if channels > 1 or self.missing else self.event_shape

    @pyro_method
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the distribution of the data, of batch shape (batch...), given z, (batch..., *latent shape).

        The batch shapes of z and context are broadcast, as where Pyro enumerates the context.
        """
        self._check_latent(z)
        return self._decoding()(z, self.embed(None if context is None else self._as_tensors(None, context)[1]))

    def _accept_scored(self, x: Any, context: Any) -> tuple[Any, Any]:
        """Return the arguments of the model, after checks, with data of the type that the likelihood scores."""
        x, context = self._accept(x, context)
        return x if x is None or self.missing else self.likelihood.cast(x, self.loc.dtype), context

    def _standardize_contexts(self, context: Tensor, *, again: bool = True) -> None:
        super()._standardize_contexts(context, again=again)
        prior = getattr(self, "prior", None)
        if isinstance(prior, Family) and prior.context is not None:
            prior._standardize_contexts(context, again=False)

    def _due_contexts(self) -> list[VectorContext]:
        prior = getattr(self, "prior", None)
        return super()._due_contexts() + (prior._due_contexts() if isinstance(prior, Family) else [])

    def _given_prior(self, context: Tensor | None) -> Any:
        """Return the prior as it was given: the distribution, or that of the family, which takes the context if it can."""
        prior: Any = self.prior
        return prior(context if prior.context is not None else None) if isinstance(prior, Family) else prior

    def _check_latent(self, z: Tensor) -> None:
        """Raise a ValueError unless z is of the shape (batch..., *latent_shape)."""
        if z.shape[z.dim() - len(self.latent_shape) :] != self.latent_shape:
            wanted = ", ".join(["...", *map(str, self.latent_shape)])
            raise ValueError(f"decode wants z of shape ({wanted}), but found {tuple(z.shape)}.")

    def _check_networks(self, **networks: Any) -> None:
        """Raise a TypeError unless each network of one's own, by its role, is a module."""
        for role, network in networks.items():
            if not (network is None or isinstance(network, nn.Module)):
                found = f"the class {network.__name__}" if isinstance(network, type) else type(network).__name__
                raise TypeError(f"{type(self).__name__} wants a torch.nn.Module as its {role}, but found {found}.")

    def _flat_encoder(self, num_outputs: int, hidden: Sequence[int], dropout: float) -> FlatNetwork:
        """Return a dense network from the features of a datum and the context to (num_outputs,)."""
        joined = Padding([self.likelihood.at(i).num_inputs + int(self.missing) for i in range(self.event_shape.numel())])
        return FlatNetwork(joined.total + self.context_size, (num_outputs,), hidden, dropout, inputs=joined)

    def _flat_decoder(self, latent_size: int, hidden: Sequence[int], dropout: float) -> FlatNetwork:
        """Return a dense network from latent variables and the context to (*event_shape, likelihood.num_outputs)."""
        padded = Padding([self.likelihood.at(i).num_outputs for i in range(self.event_shape.numel())])
        outputs = (*self.event_shape, self.likelihood.num_outputs)
        return FlatNetwork(latent_size + self.context_size, outputs, hidden, dropout, outputs=padded)

    def _features(self, x: Tensor) -> Tensor:
        """Return what the encoder sees of data (batch..., *event_shape)."""
        likelihood, pretransform, dtype = self.measured, self.pretransform, self.loc.dtype
        if not self.missing:
            x = likelihood.cast(x, dtype)
            features = likelihood.encode(x if pretransform is None else pretransform(x)).to(dtype)
            return features.squeeze(-1) if likelihood.num_inputs == 1 else features
        seen = ~x.isnan()
        y = likelihood.fill(x if pretransform is None else pretransform(x), seen)
        features = likelihood.encode(likelihood.cast(y, dtype)).to(dtype)
        known = seen.unsqueeze(-1).to(dtype)
        return torch.cat([known, features * known], -1)

    def _decoding(self) -> Decode:
        """Return the map from the latent variables to the distribution of x.

        The decoder is read from `self` at each call, so that Pyro sees its parameters.
        """
        pretransform = self.elementwise_pretransform if self.missing else self.pretransform
        observed = self.support if self.missing else None
        return Decode(self.decoder, self.measured, self.latent_shape, self.event_shape, pretransform, observed)


@dataclass(frozen=True)
class Decode:
    """The map from z (batch..., *latent_shape) and context (batch..., c) to the distribution of x.

    Attributes:
        pretransform: bijection from data to what the networks model; elementwise if coordinates may be missing.
        support: set in which one coordinate lies, if some may be missing, else None.
    """

    decoder: nn.Module
    likelihood: Likelihood
    latent_shape: Size
    event_shape: Size
    pretransform: Transform | None
    support: constraints.Constraint | None

    def __call__(self, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        batch, z = broadcast(z, len(self.latent_shape), context)
        params = call_batched(self.decoder, batch, z, context)
        wanted = (*batch, *self.event_shape, self.likelihood.num_outputs)
        if wanted[-1] == 1 and params.shape == wanted[:-1]:
            params = params.unsqueeze(-1)
        if params.shape != wanted:
            raise ValueError(f"The decoder should return a tensor of shape {wanted}, but it returned {tuple(params.shape)}.")
        if self.support is not None:
            return PartlyObserved(self.likelihood, params, self.event_shape, transform=self.pretransform, support=self.support)
        x = self.likelihood(params).to_event(len(self.event_shape))
        return x if self.pretransform is None else InDataUnits(x, [self.pretransform.inv])


class InDataUnits(dist.TransformedDistribution):
    """The distribution of data whose standardised values have another one, with its mean."""

    @property
    def mean(self) -> Tensor:
        return mean_in_data(self.base_dist.mean, self.transforms[0].inv)


class FlatNetwork(nn.Module):
    """A dense network of the flattened input and the context.

    Args:
        num_inputs: length of the input and the context.
        output_shape: shape of one output.
        hidden: widths of the hidden layers.
        dropout: rate at which hidden units are dropped in training.
        inputs: padding of the input, if that is one of features of coordinates.
        outputs: padding of the output, if that is one of parameters of coordinates.
    """

    def __init__(
        self,
        num_inputs: int,
        output_shape: Sequence[int],
        hidden: Sequence[int],
        dropout: float,
        *,
        inputs: Padding | None = None,
        outputs: Padding | None = None,
    ) -> None:
        super().__init__()
        self.output_shape = Size(output_shape)
        self.inputs, self.outputs = (
            padding if padding is not None and padding.is_needed else None for padding in (inputs, outputs)
        )
        self.mlp = MLP(
            num_inputs, self.output_shape.numel() if self.outputs is None else self.outputs.total, hidden, dropout=dropout
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x.reshape(len(x), -1) if self.inputs is None else self.inputs.join(x)
        out = self.mlp(x if context is None else torch.cat((x, context), -1))
        return out.unflatten(-1, self.output_shape) if self.outputs is None else self.outputs.pad(out)


def broadcast(x: Tensor, event_dim: int, context: Tensor | None) -> tuple[Size, Tensor]:
    """Return the common batch shape of x, (batch..., *event), and an embedded context, (batch..., c), and x of that shape.

    Raises:
        ValueError: if their batch shapes cannot be broadcast.
    """
    batch, event = x.shape[: x.dim() - event_dim], x.shape[x.dim() - event_dim :]
    if context is None or context.shape[:-1] == batch:
        return batch, x
    try:
        batch = torch.broadcast_shapes(batch, context.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"One context for each row is wanted, but found rows of batch shape {tuple(batch)} and contexts of batch shape "
            f"{tuple(context.shape[:-1])}, which cannot be broadcast."
        ) from error
    return batch, x.expand(batch + event)


def check_prior(owner: str, prior: Any, examples: str) -> None:
    """Check that the prior of latent variables is a family, or a distribution without parameters of its own.

    Args:
        owner: name of the class.
        prior: what was given.
        examples: words for what would do, in messages.

    Raises:
        TypeError: if it is something else.
        ValueError: if it is the distribution of a family, whose parameters would not be trained.
    """
    if not isinstance(prior, (Distribution, Family)):
        raise TypeError(
            f"{owner} wants a Pyro distribution or a family as its prior, such as {examples}, but found {repr_or_class(prior)}."
        )
    if isinstance(prior, GenerativeDistribution):
        raise ValueError(
            f"{owner} wants the family that made this {type(prior).__name__} as its prior, so that the prior is trained."
        )


def draw_weights(network: nn.Module) -> None:
    """Draw the random weights (`PyroSample`) of a Bayesian network outside the plate of the data; Pyro then reuses them."""
    for module, name in random_parameters(network):
        getattr(module, name)
