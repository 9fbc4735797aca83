r"""Learned likelihood ratios of simulators, from which Markov chains draw the posterior.

.. math:: p(z \mid x_1, \dots, x_n) \propto p(z) \prod_i r_\phi(z, x_i), \qquad r(z, x) = \frac{p(x \mid z)}{p(x)} .

A classifier learns the ratio, the odds that x was simulated from z, and not from another draw of the prior: Hermans et al.,
*Likelihood-free MCMC with Amortized Approximate Ratio Estimators* (arXiv 1903.04057). Here it chooses from K draws of the
prior, or says that x comes from none: NRE-C of Miller et al., *Contrastive Neural Ratio Estimation* (arXiv 2210.06170), with
the loss

.. math:: -\frac{1}{1+\gamma} \log \frac{K}{K + \gamma \sum_{k=1}^{K} r(z_k', x)}
          -\frac{\gamma}{1+\gamma} \log \frac{\gamma\, r(z, x)}{K + \gamma\, r(z, x) + \gamma \sum_{k=1}^{K-1} r(z_k', x)} ,

where z belongs to x and the z' do not. For K = 1 and :math:`\gamma = 1` this is the classifier of two classes.
"""

from __future__ import annotations

__all__ = ["AmortizedRatio"]

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_genmodels.posteriors.embedding_networks import dense
from pyro_genmodels.posteriors.embeddings import Embedding
from pyro_genmodels.posteriors.observation_encoder import ObservationEncoder, embeddings_by_name
from pyro_genmodels.posteriors.surrogates import Surrogate
from pyro_genmodels.utils.errors import check_positive_int


class AmortizedRatio(Surrogate):
    """The ratio of likelihood to evidence of a simulator, by a classifier that is trained on simulations.

    It takes any number of independent observations of the same latent variables: their log ratios are added.

    Args:
        model: function with Pyro statements, as for `AmortizedPosterior`. Discrete latent variables are averaged over.
        args: positional arguments of the model.
        observed: names of the sites that are observed.
        embedding: network that summarises the observations, as for `AmortizedPosterior`.
        hidden: widths of the hidden layers of the classifier.
        num_contrastive: number K of other draws that the classifier chooses from.
        gamma: odds that an observation comes from one of the draws it is shown with.
        simulations: simulations that were made before, (simulation, ...) by name.
        model_kwargs: keyword arguments of the model.

    Attributes:
        simulations: all simulations so far, (simulation, ...) by name.
        failures: number of simulations that were left out, by the reason.
        history: loss of held-out simulations after each epoch of the last training.
        critic: the trained classifier, from coordinates (..., dim) and vectors of observations (..., numbers) to log ratios in
            nats, (...); None before.

    Raises:
        TypeError: if an option is of the wrong type.
        ValueError: as `AmortizedPosterior`, or if gamma is not positive.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> from pyro_genmodels.posteriors import NoUTurn
        >>> def model():
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(loc, 0.5))
        >>> learned = AmortizedRatio(model, observed=["x"])
        >>> _ = learned.train(num_simulations=200, max_epochs=2, progress=False)
        >>> chain = NoUTurn(num_chains=1, num_warmup=20, num_samples=20, mode=Captured())
        >>> learned.given(x=0.7, method=chain, progress=False).get_samples()["loc"].shape
        torch.Size([20])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        observed: Sequence[str],
        embedding: Embedding | nn.Module | Mapping[str, Embedding | nn.Module] | None = None,
        hidden: Sequence[int] = (64, 64, 64),
        num_contrastive: int = 5,
        gamma: float = 1.0,
        simulations: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_positive_int("AmortizedRatio", num_contrastive=num_contrastive)
        if not 0 < gamma < float("inf"):
            raise ValueError(f"AmortizedRatio wants a positive gamma, but found {gamma!r}.")
        super().__init__(model, args, model_kwargs or {}, observed, simulations)
        self._embeddings, self._hidden = embeddings_by_name(embedding, self.simulator.observed), tuple(hidden)
        self._loss = _Contrastive(num_contrastive, gamma)

    @property
    def critic(self) -> nn.Module | None:
        return self._trained

    def _task(self) -> tuple[nn.Module, Callable[[Any], Any], Tensor, Tensor]:
        z, observations = self._pairs()
        if self._trained is None:
            shapes = {name: self.simulator.shapes[name] for name in self.simulator.observed}
            critic: Any = _Critic(z, ObservationEncoder(shapes, self._embeddings, observations), self._hidden)
        else:
            critic = deepcopy(self._trained).requires_grad_(True)
        return critic, self._loss, z, critic.context.flatten(observations)

    def _prepared(self, trained: Any, values: Mapping[str, Tensor]) -> Tensor:
        return trained.context(trained.context.flatten(values))

    def _observe(self, trained: Any, z: Tensor, prepared: Tensor) -> None:
        pyro.factor("log_ratio", trained.log_ratio(z[..., None, :], prepared).sum(-1))


class _Critic(nn.Module):
    """A dense network of standardised coordinates and embedded observations, to one number.

    Args:
        z: coordinates, (n, dim), whose mean and deviation standardise all others.
        context: encoder of observations.
        hidden: widths of the hidden layers.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, z: Tensor, context: ObservationEncoder, hidden: Sequence[int]) -> None:
        super().__init__()
        self.context, self.network = context, dense(z.shape[1] + context.out_features, hidden, 1)
        deviation = z.std(0, correction=0)
        self.register_buffer("loc", z.mean(0))
        self.register_buffer("scale", torch.where(deviation > 0, deviation, 1.0))

    def prepare(self, z: Tensor, context: Tensor) -> None:
        """Leave the standardisation as it is, which was made at the start."""

    def forward(self, z: Tensor, context: Tensor) -> Tensor:
        """Return log ratios in nats of coordinates, (..., dim), and observations, (..., numbers), whose batches are broadcast.

        An observation that stands beside many coordinates is embedded once.
        """
        return self.log_ratio(z, self.context(context))

    def log_ratio(self, z: Tensor, features: Tensor) -> Tensor:
        """Return log ratios in nats of coordinates, (..., dim), and embedded observations, (..., features)."""
        parts = (z - self.loc) / self.scale, features
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return self.network(torch.cat([part.expand(*batch, -1) for part in parts], -1))[..., 0].to(z.dtype)


class _Contrastive:
    """The loss of NRE-C, as an objective: it is given a critic, and returns a function of pairs.

    Args:
        num_contrastive: number K of draws to choose from.
        gamma: odds that an observation comes from one of them.
    """

    def __init__(self, num_contrastive: int, gamma: float) -> None:
        self.num_contrastive, self.gamma = num_contrastive, gamma

    def __call__(self, critic: _Critic) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(z: Tensor, context: Tensor) -> Tensor:
            number = min(self.num_contrastive, len(z) - 1)
            shifts = torch.cat([torch.zeros(1, dtype=torch.long), torch.randperm(max(len(z) - 1, 0))[:number] + 1])
            index = (torch.arange(len(z)) + shifts[:, None]) % len(z)
            joint, *marginal = critic(z[index], context)
            if not marginal:  # one pair has no others
                return 0 * joint.sum()
            rest = torch.full_like(joint, number / self.gamma).log()
            none = torch.stack([rest, *marginal]).logsumexp(0) - rest
            one = torch.stack([rest, joint, *marginal[1:]]).logsumexp(0) - joint
            return ((none + self.gamma * one) / (1 + self.gamma)).sum()

        return loss
