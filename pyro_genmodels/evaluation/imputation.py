r"""Imputation: draws of missing values given those that are known, by importance weights.

.. math:: p(x_\text{mis} \mid x_\text{obs}) \approx \sum_k \tilde w_k\, p(x_\text{mis} \mid z_k), \qquad
    w_k = \frac{p(x_\text{obs} \mid z_k)\, p(z_k)}{q(z_k \mid x_\text{obs})}, \quad z_k \sim q, \quad
    \tilde w_k = \frac{w_k}{\sum_j w_j} .

Sampling importance resampling: K draws from the guide, of which some are chosen with probability :math:`\tilde w_k`. It
converges to the exact distribution under the model as K grows, whatever the guide. Rubin, *Using the SIR Algorithm to Simulate
Posterior Distributions* (1988); Mattei and Frellsen, *MIWAE* (arXiv 1812.02633).
"""

from __future__ import annotations

__all__ = ["impute"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces, vectorize
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments
from pyro_genmodels.utils.distributions import unwrap
from pyro_genmodels.utils.errors import check_positive_int, listed, warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.pareto import MAX_PARETO_K, count_unreliable, is_unreliable, largest_pareto_k, pareto_k


@runs_models()
def impute(
    fit: Any,
    x: Any,
    *args: Any,
    num_samples: int = 10,
    num_particles: int = 1000,
    batch_size: int = 20_000,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Draw the missing values of rows, given their known ones.

    The fit's modules run in evaluation mode, and their mode is restored afterwards. A guide without random draws, as that of
    `VectorQuantizedVAE`, gives each row one value of its latent variables, so that completed tables differ too little.

    Args:
        fit: family, `SVI`, or pair (model, guide), with a likelihood that leaves missing values out, such as
            ``VAE(..., missing=True)``.
        x: rows, (N, *event_shape), with NaN for missing values.
        args: other arguments of the model; those with N rows are cut along with x.
        num_samples: number of completed tables.
        num_particles: number K of draws of the latent variables of a row, among which the samples are chosen.
        batch_size: largest number of (draw, row) pairs held in memory at once.
        model_kwargs: keyword arguments of the model whose names are also options of this function.
        kwargs: other keyword arguments of the model.

    Returns:
        Completed tables, (num_samples, N, *event_shape), with the values of x where they are known.

    Raises:
        ValueError: if no site of the model leaves missing values out, or latent variables lie outside of the plate of the rows.

    Warns:
        RuntimeWarning: if k-hat of the importance weights is too large in some rows with missing values
            (`pyro_genmodels.utils.pareto`).

    Example:
        >>> from pyro_genmodels import VAE
        >>> x = torch.tensor([[0.5, torch.nan], [1.0, 2.0]])
        >>> completed = impute(VAE((2,), latent_dim=1, missing=True), x, num_samples=5)
        >>> completed.shape, completed[:, 1].unique(dim=0)
        (torch.Size([5, 2, 2]), tensor([[1., 2.]]))
    """
    model, guide = traces.as_pair(fit)
    check_positive_int("impute", num_samples=num_samples, num_particles=num_particles, batch_size=batch_size)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("impute", x, args, kwargs, model=model)
    completed, k_hats = [], []
    with torch.no_grad(), handlers.side_effect_free(model, guide):
        first = data.first(min(3, data.num_rows))
        site = _site_with_missing(model, guide, first)
        together = vectorize.can_vectorize(model, guide, first.args, first.kwargs, 1)
        rows = max(1, batch_size // num_particles) if together else batch_size
        for batch in data.batches(rows):
            block = max(1, batch_size // batch.num_rows) if together else 1
            sizes = [min(block, num_particles - start) for start in range(0, num_particles, block)]
            runs = [_draw(model, guide, batch, site, size if together else None) for size in sizes]
            log_weights, draws = (torch.cat(parts) for parts in zip(*runs, strict=True))
            k_hats.append(pareto_k(log_weights)[batch.args[0].isnan().flatten(1).any(1)])  # of rows that are completed
            chosen = log_weights.double().softmax(0).T.multinomial(num_samples, replacement=True).T
            known = batch.args[0]
            completed.append(torch.where(known.isnan(), draws[chosen, torch.arange(len(known), device=chosen.device)], known))
    _warn_of_weights(torch.cat(k_hats), num_particles)
    return torch.cat(completed, 1)


def _site_with_missing(model: Any, guide: Any, first: RowArguments) -> str:
    """Return the name of the observed site that leaves missing values out, after a run on the first rows."""
    trace, _ = traces.run_pair(model, guide, first.args, first.kwargs)
    observed = traces.observed(trace)
    sites: dict[str, Any] = traces.sample_sites(trace)
    found = [name for name in observed if getattr(unwrap(sites[name]["fn"]), "allows_missing", False)]
    if len(found) != 1:
        raise ValueError(
            "impute wants a fit with one observed site that leaves missing values out, such as VAE(..., missing=True), but "
            f"found the observed sites {listed(observed)}, {len(found)} of which do."
        )
    shape = sites[found[0]]["fn"].batch_shape
    shared = [name for name, site in sites.items() if site["fn"].batch_shape != shape]
    if shared or len(shape) != 1:
        raise ValueError(
            f"impute wants all variables in one plate of the rows, but found another batch shape of {listed(shared or found)}."
        )
    return found[0]


def _draw(model: Any, guide: Any, batch: RowArguments, site: str, size: int | None) -> tuple[Tensor, Tensor]:
    """Return log weights of draws from the guide, (draws, rows), and complete rows drawn with them, (draws, rows, ...).

    Args:
        model: the model.
        guide: the guide.
        batch: arguments with the rows.
        site: name of the site that leaves missing values out.
        size: number of draws that are made together, or None for one draw without a plate.
    """
    plate = None if size is None else traces.particles(size, 1)
    model_trace, guide_trace = traces.run_pair(model, guide, batch.args, batch.kwargs, plate)
    log_p, log_q = (traces.log_prob(t, (-2, -1), scaled=False) for t in (model_trace, traces.proposal(guide_trace)))
    shape = (size or 1, batch.num_rows)
    observed: Any = model_trace.nodes[site]
    return (log_p - log_q).expand(shape), observed["fn"].expand(shape).sample()


def _warn_of_weights(k_hats: Tensor, num_particles: int) -> None:
    if len(k_hats) and is_unreliable(k_hats, num_particles):
        warn_caller(
            f"impute: Pareto k-hat is above {MAX_PARETO_K} in {count_unreliable(k_hats)} of {len(k_hats)} rows (largest "
            f"{largest_pareto_k(k_hats):.2f}): a few draws carry the weight there, and imputed values repeat them. Raise "
            "num_particles, or train the guide further.",
            RuntimeWarning,
        )
