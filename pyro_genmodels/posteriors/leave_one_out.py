r"""Leave-one-out cross-validation of a posterior: how well each row of the data is predicted from all others.

.. math:: \mathrm{elpd} = \sum_n \log p(y_n \mid y_{-n}), \qquad
    p(y_n \mid y_{-n}) \approx \frac{\sum_s w_{sn}\, p(y_n \mid z_s)}{\sum_s w_{sn}}, \qquad
    w_{sn} = \frac{p(y, z_s)}{q(z_s)} \frac{1}{p(y_n \mid z_s)} ,

with Pareto-smoothed weights. For draws of the posterior itself the first factor is 1. k-hat of the weights of a row says if
they can be trusted. Where it is too large, the draws may be moved by an affine map (`moment_matching`), which needs no fit;
else the row is left out in earnest, and the posterior of the others is fitted anew.

Vehtari, Gelman and Gabry, *Practical Bayesian Model Evaluation* (arXiv 1507.04544); Magnusson et al. for approximations
(arXiv 1904.10679); Paananen et al. for moment matching (arXiv 1906.08850).
"""

from __future__ import annotations

__all__ = ["LeaveOneOut", "reloo"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log10
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.inference_data.export import draws_of_data, elpd_data, log_likelihood_of_data
from pyro_genmodels.posteriors.checked_sources import number_of_draws, source_with_model
from pyro_genmodels.posteriors.left_out_rows import BATCH_SIZE, MomentMatching, Refit, RowLeftOut, log_mean_density
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.utils.errors import check_positive_int, listed, type_with_article, warn_caller
from pyro_genmodels.utils.keywords import joined_keywords, runs_models
from pyro_genmodels.utils.parallel import run_all, run_values, spawn_seeds
from pyro_genmodels.utils.pareto import MAX_PARETO_K, smooth_log_weights

MAX_MC_ERROR = 0.5
"""Largest Monte Carlo standard error of a row, in nats, that is trusted. Above it, few draws explain the row."""


@dataclass(frozen=True, repr=False)
class LeaveOneOut:
    """Log predictive density of each row, given all others.

    Attributes:
        pointwise: ``log p(y_n | y_-n)`` in nats, (rows...), with the shape of the data's plates.
        mc_error: Monte Carlo standard error of each, (rows...), for independent draws.
        pareto_k: k-hat of the weights of each row, (rows...). For a refitted row it is that of the refit, and NaN for chains.
        matched: True for rows whose draws were moved by moment matching, (rows...).
        refitted: True for rows that were left out in earnest, (rows...).
        p_loo: effective number of parameters: log density of the data in the posterior, minus that of rows left out.
        num_draws: number of draws of the posterior.
        max_pareto_k: largest k-hat that is trusted.
        data: draws and densities as ArviZ has them.
        name: name of the observed site.
    """

    pointwise: Tensor
    mc_error: Tensor
    pareto_k: Tensor
    matched: Tensor
    refitted: Tensor
    p_loo: float
    num_draws: int
    max_pareto_k: float
    data: Any = field(compare=False)
    name: str

    @property
    def elpd(self) -> float:
        """Sum over rows, in nats: larger is better."""
        return float(self.pointwise.sum())

    @property
    def std_error(self) -> float:
        """Standard error of `elpd` as an estimate for other data of as many rows."""
        return float(self.pointwise.std() * self.pointwise.numel() ** 0.5)

    @property
    def is_reliable(self) -> bool:
        """True if no k-hat is too large, and no row has a Monte Carlo error above 0.5 nats."""
        return not bool(((self.pareto_k > self.max_pareto_k) | (self.mc_error > MAX_MC_ERROR)).any())

    def to_arviz(self) -> Any:
        """Return it as ArviZ's `ELPDData`, as `az.compare` takes it. As in ArviZ's own `reloo`, k-hat of refitted rows is 0."""
        k = torch.where(self.refitted, 0.0, self.pareto_k)
        return elpd_data(
            self.data, self.name, elpd=self.pointwise, pareto_k=k, p_loo=self.p_loo, max_pareto_k=self.max_pareto_k
        )

    def __repr__(self) -> str:
        matched = f"{int(self.matched.sum())} moment-matched, " if self.matched.any() else ""
        refits = f"{int(self.refitted.sum())} of {self.refitted.numel()} rows refitted"
        return f"<elpd {self.elpd:.1f} ± {self.std_error:.1f}, p_loo {self.p_loo:.1f}, {matched}{refits}>"


@runs_models()
def reloo(
    fit: Any,
    *args: Any,
    method: Method | None = None,
    var_name: str | None = None,
    max_pareto_k: float | None = None,
    moment_matching: bool = False,
    num_samples: int = 2000,
    n_jobs: int = 1,
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LeaveOneOut:
    """Return the leave-one-out predictive density of a fit, with refits where its weights cannot be trusted.

    Args:
        fit: what `posterior` returned, or any fit that `to_arviz` takes.
        args: positional arguments of the model; a fit by `posterior` and an `MCMC` run remember theirs.
        method: the method of refits; by default the fit's own.
        var_name: name of the observed site, if there are several.
        max_pareto_k: largest k-hat without a refit; by default min(1 - 1 / log10(draws), 0.7), as in ArviZ. ``inf`` for none.
        moment_matching: True to move the draws by affine maps first where k-hat is too large, in unconstrained coordinates,
            which takes some thousand densities for each row. Only rows whose k-hat stays too large are refitted.
        num_samples: number of draws of a guide.
        n_jobs: number of processes for refits and moment matching; the extra ``parallel`` runs more than one, by joblib.
        seed: seed of refits; None takes one from torch's random numbers.
        progress: True for a progress bar.
        model_kwargs: keyword arguments of the model.
        kwargs: keyword arguments of the model, with any other name.

    Raises:
        TypeError: if a refit is due, and there is no method.
        ValueError: if there is no observed site of that name, or rows of the data are no batch dimensions of it; if the guide
            has variables that the model lacks, or draws lack a latent variable or are outside its support; if data are NaN or
            of a wrong shape, or densities are not finite.
        RuntimeError: if a refit fails.

    Warns:
        RuntimeWarning: if weights of refits cannot be trusted either; or if a refitted row is so far from the others that few
            draws explain it, and its density may be far too low.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.cat([torch.linspace(-1, 1, 14), torch.tensor([12.0])])
        >>> fit = posterior(model, y, method=Laplace(), progress=False)
        >>> found = reloo(fit, num_samples=500, seed=0, progress=False)
        >>> found.refitted.nonzero()  # the last row is an outlier
        tensor([[14]])
        >>> matched = reloo(fit, moment_matching=True, num_samples=500, seed=0, progress=False)  # without a refit
        >>> matched.refitted.any(), (matched.pointwise[14] / found.pointwise[14] - 1).abs() < 0.05
        (tensor(False), tensor(True))
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_positive_int("reloo", least=100, num_samples=num_samples)
    number = number_of_draws(fit, num_samples)
    source = source_with_model("reloo", fit, args, kwargs, number, needs_all=True)
    groups = ("posterior", "log_likelihood", "sample_stats")
    options: Any = {"num_samples": number, "batch_size": BATCH_SIZE, "progress": False, "model_kwargs": kwargs}
    data = to_arviz(fit, *args, groups=groups, **options)
    name, densities = _densities(data, var_name)
    rows, log_p = densities.shape[2:], densities.flatten(0, 1).flatten(1)  # (draws, N)
    draws, stats = draws_of_data(data)
    log_weights = stats["log_weight"].double().reshape(-1, 1) if "log_weight" in stats else torch.zeros(len(log_p), 1).double()
    if bad_draws := int((~log_p.isfinite()).any(1).sum()):
        raise ValueError(f"The log density of {name!r} is not finite in {bad_draws} of {len(log_p)} draws: see its parameters.")
    if not log_weights.max().isfinite():
        raise ValueError("The weights of all draws are zero, infinite or NaN: the model and the guide share no region.")
    smoothed, k = smooth_log_weights(log_weights - log_p)
    values, errors = log_mean_density(smoothed, log_p)
    log_density, _ = log_mean_density(smooth_log_weights(log_weights)[0], log_p)
    limit = min(1 - 1 / log10(len(log_p)), MAX_PARETO_K) if max_pareto_k is None else max_pareto_k
    bad = (k > limit).nonzero()[:, 0].tolist()
    left_out = RowLeftOut(source.model, source.args, source.kwargs, name) if bad else None
    matched = torch.zeros(len(k), dtype=torch.bool)
    if left_out is not None and moment_matching:
        matching = MomentMatching(left_out, source, draws, smooth_log_weights(log_weights[:, 0])[0], limit)
        matches = run_values(matching, bad, n_jobs=n_jobs, progress=progress, description="moment matching")
        for row, match in zip(bad, matches, strict=True):
            if match is not None:
                values[row], errors[row], k[row] = torch.tensor(match, dtype=torch.float64)
                matched[row] = True
        bad = [row for row in bad if not matched[row]]
    if left_out is not None and bad:
        method = getattr(fit, "method", None) if method is None else method
        if not isinstance(method, Method):
            raise TypeError(
                f"{len(bad)} of {len(k)} rows have a k-hat above {limit:.2f} and are to be refitted: give method=, such as "
                f"NoUTurn(), since the fit has none, but {type_with_article(method)}. Or give max_pareto_k=float('inf')."
            )
        task = Refit(left_out, source, method, num_samples)
        refits = _refits(task, bad, seed, n_jobs=n_jobs, progress=progress)
        values[bad], errors[bad], k[bad] = torch.tensor(refits, dtype=torch.float64).T
        if unsafe := int((k[bad] > limit).sum()):
            warn_caller(f"Weights of {unsafe} of {len(bad)} refits have a k-hat above {limit:.2f} too: give method=NoUTurn().")
        if rough := int((errors[bad] > MAX_MC_ERROR).sum()):
            warn_caller(
                f"Few draws of the refits explain {rough} of {len(bad)} rows, whose Monte Carlo error is above {MAX_MC_ERROR} "
                "nats. Their densities may be far too low: give moment_matching=True."
            )
    refitted = torch.zeros(len(k), dtype=torch.bool)
    refitted[bad] = True
    values, errors, k, matched, refitted = (x.reshape(rows) for x in (values, errors, k, matched, refitted))
    p_loo = float(log_density.sum() - values.sum())
    return LeaveOneOut(values, errors, k, matched, refitted, p_loo, len(log_p), limit, data, name)


def _refits(task: Refit, rows: list[int], seed: int | None, *, n_jobs: int, progress: bool) -> list[tuple[float, float, float]]:
    """Return what `Refit` finds for each row.

    Raises:
        RuntimeError: if a refit fails.
    """
    seeds = spawn_seeds(seed, len(rows))
    task.rows.update(zip(seeds, rows, strict=True))
    outcomes = run_all(task, seeds, n_jobs=n_jobs, progress=progress, description="reloo")
    if failed := [outcome.error for outcome in outcomes if outcome.error is not None]:
        raise RuntimeError(f"{len(failed)} of {len(rows)} refits failed, the first with {failed[0]}")
    if warned := [outcome.warnings for outcome in outcomes if outcome.warnings]:
        warn_caller(f"{len(warned)} of {len(rows)} fits warned, the first: {warned[0][0]}")
    return [outcome.value for outcome in outcomes]


def _densities(data: Any, name: str | None) -> tuple[str, Tensor]:
    """Return the name of the observed site, and its log densities, (chain, draw, rows...) in float64.

    Raises:
        ValueError: if there are several or none, or none of that name.
    """
    found = log_likelihood_of_data(data)
    if name is None and len(found) == 1:
        name = next(iter(found))
    if name not in found:
        wanted = "one observed site: give var_name=" if name is None else f"the observed site {name!r}"
        raise ValueError(f"reloo wants {wanted}, but found {listed(found)}.")
    return name, found[name].double()
