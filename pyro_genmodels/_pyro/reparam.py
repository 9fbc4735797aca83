"""Latent variables under `poutine.reparam`, which Pyro marks as observed.

A reparametrisation computes the value of a latent variable x from auxiliary variables, and leaves an observed `Delta` at the
site of x. So ``is_observed`` does not tell such a variable from data. `MarkComputed` writes the answer into the site, where
`sites.is_computed` finds it.
"""

from __future__ import annotations

__all__ = ["MarkComputed", "is_reparametrised", "replaceable"]

from collections.abc import Mapping
from typing import Any

from pyro.distributions import Delta
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from pyro_genmodels._pyro import sites


def is_reparametrised(msg: Mapping[str, Any]) -> bool:
    """Return True if a running handler of Pyro has replaced this site by the value that it computed for it.

    A variable that stays random, as data under `StableReparam` do, is no such site.
    """
    handlers = [handler for handler in _PYRO_STACK if isinstance(handler, ReparamMessenger)]
    if not handlers or not isinstance(sites.innermost(msg["fn"]), Delta):
        return False
    return any(_reparametrises(handler.config, msg["name"]) for handler in handlers)


def _reparametrises(config: Any, name: str) -> bool:
    """Return True if the configuration of a handler names a site; a function is taken to do so, without calling it again."""
    by_name = getattr(config, "config", config)  # a Strategy remembers what it has decided
    return by_name.get(name) is not None if isinstance(by_name, Mapping) else True


def _is_conditioned(name: str) -> bool:
    """Return True if a running `poutine.condition` has fixed this site."""
    return any(isinstance(handler, ConditionMessenger) and name in handler.data for handler in _PYRO_STACK)


class MarkComputed(Messenger):
    """Handler that marks the sites of reparametrised latent variables.

    Raises:
        ValueError: if data are reparametrised by one of Pyro's methods for latent variables. The density would be that of
            other coordinates, and replicated data would be the data.
    """

    def __init__(self) -> None:
        super().__init__()
        self._previous: Mapping[str, Any] = {"name": "", "infer": {}, "is_observed": False}

    def _pyro_post_sample(self, msg: Any) -> None:
        previous, self._previous = self._previous, msg
        if not (msg["is_observed"] and is_reparametrised(msg)) or sites.is_deterministic(msg):
            return
        name, auxiliary = msg["name"], previous["name"]
        is_data = (previous["is_observed"] or sites.was_observed(previous)) and not sites.is_computed(previous)
        if is_data and auxiliary.startswith(f"{name}_") and not _is_conditioned(auxiliary):
            raise ValueError(
                f"The observed site {name!r} is reparametrised as {auxiliary!r}, in a way that Pyro has for latent variables "
                f"only. Leave {name!r} out of the config of poutine.reparam."
            )
        msg["infer"]["reparametrised"] = True


def replaceable(value: Any) -> Any:
    """Return an initial value that a reparametrisation may replace without a warning, since nobody has asked for it.

    `init_to_uniform` of Pyro marks its values so.
    """
    if not isinstance(value, Tensor):
        return value
    marked: Any = value.detach()
    marked._pyro_custom_init = False
    return marked
