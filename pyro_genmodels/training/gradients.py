r"""Loss and gradients of the steps of a run: as the program computes them, or by a graph captured once.

A graph saves the time that Python and Pyro take for each operation, and it takes a time to build that grows with the number of
operations too. So it pays after a number of steps that hardly depends on the program. `automatic_mode` chooses by this number
alone, so that a run with the same data and arguments makes the same choice. It counts the steps that will be made for certain,
up to the end or until patience is lost. The numbers are those of eager steps to rounding, with the same random numbers.
"""

from __future__ import annotations

__all__ = ["Gradients", "automatic_mode", "is_well_known", "warn_of_stale_graph"]

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

from torch import Tensor, nn

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.capturing import has_handlers
from pyro_genmodels._pyro.inductor import missing_compiler
from pyro_genmodels.infer.compiled import Captured, CapturedLoss, CaptureError, Compiled, Eager, Mode, StaleGraphError
from pyro_genmodels.utils.errors import one_line, warn_caller
from pyro_genmodels.utils.tensors import copied_like

CAPTURED_STEPS = 2_000
"""Number of coming steps from which on a captured graph saves more time than it takes, with two sizes of batches."""

COMPILED_STEPS = 50_000
"""Number of coming steps from which on a compiled graph does."""

MAX_RECAPTURES = 3
"""Number of times that a program is captured anew, after which the automatic choice is eager for good."""

TIMED_STEPS = 30
"""Number of steps of either kind that are timed to see if the graph is faster."""


def automatic_mode(num_steps: int) -> Mode:
    """Return the way to run which takes the least time, the time to build a graph included.

    Args:
        num_steps: number of steps that are to come.

    Example:
        >>> automatic_mode(100), automatic_mode(10_000)
        (Eager(), Captured(script=True))
    """
    if num_steps >= COMPILED_STEPS and missing_compiler() is None:
        return Compiled()
    return Captured() if num_steps >= CAPTURED_STEPS else Eager()


def is_well_known(model: Callable[..., Any], guide: Callable[..., Any], parameters: Iterable[Tensor]) -> bool:
    """Return True for model and guide of one family on a CPU, which may be captured without being asked."""
    owners = {id(getattr(fn, "__self__", None)) for fn in (model, guide)}
    on_cpu = all(p.device.type == "cpu" for p in parameters)
    return len(owners) == 1 and traces.is_family(model) and traces.is_family(guide) and on_cpu


def warn_of_stale_graph(error: Exception) -> None:
    """Warn if a graph did no longer compute what the program does: some of the last steps may have been wrong."""
    if isinstance(error, StaleGraphError):
        warn_caller(f"Training goes on without a captured graph: {one_line(error)}")


class Gradients:
    """The loss of a fit, with its gradients added to those of the parameters, like ``objective.loss_and_grads``.

    The first step is eager, since it makes what is made once, such as the chains of an energy. By the automatic choice so is
    the first epoch, in which Pyro validates every row; a graph does not validate. It leaves models and guides of your own
    eager, since what they count in Python would be counted differently.

    Args:
        model: the fit's model.
        guide: the fit's guide.
        objective: the loss.
        parameters: trained parameters by name.
        mode: how to run; None for the automatic choice.

    Attributes:
        mode: how steps are run now.

    Raises:
        CaptureError: if the mode is not None, and the objective has no differentiable loss.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: Any,
        parameters: Mapping[str, nn.Parameter],
        mode: Mode | None,
    ) -> None:
        self.model, self.guide, self.objective, self.parameters = model, guide, objective, parameters
        self._report: Callable[[str], None] = lambda text: None
        self.mode: Mode = Eager()
        self._captured: CapturedLoss | None = None
        self._chooses = mode is None and is_well_known(model, guide, parameters.values())
        self._is_first = True
        self._seconds: dict[bool, list[float]] = {False: [], True: []}  # of eager steps, of captured ones
        if mode is not None:
            self._run_by(mode)

    def plan(self, num_steps: int, report: Callable[[str], None]) -> None:
        """Choose how to run the coming steps, at the beginning of an epoch, if that is left open.

        Args:
            num_steps: number of steps that will be made for certain.
            report: function of a text, called while a graph is built.
        """
        self._report = report
        if self._chooses and not self._is_first and not self.mode.captures:
            try:
                self._run_by(automatic_mode(num_steps))
            except CaptureError:
                self._stay_eager()

    def __call__(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Return the loss (), summed over the data, and set the gradients of the parameters.

        Args:
            model: the fit's model.
            guide: the fit's guide.
            args: arguments of both.
            kwargs: keyword arguments of both.

        Raises:
            CaptureError: if the program cannot be captured, and a mode was asked for by name.
            StaleGraphError: if the graph no longer computes what the program does, and a mode was asked for by name.
        """
        start = time.perf_counter()
        if self._captured is None or self._is_first or has_handlers():
            loss = self.objective.loss_and_grads(model, guide, *args, **kwargs)
            self._is_first = False
            if self._captured is None:
                self._note(start, is_captured=False)
            return loss
        try:
            return self._captured_step(self._captured, args, kwargs)
        except (CaptureError, NotImplementedError, StaleGraphError) as error:  # what a graph cannot do, an eager run can
            if not self._chooses:
                raise
            warn_of_stale_graph(error)
        self._stay_eager()
        return self.objective.loss_and_grads(model, guide, *args, **kwargs)

    def _captured_step(self, captured: CapturedLoss, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        start, num_findings = time.perf_counter(), len(captured.findings)
        if not num_findings:
            self._report("compiling" if isinstance(self.mode, Compiled) else "capturing")
        loss, gradients = captured(*args, **kwargs)
        for name, gradient in gradients.items():
            if name in self.parameters:
                parameter = self.parameters[name]
                parameter.grad = copied_like(gradient, parameter)  # two of them may be one tensor
        value = loss.item()
        if self._chooses and len(captured.findings) == num_findings:
            self._note(start, is_captured=True)
            self._compare(captured)
        return value

    def _run_by(self, mode: Mode) -> None:
        self.mode = mode
        self._captured = CapturedLoss(self.model, self.guide, self.objective, mode=mode) if mode.captures else None

    def _stay_eager(self) -> None:
        self._chooses = False
        self._run_by(Eager())

    def _note(self, start: float, *, is_captured: bool) -> None:
        seconds = self._seconds[is_captured]
        seconds.append(time.perf_counter() - start)
        del seconds[:-TIMED_STEPS]

    def _compare(self, captured: CapturedLoss) -> None:
        """Go back to eager steps if the graph is not faster, or has to be captured again and again."""
        eager_seconds, captured_seconds = self._seconds[False], self._seconds[True]
        recaptures = sum(finding.kind == "changed" for finding in captured.findings)
        is_slower = len(captured_seconds) == TIMED_STEPS and median(captured_seconds) > median(eager_seconds)
        if is_slower or recaptures > MAX_RECAPTURES:
            self._stay_eager()
