r"""Expected coverage: how often regions of a posterior hold the truth, at every level at once.

Of a simulation with truth :math:`z^*` and draws :math:`z_1, \dots, z_L` of its posterior, balls around a random reference point
:math:`r` are credible regions,

.. math:: f = \tfrac1L \#\{l : \lVert z_l - r \rVert < \lVert z^* - r \rVert\}, \qquad
    \mathrm{coverage}(\alpha) = \Pr(f < \alpha) ,

which is :math:`\alpha` for an exact posterior, below it for one that is too narrow at high levels, and above it for one that is
too wide. Lemos et al., *Sampling-Based Accuracy Testing of Posterior Estimators* (TARP, arXiv 2302.03026).
"""

from __future__ import annotations

__all__ = ["ExpectedCoverage", "expected_coverage"]

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_genmodels.posteriors.uniformity import ecdf_p_value, normal_scores, ranks_of
from pyro_genmodels.utils.errors import check_positive_int, import_extra, listed, type_with_article
from pyro_genmodels.utils.rng import forked_rng

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_LEVELS = 101
"""Number of levels from 0 to 1."""


@dataclass(frozen=True, repr=False)
class ExpectedCoverage:
    """Coverage of credible regions at every level.

    Attributes:
        ranks: number of draws nearer to the reference point than the truth, (simulations,).
        num_draws: number of draws for each simulation.
        levels: levels of the regions, (levels,).
        values: share of simulations whose truth lies in the region of each level, (levels,).
        lower: lower end of the pointwise 95 % band by the bootstrap, (levels,).
        upper: its upper end.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(500, 1) + (truths := torch.randn(500, 1))  # data of unit noise
        >>> coverage = expected_coverage(x[:, None] / 2 + 0.5**0.5 * torch.randn(500, 100, 1), truths)
        >>> bool((coverage.values - coverage.levels).abs().max() < 0.1)  # nominal at each level
        True
    """

    ranks: Tensor
    num_draws: int
    levels: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor

    @property
    def p_value(self) -> float:
        """P-value of nominal coverage at all levels together, from the exact law of the ranks."""
        return ecdf_p_value(self.ranks, self.num_draws)

    @property
    def spread_p_value(self) -> float:
        """P-value of regions that are neither too small nor too large; more powerful for these than `p_value`."""
        return normal_scores(self._pit()).deviation_p

    @property
    def largest_error(self) -> float:
        """Coverage minus level where it is farthest from zero."""
        errors = self.values - self.levels
        return float(errors[errors.abs().argmax()])

    def _pit(self) -> Tensor:
        with forked_rng(0):
            return (self.ranks + torch.rand(len(self.ranks), dtype=torch.float64)) / (self.num_draws + 1)

    def __repr__(self) -> str:
        n = len(self.ranks)
        return f"<coverage off by {self.largest_error:+.2f} at most, p = {self.p_value:.2g}, of {n} simulations>"

    def plot(self) -> Figure:
        """Plot coverage against level, with its band.

        Returns:
            A figure of matplotlib, which the extra ``eval`` installs.
        """
        plt = import_extra("matplotlib.pyplot", extra="eval", by="ExpectedCoverage.plot")
        figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
        axes.fill_between(self.levels, self.lower, self.upper, alpha=0.3, label="95 % by the bootstrap")
        axes.plot(self.levels, self.values, label="coverage")
        axes.plot([0, 1], [0, 1], "k--", lw=1, label="nominal")
        axes.set(xlabel="level", ylabel="expected coverage", aspect="equal")
        axes.legend()
        return figure


def expected_coverage(
    draws: Tensor | Mapping[str, Tensor],
    truths: Tensor | Mapping[str, Tensor],
    *,
    references: Tensor | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> ExpectedCoverage:
    """Return the expected coverage of posteriors of simulated data, by random reference points (TARP).

    Coordinates are divided by the range of the truths. A posterior that ignores its data and equals the prior passes, unless
    the reference points depend on the data: give ``references=`` for that.

    Args:
        draws: draws of the posterior of each simulation, (simulations, draws, dim), or (simulations, draws, ...) by name.
        truths: the values that the data were simulated with, (simulations, dim), or (simulations, ...) by name.
        references: reference points, (simulations, dim), in the units of the truths. They may depend on the data but not on
            the truths. By default they are uniform in the range of the truths.
        num_bootstrap: number of resamples of the simulations for the band.
        seed: seed of reference points, ties and resamples.

    Raises:
        TypeError: if draws and truths are not both tensors or both dictionaries.
        ValueError: if shapes or names do not agree, a value is not finite, or there are fewer than two simulations.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(500, 1) + (truths := torch.randn(500, 1))  # data of unit noise
        >>> exact = x[:, None] / 2 + 0.5**0.5 * torch.randn(500, 100, 1)
        >>> expected_coverage(exact, truths).p_value > 0.01
        True
        >>> narrow = x[:, None] / 2 + 0.3 * torch.randn(500, 100, 1)
        >>> expected_coverage(narrow, truths).p_value < 1e-6
        True
    """
    check_positive_int("expected_coverage", num_bootstrap=num_bootstrap)
    z, truth = _matrices(draws, truths)
    n, num_draws, dim = z.shape
    if references is not None and references.shape != (n, dim):
        raise ValueError(f"expected_coverage wants references as {(n, dim)}, but found {tuple(references.shape)}.")
    low = truth.amin(0)
    scale = truth.amax(0) - low
    scale = torch.where(scale > 0, scale, 1.0)
    levels = torch.linspace(0, 1, NUM_LEVELS, dtype=torch.float64)
    with forked_rng(seed):
        unit = torch.rand(n, dim, dtype=torch.float64)
        points = unit if references is None else (references.detach().double().cpu() - low) / scale
        distance = ((z - low) / scale - points[:, None]).norm(dim=2)
        ranks = ranks_of(((truth - low) / scale - points).norm(dim=1), distance)
        pit = (ranks + torch.rand(n, dtype=torch.float64)) / (num_draws + 1)
        resampled = torch.stack([_shares(pit[torch.randint(n, (n,))], levels) for _ in range(num_bootstrap)])
    lower, upper = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return ExpectedCoverage(ranks, num_draws, levels, _shares(pit, levels), lower, upper)


def _shares(pit: Tensor, levels: Tensor) -> Tensor:
    """Return the share of values below each level, (levels,)."""
    return torch.searchsorted(pit.sort().values, levels).double() / len(pit)


def _matrices(draws: Any, truths: Any) -> tuple[Tensor, Tensor]:
    """Return draws, (n, draw, dim), and truths, (n, dim), in float64."""
    if isinstance(draws, Mapping) and isinstance(truths, Mapping):
        if unlike := sorted(set(draws) ^ set(truths)):
            raise ValueError(
                f"expected_coverage wants draws and truths of the same variables, but only one has {listed(unlike)}."
            )
        if not draws:
            raise ValueError("expected_coverage wants draws of at least one variable, but found none.")
        parts = [(name, draws[name], truths[name]) for name in draws]
    elif isinstance(draws, Tensor) and isinstance(truths, Tensor):
        parts = [("draws", draws, truths)]
    else:
        raise TypeError(
            "expected_coverage wants draws and truths both as tensors, or both as dictionaries of tensors, but found "
            f"{type_with_article(draws)} and {type_with_article(truths)}."
        )
    for name, z, truth in parts:
        if z.dim() < 2 or (z.shape[0], *z.shape[2:]) != tuple(truth.shape):
            raise ValueError(
                f"expected_coverage wants draws (simulations, draws, ...) and truths (simulations, ...), but found {name!r} as "
                f"{tuple(z.shape)} and {tuple(truth.shape)}."
            )
        if not (z.isfinite().all() and truth.isfinite().all()):
            raise ValueError(f"expected_coverage wants finite values, but {name!r} has others. Leave out those simulations.")
    if len({z.shape[:2] for _, z, _ in parts}) > 1:
        raise ValueError("expected_coverage wants as many simulations and draws of each variable.")
    if len(parts[0][2]) < 2:
        raise ValueError("expected_coverage wants at least two simulations.")
    flat = [(z.flatten(2) if z.dim() > 2 else z[..., None], t.reshape(len(t), -1)) for _, z, t in parts]
    z, t = (torch.cat([part.detach().double().cpu() for part in side], -1) for side in zip(*flat, strict=True))
    return z, t
