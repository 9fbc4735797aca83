"""`posterior`: from a model and its data to a posterior in one call."""

from __future__ import annotations

__all__ = ["posterior"]

import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from tqdm.auto import tqdm

from pyro_genmodels.infer.compiled.recorder import WAY_OUT, CaptureError
from pyro_genmodels.posteriors.fits import Posterior
from pyro_genmodels.posteriors.markov_chains import NoUTurn
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.problem import Problem
from pyro_genmodels.posteriors.variational import FlowGuide, LowRank
from pyro_genmodels.utils.errors import type_with_article, warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models

MAX_CHAIN_COORDINATES = 10_000
"""Largest number of unconstrained coordinates for which chains are chosen."""
MAX_FLOW_COORDINATES = 1000
"""Largest number for which a flow is, whose start is a dense matrix and whose training takes thousands of steps."""
INSTEAD = (
    "The methods of posterior() want one graph: write torch.where(condition, a, b) in place of a branch, or run Pyro's MCMC, "
    "which diagnose_posterior and compare_posteriors take too."
)
"""Advice at the end of errors of models that cannot be captured."""


@runs_models()
def posterior(
    model: Callable[..., Any],
    *args: Any,
    method: Method | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Posterior:
    """Return the posterior of a model's latent variables, given its arguments.

    `to_arviz` and `compare_posteriors` take what is returned, and `get_samples()` of it goes to Pyro's `Predictive`. Discrete
    latent variables are summed out.

    Args:
        model: function with Pyro statements, in which the data are observed.
        args: positional arguments of the model.
        method: the way to the posterior, such as ``NoUTurn()``, ``FlowGuide()``, ``MeanField()`` or ``Pathfinder()``. By
            default ``NoUTurn()`` for up to 10,000 coordinates if the extra ``nuts`` is installed; otherwise ``FlowGuide()`` for
            up to 1000 and ``LowRank()`` for more. It is named above the progress bar.
        progress: True for progress bars.
        model_kwargs: keyword arguments of the model, also one called ``method``.
        kwargs: keyword arguments of the model.

    Raises:
        TypeError: if the method is none.
        ValueError: as `log_density` does, for instance naming a plate that subsamples; or as the method does.
        CaptureError: if the model reads values of latent variables, as by ``if z > 0``.

    Warns:
        UserWarning: if no site of the model is observed, so that the posterior is the prior.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> fit = posterior(model, torch.tensor([1.0, 2.0, 3.0]), method=Laplace(), progress=False)
        >>> fit.get_samples(500)["loc"].shape
        torch.Size([500])
        >>> fit.psis().is_reliable  # by the weights of its draws
        True
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    if method is not None and not isinstance(method, Method):
        raise TypeError(
            f"posterior wants a method such as NoUTurn() or FlowGuide(), an object, but found {type_with_article(method)}."
        )
    check_model_keywords(model, None, args, kwargs)
    start = time.perf_counter()
    problem = Problem(model, args, kwargs, progress=progress)
    try:
        if not problem.density.is_conditioned:
            warn_caller(
                "posterior: no site of the model is observed, so that the posterior is the prior. Pass the data, as in "
                "posterior(model, x), and give them to pyro.sample by obs=.",
                UserWarning,
            )
        if method is None:
            method, reason = default_method(problem.density.dim)
            if progress:
                tqdm.write(f"posterior: {method}, because {reason}.")
        fit = method.fit(problem)
    except CaptureError as error:
        raise CaptureError(f"{str(error).removesuffix(WAY_OUT)}{INSTEAD}") from error
    fit.seconds = time.perf_counter() - start
    return fit


def default_method(dim: int) -> tuple[Method, str]:
    """Return the method for a number of coordinates, and why it is chosen."""
    has_chains = find_spec("nutpie") is not None
    if has_chains and dim <= MAX_CHAIN_COORDINATES:
        return NoUTurn(), f"all of its {dim} coordinates are continuous"
    if has_chains:
        return LowRank(), f"chains over {dim} coordinates are slow"
    if dim <= MAX_FLOW_COORDINATES:
        return FlowGuide(), "the extra 'nuts' is not installed"
    return LowRank(), f"the extra 'nuts' is not installed, and a flow over {dim} coordinates is slow"
