r"""Maximum likelihood: the minimiser of the forward KL divergence from the data.

.. math:: L(\theta) = -\sum_{n=1}^{N} \log p_\theta(x_n) \approx -\frac{N}{B} \sum_{n \in \text{batch}} \log p_\theta(x_n)

The second form is the loss under a subsampled plate. It is an unbiased estimate, with an unbiased gradient.
"""

from __future__ import annotations

__all__ = ["MaximumLikelihood", "check_density"]

from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.infer.objective import Objective
from pyro_genmodels.utils.distributions import density_of


class MaximumLikelihood(Objective):
    """The negative log-likelihood (nats) of the observed sites, scaled by the plates.

    The loss contains the regularisers of the distribution, such as those of an `ODEFlow` in training mode.

    Raises:
        ValueError: if the model has latent variables, or an observed site has no normalised density; the error says which
            objective to use.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow, MaximumLikelihood
        >>> flow, x = Flow((2,)), torch.randn(100, 2)
        >>> loss = MaximumLikelihood()(flow)
        >>> optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
        >>> loss(x).backward(); optimiser.step()
    """

    def per_datum(self, dist: Any, x: Tensor) -> Tensor:
        return -capabilities(dist).training_log_prob(x)

    def check(self, name: str, dist: Distribution) -> None:
        check_density(type(self).__name__, name, dist)

    def check_latents(self, names: list[str]) -> None:
        raise ValueError(
            f"MaximumLikelihood cannot integrate over latent variables, but the model has {', '.join(map(repr, names))}. Use "
            "pyro.infer.Trace_ELBO with a guide for them."
        )


def check_density(owner: str, name: str, dist: Distribution) -> None:
    """Check that the distribution at an observed site has a normalised density whose gradient can be followed.

    Args:
        owner: name of the objective, for the error.
        name: name of the site.
        dist: its distribution, without Pyro's wrappers.

    Raises:
        ValueError: if it has none; the error says which objective to use.
    """
    density, advice = density_of(dist)
    if capabilities(dist).intractable:
        density = "unnormalized"  # log Z may be known for these parameters, but not for the next
    if density not in ("exact", "lower bound") and not (density == "estimate" and capabilities(dist).is_unbiased):
        found = "no density" if density == "none" else f"a density of kind {density!r}"
        raise ValueError(f"{owner} needs a density, but site {name!r} holds {type(dist).__name__}, which has {found}. {advice}")
