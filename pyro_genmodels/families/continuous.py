"""The base of families of densities over the reals, which take integers too by dequantisation."""

from __future__ import annotations

__all__ = ["ContinuousFamily"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.learned_noise import LearnedNoise
from pyro_genmodels.families.family import Family
from pyro_genmodels.utils.distributions import coordinate_support, is_real
from pyro_genmodels.utils.errors import check_positive_int


class ContinuousFamily(Family):
    """Base of families of densities over the reals.

    Args:
        event_shape: shape of one datum.
        levels: number K of levels, for data that are integers 0 .. K - 1; None for real numbers. The distribution is then
            `Dequantized`, and a density is one on (0, K), since mass outside would be that of no integer.
        support: set in which one coordinate of real numbers lies; with levels, a density is on (0, K).
        kwargs: passed to `Family`.

    Raises:
        ValueError: for fewer than 2 levels, a support of integers, or a density of levels with another support than (0, K).
    """

    _has_density = True

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        levels: int | None,
        support: constraints.Constraint = constraints.real,
        **kwargs: Any,
    ) -> None:
        if levels is not None:
            check_positive_int(type(self).__name__, least=2, levels=levels)
            support = _on_levels(type(self).__name__, levels, support) if self._has_density else support
        super().__init__(event_shape, support=support, **kwargs)
        if self.support.is_discrete:
            raise ValueError(
                f"{type(self).__name__} has a density over real numbers, but found the discrete support {self.support}. Model "
                "integers 0 .. K - 1 by levels=K, and leave support out."
            )
        self.levels = levels

    def _over_data(self, density: GenerativeDistribution, noise: LearnedNoise | None = None) -> GenerativeDistribution:
        """Return the density itself, or for data with levels the dequantised density of integers."""
        return density if self.levels is None else Dequantized(density, self.levels, dtype=self.loc.dtype, dequantizer=noise)

    @property
    def data_support(self) -> constraints.Constraint:
        return self._continuous_support if self.levels is None else constraints.integer_interval(0, self.levels - 1)

    @property
    def _continuous_support(self) -> constraints.Constraint:
        """Support of the density, before any rounding to levels."""
        return self.support

    def _units_of_all(self, found: ColumnStatistics) -> tuple[Tensor, Tensor]:
        noisy = found if self.levels is None else found.with_noise(mean=1 / 2, variance=1 / 12)  # of a uniform distribution
        return super()._units_of_all(noisy)

    def _as_reals(self, x: Tensor) -> Tensor:
        return x if self.levels is None else x + torch.rand_like(x, dtype=torch.float64)


def _on_levels(owner: str, levels: int, support: Any) -> Any:
    """Return the support of a density of integers 0 .. levels - 1 to which noise in (0, 1) is added.

    Raises:
        ValueError: if another set of real numbers is wanted.
    """
    inner = coordinate_support(support)
    is_wanted = (getattr(inner, "lower_bound", None), getattr(inner, "upper_bound", None)) == (0, levels)
    if not (is_real(support) or is_wanted or getattr(inner, "is_discrete", True)):
        raise ValueError(
            f"{owner} models levels={levels} by a density on (0, {levels}), but found support={support}. Leave support out."
        )
    return constraints.interval(0.0, levels) if is_real(support) else support
