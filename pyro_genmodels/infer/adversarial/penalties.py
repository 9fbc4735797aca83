r"""Penalties on a critic: on the norm of its gradient, or bounds on its parameters.

.. math:: R_1 = \frac\gamma2\, \mathbb{E}_p |\nabla v|^2, \qquad R_2 = \frac\gamma2\, \mathbb{E}_q |\nabla v|^2, \qquad
    \mathrm{GP} = \lambda\, \mathbb{E} (|\nabla v(\hat x)| - 1)^2,

with :math:`\hat x` uniform on the line between a real and a fake input. Gradients are with respect to these inputs, but not to
a context.

Mescheder et al., *Which Training Methods for GANs do actually Converge?* (arXiv 1801.04406); Gulrajani et al., *Improved
Training of Wasserstein GANs* (arXiv 1704.00028). Spectral normalisation is part of the network:
`spectral_normalized` applies torch's to every layer (Miyato et al., arXiv 1802.05957).
"""

from __future__ import annotations

__all__ = ["R1", "R2", "GradientPenalty", "Penalty", "WeightClipping", "spectral_normalized"]

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn

CriticFunction = Callable[..., Tensor]
"""(inputs (rows, ...) each) -> (rows,)."""
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Penalty:
    """Base class of penalties. This class itself has no effect."""

    def __call__(self, critic: CriticFunction, real: Inputs, fake: Inputs) -> Tensor | float:
        """Return the penalty to add to the critic's loss.

        Args:
            critic: function of inputs, (rows, ...) each, that returns (rows,).
            real: real inputs.
            fake: fake inputs.
        """
        return 0.0

    def constrain(self, parameters: Iterable[Tensor]) -> None:
        """Bound the critic's parameters in place. Called after each of its steps."""


def _check_positive(owner: object, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (isfinite(value) and value > 0):
        raise ValueError(f"{type(owner).__name__} wants a positive number, but found {value!r}.")


@dataclass(frozen=True)
class _SquaredGradient(Penalty):
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, self.gamma)


class R1(_SquaredGradient):
    """Half the squared norm of the gradient at real inputs, times gamma.

    Args:
        gamma: positive weight.
    """

    def __call__(self, critic: CriticFunction, real: Inputs, fake: Inputs) -> Tensor:
        return self.gamma / 2 * _squared_norms(critic, real).mean()


class R2(_SquaredGradient):
    """Half the squared norm of the gradient at fake inputs, times gamma.

    Args:
        gamma: positive weight.
    """

    def __call__(self, critic: CriticFunction, real: Inputs, fake: Inputs) -> Tensor:
        return self.gamma / 2 * _squared_norms(critic, fake).mean()


@dataclass(frozen=True)
class GradientPenalty(Penalty):
    """The squared distance of the gradient's norm from 1, at points between real and fake inputs.

    Args:
        weight: positive weight.
    """

    weight: float = 10.0

    def __post_init__(self) -> None:
        _check_positive(self, self.weight)

    def __call__(self, critic: CriticFunction, real: Inputs, fake: Inputs) -> Tensor:
        rows = len(real[0])
        share = torch.rand(rows, device=real[0].device)
        between = tuple(
            x.lerp(y, share.to(x).reshape(-1, *(1,) * (x.dim() - 1))) if x.is_floating_point() else x
            for x, y in zip(real, fake, strict=True)
        )
        squares = _squared_norms(critic, between)
        norms = squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()  # the root has no derivative at 0
        return self.weight * (norms - 1).square().mean()


@dataclass(frozen=True)
class WeightClipping(Penalty):
    """Clipping of every parameter of the critic after each step, as in the first Wasserstein GAN.

    Args:
        bound: largest absolute value of a parameter.
    """

    bound: float = 0.01

    def __post_init__(self) -> None:
        _check_positive(self, self.bound)

    @torch.no_grad()
    def constrain(self, parameters: Iterable[Tensor]) -> None:
        for p in parameters:
            p.clamp_(-self.bound, self.bound)


def _squared_norms(critic: CriticFunction, inputs: Inputs) -> Tensor:
    """Return the squared norm of the critic's gradient in each row, (rows,), with a graph to its parameters."""
    if not all(part.requires_grad for part in inputs if part.is_floating_point()):
        inputs = tuple(part.detach().requires_grad_(part.is_floating_point()) for part in inputs)
    floats = [part for part in inputs if part.requires_grad]
    if not floats:
        raise ValueError("Gradient penalties want inputs that are real numbers, but found integers. Pass penalties=().")
    with torch.enable_grad():
        grads = torch.autograd.grad(critic(*inputs).sum(), floats, create_graph=True, allow_unused=True, materialize_grads=True)
    return torch.stack([grad.reshape(len(grad), -1).square().sum(1) for grad in grads]).sum(0)


def spectral_normalized(network: nn.Module) -> nn.Module:
    """Apply torch's spectral normalisation to every dense and convolutional layer, in place, and return the network.

    The weight of a layer is divided by its largest singular value.

    Raises:
        TypeError: if the argument is no `torch.nn.Module`.

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
