"""Losses of Pyro programs, captured as graphs: one graph for each shape and structure of the arguments."""

from __future__ import annotations

__all__ = ["CapturedLoss", "differentiable_loss", "loss_and_gradients"]

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer import ELBO, RenyiELBO
from torch import Tensor

from pyro_genmodels._pyro.capturing import find_parameters
from pyro_genmodels._pyro.renyi import renyi_loss
from pyro_genmodels.infer.compiled.arguments import check_loss, check_pair
from pyro_genmodels.infer.compiled.audit import Finding
from pyro_genmodels.infer.compiled.captures import Captures, key_of
from pyro_genmodels.infer.compiled.modes import Mode, check_mode, default_mode
from pyro_genmodels.infer.compiled.program import Check, Program
from pyro_genmodels.infer.compiled.recorder import WAY_OUT, CaptureError

MAX_PROGRAMS = 16
"""Number of graphs that are kept, for so many shapes of arguments."""

DIFFERENTIABLE: Mapping[type[ELBO], Callable[..., Tensor]] = {RenyiELBO: renyi_loss}
"""For losses of Pyro without a differentiable form: a function of the loss, model, guide and arguments that is one."""


class CapturedLoss:
    """A Pyro loss of a model and a guide, captured as a graph at the first call for each shape of the arguments.

    Args:
        model: model, as for `pyro.infer.SVI`.
        guide: guide.
        loss: `pyro.infer.ELBO` with a differentiable loss, or a function of model, guide and arguments.
        mode: `Compiled()`, `Captured()` or `Eager()`; by default compiled where there is a C++ compiler.
        audit: False never to compare the graph with the program.

    Attributes:
        findings: captures and comparisons so far.
        num_calls: number of calls so far.

    Raises:
        TypeError: if model, guide, loss or mode is none.
        CaptureError: if the loss has no differentiable form and the mode captures.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro_genmodels.infer.compiled import Captured
        >>> def model(x):
        ...     loc = pyro.param("loc", torch.zeros(()))
        ...     pyro.sample("x", dist.Normal(loc, torch.ones(2)).to_event(1), obs=x)
        >>> captured = CapturedLoss(model, lambda x: None, pyro.infer.Trace_ELBO(), mode=Captured())
        >>> loss, gradients = captured(torch.tensor([1.0, 3.0]))
        >>> loss, gradients
        (tensor(6.8379), {'loc': tensor(-4.)})
    """

    def __init__(self, model: Any, guide: Any, loss: Any, *, mode: Mode | None = None, audit: bool = True) -> None:
        self.model, self.guide, self.loss = model, guide, loss
        check_pair("CapturedLoss", model, guide)
        self.mode: Mode = check_mode("CapturedLoss", mode) or default_mode()
        check_loss("CapturedLoss", loss)
        if self.mode.captures:
            differentiable_loss(loss)
        self.is_audited = audit
        self.findings: list[Finding] = []
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self.num_calls = 0
        self._captures = Captures(model)

    @property
    def loss_of(self) -> Callable[..., Tensor]:
        """The differentiable loss, a function of model, guide and arguments."""
        return differentiable_loss(self.loss)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the graphs, which are captured anew."""
        return self.__dict__ | {"_programs": OrderedDict(), "_captures": Captures(self.model), "findings": []}

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as the program computes it, differentiable."""
        return self.loss_of(self.model, self.guide, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and its gradients, by the names of the parameters in Pyro's param store."""
        if not self.mode.captures:
            return loss_and_gradients(lambda: self.run(*args, **kwargs))
        program, inputs = self.program_that_pays(args, kwargs)
        if program is None:
            return loss_and_gradients(lambda: self.run(*args, **kwargs))
        loss, *gradients = self.call(program, inputs)
        return loss, {name: g for name, g in zip(program.parameters, gradients, strict=True) if g is not None}

    def call(self, program: Program, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Return what a program's graph returns, in the chosen mode."""
        if program.built is None:
            program.built = self.mode.build(program.graph, inputs)
        self.check(program, inputs)
        with torch.no_grad():
            return program.built(*inputs, *program.graph.read)[: program.graph.num_outputs]

    def check(self, program: Program, inputs: Sequence[Tensor], num_calls: int = 1, further: Check | None = None) -> None:
        """Compare a program's graph with the program, if it is time to, and count the calls.

        Args:
            program: the program.
            inputs: tensors among its arguments.
            num_calls: number of calls to come.
            further: a further comparison; see `Program.audit`.
        """
        if self.is_audited and program.is_due(num_calls):
            start = time.perf_counter()
            difference = program.audit(inputs, further)
            self.findings.append(Finding("audit", "", program.calls, time.perf_counter() - start, difference))
        program.calls += num_calls
        self.num_calls += num_calls

    def program(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool = True
    ) -> tuple[Program, list[Tensor]]:
        """Return the program for arguments, captured if need be, and the tensors among the arguments.

        Raises:
            CaptureError: if the program cannot be captured, or if gradients are asked for where they are switched off.

        Warns:
            RuntimeWarning: if programs are captured again and again.
        """
        program, inputs, key, changed = self._known(args, kwargs, gradients=gradients)
        if program is None:
            program = self._capture(key, changed, args, kwargs, gradients=gradients, pauses=False)
        return program, inputs

    def program_that_pays(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool = True
    ) -> tuple[Program | None, list[Tensor]]:
        """Return what `program` does, but None where the program would be captured again and again, which takes too long.

        Raises:
            CaptureError: see `program`.

        Warns:
            RuntimeWarning: see `program`.
        """
        program, inputs, key, changed = self._known(args, kwargs, gradients=gradients)
        if program is None and self._captures.pays(key, changed):
            program = self._capture(key, changed, args, kwargs, gradients=gradients, pauses=True)
        return program, inputs

    def _known(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool
    ) -> tuple[Program | None, list[Tensor], Any, str | None]:
        """Return the program for arguments, if it was captured and is right; their tensors, their key, and what has changed."""
        if gradients and not torch.is_grad_enabled():
            raise CaptureError(
                "Gradients are switched off around the call, by torch.no_grad() or torch.inference_mode(), so that there are "
                "none to make a step with. Call it outside of that block."
            )
        key, inputs = key_of(args, kwargs)
        if gradients and any(x.grad_fn is not None for x in inputs):
            raise CaptureError(
                "An argument was computed from a parameter, which a graph would not train. Compute it inside of the model, or "
                f"detach it. {WAY_OUT}"
            )
        key = (gradients, key)
        program = self._programs.get(key)
        changed = None if program is None else program.changed()
        if changed is not None:
            return None, inputs, key, changed
        if program is not None:
            self._programs.move_to_end(key)
        return program, inputs, key, None

    def _capture(
        self, key: Any, changed: str | None, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool, pauses: bool
    ) -> Program:
        """Return the program for arguments, captured now."""
        self._captures.add(key, changed, args, kwargs, pauses=pauses)
        self._programs.pop(key, None)
        start = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad():
            program = Program(self.run, args, kwargs, (self.model, self.guide, self.loss), gradients=gradients)
        self._programs[key] = program
        while len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)
        kind: Literal["changed", "capture"] = "changed" if changed else "capture"
        seconds, size = time.perf_counter() - start, program.graph.num_operations
        self.findings.append(Finding(kind, changed or "", self.num_calls, seconds, num_operations=size))
        return program


def loss_and_gradients(run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () that a run computes, and its gradients by the names of the parameters, without a graph."""
    losses: list[Tensor] = []
    parameters = find_parameters(lambda: losses.append(torch.as_tensor(run())))
    loss = losses[0].reshape(()) if losses[0].numel() == 1 else losses[0]
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained and loss.requires_grad else ()
    return loss.detach(), {name: g for name, g in zip(trained, found, strict=False) if g is not None}


def differentiable_loss(loss: Any) -> Callable[..., Tensor]:
    """Return the function of model, guide and arguments that is the differentiable loss.

    Raises:
        CaptureError: if Pyro has none for this loss.
    """
    if type(loss) in DIFFERENTIABLE:
        return partial(DIFFERENTIABLE[type(loss)], loss)
    if not isinstance(loss, ELBO):
        return loss
    if "differentiable_loss" not in {name for cls in type(loss).__mro__ for name in vars(cls)}:
        raise CaptureError(
            f"{type(loss).__name__} has no differentiable loss in Pyro, and cannot be captured. Use Trace_ELBO, "
            "TraceMeanField_ELBO, TraceEnum_ELBO, RenyiELBO, or the objectives of this package; or take mode=Eager() of "
            "CompiledSVI, or pyro.infer.SVI."
        )
    return loss.differentiable_loss  # type: ignore[attr-defined]
