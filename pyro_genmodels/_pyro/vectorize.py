"""Whether a model's particles can be drawn together in one run."""

from __future__ import annotations

__all__ = ["can_vectorize"]

from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_genmodels._pyro import traces


def can_vectorize(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], nesting: int, *, trials: int = 3) -> bool:
    """Whether particles in one run say the same as runs of their own.

    A model that indexes or reduces its latent variables from the left, ``z[0]`` or ``z.sum()``, takes particles for
    coordinates, and need not raise an error. So a few particles are drawn together, and each is run again alone: densities and
    deterministic values must be the same.
    """
    if traces.is_family(model):
        return True
    if isinstance(poutine.unwrap(guide), Messenger):
        return False
    dim = -nesting - 1
    try:
        pair = traces.run_pair(model, guide, args, kwargs, traces.particles(trials, nesting))
        together = [traces.log_prob(trace, (dim,), scaled=True).expand(trials) for trace in pair]
        if not any(map(traces.latents, pair)):  # nothing to index; and noise of a dequantised density differs from call to call
            return True
        for i in range(trials):
            again = [poutine.replay(fn, trace=_particle(trace, i, dim)) for fn, trace in zip((model, guide), pair, strict=True)]
            alone = traces.run_pair(again[0], again[1], args, kwargs)
            for name, one in traces.sample_sites(alone[0]).items():
                if traces.is_deterministic(one):
                    value = _of_particle(traces.sample_sites(pair[0])[name]["value"], one, i, dim)
                    if not torch.allclose(value, one["value"], rtol=1e-3, atol=1e-3):
                        return False
            for trace, values in zip(alone, together, strict=True):
                if not torch.allclose(traces.log_prob(trace, (dim,), scaled=True).squeeze(), values[i], rtol=1e-3, atol=1e-3):
                    return False
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):  # of shapes; a true fault comes again, alone
        return False
    return True


def _of_particle(value: Tensor, alone: Mapping[str, Any], i: int, dim: int) -> Tensor:
    """A deterministic value of one particle, in the shape that it has alone."""
    event_dim = max(alone["value"].dim() - traces.plate_depth(alone), 0)
    value = value.reshape((1,) * (event_dim - dim - value.dim()) + value.shape)
    value = value.select(dim - event_dim, i if value.shape[dim - event_dim] > 1 else 0)
    return value.reshape(alone["value"].shape)


def _particle(trace: Trace, i: int, dim: int) -> Trace:
    """One particle of a trace, with the shapes it would have alone."""
    alone = Trace()
    for name, site in traces.sample_sites(trace).items():
        value, event_dim = site["value"], site["fn"].event_dim
        if value.dim() - event_dim >= -dim:
            value = value.select(value.dim() - event_dim + dim, i)
        own = value.shape[max(value.dim() - event_dim - traces.plate_depth(site), 0) :]
        alone.add_node(name, **{**site, "value": value.reshape(own)})
    return alone
