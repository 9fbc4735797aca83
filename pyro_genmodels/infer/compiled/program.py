"""Programs captured as graphs: a loss and its gradients, as functions of the tensors among the arguments.

A captured program is right as long as it is what it was. Three things see to that. Tensors are read live (see `graph`).
The watch finds names that were bound anew (see `watch`). The audit compares the graph with the program itself, at steps 1, 2,
4, 8, ... and every 1000th, under the same random numbers (see `audit`).
"""

from __future__ import annotations

__all__ = ["Check", "Program"]

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor

from pyro_genmodels._pyro.capturing import capturable, find_parameters, has_hooks
from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels._pyro.messages import without_trace_shapes
from pyro_genmodels._pyro.tracing import tree_flatten, tree_unflatten
from pyro_genmodels.infer.compiled.audit import compare
from pyro_genmodels.infer.compiled.graph import trace
from pyro_genmodels.infer.compiled.recorder import WAY_OUT, CaptureError, StaleGraphError, put_back
from pyro_genmodels.infer.compiled.watch import Watch

AUDIT_PERIOD = 1000
"""Number of steps after which the graph is compared with the program again and again."""

Check: TypeAlias = Callable[["Program", Sequence[Tensor], Sequence[Any]], float]
"""Function of a program, its inputs, and its own loss and gradients, that returns a difference."""

LAYOUT = operator.attrgetter("shape", "dtype", "requires_grad")
"""Function of a tensor that returns what a graph takes for granted of it."""


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

    def audit(self, inputs: Sequence[Tensor], check: Check | None = None) -> float:
        """Compare the graph with the program, under the same random numbers, and return the largest difference.

        If the graph was built for a mode, what was built is compared too.

        Args:
            inputs: tensors among the arguments.
            check: a further comparison, of other code that was built of the graph, under the same random numbers.

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
        for further in (check, None if self.built is None else Program._check_built):
            if further is not None:
                with self.graph.put_back(), torch.no_grad():
                    difference = max(difference, further(self, inputs, expected))
        return difference

    def _check_built(self, inputs: Sequence[Tensor], expected: Sequence[Any]) -> float:
        built: Any = self.built
        return self.compare(expected, built(*inputs, *self.graph.read)[: self.graph.num_outputs], is_built=True)

    def compare(self, expected: Sequence[Any], found: Sequence[Any], *, is_built: bool = False) -> float:
        """Return the largest difference of the loss and the gradients; see `audit.compare`."""
        return compare(expected, found, [*self.parameters], self.eps, is_built=is_built)


def _coarsest_eps(dtypes: Iterable[torch.dtype]) -> float:
    """Return the unit of rounding of the coarsest of dtypes; integers have none."""
    return max((torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex), default=0.0)


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
