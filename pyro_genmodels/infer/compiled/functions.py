"""Functions of tensors, captured as a graph and run in a chosen mode."""

from __future__ import annotations

__all__ = ["CapturedFunction", "capture"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro.capturing import capturable
from pyro_genmodels.infer.compiled.graph import Graph, trace
from pyro_genmodels.infer.compiled.modes import Mode, check_mode, default_mode
from pyro_genmodels.infer.compiled.recorder import StaleGraphError


class CapturedFunction:
    """A function of tensors as a graph. It reads the tensors in its closure live, and nothing else of Python.

    Attributes:
        graph: the graph. In the mode `Eager()` there is none.
        mode: how it is run.
    """

    def __init__(self, graph: Graph, mode: Mode, inputs: Sequence[Tensor]) -> None:
        self.graph, self.mode = graph, mode
        self._layouts = [_layout(x) for x in inputs], [_layout(x) for x in graph.read]
        self._run = mode.build(graph, inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        """Return the results, without gradients.

        Args:
            inputs: tensors of the shapes, dtypes and devices of those at the capture.

        Raises:
            ValueError: if an input has another shape, dtype or device.
            StaleGraphError: if a tensor was changed whose values the function's code has read, as by int(x), or one that it
                reads has another shape, dtype or order in memory now.
        """
        expected, read = self._layouts
        if (name := self.graph.changed()) is not None or [_layout(x) for x in self.graph.read] != read:
            raise StaleGraphError(
                f"The captured function no longer is what was captured: {name or 'the layout of a tensor that it reads'}. "
                "Capture it anew."
            )
        if [_layout(x) for x in inputs] != expected:
            inputs = tuple(_like(x, layout) for x, layout in zip(inputs, expected, strict=True))
        with torch.no_grad():
            return tuple(self._run(*inputs, *self.graph.read)[: self.graph.num_outputs])


class _EagerFunction(CapturedFunction):
    """A function that is run as it is at each call: it has no graph, and reads all of Python live."""

    def __init__(self, function: Callable[..., Sequence[Any]], mode: Mode) -> None:
        self._function, self.mode = function, mode

    def __call__(self, *inputs: Tensor) -> tuple[Any, ...]:
        return tuple(x.detach() if isinstance(x, Tensor) else x for x in self._function(*inputs))


def _layout(x: Tensor) -> tuple[Any, ...]:
    """Return what compiled code takes for granted of a tensor."""
    return x.shape, x.stride(), x.dtype, x.device


def _like(x: Tensor, layout: tuple[Any, ...]) -> Tensor:
    """Return an input in the order in memory that the code takes for granted."""
    shape, stride, dtype, device = layout
    if (x.shape, x.dtype, x.device) != (shape, dtype, device):
        raise ValueError(
            f"A captured function wants an input {tuple(shape)} of {dtype} on {device}, but found {tuple(x.shape)} of "
            f"{x.dtype} on {x.device}. Capture it anew for others."
        )
    return x.new_empty_strided(shape, stride).copy_(x)


def capture(function: Callable[..., Sequence[Any]], *inputs: Tensor, mode: Mode | None = None) -> CapturedFunction:
    """Return a function of tensors, captured as a graph. It may run Pyro programs.

    Args:
        function: function of tensors that returns a sequence of tensors, or None in some places. Gradients inside of it
            (`torch.autograd.grad`) become operations of the graph.
        inputs: tensors like those of later calls.
        mode: `Compiled()`, `Captured()`, or `Eager()`, which runs the function as it is; by default compiled where there is a
            C++ compiler.

    Raises:
        TypeError: if the mode is not one.
        CaptureError: if the function cannot be captured; the message names the cause and the line.

    Example:
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> def value_and_gradient(x):
        ...     x = x.detach().requires_grad_()
        ...     y = x.square().sum()
        ...     return y, *torch.autograd.grad(y, x)
        >>> captured = capture(value_and_gradient, torch.zeros(2), mode=Captured())
        >>> captured(torch.tensor([1.0, 2.0]))
        (tensor(5.), tensor([2., 4.]))
    """
    mode = check_mode("capture", mode) or default_mode()
    if not mode.captures:
        return _EagerFunction(function, mode)
    with capturable():
        graph = trace(function, *inputs)
    return CapturedFunction(graph, mode, inputs)
