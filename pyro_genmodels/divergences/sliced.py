r"""The sliced Wasserstein distance between two sets of draws: optimal transport along lines, where it is a matter of sorting.

.. math:: SW_p^p(x, y) = \mathbb{E}_{\theta} \int_0^1 \bigl|F_{\theta^\top x}^{-1}(u) - F_{\theta^\top y}^{-1}(u)\bigr|^p du,
    \qquad \theta \text{ uniform on the unit sphere of } \mathbb{R}^d,

with :math:`F^{-1}` the quantiles of the draws as they lie along :math:`\theta`. A shift of all draws by v is at a distance of
:math:`|v| / \sqrt{d}` for p = 2. Two sets drawn from one law are at a distance too, which falls with their sizes.

Rabin et al., *Wasserstein Barycenter and Its Application to Texture Mixing* (2011); Bonneel et al., *Sliced and Radon
Wasserstein Barycenters of Measures* (2015). Computed by POT (JMLR 2021).
"""

from __future__ import annotations

__all__ = ["sliced_wasserstein"]

from math import isfinite

import torch
from torch import Tensor

from pyro_genmodels.divergences.kullback_leibler import Divergence
from pyro_genmodels.divergences.samples import as_matrices
from pyro_genmodels.utils.errors import import_extra

_BLOCK = 2**22  # numbers that are sorted at once


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, num_projections: int = 1000, p: float = 2.0, seed: int | None = None
) -> Divergence:
    """The sliced Wasserstein distance of order p between two sets of draws, in the units of the data.

    It is the distance of the draws, not of the laws they come from, and as an estimate of that it is too high: for one law it
    falls to zero with the number of draws, but is not zero. This *floor* is the distance of real draws from other real draws,
    ``sliced_wasserstein(real, more_real, seed=1)``; it is to be read beside the distance of a model's draws, with as many rows
    on each side, and the same seed.

    Args:
        x: draws, (n, ...). The first dimension counts them, all others are the event, which is flattened to d numbers.
        y: draws of events of the same shape, (m, ...); n and m may differ.
        num_projections: directions, at least 2; of events of one number there is only one, whatever is asked for.
        p: the order, at least 1.
        seed: of the directions, the same then in every call, on every device and in every dtype: for comparisons. None draws
            new ones from torch's global generator: for training.

    Returns:
        Value and standard error, scalars of the draws' dtype (at least single precision) and device. The value carries
        gradients to x and y, which are zero where the distance is. The error is that of the mean over directions, by the
        delta method, as if the draws were all there is: it does not cover their own chance. It is 0 for d = 1, where no
        direction is drawn.

    Raises:
        ValueError: for events of different shapes, two devices, fewer than 2 draws or directions, draws with NaN or infinity,
            and orders below 1.
        ImportError: without POT, of the extra ``eval``.

    Example:
        >>> x = torch.randn(100, 2)
        >>> value, std_error = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), seed=1)
        >>> abs(value - 5 / 2**0.5) < 5 * std_error
        tensor(True)
    """
    x, y = as_matrices(x, y, by="sliced_wasserstein")
    if num_projections < 2:
        raise ValueError(f"sliced_wasserstein wants at least 2 directions for an error bar, got {num_projections=}.")
    if not (p >= 1 and isfinite(p)):
        raise ValueError(f"sliced_wasserstein wants an order p of at least 1, and finite, got {p=}.")
    ot = import_extra("ot", extra="eval", by="sliced_wasserstein")
    lines = directions(num_projections, x.shape[1], seed).to(x)
    blocks = lines.split(max(1, _BLOCK // (len(x) + len(y))))
    costs = torch.cat([ot.wasserstein_1d(x @ block.T, y @ block.T, p=p) for block in blocks])  # W_p^p along each line
    mean = costs.mean()
    apart = mean.detach() > 0
    value = torch.where(apart, mean, 1.0).pow(1 / p) * apart  # the root has no slope at zero
    if len(costs) == 1:
        return Divergence(value, torch.zeros_like(mean.detach()))
    relative = costs.detach().std() / len(costs) ** 0.5 / torch.where(apart, mean.detach(), 1.0)
    return Divergence(value, value.detach() * relative / p)


def directions(num: int, dims: int, seed: int | None) -> Tensor:
    """Unit vectors, uniform on the sphere: (num, dims) in double precision; the only one, (1, 1), for one dimension."""
    if dims == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num, dims, generator=generator, dtype=torch.float64), dim=1)
