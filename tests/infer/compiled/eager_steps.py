"""What stock Pyro computes for a program: the loss, its gradients and the state that a run leaves behind."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from programs import Run
from pyro import poutine
from pyro.infer import SVI
from pyro.optim import SGD
from torch import Tensor

from pyro_genmodels._pyro import traces


class Step(NamedTuple):
    """A loss with its gradients by the names of the parameters, without those on which the loss does not depend."""

    loss: float
    gradients: dict[str, Tensor]


def eager(run: Run) -> Step:
    """Return loss and gradients as `SVI` computes them, from the present state of the random numbers."""
    svi = SVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss)
    with poutine.trace(param_only=True) as capture:
        loss = svi.loss_and_grads(run.model, run.guide, *run.args, **run.kwargs)
    parameters = {name: site["value"].unconstrained() for name, site in capture.trace.nodes.items()}
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.grad = None
    return Step(float(torch.as_tensor(loss).detach()), gradients)


def buffers(run: Run) -> list[Tensor]:
    """Return copies of the buffers of the modules of a program: running means, chains, power iterations."""
    return [b.clone() for module in (*run.modules, *traces.modules_of(run.model, run.guide)) for b in module.buffers()]


def parameters() -> dict[str, Tensor]:
    """Return copies of all unconstrained parameters in the param store."""
    store = pyro.get_param_store()
    return {name: store[name].unconstrained().detach().clone() for name in sorted(store)}


def unnumbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by names without the number that a family has among those of its class."""
    return {re.sub(r"^([A-Za-z]+)_\d+\.", r"\1.", name): x for name, x in tensors.items()}


def assert_same_step(found: Step, wanted: Step, **tolerance: Any) -> None:
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(wanted.loss), msg=_named("loss"), **tolerance)
    assert_same_tensors(found.gradients, wanted.gradients, **tolerance)


def assert_same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: Any) -> None:
    found, wanted = unnumbered(found), unnumbered(wanted)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=_named(name), **tolerance)


def _named(name: str) -> Any:
    return lambda message: f"{name}: {message}"


def losses_of(svi: Any, run: Run, seeds: Iterable[int]) -> list[float]:
    """Return the losses of steps of an `SVI` or a `CompiledSVI`, each from its seed."""
    losses = []
    for seed in seeds:
        pyro.set_rng_seed(seed)
        losses.append(float(svi.step(*run.args, **run.kwargs)))
    return losses
