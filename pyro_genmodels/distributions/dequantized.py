r"""Integers under a continuous density: uniform and variational dequantisation.

A density :math:`p` on :math:`[0, K]^d` gives the integers :math:`x \in \{0, \dots, K-1\}^d` the probability
:math:`P(x) = \int_{[0,1]^d} p(x + u)\,du`. By Jensen's inequality

.. math:: \log P(x) \ge \mathbb{E}_{u \sim q(u \mid x)} \left[ \log p(x + u) - \log q(u \mid x) \right]

for any noise q on :math:`(0, 1)^d`. It is uniform, or learned (`LearnedNoise`): the closer q is to the density of the remainder
u given the integer x, the tighter is the bound.

Each call draws new noise and is an unbiased estimate of the bound. The log of the mean of exp(log_prob) over k calls is
tighter. With many levels the noise is added, and samples are rounded, in double precision: near 65535, single precision has 256
numbers per level, and near 2^24 one. Theis et al., *A note on the evaluation of generative models* (arXiv 1511.01844); Ho et
al., *Flow++* (arXiv 1902.00275).
"""

from __future__ import annotations

__all__ = ["Dequantized"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.discretized import check_levels
from pyro_genmodels.utils.distributions import Density, density_of

MAX_LEVELS_IN_OWN_DTYPE = 2**12
"""Number of levels up to which noise has the dtype of the network: single precision has 2^11 numbers or more per level."""


class Dequantized(GenerativeDistribution):
    """Integers 0 .. levels - 1 in every coordinate, from a density over the reals.

    Samples of the base are rounded down, and clipped to the nearest level if they are outside [0, levels]. With the support
    ``interval(0, levels)`` for the base, nothing is clipped.

    Args:
        base: continuous distribution of the same event shape, in units of levels.
        levels: number of levels per coordinate, at least 2.
        dtype: dtype of the noise, and so of the values that the base scores. None is torch's default. With more than
            2^12 levels it is float64.
        dequantizer: function from integers (batch..., *event_shape), as floats, to noise of their shape in (0, 1) and its log
            density (batch...), such as `LearnedNoise`; None for uniform noise.
        validate_args: True checks values; None is torch's default.

    Raises:
        TypeError: if the base is not a distribution.
        ValueError: if `levels` is not an integer of at least 2, or if there are more than the dtype can tell apart.

    Example:
        >>> import pyro.distributions as dist
        >>> d = Dequantized(dist.Uniform(torch.zeros(2), 4.0).to_event(1), levels=4)
        >>> d.log_prob(torch.tensor([0, 3])).exp()
        tensor(0.0625)
    """

    is_dequantized = True

    def __init__(
        self,
        base: Distribution,
        levels: int,
        *,
        dtype: torch.dtype | None = None,
        dequantizer: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(base, Distribution):
            raise TypeError(f"Dequantized wants a distribution as its base, but found {base!r}. Call a family: family().")
        dtype = dtype or torch.get_default_dtype()
        check_levels("Dequantized", levels, dtype)
        self.base = base
        self.levels = levels
        self.dequantizer = dequantizer
        self.dtype = torch.float64 if levels > MAX_LEVELS_IN_OWN_DTYPE else dtype
        super().__init__(
            base.event_shape,
            batch_shape=base.batch_shape,
            support=constraints.integer_interval(0, levels - 1),
            validate_args=validate_args,
        )

    @property
    def density(self) -> Density:
        """Kind of density: a lower bound, or the kind of the base if that is an estimate or none."""
        kind = density_of(self.base)[0]
        return kind if kind in ("estimate", "none") else "lower bound"

    @property
    def advice(self) -> str:
        """Advice of the base."""
        return density_of(self.base)[1]

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Dequantized:
        new = super().expand(batch_shape)
        new.base = self.base.expand(Size(batch_shape))
        return new

    @property
    def _base_capabilities(self) -> Any:
        return capabilities(self.base)

    @property
    def is_unbiased(self) -> bool:
        """True if the base's estimates have the right expectation."""
        return self._base_capabilities.is_unbiased

    @property
    def has_velocity(self) -> bool:
        """True if the base has a velocity."""
        return self._base_capabilities.has_velocity

    @property
    def only_linear_paths(self) -> bool:
        """True if the base's velocity can be trained along straight paths only."""
        return self._base_capabilities.only_linear_paths

    @property
    def has_noise_error(self) -> bool:
        """True if the base has a denoiser."""
        return self._base_capabilities.has_noise_error

    def with_training_bound(self) -> Dequantized:
        """Return the same distribution over the base with its own training bound."""
        return self._over(self._base_capabilities.with_training_bound())

    def training_log_prob(self, value: Tensor) -> Tensor:
        """Return the training log density (nats) of the base at noisy values."""
        y, log_q = self._noisy(self.aligned(value)[0])
        return capabilities(self.base).training_log_prob(y) - log_q

    def dequantize(self, x: Tensor) -> tuple[Distribution, Tensor]:
        """Return the base, and integers x with uniform noise in (0, 1) added, (sample..., *batch_shape, *event_shape)."""
        return self.base, self._plus(self.aligned(x)[0].to(self.dtype))

    def _noisy(self, y: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return integers with noise, and the log density (nats) of the noise, (batch...)."""
        y = y.to(self.dtype)
        if self.dequantizer is None:
            return self._plus(y), 0.0
        noise, log_q = self.dequantizer(y)
        return self._plus(y, noise), log_q

    @staticmethod
    def _plus(y: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return integers with noise in (0, 1), by default uniform, also where the sum is rounded up to the next integer."""
        if noise is None:  # the middle of torch's steps: never 0, which a logit maps to minus infinity
            noise = torch.rand_like(y) + torch.finfo(y.dtype).eps / 4
        return torch.minimum(y + noise, torch.nextafter(y + 1, y))

    def quantize(self, y: Tensor) -> Tensor:
        """Return the levels 0 .. levels - 1 that values of the base round down to, clipped at both ends."""
        return y.floor().clamp(0, self.levels - 1).long()

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        y, log_q = self._noisy(y)
        return self.base.log_prob(y) - log_q

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        sample_shape = shape[: len(shape) - len(self.batch_shape)]
        if isinstance(self.base, GenerativeDistribution):
            with torch.no_grad():
                return self.quantize(self.base._transformed_draw(sample_shape, self.dtype))
        return self.quantize(self.base.sample(sample_shape))

    def _over(self, base: Any) -> Any:
        new = self.expand(self.batch_shape)
        new.base = base
        return new
