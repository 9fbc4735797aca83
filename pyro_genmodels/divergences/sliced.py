r"""Sliced Wasserstein distance between two sets of samples: optimal transport of projections on random lines.

.. math:: SW_p^p(x, y) = \mathbb{E}_{\theta} \int_0^1 \bigl|F_{\theta^\top x}^{-1}(u) - F_{\theta^\top y}^{-1}(u)\bigr|^p du,
    \qquad \theta \text{ uniform on the unit sphere of } \mathbb{R}^d,

with :math:`F^{-1}` the quantile function of the samples projected on :math:`\theta`, which is found by sorting. Samples shifted
by v have a distance of :math:`|v| / \sqrt{d}` for p = 2. Two sets from the same distribution have a positive distance too,
which falls with their sizes.

Rabin et al., *Wasserstein Barycenter and Its Application to Texture Mixing* (2011); Bonneel et al., *Sliced and Radon
Wasserstein Barycenters of Measures* (2015). Computed by POT (JMLR 2021).
"""

from __future__ import annotations

__all__ = ["directions", "sliced_costs", "sliced_wasserstein"]

import torch
from torch import Tensor

from pyro_genmodels.divergences.divergence import Divergence, warn_unless_reliable
from pyro_genmodels.divergences.means import tail_of_sums
from pyro_genmodels.divergences.optimal_transport import HEAVY_TAIL_CURE, check_order, sorted_potentials
from pyro_genmodels.divergences.samples import Samples, as_matrices, centred
from pyro_genmodels.utils.errors import import_extra

_MAX_BLOCK_SIZE = 2**22  # largest number of projections sorted at once
_TAIL_PROJECTIONS = 16  # number of directions along which the contributions of single samples are computed


def sliced_wasserstein(
    x: Samples, y: Samples, *, num_projections: int = 1000, p: float = 2.0, seed: int | None = None
) -> Divergence:
    """Return the sliced Wasserstein distance of order p between two sets of samples, in the units of the data.

    As an estimate of the distance between the distributions it is too high: for equal distributions it falls to zero with the
    number of samples, but is not zero. Compare it with the *baseline*, the distance between two sets of real data,
    ``sliced_wasserstein(real, more_real, seed=1)``, of the same sizes and with the same seed.

    Args:
        x: samples, (n, ...). The dimensions after the first are the event, which is flattened to d numbers.
        y: samples of events of the same shape, (m, ...); n and m may differ.
        num_projections: number of directions, at least 2; events of one number have a single direction.
        p: order, at least 1.
        seed: seed of the directions, which are then the same in every call, on every device and in every dtype, as comparisons
            need. None samples new directions from torch's global generator, as training needs.

    Returns:
        Value and standard error, scalars of the samples' dtype (at least single precision) and device. The value has gradients
        with respect to x and y, which are zero at zero distance. The error covers the random directions, by the delta method,
        and not the randomness of the samples. It is 0 for d = 1. The result has k-hat of what single samples contribute; a
        RuntimeWarning is issued if it is above 0.7, as it is where no mean of the costs exists.

    Raises:
        TypeError: for anything but tensors, arrays and frames of numbers.
        ValueError: for events of different shapes, two devices, fewer than 2 samples or directions, samples with NaN or
            infinity, or an order below 1.
        ImportError: if POT, of the extra ``eval``, is missing.

    Example:
        >>> x = torch.randn(100, 2)
        >>> value, std_error = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]), seed=1)
        >>> abs(value - 5 / 2**0.5) < 5 * std_error
        tensor(True)
    """
    x, y, dtype = as_matrices(x, y, by="sliced_wasserstein")
    if num_projections < 2:
        raise ValueError(f"sliced_wasserstein wants at least 2 directions for a standard error, but found {num_projections=}.")
    check_order(p, by="sliced_wasserstein")
    x, y, unit = centred(x, y)
    costs = sliced_costs(x, y, num_projections=num_projections, p=p, seed=seed)
    mean = costs.mean()
    equal = mean.detach() == 0
    positive = torch.where(equal, 1.0, mean)
    value = positive.pow(1 / p).masked_fill(equal, 0.0) * unit  # the root is not differentiable at zero
    error = costs.detach().std() / len(costs) ** 0.5 if len(costs) > 1 else torch.zeros_like(mean.detach())
    std_error = value.detach() * error / positive.detach() / p
    found = Divergence(value.to(dtype), std_error.to(dtype), _tail(x.detach(), y.detach(), p).to(dtype), min(len(x), len(y)))
    return warn_unless_reliable(found, by="sliced_wasserstein", cure=HEAVY_TAIL_CURE)


def _tail(x: Tensor, y: Tensor, p: float) -> Tensor:
    """Return k-hat, (), of the contributions of the samples (n, d) and (m, d) to the mean cost along some fixed directions."""
    u, v = x.new_zeros(len(x)), y.new_zeros(len(y))
    for direction in directions(_TAIL_PROJECTIONS, x.shape[1], seed=0).to(x):
        (a, order_x), (b, order_y) = (x @ direction).sort(), (y @ direction).sort()
        of_x, of_y = sorted_potentials(a, b, p)
        u[order_x] += of_x
        v[order_y] += of_y
    return tail_of_sums(u, v)


def sliced_costs(x: Tensor, y: Tensor, *, num_projections: int, p: float, seed: int | None = None) -> Tensor:
    """Return the Wasserstein distance to the power p along each direction, (num_projections,), or (1,) in one dimension.

    Nothing is checked, so that NaN in the samples gives NaN. Samples, (n, d) and (m, d), should be near zero: see `centred`.
    """
    ot = import_extra("ot", extra="eval", by="sliced_wasserstein")
    blocks = directions(num_projections, x.shape[1], seed).to(x).split(max(1, _MAX_BLOCK_SIZE // (len(x) + len(y))))
    return torch.cat([ot.wasserstein_1d(x @ block.T, y @ block.T, p=p) for block in blocks])


def directions(num_projections: int, dims: int, seed: int | None) -> Tensor:
    """Return random unit vectors, (num_projections, dims), in double precision; (1, 1) in one dimension."""
    if dims == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num_projections, dims, generator=generator, dtype=torch.float64), dim=1)
