r"""Vector-quantised variational autoencoders: latent variables that are integers, codes of vectors :math:`c_k` in a codebook.

.. math:: \log p(x) \ge \log p(z) + \log p(x \mid c_z), \qquad z_j = \operatorname{argmin}_k |e_j(x) - c_k|^2

The encoder returns a vector :math:`e_j` for each latent variable, and the guide has the code nearest to it. So the bound is a
number without sampling, and its gap is the log probability of these codes given x.

The gradient of the decoder at :math:`c_z` is taken as that at e (straight-through). The gradient of the commitment
:math:`\beta |e - c_z|^2` is added for the encoder. Codes are moving averages of the vectors that they stand for, or follow them
by the gradient of :math:`|e - c_z|^2`, the codebook loss. The prior learns from the codes alone.

Van den Oord et al., *Neural Discrete Representation Learning* (arXiv 1711.00937); Razavi et al., *VQ-VAE-2* (arXiv 1906.00446);
Dhariwal et al., *Jukebox* (arXiv 2005.00341, unused codes restarted).
"""

from __future__ import annotations

__all__ = ["VectorQuantizedVAE"]

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import pyro_method
from pyro.poutine.messenger import Messenger
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints, register_kl

from pyro_genmodels._pyro.modules import evaluation_mode
from pyro_genmodels.distributions.implicit import Implicit
from pyro_genmodels.distributions.likelihoods import Likelihood
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.decoding import ADVICE, Decode, DecodedFamily, broadcast, check_prior, draw_weights
from pyro_genmodels.families.family import Family, Standardize, StandardizeContext
from pyro_genmodels.nn.checks import check_widths
from pyro_genmodels.nn.codebook import Codebook
from pyro_genmodels.nn.mlp import call_batched
from pyro_genmodels.utils.ranks import current_ranks

EMBEDDED = "embedded"
"""Key of the vectors that the guide hands to the model beside the codes, among the options of the site (`infer`)."""


class VectorQuantizedVAE(DecodedFamily):
    """A variational autoencoder with integers as latent variables, with sites ``z`` and ``x`` in the plate ``data``.

    ``train(vae, x)`` trains all parts by `Trace_ELBO`, a prior that is a family among them. No gradient leads from the prior to
    the encoder, so the prior learns codes that still move. Prefer to train it once more at the end, on the codes of the trained
    encoder, as van den Oord et al. do: ``train(vae.prior, vae.codes(x))``. The commitment is part of the gradient only: losses
    are bounds in training and validation.

    In training mode, the codebook is updated when a gradient is computed, not when a loss is.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        codes: number K of codes.
        latent_shape: shape of the latent variables of one datum, each an integer of 0 .. K - 1.
        code_dim: length of the vector that stands for a code.
        likelihood: distribution of one coordinate given the codes, as for `VAE`.
        prior: distribution of the codes: a family over the integers 0 .. K - 1 of shape `latent_shape`, such as
            ``Autoregressive(latent_shape, likelihood=CategoricalLikelihood(codes))``, given the context if it takes one; a Pyro
            distribution; or None for independent codes of equal probability.
        commitment: weight of the squared distance of the encoder's vectors from their codes.
        decay: decay per step of the moving averages by which codes follow the encoder. None trains them by the codebook
            loss.
        restart: share of equal use below which a code is unused, by a moving average. It is then moved to one of the encoder's
            vectors, drawn from the batch in proportion to their squared distances from their codes, and counts as used equally:
            with a decay of .99 it has 460 steps to be chosen. 0 leaves unused codes where they are.
        encoder: your own network, called as ``encoder(x)`` or ``encoder(x, context)``, as that of `VAE`. It returns vectors,
            (batch, *latent_shape, code_dim), or these flattened.
        decoder: your own network, called as ``decoder(c)`` or ``decoder(c, context)`` with the vectors of the codes,
            (batch, *latent_shape, code_dim). It returns what that of `VAE` does.
        hidden: widths of the hidden layers of the default encoder and decoder.
        dropout: rate at which hidden units of these are dropped in training.
        missing: True if coordinates of the data may be missing, which are NaN, as for `VAE`.
        support: set in which one coordinate lies; only with likelihoods of real numbers.
        standardize: see `Family`; only with likelihoods of real numbers and those that have a scale.
        standardize_context: see `Family`.
        name: see `Family`.

    Attributes:
        codebook: the vectors of the codes, in `vectors`, (codes, code_dim), and their usage.

    Raises:
        TypeError: if `likelihood`, `prior`, `encoder` or `decoder` is of the wrong kind.
        ValueError: if the prior is not over codes of this number and shape, or a number is outside of its range; later, if your
            own network's output has another shape.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Autoregressive, CategoricalLikelihood, log_likelihood, train
        >>> from pyro_genmodels.families import VectorQuantizedVAE
        >>> prior = Autoregressive((2,), likelihood=CategoricalLikelihood(16))
        >>> vae, x = VectorQuantizedVAE((4,), codes=16, latent_shape=(2,), prior=prior), torch.randn(200, 4)
        >>> _ = train(vae, x, epochs=1, progress=False)
        >>> _ = train(vae.prior, vae.codes(x), epochs=1, progress=False)
        >>> vae.codes(x).shape, vae().sample((5,)).shape, log_likelihood(vae, x).kind
        (torch.Size([200, 2]), torch.Size([5, 4]), 'lower bound')
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        codes: int = 512,
        latent_shape: Sequence[int] = (7, 7),
        code_dim: int = 16,
        likelihood: Likelihood | None = None,
        prior: Distribution | Family | None = None,
        commitment: float = 0.25,
        decay: float | None = 0.99,
        restart: float = 0.01,
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
        check_widths("VectorQuantizedVAE", empty=True, latent_shape=latent_shape)
        self._check_networks(encoder=encoder, decoder=decoder)
        self.codebook = Codebook("VectorQuantizedVAE", codes, code_dim, decay=decay, commitment=commitment, restart=restart)
        self.latent_shape, self._vectors_shape = Size(latent_shape), Size((*latent_shape, code_dim))
        if prior is not None:
            _check_prior(prior, self.latent_shape, codes)
        self.prior: Any = prior
        size = self._vectors_shape.numel()
        self.encoder = encoder or self._flat_encoder(size, hidden, dropout)
        self.decoder = decoder or self._flat_decoder(size, hidden, dropout)

    def forward(self, context: Tensor | None = None) -> Implicit:
        return Implicit(
            self._prior(context),
            _DecodeCodes(self.codebook, self._decoding()),
            self.event_shape,
            context=self.embed(context),
            support=self.support,
            owner=type(self).__name__,
            advice=ADVICE,
        )

    @pyro_method
    def model(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor:
        """Draw codes z from the prior, then x given their vectors. The arguments are those of `Family.model`."""
        x, context = self._accept_scored(x, context)
        plate, prior, codebook, embedded = (
            self.plate(x, context, size),
            self._prior(context),
            self.codebook,
            self.embed(context),
        )
        decode, options = self._decoding(), _Options()
        draw_weights(decode.decoder)
        with plate:
            with options:
                z = pyro.sample("z", prior)
            vectors = options.of_site.get(EMBEDDED)
            return pyro.sample("x", decode(codebook(z) if vectors is None else vectors, embedded), obs=x)

    @pyro_method
    def guide(self, x: Tensor | None = None, context: Tensor | None = None, *, size: int | None = None) -> Tensor | None:
        """Return the codes of x as a point mass; without x, nothing is drawn.

        In training mode, the codebook is updated when the gradient of the loss reaches the encoder.
        """
        if x is None:
            return None
        x, context = self._accept(x, context)
        plate, e, codebook = self.plate(x, context, size), self._encode(x, context), self.codebook
        z = codebook.nearest(e)
        c = codebook(z)
        penalty = codebook.penalty(e, c).reshape(*z.shape[: z.dim() - len(self.latent_shape)], -1).sum(-1)
        if self.training and e.requires_grad:  # a loss alone leaves the codebook as it is, its gradient does not
            ranks = current_ranks()  # now: the gradient may be computed outside of their block
            e.register_hook(lambda _: codebook.update(e.detach(), z, total=ranks.total, first=ranks.first))
        posterior = _Codes(z, _gradient_of(penalty), event_dim=len(self.latent_shape))
        options: Any = {EMBEDDED: c.detach() + _gradient_of(e)}
        with plate:
            return pyro.sample("z", posterior, infer=options)

    @torch.no_grad()
    def codes(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the codes of data x, (batch..., *event_shape), as integers (batch..., *latent_shape), in evaluation mode."""
        x, context = self._as_tensors(x, context)
        with evaluation_mode(self.modules()):
            return self.codebook.nearest(self._encode(x, context))

    @pyro_method
    def decode(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the distribution of the data, of batch shape (batch...), given codes z, integers (batch..., *latent_shape)."""
        self._check_latent(z)
        return self._decoding()(self.codebook(z), self.embed(None if context is None else self._as_tensors(None, context)[1]))

    def _decoding(self) -> Decode:
        return replace(super()._decoding(), latent_shape=self._vectors_shape)

    def _encode(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the encoder's vectors, (batch..., *latent_shape, code_dim), of data x, (batch..., *event_shape)."""
        batch, features = broadcast(self._features(x), len(self.feature_shape), embedded := self.embed(context))
        e = call_batched(self.encoder, batch, features, embedded)
        wanted = (*batch, *self._vectors_shape)
        if not isinstance(e, Tensor) or e.shape not in (wanted, (*batch, self._vectors_shape.numel())):
            found = tuple(e.shape) if isinstance(e, Tensor) else f"a {type(e).__name__}"
            raise ValueError(f"The encoder should return a tensor of shape {wanted}, but it returned {found}.")
        return e.reshape(wanted)

    def _prior(self, context: Tensor | None) -> Any:
        if self.prior is None:
            logits = self.loc.new_zeros(len(self.codebook.vectors)).expand(*self.latent_shape, -1)
            return dist.Categorical(logits=logits).to_event(len(self.latent_shape))
        return self._given_prior(context)


@dataclass(frozen=True)
class _DecodeCodes:
    """The map from codes z, (batch..., *latent_shape), and an embedded context to the distribution of x."""

    codebook: Codebook
    decode: Decode

    def __call__(self, z: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        return self.decode(self.codebook(z), context)


class _Codes(dist.Delta):
    """A point mass at codes, whose divergence from the prior has the gradient of its log density, which Pyro's leaves out."""


@register_kl(_Codes, dist.Distribution)
def _divergence_of_codes(p: _Codes, q: Any) -> Tensor:
    return p.log_density - q.log_prob(p.v)


class _Options(Messenger):
    """Handler that keeps the options (`infer`) of the last site; under `replay` they are those of the guide's site."""

    def __init__(self) -> None:
        super().__init__()
        self.of_site: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.of_site = msg["infer"]


def _gradient_of(x: Tensor) -> Tensor:
    """Return zeros with the gradient of x."""
    return x - x.detach()


def _check_prior(prior: Any, latent_shape: Size, codes: int) -> None:
    """Raise an error unless a prior is a distribution or a family over integers of 0 .. codes - 1, of the latent shape."""
    example = f"Autoregressive({tuple(latent_shape)}, likelihood=CategoricalLikelihood({codes}))"
    check_prior("VectorQuantizedVAE", prior, example)
    batch_shape = () if isinstance(prior, Family) else tuple(prior.batch_shape)
    if batch_shape or prior.event_shape != latent_shape:
        batch = f" and batch shape {batch_shape}" if batch_shape else ""
        raise ValueError(
            f"VectorQuantizedVAE wants a prior over codes of shape {tuple(latent_shape)}, but found one of event shape "
            f"{tuple(prior.event_shape)}{batch}. Use {example}, or to_event for a distribution."
        )
    support: Any = prior.data_support if isinstance(prior, Family) else prior.support
    holds = [bool(support.check(torch.full(latent_shape, k)).all()) for k in (0, codes - 1, codes)]
    if not support.is_discrete or holds != [True, True, False]:
        raise ValueError(
            f"VectorQuantizedVAE wants a prior over the integers 0 .. {codes - 1}, but found one whose support is {support}. "
            f"Use {example}."
        )
