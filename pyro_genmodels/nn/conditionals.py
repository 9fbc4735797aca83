"""The choice of a network for the conditional distributions of an autoregressive model."""

from __future__ import annotations

__all__ = ["ConditionalsChoice"]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Size, Tensor


class ConditionalsChoice(ABC):
    """A network of conditional distributions that has yet to be built for an event shape and a likelihood."""

    any_order: ClassVar[bool] = False
    """True if one network serves every order of the coordinates."""

    @abstractmethod
    def build(self, event_shape: Size, num_inputs: int, num_outputs: int, context: int) -> Any:
        """Build the network.

        Args:
            event_shape: shape of one datum, with d coordinates in all.
            num_inputs: number of input features of one coordinate.
            num_outputs: number of parameters of one conditional distribution.
            context: length of the context vector; 0 is none.

        Returns:
            A module with the methods of `pyro_genmodels.distributions.autoregressive.Conditionals`.
        """

    def build_by_coordinate(
        self, event_shape: Size, num_inputs: Sequence[int], num_outputs: Sequence[int], context: int
    ) -> Any:
        """Build the network for coordinates of different kinds; by default with the largest numbers for all.

        Args:
            event_shape: shape of one datum, with d coordinates in all.
            num_inputs: number of input features of each coordinate, in the order of sampling.
            num_outputs: number of parameters of each conditional distribution.
            context: length of the context vector; 0 is none.
        """
        return self.build(event_shape, max(num_inputs), max(num_outputs), context)

    def order(self, event_shape: Size, wanted: Tensor | None) -> Tensor:
        """Return the order in which coordinates of the flattened event are sampled, (d,), given the one wanted, if any."""
        return torch.arange(event_shape.numel()) if wanted is None else wanted
