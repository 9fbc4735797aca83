r"""Normalizing flows: :math:`x = f^{-1}(u \mid c)` with :math:`u` from a simple base distribution.

.. math:: \log p(x \mid c) = \log p_u(f(x \mid c)) + \log |\det \partial f / \partial x|

Papamakarios et al., *Normalizing Flows for Probabilistic Modeling and Inference* (arXiv 1912.02762).
"""

from __future__ import annotations

__all__ = ["NormalizingFlow", "call_with_log_det"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import Independent
from torch import Size, Tensor
from torch.distributions import ComposeTransform, Distribution, Transform

from pyro_genmodels.distributions.base import GenerativeDistribution
from pyro_genmodels.distributions.capabilities import ScoreJumps
from pyro_genmodels.utils.capture import can_be_read
from pyro_genmodels.utils.errors import warn_caller

MAX_INVERSE_ERROR = 1e-3
"""Largest error of a numerical inverse in units of the base, where its coordinates are of order 1."""
MAX_REDRAWS = 20
"""Number of times that samples without an inverse are drawn anew."""


class NormalizingFlow(GenerativeDistribution):
    """The distribution of a base distribution's samples, mapped by the inverse of a bijection.

    Args:
        transform: function context (batch..., c) or None -> bijection of vectors, from the data to the base.
        base: univariate distribution of the base's coordinates, of batch shape () or (d,).
        event_shape: shape of one datum, with d coordinates in all.
        numerical_inverse: True if the inverse is a search, so that each sample is mapped back to the base and compared. In a
            captured graph and under `torch.func`, where values cannot be looked at, samples are not compared.
        smooth: True if the score is continuous. It is not for splines and for networks with ReLU.
        kwargs: further arguments of `GenerativeDistribution`.

    Raises:
        ValueError: if the transform's domain is not vectors, or if samples are drawn while dropout is active.
        FloatingPointError: if a numerical inverse does not find samples.

    Warns:
        RuntimeWarning: if some samples of the base have no inverse and were drawn anew.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> double = lambda context: dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
        >>> NormalizingFlow(double, dist.Normal(0.0, 1.0), (3,)).log_prob(torch.zeros(3))
        tensor(-0.6774)
    """

    has_rsample = True

    def __init__(
        self,
        transform: Callable[[Tensor | None], Transform],
        base: Distribution,
        event_shape: Sequence[int],
        *,
        numerical_inverse: bool = False,
        smooth: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(event_shape, **kwargs)
        self.transform = self.network = transform
        self.base = base
        self.numerical_inverse = numerical_inverse
        if not smooth:
            self.score_jumps = ScoreJumps("of splines or ReLU", "MaximumLikelihood()")

    def base_and_transform(self) -> tuple[Distribution, Transform]:
        """Return the distribution of the base's vectors, (d,), and the transform from these to the data.

        Raises:
            NotImplementedError: if the data are no vectors.
        """
        if len(self.event_shape) != 1:
            raise NotImplementedError(f"The data of this flow are of shape {tuple(self.event_shape)}, and no vectors.")
        to_data = [self.transform(self.context).inv] + ([] if self.pretransform is None else [self.pretransform.inv])
        base = self.base.expand(self.event_shape)
        return Independent(base, 1), to_data[0] if len(to_data) == 1 else ComposeTransform(to_data)

    def _log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        u, log_det = call_with_log_det(self.transform(context), self.flat(y))
        return self.base.log_prob(u).sum(-1) + log_det

    def _draw(self, shape: Size, context: Tensor | None) -> Tensor:
        y, u = self._inverted(shape, context)
        if self.numerical_inverse and can_be_read(y):
            y = self._redrawn(y, self._lost(y, u, context), context)
        return self.unflat(y)

    def _inverted(self, shape: Size, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return samples as vectors, (*shape, d), and the samples of the base that they stand for."""
        base = self.base.expand((*shape, self.event_shape.numel()))
        u = base.rsample() if base.has_rsample else base.sample()
        return self.transform(context).inv(u), u

    def _lost(self, y: Tensor, u: Tensor, context: Tensor | None) -> Tensor:
        """Return True for each vector y (*shape, d) that the transform does not map to u: (*shape)."""
        return ~_leads_back(self.transform(context), y.detach(), u.detach())

    def _redrawn(self, y: Tensor, lost: Tensor, context: Tensor | None) -> Tensor:
        """Return samples (*shape, d) of which those that are lost are replaced by new ones, with a warning."""
        if not lost.any():
            return y
        how_many = f"{int(lost.sum())} of {lost.numel()} samples of the base have no inverse"
        advice = "The layers of this flow do not reach them, and its density lacks their mass: use NSF() or MAF()."
        for _ in range(MAX_REDRAWS):
            rows = None if context is None else context[lost]
            again, u = self._inverted(Size([int(lost.sum())]), rows)
            y, lost = y.masked_scatter(lost.unsqueeze(-1), again), lost.masked_scatter(lost, self._lost(again, u, rows))
            if not lost.any():
                warn_caller(f"{how_many} and were drawn anew. {advice}")
                return y
        raise FloatingPointError(f"{how_many}, and neither have {int(lost.sum())} that replaced them. {advice}")


def _leads_back(transform: Transform, y: Tensor, u: Tensor) -> Tensor:
    """Return True for each vector y (..., d) that the transform maps to u, as far as the spacing of floats allows."""
    with torch.no_grad():
        error = (transform(y) - u).abs()
        tolerance = MAX_INVERSE_ERROR * (1 + u.abs())
        found = (error <= tolerance).all(-1)
        if not found.all():  # one float further, a steep transform may be far away
            step = 16 * torch.finfo(y.dtype).eps * (1 + y.abs())
            spacing = (transform(y + step) - transform(y - step)).abs()
            found = (error <= torch.maximum(tolerance, spacing)).all(-1)
        return found


def call_with_log_det(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image of vectors y (..., d) and the log determinant of the Jacobian (...), in one pass where there is one."""
    if transform.domain.event_dim != 1:
        raise ValueError(
            f"A flow wants a transform with one event dimension, but found {transform.domain.event_dim}: {transform}. Wrap it "
            "in torch.distributions.IndependentTransform."
        )
    if hasattr(transform, "call_and_ladj"):  # zuko computes both in one pass of the network
        return transform.call_and_ladj(y)
    u = transform(y)
    return u, transform.log_abs_det_jacobian(y, u)
