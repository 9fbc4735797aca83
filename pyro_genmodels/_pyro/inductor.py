"""Torch's Inductor, for graphs whose inputs never change their shapes."""

from __future__ import annotations

__all__ = ["DirectCall", "compile_graph", "direct_call", "missing_compiler"]

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.types import Number

from pyro_genmodels.utils.errors import one_line

Call = Callable[..., Sequence[Tensor]]

aten = torch.ops.aten

OPTIONS = {"config_patches": {"fallback_random": True, "size_asserts": False}}
"""Random numbers are those of eager operations. Shapes are not checked at each call."""


def compile_graph(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Call:
    """Return a graph as compiled code, which torch also keeps on disk. Call it under `torch.no_grad`.

    What Inductor of torch 2.13 gets wrong is written otherwise: see `_exact_expm1`, `_fix_layouts` and `_strided_fill`.
    """
    module = _rewritten(module)
    return torch._inductor.standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs", options=OPTIONS)


def _rewritten(module: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that Inductor compiles rightly, which shares its tensors with the first."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        x = node.meta.get("val")
        if not isinstance(x, Tensor) or not isinstance(node.target, torch._ops.OpOverload):
            continue
        with graph.inserting_before(node):
            if node.target is aten.expm1.default and x.device.type == "cpu":
                new = _exact_expm1(graph, *node.args)
            elif torch.Tag.nondeterministic_seeded not in node.target.tags:
                continue
            elif not node.target._schema.is_mutable:
                _fix_layouts(graph, node, x)
                continue
            elif not x.is_contiguous() or not _is_fresh(node.args[0]):
                new = _strided_fill(graph, node, x)
            else:
                continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _exact_expm1(graph: fx.Graph, x: fx.Node) -> fx.Node:
    """Return exp(x) - 1, exact to some units of rounding also where x is nearly 0.

    On the CPU Inductor computes it as exp(x) - 1 as it stands, which loses all digits there. Kahan's formula
    (Higham, *Accuracy and Stability of Numerical Algorithms*, 1.14.1) divides the error of u = exp(x) out: (u - 1) x / log(u).
    """

    def call(function: Any, *args: Any) -> fx.Node:
        return graph.call_function(function, args)

    u = call(aten.exp.default, x)
    less = call(aten.sub.Tensor, u, 1.0)
    exact = call(aten.div.Tensor, call(aten.mul.Tensor, less, x), call(aten.log.default, u))
    small = call(aten.where.self, call(aten.eq.Scalar, less, 0.0), x, exact)
    return call(aten.where.self, call(aten.lt.Scalar, call(aten.abs.default, x), 1.0), small, less)


def _fix_layouts(graph: fx.Graph, node: fx.Node, result: Tensor) -> None:
    """Fix the strides of the tensors from which an operation draws random numbers.

    Inductor is free to choose other strides than eager operations have, and some operations, such as `torch.poisson`, return
    contiguous memory where Inductor expects the strides of their input. Either gives draws to other elements.
    """
    from torch._inductor import inductor_prims  # slow to import

    def fixed(x: fx.Node) -> fx.Node:
        value = x.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < 2:
            return x
        if result.is_contiguous():
            value = torch.empty(value.shape, device="meta")
        return graph.call_function(inductor_prims.force_stride_order, (x, list(value.stride())))

    node.args = fx.map_arg(node.args, fixed)


def _is_fresh(node: fx.Node) -> bool:
    """Return True for memory that has just been allocated, whose strides Inductor does not choose."""
    return str(node.target).startswith("aten.empty")


def _strided_fill(graph: fx.Graph, node: fx.Node, like: Tensor) -> fx.Node:
    """Return the node that does what a random operation in place, such as ``x.bernoulli_(0.5)``, does to x.

    Eager operations may draw in the order of the memory. Inductor loses the strides of x, so that the numbers are other ones.
    """
    x, *rest = node.args
    tensors = [y for y in rest if isinstance(y, fx.Node)]
    numbers = [y for y in rest if not isinstance(y, fx.Node)]
    layout = (list(like.shape), list(like.stride()), like.dtype, like.device)
    filled = graph.call_function(torch.ops.pyro_genmodels.filled.default, (str(node.target), *layout, tensors, numbers))
    return graph.call_function(aten.copy_.default, (x, filled))


@torch.library.custom_op("pyro_genmodels::filled", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def _filled(
    operation: str,
    size: Sequence[int],
    stride: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    tensors: Sequence[Tensor],
    numbers: Sequence[Number],
) -> Tensor:
    """Draw random numbers, by an operation in place, for a layout in memory."""
    _, name, overload = operation.split(".")
    x = torch.empty_strided(size, stride, dtype=dtype, device=device)
    return getattr(getattr(aten, name), overload)(x, *tensors, *numbers)


@_filled.register_fake
def _(operation, size, stride, dtype, device, tensors, numbers):  # type: ignore[no-untyped-def]
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


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
