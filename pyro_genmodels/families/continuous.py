"""The base of families of densities over the reals, which take integers too by dequantisation."""

from __future__ import annotations

__all__ = ["ContinuousFamily"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.learned_noise import LearnedNoise
from pyro_genmodels.families.family import Family
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import check_positive_int


class ContinuousFamily(Family):
    """Base of families of densities over the reals.

    Args:
        event_shape: shape of one datum.
        levels: number K of levels, for data that are integers 0 .. K - 1; None for real numbers. The distribution is then
            `Dequantized`, and a density is one on (0, K), since mass outside would be that of no integer.
        support: set in which one coordinate of real numbers lies.
        kwargs: passed to `Family`.

    Raises:
        ValueError: for fewer than 2 levels, or a support of integers.
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
            support = constraints.interval(0.0, levels) if self._has_density and is_real(support) else support
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

    def _as_reals(self, x: Tensor) -> Tensor:
        return x if self.levels is None else x + torch.rand_like(x, dtype=torch.float64)
