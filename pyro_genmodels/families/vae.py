r"""Variational autoencoders: a latent variable :math:`z`, a decoder :math:`p(x \mid z)` and an encoder :math:`q(z \mid x)`.

.. math:: \log p(x) \ge \mathbb{E}_{q(z \mid x)}[\log p(x \mid z) + \log p(z) - \log q(z \mid x)]

The gap is :math:`\mathrm{KL}(q(z \mid x) \| p(z \mid x))`. Trained by `Trace_ELBO`. Kingma and Welling (arXiv 1312.6114).
"""

from __future__ import annotations

__all__ = ["VAE"]

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.nn import pyro_method
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.decoding import ADVICE, DecodedFamily, broadcast, check_prior, draw_weights
from pyro_genmodels.families.family import Family, Standardize, StandardizeContext
from pyro_genmodels.families.latents import LatentPosterior, LatentPrior, NormalPosterior
from pyro_genmodels.nn.mlp import call_batched
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import check_choice, check_positive_int


class VAE(DecodedFamily):
    """A variational autoencoder, with sites ``z`` and ``x`` in the plate ``data``.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        latent_dim: length of z; ignored if `prior` is given.
        likelihood: distribution of one coordinate given z: `NormalLikelihood()`, the default, another one of
            `pyro_genmodels.families`, or `Mixed` with one for each column of a table.
        prior: distribution of z, over one event of any shape: a Pyro distribution, a family (given the context if it takes
            one), `MixturePrior()`, `VampPrior()`, or None for a standard normal.
        posterior: form of the guide: `NormalPosterior()`, the default, `FullNormalPosterior()` or `FlowPosterior()`.
        encoder: your own network, called as ``encoder(x)`` or ``encoder(x, context)``. It returns the parameters
            (batch, 2 * latent size) of a normal, location first, or the pair (location, scale); with another `posterior` its
            parameters, (batch, posterior.num_outputs(latent size)). Its input x is
            (batch, *event_shape) with values of about -1 to 1 (with `CategoricalLikelihood` one-hot in a last dimension, with
            `Mixed` padded with zeros there). With `missing` the last dimension, which is then there in any
            case, begins with 1 where a coordinate is known, and is 0 where it is missing.
        decoder: your own network, called as ``decoder(z)`` or ``decoder(z, context)``. It returns
            (batch, *event_shape, likelihood.num_outputs); the last dimension may be left out if it is 1.
        hidden: widths of the hidden layers of the default encoder and decoder.
        dropout: rate at which hidden units of the default encoder and decoder are dropped in training.
        missing: True if coordinates of the data may be missing, which are NaN. They have no part in the likelihood, so that
            training maximises a bound on the density of what is known, and by `ImportanceWeightedELBO` that of Mattei and
            Frellsen, *MIWAE* (arXiv 1812.02633). `pyro_genmodels.evaluation.impute` draws them.
        support: set in which one coordinate lies; only with likelihoods of real numbers.
        standardize: see `Family`; only with likelihoods of real numbers and those that have a scale.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `likelihood`, `prior`, `posterior`, `encoder` or `decoder` is of the wrong kind.
        ValueError: if the prior is not over one event of real numbers; later, if your own network's output has another shape.

    Example:
        >>> from pyro_genmodels import VAE, BernoulliLikelihood
        >>> vae = VAE((28, 28), latent_dim=8, likelihood=BernoulliLikelihood())
        >>> vae().sample((5,)).shape
        torch.Size([5, 28, 28])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        latent_dim: int = 8,
        likelihood: Likelihood | None = None,
        prior: Distribution | Family | LatentPrior | None = None,
        posterior: LatentPosterior | None = None,
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
        check_positive_int("VAE", latent_dim=latent_dim)
        posterior = check_choice("VAE", "posterior", posterior, NormalPosterior(), LatentPosterior)
        if not (prior is None or isinstance(prior, LatentPrior)):
            _check_prior(prior)
        self._check_networks(encoder=encoder, decoder=decoder)
        if prior is None or isinstance(prior, LatentPrior):
            self.latent_shape = Size((latent_dim,))
            self.prior: Any = None if prior is None else prior.build(self.latent_shape, self.feature_shape)
        else:
            self.latent_shape, self.prior = prior.event_shape, prior
        latent_size = self.latent_shape.numel()
        self.encoding, self._encoded = posterior.build(self.latent_shape), posterior
        self.encoder = encoder or self._flat_encoder(posterior.num_outputs(latent_size), hidden, dropout)
        self.decoder = decoder or self._flat_decoder(latent_size, hidden, dropout)

    def forward(self, context: Tensor | None = None) -> Implicit:
        prior = self._prior(context)
        return Implicit(
            prior,
            self._decoding(),
            self.event_shape,
            context=self.embed(context),
            support=self.support,
            reparametrised=prior.has_rsample and self.likelihood.has_rsample,
            owner=type(self).__name__,
            advice=ADVICE,
        )

    @pyro_method
    def model(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Draw z from the prior, then x given z. The arguments are those of `Family.model`."""
        x, context = self._accept_scored(x, context)
        plate, prior, decode, embedded = (
            self.plate(x, context, size),
            self._prior(context),
            self._decoding(),
            self.embed(context),
        )
        draw_weights(decode.decoder)
        with plate:
            z = pyro.sample("z", prior)
            return pyro.sample("x", decode(z, embedded), obs=x)

    @pyro_method
    def guide(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor | None:
        """Draw z given x from the encoder's distribution; without x, nothing is drawn."""
        if x is None:
            return None
        x, context = self._accept(x, context)
        plate, posterior = self.plate(x, context, size), self.posterior(x, context)  # parameters are read outside the plate
        with plate:
            return pyro.sample("z", posterior)

    @pyro_method
    def posterior(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the encoder's distribution of z, of batch shape (batch...), given data x, (batch..., *event_shape).

        The batch shapes of x and context are broadcast, as where Pyro enumerates the context.
        """
        x, context = self._as_tensors(x, context)
        return self._encode(self._features(x), self.embed(context))

    def _encode(self, features: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        """Return the distribution of z, given inputs of the encoder, (batch..., *feature_shape), and an embedded context."""
        batch, features = broadcast(features, len(self.feature_shape), context)
        out = call_batched(self.encoder, batch, features, context)
        wanted = (*batch, self._encoded.num_outputs(self.latent_shape.numel()))
        if isinstance(out, Tensor) and out.shape == wanted:
            return self.encoding(out)
        parts = out if isinstance(out, tuple) else (out,)
        shapes = [tuple(part.shape) for part in parts]
        pairs = [[(*batch, *shape)] * 2 for shape in ((self.latent_shape.numel(),), self.latent_shape)]
        if not (self._encoded.may_be_pair and shapes in pairs):
            pair = f", or a pair (loc, scale) of shape {(*batch, *self.latent_shape)} each" if self._encoded.may_be_pair else ""
            raise ValueError(
                f"The encoder should return a tensor of shape {wanted}{pair}, but it returned {', '.join(map(str, shapes))}."
            )
        loc, scale = (part.reshape(batch + self.latent_shape) for part in parts)
        return dist.Normal(loc, scale).to_event(len(self.latent_shape))

    def _prior(self, context: Tensor | None) -> Any:
        if self.prior is None:
            like = self.loc
            zero, one = like.new_zeros(self.latent_shape), like.new_ones(())
            return dist.Normal(zero, one).to_event(len(self.latent_shape))
        if isinstance(self.prior, (Family, Distribution)):
            return self._given_prior(context)
        return self.prior(partial(self._guide_of, self.embed(context)))

    def _guide_of(self, context: Tensor | None, inputs: Tensor) -> dist.TorchDistribution:
        """Return the guide's distributions for inputs of the encoder, (k, ...), of batch shape (context's batch..., k)."""
        return self._encode(inputs, None if context is None else context.unsqueeze(-2))


def _check_prior(prior: Distribution | Family) -> None:
    check_prior("VAE", prior, "Flow((8,)), or MixturePrior()")
    if isinstance(prior, Distribution) and prior.batch_shape:
        raise ValueError(
            f"VAE wants a prior over one z, but found a prior of batch shape {tuple(prior.batch_shape)}. Use "
            f"prior.to_event({len(prior.batch_shape)})."
        )
    support = prior.data_support if isinstance(prior, Family) else prior.support
    if not is_real(support):
        raise ValueError(f"VAE's guide is normal, so the prior must cover the reals, but its support is {support}.")
