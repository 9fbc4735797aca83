"""Attributes of the groups of ArviZ data: what made them, and what they do not have, and why."""

from __future__ import annotations

__all__ = ["group_attributes"]

from datetime import UTC, datetime

import pyro

from pyro_genmodels import __version__
from pyro_genmodels.inference_data.groups import Groups

JOINT_DENSITY = (
    "loo_pit(data, y={name!r}): there is one density for all of {dims}, and loo_pit wants one per number. For a coordinate j "
    "call az.loo_pit(y=y[:, j], y_hat=y_hat[:, j], log_weights=az.psislw(-log_likelihood)[0]), with draws as the last dimension"
)
"""Note on a log-likelihood of events."""


def group_attributes(groups: Groups, group: str) -> dict[str, str]:
    """Return the attributes of a group."""
    attributes = {
        "created_at": datetime.now(UTC).isoformat(),
        "inference_library": "pyro-ppl",
        "inference_library_version": pyro.__version__,
        "creation_library": "pyro_genmodels",
        "creation_library_version": __version__,
    }
    left_out = _left_out(groups, group)
    return attributes | ({"left_out": left_out} if left_out else {})


def _left_out(groups: Groups, group: str) -> str:
    """Return what a group does not have that functions of ArviZ ask for, and why."""
    if group == "sample_stats":
        return groups.note
    data = groups.variables.get("observed_data", {})
    densities = groups.variables[group] if group == "log_likelihood" else {}
    no_loo = [groups.no_loo] if densities and groups.no_loo else []
    events = {name: [d for d in data[name][1] if d not in dims] for name, (_, dims) in densities.items() if name in data}
    joint = [JOINT_DENSITY.format(name=name, dims=", ".join(dims)) for name, dims in events.items() if dims]
    return "; ".join(no_loo + joint)
