"""Stochastic variational inference by captured programs: `pyro.infer.SVI`, with its step as one compiled graph.

The first step is Pyro's own, so that parameters and the optimiser's state are made as always. Then the loss, its gradients and
the step of the optimiser are captured as one graph.
"""

from __future__ import annotations

__all__ = ["CompiledSVI"]

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

from pyro_genmodels._pyro.capturing import has_handlers
from pyro_genmodels.infer.compiled.graph import Graph, trace
from pyro_genmodels.infer.compiled.modes import Mode
from pyro_genmodels.infer.compiled.program import CapturedLoss, Finding, Program
from pyro_genmodels.infer.compiled.updates import Update, update_of
from pyro_genmodels.utils.errors import warn_caller


@dataclass
class _Step:
    """A program's step of loss, gradients and optimiser, built for a mode.

    Attributes:
        update: the optimiser in the graph.
        graph: loss (), as a function of the arguments and of the rates; it changes parameters and the optimiser's state.
        run: the graph as it is run.
        rates: learning rates at the last step, and numbers of steps.
        rates_tensor: the same as a tensor.
    """

    update: Update
    graph: Graph
    run: Callable[..., Sequence[Tensor]]
    rates: list[float]
    rates_tensor: Tensor


class CompiledSVI:
    """Stochastic variational inference with the verbs of `pyro.infer.SVI`, whose steps are captured once and compiled.

    Parameters are updated in place, wherever they live. The numbers are those of `pyro.infer.SVI` with the same seed, to
    rounding.

    Args:
        model: model; a function, module, or bound method.
        guide: guide.
        optim: optimiser of `pyro.optim`. Adam, AdamW, ClippedAdam, SGD, RMSprop and Adagrad, with schedules, clipping and
            options per parameter, become a part of the graph; others run outside of it.
        loss: `pyro.infer.ELBO` with a differentiable loss (all objectives of this package have one), or a function of model,
            guide and arguments that returns a differentiable tensor.
        mode: `Compiled()`, `Captured()` or `Eager()`; by default compiled where there is a C++ compiler.
        audit: False never to compare the captured graph with the program.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> def model(x):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
        >>> svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO(), mode=Captured())
        >>> x = torch.randn(20) + 3
        >>> losses = [svi.step(x) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(self, model: Any, guide: Any, optim: Any, loss: Any, *, mode: Mode | None = None, audit: bool = True) -> None:
        self.optim = optim
        self.captured = CapturedLoss(model, guide, loss, mode=mode, audit=audit)
        self._stock = SVI(model, guide, optim, loss)
        self._is_first = True
        self._steps: WeakKeyDictionary[Program, _Step | None] = WeakKeyDictionary()

    @property
    def model(self) -> Any:
        """The model."""
        return self.captured.model

    @property
    def guide(self) -> Any:
        """The guide."""
        return self.captured.guide

    @property
    def loss(self) -> Any:
        """The loss."""
        return self.captured.loss

    @property
    def findings(self) -> list[Finding]:
        """Captures, and comparisons with the program, so far."""
        return self.captured.findings

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Make a step, and return the loss before it (nats, summed over the data).

        Args:
            args: arguments of the model and the guide. Tensors may change from call to call; anything else is a part of the
                program, which is captured anew if it changes.
            kwargs: keyword arguments of both.

        Raises:
            CaptureError: if the program cannot be captured.
            StaleGraphError: if the program no longer computes what was captured.
        """
        if self._is_first or not self.captured.mode.captures or has_handlers():
            self._is_first = False
            return self._stock.step(*args, **kwargs)
        program, inputs = self.captured.program(args, kwargs)
        step = self._step_of(program, inputs)
        if step is None:
            return self._step_outside(program, inputs, args, kwargs)
        self.captured.check(program, inputs)
        before = torch.get_rng_state()
        rates = step.update.rates()
        if rates != step.rates:
            step.rates, step.rates_tensor = rates, torch.tensor(rates, dtype=torch.float64)
        with torch.no_grad():
            loss = float(step.run(*inputs, step.rates_tensor, *step.graph.read)[0])
        if not isfinite(loss):  # the graph has left the parameters as they were: Pyro's step says where it comes from
            torch.set_rng_state(before)
            with pyro.validation_enabled():
                return self._stock.step(*args, **kwargs)
        step.update.count()
        return loss

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss without a step (nats, summed over the data). The arguments are those of `step`."""
        if self._is_first or not self.captured.mode.captures or has_handlers():
            return self._stock.evaluate_loss(*args, **kwargs)
        program, inputs = self.captured.program(args, kwargs, gradients=False)
        return float(self.captured.call(program, inputs)[0])

    def _step_of(self, program: Program, inputs: Sequence[Tensor]) -> _Step | None:
        """Return the step of a program, built if need be, or None if the optimiser runs outside."""
        if program in self._steps:
            return self._steps[program]
        start = time.perf_counter()
        trained = [p for p, has in zip(program.parameters.values(), program.has_gradient, strict=True) if has]
        update = update_of(self.optim, trained)
        if isinstance(update, str):
            self._steps[program] = None
            warn_caller(f"The optimiser runs outside of the graph, which is slower for small models: {update}.", UserWarning)
            return None
        update.watch(program.watch)
        rates = update.rates()
        rates_tensor = torch.tensor(rates, dtype=torch.float64)
        graph = trace(_fused(program, update), *inputs, rates_tensor)
        run = self.captured.mode.build(graph, [*inputs, rates_tensor])
        step = self._steps[program] = _Step(update, graph, run, rates, rates_tensor)
        self.findings.append(Finding("build", program.calls, time.perf_counter() - start, num_operations=graph.num_operations))
        return step

    def _step_outside(self, program: Program, inputs: Sequence[Tensor], args: Any, kwargs: Any) -> float:
        """Make a step whose optimiser is not in the graph."""
        before = torch.get_rng_state()
        loss, *gradients = self.captured.call(program, inputs)
        if not isfinite(float(loss)):
            torch.set_rng_state(before)
            with pyro.validation_enabled():
                return self._stock.step(*args, **kwargs)
        parameters = list(program.parameters.values())
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.optim(parameters)
        for p in parameters:
            p.grad = None
        return float(loss)


def _fused(program: Program, update: Update) -> Callable[..., list[Tensor]]:
    """Return a function of inputs and rates that makes a step in place and returns the loss."""

    @torch.no_grad()
    def step(*tensors: Tensor) -> list[Tensor]:
        *inputs, rates = tensors
        loss, *gradients = program.graph.module(*inputs, *program.graph.read)[: program.graph.num_outputs]
        gradients = [g for g, has in zip(gradients, program.has_gradient, strict=True) if has]
        values, states = [p.detach() for p in update.parameters], update.states()
        new_values, new_states = update.step(values, gradients, states, rates)
        is_finite = loss.isfinite()
        for old, new in zip(values, new_values, strict=True):
            old.copy_(torch.where(is_finite, new, old))
        for old_state, new_state in zip(states, new_states, strict=True):
            for name, new in new_state.items():
                old_state[name].copy_(torch.where(is_finite, new, old_state[name]))
        return [loss]

    return step
