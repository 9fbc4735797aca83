r"""Which modes of a mixture a model's draws reach, and how many of the draws are good ones.

A draw is of high quality within so many deviations of a mode's centre; a mode is covered by one such draw. With
:math:`\hat q_k` the share of good draws nearest to mode k of K, all as likely,

.. math:: \mathrm{KL}(\hat q \| u) = \sum_k \hat q_k \log (K \hat q_k)

is zero where all modes get their share. The protocol is that of Lin et al., *PacGAN* (arXiv 1712.04086), who call the last the
reverse KL divergence.
"""

from __future__ import annotations

__all__ = ["ModeCoverage", "mode_coverage"]

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from pyro_genmodels.divergences.samples import as_matrices


@dataclass(frozen=True)
class ModeCoverage:
    """What draws reach.

    Attributes:
        counts: good draws of each mode, (K,).
        num_draws: of all.
    """

    counts: Tensor
    num_draws: int

    @property
    def covered(self) -> int:
        """Modes with a good draw."""
        return int((self.counts > 0).sum())

    @property
    def high_quality(self) -> float:
        """Share of good draws."""
        return self.counts.sum().item() / self.num_draws

    @property
    def reverse_kl(self) -> float:
        """Nats from the share of each mode, of good draws, to equal ones; NaN where no draw is good."""
        share = self.counts / self.counts.sum()
        return (torch.special.xlogy(share, share).sum() + log(len(share))).item()

    def __str__(self) -> str:
        return f"{self.covered} of {len(self.counts)} modes, {self.high_quality:.1%} of high quality (n={self.num_draws})"


def mode_coverage(draws: Tensor, centres: Tensor, scale: float, *, within: float = 3.0) -> ModeCoverage:
    """Modes that draws reach, and the share of draws that are near one.

    Args:
        draws: (n, d); the protocol's n is 2,500.
        centres: of the modes, (K, d).
        scale: their deviation in each direction.
        within: deviations from its centre up to which a draw is good.

    Raises:
        ValueError: for draws and centres of different dimensions, and a scale that is not positive.

    Example:
        >>> draws = torch.tensor([[0.0, 0.1], [5.0, 5.0], [9.0, 9.0]])
        >>> found = mode_coverage(draws, torch.tensor([[0.0, 0.0], [5.0, 5.0]]), 0.1)
        >>> found.covered, round(found.high_quality, 2)
        (2, 0.67)
    """
    draws, centres = as_matrices(draws.detach(), centres, by="mode_coverage", least=1)
    if not (scale > 0 and within > 0):
        raise ValueError(f"mode_coverage wants a positive scale and within, but found {scale!r} and {within!r}.")
    distance, nearest = torch.cdist(draws, centres).min(1)
    return ModeCoverage(torch.bincount(nearest[distance < within * scale], minlength=len(centres)), len(draws))
