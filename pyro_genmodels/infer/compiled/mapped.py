"""Graphs that `torch.vmap` maps over points at once, without operations that it would run in a loop or refuse."""

from __future__ import annotations

__all__ = ["mappable"]

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize

from pyro_genmodels.infer.compiled.graph import Graph, trace

aten = torch.ops.aten


def mappable(graph: Graph, x: Tensor) -> Callable[[Tensor], tuple[Any, ...]]:
    """Return a graph of one point as a function that can be mapped over points, by operations that change no tensor in place.

    Args:
        graph: a function of one tensor.
        x: a tensor like those that it takes.

    Raises:
        CaptureError: if it has an operation in place that has no other form.
    """

    def run(x: Tensor) -> tuple[Any, ...]:
        return tuple(graph.module(x, *graph.read)[: graph.num_outputs])

    functional = trace(functionalize(run), x)
    interpreter = _Interpreter(functional.module)
    return lambda x: interpreter.run(x, *functional.read)[: functional.num_outputs]


class _Interpreter(fx.Interpreter):
    """A run of a graph, one operation after another, some by others with the same result."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function" and n.target in REPLACED:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if not kwargs and (result := REPLACED[n.target](n, *args)) is not None:
                return result
        return super().run_node(n)


def _copied(_node: fx.Node, x: Tensor, source: Tensor, *_: Any) -> Tensor:
    return source.to(x).expand(x.shape)


def _viewed(_node: fx.Node, x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(shape)


def _filled(_node: fx.Node, x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    return torch.where(mask, value.to(x), x)


def _put(_node: fx.Node, x: Tensor, indices: list[Tensor | None], value: Tensor, *accumulate: bool) -> Tensor | None:
    """Return what an assignment makes of x, if it sets one number where a mask of the shape of x is true."""
    mask = indices[0]
    if any(accumulate) or len(indices) > 1 or mask is None or mask.dtype != torch.bool or mask.shape != x.shape or value.dim():
        return None
    return _filled(_node, x, mask, value)


def _strided(node: fx.Node, x: Tensor, size: list[int], stride: list[int], offset: int | None = None) -> Tensor | None:
    """Return a view by strides of a tensor, if it lies in memory without gaps."""
    if not _is_dense(node.args[0]):
        return None
    return x.reshape(-1)[_places(size, stride, offset or 0, x.device)].reshape(size)


def _scattered(
    node: fx.Node, x: Tensor, source: Tensor, size: list[int], stride: list[int], offset: int | None = None
) -> Tensor | None:
    """Return a tensor with a view of it by strides replaced, if it lies in memory without gaps."""
    if not _is_dense(node.args[0]):
        return None
    places = _places(size, stride, offset or 0, x.device)
    return x.reshape(-1).index_put((places,), source.to(x.dtype).reshape(-1)).reshape(x.shape)


def _sliced(
    _node: fx.Node, x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    places = torch.arange(x.shape[dim], device=x.device)[start:end:step]
    return x.movedim(dim, 0).index_put((places,), source.to(x.dtype).movedim(dim, 0)).movedim(0, dim)


def _is_dense(node: Any) -> bool:
    """Return True for a tensor in the order of its elements, from the start of its memory."""
    x = node.meta["val"]
    return x.is_contiguous() and x.storage_offset() == 0


def _places(size: list[int], stride: list[int], offset: int, device: torch.device) -> Tensor:
    """Return the places in memory of the elements of a view, (elements,)."""
    places = torch.full((prod(size),), offset, device=device)
    for length, step, axis in zip(size, stride, range(len(size)), strict=True):
        shape = [length if i == axis else 1 for i in range(len(size))]
        places = places + (step * torch.arange(length, device=device)).reshape(shape).expand(size).reshape(-1)
    return places


REPLACED: Mapping[Any, Callable[..., Tensor | None]] = {
    aten.copy.default: _copied,
    aten.fill.Tensor: _copied,
    aten.view.default: _viewed,
    aten.masked_fill.Tensor: _filled,
    aten.index_put.default: _put,
    aten.as_strided.default: _strided,
    aten.as_strided_scatter.default: _scattered,
    aten.slice_scatter.default: _sliced,
}
"""Functions that do the same as operations; they return None where they do not."""
