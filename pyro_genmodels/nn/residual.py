"""The residual block of convolutional energies, critics and generators."""

from __future__ import annotations

__all__ = ["Residual"]

from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with a skip connection, (n, inputs, h, w) -> (n, outputs, h, w).

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.skip(h) + self.layers(h)
