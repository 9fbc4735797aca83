"""Questions about one sample site of a trace, or about the message that becomes one."""

from __future__ import annotations

__all__ = [
    "PARTICLES",
    "enumeration_dim",
    "innermost",
    "is_computed",
    "is_deterministic",
    "is_weighted",
    "mask_of",
    "observed_value",
    "plate_depth",
    "plate_frames",
    "was_observed",
]  # fmt: skip

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor

PARTICLES = "num_particles_vectorized"
"""Name of the plate of vectorised particles, the same as Pyro's own."""


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Return True for a site of `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


def is_computed(site: Mapping[str, Any]) -> bool:
    """Return True if the value is computed from latent variables, and so is not data, although the site is observed.

    These are the sites of `pyro.deterministic` and of reparametrised latent variables (`reparam.MarkComputed`).
    """
    return is_deterministic(site) or bool(site["infer"].get("reparametrised"))


def is_weighted(site: Mapping[str, Any]) -> bool:
    """Return True if a computed value comes with a density, as a sample from another distribution than the prior does."""
    fn = site["fn"]
    if isinstance(fn, MaskedDistribution) and fn._mask is False:
        return False
    return is_computed(site) and bool(torch.as_tensor(innermost(fn).log_density).any())


def was_observed(site: Mapping[str, Any]) -> bool:
    """Return True if a value was sampled at this site in place of an observed one (`handlers.draw_observed`)."""
    return bool(site["infer"].get("was_observed"))


def observed_value(site: Mapping[str, Any]) -> Tensor:
    """Return the observed value of a site at which another one was sampled (`handlers.draw_observed`)."""
    return site["infer"]["obs"]


def enumeration_dim(site: Mapping[str, Any]) -> int | None:
    """Return the negative batch dimension over which Pyro enumerates this site in parallel, or None."""
    return site["infer"].get("_enumerate_dim")


def plate_frames(site: Mapping[str, Any]) -> list[Any]:
    """Return the frames of the vectorised plates around a site, without the plate of particles."""
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != PARTICLES]


def plate_depth(site: Mapping[str, Any]) -> int:
    """Return the number of batch dimensions that the plates of a site take, without the plate of particles."""
    return max((-frame.dim for frame in plate_frames(site)), default=0)


def mask_of(site: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of a site, bool (batch...), or None if it has no mask.

    It combines `poutine.mask` with the `.mask` of the distribution.
    """
    masks = [] if site["mask"] is None else [site["mask"]]
    fn = site["fn"]
    while isinstance(fn, MaskedDistribution):
        masks.append(fn._mask)
        fn = fn.base_dist
    if not masks:
        return None
    value = site["value"]
    total = torch.ones(value.shape[: value.dim() - fn.event_dim], dtype=torch.bool, device=value.device)
    for mask in masks:
        total = total & torch.as_tensor(mask, device=value.device)
    return total


def innermost(fn: Any) -> Any:
    """Return the distribution at the end of a chain of `base_dist` attributes."""
    return innermost(fn.base_dist) if hasattr(fn, "base_dist") else fn
