"""A log density and its gradient, captured as a graph, and run in a chosen mode or as native code."""

from __future__ import annotations

__all__ = ["CapturedDensity"]

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_genmodels._pyro.inductor import DirectCall
from pyro_genmodels.infer.compiled.graph import Graph
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.infer.compiled.native import NativeDensity, native_density
from pyro_genmodels.infer.compiled.program import Program


class CapturedDensity:
    """A log density and its gradient as a function of the coordinates, captured as a graph.

    Args:
        density: the log density.
        z: coordinates at which the model can run, (dim,).
        mode: how it is captured.
    """

    def __init__(self, density: Any, z: Tensor, mode: Mode) -> None:
        self.program: Program | None = None
        self.run: Callable[[Tensor], Sequence[Tensor]] = density.evaluate
        self._built: Callable[..., Sequence[Any]] | None = None
        self._native: NativeDensity | None = None
        if mode.captures:
            with poutine.block():
                self.program = _Program(density, z)
            graph = self.program.graph
            _check_no_random_numbers(graph)
            self._built = mode.build(graph, [z])
            self.run = partial(_run_graph, self._built, graph)

    def changed(self) -> str | None:
        """Return the name of something that the model uses and that was replaced since the capture, or None."""
        return None if self.program is None else self.program.changed()

    def native(self, z: Tensor) -> NativeDensity | None:
        """Return the function as code that needs no Python, or None if it is not compiled or does too much for that.

        Args:
            z: coordinates at which the model can run, (dim,).
        """
        if self._native is None and self.program is not None and isinstance(self._built, DirectCall):
            self._native = native_density(self._built, z, self.program.graph.read)
        return self._native

    def __call__(self, z: Tensor) -> Sequence[Tensor]:
        """Return the log density and its gradient, NaN where a matrix has no decomposition, such as no Cholesky factor."""
        try:
            return self.run(z.contiguous())  # compiled code takes this order in memory for granted
        except torch.linalg.LinAlgError:
            return z.new_full((), torch.nan), torch.full_like(z, torch.nan)


class _Program(Program):
    """A log density and its gradient in the place of a loss and the gradients of parameters, for the watch and the graph."""

    def __init__(self, density: Any, z: Tensor) -> None:
        self._evaluate = density.evaluate
        roots = (density.model, density.args, density.kwargs)
        super().__init__(density.value, (z,), {}, roots, gradients=True)

    def outputs(self, *inputs: Tensor) -> list[Tensor | None]:
        return list(self._evaluate(*inputs))

    def _hooked(self) -> str | None:
        return None  # parameters are constants here


def _run_graph(built: Callable[..., Sequence[Any]], graph: Graph, z: Tensor) -> Sequence[Tensor]:
    """Return the results of a graph, without further ones that stand after them."""
    with torch.no_grad():
        return built(z, *graph.read)[: graph.num_outputs]


def _check_no_random_numbers(graph: Graph) -> None:
    """Check that a log density draws no random numbers.

    Raises:
        ValueError: naming the operation that draws them.
    """
    if names := graph.random_operations():
        raise ValueError(
            f"The model computes with random numbers that are not those of a sample site (by {names[0]}), such as data drawn "
            "inside of it or dropout, so that its log density is another one at each run. Draw them once, before the model "
            "runs, or by pyro.sample; or call eval() of a network."
        )
