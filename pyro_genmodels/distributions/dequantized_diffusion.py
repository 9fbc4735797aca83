"""Dequantised diffusions: integers under the density of a diffusion, as `Dequantized` makes them of any density."""

from __future__ import annotations

__all__ = ["DequantizedDiffusion"]

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pyro_genmodels.distributions.dequantized import Dequantized
from pyro_genmodels.distributions.diffusion import DiffusionLikelihood, ReverseDiffusion
from pyro_genmodels.distributions.sampler_gap import SamplerGap
from pyro_genmodels.dynamics.reverse import ReverseSampler, Trajectory


class DequantizedDiffusion(Dequantized):
    """A dequantised diffusion over integers, with the variants of `ReverseDiffusion`.

    Args:
        base: the diffusion.
        levels: number of levels: see `Dequantized`.
        kwargs: further arguments of `Dequantized`.

    Example:
        >>> from pyro_genmodels.families import DDIM
        >>> from pyro_genmodels import Diffusion
        >>> Diffusion((2,), levels=5)().with_sampler(DDIM(10)).sample((3,)).shape
        torch.Size([3, 2])
    """

    base: ReverseDiffusion

    def with_sampler(self, sampler: ReverseSampler) -> DequantizedDiffusion:
        """Return the distribution with another sampler: see `ReverseDiffusion.with_sampler`."""
        return self._over(self.base.with_sampler(sampler))

    def with_likelihood(self, likelihood: DiffusionLikelihood) -> DequantizedDiffusion:
        """Return the distribution with another likelihood: see `ReverseDiffusion.with_likelihood`."""
        return self._over(self.base.with_likelihood(likelihood))

    def guided(self, weight: float) -> DequantizedDiffusion:
        """Return the distribution with another weight of its context: see `ReverseDiffusion.guided`."""
        return self._over(self.base.guided(weight))

    def sampler_gap(self, num_samples: int = 1000) -> SamplerGap:
        """Estimate how far draws are from the density, before they are rounded: see `ReverseDiffusion.sampler_gap`."""
        return self.base.sampler_gap(num_samples)

    def trajectory(self, sample_shape: Sequence[int] = (), **kwargs: Any) -> Trajectory:
        """Return samples with their trajectories, whose frames are not rounded: see `ReverseDiffusion.trajectory`."""
        trajectory = self.base.trajectory(sample_shape, **kwargs)
        return replace(trajectory, x=self.quantize(trajectory.x))
