r"""Lower bounds on the log-likelihood of an energy, by annealing backwards from the data (RAISE).

The bound is on the likelihood of the *annealed model*, whose samples are the ends of annealing runs with that many steps. With
more steps it approaches the energy's own distribution. In expectation

.. math:: \log p_{\mathrm{RAISE}}(x) \ge \mathbb{E}\Bigl[\log \frac1k \sum_{j=1}^{k} f_1(x)\, w_j\Bigr].

Burda, Grosse and Salakhutdinov, *Accurate and Conservative Estimates of MRF Log-likelihood using Reverse Annealing*
(arXiv 1412.8566).
"""

from __future__ import annotations

__all__ = ["conservative_log_likelihood"]

from collections.abc import Mapping
from typing import Any

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy.annealed import conservative_bound
from pyro_genmodels.evaluation.arguments import row_arguments
from pyro_genmodels.evaluation.result import LogLikelihood, lower_bound
from pyro_genmodels.utils.distributions import unwrap
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.parallel import check_n_jobs


@runs_models()
def conservative_log_likelihood(
    fit: Any,
    x: Any,
    *args: Any,
    num_samples: int = 1,
    num_steps: int = 1000,
    batch_size: int = 20_000,
    progress: bool = False,
    n_jobs: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    """Bound the log-likelihood (nats) of each row of x under an energy from below, in expectation.

    Together with `log_likelihood`, which is too high in expectation, it brackets the log-likelihood.

    Args:
        fit: family of energies, `SVI` or pair (model, guide), without latent variables and with one energy as observed site.
        x: data, (N, ...): tensor, numpy array or data frame.
        args: other arguments of the model.
        num_samples: chains per row, whose weights are averaged; more give a tighter bound.
        num_steps: betas of the path; more give a tighter bound.
        batch_size: largest number of chains in memory.
        progress: True to show progress bars.
        n_jobs: number of processes, as joblib takes it, for chains in blocks with a seed each, so that bounds do not depend on
            the number. None runs them in this process, from torch's random numbers.
        model_kwargs: keyword arguments of the model whose names are also options of this function.
        kwargs: other keyword arguments of the model.

    Returns:
        Bounds with standard errors, NaN for a single chain, k-hat, and the kind "lower bound", or "unreliable" if k-hat says
        so.

    Raises:
        TypeError: if x holds no numbers.
        ValueError: if the model has latent variables or observes anything else, for counts that are not positive, without
            rows, or if a keyword is the model's as well as an option.

    Warns:
        RuntimeWarning: if the bounds are unreliable, by k-hat or because some are no numbers.

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
    check_positive_int("conservative_log_likelihood", num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    if n_jobs is not None:
        check_n_jobs("conservative_log_likelihood", n_jobs)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("conservative_log_likelihood", x, args, kwargs)
    with handlers.side_effect_free(model, guide):
        trace, _ = traces.run_pair(model, guide, data.args, data.kwargs)
        sites = traces.sample_sites(trace)
        names = list(sites)
        dist: Any = unwrap(sites[names[0]]["fn"]) if names else None
        if len(names) != 1 or not capabilities(dist).intractable or not sites[names[0]]["is_observed"]:
            raise ValueError(
                f"conservative_log_likelihood wants a model that observes one energy and nothing else, but found the sites "
                f"{', '.join(names) or 'none'}. Use log_likelihood."
            )
        bound = conservative_bound(
            dist,
            sites[names[0]]["value"],
            num_chains=num_samples,
            num_steps=num_steps,
            batch_size=batch_size,
            progress=progress,
            n_jobs=n_jobs,
        )
    cure = "Raise num_steps or num_samples."
    return lower_bound("conservative_log_likelihood", bound, num_samples, data.args[0], cure=cure)
