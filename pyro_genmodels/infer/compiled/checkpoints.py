"""Parameters and the state of a Pyro optimiser as one dictionary, and back."""

from __future__ import annotations

__all__ = ["check_state", "load_state", "state_of"]

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from pyro_genmodels._pyro.params import unconstrained
from pyro_genmodels.infer.compiled.updates import load_optimizer
from pyro_genmodels.utils.errors import listed


def state_of(optim: PyroOptim) -> dict[str, Any]:
    """Return copies of the unconstrained parameters of an optimiser, by name, and of its state.

    Raises:
        ValueError: if parameters are not in Pyro's param store.
    """
    store = pyro.get_param_store()
    parameters = {store.param_name(p): p.detach().clone() for p in optim.optim_objs}
    if None in parameters:
        raise ValueError(
            "Some parameters are not in Pyro's param store, as with module_local_params=True, so that their names are not "
            "known. Save the state_dict() of the modules."
        )
    return {"parameters": parameters, "optimizer": deepcopy(optim.get_state())}


def check_state(state: Mapping[str, Any]) -> list[str]:
    """Return the names of parameters of a state that are not yet in Pyro's param store.

    Raises:
        ValueError: if a parameter there has another shape.
    """
    missing = []
    for name, value in state["parameters"].items():
        p = unconstrained(name)
        if p is None:
            missing.append(name)
        elif p.shape != value.shape:
            raise ValueError(
                f"The parameter {name!r} has the shape {tuple(value.shape)} in the state to load, but {tuple(p.shape)} in "
                "Pyro's param store. Is it the state of another model or guide? If another program ran before, call "
                "pyro.clear_param_store() first."
            )
    return missing


def load_state(optim: PyroOptim, state: Mapping[str, Any]) -> None:
    """Set parameters, in place, and the state of an optimiser.

    Args:
        optim: the optimiser.
        state: what `state_of` returned.

    Raises:
        ValueError: if a parameter is not in Pyro's param store, or has another shape.
    """
    store = pyro.get_param_store()
    if missing := check_state(state):
        raise ValueError(
            f"The state to load has parameters {listed(missing)}, which model and guide do not have: they have {listed(store)}."
        )
    with torch.no_grad():
        for name, value in state["parameters"].items():
            unconstrained(name).copy_(value)  # type: ignore[union-attr]
    known = {store.param_name(p): optimizer for p, optimizer in optim.optim_objs.items()}
    waiting = {}
    for name, saved in deepcopy(state["optimizer"]).items():
        if name in known:
            load_optimizer(known[name], saved)
        else:
            waiting[name] = saved
    optim.set_state(waiting)
