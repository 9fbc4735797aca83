"""Log Z of the energies in a trace: computed or estimated, and put where a likelihood reads it."""

from __future__ import annotations

__all__ = ["Constants"]

from dataclasses import dataclass, field

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels import traces
from pyro_genmodels.distributions.base import unwrap, within
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.memory import LogPartition
from pyro_genmodels.partition import log_partition


@dataclass
class Constants:
    """Log Z of energies, one for a site without a context, and for each row of one with a context.

    Attributes:
        num_chains: behind an estimate.
        num_steps: betas of its path.
        progress: whether to show a progress bar.
        shared: log Z of sites without a context, by name.
        kinds: of all that was found.
    """

    num_chains: int
    num_steps: int
    progress: bool = False
    shared: dict[str, LogPartition] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)

    def put(self, trace: Trace) -> dict[str, LogPartition]:
        """Has the energies of a trace count log Z, and returns those of rows, by name of the site."""
        of_rows = {}
        for name, site in traces.samples(trace).items():
            dist = unwrap(site["fn"])
            if not isinstance(dist, Energy):
                continue
            if dist.context is None:
                found = self.shared[name] = self.shared.get(name) or self._find(dist)
            else:
                found = of_rows[name] = self._find(dist)
            site["fn"] = within(site["fn"], lambda dist, found=found: dist.normalized(found))
            self.kinds.add(found.kind)
        return of_rows

    def _find(self, dist: Energy) -> LogPartition:
        known = dist.log_partition
        if known is not None and known.kind == "exact":
            return known
        return log_partition(dist, num_chains=max(self.num_chains, 2), num_steps=self.num_steps, progress=self.progress)

    @property
    def variance(self) -> Tensor:
        """Of the sum of what is shared, ()."""
        return sum((found.std_error.square() for found in self.shared.values()), torch.zeros(()))
