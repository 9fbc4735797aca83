r"""The quality of a posterior, in numbers and in words.

Of Markov chains R-hat and effective sample sizes are told (Vehtari et al., arXiv 1903.08008), and divergences. Of an
approximation q the evidence lower bound, the log evidence by importance sampling, and k-hat of the weights
:math:`p(y, z) / q(z)` (Yao et al., arXiv 1802.02538). If there is a reference, such as long chains, errors of means and
deviations are told in its own deviations.
"""

from __future__ import annotations

__all__ = ["PosteriorDiagnosis", "diagnose_posterior"]

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.inference_data import to_arviz
from pyro_genmodels.inference_data.export import chain_diagnostics, draws_of_data, pareto_k_of_data
from pyro_genmodels.posteriors.checked_sources import checked_source
from pyro_genmodels.posteriors.weighted import Psis, psis
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.keywords import joined_keywords, runs_models
from pyro_genmodels.utils.pareto import MAX_PARETO_K, count_unreliable

if TYPE_CHECKING:
    import pandas as pd

MAX_R_HAT = 1.01
"""Largest R-hat of chains that have converged (arXiv 1903.08008)."""
MIN_ESS_PER_CHAIN = 100
"""Smallest effective sample size for each chain at which R-hat and quantiles can be relied on (arXiv 1903.08008)."""
MAX_STEPS = 150
"""Mean number of gradients of a draw of chains up to which nothing is said: more are a sign of strong correlations."""
MAX_MEAN_ERROR = 0.1
"""Largest error of a mean, in deviations of the reference, that is not called a fault."""
MAX_DEVIATION_ERROR = 0.1
"""Largest relative error of a standard deviation that is not called a fault."""
NUM_ERRORS = 5.0
"""Number of standard errors, of both sets of draws, by which such an error must be larger than chance."""


@dataclass(frozen=True, repr=False)
class PosteriorDiagnosis:
    """The quality of a posterior. Numbers that do not exist for a fit, or are estimates by a critic, are NaN.

    Attributes:
        draws: draws of each variable, (chain, draw, ...) by name.
        table: data frame with a row for each scalar variable: ``mean`` and ``sd``; of chains ``r_hat``, ``ess_bulk`` and
            ``ess_tail``; with a reference ``mean_error``, in its deviations, and ``sd_error``, relative.
        elbo: evidence lower bound, mean of log p(y, z) - log q(z), in nats, and its standard error.
        log_evidence: log evidence by importance sampling or by the method itself, in nats, and its standard error.
        pareto_k: k-hat of the importance weights: below 0.7 they correct for the guide.
        local_pareto_k: k-hat of the latent variables of each row, (rows...) by the names of the plates, of an `AmortizedGuide`.
        num_divergences: number of draws of chains whose trajectories diverged.
        seconds: seconds that the fit took.
        num_gradients: gradients of the log density that it took.
        faults: what is wrong, in words.

    Example:
        >>> reference, narrow = {"z": torch.randn(4, 1000)}, {"z": 0.5 * torch.randn(4, 1000)}
        >>> diagnosis = diagnose_posterior(narrow, reference=reference)
        >>> diagnosis.faults  # doctest: +ELLIPSIS
        ['too narrow in z (deviation -...%)']
        >>> list(diagnosis.table)
        ['mean', 'sd', 'r_hat', 'ess_bulk', 'ess_tail', 'mean_error', 'sd_error', 'mean_z', 'sd_z']
    """

    draws: Mapping[str, Tensor]
    table: pd.DataFrame
    elbo: tuple[float, float] = (nan, nan)
    log_evidence: tuple[float, float] = (nan, nan)
    pareto_k: float = nan
    local_pareto_k: Mapping[str, Tensor] = field(default_factory=dict)
    num_divergences: float = nan
    seconds: float = nan
    num_gradients: float = nan
    faults: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The faults in one line, or "no fault found"."""
        return "; ".join(self.faults) or "no fault found"

    def __str__(self) -> str:
        return f"{self.verdict}\n{self.table.round(3)}"


@runs_models()
def diagnose_posterior(
    fit: Any,
    *args: Any,
    reference: Any = None,
    num_samples: int = 1000,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PosteriorDiagnosis:
    """Return how good a posterior is.

    Args:
        fit: what `posterior` returned; or any fit or data that `to_arviz` takes or returns, such as an `SVI`.
        args: positional arguments of the model; a fit by `posterior` and an `MCMC` run remember theirs.
        reference: another fit that is taken for the truth, such as long chains; or draws by name, (chain, draw, ...).
        num_samples: number of draws of a guide.
        progress: True to show a progress bar after two seconds.
        model_kwargs: keyword arguments of the model.
        kwargs: keyword arguments of the model, with any other name.

    Raises:
        ValueError: as `to_arviz` does; if the reference has none of the fit's variables, or other shapes; if draws are not
            finite, outside their support or of a wrong shape, the guide has variables that the model lacks, or data are NaN or
            of a wrong shape.

    Warns:
        UserWarning: if the model of a guide observes nothing in this call.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> fit = posterior(model, torch.tensor([1.0, 2.0, 3.0]), method=Laplace(), progress=False)
        >>> diagnose_posterior(fit).verdict
        'no fault found'
    """
    check_positive_int("diagnose_posterior", num_samples=num_samples)
    kwargs = joined_keywords(kwargs, model_kwargs)
    truth = None if reference is None else _draws(reference, args, kwargs, num_samples, progress).draws
    return diagnose(fit, args, kwargs, num_samples, truth, progress=progress)


def diagnose(
    fit: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    truth: Mapping[str, Tensor] | None,
    *,
    progress: bool = False,
) -> PosteriorDiagnosis:
    """Return how good a posterior is: see `diagnose_posterior`.

    Args:
        fit: the fit.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        num_samples: number of draws of a guide.
        truth: draws of a reference, (chain, draw, ...) by name; None without one.
        progress: True to show a progress bar after two seconds.
    """
    import pandas as pd

    drawn = _draws(fit, args, kwargs, num_samples, progress)
    draws, weighted, stats = drawn.draws, drawn.weighted, drawn.stats
    k = weighted.pareto_k if weighted is not None else drawn.pareto_k
    is_chain = weighted is None and isnan(k)
    is_estimate = weighted is not None and weighted.is_estimate
    columns = scalars(draws)
    table = pd.DataFrame(
        {
            "mean": {name: float(x.mean()) for name, x in columns.items()},
            "sd": {name: float(x.std()) for name, x in columns.items()},
        }
    )
    if is_chain:
        table = table.join(pd.DataFrame.from_dict(chain_diagnostics(columns), orient="index"))
    if truth is not None:
        table = table.join(_errors(columns, scalars(truth), num_effective=_effective(table, columns)))
    divergences = float(stats["diverging"].sum()) if "diverging" in stats else nan
    exact = None if is_estimate else weighted
    evidence = exact.log_evidence if exact is not None else None
    found = getattr(fit, "log_evidence", None)
    return PosteriorDiagnosis(
        draws,
        table,
        elbo=exact.elbo if exact is not None else (nan, nan),
        log_evidence=(float(evidence.value), float(evidence.std_error)) if evidence else (found or (nan, nan)),
        pareto_k=nan if is_estimate else k,
        local_pareto_k=drawn.local_pareto_k,
        num_divergences=divergences,
        seconds=getattr(fit, "seconds", nan),
        num_gradients=getattr(fit, "num_gradients", nan),
        faults=[
            *_faults(table, k, divergences, len(next(iter(draws.values()))), is_estimate),
            *_rows_faults(drawn),
            *_steps_faults(stats),
        ],
    )


def scalars(draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return draws of each scalar, (chain, draw) in float64, by names such as ``theta[0]``.

    Args:
        draws: draws, (chain, draw, ...) by name.

    Raises:
        ValueError: naming a variable with draws that are not finite. Entries without any value are no variables of a model.
    """
    found = {}
    for name, x in draws.items():
        flat = x.detach().double().cpu().reshape(*x.shape[:2], -1)
        _check_finite(name, flat)
        for i, index in enumerate(np.ndindex(*x.shape[2:])):
            found[f"{name}[{', '.join(map(str, index))}]" if index else name] = flat[:, :, i]
    return found


def _check_finite(name: str, draws: Tensor) -> None:
    """Check draws, (chain, draw, entries). Entries that are NaN in all draws are allowed, as of rows of unequal length.

    Raises:
        ValueError: naming the variable, if others are not finite.
    """
    bad, absent = ~draws.isfinite(), draws.isnan().flatten(0, 1).all(0)
    if draws.numel() and (absent.all() or (bad & ~absent).any()):
        number = int(bad.any(-1).sum())
        raise ValueError(f"Draws of {name!r} are not finite in {number} of {bad.shape[0] * bad.shape[1]} draws.")


class _Drawn(NamedTuple):
    """Draws of a fit, and what it knows about them.

    Attributes:
        draws: draws, (chain, draw, ...) by name.
        weighted: their weights, where the fit has a density.
        stats: statistics of draws of chains, (chain, draw) by name.
        pareto_k: k-hat of the weights that they were resampled with.
        local_pareto_k: k-hat of the latent variables of each row, (rows...) by the names of the plates.
    """

    draws: dict[str, Tensor]
    weighted: Psis | None
    stats: Mapping[str, Tensor]
    pareto_k: float = nan
    local_pareto_k: Mapping[str, Tensor] = MappingProxyType({})


def _draws(
    fit: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    num_samples: int,
    progress: bool,  # noqa: FBT001
) -> _Drawn:
    """Return draws of a fit, and what it knows about them."""
    problem = getattr(fit, "problem", None)
    if hasattr(fit, "psis") and (problem is None or problem.has_density):
        weighted = fit.psis(num_samples)
        return _Drawn({name: x[None] for name, x in weighted.draws.items()}, weighted, {})
    if problem is not None:
        number = num_samples if hasattr(fit, "psis") else None
        k = float(getattr(fit, "pareto_k", nan))
        return _Drawn(fit.get_samples(number, group_by_chain=True), None, getattr(fit, "stats", {}), k)
    if hasattr(fit, "posterior") and not callable(fit.posterior):  # ArviZ data
        data = fit
    else:
        has_guide = callable(getattr(fit, "guide", None)) or isinstance(fit, tuple)
        groups = ["posterior", "sample_stats"]
        if isinstance(fit, Mapping):  # draws without a model
            args, kwargs, groups = (), {}, ["posterior"]
        wanted = num_samples if has_guide else None
        if not isinstance(fit, list):  # the fits of a list, as chains, are checked by to_arviz
            checked_source(fit, args, kwargs, wanted, warns_of_prior=True)
        data = to_arviz(fit, *args, num_samples=wanted, groups=groups, progress=progress, model_kwargs=kwargs)
    draws, stats = draws_of_data(data)
    local = pareto_k_of_data(data)
    k = float(local.pop("", nan))
    if not {"log_p", "log_q"} <= stats.keys():
        return _Drawn(draws, None, stats, k, local)
    flat = {name: x.flatten(0, 1) for name, x in draws.items()}
    return _Drawn(draws, psis(flat, stats["log_p"].flatten(), stats["log_q"].flatten()), stats, k, local)


def _effective(table: pd.DataFrame, columns: Mapping[str, Tensor]) -> Mapping[str, float]:
    """Return the number of independent draws that those of each scalar are worth."""
    return {name: float(table["ess_bulk"][name]) if "ess_bulk" in table else x.numel() for name, x in columns.items()}


def _errors(columns: Mapping[str, Tensor], truth: Mapping[str, Tensor], num_effective: Mapping[str, float]) -> pd.DataFrame:
    """Return errors of means and deviations, and how far they exceed chance in standard errors, for each scalar.

    Raises:
        ValueError: if the reference lacks a scalar.
    """
    import pandas as pd

    if missing := [name for name in columns if name not in truth]:
        raise ValueError(
            f"The reference has no draws of {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, but of "
            f"{', '.join(list(truth)[:5])}. A reference has the variables of the fit, in the same shapes."
        )
    rows = {}
    reference_size = {
        name: float(row["ess_bulk"]) for name, row in chain_diagnostics({name: truth[name] for name in columns}).items()
    }
    for name, x in columns.items():
        mean, sd = truth[name].mean(), truth[name].std()
        chance = (1 / num_effective[name] + 1 / reference_size[name]) ** 0.5
        tail = ((truth[name] - mean) / sd).pow(4).mean()
        mean_error, sd_error = float((x.mean() - mean) / sd), float(x.std() / sd - 1)
        rows[name] = {
            "mean_error": mean_error,
            "sd_error": sd_error,
            "mean_z": mean_error / chance,
            "sd_z": sd_error / (chance * float((tail - 1).clamp(min=0.0).sqrt()) / 2),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _faults(
    table: pd.DataFrame,
    pareto_k: float,
    divergences: float,
    num_chains: int,
    is_estimate: bool,  # noqa: FBT001
) -> list[str]:
    """Return what is wrong, in words, the worst first."""
    faults = []
    if "r_hat" in table:
        worst = table["r_hat"].idxmax() if table["r_hat"].notna().any() else None
        if worst is not None and table["r_hat"][worst] > MAX_R_HAT:
            faults.append(f"chains have not converged: R-hat {table['r_hat'][worst]:.3f} of {worst}")
        for column, part in (("ess_bulk", "bulk"), ("ess_tail", "tail")):
            least = table[column].idxmin() if table[column].notna().any() else None
            if least is not None and table[column][least] < MIN_ESS_PER_CHAIN * num_chains:
                faults.append(f"few draws: {part} effective sample size {table[column][least]:.0f} of {least}")
    if divergences > 0:
        faults.append(f"{divergences:.0f} divergences: regions of large curvature may be left out")
    off = _beyond(table, "mean_error", "mean_z", MAX_MEAN_ERROR)
    narrow = _beyond(table, "sd_error", "sd_z", MAX_DEVIATION_ERROR)
    if pareto_k > MAX_PARETO_K:
        reason = "and weights cannot correct it" if not isfinite(pareto_k) else f"k-hat {pareto_k:.2f}"
        reason += " by a critic's estimate of its density" if is_estimate else ""
        told = _narrow_words(table, narrow)
        faults.append(f"{told}: {reason}" if told else f"unlike the posterior: {reason}")
    elif told := _narrow_words(table, narrow):
        faults.append(told)
    if off is not None:
        faults.append(f"off in {off}: its mean by {table['mean_error'][off]:+.2f} deviations")
    return faults


def _steps_faults(stats: Mapping[str, Tensor]) -> list[str]:
    """Return in words that trajectories of chains are long, if they are."""
    mean = float(stats["n_steps"].double().mean()) if "n_steps" in stats else 0.0
    if mean <= MAX_STEPS:
        return []
    return [f"long trajectories: {mean:.0f} gradients a draw; try NoUTurn(low_rank=True), or other parameters"]


def _rows_faults(drawn: _Drawn) -> list[str]:
    """Return in words how many rows of each plate have weights that cannot correct for the guide, and which is the worst."""
    faults = []
    for name, k in drawn.local_pareto_k.items():
        if number := count_unreliable(k):
            known = k.nan_to_num(nan=-torch.inf)
            worst = ", ".join(str(int(i)) for i in np.unravel_index(int(known.argmax()), k.shape))
            faults.append(
                f"k-hat above {MAX_PARETO_K} for {number} of the {k.numel()} rows of {name!r}, the largest, {known.max():.2f}, "
                f"for row {worst}"
            )
    return faults


def _beyond(table: pd.DataFrame, error: str, z: str, limit: float) -> str | None:
    """Return the scalar with the largest error beyond a limit and beyond chance, or None."""
    if error not in table:
        return None
    large = table[(table[error].abs() > limit) & (table[z].abs() > NUM_ERRORS)]
    return None if large.empty else str(large[error].abs().idxmax())


def _narrow_words(table: pd.DataFrame, name: str | None) -> str:
    """Return in words that the deviation of a scalar is too small or too large; nothing for None."""
    if name is None:
        return ""
    error = table["sd_error"][name]
    return f"too {'narrow' if error < 0 else 'wide'} in {name} (deviation {error:+.0%})"
