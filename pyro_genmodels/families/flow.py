r"""Normalizing flows: an invertible network between the data and a simple base distribution.

.. math:: \log p(x \mid c) = \log p_u(f(x \mid c)) + \log |\det \partial f / \partial x|

Trained by `MaximumLikelihood`. Papamakarios et al. (arXiv 1912.02762).
"""

from __future__ import annotations

__all__ = ["Flow"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.distributions.learned_noise import LearnedNoise
from pyro_genmodels.families.angles import angles_of, from_mean_direction, on_lines
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.families.validation import check_constructor
from pyro_genmodels.nn.circular_splines import CircularBase
from pyro_genmodels.nn.transforms import NSF, FlowChoice, RealNVP
from pyro_genmodels.nn.zuko_layers import flow_options, lazy_transform
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import check_choice


class Flow(ContinuousFamily):
    """A normalizing flow.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        transform: choice of layers such as ``NSF(transforms=5)``, ``RealNVP()`` or ``MAF()``, for images ``Glow(levels=2)``; or
            your own zuko flow or lazy transform over the flattened event. `NSF` by default.
        support: set in which one coordinate lies. ``constraints.interval(0.0, 1.0)``, for example, puts a logit before the
            transform. `circular` is the set of angles, and wants splines (`NSF`) or a module of your own that maps angles to
            angles; the density is continuous where the ends of the circle meet. ``constraints.stack([circular,
            constraints.real, constraints.positive], dim=-1)`` has one set for each column.
        levels: number K of levels, for data that are integers 0 .. K - 1. The distribution is then `Dequantized`, over a flow
            on (0, K), so that probabilities sum to 1.
        dequantization: choice of the layers that transform the noise which is added to integers, given these: variational
            dequantisation, whose bound is tighter. Splines, such as `NSF`, have bounded importance weights; affine layers,
            such as `RealNVP`, do not. None adds uniform noise.
        standardize: see `Family`; by default "jointly" for `Glow` and True otherwise. Angles, which have no scale, are left as
            they are.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `transform` is neither a choice nor a module, or `dequantization` is no choice.
        ValueError: if options do not go together.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow, NSF
        >>> flow = Flow((3,), context=2, transform=NSF(transforms=2))
        >>> flow(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])

        An angle, a real number and a share of 1, each given the others:

        >>> from torch.distributions import constraints
        >>> from pyro_genmodels.families import circular
        >>> support = constraints.stack([circular, constraints.real, constraints.interval(0.0, 1.0)], dim=-1)
        >>> support.check(Flow((3,), support=support)().sample((100,))).all()
        tensor(True)
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        transform: FlowChoice | nn.Module | None = None,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        dequantization: FlowChoice | None = None,
        standardize: Standardize | None = None,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        transform = check_choice("Flow", "transform", transform, NSF(), FlowChoice | nn.Module)
        choice = transform if isinstance(transform, FlowChoice) else FlowChoice  # for your own module the defaults
        support = _support_of(choice, event_shape, support, levels)
        angles = angles_of(support, event_shape)
        if dequantization is not None:
            check_choice("Flow", "dequantization", dequantization, RealNVP(), FlowChoice)
            _check_noise(dequantization, levels)
        standardize = choice.standardize if standardize is None else standardize
        if angles is not None:
            standardize = _without_angles(standardize, angles)
        super().__init__(
            event_shape,
            context=context,
            support=on_lines(support),
            levels=levels,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        self.register_buffer("angles", angles, persistent=False)
        if isinstance(transform, FlowChoice):
            if angles is None:
                transform = transform.build_for(self.event_shape, self.context_size)
            else:
                transform = transform.build_circular(angles.flatten().tolist(), self.context_size)
        self.transform = lazy_transform(transform)
        self._options = flow_options(self.transform)
        self._base, self._with_circles = choice.base, None if angles is None else support
        self.noise_transform: nn.Module | None = None
        if dequantization is not None:
            noise_transform = dequantization.build_for(self.event_shape, self.context_size, given_event=True)
            self.noise_transform = lazy_transform(noise_transform)

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        context, pretransform = self.embed(context), self.pretransform
        flow = NormalizingFlow(
            self.transform,
            self._base(self.loc) if self.angles is None else CircularBase(self.angles.flatten(), self.loc),
            self.event_shape,
            context=context,
            support=self._continuous_support,
            pretransform=pretransform,
            **self._options,
        )
        return self._over_data(flow, self._noise(pretransform, context))

    def _noise(self, pretransform: Transform | None, context: Tensor | None) -> LearnedNoise | None:
        """Return the noise of integers, given the map of the data to the flow's space and an embedded context."""
        if self.noise_transform is None:
            return None
        return LearnedNoise(self.noise_transform, self.event_shape, pretransform, context, self.loc.dtype)

    @property
    def _continuous_support(self) -> constraints.Constraint:
        return self.support if self._with_circles is None else self._with_circles

    def _units_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.angles is None:
            return super()._units_of(x)
        centred = torch.where(self.angles, from_mean_direction(x), x)  # so that the cut of a circle makes no outliers
        loc, scale = super()._units_of(centred)
        return torch.where(self.angles, 0.0, loc), torch.where(self.angles, 1.0, scale)


def _support_of(
    choice: Any, event_shape: Sequence[int], support: constraints.Constraint, levels: int | None
) -> constraints.Constraint:
    """Return the set in which one coordinate lies, or `ByColumn`, given layers that may be for angles alone.

    Raises:
        ValueError: if the layers are for angles, and others are wanted, or if integers are to be angles.
    """
    support = check_constructor("Flow", event_shape, support, angles=True)
    has_angles = angles_of(support, event_shape) is not None
    if levels is not None and has_angles:
        raise ValueError(f"levels={levels} models integers, but found support={support}: leave out one of them.")
    if is_real(choice.support) or has_angles:
        return support
    if not is_real(support) or levels is not None:
        raise ValueError(f"{type(choice).__name__} has the support {choice.support}: leave out support and levels.")
    return choice.support


def _without_angles(standardize: Standardize, angles: Tensor) -> Standardize:
    """Return how coordinates are standardised of which some are angles.

    Raises:
        ValueError: if they shall have one unit.
    """
    if angles.all():
        return False
    if "jointly" in str(standardize):
        raise ValueError(f"standardize={standardize!r} wants coordinates of one kind, but some are angles. Use True or False.")
    return standardize


def _check_noise(dequantization: FlowChoice, levels: int | None) -> None:
    """Raise a ValueError unless the layers can transform noise, and there are integers to add it to."""
    if levels is None:
        raise ValueError("dequantization transforms the noise that is added to integers: give levels=K, or leave it out.")
    if not is_real(dequantization.support):
        raise ValueError(
            f"Flow wants layers over all real numbers as dequantization, but {type(dequantization).__name__} has the support "
            f"{dequantization.support}. Use RealNVP() or NSF()."
        )
