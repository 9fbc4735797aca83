r"""The log-likelihood of an energy from below: by annealing backwards from the data (RAISE).

It is that of the annealed model, whose draws are made by leading a chain along the path in so many steps: in expectation a
lower bound of that model's log density, and near the energy's own where the path is long,

.. math:: \log p_{\mathrm{RAISE}}(x) \ge \mathbb{E}\Bigl[\log \frac1k \sum_{j=1}^{k} f_1(x)\, w_j\Bigr].

Burda, Grosse and Salakhutdinov, *Accurate and Conservative Estimates of MRF Log-likelihood using Reverse Annealing*
(arXiv 1412.8566).
"""

from __future__ import annotations

__all__ = ["conservative_log_likelihood"]

from typing import Any

from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy.annealed import conservative_bound
from pyro_genmodels.evaluation.likelihood import LogLikelihood
from pyro_genmodels.utils.distributions import unwrap


def conservative_log_likelihood(
    fit: Any,
    x: Tensor,
    *args: Any,
    num_samples: int = 1,
    num_steps: int = 1000,
    batch_size: int = 20_000,
    progress: bool = False,
    **kwargs: Any,
) -> LogLikelihood:
    """A lower bound, in expectation, of the log-likelihood (nats) of each row of x under an energy.

    Beside `log_likelihood`, which is too high in expectation, it brackets the truth.

    Args:
        fit: a family of energies, an `SVI` or a pair (model, guide), without latent variables, that observes one energy.
        x: data, (N, ...).
        args: the model's other arguments.
        num_samples: chains from each row, over which weights are averaged; the more, the tighter.
        num_steps: betas of the path; the more, the tighter.
        batch_size: chains at once.
        progress: whether to show progress bars.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: if the model has latent variables or observes anything else.

    Example:
        >>> import torch
        >>> from torch.distributions import constraints
        >>> from pyro_genmodels import EnergyModel, RestrictedBoltzmannMachine
        >>> from pyro_genmodels.evaluation import conservative_log_likelihood
        >>> machine = EnergyModel((20,), energy=RestrictedBoltzmannMachine(8), support=constraints.boolean)
        >>> conservative_log_likelihood(machine, torch.randint(2, (10, 20)).float(), num_steps=100).kind
        'lower bound'
    """
    model, guide = traces.as_pair(fit)
    if num_samples < 1 or num_steps < 1 or batch_size < 1:
        found = f"{num_samples}, {num_steps} and {batch_size}"
        raise ValueError(f"num_samples, num_steps and batch_size must be positive, got {found}.")
    with handlers.side_effect_free():
        trace, _ = traces.run_pair(model, guide, (x, *args), kwargs)
        sites = traces.sample_sites(trace)
        names = list(sites)
        dist: Any = unwrap(sites[names[0]]["fn"]) if names else None
        if len(names) != 1 or not capabilities(dist).intractable or not sites[names[0]]["is_observed"]:
            raise ValueError(
                f"conservative_log_likelihood wants a model that observes one energy and nothing else, but found the sites "
                f"{', '.join(names) or 'none'}. Use log_likelihood."
            )
        values, errors = conservative_bound(
            dist,
            sites[names[0]]["value"],
            num_chains=num_samples,
            num_steps=num_steps,
            batch_size=batch_size,
            progress=progress,
        )
    return LogLikelihood(values, errors, "lower bound", num_samples)
