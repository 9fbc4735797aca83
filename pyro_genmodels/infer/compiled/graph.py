"""Functions of tensors as graphs of operations: traced once, with every tensor that they read as an input.

`trace` runs a function once and records its operations. A tensor that the function reads and does not make, such as a
parameter, a buffer or data in a closure, becomes an input of the graph, by identity: the graph is called with that very tensor,
so that a change of its values is seen.
"""

from __future__ import annotations

__all__ = ["Graph", "trace"]

import operator
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from pyro_genmodels._pyro.tracing import make_fx
from pyro_genmodels.infer.compiled.recorder import (
    LIFTS,
    WAY_OUT,
    CaptureError,
    FixedTensor,
    Recorder,
    RefusedReads,
    is_memory_of_others,
    put_back,
)
from pyro_genmodels.utils.rng import forked_rng

aten = torch.ops.aten

TRACER = tuple(f"{Path(torch.__file__).parent / folder}{os.sep}" for folder in ("fx", "_subclasses"))
"""Folders of torch's tracer."""

LARGE_MATRIX = 8192
"""Number of elements from which on a product of matrix and vector is left to a library of linear algebra."""


@dataclass(frozen=True)
class Graph:
    """A function of tensors as a graph.

    Attributes:
        module: graph, a function of the arguments and of the tensors that it reads.
        read: tensors that it reads and does not make, by identity.
        written: memory, flat, that it changes and that is not its own, such as that of running means.
        moving: tensors among `read` that it changes; they may have been moved to other memory, as by ``p.data = ...``.
        fixed: tensors whose values Python code has read during the capture.
        num_outputs: number of its results; more stand after them, if random numbers are drawn that nothing uses.
    """

    module: fx.GraphModule
    read: tuple[Tensor, ...]
    written: tuple[Tensor, ...]
    fixed: tuple[FixedTensor, ...]
    num_outputs: int
    moving: tuple[Tensor, ...]

    @property
    def num_operations(self) -> int:
        """Number of operations."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of the results of its operations."""
        return {dtype for node in self.module.graph.nodes if (dtype := _dtype(node)) is not None}

    def largest_size(self) -> int:
        """Return the number of elements of the largest tensor that is computed from the first input."""
        nodes = iter(self.module.graph.nodes)
        reached, size = {next(nodes)}, 1
        for node in nodes:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
                value = node.meta.get("val")
                size = max(size, value.numel() if isinstance(value, torch.Tensor) else 1)
        return size

    def random_operations(self) -> list[str]:
        """Return the names of operations that draw random numbers from which other results are computed."""
        return [
            str(node.target)
            for node in self.module.graph.nodes
            if _is_random(node) and any(u.op != "output" for u in node.users)
        ]

    def changed(self) -> str | None:
        """Return a text about a tensor whose values were read during the capture and have changed since, or None."""
        for fixed in self.fixed:
            if fixed.has_changed():
                return f"the values of a tensor of shape {tuple(fixed.tensor.shape)} that Python code reads"
        return None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the results, computed one operation after another."""
        with torch.no_grad():
            return self.module(*tensors, *self.read)[: self.num_outputs]

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Run code that calls the graph without a lasting effect on the tensors that it changes, or on random numbers."""
        before = [(x, x.clone()) for x in (*self.written, *(x.detach() for x in self.moving))]
        with forked_rng():
            try:
                yield
            finally:
                for x, value in before:
                    x.copy_(value)


def trace(function: Callable[..., Sequence[Any]], *inputs: Tensor, varying: Iterable[Tensor] = ()) -> Graph:
    """Return a function as a graph. The function is run once, without a lasting effect on tensors and random numbers.

    Args:
        function: function of tensors; it returns a sequence of tensors and may contain None.
        inputs: tensors like those of later calls.
        varying: tensors that the function reads and whose values change from call to call, such as parameters.

    Raises:
        CaptureError: if the function branches on values, or has shapes that depend on values, or reads a tensor that was
            computed from a parameter before. The message names the line.

    Example:
        >>> scale = torch.tensor([2.0, 3.0])
        >>> graph = trace(lambda x: (x * scale,), torch.ones(2))
        >>> scale += 1  # is seen
        >>> graph(torch.ones(2))
        (tensor([3., 4.]),)
    """
    for x in inputs:
        if x.layout != torch.strided:
            raise CaptureError(f"an argument of shape {tuple(x.shape)} is sparse. Pass x.to_dense(). {WAY_OUT}")
    sites: list[Recorder] = []
    count = 0

    def run(*tensors: Tensor) -> tuple[Any, ...]:
        nonlocal count
        recorder = Recorder(refuse=True, varying=(*inputs, *varying))
        sites.append(recorder)
        with recorder.sites, recorder, RefusedReads(recorder):
            results = function(*tensors)
        if not isinstance(results, tuple | list):
            raise TypeError(f"A function to be captured returns a tuple of tensors, but this one returned {type(results)}.")
        results = tuple(results)
        count = len(results)
        return results

    with put_back() as outer:
        try:
            module = make_fx(run)(*(x.detach() for x in inputs))
        except CaptureError:
            raise
        except Exception as error:
            if not sites or not _is_of_tracer(error):
                raise
            where = sites[-1].where(traceback.extract_tb(error.__traceback__))
            raise CaptureError(f"{_first_line(error)}{where}. {WAY_OUT}") from error
    read = _lift(module, len(inputs))
    for x in read:
        if x.grad_fn is not None:
            raise CaptureError(
                f"a tensor of shape {tuple(x.shape)} was computed from a parameter, by {x.grad_fn.name()}, before the capture. "
                "Compute it inside of the model, or detach it."
            )
    _simplify(module)
    _keep_random_numbers(module)
    _remove_unused_tensors(module)
    changed = {x.untyped_storage().data_ptr() for x in outer.written}
    moving = tuple(x for x in read if x.untyped_storage().data_ptr() in changed)
    return Graph(module, read, outer.written, tuple(sites[-1].fixed.values()), count, moving)


def _is_of_tracer(error: Exception) -> bool:
    """Return True for an error of torch's tracer, which an eager run would not raise."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(TRACER)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _lift(module: fx.GraphModule, num_inputs: int) -> tuple[Tensor, ...]:
    """Make every tensor that the graph reads an input, and return these tensors. Constants of the program stay in the graph.

    A tensor that the program makes of an array of numpy, by `torch.as_tensor(array)` or `torch.tensor(array)`, is the array's
    memory. It becomes an input, so that changes of the array are seen in every mode.
    """
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:] if num_inputs else []
    inputs: dict[int, fx.Node] = {}
    read: list[Tensor] = []
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        x = operator.attrgetter(str(node.target))(module)
        if not is_memory_of_others(x) and node.users and all(user.target in LIFTS for user in node.users):
            continue  # torch.tensor(...) of Python numbers inside of the program
        if id(x) not in inputs:
            where = graph.inserting_after(last[-1]) if last else graph.inserting_before(next(iter(graph.nodes)))
            with where:
                new = graph.placeholder(f"read_{len(read)}")
            new.meta = dict(node.meta)
            last.append(new)
            inputs[id(x)] = new
            read.append(x)
        node.replace_all_uses_with(inputs[id(x)])
        graph.erase_node(node)
    module.recompile()
    return tuple(read)


def _remove_unused_tensors(module: fx.GraphModule) -> None:
    """Remove tensors that the graph no longer names: a compiler would make each an input, used or not."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [*module._parameters, *module._buffers, *(name for name, x in vars(module).items() if isinstance(x, Tensor))]:
        if name not in used:
            delattr(module, name)


def _keep_random_numbers(module: fx.GraphModule) -> None:
    """Return random numbers that nothing uses too, so that no compiler removes them: the next ones would be others."""
    graph = module.graph
    unused = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        and not node.users
        and not node.target._schema.is_mutable
    ]
    if unused:
        output = next(iter(reversed(graph.nodes)))
        output.args = (tuple(output.args[0]) + tuple(unused),)
        module.recompile()


def _simplify(module: fx.GraphModule) -> None:
    """Remove operations without effect, and make numbers of constants of one element."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in LIFTS:
            constant = operator.attrgetter(str(node.args[0].target))(module) if node.args[0].op == "get_attr" else None
            if constant is not None and constant.numel() == 1 and not _is_written(node):
                with graph.inserting_before(node):
                    new = graph.call_function(
                        aten.full.default,
                        (list(constant.shape), constant.item()),
                        {"dtype": constant.dtype, "device": constant.device},
                    )
                new.meta = dict(node.meta)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
        elif node.op == "call_function" and node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.mv.default and _is_large(node.args[0]):
            _use_matrix_product(node)
        elif node.target is aten.view.dtype and _dtype(node.args[0]) == torch.bool and not _is_written(node):
            node.target = aten._to_copy.default  # Inductor of torch 2.11 cannot look at truth values as bytes on a GPU
            node.args, node.kwargs = (node.args[0],), {"dtype": node.args[1]}
    graph.eliminate_dead_code(lambda node: node.is_impure() or _is_random(node))
    graph.lint()
    module.recompile()


def _is_large(node: Any) -> bool:
    """Return True for a matrix of doubles or floats on the CPU that has many elements."""
    x = node.meta.get("val")
    return x is not None and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.numel() >= LARGE_MATRIX


def _use_matrix_product(node: fx.Node) -> None:
    """Make a product of a matrix and a vector one of a row and the transposed matrix.

    Inductor would write loops of its own for the former, which take three times as long as a library on the CPU, and torch's
    own operation takes twice as long.
    """
    matrix, vector = node.args
    graph = node.graph
    with graph.inserting_before(node):
        row = graph.call_function(aten.unsqueeze.default, (vector, 0))
        transposed = graph.call_function(aten.t.default, (matrix,))
        product = graph.call_function(aten.mm.default, (row, transposed))
        new = graph.call_function(aten.squeeze.dim, (product, 0))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None) if isinstance(node, fx.Node) else None


def _is_written(node: fx.Node) -> bool:
    return any(schema.is_mutable for user in node.users if (schema := getattr(user.target, "_schema", None)))
