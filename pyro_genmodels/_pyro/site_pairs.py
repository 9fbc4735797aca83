"""The divergence of a guide's distribution from the model's at one latent variable, for each coordinate where possible."""

from __future__ import annotations

__all__ = ["in_one_order", "site_divergence"]

from typing import Any

from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyro_genmodels._pyro import traces


def in_one_order(model_trace: Trace, guide_trace: Trace) -> bool:
    """Return True if the guide samples latent variables in the model's order, so that divergences may be exact.

    Otherwise the model's distribution of a variable may depend on what the guide samples after it.
    """
    names = traces.latents(model_trace)
    return names == [name for name in traces.latents(guide_trace) if name in names]


def site_divergence(model_site: Any, guide_site: Any, *, may_be_exact: bool) -> Tensor:
    """Return the divergence at a pair of sites in nats: exact if torch knows it, and else the log ratio of the draw.

    Args:
        model_site: site of the model.
        guide_site: site of the guide, with the same value.
        may_be_exact: see `in_one_order`.

    Returns:
        (batch..., coordinates...) if `to_event` made an event of independent coordinates in both, else (batch...).
    """
    z = guide_site["value"]
    q, p = _coordinates(guide_site["fn"]), _coordinates(model_site["fn"])
    if q.event_dim != p.event_dim:  # coordinates of one depend on each other
        q, p = guide_site["fn"], model_site["fn"]
    values = _exact(q, p) if may_be_exact else None
    if values is None:
        values = q.log_prob(z) - p.log_prob(z)
    return values.expand(z.shape[: z.dim() - q.event_dim])


def _coordinates(fn: Any) -> Any:
    """Return the distribution of the coordinates that `to_event` has declared to be one event."""
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def _exact(q: Distribution, p: Distribution) -> Tensor | None:
    """Return the divergence of two distributions, if torch knows it."""
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None
