"""The input of every method: a model with its data, as a log density over unconstrained coordinates."""

from __future__ import annotations

__all__ = ["Problem"]

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from pyro_genmodels.infer.compiled.batched import BatchedDensity
from pyro_genmodels.infer.compiled.coordinates import Coordinates
from pyro_genmodels.infer.compiled.density import LogDensity


class Problem:
    """A model with the arguments that it is conditioned on.

    Attributes:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        progress: True for progress bars.
        has_density: False if something that is observed is computed by a simulator, so that there is no density.

    Args:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        progress: True for progress bars.
        coordinates: unconstrained coordinates of its latent variables, if they are known; then a density is built only when it
            is asked for, and the model need not have one.
        has_density: False if it has none.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> problem = Problem(lambda: pyro.sample("scale", dist.LogNormal(0.0, 1.0)))
        >>> problem.coordinates.names, problem.density.dim
        (['scale'], 1)
        >>> problem.batched(torch.zeros(2, 1))[0]  # log densities of two points
        tensor([-0.9189, -0.9189])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        progress: bool = True,
        coordinates: Coordinates | None = None,
        has_density: bool = True,
    ) -> None:
        self.model, self.args, self.kwargs, self.progress = model, tuple(args), dict(kwargs or {}), progress
        self._coordinates, self.has_density = coordinates, has_density

    def __getstate__(self) -> dict[str, Any]:
        """Return what is saved and copied: all but captured graphs, which are built again when they are asked for."""
        return {name: value for name, value in vars(self).items() if name not in ("density", "batched")}

    @property
    def coordinates(self) -> Coordinates:
        """Maps between unconstrained coordinates and the latent variables."""
        return self.density if self._coordinates is None else self._coordinates

    @cached_property
    def density(self) -> LogDensity:
        """Log density of all continuous latent variables, the discrete ones summed out.

        Raises:
            NotImplementedError: if something that is observed is computed by a simulator.
            ValueError: as `log_density` does, or if there is no continuous latent variable.
        """
        if not self.has_density:
            raise NotImplementedError(
                "What is observed is computed by a simulator, so there are draws of this posterior, and no weights or "
                "log-likelihood."
            )
        density = LogDensity(self.model, self.args, self.kwargs)
        if not density.dim:
            raise ValueError("The model has no continuous latent variable, so there is no posterior to approximate.")
        return density

    @cached_property
    def batched(self) -> BatchedDensity:
        """The same density of many points at once. It counts its gradients."""
        return BatchedDensity(self.density)
