"""Steps of inference as a graph: loss, gradients and optimiser, once or several times.

A call of a compiled graph costs as much as the arithmetic of hundreds of numbers, and so does each draw of random numbers. For
a small model these are the cost of a step. So a graph can hold several steps, and draw the normal and uniform numbers of all of
them at once. The law of the draws is that of single steps; the stream is another one.
"""

from __future__ import annotations

__all__ = ["Noise", "choose_unroll", "next_step", "steps_in_place"]

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.updates import State, Update

aten = torch.ops.aten

SIZES = (1, 4, 16)
"""Numbers of steps in one graph among which one is chosen."""

CALL_SECONDS = 6e-5
"""Seconds that a call of a compiled graph takes for itself, about."""


def choose_unroll(num_steps: int, step_seconds: float, build_seconds: float) -> int:
    """Return the number of steps in one graph for which a run ends first, compile time included.

    Args:
        num_steps: number of steps to make.
        step_seconds: seconds of one step, in a graph of its own.
        build_seconds: seconds that it took to compile that graph.

    Example:
        >>> choose_unroll(1_000, 1e-4, 5.0), choose_unroll(10_000_000, 1e-4, 5.0), choose_unroll(10_000_000, 1e-2, 5.0)
        (1, 16, 1)
    """

    def seconds(size: int) -> float:
        saved = min(CALL_SECONDS, 0.7 * step_seconds) * (1 - 1 / size)
        return num_steps * (step_seconds - saved) + (build_seconds * (1 + size / 4) if size > 1 else 0.0)

    best = min(SIZES, key=seconds)
    return best if seconds(best) < 0.9 * seconds(1) else 1


def steps_in_place(program: Program, update: Update, num_steps: int, *, draw_at_once: bool) -> Callable[..., list[Tensor]]:
    """Return a function of inputs and rates that makes steps in place and returns their losses, (num_steps,).

    A step whose loss is not finite changes no parameter.

    Args:
        program: the captured loss.
        update: the optimiser.
        num_steps: number of steps.
        draw_at_once: True to draw the random numbers of all steps at once.
    """
    noise = Noise(program.graph.module, enabled=draw_at_once)

    @torch.no_grad()
    def steps(*tensors: Tensor) -> list[Tensor]:
        *inputs, rates = tensors
        values, states = [p.detach() for p in update.parameters], update.states()
        new_values, new_states, losses = values, states, []
        numbers = noise.draw(num_steps)
        for k in range(num_steps):
            drawn = [x[k] for x in numbers]
            loss, new_values, new_states = next_step(program, update, noise, inputs, rates[k], drawn, new_values, new_states)
            losses.append(loss)
        for old, new in zip(values, new_values, strict=True):
            old.copy_(new)
        for old_state, new_state in zip(states, new_states, strict=True):
            for name, x in old_state.items():
                if new_state[name] is not x:
                    x.copy_(new_state[name])
        return [torch.stack(losses)]

    return steps


def next_step(
    program: Program,
    update: Update,
    noise: Noise,
    inputs: Sequence[Tensor],
    rates: Tensor,
    numbers: Sequence[Tensor],
    values: Sequence[Tensor],
    states: Sequence[State],
) -> tuple[Tensor, list[Tensor], list[State]]:
    """Return the loss () and the next parameters and states, which are the old ones if the loss is not finite.

    Args:
        program: the captured loss.
        update: the optimiser.
        noise: how random numbers are given to the program.
        inputs: tensors among the program's arguments.
        rates: learning rates.
        numbers: random numbers, as `Noise.draw` returns them for one step.
        values: parameters.
        states: states of the optimiser.
    """
    graph = program.graph
    current = {id(p): value for p, value in zip(update.parameters, values, strict=True)}
    read = [current.get(id(x), x) for x in graph.read]
    loss, *gradients = noise.run(numbers, *inputs, *read)[: graph.num_outputs]
    gradients = [g for g, has in zip(gradients, program.has_gradient, strict=True) if has]
    new_values, new_states = update.step(values, gradients, states, rates)
    is_finite = loss.isfinite()
    next_values = [torch.where(is_finite, new, old) for new, old in zip(new_values, values, strict=True)]
    next_states = [
        state | {name: torch.where(is_finite, x, state[name]) for name, x in new.items()}
        for state, new in zip(states, new_states, strict=True)
    ]
    return loss, next_values, next_states


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
