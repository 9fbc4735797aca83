r"""Replicated data of a model.

.. math:: z^* \sim p(z), \qquad \tilde y \sim p(y \mid z^*), \qquad z \sim p(z \mid \tilde y) .

The arguments of the model stay as they are: only the values at its observed sites are replaced. So nothing need be known of
which argument holds the data. But what a model computes from the data elsewhere, such as lagged values, stays that of the data
that were given.
"""

from __future__ import annotations

__all__ = ["JointSampler"]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels._pyro.predictive import observed_sites
from pyro_genmodels._pyro.sites import observed_value, was_observed
from pyro_genmodels.utils.errors import listed
from pyro_genmodels.utils.nested import map_nested
from pyro_genmodels.utils.rng import forked_rng


class JointSampler:
    """Draws of latent variables from their prior together with data that follow from them.

    Args:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: names of the sites that hold data; by default those that the model observes.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any], observed: Sequence[str] | None = None
    ) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs)
        self.observed = None if observed is None else list(observed)

    def __call__(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return latent variables and data, both by name.

        Raises:
            ValueError: if the model observes nothing, has a `pyro.factor` or lacks a site that holds data.
            ArithmeticError: if a value is not finite.
        """
        latents, data = self._split(self._trace(self.args, self.kwargs))
        if bad := [name for name, x in {**latents, **data}.items() if not torch.as_tensor(x).isfinite().all()]:
            raise ArithmeticError(f"The model draws values of {listed(bad)} that are not finite.")
        return latents, data

    def _trace(self, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        with handlers.side_effect_free(self.model):
            return traces.trace_of(handlers.draw_observed(self.model), args, kwargs)

    def _split(self, trace: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sites = {name: site for name, site in traces.sample_sites(trace).items() if not site["is_observed"]}
        data = self._data_names(trace)
        latents = {name: site["value"].detach() for name, site in sites.items() if name not in data}
        return latents, {name: trace.nodes[name]["value"].detach() for name in data}  # computed by a simulator, maybe

    def _data_names(self, trace: Any) -> list[str]:
        """Return the names of the sites that hold data.

        Raises:
            ValueError: if there is none, or one of those named is missing.
        """
        found = list(observed_sites(trace)) if self.observed is None else self.observed
        if missing := [name for name in found if name not in trace.nodes]:
            raise ValueError(f"The model has no site {missing[0]!r} to hold data, but {listed(traces.sample_sites(trace))}.")
        return found

    def uses_data_elsewhere(self) -> bool:
        """Return True if the model draws other values when the data in its arguments are replaced by their rows in reverse.

        Its draws, of data too, do not depend on the data unless it reads them elsewhere than as ``obs=``. Only data that are
        arguments, or parts of one, can be followed. Rows in reverse are like the rows themselves in range and mean.

        Raises:
            ValueError: if no site holds data.
        """
        with forked_rng(0):
            trace = self._trace(self.args, self.kwargs)
        data = [observed_value(trace.nodes[name]) for name in self._data_names(trace) if was_observed(trace.nodes[name])]
        places = {x.untyped_storage().data_ptr() for x in data if isinstance(x, Tensor)}

        def reverse(value: Any) -> Any:
            shared = isinstance(value, Tensor) and value.dim() and value.untyped_storage().data_ptr() in places
            return value.flip(0) if shared else value

        with forked_rng(0):
            again = self._trace(*(map_nested(reverse, part) for part in (self.args, self.kwargs)))
        first, second = traces.sample_sites(trace), traces.sample_sites(again)
        return any(name not in second or not site["value"].equal(second[name]["value"]) for name, site in first.items())
