r"""What keeps a critic from running away: penalties on its slopes, or bounds on its weights.

.. math:: R_1 = \frac\gamma2\, \mathbb{E}_p |\nabla v|^2, \qquad R_2 = \frac\gamma2\, \mathbb{E}_q |\nabla v|^2, \qquad
    \mathrm{GP} = \lambda\, \mathbb{E} (|\nabla v(\hat x)| - 1)^2,

with :math:`\hat x` anywhere between a datum and a draw. Slopes are in what the critic tells apart, in its units; not in a
context.

Mescheder et al., *Which Training Methods for GANs do actually Converge?* (arXiv 1801.04406); Gulrajani et al., *Improved
Training of Wasserstein GANs* (arXiv 1704.00028). Spectral normalisation, which acts in the network, is torch's:
`spectral_normalized` puts it on every layer (Miyato et al., arXiv 1802.05957).
"""

from __future__ import annotations

__all__ = ["R1", "R2", "GradientPenalty", "Penalty", "WeightClipping", "spectral_normalized"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

Critic = Callable[..., Tensor]
Seen = tuple[Tensor, ...]


@dataclass(frozen=True)
class Penalty:
    """Base of what restrains a critic; by itself it does not."""

    def __call__(self, critic: Critic, real: Seen, fake: Seen) -> Tensor | float:
        """What is added to the critic's loss.

        Args:
            critic: of what it sees, (rows, ...) each, -> (rows,).
            real: what it sees of data.
            fake: what it sees of draws.
        """
        return 0.0

    def constrain(self, parameters: Iterable[Tensor]) -> None:
        """Bounds the critic's parameters after each of its steps."""


def _weight(owner: object, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and value > 0):
        raise ValueError(f"{type(owner).__name__} wants a positive number, but found {value!r}.")


@dataclass(frozen=True)
class _SquaredSlope(Penalty):
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _weight(self, self.gamma)


class R1(_SquaredSlope):
    """Half the squared slope at data, times gamma.

    Args:
        gamma: weight, positive.
    """

    def __call__(self, critic: Critic, real: Seen, fake: Seen) -> Tensor:
        return self.gamma / 2 * _squared_slopes(critic, real).mean()


class R2(_SquaredSlope):
    """Half the squared slope at draws, times gamma.

    Args:
        gamma: weight, positive.
    """

    def __call__(self, critic: Critic, real: Seen, fake: Seen) -> Tensor:
        return self.gamma / 2 * _squared_slopes(critic, fake).mean()


@dataclass(frozen=True)
class GradientPenalty(Penalty):
    """The squared distance of slopes from 1, between data and draws.

    Args:
        weight: positive.
    """

    weight: float = 10.0

    def __post_init__(self) -> None:
        _weight(self, self.weight)

    def __call__(self, critic: Critic, real: Seen, fake: Seen) -> Tensor:
        rows = len(real[0])
        share = torch.rand(rows, device=real[0].device)
        between = tuple(
            x.lerp(y, share.to(x).reshape(-1, *(1,) * (x.dim() - 1))) if x.is_floating_point() else x
            for x, y in zip(real, fake, strict=True)
        )
        slopes = _squared_slopes(critic, between).clamp(min=1e-12).sqrt()  # the root has no slope at zero
        return self.weight * (slopes - 1).square().mean()


@dataclass(frozen=True)
class WeightClipping(Penalty):
    """Every parameter of the critic within a bound after each step, as the first Wasserstein GAN does.

    Args:
        bound: positive.
    """

    bound: float = 0.01

    def __post_init__(self) -> None:
        _weight(self, self.bound)

    @torch.no_grad()
    def constrain(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            p.clamp_(-self.bound, self.bound)


def _squared_slopes(critic: Critic, seen: Seen) -> Tensor:
    """Of each row, (rows,), with a graph to the critic's parameters."""
    if not all(part.requires_grad for part in seen if part.is_floating_point()):
        seen = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in seen)
    inputs = [part for part in seen if part.requires_grad]
    if not inputs:
        raise ValueError("Penalties are on slopes, but the critic tells integers apart, which have none. Pass penalties=().")
    with torch.enable_grad():
        slopes = torch.autograd.grad(critic(*seen).sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.stack([slope.reshape(len(slope), -1).square().sum(1) for slope in slopes]).sum(0)


def spectral_normalized(network: nn.Module) -> nn.Module:
    """The network, with the weight of every dense and convolutional layer divided by its largest singular value (torch's).

    Example:
        >>> critic = spectral_normalized(nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)))
        >>> [name for name, _ in critic[0].named_parameters()]
        ['bias', 'parametrizations.weight.original']
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"spectral_normalized wants a network, such as gan.critic, but found {network!r}.")
    from torch.nn.utils.parametrizations import spectral_norm  # slow to import

    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            spectral_norm(module)
    return network
