"""Steps of inference as a graph: loss, gradients and optimiser, once or several times.

A call of a compiled graph costs as much as the arithmetic of hundreds of numbers, and so does each draw of random numbers. For
a small model these are the cost of a step. So a graph can hold several steps, and draw the normal and uniform numbers of all of
them at once. The law of the draws is that of single steps; the stream is another one.
"""

from __future__ import annotations

__all__ = ["Steps", "choose_unroll", "next_step", "steps_in_place"]

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels.infer.compiled.graph import trace
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.infer.compiled.noise import Noise
from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.updates import State, Update

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


class Steps:
    """Steps of a program in one graph, built for a mode.

    Args:
        program: the captured loss.
        update: the optimiser.
        inputs: tensors among the arguments.
        mode: how the graph is run.
        num_steps: number of steps.
        draw_at_once: True to draw the random numbers of all steps at once.

    Attributes:
        seconds: time that it took to build them.
    """

    def __init__(
        self, program: Program, update: Update, inputs: Sequence[Tensor], mode: Mode, num_steps: int, *, draw_at_once: bool
    ) -> None:
        start = time.perf_counter()
        self.update, self.num_steps = update, num_steps
        self._rates = update.rates(num_steps)
        self._rates_tensor = torch.tensor(self._rates, dtype=torch.float64, device=update.device)
        function = steps_in_place(program, update, num_steps, draw_at_once=draw_at_once)
        with exclusive("the capture of a step", wait=True):
            self.graph = trace(function, *inputs, self._rates_tensor)
        self._run = mode.build(self.graph, [*inputs, self._rates_tensor])
        self.seconds = time.perf_counter() - start

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Make the steps, and return their losses, (num_steps,). Those with a loss that is not finite change no parameter."""
        self._follow_rates()
        losses = self._losses(*inputs)
        self.update.count(int(losses.isfinite().sum()) if self.update.is_counted else 0)
        return losses

    def _follow_rates(self) -> None:
        """Read the learning rates of the optimisers."""
        rates = self.update.rates(self.num_steps)
        if rates != self._rates:
            self._rates, self._rates_tensor = rates, torch.tensor(rates, dtype=torch.float64, device=self.update.device)

    def tried(self, *inputs: Tensor) -> tuple[Tensor, list[tuple[Tensor, State]]]:
        """Return the losses of steps that are put back, (num_steps,), and each parameter and its state after them."""
        self._follow_rates()
        with self.graph.put_back(), torch.no_grad():
            losses = self._losses(*inputs).clone()
            states = [{name: x.clone() for name, x in state.items()} for state in self.update.states()]
            return losses, [(p.detach().clone(), state) for p, state in zip(self.update.parameters, states, strict=True)]

    def _losses(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(*inputs, self._rates_tensor, *self.graph.read)[0]


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
    found = {id(p): g for p, g in zip(program.parameters.values(), gradients, strict=True)}
    pairs = zip(update.parameters, values, strict=True)
    gradients = [value.new_zeros(value.shape) if (g := found[id(p)]) is None else g for p, value in pairs]
    new_values, new_states = update.step(values, gradients, states, rates)
    is_finite = loss.isfinite()
    next_values = [torch.where(is_finite, new, old) for new, old in zip(new_values, values, strict=True)]
    next_states = [
        state | {name: torch.where(is_finite, x, state[name]) for name, x in new.items()}
        for state, new in zip(states, new_states, strict=True)
    ]
    return loss, next_values, next_states
