"""Losses of Pyro programs, captured as graphs: one graph for each shape and structure of the arguments.

A captured loss is right as long as the program is what it was. Three things see to that. Tensors are read live (see `graph`).
The watch finds names that were bound anew (see `watch`). The audit compares the graph with the program itself, at steps 1, 2,
4, 8, ... and every 1000th, under the same random numbers.
"""

from __future__ import annotations

__all__ = ["CapturedLoss", "Finding", "Program"]

import operator
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, RenyiELBO
from torch import Tensor

from pyro_genmodels._pyro.capturing import capturable, find_parameters, has_hooks
from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.renyi import renyi_loss
from pyro_genmodels._pyro.tracing import tree_flatten, tree_unflatten
from pyro_genmodels.infer.compiled.graph import trace
from pyro_genmodels.infer.compiled.modes import Mode, default_mode
from pyro_genmodels.infer.compiled.recorder import WAY_OUT, CaptureError, StaleGraphError, put_back
from pyro_genmodels.infer.compiled.watch import Watch
from pyro_genmodels.utils.errors import warn_caller

AUDIT_PERIOD = 1000
"""Number of steps after which the graph is compared with the program again and again."""

MAX_PROGRAMS = 16
"""Number of graphs that are kept, for so many shapes of arguments."""

MANY_CAPTURES = 8
"""Number of captures after which a warning says that capturing again and again is slow."""


DIFFERENTIABLE: Mapping[type[ELBO], Callable[..., Tensor]] = {RenyiELBO: renyi_loss}
"""For losses of Pyro without a differentiable form: a function of the loss, model, guide and arguments that is one."""


TINY = 1e-30
"""Size of gradients that are all zero."""

LAYOUT = operator.attrgetter("shape", "dtype", "requires_grad")
"""Function of a tensor that returns what a graph takes for granted of it."""


@dataclass(frozen=True)
class Finding:
    """One capture or comparison.

    Attributes:
        what: "capture", "audit" or the name of what was bound anew.
        calls: number of calls of the program before.
        seconds: time that it took.
        difference: largest difference from the program, relative to the size of the loss; None for a capture.
        num_operations: number of operations of the graph.
    """

    what: str
    calls: int
    seconds: float
    difference: float | None = None
    num_operations: int | None = None


class Program:
    """A loss, and its gradients, for arguments of one shape and structure.

    Args:
        run: function of the arguments; returns the loss, differentiable, as a tensor.
        args: positional arguments.
        kwargs: keyword arguments.
        roots: what the program consists of, for the watch.
        gradients: False for the loss alone.

    Attributes:
        parameters: unconstrained parameters by their names in Pyro's param store.
        graph: loss () and gradients (one for each parameter, or None), as a function of the tensors among the arguments.
        has_gradient: for each parameter, True if it has a gradient.
        trained: those that have one.
        calls: number of calls.
        forms: further functions of the inputs, without a lasting effect, that return the loss, or the loss and the gradients,
            as other code computes them that was built of the graph, with the same random numbers. Each comparison with the
            program compares these too.
        eps: unit of rounding of the coarsest dtype that the graph computes in.

    Raises:
        CaptureError: if the program cannot be captured.
    """

    def __init__(
        self,
        run: Callable[..., Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        roots: Sequence[Any],
        *,
        gradients: bool,
    ) -> None:
        leaves, self._structure = tree_flatten((tuple(args), dict(kwargs)))
        self._run, self._gradients = run, gradients
        self._others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.calls = 0
        self.built: Callable[..., Sequence[Any]] | None = None
        self.forms: list[Callable[..., Sequence[Any]]] = []
        inputs = [leaves[i] for i in self._positions]
        with without_trace_shapes(), exclusive("the capture of a model", wait=True):
            with put_back():  # what is made at the first run, such as parameters and the plates of guides, is made now
                self.parameters = find_parameters(lambda: self._loss(inputs))
            self.watch = Watch(*roots, *self._others)
            with put_back():
                self.parameters = find_parameters(lambda: self._loss(inputs))
            self.watch.forget_changed()
            for part in ("_params", "_constraints"):
                for name in self.parameters:
                    self.watch.add(_Stored(part), name, f"the parameter {name}")
            if (hooked := self._hooked()) is not None:
                raise CaptureError(
                    f"The parameter {hooked} has a hook of its gradient (register_hook), which a captured graph would not call "
                    f"at each step. Remove it, or change gradients in the optimiser, as by clip_norm. {WAY_OUT}"
                )
            with capturable():
                self.graph = trace(self.outputs, *inputs, varying=self.parameters.values())
        self.watch.forget_changed()
        self._tensors = [*self.parameters.values(), *self.graph.read]
        self._layouts = self._layouts_now()
        self.eps = _coarsest_eps({x.dtype for x in (*inputs, *self._tensors)} | self.graph.dtypes)
        *_, output = self.graph.module.graph.nodes
        self.has_gradient = [g is not None for g in output.args[0][1 : self.graph.num_outputs]]
        self.trained = [p for p, has in zip(self.parameters.values(), self.has_gradient, strict=False) if has]

    def outputs(self, *inputs: Tensor) -> list[Tensor | None]:
        """Return the loss, detached, and the gradients, computed by the program itself."""
        if not self._gradients:
            with torch.inference_mode(False), torch.enable_grad():  # without gradients enumeration refuses to run
                return [self._loss(inputs).detach()]
        loss = self._loss(inputs)
        trained = [p for p in self.parameters.values() if p.requires_grad]
        found = iter(torch.autograd.grad(loss, trained, allow_unused=True) if trained and loss.requires_grad else ())
        gradients = [next(found, None) if p.requires_grad else None for p in self.parameters.values()]
        return [loss.detach(), *gradients]

    def _loss(self, inputs: Sequence[Tensor]) -> Tensor:
        leaves = list(self._others)
        for i, x in zip(self._positions, inputs, strict=True):
            leaves[i] = x.clone() if x.is_inference() else x
        args, kwargs = tree_unflatten(leaves, self._structure)
        loss = torch.as_tensor(self._run(*args, **kwargs))
        return loss.reshape(()) if loss.numel() == 1 else loss

    def _layouts_now(self) -> list[Any]:
        return [*map(LAYOUT, self._tensors), *map(Tensor.stride, self._tensors)]

    def _hooked(self) -> str | None:
        """Return the name of a parameter with a hook of its gradient, or None."""
        return next((name for name, p in self.parameters.items() if has_hooks(p)), None)

    def changed(self) -> str | None:
        """Return the name of something that was bound anew since the capture, or None."""
        if self._layouts_now() != self._layouts:
            return "the shape, strides, dtype or requires_grad of a tensor"
        if (hooked := self._hooked()) is not None:
            return f"a hook of the parameter {hooked}"
        return self.watch.changed() or self.graph.changed()

    def is_due(self, num_calls: int = 1) -> bool:
        """Return True if one of the next calls is one of those at which the graph is compared with the program."""
        last = self.calls + num_calls
        power = 1 << (last.bit_length() - 1)
        return self.calls < power or last // AUDIT_PERIOD > self.calls // AUDIT_PERIOD

    def audit(self, inputs: Sequence[Tensor]) -> float:
        """Compare the graph with the program, under the same random numbers, and return the largest difference.

        If the graph was built for a mode, what was built is compared too.

        Raises:
            StaleGraphError: if they differ, or leave the random number generator in different states.
        """
        with without_trace_shapes(), exclusive("a comparison with the model", wait=True), self.graph.put_back():
            expected = self.outputs(*inputs)
            generator = torch.get_rng_state()
        with self.graph.put_back():
            found = self.graph(*inputs)
            is_same_generator = torch.equal(generator, torch.get_rng_state())
        difference = self.compare(expected, found)
        if not is_same_generator:
            raise StaleGraphError(
                "The program leaves the random number generator in another state than the captured graph does: it sets a seed, "
                "as by torch.manual_seed(...), or draws as many numbers as Python code decides. Set seeds outside of the model."
            )
        for form in self.forms if self.built is None else (self._call_built, *self.forms):
            with self.graph.put_back(), torch.no_grad():
                difference = max(difference, self.compare(expected, form(*inputs), is_built=True))
        return difference

    def _call_built(self, *inputs: Tensor) -> list[Any]:
        built: Any = self.built
        return [x.clone() if isinstance(x, Tensor) else x for x in built(*inputs, *self.graph.read)[: self.graph.num_outputs]]

    def compare(self, expected: Sequence[Any], found: Sequence[Any], *, is_built: bool = False) -> float:
        """Return the largest difference of the loss and the gradients, relative to their sizes.

        The size is that of the loss, or 1 if that is larger. For gradients it is that of the largest of all of them, or a
        hundredth of the loss if that is larger, since a gradient may be a small sum of large terms.

        Args:
            expected: loss and gradients of the program.
            found: those of its graph, or the loss alone.
            is_built: True for those of the built graph, whose rounding is another one.

        Raises:
            StaleGraphError: if they differ by more than rounding can explain.
        """
        loss: Any = expected[0]
        sizes = [_size(x) for x in expected]
        size_of_loss, size_of_gradients = max(1.0, sizes[0]), max(*sizes[1:], sizes[0] / 100, TINY)
        difference = 0.0
        for i, (a, b) in enumerate(zip(expected, found, strict=False)):
            if (a is None) != (b is None):
                name = [*self.parameters][i - 1]
                where = (
                    "the captured graph and none in the program" if a is None else "the program and none in the captured graph"
                )
                raise StaleGraphError(
                    f"The parameter {name} has a gradient in {where}: the path from it to the loss was changed, in a way that "
                    "cannot be seen, since the program was captured."
                )
            if a is not None and a.numel():
                difference = max(difference, _gap(a, b) / (size_of_gradients if i else size_of_loss))
        if difference > tolerance_of(self.eps, is_built=is_built):
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


def _coarsest_eps(dtypes: Iterable[torch.dtype]) -> float:
    """Return the unit of rounding of the coarsest of dtypes; integers have none."""
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), default=0.0)


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

    Example:
        >>> import pyro.distributions as dist
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
        self.mode = default_mode() if mode is None else mode
        self.is_audited = audit
        self.findings: list[Finding] = []
        self._programs: OrderedDict[Any, Program] = OrderedDict()
        self._num_captures = 0
        self.loss_of = differentiable_loss(loss)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes without the graphs, which are captured anew."""
        return self.__dict__ | {"_programs": OrderedDict(), "_num_captures": 0, "findings": []}

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss as the program computes it, differentiable."""
        return self.loss_of(self.model, self.guide, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss () and its gradients, by the names of the parameters in Pyro's param store."""
        if not self.mode.captures:
            return loss_and_gradients(lambda: self.run(*args, **kwargs))
        program, inputs = self.program(args, kwargs)
        loss, *gradients = self.call(program, inputs)
        return loss, {name: g for name, g in zip(program.parameters, gradients, strict=True) if g is not None}

    def call(self, program: Program, inputs: Sequence[Tensor]) -> Sequence[Any]:
        """Return what a program's graph returns, in the chosen mode."""
        if program.built is None:
            program.built = self.mode.build(program.graph, inputs)
        self.check(program, inputs)
        with torch.no_grad():
            return program.built(*inputs, *program.graph.read)[: program.graph.num_outputs]

    def check(self, program: Program, inputs: Sequence[Tensor], num_calls: int = 1) -> None:
        """Compare a program's graph with the program, if it is time to, and count the calls."""
        if self.is_audited and program.is_due(num_calls):
            start = time.perf_counter()
            difference = program.audit(inputs)
            self.findings.append(Finding("audit", program.calls, time.perf_counter() - start, difference))
        program.calls += num_calls

    def program(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, gradients: bool = True
    ) -> tuple[Program, list[Tensor]]:
        """Return the program for arguments, captured if need be, and the tensors among the arguments.

        Raises:
            CaptureError: if the program cannot be captured, or if gradients are asked for where they are switched off.

        Warns:
            RuntimeWarning: if programs are captured again and again.
        """
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
        what = "capture"
        if program is not None:
            rebound = program.changed()
            if rebound is None:
                self._programs.move_to_end(key)
                return program, inputs
            what = rebound
            del self._programs[key]
        self._num_captures += 1
        if self._num_captures == MANY_CAPTURES:
            cause = (
                "the arguments had so many shapes, or numbers, texts, arrays and other objects that are no tensors"
                if what == "capture"
                else f"{what} was bound anew"
            )
            warn_caller(
                f"The program was captured {MANY_CAPTURES} times: {cause}. Capturing takes much longer than a step. Pass what "
                "changes as a tensor, and batches of one size."
            )
        start = time.perf_counter()
        with torch.inference_mode(False), torch.enable_grad():
            program = Program(self.run, args, kwargs, (self.model, self.guide, self.loss), gradients=gradients)
        self._programs[key] = program
        while len(self._programs) > MAX_PROGRAMS:
            self._programs.popitem(last=False)
        self.findings.append(Finding(what, 0, time.perf_counter() - start, num_operations=program.graph.num_operations))
        return program, inputs


def loss_and_gradients(run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss () that a run computes, and its gradients by the names of the parameters, without a graph."""
    losses: list[Tensor] = []
    parameters = find_parameters(lambda: losses.append(torch.as_tensor(run())))
    loss = losses[0].reshape(()) if losses[0].numel() == 1 else losses[0]
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True) if trained and loss.requires_grad else ()
    return loss.detach(), {name: g for name, g in zip(trained, found, strict=False) if g is not None}


def key_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, list[Tensor]]:
    """Return the shape and structure of arguments, and the tensors among them."""
    dtype = torch.get_default_dtype()
    if not kwargs and all(type(x) is Tensor for x in args):
        inputs = list(args)
        return (dtype, *map(_form, inputs)), inputs
    leaves, structure = tree_flatten((tuple(args), dict(kwargs)))
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    parts = tuple(_form(x) if isinstance(x, Tensor) else _constant(x) for x in leaves)
    return (dtype, structure, *parts), inputs


def _form(x: Tensor) -> tuple[Any, ...]:
    """Return what a compiled graph takes for granted of an argument; the strides are among it.

    Raises:
        CaptureError: if it is sparse.
    """
    if x.layout != torch.strided:
        raise CaptureError(f"an argument of shape {tuple(x.shape)} is sparse. Pass x.to_dense(). {WAY_OUT}")
    return x.shape, x.stride(), x.dtype, x.device


def _constant(x: Any) -> Any:
    """Return something that is equal for equal arguments that are no tensors."""
    if isinstance(x, float | complex) and x != x:
        return type(x), "nan"
    if isinstance(x, bool | int | float | complex | str | bytes | type(None) | torch.Size | torch.dtype | torch.device):
        return type(x), x
    return _Same(x)


class _Stored(Mapping[str, Any]):
    """A dictionary of Pyro's param store, which is another object after `clear` and `set_state`.

    Args:
        part: attribute of the store.
    """

    def __init__(self, part: str) -> None:
        self.part, self._store = part, vars(pyro.get_param_store())

    def get(self, name: str, default: Any = None) -> Any:
        return self._store[self.part].get(name, default)

    def __getitem__(self, name: str) -> Any:
        return self._store[self.part][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store[self.part])

    def __len__(self) -> int:
        return len(self._store[self.part])


class _Same:
    """An object that is equal to itself alone, and is kept alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def differentiable_loss(loss: Any) -> Callable[..., Tensor]:
    """Return the function of model, guide and arguments that is the differentiable loss.

    Raises:
        CaptureError: if Pyro has none for this loss.
    """
    if type(loss) in DIFFERENTIABLE:
        return partial(DIFFERENTIABLE[type(loss)], loss)
    if not isinstance(loss, ELBO):
        if not callable(loss):
            raise TypeError(f"A loss is a pyro.infer.ELBO, or a function of model, guide and arguments, but found {loss!r}.")
        return loss
    if "differentiable_loss" not in {name for cls in type(loss).__mro__ for name in vars(cls)}:
        raise CaptureError(
            f"{type(loss).__name__} has no differentiable loss in Pyro, and cannot be captured. Use Trace_ELBO, "
            "TraceMeanField_ELBO, TraceEnum_ELBO, RenyiELBO, or the objectives of this package; or run it by pyro.infer.SVI."
        )
    return loss.differentiable_loss  # type: ignore[attr-defined]
