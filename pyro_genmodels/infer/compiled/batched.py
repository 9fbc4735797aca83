"""The log density of many points at once: one captured graph, mapped over a first dimension of points."""

from __future__ import annotations

__all__ = ["BatchedDensity"]

from collections.abc import Callable, Sequence
from copy import copy
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.functions import CapturedFunction, capture
from pyro_genmodels.infer.compiled.mapped import mappable
from pyro_genmodels.infer.compiled.modes import Captured, Mode
from pyro_genmodels.infer.compiled.recorder import CaptureError
from pyro_genmodels.utils.errors import one_line, warn_caller

MAX_GRAPHS = 8
"""Number of graphs, one for each number of points, that are kept."""
MAX_ELEMENTS = 2**18
"""Number of elements of a tensor above which a CPU is slow to get its memory, so that fewer points at once are faster."""
MAX_PARTS = 8
"""Largest number of parts of points that are parts of one larger graph."""


class BatchedDensity:
    """A log density and its gradient at many points at once.

    The model is captured for one point, and the graph is mapped over all (`torch.vmap`). A model that cannot be mapped is run
    for one point after another, with a warning.

    Args:
        density: log density of one point.
        mode: how the mapped graph is run. By default `Captured()`: with many points most of the time is arithmetic.
        block: largest number of points that are computed at once, which bounds memory. On a CPU they are fewer if tensors would
            be larger than `MAX_ELEMENTS`.

    Attributes:
        density: log density of one point.
        num_gradients: number of points at which the density was computed so far.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_genmodels.infer.compiled import log_density
        >>> density = BatchedDensity(log_density(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))
        >>> value, gradient = density(torch.tensor([[0.0], [1.0]]))
        >>> value, gradient
        (tensor([-0.9189, -1.4189]), tensor([[-0.],
                [-1.]]))
    """

    def __init__(self, density: LogDensity, mode: Mode | None = None, block: int = 1024) -> None:
        self.density, self.block = density, block
        self.mode = Captured() if mode is None else mode
        self.num_gradients = 0
        self._single = copy(density)
        self._single.mode = Captured(script=False) if self.mode.captures else self.mode
        self._captured: Any = None
        self._mapped: dict[tuple[Any, ...], CapturedFunction | None] = {}

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log densities in nats, (n,), and their gradients, (n, dim), in the dtype of z and without a graph.

        Both are NaN at points where a decomposition of a matrix fails.

        Args:
            z: unconstrained coordinates, (n, dim).

        Raises:
            ValueError: if z has another shape.
            CaptureError: if the model cannot be captured as a graph.
        """
        if z.dim() != 2 or z.shape[1] != self.density.dim:
            raise ValueError(f"A log density wants points (n, {self.density.dim}), but found {tuple(z.shape)}.")
        z = z.detach()
        self.num_gradients += len(z)
        self._capture(z)
        parts = [self._at_once(part) for part in z.split(self._num_at_once(z.device))]
        values, gradients = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(gradients)

    def graph(self, z: Tensor) -> Callable[[Tensor], Sequence[Tensor]] | None:
        """Return the function of points as it is now, made of graphs, as a part of other graphs.

        Args:
            z: unconstrained coordinates, (n, dim).

        Returns:
            The function for n points; None if the mode is eager, the model cannot be mapped, or n is above `block`.
        """
        if len(z) > self.block:
            return None
        self._capture(z)
        size = max(self._num_at_once(z.device), ceil(len(z) / MAX_PARTS))
        mapped = [self._mapped_over(part) for part in z.split(size)]
        graphs = [part.graph for part in mapped if part is not None]
        if len(graphs) < len(mapped):
            return None

        def in_parts(z: Tensor) -> Sequence[Tensor]:
            values, gradients = zip(*(graph(part) for graph, part in zip(graphs, z.split(size), strict=True)), strict=True)
            return torch.cat(values), torch.cat(gradients)

        return graphs[0] if len(graphs) == 1 else in_parts

    def _capture(self, z: Tensor) -> None:
        """Capture the model at the first point, if it is not captured or has changed."""
        if self._captured is None or self._captured.changed():
            self._mapped.clear()
            self._captured = self._single.capture(z[0])

    def _num_at_once(self, device: torch.device) -> int:
        """Return the number of points that are computed at once on a device."""
        program = self._captured.program
        if program is None or device.type != "cpu":  # the mode is eager, or memory is quick to get
            return self.block
        fitting = max(1, MAX_ELEMENTS // program.graph.largest_size())
        return min(self.block, 1 << fitting.bit_length() - 1)  # a power of two, so that few graphs serve many numbers

    def _at_once(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mapped = self._mapped_over(z)
        if mapped is not None:
            try:
                value, gradient = mapped(z)
            except torch.linalg.LinAlgError:  # at some of the points
                pass
            else:
                return value, gradient
        results = [self._captured(point) for point in z]
        return torch.stack([value for value, _ in results]), torch.stack([gradient for _, gradient in results])

    def _mapped_over(self, z: Tensor) -> CapturedFunction | None:
        """Return the mapped graph for as many points, or None if there is none."""
        if self._captured.program is None:  # the mode is eager
            return None
        key = (len(z), z.dtype)
        if key not in self._mapped:
            if len(self._mapped) >= MAX_GRAPHS:
                self._mapped.pop(next(iter(self._mapped)))
            try:
                self._mapped[key] = capture(torch.vmap(mappable(self._captured.program.graph, z[0])), z, mode=self.mode)
            except (RuntimeError, CaptureError) as error:
                if isinstance(error, torch.linalg.LinAlgError):  # no decomposition at these points
                    return None
                warn_caller(f"The model cannot be mapped over points, which are run one by one: {one_line(error)}")
                self._mapped[key] = None
        return self._mapped[key]
