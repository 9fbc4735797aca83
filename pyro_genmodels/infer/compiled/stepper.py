"""Steps of one captured program: its optimiser as a formula, and graphs of one step or of several."""

from __future__ import annotations

__all__ = ["Before", "Stepper", "check_step"]

from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.audit import Finding
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.steps import Steps, choose_unroll
from pyro_genmodels.infer.compiled.update_audit import compare_update
from pyro_genmodels.infer.compiled.updates import Update

TIMED_STEPS = 40
"""Number of single steps that are timed before the number of steps in one graph is chosen."""


class Stepper:
    """Steps of one program, built when they are first wanted.

    It holds no reference to the program, so that it can be kept in a dictionary with weak keys.

    Args:
        update: the optimiser.
        mode: how graphs are run.
        findings: list to which what is built is added.

    Attributes:
        seconds: times of the last single steps.
        chosen: number of steps in one graph in the present run, or None if it is not yet chosen.
        is_single: True once a loss was not finite: each step is then looked at.
    """

    def __init__(self, update: Update, mode: Mode, findings: list[Finding]) -> None:
        self.update, self.mode, self.findings = update, mode, findings
        self.seconds: deque[float] = deque(maxlen=TIMED_STEPS)
        self.chosen: int | None = None
        self.is_single = False
        self._built: dict[int, Steps] = {}

    def steps(self, program: Program, inputs: Sequence[Tensor], num_steps: int = 1) -> Steps:
        """Return steps in one graph. Several draw their random numbers at once.

        Args:
            program: the program.
            inputs: tensors among its arguments.
            num_steps: number of steps.
        """
        if num_steps not in self._built:
            steps = Steps(program, self.update, inputs, self.mode, num_steps, draw_at_once=num_steps > 1)
            self._built[num_steps] = steps
            name, size = f"{num_steps} step{'s' if num_steps > 1 else ''}", steps.graph.num_operations
            self.findings.append(Finding("built", name, program.calls, steps.seconds, num_operations=size))
        return self._built[num_steps]

    def unroll(
        self, program: Program, inputs: Sequence[Tensor], num_steps: int, wanted: int | None, report: Callable[[str], None]
    ) -> int:
        """Return how many of the next steps are made in one graph.

        Args:
            program: the program.
            inputs: tensors among its arguments.
            num_steps: number of steps that are still to be made.
            wanted: number of steps in one graph that is asked for, or None for a choice.
            report: function of a text, called before a graph is built.
        """
        if self.is_single:
            return 1
        if wanted is None:
            if len(self.seconds) < TIMED_STEPS:
                return 1
            if self.chosen is None:
                built = self.steps(program, inputs).seconds
                self.chosen = choose_unroll(num_steps, median(self.seconds), built, self.update.device.type)
            wanted = self.chosen
        if wanted > num_steps:
            return 1
        if wanted > 1 and wanted not in self._built:
            report(f"compiling {wanted} steps")
        return wanted


def check_step(steps: Steps, program: Program, inputs: Sequence[Tensor], expected: Sequence[Any]) -> float:
    """Return the largest difference of one step in a graph from the step of the program's own loss, gradients and optimiser.

    Args:
        steps: the step.
        program: the program.
        inputs: tensors among its arguments.
        expected: its own loss and gradients.

    Raises:
        StaleGraphError: if they differ by more than rounding can explain.
    """
    losses, found = steps.tried(*inputs)
    difference = program.compare(expected, list(losses), is_built=True)
    if not expected[0].isfinite():  # such a step changes nothing
        return difference
    gradients = {id(p): (name, g) for (name, p), g in zip(program.parameters.items(), expected[1:], strict=True)}
    names, own = zip(*(gradients[id(p)] for p in steps.update.parameters), strict=True) if found else ((), ())
    return max(difference, compare_update(steps.update, names, [expected[0], *own], found, program.eps))


class Before:
    """The random state, and the buffers that a program changes, before a step.

    Args:
        program: the program.
        device: device of its parameters.
    """

    def __init__(self, program: Program, device: torch.device) -> None:
        self._buffers = [(x, x.clone()) for x in program.graph.written]
        self._random = torch.get_rng_state()
        self._device = device
        self._random_of_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Put them back."""
        for x, value in self._buffers:
            x.copy_(value)
        torch.set_rng_state(self._random)
        if self._random_of_device is not None:
            torch.cuda.set_rng_state(self._random_of_device, self._device)
