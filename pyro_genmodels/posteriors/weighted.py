r"""Pareto-smoothed importance sampling: draws of a guide, weighted so that they stand for the posterior.

.. math:: w_s = \frac{p(y, z_s)}{q(z_s)}, \qquad \mathbb{E}[h(z) \mid y] \approx \frac{\sum_s w_s h(z_s)}{\sum_s w_s}.

The largest weights are replaced by quantiles of a generalised Pareto law. Its shape k-hat says if that can work: below 0.7 the
weights correct for the guide, above they do not. Vehtari, Simpson, Gelman, Yao and Gabry, *Pareto Smoothed Importance
Sampling* (arXiv 1507.02646); Yao, Vehtari, Simpson and Gelman, *Yes, but Did It Work?* (arXiv 1802.02538).
"""

from __future__ import annotations

__all__ = ["Psis", "psis"]

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_genmodels.dynamics.resampling import effective_size, systematic_index
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.log_mean import LogMean, log_mean_weight
from pyro_genmodels.utils.pareto import is_unreliable, smooth_log_weights


@dataclass(frozen=True, repr=False)
class Psis:
    """Weighted draws.

    Attributes:
        draws: draws of each variable, (draw, ...) by name.
        log_p: log joint density of each draw and the data, (draw,), in nats.
        log_q: log density of each draw under the guide, (draw,), in nats.
        is_estimate: True if log_q is an estimate, as a critic's is; then all that follows from the weights is one too.

    Example:
        >>> q = torch.distributions.Normal(torch.tensor(0.0), 1.2)
        >>> z = q.icdf(torch.linspace(0.0005, 0.9995, 1000))
        >>> weighted = psis({"z": z}, torch.distributions.Normal(torch.tensor(0.3), 1.0).log_prob(z), q.log_prob(z))
        >>> weighted.resample(200)["z"].shape
        torch.Size([200])
        >>> weighted
        <1000 weighted draws, k-hat -1.57, effective size 908>
    """

    draws: Mapping[str, Tensor]
    log_p: Tensor
    log_q: Tensor
    is_estimate: bool = False

    @property
    def raw_log_weights(self) -> Tensor:
        """Log weights as they are, (draw,), in nats. Draws of zero density have -inf."""
        return (self.log_p - self.log_q).double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    @property
    def log_weights(self) -> Tensor:
        """Smoothed log weights, (draw,), whose exponentials sum to 1."""
        return smooth_log_weights(self.raw_log_weights)[0].log_softmax(0)

    @property
    def pareto_k(self) -> float:
        """Estimated shape of the tail of the weights, k-hat: below 0.7 they correct for the guide."""
        return float(smooth_log_weights(self.raw_log_weights)[1])

    @property
    def is_reliable(self) -> bool:
        """True unless k-hat says that the weighted draws do not stand for the posterior."""
        return not is_unreliable(torch.tensor(self.pareto_k), len(self.log_p))

    @property
    def log_evidence(self) -> LogMean:
        """The log evidence by importance sampling, in nats, with standard error, k-hat and its value by smoothed weights."""
        return log_mean_weight(self.raw_log_weights)

    @property
    def elbo(self) -> tuple[float, float]:
        """The evidence lower bound, mean of the log weights, in nats, and its standard error."""
        log_weights = self.raw_log_weights
        return float(log_weights.mean()), float(log_weights.std() / len(log_weights) ** 0.5)

    @property
    def effective_sample_size(self) -> float:
        """Number of draws of equal weight that these are worth: 1 / the sum of squared weights."""
        return float(effective_size(self.log_weights))

    def mean(self, function: Callable[..., Tensor]) -> Tensor:
        """Return the weighted mean of a function of the variables.

        Args:
            function: function of the draws, given by name as keyword arguments, that returns (draw, ...).

        Example:
            >>> z = torch.linspace(-4, 4, 801)
            >>> weighted = psis({"z": z}, torch.distributions.Normal(1.0, 1.0).log_prob(z), torch.full_like(z, -8.0).exp())
            >>> weighted.mean(lambda z: z)
            tensor(0.9956)
        """
        values = function(**self.draws)
        weights = self.log_weights.exp().to(values).reshape(-1, *[1] * (values.dim() - 1))
        return (weights * values).sum(0)

    def resample(self, num_samples: int | None = None) -> dict[str, Tensor]:
        """Return draws of equal weight, (num_samples, ...) by name, by systematic resampling with the smoothed weights.

        Args:
            num_samples: number of draws; None for as many as there are.
        """
        index = self.resampled_index(len(self.log_p) if num_samples is None else num_samples)
        return {name: x[index.to(x.device)] for name, x in self.draws.items()}

    def resampled_index(self, num_samples: int) -> Tensor:
        """Return indices of draws, (num_samples,): each as often as its weight says, up to one, in random order."""
        check_positive_int("Psis.resample", num_samples=num_samples)
        index = systematic_index(self.log_weights, num_samples)
        return index[torch.randperm(num_samples, device=index.device)]

    def __repr__(self) -> str:
        by = ", by an estimated density" if self.is_estimate else ""
        size = f"effective size {self.effective_sample_size:.0f}"
        return f"<{len(self.log_p)} weighted draws, k-hat {self.pareto_k:.2f}, {size}{by}>"


def psis(draws: Mapping[str, Tensor], log_p: Tensor, log_q: Tensor, *, is_estimate: bool = False) -> Psis:
    """Return draws with Pareto-smoothed importance weights.

    Args:
        draws: draws of each variable, (draw, ...) by name.
        log_p: log joint density of each draw and the data, (draw,), in nats.
        log_q: log density of each draw under the distribution that made it, (draw,), in nats, in the same coordinates.
        is_estimate: True if log_q is an estimate.

    Raises:
        ValueError: if the numbers of draws differ, or log_q is NaN somewhere.

    Example:
        >>> q = torch.distributions.Normal(torch.tensor(0.0), 1.2)
        >>> z = q.icdf(torch.linspace(0.0005, 0.9995, 1000))
        >>> weighted = psis({"z": z}, torch.distributions.Normal(torch.tensor(0.3), 1.0).log_prob(z), q.log_prob(z))
        >>> weighted.is_reliable, weighted.mean(lambda z: z)
        (True, tensor(0.3001))
    """
    sizes = {name: len(x) for name, x in draws.items()} | {"log_p": len(log_p), "log_q": len(log_q)}
    if len(set(sizes.values())) != 1 or log_p.dim() != 1 or log_q.dim() != 1:
        raise ValueError(f"psis wants log_p and log_q as (draw,), and as many draws of each variable, but found {sizes}.")
    if nans := int(log_q.isnan().sum()):
        raise ValueError(f"psis wants the log density of each draw under its guide, but log_q is NaN for {nans} draws.")
    return Psis(draws, log_p, log_q, is_estimate)
