"""Two-dimensional distributions with labels: 10,000 rows for training, 2,000 for validation and 10,000 for test."""

from __future__ import annotations

__all__ = ["checkerboard", "grid", "moons", "pinwheel", "ring"]

from collections.abc import Callable
from math import pi
from typing import Any
from zlib import crc32

import torch
from pyro.distributions import Categorical, MixtureSameFamily, Normal, TorchDistribution, Uniform
from torch import Tensor

from pyro_genmodels.datasets.dataset import Dataset


def moons(seed: int = 0) -> Dataset:
    r"""Draw two interlocking half circles, :math:`(\cos t, \sin t)` and :math:`(1 - \cos t, 1/2 - \sin t)`, with noise.

    :math:`t \sim U(0, \pi)`, and the noise is :math:`N(0, 0.1^2)` in each coordinate. The label is the half circle; both are
    equally likely. The distribution is that of scikit-learn's `make_moons`, with random t.

    Args:
        seed: seed of the draws.

    Example:
        >>> data = moons()
        >>> data.train.shape, data.num_classes, data.test_labels.unique().tolist()
        (torch.Size([10000, 2]), 2, [0, 1])
    """

    def transform(k: Tensor, z: Tensor, u: Tensor) -> Tensor:
        cos, sin = (pi * u[:, 0]).cos(), (pi * u[:, 0]).sin()
        return torch.where(k == 0, torch.stack([cos, sin]), torch.stack([1 - cos, 0.5 - sin])).T + 0.1 * z

    return _plane("moons", 2, transform, seed)


def pinwheel(seed: int = 0) -> Dataset:
    r"""Draw 5 bent arms, :math:`2\,(a, b)\,R(2 \pi k / 5 + e^a / 4)`, :math:`a \sim N(1, 0.3^2)`, :math:`b \sim N(0, 0.1^2)`.

    :math:`R(\theta)` has the rows :math:`(\cos\theta, -\sin\theta)` and :math:`(\sin\theta, \cos\theta)`. The label is the arm
    k; all are equally likely. Johnson et al. (2016), arXiv 1603.06277, scaled as in FFJORD, arXiv 1810.01367.

    Args:
        seed: seed of the draws.

    Example:
        >>> pinwheel().train_labels.unique().tolist()
        [0, 1, 2, 3, 4]
    """

    def transform(k: Tensor, z: Tensor, u: Tensor) -> Tensor:
        a, b = 1 + 0.3 * z[:, 0], 0.1 * z[:, 1]
        angle = 2 * pi * k.float() / 5 + a.exp() / 4
        return 2 * torch.stack([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=1)

    return _plane("pinwheel", 5, transform, seed)


def ring(seed: int = 0) -> Dataset:
    r"""Draw 8 Gaussians on the unit circle, :math:`\frac18 \sum_k N((\cos \pi k/4, \sin \pi k/4), 0.01^2 I)`; the label is k.

    It is used to count the modes that a model misses: the 2D-ring of PacGAN, Lin et al. (2018), arXiv 1712.04086.

    Args:
        seed: seed of the draws.

    Example:
        >>> data = ring()
        >>> data.density.log_prob(data.test).shape
        torch.Size([10000])
    """
    angle = pi / 4 * torch.arange(8, dtype=torch.float32, device="cpu")
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    return _plane("ring", 8, lambda k, z, u: centres[k] + 0.01 * z, seed, Normal(centres, 0.01))


def grid(seed: int = 0) -> Dataset:
    r"""Draw twenty-five Gaussians, :math:`\frac1{25} \sum_{i,j=0}^4 N((2i - 4, 2j - 4), 0.05^2 I)`; the label is 5i + j.

    It is used to count the modes that a model misses: the 2D-grid of PacGAN, Lin et al. (2018), arXiv 1712.04086.

    Args:
        seed: seed of the draws.

    Example:
        >>> data = grid()
        >>> data.density.log_prob(data.test).shape
        torch.Size([10000])
    """
    line = torch.arange(-4, 5, 2, dtype=torch.float32, device="cpu")
    centres = torch.cartesian_prod(line, line)
    return _plane("grid", 25, lambda k, z, u: centres[k] + 0.05 * z, seed, Normal(centres, 0.05))


def checkerboard(seed: int = 0) -> Dataset:
    r"""Draw uniformly from the 8 dark squares of a 4 x 4 board on :math:`[-4, 4)^2`; the lower left square is dark.

    The dark squares are :math:`[2i - 4, 2i - 2) \times [2j - 4, 2j - 2)` with i + j even. The label numbers them by i, then by
    j. The board is that of FFJORD, Grathwohl et al. (2019), arXiv 1810.01367.

    Args:
        seed: seed of the draws.

    Example:
        >>> checkerboard().density.log_prob(torch.tensor([[-3.0, -3.0], [-3.0, -1.0]])).exp()
        tensor([0.0312, 0.0000])
    """
    dark = [(2 * i - 4, 2 * j - 4) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    corners = torch.tensor(dark, dtype=torch.float32, device="cpu")
    inside = 1 - 2**-22  # so that rounding does not reach the far edge of a square
    square = Uniform(corners, corners + 2, validate_args=False)
    return _plane("checkerboard", 8, lambda k, z, u: corners[k] + 2 * u.clamp(max=inside), seed, square)


def _plane(
    name: str,
    components: int,
    transform: Callable[[Tensor, Tensor, Tensor], Tensor],
    seed: int,
    parts: TorchDistribution | None = None,
) -> Dataset:
    """Return a data set of transformed random numbers, from a random generator that nothing else uses.

    Args:
        name: name of the data set.
        components: number of components, all equally likely; the label is the component.
        transform: function from components (n,), standard normal numbers (n, 2) and uniform numbers (n, 2) to x, (n, 2).
        seed: seed of the generator.
        parts: distributions of x given each component, of batch shape (components, 2); None if they have no density.
    """
    generator = torch.Generator().manual_seed(crc32(f"{name} {seed}".encode()))
    like: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}

    def draw(n: int) -> tuple[Tensor, Tensor]:
        k = torch.randint(components, (n,), generator=generator, device="cpu")
        return transform(k, torch.randn(n, 2, **like), torch.rand(n, 2, **like)), k

    density = None
    if parts is not None:
        weights = Categorical(torch.ones(components, dtype=torch.float32, device="cpu"))
        density = MixtureSameFamily(
            weights, parts.to_event(1), validate_args=False
        )  # outside all parts the log density is -inf, not an error
    (train, a), (valid, b), (test, c) = draw(10_000), draw(2_000), draw(10_000)
    return Dataset(name, train, valid, test, a, b, c, num_classes=components, density=density)
