"""Comparison of several posteriors of one model, with each other or with a reference."""

from __future__ import annotations

__all__ = ["PosteriorComparison", "compare_posteriors"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.divergences.sliced import sliced_costs
from pyro_genmodels.evaluation.classifier_test import c2st as classifier_test
from pyro_genmodels.evaluation.permutation_test import mmd_test
from pyro_genmodels.posteriors.diagnosis import PosteriorDiagnosis, diagnose, scalars
from pyro_genmodels.utils.errors import check_positive_int, import_extra, type_with_article, warn_caller
from pyro_genmodels.utils.keywords import joined_keywords, runs_models
from pyro_genmodels.utils.nested import leaves

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MAX_PAIRED = 4
"""Largest number of scalars of the pair plot."""
REFERENCE = "reference"
"""Name in plots of a reference that is none of the fits."""
NUM_ERRORS = 5.0
"""Number of standard errors, of both bounds, by which a bound must be below another to be called a fault."""
MIN_BOUND_GAP = 1.0
"""Smallest difference of bounds, in nats, that is called a fault."""
NUM_PROJECTIONS = 500
"""Number of directions of the sliced Wasserstein distance."""
FOLDS, HIDDEN = 2, (50,)
"""Folds and hidden layers of the classifier of draws: a twentieth of the time of the published protocol."""


@dataclass(frozen=True, repr=False)
class PosteriorComparison:
    """Posteriors of one model, side by side.

    Attributes:
        diagnoses: what is known of each fit, by its name.
        distances: distances of each fit's draws from those of the reference, by its name: ``c2st``, ``sliced_wasserstein``,
            ``mmd`` and ``mmd_p``. Empty without a reference.
        reference: name of the reference among the fits, or None.
        truth: draws of the reference by name, (chain, draw, ...), if it is none of the fits.
    """

    diagnoses: Mapping[str, PosteriorDiagnosis]
    distances: Mapping[str, Mapping[str, float]]
    reference: str | None = None
    truth: Mapping[str, Tensor] | None = None

    @property
    def table(self) -> pd.DataFrame:
        """Data frame with a row for each fit. What a fit does not have is NaN.

        Columns: ``elbo`` (nats) and its standard error ``elbo_se``; ``log_evidence`` and ``log_evidence_se``; ``pareto_k``;
        ``r_hat``, the largest; ``ess_bulk`` and ``ess_tail``, the smallest; ``divergences``; with a reference ``mean_error``,
        the largest error of a mean in deviations of the reference, ``sd_error``, the largest of a deviation in per cent, and
        the distances of the draws, in coordinates divided by the reference's deviations: ``c2st`` (0.5 if they cannot be told
        apart), ``sliced_wasserstein`` of order 1, ``mmd`` (squared) and its p-value ``mmd_p``; ``seconds``, ``gradients``; and
        the ``verdict`` in words.
        """
        import pandas as pd

        rows = {name: _row(diagnosis) | dict(self.distances.get(name, {})) for name, diagnosis in self.diagnoses.items()}
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.index.name = "fit"
        table["verdict"] = list(self.verdicts.values())
        return table.dropna(axis=1, how="all")

    @property
    def verdicts(self) -> dict[str, str]:
        """The faults of each fit, in words, of which a bound far below that of another fit is one."""
        bounds = {name: diagnosis.elbo for name, diagnosis in self.diagnoses.items() if isfinite(diagnosis.elbo[0])}
        best = max(bounds, key=lambda name: bounds[name][0], default="")
        found = {}
        for name, diagnosis in self.diagnoses.items():
            faults = list(diagnosis.faults)
            if name in bounds:
                gap = bounds[best][0] - bounds[name][0]
                error = NUM_ERRORS * hypot(bounds[best][1], bounds[name][1])
                if gap > MIN_BOUND_GAP and gap > error:  # False for an error of NaN
                    faults.append(f"its bound is {gap:.1f} nats below that of {best}")
            found[name] = "; ".join(faults) or "no fault found"
        return found

    def __str__(self) -> str:
        table = self.table.drop(columns="verdict").round(3)
        return "\n".join([table.to_string(), "", *(f"{name}: {verdict}" for name, verdict in self.verdicts.items())])

    def __repr__(self) -> str:
        return str(self)

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Plot means with two standard deviations of each scalar, and pairs of up to four scalars, for fits and reference.

        Args:
            names: names of the scalars to plot, such as ``["mu", "theta[0]"]``; by default the first ones.

        Returns:
            A figure of matplotlib, which the extra ``eval`` installs.

        Raises:
            ValueError: if a name is not one of a scalar.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="PosteriorComparison.plot")
        columns = {fit: scalars(diagnosis.draws) for fit, diagnosis in self.diagnoses.items()}
        first = next(iter(columns.values()))
        if self.truth is not None:
            columns[REFERENCE] = scalars(self.truth)
        shown = list(first)[:30] if names is None else list(names)
        if unknown := [name for name in shown if name not in first]:
            raise ValueError(f"There is no scalar {unknown[0]!r} to plot, but {', '.join(list(first)[:10])}.")
        paired = shown[:MAX_PAIRED]
        figure = plt.figure(
            figsize=(5 + 2.2 * len(paired), max(3.0, 2.0 * len(paired), 0.4 * len(shown))), layout="constrained"
        )
        left, right = figure.subfigures(1, 2, width_ratios=[5, 2.2 * len(paired)])
        forest = left.subplots()
        pairs = right.subplots(len(paired), len(paired), squeeze=False)
        for k, (fit, x) in enumerate(columns.items()):
            height = [i + 0.7 * (k + 0.5) / len(columns) - 0.35 for i in range(len(shown))]
            means, errors = [float(x[n].mean()) for n in shown], [2 * float(x[n].std()) for n in shown]
            forest.errorbar(means, height, xerr=errors, fmt="o", ms=3, color=f"C{k}", label=fit)
            for row, a in enumerate(paired):
                for column, b in enumerate(paired):
                    axes = pairs[row, column]
                    if row == column:
                        axes.hist(x[a].flatten().numpy(), bins=40, density=True, histtype="step", color=f"C{k}")
                    elif row > column:
                        axes.plot(x[b].flatten()[:500], x[a].flatten()[:500], ".", ms=2, alpha=0.4, color=f"C{k}")
        forest.set(yticks=range(len(shown)), yticklabels=shown, xlabel="mean and two standard deviations")
        forest.invert_yaxis()
        forest.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
        for row, a in enumerate(paired):
            for column, b in enumerate(paired):
                pairs[row, column].set_visible(row >= column)
                pairs[row, column].set(xlabel=b if row == len(paired) - 1 else "", ylabel=a if column == 0 else "")
        return figure


def _row(diagnosis: PosteriorDiagnosis) -> dict[str, float]:
    table = diagnosis.table

    def extreme(column: str, *, largest: bool) -> float:
        if column not in table:
            return float("nan")
        return float(table[column].abs().max() if largest else table[column].min())

    return {
        "elbo": diagnosis.elbo[0],
        "elbo_se": diagnosis.elbo[1],
        "log_evidence": diagnosis.log_evidence[0],
        "log_evidence_se": diagnosis.log_evidence[1],
        "pareto_k": diagnosis.pareto_k,
        "r_hat": extreme("r_hat", largest=True),
        "ess_bulk": extreme("ess_bulk", largest=False),
        "ess_tail": extreme("ess_tail", largest=False),
        "divergences": diagnosis.num_divergences,
        "mean_error": extreme("mean_error", largest=True),
        "sd_error": 100 * extreme("sd_error", largest=True),
        "seconds": diagnosis.seconds,
        "gradients": diagnosis.num_gradients,
    }


@runs_models()
def compare_posteriors(
    fits: Mapping[str, Any],
    *args: Any,
    reference: Any = None,
    num_samples: int = 1000,
    distances: bool = True,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PosteriorComparison:
    """Compare posteriors of one model.

    Args:
        fits: fits by name: what `posterior` returned, or anything that `to_arviz` takes or returns.
        args: positional arguments of the model; fits by `posterior` and `MCMC` runs remember theirs.
        reference: name of the fit that is taken for the truth; or another fit, or draws by name, (chain, draw, ...). None
            compares no draws.
        num_samples: number of draws of each guide. Distances are those of as many draws.
        distances: False to leave out the distances of draws from those of the reference, which take about two CPU seconds for
            each fit. The accuracy ``c2st`` is that of a network with one layer of 50, trained on one half and measured on the
            other; `pyro_genmodels.evaluation.c2st` by default follows the published protocol, with larger networks and 10,000
            draws.
        progress: True to show a progress bar after two seconds.
        model_kwargs: keyword arguments of the model.
        kwargs: keyword arguments of the model, with any other name.

    Raises:
        TypeError: if the fits are no dictionary.
        ValueError: if there are none, or the reference is not the name of one.

    Warns:
        RuntimeWarning: if a fit by `posterior` has other data than the first one.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.posteriors import Laplace, Pathfinder, posterior
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> y = torch.tensor([1.0, 2.0, 3.0])
        >>> methods = {"laplace": Laplace(), "pathfinder": Pathfinder(num_paths=2)}
        >>> fits = {name: posterior(model, y, method=method, progress=False) for name, method in methods.items()}
        >>> compare_posteriors(fits, reference="laplace", distances=False).verdicts
        {'laplace': 'no fault found', 'pathfinder': 'no fault found'}
    """
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_positive_int("compare_posteriors", num_samples=num_samples)
    if not isinstance(fits, Mapping):
        raise TypeError(f"compare_posteriors wants a dictionary of fits by name, but found {type_with_article(fits)}.")
    if not fits:
        raise ValueError("compare_posteriors wants at least one fit, but found an empty dictionary.")
    if isinstance(reference, str) and reference not in fits:
        raise ValueError(f"The reference {reference!r} is not one of the fits {', '.join(map(repr, fits))}.")
    _warn_of_other_data(fits)
    truth_fit = fits[reference] if isinstance(reference, str) else reference
    truth = None if truth_fit is None else diagnose(truth_fit, args, kwargs, num_samples, None, progress=progress).draws
    diagnoses = {name: diagnose(fit, args, kwargs, num_samples, truth, progress=progress) for name, fit in fits.items()}
    found = {}
    if truth is not None and distances:
        for name, diagnosis in diagnoses.items():
            if name != reference:
                found[name] = _distances(diagnosis.draws, truth, num_samples)
    if isinstance(reference, str):
        return PosteriorComparison(diagnoses, found, reference)
    return PosteriorComparison(diagnoses, found, truth=truth)


def _warn_of_other_data(fits: Mapping[str, Any]) -> None:
    """Warn if fits by `posterior` of one model were given different data, so that their bounds cannot be compared."""
    problems = {name: fit.problem for name, fit in fits.items() if hasattr(fit, "problem")}
    data = {name: [x for _, x in leaves((p.args, p.kwargs)) if isinstance(x, Tensor)] for name, p in problems.items()}
    first = next(iter(data), "")
    for name in [name for name in data if problems[name].model is problems[first].model]:
        pairs = list(zip(data[name], data[first], strict=False))
        if len(data[name]) != len(data[first]) or not all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs):
            warn_caller(
                f"The fit {name!r} was given other data than {first!r}, so that their bounds and draws cannot be compared. Fit "
                "both to the same data."
            )
            return


def _distances(draws: Mapping[str, Tensor], truth: Mapping[str, Tensor], num_samples: int) -> dict[str, float]:
    """Return distances between two sets of draws, in coordinates divided by the deviations of the second.

    The sliced Wasserstein distance is of order 1: in squares the few farthest draws would decide it.
    """
    columns, reference = scalars(draws), scalars(truth)
    y = torch.stack([reference[name].flatten() for name in columns], 1)
    x = torch.stack([column.flatten() for column in columns.values()], 1)
    loc, scale = y.mean(0), y.std(0)
    x, y = (_thinned((part - loc) / scale, num_samples) for part in (x, y))
    test = mmd_test(x, y)
    size = min(len(x), len(y))
    return {
        "c2st": classifier_test(_thinned(y, size), _thinned(x, size), folds=FOLDS, hidden=HIDDEN).value,
        "sliced_wasserstein": float(sliced_costs(x, y, num_projections=NUM_PROJECTIONS, p=1.0, seed=1).mean()),
        "mmd": float(test.value),
        "mmd_p": float(test.p_value),
    }


def _thinned(x: Tensor, num_samples: int) -> Tensor:
    """Return up to as many rows at equal distances, which of chains are less dependent."""
    index = torch.linspace(0, len(x) - 1, min(num_samples, len(x))).round().long()
    return x[index]
