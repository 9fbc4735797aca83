"""Unconstrained coordinates: one vector for all continuous latent variables of a model, and the maps from and to these."""

from __future__ import annotations

__all__ = ["Coordinates", "check_same_support"]

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_genmodels.utils.errors import listed


def check_same_support(name: str, transform: Any, support: Any, like: Tensor) -> None:
    """Check that a variable has the same support in two runs of a model.

    Args:
        name: name of the variable.
        transform: map from unconstrained coordinates to its support in one run.
        support: its support in the other.
        like: a value of it in unconstrained coordinates.

    Raises:
        ValueError: if the support of the other run has another map.
    """
    u = torch.full_like(like, 0.3)
    if not torch.equal(transform(u), biject_to(support)(u)):
        raise ValueError(
            f"The support of {name!r} depends on other variables, so that no one map to unconstrained coordinates fits all its "
            "values. Sample a variable with a fixed support, such as a fraction, and compute this one from it."
        )


class Coordinates:
    """Maps between one unconstrained vector and the values of a model's variables.

    Attributes:
        dim: number of unconstrained coordinates.
        names: names of the variables, in the order of their coordinates.
        shapes: shape of each variable in unconstrained coordinates, by name.
        transforms: map from the support of each variable to unconstrained coordinates, by name, as Pyro's `NUTS` takes them.
        dtype: widest dtype of the variables.
        device: device of the variables.

    Args:
        transforms: map from the support of each variable to unconstrained coordinates, by name.
        values: a value of each variable, by name.
    """

    def __init__(self, transforms: Mapping[str, Any], values: Mapping[str, Tensor]) -> None:
        self.transforms = dict(transforms)
        examples = {name: transform(values[name]) for name, transform in transforms.items()}
        self.names = list(examples)
        self.shapes = {name: example.shape for name, example in examples.items()}
        self.dim = sum(shape.numel() for shape in self.shapes.values())
        self._dtypes = {name: example.dtype for name, example in examples.items()}
        self.dtype = reduce(torch.promote_types, self._dtypes.values()) if examples else torch.get_default_dtype()
        self.device = next((example.device for example in examples.values()), torch.get_default_device())

    def unflatten(self, z: Tensor) -> dict[str, Tensor]:
        """Return the unconstrained value of each variable, (..., *shape) in its dtype, of coordinates z, (..., dim)."""
        parts = z.split([shape.numel() for shape in self.shapes.values()], -1) if self.shapes else ()
        return {
            name: part.reshape((*z.shape[:-1], *shape)).to(self._dtypes[name])
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return coordinates, (..., dim), of the unconstrained value of each variable, (..., *shape).

        Raises:
            ValueError: if a variable is missing.
        """
        if missing := [name for name in self.names if name not in params]:
            raise ValueError(f"The log density wants values of {listed(self.names)}, but {listed(missing)} are missing.")
        values = [params[name].to(self.dtype) for name in self.names]
        parts = [
            x.reshape((*x.shape[: x.dim() - len(shape)], shape.numel()))
            for x, shape in zip(values, self.shapes.values(), strict=True)
        ]
        return torch.cat(parts, -1) if parts else torch.zeros(0, dtype=self.dtype, device=self.device)

    def constrain(self, z: Tensor) -> dict[str, Tensor]:
        """Return the value of each variable in its support, (..., *shape), of coordinates z, (..., dim)."""
        return {name: self.transforms[name].inv(value) for name, value in self.unflatten(z).items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the coordinates, (..., dim), of values in the supports of the variables, (..., *shape)."""
        return self.flatten({name: self.transforms[name](values[name]) for name in self.names if name in values})
