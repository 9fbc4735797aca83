"""Torch's Inductor, for graphs whose inputs never change their shapes."""

from __future__ import annotations

__all__ = ["DirectCall", "compile_graph", "direct_call", "missing_compiler", "record"]

from collections.abc import Callable, Sequence
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx
from torch.types import Number
from torch.utils._python_dispatch import TorchDispatchMode

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


def record(
    direct: DirectCall, arguments: Sequence[Sequence[Tensor]], results: Sequence[Tensor]
) -> list[Callable[[], Any]] | None:
    """Return what compiled code does in some calls, one after another, as functions without arguments, or None.

    Inductor's code is one or a few kernels in C++, and Python around them that allocates the memory of each intermediate
    result. For a small graph the Python takes 20 times as long as the kernels. Here the code is run once for each of the calls.
    The memory that it allocates is kept, and its kernels and torch's operations are noted with their arguments. All calls use
    the same memory. They are valid as long as the arguments stay where they are in memory. Call it under `torch.no_grad`.

    It is None if the code reads a value into Python, or has no kernels. A kernel that is not found here would be left out:
    compare the results with those of the code itself.

    Args:
        direct: compiled code, on the CPU, with one result.
        arguments: arguments of each call.
        results: memory for the result of each call.
    """
    function = getattr(direct.run, "__func__", None)
    names = getattr(function, "__globals__", {})
    kernels = {name: x for name, x in names.items() if isinstance(x, BuiltinFunctionType) and x.__name__ == "kernel"}
    if function is None or not kernels or "empty_strided_cpu" not in names:
        return None
    calls: list[Callable[[], Any]] = []
    memory: list[Tensor] = []
    used = 0

    def allocate(*layout: Any) -> Tensor:
        nonlocal used
        if used == len(memory):
            memory.append(names["empty_strided_cpu"](*layout))
        used += 1
        return memory[used - 1]

    def noted(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(partial(kernel, *args))
            return kernel(*args)

        return call

    own_names = names | {name: noted(x) for name, x in kernels.items()} | {"empty_strided_cpu": allocate}
    run = FunctionType(function.__code__, own_names, function.__name__, function.__defaults__, function.__closure__)
    place: int | None = None  # of the result among the memory
    for tensors, result in zip(arguments, results, strict=True):
        used = 0
        if place is not None:
            memory[place] = result.as_strided(memory[place].shape, memory[place].stride())
        try:
            with _Noted(calls):
                (found,) = run(direct.run.__self__, [x.detach() for x in tensors])  # type: ignore[attr-defined]
        except _ValueReadError:
            return None
        if found.data_ptr() != result.data_ptr():
            calls.append(partial(result.copy_, found))
            layout = (found.data_ptr(), result.numel(), result.dtype)
            whole = [(x.data_ptr(), x.numel(), x.dtype) == layout for x in memory]
            place = whole.index(True) if True in whole else None
    return calls


class _ValueReadError(Exception):
    """A value that compiled code reads into Python."""


class _Noted(TorchDispatchMode):
    """A note of torch's operations, each as a function that makes it again with the same memory.

    Args:
        calls: list to which these functions are added.
    """

    def __init__(self, calls: list[Callable[[], Any]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        again = partial(func, *args, **(kwargs or {}))
        result = again()
        results = result if isinstance(result, tuple | list) else (result,)
        if not all(isinstance(x, Tensor) for x in results):
            raise _ValueReadError
        if func._schema.is_mutable:
            self.calls.append(again)
        elif not any(x.alias_info for x in func._schema.returns):  # views share memory already
            self.calls.append(partial(_copy_results, again, results))
        return result


def _copy_results(function: Callable[[], Any], memory: Sequence[Tensor]) -> None:
    """Write the results of a function where those of an earlier call are."""
    results = function()
    for old, new in zip(memory, results if isinstance(results, tuple | list) else (results,), strict=True):
        old.copy_(new)


@cache
def missing_compiler() -> str | None:
    """Return what torch says of a C++ compiler that it cannot find, or None if there is one."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:  # torch raises several kinds
        return one_line(error)
    return None
