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
    """The distribution of a bijection's preimage of a base distribution.

    Args:
        transform: context (batch..., c) or None -> bijection of vectors, from the data side to the base.
        base: univariate distribution of the base's coordinates, of batch shape () or (d,).
        event_shape: shape of one datum, of d coordinates in all.
        has_rsample: whether the inverse carries the gradient of the transform's parameters.
        bound: where the inverse is a search, how far from 0 it looks; None if it is not.
        smooth: whether the score has no jumps, as that of splines and of networks with ReLU has.
        kwargs: passed to `GenerativeDistribution`.

    Raises:
        ValueError: if the transform's domain is not vectors; on drawing while the network drops units at random, since each
            pass would invert another function. On a draw at the end of the inverse's search it warns.

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
                f"A draw lies at the end of this flow's search for the inverse, {self.bound:g} from 0, and may have another "
                "density than it should. Use NSF() or MAF(), above all for guides.",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.unflat(y)


def _call_with_log_det(transform: Transform, y: Tensor) -> tuple[Tensor, Tensor]:
    if transform.domain.event_dim != 1:
        raise ValueError(
            f"A flow wants a transform of vectors, with one event dimension, but this one has "
            f"{transform.domain.event_dim}: {transform}. "
            "Wrap it in torch.distributions.IndependentTransform."
        )
    if hasattr(transform, "call_and_ladj"):  # zuko's: both from one pass of the network
        return transform.call_and_ladj(y)
    u = transform(y)
    return u, transform.log_abs_det_jacobian(y, u)
