"""Ways to run a captured graph: compiled by Inductor, one operation after another, or not captured at all."""

from __future__ import annotations

__all__ = ["Captured", "Compiled", "Eager", "Mode", "check_mode", "default_mode"]

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro.inductor import compile_graph, direct_call, missing_compiler
from pyro_genmodels.infer.compiled.cuda_graphs import can_be_recorded, recorded
from pyro_genmodels.infer.compiled.graph import Graph
from pyro_genmodels.infer.compiled.recorder import put_back
from pyro_genmodels.utils.errors import one_line, repr_or_class, warn_caller

Call = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Mode(ABC):
    """Base class of modes."""

    captures = True
    """True if programs are captured as graphs."""

    @abstractmethod
    def build(self, graph: Graph, inputs: Sequence[Tensor]) -> Call:
        """Return a function of the inputs and of the tensors that the graph reads; call it under `torch.no_grad`."""


@dataclass(frozen=True)
class Eager(Mode):
    """The program as it is, run anew at each call."""

    captures = False

    def build(self, graph: Graph, inputs: Sequence[Tensor]) -> Call:
        return graph.module


@dataclass(frozen=True)
class Captured(Mode):
    """The captured graph without a C++ compiler: as TorchScript where that takes all operations, or else as Python code.

    TorchScript makes small programs 5 to 10 times as fast as Pyro, Python code about twice.

    Args:
        script: False for Python code always.
    """

    script: bool = True

    def build(self, graph: Graph, inputs: Sequence[Tensor]) -> Call:
        if not self.script:
            return graph.module
        with warnings.catch_warnings(), torch.no_grad(), put_back():
            warnings.simplefilter("ignore")  # TorchScript is called deprecated, and warns of constants
            try:
                return torch.jit.trace(graph.module, (*inputs, *graph.read), check_trace=False)
            except RuntimeError:  # an operation that TorchScript does not know
                return graph.module


@dataclass(frozen=True)
class Compiled(Mode):
    """The captured graph, compiled by torch's Inductor. It needs a C++ compiler.

    Random numbers are those of an eager run. Compiled code is kept on disk by torch, so that a second process compiles the same
    program in a fraction of the time. If the compiler fails, the graph is run as by `Captured`, with a warning.

    Args:
        cuda_graphs: True to launch all kernels of a call at once, if all tensors are on one CUDA device.
    """

    cuda_graphs: bool = True

    def build(self, graph: Graph, inputs: Sequence[Tensor]) -> Call:
        tensors = [*inputs, *graph.read]
        try:
            with _shown(graph.num_operations), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch's own
                compiled = compile_graph(graph.module, tensors)
                direct = direct_call(compiled)
                run = direct if direct is not None and _agree(compiled, direct, graph, tensors) else compiled
                return recorded(run, graph, inputs) if self.cuda_graphs and can_be_recorded(tensors) else run
        except Exception as error:  # of any kind: the graph itself is right
            warn_caller(
                f"The compiler failed, so that the captured graph is run without it: {type(error).__name__}: {one_line(error)}"
            )
            return Captured().build(graph, inputs)


def _shown(num_operations: int) -> tqdm:
    """Return a line on the terminal that says what is compiled, as long as it is."""
    return tqdm(desc=f"compiling {num_operations} operations", bar_format="{desc} ...", leave=False, disable=None)


def _agree(one: Call, other: Call, graph: Graph, tensors: Sequence[Tensor]) -> bool:
    """Return True if two forms of a graph return the same and change the same, under the same random numbers."""

    def results(call: Call) -> list[Tensor]:
        with graph.put_back():
            returned = [x.clone() for x in call(*tensors) if isinstance(x, Tensor)]
            return returned + [x.clone() for x in graph.written]

    first = results(one)
    try:
        second = results(other)
    except (TypeError, ValueError):  # the other takes other tensors, such as some of these
        return False
    return len(first) == len(second) and all(map(partial(torch.allclose, rtol=0, atol=0, equal_nan=True), first, second))


def check_mode(owner: str, mode: Any) -> Mode | None:
    """Return a mode, or None, which stands for the default.

    Args:
        owner: name of the class or function that takes the mode.
        mode: the value to check.

    Raises:
        TypeError: if it is neither.

    Example:
        >>> check_mode("capture", Eager())
        Eager()
        >>> check_mode("capture", Eager)
        Traceback (most recent call last):
        TypeError: capture wants Compiled(), Captured() or Eager() as mode, or None, but found the class Eager; call it.
    """
    if mode is None or isinstance(mode, Mode):
        return mode
    raise TypeError(f"{owner} wants Compiled(), Captured() or Eager() as mode, or None, but found {repr_or_class(mode)}.")


@cache
def default_mode() -> Mode:
    """Return `Compiled()` where a C++ compiler is found, and otherwise `Captured()`, with a warning at the first call."""
    if (problem := missing_compiler()) is None:
        return Compiled()
    warn_caller(
        f"No C++ compiler was found ({problem}), so that captured programs run without one: small models about a "
        "tenth as fast. Install g++ or clang, or set CXX."
    )
    return Captured()
