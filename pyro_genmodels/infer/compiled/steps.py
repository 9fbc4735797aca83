"""Steps of inference as a graph: loss, gradients and optimiser, one step or several at once.

A call of a compiled graph costs as much as the arithmetic of thousands of numbers, and a draw of random numbers that of
hundreds. For a small model these are the cost of a step. So several steps can be made at once: their normal and uniform numbers
are drawn together, and then the kernels of step after step are called, with nothing in between. The law of the draws is that of
single steps; the stream is another one.
"""

from __future__ import annotations

__all__ = ["Steps", "choose_unroll", "next_step", "steps_in_place"]

import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels._pyro.inductor import DirectCall
from pyro_genmodels._pyro.kernel_calls import record_runs
from pyro_genmodels.infer.compiled.graph import trace
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.infer.compiled.noise import Noise
from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.updates import State, Update

SIZES = {"cpu": (1, 64), "cuda": (1, 4, 16)}
"""Numbers of steps made at once among which one is chosen."""

CALL_SECONDS = 1e-4
"""Seconds that a step of a small model takes beside its arithmetic, about."""


def choose_unroll(num_steps: int, step_seconds: float, build_seconds: float, device: str = "cpu") -> int:
    """Return the number of steps made at once for which a run ends first, compile time included.

    Args:
        num_steps: number of steps to make.
        step_seconds: seconds of one step, in a graph of its own.
        build_seconds: seconds that it took to compile that graph.
        device: type of the device. On the CPU another graph of one step is compiled, elsewhere one of all steps.

    Example:
        >>> choose_unroll(1_000, 1e-4, 5.0), choose_unroll(10_000_000, 1e-4, 5.0), choose_unroll(10_000_000, 1e-2, 5.0)
        (1, 64, 1)
    """

    def seconds(size: int) -> float:
        saved = min(CALL_SECONDS, 0.8 * step_seconds) * (1 - 1 / size)
        build = build_seconds * (1.0 if device == "cpu" else 1 + size / 4)
        return num_steps * (step_seconds - saved) + (build if size > 1 else 0.0)

    best = min(SIZES.get(device, SIZES["cuda"]), key=seconds)
    return best if seconds(best) < 0.9 * seconds(1) else 1


class Steps:
    """Steps of a program, built for a mode, that are made at once.

    On the CPU a graph of one step is called again and again, with the random numbers of all steps drawn before. Of compiled
    code the kernels alone are called, with memory that is allocated once. On a GPU one graph holds all steps.

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
        self._noise = Noise(program.graph.module, enabled=draw_at_once)
        self._is_repeated = num_steps > 1 and update.device.type == "cpu"
        self._numbers = self._noise.draw(num_steps) if self._is_repeated else []
        size = 1 if self._is_repeated else num_steps
        function = steps_in_place(program, update, self._noise, size, num_inputs=len(inputs))
        given = self._given(inputs, 0) if self._is_repeated else [*inputs, self._rates_tensor]
        with exclusive("the capture of a step", wait=True):
            self.graph = trace(function, *given)
        self._run = mode.build(self.graph, given)
        self._recording: _Recording | None = None
        self._lock = Lock()  # a recording has memory for one call at a time
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
            self._rates = rates
            self._rates_tensor.copy_(torch.tensor(rates, dtype=torch.float64))

    def tried(self, *inputs: Tensor) -> tuple[Tensor, list[tuple[Tensor, State]]]:
        """Return the losses of steps that are put back, (num_steps,), and each parameter and its state after them."""
        self._follow_rates()
        with self.graph.put_back(), torch.no_grad():
            losses = self._losses(*inputs).clone()
            states = [{name: x.clone() for name, x in state.items()} for state in self.update.states()]
            return losses, [(p.detach().clone(), state) for p, state in zip(self.update.parameters, states, strict=True)]

    @torch.no_grad()
    def _losses(self, *inputs: Tensor) -> Tensor:
        if not self._is_repeated:
            return self._run(*inputs, self._rates_tensor, *self.graph.read)[0]
        with self._lock:
            if self._recording is None or not self._recording.holds([*inputs, *self.graph.read]):
                self._recording = self._record(inputs)
            self._noise.redraw(self._numbers)
            return self._recording.losses() if self._recording.calls else self._one_by_one(inputs)

    def _given(self, inputs: Sequence[Tensor], k: int) -> list[Tensor]:
        """Return the arguments of the graph at the k-th step."""
        return [*inputs, self._rates_tensor[k : k + 1], *(x[k : k + 1] for x in self._numbers)]

    def _one_by_one(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the losses of steps with the random numbers that are drawn."""
        return torch.cat([self._run(*self._given(inputs, k), *self.graph.read)[0] for k in range(self.num_steps)])

    def _record(self, inputs: Sequence[Tensor]) -> _Recording:
        """Return a recording of the steps, without calls if they cannot be recorded."""
        tensors = [*inputs, *self.graph.read]
        with self.graph.put_back():
            made = self._one_by_one(inputs)
        if not isinstance(self._run, DirectCall):
            return _Recording(tensors, (), made)
        arguments = [[*self._given(inputs, k), *self.graph.read] for k in range(self.num_steps)]
        with self.graph.put_back():
            calls = record_runs(self._run.run, arguments, made.split(1)) or []
        recording = _Recording(tensors, calls, made)

        def results(function: Callable[[], Tensor]) -> list[Tensor]:
            with self.graph.put_back():
                self._noise.redraw(self._numbers)  # other ones than those of the recording
                return [function().clone(), *(x.clone() for x in (*self.graph.written, *self.graph.moving))]

        pairs = zip(results(recording.losses), results(lambda: self._one_by_one(inputs)), strict=True)
        agree = all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs)
        return recording if agree else _Recording(tensors, (), made)


class _Recording:
    """Calls of kernels that make steps, with tensors where they are in memory.

    Args:
        tensors: tensors that are read or written.
        calls: calls of kernels, or none if steps are not recorded.
        made: memory of the losses.
    """

    def __init__(self, tensors: Sequence[Tensor], calls: Sequence[Callable[[], Any]], made: Tensor) -> None:
        self.calls, self.made = calls, made
        self.addresses = [x.data_ptr() for x in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Return True if the tensors are at the same places in memory."""
        return self.addresses == [x.data_ptr() for x in tensors]

    def losses(self) -> Tensor:
        """Make the steps, and return their losses."""
        for call in self.calls:
            call()
        return self.made.clone()


def steps_in_place(
    program: Program, update: Update, noise: Noise, num_steps: int, *, num_inputs: int
) -> Callable[..., list[Tensor]]:
    """Return a function that makes steps in place and returns their losses, (num_steps,).

    Its arguments are the inputs of the program, learning rates of each step, and random numbers as `Noise.draw` returns them,
    which it draws itself if they are left out. A step whose loss is not finite changes no parameter.

    Args:
        program: the captured loss.
        update: the optimiser.
        noise: how random numbers are given to the program.
        num_steps: number of steps.
        num_inputs: number of inputs of the program.
    """

    @torch.no_grad()
    def steps(*tensors: Tensor) -> list[Tensor]:
        inputs, rates, given = tensors[:num_inputs], tensors[num_inputs], tensors[num_inputs + 1 :]
        values, states = [p.detach() for p in update.parameters], update.states()
        new_values, new_states, losses = values, states, []
        numbers = given or noise.draw(num_steps)
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
