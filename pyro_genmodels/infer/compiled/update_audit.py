"""Comparison of a step in a graph with the step that the optimiser itself makes of the program's gradients.

Gradients of a graph differ from those of the program by rounding, and an optimiser such as Adam can make a large difference of
a small one where a gradient is nearly zero. So the optimiser makes three steps, of copies: with the gradients of the program,
and with all of them somewhat smaller and larger. What lies between is not told apart.
"""

from __future__ import annotations

__all__ = ["compare_update"]

from collections import defaultdict
from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from pyro_genmodels.infer.compiled.audit import size_of_gradients, tolerance_of
from pyro_genmodels.infer.compiled.recorder import StaleGraphError
from pyro_genmodels.infer.compiled.updates import State, Update
from pyro_genmodels.utils.tensors import copied_like

ROUNDINGS = 3e3
"""Error of a gradient by rounding, in units of rounding of the largest gradient."""


def compare_update(
    update: Update,
    names: Sequence[str],
    expected: Sequence[Tensor | None],
    found: Sequence[tuple[Tensor, State]],
    eps: float,
) -> float:
    """Return the largest difference of parameters and optimiser state after a step, relative to the largest change of each.

    Args:
        update: the optimiser, before the step.
        names: names of its parameters.
        expected: loss of the program, and the gradient of each parameter, or None for zero.
        found: value and state of each parameter after the step in the graph.
        eps: unit of rounding of the coarsest dtype that the program computes in.

    Raises:
        StaleGraphError: if they differ by more than rounding can explain.
    """
    error = ROUNDINGS * eps * size_of_gradients(expected)
    difference = 0.0
    for i, (p, g) in enumerate(zip(update.parameters, expected[1:], strict=True)):
        gradient = torch.zeros_like(p) if g is None else g
        middle, *others = _steps_of_optimizer(update, i, [gradient, gradient - error, gradient + error])
        before = {"": p, **update.states()[i]}
        after = {"": found[i][0], **found[i][1]}
        for name, x in after.items():
            gap = _excess(x, middle[name], [other[name] for other in others]) / _size(middle[name] - before[name])
            if gap > tolerance_of(eps, is_built=True):
                what = f"{name} of the optimiser for the parameter {names[i]}" if name else f"the parameter {names[i]}"
                raise StaleGraphError(
                    f"A step in the graph changes {what} otherwise than {type(update.optimizers[i]).__name__} does with the "
                    f"same gradients (largest difference, relative to the change: {gap:.1e}). The compiler is at fault, or the "
                    "optimiser's formula. Take the mode Eager()."
                )
            difference = max(difference, gap)
    return difference


def _steps_of_optimizer(update: Update, i: int, gradients: Sequence[Tensor]) -> list[State]:
    """Return what a step of the i-th optimiser makes of its parameter ("") and state, for each of several gradients."""
    p, optimizer, clip = update.parameters[i], copy(update.optimizers[i]), update.clips[i]
    copies = [p.detach().clone() for _ in gradients]
    state = optimizer.state[p]
    optimizer.state = defaultdict(dict)
    for q, g in zip(copies, gradients, strict=True):
        q.grad = copied_like(g, q)
        optimizer.state[q] = {name: x.clone() if isinstance(x, Tensor) else x for name, x in state.items()}
        if (largest := clip.get("clip_norm")) is not None:
            clip_grad_norm_(q, largest)
        if (largest := clip.get("clip_value")) is not None:
            clip_grad_value_(q, largest)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": copies}]
    optimizer.step()
    return [{"": q, **{name: x for name, x in optimizer.state[q].items() if isinstance(x, Tensor)}} for q in copies]


def _excess(found: Tensor, middle: Tensor, others: Sequence[Tensor]) -> float:
    """Return the largest distance from a value, beyond twice the distance of others and rounding, infinite for NaN."""
    gap = torch.where((found == middle) | (found.isnan() & middle.isnan()), 0, (found - middle).abs())
    allowed = 2 * torch.stack([(other - middle).abs() for other in others]).amax(0)
    allowed = allowed + 8 * torch.finfo(middle.dtype).eps * middle.abs()
    gap, allowed = (x.nan_to_num(nan=torch.inf, posinf=torch.inf) for x in (gap, allowed))
    return float(torch.where(gap > allowed, gap - allowed, 0).max()) if gap.numel() else 0.0


def _size(change: Tensor) -> float:
    """Return the largest finite number of a change, at least the smallest one there is."""
    largest = float(change.abs().nan_to_num(0.0, 0.0).max()) if change.numel() else 0.0
    return max(largest, torch.finfo(change.dtype).tiny)
