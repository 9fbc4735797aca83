"""Torch's Inductor, for graphs whose inputs never change their shapes."""

from __future__ import annotations

__all__ = ["DirectCall", "compile_graph", "direct_call", "missing_compiler"]

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from pyro_genmodels.utils.errors import one_line

Call = Callable[..., Sequence[Tensor]]

OPTIONS = {"config_patches": {"fallback_random": True, "size_asserts": False}}
"""Random numbers are those of eager operations. Shapes are not checked at each call."""


def compile_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Call:
    """Return a graph as compiled code, which torch also keeps on disk. Call it under `torch.no_grad`."""
    return torch._inductor.standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs", options=OPTIONS)


class DirectCall:
    """The code inside of what `compile_graph` returns, without the checks around it.

    Args:
        run: function of a list of tensors.
    """

    __slots__ = ("run",)

    def __init__(self, run: Callable[[list[Tensor]], Sequence[Tensor]]) -> None:
        self.run = run

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self.run(list(tensors))


def direct_call(compiled: Call) -> DirectCall | None:
    """Return the code inside of what `compile_graph` returns, without the checks around it, or None if it is not found.

    The checks take about as long as the code of a small graph.
    """
    inner: Any = getattr(compiled, "_compiled_fn", None)
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    run = getattr(inner, "current_callable", None)
    return DirectCall(run) if callable(run) else None


@cache
def missing_compiler() -> str | None:
    """Return what torch says of a C++ compiler that it cannot find, or None if there is one."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # torch raises several kinds
        return one_line(error)
    return None
