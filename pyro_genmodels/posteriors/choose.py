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
MAX_STEP = 0.1
"""Largest distance of neighbouring numbers near the data, in standard errors of their mean, that goes without a warning."""
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
        RuntimeWarning: if data are so far from 0 that the precision of the latent variables is too coarse for them.

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
        _warn_of_data(problem.density.observed)
        if method is None:
            method, reason = default_method(problem.density.dim)
            if progress:
                tqdm.write(f"posterior: {method}, because {reason}.")
        fit = method.fit(problem)
    except CaptureError as error:
        raise CaptureError(f"{str(error).removesuffix(WAY_OUT)}{INSTEAD}") from error
    fit.seconds = time.perf_counter() - start
    return fit


def _warn_of_data(observed: Mapping[str, float]) -> None:
    """Warn if there are no data, or the precision is too coarse for them.

    Args:
        observed: for each observed site how far apart numbers are near its data, in standard errors of their mean.
    """
    if not observed:
        warn_caller(
            "posterior: no site of the model is observed, so that the posterior is the prior. Pass the data, as in "
            "posterior(model, x), and give them to pyro.sample by obs=.",
            UserWarning,
        )
    for name, step in observed.items():
        if step > MAX_STEP:
            warn_caller(
                f"posterior: near the data of {name!r} the numbers of the latent variables' precision are {step:.2g} standard "
                "errors of the data's mean apart, too far for a posterior of it. Subtract an offset from the data, in float64, "
                "or call torch.set_default_dtype(torch.float64) and make the data in doubles."
            )


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
