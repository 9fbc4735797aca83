"""Many fits at once: one graph whose step is mapped over the parameters of all of them.

A fit that begins elsewhere may end elsewhere. Here a captured step is mapped over a first dimension of parameters, optimiser
state and random numbers (`torch.vmap`), so that a step of 64 fits costs about as much as a step of one.
"""

from __future__ import annotations

__all__ = ["RestartedFits", "initial_values"]

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.optim import SGD, Adagrad

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.capturing import copy_pair, find_parameters
from pyro_genmodels._pyro.handlers import exclusive
from pyro_genmodels.infer.compiled.functions import CapturedFunction
from pyro_genmodels.infer.compiled.graph import trace
from pyro_genmodels.infer.compiled.losses import CapturedLoss
from pyro_genmodels.infer.compiled.noise import Noise
from pyro_genmodels.infer.compiled.program import Program
from pyro_genmodels.infer.compiled.recorder import CaptureError, Recorder, put_back
from pyro_genmodels.infer.compiled.steps import next_step
from pyro_genmodels.infer.compiled.updates import State, Update
from pyro_genmodels.utils.errors import warn_caller


def initial_values(captured: CapturedLoss, count: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the unconstrained parameters of fresh copies of model and guide, (count, ...), by their names.

    Model and guide are copied as they are. Parameters are made anew by each copy, as in an empty param store, so that guides
    and models which were not yet run begin at other values each time.

    Args:
        captured: the loss.
        count: number of copies.
        args: positional arguments of the model and the guide.
        kwargs: keyword arguments.

    Warns:
        UserWarning: if all copies begin at the same values.
    """
    store = pyro.get_param_store()
    before = store.get_state()
    found: list[dict[str, Tensor]] = []
    try:
        for _ in range(count):
            store.clear()
            model, guide = copy_pair(captured.model, captured.guide)
            recorder = Recorder(refuse=False)  # modules in closures are not copied: what a run changes there is put back
            with recorder:
                parameters = find_parameters(lambda: captured.loss_of(model, guide, *args, **kwargs))  # noqa: B023
            recorder.restore()
            found.append({name: p.detach().clone() for name, p in parameters.items()})
    finally:
        store.clear()
        store.set_state(before)
    values = {name: torch.stack([parameters[name] for parameters in found]) for name in found[0]}
    if count > 1 and all(bool((x == x[:1]).all()) for x in values.values()):
        warn_caller(
            f"All {count} restarts begin at the same values, so that they differ by their random numbers alone. Give the guide "
            "a random start, such as AutoNormal(model, init_loc_fn=init_to_uniform), or parameters a function that draws them.",
            UserWarning,
        )
    return values


RECENT = 100
"""Number of steps over whose losses fits are compared."""


class RestartedFits:
    """The parameters of many fits, and their steps in one graph.

    Args:
        captured: the loss, captured.
        program: its program for the first arguments.
        update: the optimiser, which has made a step.
        values: first values of the parameters, (count, ...), by their names in Pyro's param store.

    Attributes:
        values: parameters that have gradients, (count, ...) each.
        states: state of the optimiser for each.
        count: number of fits.
    """

    def __init__(self, captured: CapturedLoss, program: Program, update: Update, values: Mapping[str, Tensor]) -> None:
        for optimizer in update.optimizers:
            group = optimizer.param_groups[0]
            if type(optimizer) is SGD and group["momentum"] and group["dampening"]:
                raise CaptureError("Restarts cannot make the first step of SGD with dampening. Use dampening=0.")
        if not update.parameters:
            raise CaptureError("Restarts need parameters to train, but the program has none.")
        names = {id(p): name for name, p in program.parameters.items()}
        self.captured, self.parameters = captured, update.parameters
        self.values = [values[names[id(p)]].clone() for p in update.parameters]
        self.count = len(self.values[0])
        self.states = [
            {name: _first_state(optimizer, name, x, self.count) for name, x in state.items()}
            for state, optimizer in zip(update.states(), update.optimizers, strict=True)
        ]
        self._recent: list[Tensor] = []
        update.count(-1)  # the step that the optimiser has made
        self._built: WeakKeyDictionary[Program, CapturedFunction] = WeakKeyDictionary()

    def step(self, program: Program, update: Update, inputs: Sequence[Tensor]) -> Tensor:
        """Make a step of every fit, and return their losses, (count,).

        Raises:
            CaptureError: if the program cannot be mapped over its parameters, or trains others than at the first step.
        """
        given = torch.tensor(update.rates()[0], dtype=torch.float64, device=update.device)
        if program not in self._built:
            self._built[program] = self._build(program, update, [*inputs, given])
        (losses,) = self._built[program](*inputs, given)
        update.count()
        self._recent = [*self._recent[1 - RECENT :], losses.detach().clone()]
        return losses

    def best(self) -> int:
        """Return the number of the fit with the lowest mean loss in the last 100 steps, of those whose losses are finite.

        Raises:
            ValueError: if no fit has finite losses.
        """
        means = torch.stack(self._recent).double().mean(0)
        if not means.isfinite().any():
            raise ValueError("The losses of all restarts are NaN or infinite. Lower the learning rate, or begin elsewhere.")
        return int(means.nan_to_num(nan=torch.inf).argmin())

    def select(self, index: int | None = None) -> int:
        """Write the parameters of one fit to where model and guide have theirs, and return its number.

        Args:
            index: number of the fit; by default the best.
        """
        index = self.best() if index is None else index
        with torch.no_grad():
            for p, values in zip(self.parameters, self.values, strict=True):
                p.copy_(values[index])
        return index

    def samples(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return samples of the latent variables by the guide of each fit, (count, num_samples, ...), by name.

        `to_arviz(samples, *args, model=model)` takes fits as chains. Parameters are left as they are.

        Args:
            num_samples: number of samples of each fit.
            args: arguments of the guide.
            kwargs: keyword arguments of the guide.
        """
        before = [p.detach().clone() for p in self.parameters]
        latents = self._latents(args, kwargs)
        found: list[list[dict[str, Tensor]]] = []
        try:
            for index in range(self.count):
                self.select(index)
                found.append([self._sample(latents, args, kwargs) for _ in range(num_samples)])
        finally:
            with torch.no_grad():
                for p, value in zip(self.parameters, before, strict=True):
                    p.copy_(value)
        return {name: torch.stack([torch.stack([sample[name] for sample in samples]) for samples in found]) for name in latents}

    def _latents(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
        with put_back(), torch.no_grad():
            return traces.latents(prune_subsample_sites(poutine.trace(self.captured.model).get_trace(*args, **kwargs)))

    def _sample(self, latents: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return one sample of the guide, and of the model's latent variables that the guide leaves to the model."""
        with torch.no_grad():
            guide = poutine.trace(self.captured.guide).get_trace(*args, **kwargs)
            model = poutine.trace(poutine.replay(self.captured.model, trace=guide)).get_trace(*args, **kwargs)
        return {name: model.nodes[name]["value"] for name in latents}

    def _build(self, program: Program, update: Update, inputs: Sequence[Tensor]) -> CapturedFunction:
        noise = Noise(program.graph.module, enabled=True)
        places = {id(p): i for i, p in enumerate(self.parameters)}
        if {id(p) for p in update.parameters} != set(places):
            raise CaptureError("Restarts need the same parameters at each step, but found others than at the first step.")
        order = [places[id(p)] for p in update.parameters]
        current, states = [self.values[i] for i in order], [self.states[i] for i in order]

        @torch.no_grad()
        def step(*tensors: Tensor) -> list[Tensor]:
            *given, rates = tensors

            def one(numbers: list[Tensor], values: list[Tensor], states: list[State]) -> Any:
                return next_step(program, update, noise, given, rates, numbers, values, states)

            mapped = torch.vmap(one, randomness="different")
            losses, new_values, new_states = mapped(noise.draw(self.count), current, states)
            for old, new in zip(current, new_values, strict=True):
                old.copy_(new)
            for old_state, new_state in zip(states, new_states, strict=True):
                for name, x in old_state.items():
                    x.copy_(new_state[name])
            return [losses]

        try:
            with exclusive("the capture of restarts", wait=True):
                graph = trace(step, *inputs)
        except CaptureError:
            raise
        except RuntimeError as error:
            raise CaptureError(f"The program cannot be mapped over its parameters: {error}") from error
        return CapturedFunction(graph, self.captured.mode, inputs)


def _first_state(optimizer: Any, name: str, x: Tensor, count: int) -> Tensor:
    """Return the state of an optimiser before its first step, (count, ...)."""
    first = torch.zeros_like(x).expand(count, *x.shape).clone()
    if type(optimizer) is Adagrad and name == "sum":
        first += optimizer.param_groups[0].get("initial_accumulator_value", 0.0)
    return first
