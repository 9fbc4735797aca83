"""Plates without a size, ``pyro.plate("data")``, which Pyro counts as of -1 rows: their sites tell how many there are.

And plates around a call, whose dimensions the plates of a model would not get.
"""

from __future__ import annotations

__all__ = ["measure_plates", "plates_around"]

from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample

UNKNOWN_SIZE = -1


def measure_plates(*traces: Trace) -> None:
    """Give the plates without a size that of their sites, in all of these traces.

    The size is that of the batch shapes of the sites in the plate; 1 if none of them has more.
    """
    sizes: dict[str, int] = {}
    unmeasured = []
    for trace in traces:
        for site in trace.nodes.values():
            frames: list[Any] = [frame for frame in site.get("cond_indep_stack", ()) if _has_no_size(frame)]
            if frames and site["type"] == "sample" and not site_is_subsample(site):
                shape = _batch_shape(site)
                for f in frames:
                    sizes[f.name] = max(sizes.get(f.name, 1), shape[f.dim] if len(shape) >= -f.dim else 1)
                unmeasured.append(site)
    for site in unmeasured:
        stack = site["cond_indep_stack"]
        site["cond_indep_stack"] = tuple(f._replace(size=sizes[f.name]) if _has_no_size(f) else f for f in stack)


def _has_no_size(frame: Any) -> bool:
    return frame.vectorized and frame.size == UNKNOWN_SIZE


def _batch_shape(site: Any) -> torch.Size:
    """Return the batch shape of a site, to which that of its value may add."""
    value_shape = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return torch.broadcast_shapes(site["fn"].batch_shape, value_shape)


def plates_around() -> list[str]:
    """Return the names of the plates around the call that take a dimension, the outermost first."""
    return [handler.name for handler in _PYRO_STACK if isinstance(handler, IndepMessenger) and handler.dim is not None]
