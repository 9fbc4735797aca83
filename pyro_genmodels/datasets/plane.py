"""Laws in the plane, with labels: 10,000 rows to train on, 2,000 to validate on and 10,000 to judge by, each drawn afresh."""

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
    r"""Two half circles that interlock: :math:`(\cos t, \sin t)` and :math:`(1 - \cos t, 1/2 - \sin t)`, with noise.

    :math:`t \sim U(0, \pi)`, and the noise is :math:`N(0, 0.1^2)` in each coordinate; the label is the half circle, either as
    likely. The law of scikit-learn's `make_moons`, with t at random.

    Args:
        seed: of the draws.

    Example:
        >>> data = moons()
        >>> data.train.shape, data.num_classes, data.test_labels.unique().tolist()
        (torch.Size([10000, 2]), 2, [0, 1])
    """

    def law(k: Tensor, z: Tensor, u: Tensor) -> Tensor:
        cos, sin = (pi * u[:, 0]).cos(), (pi * u[:, 0]).sin()
        return torch.where(k == 0, torch.stack([cos, sin]), torch.stack([1 - cos, 0.5 - sin])).T + 0.1 * z

    return _plane("moons", 2, law, seed)


def pinwheel(seed: int = 0) -> Dataset:
    r"""Five bent arms: :math:`x = 2\,(a, b)\,R(2 \pi k / 5 + e^a / 4)`, :math:`a \sim N(1, 0.3^2)`, :math:`b \sim N(0, 0.1^2)`.

    :math:`R(\theta)` has the rows :math:`(\cos\theta, -\sin\theta)` and :math:`(\sin\theta, \cos\theta)`; the label is the arm
    k, each as likely. Johnson et al. (2016), arXiv 1603.06277, in the size it has in FFJORD, arXiv 1810.01367.

    Args:
        seed: of the draws.

    Example:
        >>> pinwheel().train_labels.unique().tolist()
        [0, 1, 2, 3, 4]
    """

    def law(k: Tensor, z: Tensor, u: Tensor) -> Tensor:
        a, b = 1 + 0.3 * z[:, 0], 0.1 * z[:, 1]
        angle = 2 * pi * k.float() / 5 + a.exp() / 4
        return 2 * torch.stack([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], dim=1)

    return _plane("pinwheel", 5, law, seed)


def ring(seed: int = 0) -> Dataset:
    r"""Eight Gaussians on the unit circle: :math:`\frac18 \sum_k N((\cos \pi k/4, \sin \pi k/4), 0.01^2 I)`; the label is k.

    On it the modes that a model drops are counted: the 2D-ring of PacGAN, Lin et al. (2018), arXiv 1712.04086.

    Args:
        seed: of the draws.

    Example:
        >>> data = ring()
        >>> data.density.log_prob(data.test).shape
        torch.Size([10000])
    """
    angle = pi / 4 * torch.arange(8, dtype=torch.float32, device="cpu")
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    return _plane("ring", 8, lambda k, z, u: centres[k] + 0.01 * z, seed, Normal(centres, 0.01))


def grid(seed: int = 0) -> Dataset:
    r"""Twenty-five Gaussians: :math:`\frac1{25} \sum_{i,j=0}^4 N((2i - 4, 2j - 4), 0.05^2 I)`; the label is 5i + j.

    On it the modes that a model drops are counted: the 2D-grid of PacGAN, Lin et al. (2018), arXiv 1712.04086.

    Args:
        seed: of the draws.

    Example:
        >>> data = grid()
        >>> data.density.log_prob(data.test).shape
        torch.Size([10000])
    """
    line = torch.arange(-4, 5, 2, dtype=torch.float32, device="cpu")
    centres = torch.cartesian_prod(line, line)
    return _plane("grid", 25, lambda k, z, u: centres[k] + 0.05 * z, seed, Normal(centres, 0.05))


def checkerboard(seed: int = 0) -> Dataset:
    r"""Uniform on the 8 dark squares of a board of 4 x 4 on :math:`[-4, 4)^2`, among them the one at the lower left.

    Dark are the squares (i, j), :math:`[2i - 4, 2i - 2) \times [2j - 4, 2j - 2)`, with i + j even; the label counts them by i,
    then by j. So drawn in FFJORD, Grathwohl et al. (2019), arXiv 1810.01367.

    Args:
        seed: of the draws.

    Example:
        >>> checkerboard().density.log_prob(torch.tensor([[-3.0, -3.0], [-3.0, -1.0]])).exp()
        tensor([0.0312, 0.0000])
    """
    dark = [(2 * i - 4, 2 * j - 4) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    corners = torch.tensor(dark, dtype=torch.float32, device="cpu")
    inside = 1 - 2**-22  # a square's far edge is not reached by rounding
    square = Uniform(corners, corners + 2, validate_args=False)
    return _plane("checkerboard", 8, lambda k, z, u: corners[k] + 2 * u.clamp(max=inside), seed, square)


def _plane(
    name: str,
    components: int,
    law: Callable[[Tensor, Tensor, Tensor], Tensor],
    seed: int,
    parts: TorchDistribution | None = None,
) -> Dataset:
    """Draws of a law (component, two normal numbers, two uniform ones) -> x, by random numbers that nothing else uses."""
    generator = torch.Generator().manual_seed(crc32(f"{name} {seed}".encode()))
    like: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}

    def draw(n: int) -> tuple[Tensor, Tensor]:
        k = torch.randint(components, (n,), generator=generator, device="cpu")
        return law(k, torch.randn(n, 2, **like), torch.rand(n, 2, **like)), k

    density = None
    if parts is not None:
        even = Categorical(torch.ones(components, dtype=torch.float32, device="cpu"))
        density = MixtureSameFamily(even, parts.to_event(1), validate_args=False)  # -inf outside of all parts is no error
    (train, a), (valid, b), (test, c) = draw(10_000), draw(2_000), draw(10_000)
    return Dataset(name, train, valid, test, a, b, c, num_classes=components, density=density)
