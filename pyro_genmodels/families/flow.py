r"""Normalizing flows as a family: an invertible network between the data and a simple base distribution.

.. math:: \log p(x \mid c) = \log p_u(f(x \mid c)) + \log |\det \partial f / \partial x|

Trained by `MaximumLikelihood`. Papamakarios et al. (arXiv 1912.02762).
"""

from __future__ import annotations

__all__ = ["Flow"]

from collections.abc import Sequence
from math import pi

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.flow import NormalizingFlow
from pyro_genmodels.families.context import Context
from pyro_genmodels.families.continuous import ContinuousFamily
from pyro_genmodels.families.family import Standardize
from pyro_genmodels.nn.transforms import NCSF, NSF, FlowTransform, adopt
from pyro_genmodels.utils.distributions import is_real


class Flow(ContinuousFamily):
    """A normalizing flow.

    Args:
        event_shape: shape of one datum.
        context: see `Family`.
        transform: a choice such as ``NSF(transforms=5)``, ``RealNVP()``, ``MAF()``, or a zuko flow or lazy transform of your
            own over the flattened event.
        support: where one coordinate lies, say ``constraints.interval(0.0, 1.0)``, which puts a logit before the transform.
        levels: with K given, data are integers 0 .. K - 1, and the flow is a `Dequantized` density on [0, K].
        standardize: see `Family`; not with `NCSF`, whose angles have no scale.
        name: see `Family`.

    Raises:
        ValueError: on options that do not go together.

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
        name: str | None = None,
    ) -> None:
        transform = NSF() if transform is None else transform
        circular = isinstance(transform, NCSF)
        if circular and not (is_real(support) and levels is None):
            raise ValueError("NCSF models angles in [-pi, pi): give neither support nor levels with it.")
        standardize = False if circular else standardize
        super().__init__(event_shape, context=context, support=support, levels=levels, standardize=standardize, name=name)
        self.circular = circular
        self.transform, self.inverse = adopt(_build(transform, self.event_shape.numel(), self.context_size))

    def forward(self, context: Tensor | None = None) -> GenerativeDistribution:
        zero, one = self.loc.new_zeros(()), self.loc.new_ones(())
        base = dist.Uniform(-pi * one, pi * one, validate_args=False) if self.circular else dist.Normal(zero, one)
        flow = NormalizingFlow(
            self.transform,
            base,
            self.event_shape,
            context=self.embed(context),
            support=self._continuous_support,
            pretransform=self.pretransform,
            **self.inverse,
        )
        return self._of_data(flow)

    @property
    def _continuous_support(self) -> constraints.Constraint:
        return NCSF.support if self.circular else self.support


def _build(transform: FlowTransform | nn.Module, features: int, context: int) -> nn.Module:
    if isinstance(transform, FlowTransform):
        return transform.build(features, context)
    if isinstance(transform, nn.Module):
        return transform
    raise TypeError(
        f"Flow wants a transform such as NSF(transforms=5), or a zuko flow, but found {type(transform).__name__}."
        + (" Call it: transform=NSF()." if isinstance(transform, type) else "")
    )
