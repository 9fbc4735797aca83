"""Parameters and the state of a Pyro optimiser as one dictionary, and back."""

from __future__ import annotations

__all__ = ["load_state", "state_of"]

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim

from pyro_genmodels._pyro.params import unconstrained
from pyro_genmodels.infer.compiled.updates import load_optimizer


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


def load_state(optim: PyroOptim, state: Mapping[str, Any]) -> None:
    """Set parameters, in place, and the state of an optimiser.

    Args:
        optim: the optimiser.
        state: what `state_of` returned.

    Raises:
        ValueError: if a parameter is not in Pyro's param store, or has another shape.
    """
    store = pyro.get_param_store()
    for name, value in state["parameters"].items():
        p = unconstrained(name)
        if p is None or p.shape != value.shape:
            raise ValueError(
                f"The parameter {name!r} of shape {tuple(value.shape)} is not in Pyro's param store. Run the guide and the "
                "model once first, as by evaluate_loss(...), so that their parameters exist."
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
