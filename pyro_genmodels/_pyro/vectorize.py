"""Tests of a model: do its particles, sampled together in one run, agree with runs of one particle?"""

from __future__ import annotations

__all__ = ["SHAPE_ERRORS", "agree_alone", "at_most_one_more_dim", "can_vectorize", "most_different_particle"]

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_genmodels._pyro import sites, traces
from pyro_genmodels.utils.precision import in_doubles

SHAPE_ERRORS = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)
"""Errors of a model that does not broadcast over particles. A fault of another kind comes again in a run of one particle."""

TOLERANCE = 1e-3
"""Tolerated difference of one particle together and alone, as a share of the differences between particles.

Values have the user's units and offset, of which the differences know nothing. Log densities have a unit: they may differ by as
many nats in any case.
"""

ROUNDING = 64
"""Tolerated difference in units of rounding errors."""


def can_vectorize(model: Any, guide: Any, args: tuple, kwargs: Mapping[str, Any], nesting: int, *, trials: int = 3) -> bool:
    """Return True if particles sampled together in one run agree with runs of one particle.

    A model that indexes or reduces its latent variables from the left, ``z[0]`` or ``z.sum()``, takes particles for
    coordinates, and may raise no error. So this samples a few particles together and compares each with a run of its own.

    Args:
        model: function with Pyro statements.
        guide: function with Pyro statements, or a `Messenger`, which never vectorises.
        args: positional arguments of both.
        kwargs: keyword arguments of both.
        nesting: number of batch dimensions that plates take.
        trials: number of particles, at least 2.
    """
    if traces.is_family(model):
        return True
    if isinstance(poutine.unwrap(guide), Messenger):
        return False
    model_without_args, guide_without_args = (lambda: model(*args, **kwargs)), (lambda: guide(*args, **kwargs))
    try:
        with at_most_one_more_dim(nesting):
            pair = traces.run_pair(model, guide, args, kwargs, traces.particles(trials, nesting))
        return agree_alone(model_without_args, guide_without_args, pair, trials, nesting, range(trials))
    except SHAPE_ERRORS:
        return False


def at_most_one_more_dim(nesting: int) -> Messenger:
    """Return a context that ends a run of many particles at a site with more dimensions than those of particles and plates.

    A model that takes particles for coordinates may add dimensions at each step of a loop, until no memory is left.

    Args:
        nesting: number of batch dimensions that plates take.

    Raises:
        ValueError: in the context, at such a site.
    """
    return _DimsMessenger(nesting + 1)


class _DimsMessenger(Messenger):
    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg) and len(msg["fn"].batch_shape) > self.most:
            raise ValueError(f"site {msg['name']!r} has {len(msg['fn'].batch_shape)} batch dimensions, not {self.most}")


def agree_alone(
    model: Any, guide: Any, pair: tuple[Trace, Trace], num_particles: int, nesting: int, checked: Iterable[int]
) -> bool:
    """Return True if particles of a vectorised run agree with runs of their own, in log density and deterministic values.

    Args:
        model: function without arguments.
        guide: function without arguments.
        pair: traces of the model and the guide in a plate `traces.particles`.
        num_particles: size of that plate.
        nesting: number of batch dimensions that other plates take.
        checked: particles to compare, each by one run of model and guide.
    """
    dim = -nesting - 1
    together = [traces.log_prob(trace, (dim,), scaled=True).expand(num_particles) for trace in pair]
    if not any(map(traces.latents, pair)):  # nothing to index; and the noise of a dequantised density is drawn at each call
        return True
    if any(bool(values.isneginf().all()) for values in together):  # impossible particles are alike whatever the model does
        return False
    for i in checked:
        model_i, guide_i = (poutine.replay(fn, trace=_particle(t, i, dim)) for fn, t in zip((model, guide), pair, strict=True))
        alone = traces.run_pair(model_i, guide_i, (), {})
        for name, site in traces.sample_sites(alone[0]).items():
            if sites.is_computed(site):
                value, spread = _computed_value(traces.sample_sites(pair[0])[name]["value"], site, i, dim)
                if not _close(value, site["value"], spread):
                    return False
        for trace, values in zip(alone, together, strict=True):
            spread = _typical_difference(values).clamp(min=1.0)
            if not _close(traces.log_prob(trace, (dim,), scaled=True).squeeze(), values[i], spread):
                return False
    return True


def most_different_particle(trace: Trace, num_particles: int, nesting: int) -> int:
    """Return the index of the particle whose latent variables differ from those of particle 0 in most coordinates.

    A model that indexes its latent variables from the left, ``z[0]``, gives every particle the values of particle 0. A run of
    one particle reveals this only if the values of that particle are different.

    Args:
        trace: trace of the model in a plate `traces.particles`.
        num_particles: size of that plate, at least 2.
        nesting: number of batch dimensions that other plates take.
    """
    dim = -nesting - 1
    different = torch.zeros(num_particles)
    for name in traces.latents(trace):
        site: Any = trace.nodes[name]
        value = site["value"]
        axis = value.dim() - site["fn"].event_dim + dim
        if axis >= 0 and value.shape[axis] == num_particles:
            rows = value.movedim(axis, 0).reshape(num_particles, -1)
            different += (rows != rows[:1]).sum(1).to(different)
    return int(different[1:].argmax()) + 1


def _close(a: Tensor, b: Tensor, spread: Tensor) -> bool:
    """Return True if two values are the same but for a small share of the spread between particles, and rounding."""
    rounding = ROUNDING * torch.finfo(a.dtype).eps * torch.maximum(a.abs(), b.abs()) if a.is_floating_point() else 0.0
    same = (a == b) | (a.isnan() & b.isnan()) | ((in_doubles(a) - in_doubles(b)).abs() <= TOLERANCE * spread + rounding)
    return bool(same.all())


def _typical_difference(values: Tensor) -> Tensor:
    """Return the median distance of log densities from their median; impossible particles, and far ones, hardly change it."""
    values = values[values.isfinite()]
    return (values - values.median()).abs().median() if len(values) else torch.zeros(())


def _computed_value(together: Tensor, alone: Mapping[str, Any], i: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return a computed value of one particle and the spread of finite ones, in the shape that it has in a run of one."""
    event_dim = max(alone["value"].dim() - sites.plate_depth(alone), 0)
    together = together.reshape((1,) * (event_dim - dim - together.dim()) + together.shape)
    axis, shape = dim - event_dim, alone["value"].shape
    own = together.select(axis, i if together.shape[axis] > 1 else 0)
    is_finite = together.isfinite()
    largest, least = (in_doubles(together).where(is_finite, end) for end in (-torch.inf, torch.inf))
    spread = (largest.amax(axis) - least.amin(axis)).clamp(min=0.0)  # 0 if none is finite
    return own.reshape(shape), spread.reshape(shape)


def _particle(trace: Trace, i: int, dim: int) -> Trace:
    """Return one particle of a trace, with the shapes it has in a run of one particle."""
    alone = Trace()
    for name, site in traces.sample_sites(trace).items():
        value, event_dim = site["value"], site["fn"].event_dim
        if value.dim() - event_dim >= -dim:
            value = value.select(value.dim() - event_dim + dim, i)
        own = value.shape[max(value.dim() - event_dim - sites.plate_depth(site), 0) :]
        alone.add_node(name, **{**site, "value": value.reshape(own)})
    return alone
