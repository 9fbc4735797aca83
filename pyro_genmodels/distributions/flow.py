r"""Normalizing flows: :math:`x = f^{-1}(u \mid c)` with :math:`u` from a simple base distribution.

.. math:: \log p(x \mid c) = \log p_u(f(x \mid c)) + \log |\det \partial f / \partial x|

Papamakarios et al., *Normalizing Flows for Probabilistic Modeling and Inference* (arXiv 1912.02762).
"""

from __future__ import annotations

__all__ = ["NormalizingFlow"]

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Size, Tensor
from torch.distributions import Distribution, Transform

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import ScoreJumps


class NormalizingFlow(GenerativeDistribution):
    """The distribution of a base distribution's samples, mapped by the inverse of a bijection.

    Args:
        transform: function context (batch..., c) or None -> bijection of vectors, from the data to the base.
        base: univariate distribution of the base's coordinates, of batch shape () or (d,).
        event_shape: shape of one datum, with d coordinates in all.
        has_rsample: True if the inverse carries the gradient of the transform's parameters.
        bound: largest distance from 0 at which a numerical inverse searches, or None for an analytic inverse.
        smooth: True if the score is continuous. It is not for splines and for networks with ReLU.
        kwargs: further arguments of `GenerativeDistribution`.

    Raises:
        ValueError: if the transform's domain is not vectors, or if samples are drawn while dropout is active.

    Warns:
        RuntimeWarning: if a sample lies at the bound of the numerical inverse.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> double = lambda context: dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
        >>> NormalizingFlow(double, dist.Normal(0.0, 1.0), (3,)).log_prob(torch.zeros(3))
        tensor(-0.6774)
    """

    def __init__(
        self,
        transform: Callable[[Tensor | None], Transform],
        base: Distribution,
        event_shape: Sequence[int],
        *,
        has_rsample: bool = True,
        bound: float | None = None,
        smooth: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, **kwargs)
        self.transform = self.network = transform
        self.base = base
        self.has_rsample, self.bound = has_rsample, bound
        if not smooth:
            self.score_jumps = ScoreJumps("of splines or ReLU", "MaximumLikelihood()")

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        u, log_det = _call_with_log_det(self.transform(context), self.flat(y))
        return self.base.log_prob(u).sum(-1) + log_det

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        base = self.base.expand((*shape, self.event_shape.numel()))
        u = base.rsample() if base.has_rsample else base.sample()
        y = self.transform(context).inv(u)
        if self._validate_args and self.bound is not None and (y.abs() > 0.999 * self.bound).any():
            warnings.warn(
                f"A sample lies at the bound of this flow's numerical inverse, {self.bound:g} from 0, so its density may be "
                "wrong. Use NSF() or MAF(), especially for guides.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.unflat(y)


def _call_with_log_det(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    if transform.domain.event_dim != 1:
        raise ValueError(
            f"A flow wants a transform with one event dimension, but found {transform.domain.event_dim}: {transform}. Wrap it "
            "in torch.distributions.IndependentTransform."
        )
    if hasattr(transform, "call_and_ladj"):  # zuko computes both in one pass of the network
        return transform.call_and_ladj(y)
    u = transform(y)
    return u, transform.log_abs_det_jacobian(y, u)
