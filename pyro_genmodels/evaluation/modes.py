r"""Modes of a mixture that a model's samples cover, and the share of samples that are close to a mode.

A sample has high quality if it lies within three standard deviations of the centre of a mode. A mode is covered if at least one
such sample is nearest to it. With :math:`\hat q_k` the share of high-quality samples nearest to mode k, of K equally likely
modes,

.. math:: \mathrm{KL}(\hat q \| u) = \sum_k \hat q_k \log (K \hat q_k)

is zero if all modes have equal shares. The protocol is that of Lin et al., *PacGAN* (arXiv 1712.04086), who call this the
reverse KL divergence.
"""

from __future__ import annotations

__all__ = ["ModeCoverage", "mode_coverage"]

from dataclasses import dataclass
from math import inf, log

import torch
from torch import Tensor

from pyro_genmodels.divergences.samples import Samples, as_matrices
from pyro_genmodels.utils.distances import distances


@dataclass(frozen=True)
class ModeCoverage:
    """Number of high-quality samples of each mode.

    Attributes:
        counts: number of high-quality samples nearest to each mode, (K,).
        num_samples: number of all samples.
    """

    counts: Tensor
    num_samples: int

    @property
    def covered(self) -> int:
        """Number of modes with at least one high-quality sample."""
        return int((self.counts > 0).sum())

    @property
    def high_quality(self) -> float:
        """Share of high-quality samples among all."""
        return self.counts.sum().item() / self.num_samples

    @property
    def reverse_kl(self) -> float:
        """Divergence in nats of the modes' shares from equal shares; NaN if no sample has high quality."""
        share = self.counts / self.counts.sum()
        return (torch.special.xlogy(share, share).sum() + log(len(share))).item()

    def __str__(self) -> str:
        return f"{self.covered} of {len(self.counts)} modes, {self.high_quality:.1%} of high quality (n={self.num_samples})"


def mode_coverage(samples: Samples, centres: Samples, scale: float, *, max_deviations: float = 3.0) -> ModeCoverage:
    """Count the high-quality samples of each mode of a mixture.

    Args:
        samples: samples of a model, (n, d); the protocol's n is 2,500.
        centres: centres of the modes, (K, d).
        scale: standard deviation of the modes in each direction.
        max_deviations: largest distance of a high-quality sample from a centre, in standard deviations.

    Raises:
        ValueError: for samples and centres of different dimensions, with NaN or infinity, and for a scale or max_deviations
            that is not positive and finite.

    Example:
        >>> samples = torch.tensor([[0.0, 0.1], [5.0, 5.0], [9.0, 9.0]])
        >>> found = mode_coverage(samples, torch.tensor([[0.0, 0.0], [5.0, 5.0]]), 0.1)
        >>> found.covered, round(found.high_quality, 2)
        (2, 0.67)
    """
    samples, centres, _ = as_matrices(samples, centres, by="mode_coverage", least=1, names=("samples", "centres"))
    if not (0 < scale < inf and 0 < max_deviations < inf):
        raise ValueError(
            f"mode_coverage wants a finite, positive scale and max_deviations, but found {scale!r} and {max_deviations!r}."
        )
    distance, nearest = distances(samples.detach(), centres.detach()).min(1)
    counts = torch.bincount(nearest[distance < max_deviations * scale], minlength=len(centres))
    return ModeCoverage(counts, len(samples))
