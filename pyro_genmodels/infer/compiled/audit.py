"""Comparisons of captured graphs with the programs they stand for, and the record of what was captured and compared."""

from __future__ import annotations

__all__ = ["Finding", "compare", "size_of_gradients", "tolerance_of"]

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.recorder import StaleGraphError

TINY = 1e-30
"""Size of gradients that are all zero."""


@dataclass(frozen=True)
class Finding:
    """One capture, build or comparison.

    Attributes:
        kind: "capture" of a program for new shapes or arguments, "changed" for a capture after something has changed, "built"
            for one step or several with their optimiser, put into a graph and compiled, or "audit".
        name: what has changed, or how many steps were built.
        calls: number of calls before: of all programs for a capture, and otherwise of this program.
        seconds: time that it took.
        difference: largest difference from the program, relative to the sizes of loss and gradients; None if none was made.
        num_operations: number of operations of the graph.
    """

    kind: Literal["capture", "changed", "built", "audit"]
    name: str
    calls: int
    seconds: float
    difference: float | None = None
    num_operations: int | None = None


def compare(
    expected: Sequence[Any], found: Sequence[Any], names: Sequence[str], eps: float, *, is_built: bool = False
) -> float:
    """Return the largest difference of the loss and the gradients, relative to their sizes.

    The size is that of the loss, or 1 if that is larger. For gradients it is that of the largest of all of them, or a
    hundredth of the loss if that is larger, since a gradient may be a small sum of large terms.

    Args:
        expected: loss and gradients of the program.
        found: those of its graph, or the loss alone.
        names: names of the parameters.
        eps: unit of rounding of the coarsest dtype that the program computes in.
        is_built: True for those of the built graph, whose rounding is another one.

    Raises:
        StaleGraphError: if they differ by more than rounding can explain.
    """
    loss: Any = expected[0]
    size, others = max(1.0, _size(loss)), size_of_gradients(expected)
    difference = 0.0
    for i, (a, b) in enumerate(zip(expected, found, strict=False)):
        if (a is None) != (b is None):
            name = names[i - 1]
            where = "the captured graph and none in the program" if a is None else "the program and none in the captured graph"
            raise StaleGraphError(
                f"The parameter {name} has a gradient in {where}: the path from it to the loss was changed, in a way that "
                "cannot be seen, since the program was captured."
            )
        if a is not None and a.numel():
            difference = max(difference, _gap(a, b) / (others if i else size))
    if difference > tolerance_of(eps, is_built=is_built):
        what = "compiled code" if is_built else "captured graph"
        cause = (
            "The graph before the compiler is right, so that the compiler is at fault, or an optimiser's formula, or "
            "rounding of an ill-conditioned program. Take the mode Captured(script=False) or Eager(), or float64."
            if is_built
            else "Something that the program reads was changed since it was captured, in a way that cannot be seen: "
            "numbers of an array that Python code computes with, a counter, or random numbers of Python or numpy. Pass it "
            "as an argument, as a tensor."
        )
        raise StaleGraphError(
            f"The {what} gives a loss of {_first(found[0]):.9g} where the program gives {_first(loss):.9g} with the same "
            f"random numbers (largest difference of loss and gradients, relative: {difference:.1e}). {cause}"
        )
    return difference


def size_of_gradients(outputs: Sequence[Any]) -> float:
    """Return the size of the largest gradient, or a hundredth of the loss if that is larger, of loss and gradients."""
    loss, *gradients = map(_size, outputs)
    return max(*gradients, loss / 100, TINY)


def _first(x: Any) -> float:
    return float(x.reshape(-1)[0])


def _size(x: Tensor | None) -> float:
    """Return the largest absolute value of the finite numbers of a tensor."""
    return float(torch.where(x.isfinite(), x, 0).abs().max()) if x is not None and x.numel() else 0.0


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference, infinite if one is not a number, or infinite, where the other is another."""
    is_same = (a == b) | (a.isnan() & b.isnan())  # infinities of one sign are equal
    return float(torch.where(is_same, 0, (a - b).abs()).nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def tolerance_of(eps: float, *, is_built: bool = False) -> float:
    """Return the largest relative difference that rounding may make between the program and its graph, at most 5 %.

    Args:
        eps: unit of rounding of the coarsest dtype that the program computes in.
        is_built: True for compiled code, which sums in another order.
    """
    return min(0.05, eps * (3e4 if is_built else 1e3))
