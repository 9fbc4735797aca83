r"""Simulation-based calibration: is a method right on average over data that the model itself makes?

If :math:`z^* \sim p(z)` and :math:`y \sim p(y \mid z^*)`, then :math:`z^*` is a draw of the posterior :math:`p(z \mid y)`.
Among L independent draws of it the rank of :math:`z^*` is uniform on 0, ..., L. Ranks of a posterior that is too narrow pile up
at both ends, those of a biased one at one end.

Ranks of the latent variables alone are uniform also for a "posterior" that ignores the data and is the prior. The log density
:math:`\log p(y, z)` is ranked as well, since it tells these apart (Modrák et al., arXiv 2211.02383).

Talts, Betancourt, Simpson, Vehtari and Gelman (arXiv 1804.06788). The tests stand in `pyro_genmodels.posteriors.uniformity`.
"""

from __future__ import annotations

__all__ = ["Calibration"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.posteriors.coverage import ExpectedCoverage, expected_coverage
from pyro_genmodels.posteriors.diagnosis import scalars
from pyro_genmodels.posteriors.uniformity import adjusted_p_values, ecdf_band, ecdf_p_value, normal_scores
from pyro_genmodels.utils.errors import import_extra, listed
from pyro_genmodels.utils.rng import forked_rng

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

FALSE_ALARM_RATE = 0.01
"""Probability that a verdict finds any fault in an exact posterior."""
TESTS = ("ranks", "bias", "width")
"""Tests of each scalar, as columns of the table are named."""
LOG_DENSITY = "log p(y, z)"
"""Name of the log density among the ranked variables."""
MAX_NAMED = 3
"""Largest number of scalars that a verdict names for one fault."""
MAX_PLOTTED = 12
"""Number of scalars that are plotted unless they are named."""


@dataclass(frozen=True, repr=False)
class Calibration:
    """Ranks of true values among draws of their posteriors, and what follows from them.

    Attributes:
        ranks: number of draws below the true value, (simulations, ...) by name; ``log p(y, z)`` for the log density.
        num_draws: number of draws for each simulation.
        truths: the true values, (simulations, ...) by name.
        draws: draws of the posteriors, (simulations, draws, ...) by name.
        failures: errors of the simulations and fits that failed and are left out.
        method: the method that was asked.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(500) + (z := torch.randn(500))  # data of unit noise
        >>> for scale in (0.5**0.5, 0.4):  # the deviation of the posterior, and a smaller one
        ...     draws = y[:, None] / 2 + scale * torch.randn(500, 100)
        ...     found = Calibration({"z": (draws < z[:, None]).sum(1)}, 100, {"z": z}, {"z": draws})
        ...     print(bool(found.p_values["z"] > 1e-3))
        True
        False
    """

    ranks: Mapping[str, Tensor]
    num_draws: int
    truths: Mapping[str, Tensor]
    draws: Mapping[str, Tensor]
    failures: list[str] = field(default_factory=list)
    method: str = ""

    @property
    def num_simulations(self) -> int:
        """Number of simulations whose ranks are known."""
        return len(next(iter(self.ranks.values())))

    @cached_property
    def pit(self) -> dict[str, Tensor]:
        """Probability integral transforms, (simulations, ...) by name in (0, 1): (rank + U) / (L + 1), with U uniform.

        They are uniform for an exact posterior.
        """
        with forked_rng(0):
            return {
                name: (x + torch.rand(x.shape, dtype=torch.float64)) / (self.num_draws + 1) for name, x in self.ranks.items()
            }

    @cached_property
    def p_values(self) -> dict[str, Tensor]:
        """P-values of uniform ranks, (...) by name, each by the empirical distribution function and not adjusted."""
        found = {}
        for name, x in self.ranks.items():
            columns = x.reshape(len(x), -1).T
            values = torch.tensor([ecdf_p_value(column, self.num_draws) for column in columns], dtype=torch.float64)
            found[name] = values.reshape(x.shape[1:])
        return found

    @cached_property
    def table(self) -> pd.DataFrame:
        """Data frame with a row for each scalar.

        Columns: ``p_ranks`` by the empirical distribution function; ``bias``, the mean of the posterior minus the true value in
        deviations of the posterior, and its ``p_bias``; ``width``, the deviation of the posterior divided by the right one, and
        its ``p_width``. Bias and width are estimates for nearly normal posteriors, and too small where all ranks are at the
        ends. The columns ``adjusted_...`` are the p-values adjusted for their number (Holm): an exact posterior has one below
        0.01 with probability 0.01 at most.
        """
        import pandas as pd

        rows = {}
        p_ranks = scalars({name: p[None, None] for name, p in self.p_values.items()})
        for name, pit in scalars({name: x[None] for name, x in self.pit.items()}).items():
            scores = normal_scores(pit[0])
            rows[name] = {
                "p_ranks": float(p_ranks[name]),
                "bias": -scores.mean,
                "p_bias": scores.mean_p,
                "width": 1 / scores.deviation,
                "p_width": scores.deviation_p,
            }
        table = pd.DataFrame.from_dict(rows, orient="index")
        p_values = table[[f"p_{test}" for test in TESTS]].to_numpy()
        adjusted = np.reshape(adjusted_p_values(p_values.flatten().tolist()), p_values.shape)
        return table.assign(**{f"adjusted_{test}": column for test, column in zip(TESTS, adjusted.T, strict=True)})

    def faults(self, false_alarm_rate: float = FALSE_ALARM_RATE) -> list[str]:
        """Return what is wrong, in words.

        Args:
            false_alarm_rate: probability that an exact posterior has any fault.
        """
        rows = self.table.drop(index=LOG_DENSITY, errors="ignore")
        ragged, biased, misfit = (rows[f"adjusted_{test}"] <= false_alarm_rate for test in TESTS)
        bias, width = rows["bias"], rows["width"]
        size = np.log(width).abs()
        unnamed = ragged & ~biased & ~misfit
        found = [
            _named("too narrow in", size[misfit & (width < 1)], width, "width {:.2f} of the right one"),
            _named("too wide in", size[misfit & (width > 1)], width, "width {:.2f} of the right one"),
            _named("biased upwards in", bias[biased & (bias > 0)], bias, "by {:.2f} deviations"),
            _named("biased downwards in", -bias[biased & (bias < 0)], -bias, "by {:.2f} deviations"),
            _named("ranks not uniform in", -rows["p_ranks"][unnamed], rows["p_ranks"], "p = {:.1g}"),
            self._fault_of_density(false_alarm_rate),
        ]
        return [fault for fault in found if fault]

    def _fault_of_density(self, false_alarm_rate: float) -> str:
        """Return in words what the ranks of the log density say, or nothing."""
        if LOG_DENSITY not in self.ranks:
            return ""
        row = self.table.loc[LOG_DENSITY]
        if min(row[f"adjusted_{test}"] for test in TESTS) > false_alarm_rate:
            return ""
        if row["bias"] > 0:
            return "draws have higher density than true values (too narrow, or a part is missing)"
        return "draws have lower density than true values (off, too wide, or blind to the data)"

    @property
    def verdict(self) -> str:
        """The faults in one line, or "no fault found". An exact posterior has a fault with probability 0.01."""
        return "; ".join(self.faults()) or "no fault found"

    def coverage(self, names: Sequence[str] | None = None) -> ExpectedCoverage:
        """Return the expected coverage of all variables together: see `expected_coverage`.

        Args:
            names: names of variables; by default all.

        Raises:
            ValueError: if a variable is unknown.
        """
        names = list(self.truths) if names is None else list(names)
        if unknown := [name for name in names if name not in self.truths]:
            raise ValueError(f"There are no draws of {unknown[0]!r}, but of {listed(self.truths)}.")
        return expected_coverage({n: self.draws[n] for n in names}, {n: self.truths[n] for n in names})

    def to_dataset(self) -> xr.Dataset:
        """Return the transforms `pit` as ArviZ's plots take them, with dimensions (chain, draw, ...): a draw is a simulation.

        With ArviZ 1: ``plot_ecdf_pit(xr.DataTree.from_dict({"prior_sbc": calibration.to_dataset()}))``.
        With ArviZ 0.23: ``az.plot_ecdf(calibration.pit["mu"], cdf=scipy.stats.uniform.cdf)``.
        """
        import xarray as xr

        variables, coords = {}, {"chain": np.zeros(1, int), "draw": np.arange(self.num_simulations)}
        for name, x in self.pit.items():
            sizes = {f"{name}_dim_{i}": np.arange(size) for i, size in enumerate(x.shape[1:])}
            variables[name] = (("chain", "draw", *sizes), x[None].numpy())
            coords |= sizes
        return xr.Dataset(variables, coords=coords)

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Plot the empirical distribution function of the ranks minus the uniform one, with its simultaneous 95 % band.

        Args:
            names: names of scalars, such as ``["mu", "theta[0]"]``; by default the first twelve.

        Returns:
            A figure of matplotlib, which the extra ``eval`` installs.

        Raises:
            ValueError: if a name is not one of a scalar.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="Calibration.plot")
        ranks = scalars({name: x[None] for name, x in self.ranks.items()})
        shown = list(ranks)[:MAX_PLOTTED] if names is None else list(names)
        if unknown := [name for name in shown if name not in ranks]:
            raise ValueError(f"There is no scalar {unknown[0]!r} to plot, but {listed(ranks)}.")
        x, lower, upper = ecdf_band(self.num_simulations, self.num_draws)
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        figure, grid = plt.subplots(rows, columns, figsize=(3 * columns, 2.5 * rows), squeeze=False, layout="constrained")
        for axes, name in zip(grid.flat, shown, strict=False):
            share = np.searchsorted(ranks[name][0].sort().values.numpy(), x * (self.num_draws + 1) - 0.5) / self.num_simulations
            axes.fill_between(x, lower - x, upper - x, alpha=0.3)
            axes.step(x, share - x, where="mid")
            axes.axhline(0.0, color="k", lw=0.5)
            axes.set(title=name, xlabel="rank / draws", ylabel="ECDF - uniform")
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        return figure

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"<calibration of {self.method} by {self.num_simulations} simulations{failed}: {self.verdict}>"


def _named(words: str, sizes: pd.Series, told: pd.Series, unit: str) -> str:
    """Return a fault with the names of its scalars, the largest first; nothing if there are none."""
    names = list(sizes.sort_values(ascending=False).index)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{words} {', '.join(names[:MAX_NAMED])}{more} ({unit.format(told[names[0]])})" if names else ""
