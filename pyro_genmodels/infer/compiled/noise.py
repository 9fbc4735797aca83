"""The random numbers of a graph, drawn in one call and given to it."""

from __future__ import annotations

__all__ = ["Noise"]

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Noise:
    """The random numbers of a graph, drawn in one call for each distribution and dtype, and given to it.

    Args:
        module: the graph.
        enabled: False to leave the graph its own random numbers.
    """

    def __init__(self, module: fx.GraphModule, *, enabled: bool) -> None:
        self.module = module
        self.slices: dict[fx.Node, tuple[Any, int]] = {}
        self.sizes: dict[Any, int] = {}
        for node in module.graph.nodes if enabled else ():
            key = _kind(node)
            if key is not None:
                self.slices[node] = key, self.sizes.get(key, 0)
                self.sizes[key] = self.sizes.get(key, 0) + prod(node.meta["val"].shape)

    def draw(self, *shape: int) -> list[Tensor]:
        """Return random numbers for so many runs of the graph, (*shape, size)."""
        return [
            (torch.randn if kind == "normal" else torch.rand)(*shape, size, dtype=dtype, device=device)
            for (kind, dtype, device), size in self.sizes.items()
        ]

    def redraw(self, numbers: Sequence[Tensor]) -> None:
        """Draw random numbers anew, in place of those that `draw` returned."""
        for (kind, _, _), x in zip(self.sizes, numbers, strict=True):
            x.normal_() if kind == "normal" else x.uniform_()

    def run(self, numbers: Sequence[Tensor], *tensors: Tensor) -> Sequence[Any]:
        """Return the results of the graph with given random numbers, each (size,)."""
        return _Replay(self, dict(zip(self.sizes, numbers, strict=True))).run(*tensors)


class _Replay(fx.Interpreter):
    """A run of a graph whose random numbers are given."""

    def __init__(self, noise: Noise, numbers: dict[Any, Tensor]) -> None:
        super().__init__(noise.module)
        self.slices, self.numbers = noise.slices, numbers

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.slices:
            return super().run_node(n)
        key, start = self.slices[n]
        shape = n.meta["val"].shape
        numbers = self.numbers[key][start : start + prod(shape)].reshape(shape)
        if n.target in IN_PLACE:
            given: tuple[Any, ...] = n.args[1:]
            low, high = (*given, *(0.0, 1.0)[len(given) :])
            return numbers * high + low if key[0] == "normal" else numbers * (high - low) + low
        return numbers


IN_PLACE = {aten.normal_.default: "normal", aten.uniform_.default: "uniform"}
FRESH = {
    aten.randn.default: "normal",
    aten.randn_like.default: "normal",
    aten.rand.default: "uniform",
    aten.rand_like.default: "uniform",
}


def _kind(node: fx.Node) -> Any:
    """Return the distribution, dtype and device of a node's random numbers if these can be drawn before, and otherwise None."""
    if node.target in IN_PLACE:
        empty = node.args[0]
        fresh = isinstance(empty, fx.Node) and "empty" in str(empty.target) and list(empty.users) == [node]
        if not fresh or any(isinstance(x, fx.Node) for x in node.args[1:]) or node.kwargs:
            return None
        name = IN_PLACE[node.target]
    elif node.target in FRESH:
        name = FRESH[node.target]
    else:
        return None
    return name, node.meta["val"].dtype, node.meta["val"].device
