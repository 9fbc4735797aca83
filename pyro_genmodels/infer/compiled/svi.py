"""Stochastic variational inference by captured programs: `pyro.infer.SVI`, with its step as one compiled graph.

The first step is Pyro's own, so that parameters and the optimiser's state are made as always. Then the loss, its gradients and
the step of the optimiser are captured as one graph.
"""

from __future__ import annotations

__all__ = ["CompiledSVI"]

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from itertools import repeat
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from pyro.infer import SVI
from pyro.infer.util import zero_grads
from pyro.optim import PyroOptim
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro.capturing import has_handlers
from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels.infer.compiled.arguments import check_loss, check_optim, check_pair
from pyro_genmodels.infer.compiled.audit import Finding
from pyro_genmodels.infer.compiled.checkpoints import check_state, load_state, state_of
from pyro_genmodels.infer.compiled.losses import CapturedLoss
from pyro_genmodels.infer.compiled.modes import Mode, check_mode
from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.recorder import CaptureError, put_back
from pyro_genmodels.infer.compiled.restarts import RestartedFits, initial_values
from pyro_genmodels.infer.compiled.runs import batches_of, check_batches, has_converged, mean_loss
from pyro_genmodels.infer.compiled.stepper import Before, Stepper, check_step
from pyro_genmodels.infer.compiled.updates import has_stepped, moved_by, update_of, watch_others
from pyro_genmodels.utils.errors import check_positive_int, warn_caller
from pyro_genmodels.utils.files import atomic_write
from pyro_genmodels.utils.tensors import copied_like

SAVE_SECONDS = 60.0
"""Seconds between two checkpoints of a run."""


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
        num_restarts: number of fits, each from its own first values, that are made at once; a loss is then a tensor,
            (num_restarts,). `restarts.select()` keeps the best of them, and `restarts.samples(n)` draws from all.

    Raises:
        TypeError: if model, guide, optimiser, loss or mode is none of these.
        CaptureError: if the loss has no differentiable form, and the mode captures. `Eager()` takes any loss of Pyro.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
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

    def __init__(
        self,
        model: Any,
        guide: Any,
        optim: Any,
        loss: Any,
        *,
        mode: Mode | None = None,
        audit: bool = True,
        num_restarts: int | None = None,
    ) -> None:
        check_mode("CompiledSVI", mode)
        check_pair("CompiledSVI", model, guide)
        check_loss("CompiledSVI", loss)
        check_optim("CompiledSVI", optim)
        self._optim = optim
        self.captured = CapturedLoss(model, guide, loss, mode=mode, audit=audit)
        self._stock = SVI(model, guide, optim, loss)
        self._is_first = True
        self._waiting: dict[str, Any] | None = None
        self._num_steps = 0
        self._restarts: RestartedFits | None = None
        self._first_values: dict[str, Tensor] = {}
        if num_restarts is not None:
            check_positive_int("CompiledSVI", num_restarts=num_restarts)
        self.num_restarts = num_restarts
        self._steppers: WeakKeyDictionary[Program, Stepper | None] = WeakKeyDictionary()

    def __getstate__(self) -> Any:
        raise TypeError(
            "A CompiledSVI cannot be pickled, since its parameters are in Pyro's param store. Save it by save(path), build it "
            "anew, and go on by load(path)."
        )

    def __repr__(self) -> str:
        captures = sum(finding.kind in ("capture", "changed") for finding in self.findings)
        restarts = "" if self.num_restarts is None else f"num_restarts={self.num_restarts}, "
        return f"CompiledSVI(mode={self.captured.mode!r}, {restarts}{self._num_steps} steps, {captures} captures)"

    @property
    def model(self) -> Any:
        """The model, with the parameters that were loaded.

        Raises:
            ValueError: if a state that was loaded still waits for a first run.
        """
        self._check_not_waiting()
        return self.captured.model

    @property
    def guide(self) -> Any:
        """The guide, with the parameters that were loaded.

        Raises:
            ValueError: if a state that was loaded still waits for a first run.
        """
        self._check_not_waiting()
        return self.captured.guide

    def _check_not_waiting(self) -> None:
        if self._waiting is not None:
            raise ValueError(
                "The state that was loaded waits for a first run of model and guide, which makes their parameters. Call "
                "evaluate_loss(...) with the arguments of the model, or make a step."
            )

    @property
    def optim(self) -> PyroOptim:
        """The optimiser. Build another CompiledSVI for another one."""
        return self._optim

    @property
    def loss(self) -> Any:
        """The loss."""
        return self.captured.loss

    @property
    def findings(self) -> list[Finding]:
        """Captures, and comparisons with the program, so far."""
        return self.captured.findings

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Make a step, and return the loss before it (nats, summed over the data): a number, or (num_restarts,).

        Args:
            args: arguments of the model and the guide. Tensors may change from call to call; anything else is a part of the
                program, which is captured anew if it changes.
            kwargs: keyword arguments of both.

        Raises:
            CaptureError: if the program cannot be captured.
            StaleGraphError: if the program no longer computes what was captured.
        """
        loss = self._step(args, kwargs)
        self._num_steps += 1
        return loss

    def _step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.num_restarts is not None:
            return self._step_restarts(args, kwargs)
        self._load_waiting(args, kwargs)
        program, inputs = self._program_in_graph(args, kwargs)
        if program is None:
            self._is_first = False
            self.captured.num_calls += 1
            return self._stock_step(args, kwargs)
        stepper = self._stepper_of(program)
        if stepper is None:
            return self._step_outside(program, inputs, args, kwargs)
        steps = stepper.steps(program, inputs)
        self.captured.check(program, inputs, further=partial(check_step, steps))
        before = Before(program, stepper.update.device)
        loss = float(steps(inputs))
        if not isfinite(loss):  # the graph has left the parameters as they were: Pyro's step says where it comes from
            before.restore()
            return self._stock_step(args, kwargs)
        return loss

    def _stock_step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make a step of Pyro, in one thread at a time."""
        with exclusive("a step of the model", wait=True):
            return self._stock.step(*args, **kwargs)

    def _step_restarts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Make a step of every restart, and return their losses."""
        if self._is_first:
            self._first_values = initial_values(self.captured, self.num_restarts or 1, args, kwargs)
            self._stock_step(args, kwargs)  # makes the parameters, and the state of the optimiser
            self._is_first = False
        program, inputs = self._program_in_graph(args, kwargs)
        stepper = None if program is None else self._stepper_of(program)
        if program is None or stepper is None:
            raise CaptureError(
                "Restarts need a program and an optimiser in the graph: a mode that captures, an optimiser of the list in the "
                "description of CompiledSVI, the same parameters at each call, and no handler around it."
            )
        if self._restarts is None:
            self._restarts = RestartedFits(self.captured, program, stepper.update, self._first_values)
        self.captured.check(program, inputs)
        return self._restarts.step(program, stepper.update, inputs)

    @property
    def restarts(self) -> RestartedFits:
        """The fits that `num_restarts` asked for, after the first step.

        Raises:
            ValueError: if there are none, or no step was made.
        """
        if self._restarts is None:
            raise ValueError("There are no restarts: build CompiledSVI(..., num_restarts=64), and make a step or a run.")
        return self._restarts

    def run(
        self,
        num_steps: int,
        *args: Any,
        unroll: int | None = None,
        patience: int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Make many steps, and return their losses (nats, summed over the data), (num_steps,) or (num_steps, num_restarts).

        Of a small model several steps are put into one graph, if the run is so long that this pays, and their random numbers
        are drawn at once. They are then other ones than those of `step` with the same seed, of the same law. At the end the
        best restart is selected, if there are any.

        Args:
            num_steps: number of steps.
            args: arguments of the model and the guide, or a single `torch.utils.data.DataLoader` of them, which is walked
                through again and again. Batches that are tuples or lists become positional arguments, and dictionaries become
                keyword arguments.
            unroll: number of steps in one graph; 1 for the random numbers of `step`. By default it is chosen.
            patience: number of steps; the run ends, with fewer losses, once the mean of the last `patience` losses is not
                below the mean of as many before (of no restart, if there are several). NaN is left out.
            checkpoint: path of a file to which `save` writes every minute and at the end, also if the run is interrupted.
            progress: True for a progress bar.
            kwargs: keyword arguments of the model and the guide, the same at each step, beside a loader too.

        Raises:
            TypeError: if an argument is an iterator, such as ``iter(loader)``.
            ValueError: if a number is not positive, a loader has no batches or stands beside other arguments, or `unroll` is
                given where each step has arguments of its own.
            CaptureError: if the program cannot be captured.
            StaleGraphError: if the program no longer computes what was captured.
        """
        check_positive_int("CompiledSVI.run", num_steps=num_steps)
        has_loader = check_batches(args, kwargs)
        if (unroll or 1) > 1 and (has_loader or self.num_restarts is not None):
            raise ValueError(
                "Several steps in one graph need the same arguments at each step, and no restarts: leave unroll out."
            )
        for name, value in (("unroll", unroll), ("patience", patience)):
            if value is not None:
                check_positive_int("CompiledSVI.run", **{name: value})
        losses: list[Any] = []
        batches = batches_of(args, kwargs)
        for stepper in self._steppers.values():
            if stepper is not None:
                stepper.chosen = None  # what pays depends on the length of the run
        saved, compared = time.monotonic(), 0
        try:
            with tqdm(total=num_steps, desc="CompiledSVI", unit="step", disable=not progress, mininterval=0.5) as bar:
                while len(losses) < num_steps:
                    found = self._some_steps(num_steps - len(losses), batches, unroll, bar)
                    losses += found
                    bar.update(len(found))
                    if len(losses) % 100 < len(found):
                        bar.set_postfix_str(f"loss {float(mean_loss(losses[-100:]).min()):.5g}", refresh=False)
                    if checkpoint is not None and time.monotonic() - saved > SAVE_SECONDS:
                        self.save(checkpoint)
                        saved = time.monotonic()
                    if patience is not None and len(losses) - compared >= max(1, patience // 10):
                        compared = len(losses)
                        if has_converged(losses, patience):
                            break
        finally:  # also where the run is interrupted
            if self._restarts is not None and losses:
                self._select(losses)
            if checkpoint is not None and losses:
                self.save(checkpoint)
        return torch.tensor(losses, dtype=torch.float64)

    def _select(self, losses: list[Any]) -> None:
        """Select the best restart, and warn of those without finite losses."""
        lost = [i for i, loss in enumerate(losses[-1]) if not isfinite(loss)]
        if len(lost) == len(losses[-1]):
            return
        if lost:
            warn_caller(f"The losses of restarts {lost} are no longer finite. These fits stay where they are.")
        self.restarts.select()

    def _some_steps(self, num_steps: int, batches: Iterator[Any], unroll: int | None, bar: tqdm) -> list[Any]:
        """Make one step, or several in one graph, and return their losses."""
        args, kwargs = next(batches)
        if self.num_restarts is not None:
            return [self.step(*args, **kwargs).tolist()]
        is_loader = not isinstance(batches, repeat)
        self._load_waiting(args, kwargs)
        program, inputs = self._program_in_graph(args, kwargs)
        stepper = None if program is None else self._stepper_of(program)
        size = 1
        if program is not None and stepper is not None and not is_loader:
            size = stepper.unroll(program, inputs, num_steps, unroll, bar.set_postfix_str)
        if size == 1 or program is None or stepper is None:
            start = time.perf_counter()
            loss = self.step(*args, **kwargs)
            if stepper is not None:
                stepper.seconds.append(time.perf_counter() - start)
            return [loss]
        self.captured.check(program, inputs, size)
        losses = stepper.steps(program, inputs, size)(inputs)
        found = losses.tolist()
        finite = [loss for loss in found if isfinite(loss)]
        self._num_steps += len(finite)
        if len(finite) < size:  # such steps have changed nothing: they are made one by one, as Pyro makes them
            stepper.is_single = True
            finite += [self.step(*args, **kwargs) for _ in range(size - len(finite))]
        return finite

    def save(self, path: str | Path) -> None:
        """Write parameters and the state of the optimiser to a file, completely or not at all."""
        with atomic_write(path) as part:
            torch.save(self.state_dict(), part)

    def load(self, path: str | Path) -> None:
        """Read parameters and the state of the optimiser from a file that `save` wrote; see `load_state_dict`.

        It is no file of Pyro's param store, whose `load` does not read it.

        Raises:
            ValueError: see `load_state_dict`.
        """
        self.load_state_dict(torch.load(path, weights_only=True))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the unconstrained parameters, by their names in Pyro's param store, and the optimiser's state.

        Of restarts it is the one that is selected, as `run` selects the best.

        Raises:
            ValueError: if parameters are not in the param store.
        """
        return state_of(self.optim) if self._waiting is None else deepcopy(self._waiting)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set parameters, in place, and the state of the optimiser.

        Parameters that model and guide have not yet made cannot be set. The state then waits for the next `step`, `run` or
        `evaluate_loss`, which first makes them, by a run of both, and sets them.

        Args:
            state: what `state_dict` returned.

        Raises:
            ValueError: if a parameter has another shape, or is none of model and guide; or if there are several restarts.
        """
        if self.num_restarts is not None:
            raise ValueError(
                "Restarts begin at values of their own, and cannot go on from a state of one fit. Build CompiledSVI without "
                "num_restarts to load it."
            )
        if check_state(state):
            self._waiting = deepcopy(state)
        else:
            load_state(self.optim, state)
            self._waiting = None

    def _load_waiting(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Make the parameters by a run of model and guide, and set them to a state that waits, if one does."""
        if self._waiting is None:
            return
        with exclusive("a run of the model", wait=True), put_back():
            self._stock.evaluate_loss(*args, **kwargs)
        load_state(self.optim, self._waiting)
        self._waiting = None

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Return the loss without a step (nats, summed over the data). The arguments are those of `step`.

        The captured graph is run one operation after another: compiling it for each shape of data would rarely pay.
        """
        self._load_waiting(args, kwargs)
        if self._is_first or not self.captured.mode.captures or has_handlers():
            return self._stock.evaluate_loss(*args, **kwargs)
        program, inputs = self.captured.program_that_pays(args, kwargs, gradients=False)
        if program is None:
            return self._stock.evaluate_loss(*args, **kwargs)
        self.captured.check(program, inputs)
        return float(program.graph(*inputs)[0])

    def _program_in_graph(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Program | None, list[Tensor]]:
        """Return the program of a step and its inputs, or None if Pyro's own step has to be made."""
        if self._is_first or not self.captured.mode.captures or has_handlers():
            return None, []
        if self.num_restarts is None:
            program, inputs = self.captured.program_that_pays(args, kwargs)
        else:
            program, inputs = self.captured.program(args, kwargs)
        if program is None:
            return None, []
        known = program in self._steppers  # a new state of the optimiser would be seen by the watch
        return (program, inputs) if known or has_stepped(self.optim, program.trained) else (None, [])

    def _stepper_of(self, program: Program) -> Stepper | None:
        """Return the steps of a program, or None if the optimiser runs outside of the graph."""
        if program not in self._steppers:
            moved = moved_by(self.optim, list(program.parameters.values()), program.trained)
            update = update_of(self.optim, moved)
            if isinstance(update, str):
                warn_caller(
                    f"The optimiser runs outside of the graph, which is slower for small models: {update}.", UserWarning
                )
                self._steppers[program] = None
            else:
                update.watch(program.watch)
                watch_others(self.optim, program.watch, list(program.parameters.values()), moved)
                self._steppers[program] = Stepper(update, self.captured.mode, self.findings)
        return self._steppers[program]

    def _step_outside(self, program: Program, inputs: Sequence[Tensor], args: Any, kwargs: Any) -> float:
        """Make a step whose optimiser is not in the graph."""
        before = Before(program, torch.device("cpu"))
        loss, *gradients = self.captured.call(program, inputs)
        if not isfinite(float(loss)):
            before.restore()
            return self._stock_step(args, kwargs)
        parameters = list(program.parameters.values())
        for p, g in zip(parameters, gradients, strict=True):
            if g is not None:  # a copy, since gradients may share memory, and clipping changes them
                p.grad = copied_like(g, p)
        self.optim(parameters)
        zero_grads(parameters)
        return float(loss)
