r"""Energies that are told the level of noise: :math:`p_\sigma`, the data with normal noise of deviation :math:`\sigma` added.

Where a standard normal is tilted, it is :math:`N(0, (1 + \sigma^2) I)` at noise :math:`\sigma`, and the energy is asked in
these units and in the size that scores have there:

.. math:: E(u, \sigma) = \frac1\sigma f\bigl(u / \sqrt{1 + \sigma^2}, \log \sigma\bigr)
    - \frac{\sigma^2}{1 + \sigma^2} \frac{|u|^2}{2} .

Song and Ermon, *Improved Techniques for Training Score-Based Generative Models* (arXiv 2006.09011).
"""

from __future__ import annotations

__all__ = ["Noisy"]

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noisy:
    """An energy of positions and a context, at a level of noise.

    Attributes:
        energy: (u, context) -> energies (n,), whose context ends with log sigma.
        level: sigma, where the context does not tell.
        told: whether the context ends with log sigma already.
        scaled: whether a standard normal is tilted, as above.
    """

    energy: Callable[..., Tensor]
    level: float
    told: bool = False
    scaled: bool = False

    def __call__(self, u: Tensor, context: Tensor | None = None) -> Tensor:
        if not self.told:
            level = u.new_full((len(u), 1), log(self.level))
            context = level if context is None else torch.cat([context, level], -1)
        if not self.scaled:
            return self.energy(u, context)
        variance = (2 * context[:, -1]).exp()  # type: ignore[index]
        wide = (1 + variance).sqrt()
        energies = self.energy(u / wide.reshape(-1, *(1 for _ in u.shape[1:])), context)
        square = u.square().reshape(len(u), -1).sum(-1)
        return energies.reshape(-1) / variance.sqrt() - 0.5 * square * variance / (1 + variance)
