r"""Capabilities: what objectives and evaluation ask of a distribution, with an answer for every distribution.

An objective never tests the class of a distribution. It asks whether the distribution has a velocity, an error of denoising or
negatives, and for the density to train. A distribution that derives from `GenerativeDistribution` and overrides what it has is
trained by every objective that needs it. Any other torch distribution gives the default answers, which need no more than
`log_prob` and `support`: see `capabilities`.
"""

from __future__ import annotations

__all__ = ["Capabilities", "ContrastiveTerms", "ScoreJumps", "capabilities"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to

from pyro_genmodels.utils.distributions import Density, is_real, over_events


@dataclass(frozen=True)
class ScoreJumps:
    """The reason why a score is discontinuous, for an error message.

    Attributes:
        reason: completes "holds a Flow ...", such as "with ReLU in its network".
        cure: completes "Use DenoisingScoreMatching(), or ...".
    """

    reason: str
    cure: str


@dataclass(frozen=True)
class ContrastiveTerms:
    """Unnormalised log densities (nats) of data and of negatives, in the same coordinates.

    Attributes:
        data: log densities of the data, (batch...).
        negatives: log densities of the negatives, (m,), or (m, batch...) if each datum has its own.
        squared_energies: function of no arguments that returns :math:`E(x)^2 + \\operatorname{mean}_i E(x'_i)^2`, (batch...).
    """

    data: Tensor
    negatives: Tensor
    squared_energies: Callable[[], Tensor]


class Capabilities:
    """Mixin with the default answer to every question that objectives and evaluation ask of a distribution."""

    pretransform: Transform | None = None
    """Bijection from the data to the space that the network models; None is the identity."""

    # The density.

    density: Density = "exact"
    """Kind of density that `log_prob` returns."""
    advice: str = ""
    """Sentence that says what to use instead, where the density is missing or not normalised."""
    intractable: bool = False
    """True if the density has a constant that is out of reach, so that `log_prob` knows its gradient through samples only."""
    log_partition: Any = None
    """log Z (`LogPartition`) for the present parameters, or None if it is not known. Only read if `intractable`."""
    mean_inside_log: bool = True
    """True if the log of a mean of exp(log_prob) over calls is a tighter bound than the mean of log_prob."""
    is_unbiased: bool = False
    """True if `log_prob`, where it is an estimate, has the right expectation."""
    is_implicit: bool = False
    """True if samples are made from `prior` by `likelihood(z, context)`, and there is no density: see `Implicit`."""

    def training_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density (nats) that maximum likelihood maximises, regularisers included: (sample..., *batch_shape)."""
        log_p: Tensor = self.log_prob(value)  # type: ignore[attr-defined]
        return log_p

    def normalized(self, log_partition: Any) -> Any:
        """Return the distribution with the given log Z (`LogPartition`) as its constant."""
        raise NotImplementedError(f"{type(self).__name__} has no log Z to set.")

    @property
    def training_form(self) -> Any:
        """The distribution that objectives train: itself, or for a guided diffusion that without guidance."""
        return self

    def with_training_bound(self) -> Any:
        """Return the distribution with the `log_prob` that trains it as the prior of a latent variable."""
        return self

    # Integers.

    is_dequantized: bool = False
    """True for integers that are rounded samples of a density over the reals, `base`: see `Dequantized`."""

    def dequantize(self, x: Tensor) -> tuple[Any, Tensor]:
        """Return a distribution over real numbers, and data for it: for integers `base`, and x with noise."""
        return self, x

    # Velocities, for `FlowMatching`.

    has_velocity: bool = False
    """True if `velocity` carries samples of the distribution `base` at time 0 to the data at time 1."""
    only_linear_paths: bool = False
    """True if `velocity` can be trained along straight paths only."""

    def velocity(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity at x (n, *event_shape) in the space of the network, at times t (n,), given context (n, c)."""
        raise NotImplementedError(f"{type(self).__name__} has no velocity.")

    # Denoising, for `DenoisingScoreMatching`.

    has_noise_error: bool = False
    """True if `noise_error` is the loss of a denoiser at the times of `process`, a `dynamics.processes.Process`."""
    denoiser: Any = None
    """`Denoiser` of the process, or None: what guided sampling of a posterior needs."""

    def noise_error(self, y: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """Return the squared error of the predicted noise, (batch...), for y (batch..., *event_shape) and t (batch...)."""
        raise NotImplementedError(f"{type(self).__name__} has no denoiser.")

    noise: tuple[float, float] | None = None
    """Lowest and highest noise level at which `at_noise` can be asked for; None without."""

    def at_noise(self, sigma: Tensor) -> Any:
        """Return the distribution of the data with normal noise of deviation sigma (batch...), in score coordinates."""
        raise NotImplementedError(f"{type(self).__name__} has one level of noise only.")

    # Scores, for score matching.

    score_jumps: ScoreJumps | None = None
    """Reason why the score is discontinuous, or None: integration by parts would miss the jumps."""

    def score_coordinates(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor, int]:
        """Return the log density in unbounded coordinates, the data in these coordinates, and their number of event dimensions.

        These are the coordinates of the network where there is a pretransform, and else those of `biject_to(support)`.

        Args:
            x: data, (batch..., *event_shape).

        Returns:
            The function, u (batch..., *shape) -> (batch...), in nats and up to a constant; u; and the length of that shape.
        """
        dist: Any = self
        x = x.expand(torch.broadcast_shapes(x.shape[: x.dim() - dist.event_dim], dist.batch_shape) + dist.event_shape)
        if self.pretransform is not None:
            to_data = self.pretransform.inv
        elif is_real(dist.support):
            return dist.log_prob, x, dist.event_dim
        else:
            to_data = over_events(biject_to(dist.support), dist.event_dim)

        def log_density(u: Tensor) -> Tensor:
            y = to_data(u)
            log_p: Tensor = dist.log_prob(y) + to_data.log_abs_det_jacobian(u, y)
            return log_p

        return log_density, to_data.inv(x), to_data.domain.event_dim

    # Negatives, for `ContrastiveDivergence` and `NoiseContrastive`.

    has_negatives: bool = False
    """True if `contrastive_terms` draws negatives, samples of the distribution with its present parameters."""

    def contrastive_terms(self, x: Tensor, *, steps: int | None = None, from_data: bool = False) -> ContrastiveTerms:
        """Return the log densities of data x (batch..., *event_shape) and of negatives.

        Args:
            x: data.
            steps: steps of the sampler; None is the distribution's own number.
            from_data: True if chains begin at the data.
        """
        raise NotImplementedError(f"{type(self).__name__} has no negatives.")

    def remember_log_partition(self, log_partition: Any) -> None:
        """Store an estimate of log Z (`LogPartition`) until the parameters change, where there is a place to store it."""


class _Defaults(Capabilities):
    """The default answers for a distribution that has none of its own; other attributes are the distribution's."""

    def __init__(self, dist: Distribution) -> None:
        self._dist = dist

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dist, name)


def capabilities(dist: Distribution) -> Any:
    """Return the distribution itself if it answers for its capabilities, and a view with the default answers otherwise.

    Pyro's wrappers are not removed: see `pyro_genmodels.utils.distributions.unwrap`.

    Example:
        >>> import pyro.distributions as dist
        >>> normal = capabilities(dist.Normal(0.0, 1.0))
        >>> normal.has_velocity, normal.training_log_prob(torch.tensor(0.0))
        (False, tensor(-0.9189))
    """
    return dist if isinstance(dist, Capabilities) else _Defaults(dist)
