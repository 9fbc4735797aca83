"""The sections of `python -m benchmarks.speed`, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.speed import nuts, profile, rows, scaling, startup
from benchmarks.speed.measure import Bench

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "svi-step": rows.svi_step,
    "svi-run": rows.svi_run,
    "enum": rows.enumeration,
    "vae": rows.vae,
    "flow": rows.flow,
    "flow-eager": rows.flow_eager,
    "vae-eager": rows.vae_eager,
    "nuts": nuts.nuts,
    "nuts-first": nuts.first_chain,
    "restarts": rows.restarts,
    "langevin": rows.langevin,
    "scaling": scaling.scaling,
    "startup": startup.startup,
    "profile": profile.profile,
}
