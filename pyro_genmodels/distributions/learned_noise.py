r"""Noise on (0, 1) that depends on an integer, for variational dequantisation.

A flow f given the integers x maps logistic noise to the noise that is added to them:

.. math::

    e \sim \operatorname{Logistic}(0, 1)^d, \qquad u = \sigma(f(e \mid x)), \qquad
    \log q(u \mid x) = \sum_i \log \sigma'(e_i) - \log |\det \partial f / \partial e| - \sum_i \log \sigma'(f_i) .

Where f is the identity, u is uniform. One pass in the direction of densities gives both u and log q, for every flow. Splines
are the identity far out, so that q is positive at both ends of (0, 1) and importance weights p / q are bounded. Under affine
functions q vanishes there. Ho et al., *Flow++* (arXiv 1902.00275).
"""

from __future__ import annotations

__all__ = ["LearnedNoise"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Size, Tensor
from torch.distributions import Transform

from pyro_genmodels.distributions.flow import call_with_log_det


@dataclass(frozen=True)
class LearnedNoise:
    """Noise between an integer and the next, from a flow that is given the integer.

    Attributes:
        transform: function from what it is given, (batch..., d + c), to a bijection of vectors (batch..., d), such as a lazy
            transform. It is given the middle of the integer's cell, then the context.
        event_shape: shape of one datum, with d coordinates in all.
        pretransform: bijection from the data to the space that the transform is given; None for the identity.
        context: context (batch..., c), or None.
        dtype: dtype of the transform; None is that of the integers and the pretransform.

    Example:
        >>> import pyro.distributions as dist
        >>> from torch.distributions import AffineTransform
        >>> noise = LearnedNoise(lambda given: AffineTransform(0.0, 1.0, event_dim=1), Size([3]))  # the identity: uniform noise
        >>> u, log_q = noise(torch.tensor([0.0, 2.0, 5.0]))
        >>> ((0 < u) & (u < 1)).all(), log_q
        (tensor(True), tensor(0.))
    """

    transform: Callable[[Tensor], Transform]
    event_shape: Size
    pretransform: Transform | None = None
    context: Tensor | None = None
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise of the shape of x and its log density (nats), (batch...).

        Args:
            x: integers as floats, (batch..., *event_shape).
        """
        batch, d = x.shape[: x.dim() - len(self.event_shape)], self.event_shape.numel()
        middle = x + 0.5
        given = (middle if self.pretransform is None else self.pretransform(middle)).reshape(*batch, d).to(self.dtype)
        limits = torch.finfo(given.dtype)
        e = torch.rand_like(given).logit(eps=limits.eps)
        if self.context is not None:
            given = torch.cat((given, self.context.expand(*batch, self.context.shape[-1])), -1)
        v, log_det = call_with_log_det(self.transform(given), e)
        u = v.sigmoid().clamp(limits.tiny, 1 - limits.eps)  # rounding may make it 0 or 1
        return u.reshape(x.shape), (_log_slope(e) - _log_slope(v)).sum(-1) - log_det


def _log_slope(v: Tensor) -> Tensor:
    """Return the log of the derivative of the logistic function, which is the log density of the logistic distribution."""
    return F.logsigmoid(v) + F.logsigmoid(-v)
