r"""Implicit distributions: :math:`z \sim p(z)`, then :math:`x \sim p(x \mid z)`, with an intractable integral over z.

.. math:: p(x \mid c) = \int p(x \mid z, c)\, p(z \mid c)\, dz

They can be sampled, and the samples may carry gradients, but there is no `log_prob`.
Mohamed and Lakshminarayanan, *Learning in Implicit Generative Models* (arXiv 1610.03483).
"""

from __future__ import annotations

__all__ = ["Implicit"]

from collections.abc import Callable, Sequence
from typing import Any

from pyro.ops.provenance import ProvenanceTensor
from torch import Size, Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.utils.distributions import Density


class Implicit(GenerativeDistribution):
    """The distribution of x with a latent variable z.

    Args:
        prior: distribution of z, with batch shape () or that of the context.
        likelihood: function (z, context) -> distribution of x, with the batch shape of z and the event shape `event_shape`.
        event_shape: shape of one datum.
        reparametrised: True if samples carry gradients. Prior and likelihood must have reparametrised samples.
        owner: name for error messages, such as that of the family that returns it.
        advice: sentence for the error of `log_prob` that says what to use instead.
        kwargs: further arguments of `GenerativeDistribution`.

    Raises:
        NotImplementedError: if `log_prob` is called.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> Implicit(dist.Normal(0.0, 1.0), lambda z, c: dist.Normal(z, 1.0), ()).sample((5,)).shape
        torch.Size([5])
    """

    density: Density = "none"
    is_implicit = True

    def __init__(
        self,
        prior: Distribution,
        likelihood: Callable[[Tensor, Tensor | None], Distribution],
        event_shape: Sequence[int],
        *,
        reparametrised: bool = False,
        owner: str = "Implicit",
        advice: str = "Train it with Trace_ELBO on a model and guide that name its latent variables.",
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, **kwargs)
        self.prior, self.likelihood = prior, likelihood
        self.reparametrised, self._owner, self.advice = reparametrised, owner, advice

    @property
    def owner(self) -> str:
        """Name for error messages."""
        return self._owner

    @property
    def has_rsample(self) -> bool:
        return self.reparametrised

    def log_prob(self, value: Tensor) -> Tensor:
        if isinstance(value, ProvenanceTensor):
            return self._tracked_log_prob(value)
        raise NotImplementedError(f"{self.owner} has samples but no density. {self.advice}")

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.log_prob(y)

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        prior = self.prior.expand(shape)
        z = prior.rsample() if prior.has_rsample else prior.sample()
        x = self.likelihood(z, context)
        return x.rsample() if x.has_rsample else x.sample()
