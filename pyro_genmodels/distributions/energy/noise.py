r"""Noise-conditional energies: :math:`p_\sigma`, the density of the data with normal noise of deviation :math:`\sigma` added.

A standard normal that is tilted becomes :math:`N(0, (1 + \sigma^2) I)` at the noise level :math:`\sigma`. The network f then
sees positions in units of its deviation, and its output is scaled as scores are:

.. math:: E(u, \sigma) = \frac1\sigma f\bigl(u / \sqrt{1 + \sigma^2}, \log \sigma\bigr)
    - \frac{\sigma^2}{1 + \sigma^2} \frac{|u|^2}{2} .

Song and Ermon, *Improved Techniques for Training Score-Based Generative Models* (arXiv 2006.09011).
"""

from __future__ import annotations

__all__ = ["NoiseConditionalEnergy"]

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseConditionalEnergy:
    """An energy of positions and a context at a noise level.

    Attributes:
        energy: (u, context) -> energies (n,), where the context ends with log sigma.
        level: sigma used if the context does not end with log sigma.
        level_in_context: True if the context ends with log sigma already.
        tilts_normal: True if a standard normal is tilted, as above.
    """

    energy: Callable[..., Tensor]
    level: float
    level_in_context: bool = False
    tilts_normal: bool = False

    def __call__(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.level_in_context:
            level = u.new_full((len(u), 1), log(self.level))
            context = level if context is None else torch.cat([context, level], -1)
        if not self.tilts_normal:
            return self.energy(u, context)
        variance = (2 * context[:, -1]).exp()  # type: ignore[index]
        deviation = (1 + variance).sqrt()
        energies = self.energy(u / deviation.reshape(-1, *(1 for _ in u.shape[1:])), context)
        square = u.square().reshape(len(u), -1).sum(-1)
        return energies.reshape(-1) / variance.sqrt() - 0.5 * square * variance / (1 + variance)
