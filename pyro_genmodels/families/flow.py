r"""Normalizing flows: an invertible network between the data and a simple base distribution.

.. math:: \log p(x \mid c) = \log p_u(f(x \mid c)) + \log |\det \partial f / \partial x|

Trained by `MaximumLikelihood`. Papamakarios et al. (arXiv 1912.02762).
"""

from __future__ import annotations

__all__ = ["Flow"]

from collections.abc import Sequence

from torch import Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Standardize, StandardizeContext
from pyro_genmodels.nn.transforms import NSF, FlowTransform, flow_options, lazy_transform
from pyro_genmodels.utils.distributions import is_real
from pyro_genmodels.utils.errors import check_choice


class Flow(ContinuousFamily):
    """A normalizing flow.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        transform: choice of layers such as ``NSF(transforms=5)``, ``RealNVP()`` or ``MAF()``; or your own zuko flow or lazy
            transform over the flattened event. `NSF` by default.
        support: set in which one coordinate lies. ``constraints.interval(0.0, 1.0)``, for example, puts a logit before the
            transform.
        levels: number K of levels, for data that are integers 0 .. K - 1. The flow is then a `Dequantized` density on [0, K].
        standardize: see `Family`; ignored for `NCSF`, whose angles have no scale.
        standardize_context: see `Family`.
        name: see `Family`.

    Raises:
        TypeError: if `transform` is neither a choice nor a module.
        ValueError: if options do not go together.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow, NSF
        >>> flow = Flow((3,), context=2, transform=NSF(transforms=2))
        >>> flow(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        context: Context = 0,
        transform: FlowTransform | nn.Module | None = None,
        support: constraints.Constraint = constraints.real,
        levels: int | None = None,
        standardize: Standardize = True,
        standardize_context: StandardizeContext = True,
        name: str | None = None,
    ) -> None:
        transform = check_choice("Flow", "transform", transform, NSF(), FlowTransform | nn.Module)
        choice = transform if isinstance(transform, FlowTransform) else FlowTransform  # for your own module the defaults
        bounded = not is_real(choice.support)
        if bounded and not (is_real(support) and levels is None):
            raise ValueError(f"{type(transform).__name__} has the support {choice.support}: leave out support and levels.")
        standardize = False if bounded else standardize
        super().__init__(
            event_shape,
            context=context,
            support=support,
            levels=levels,
            standardize=standardize,
            standardize_context=standardize_context,
            name=name,
        )
        if isinstance(transform, FlowTransform):
            transform = transform.build(self.event_shape.numel(), self.context_size)
        self.transform = lazy_transform(transform)
        self._options = flow_options(self.transform)
        self._base, self._bounds = choice.base, choice.support if bounded else None

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        flow = NormalizingFlow(
            self.transform,
            self._base(self.loc),
            self.event_shape,
            context=self.embed(context),
            support=self._continuous_support,
            pretransform=self.pretransform,
            **self._options,
        )
        return self._over_data(flow)

    @property
    def _continuous_support(self) -> constraints.Constraint:
        return self.support if self._bounds is None else self._bounds
