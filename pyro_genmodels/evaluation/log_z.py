"""Log Z of the energies in a trace: computed or estimated once, put where a likelihood reads it, and its error accounted for.

Errors of log Z are not those of single rows: all rows have the same, or all of one label; and a row in which an energy stands
several times has it as often. With :math:`m_{nz}` times that row n counts the constant z of error :math:`\\sigma_z`,

.. math:: \\mathrm{var}_n = \\sum_z m_{nz}^2 \\sigma_z^2, \\qquad
    \\mathrm{var}\\Bigl(\\tfrac1N \\sum_n\\Bigr) = \\sum_z \\bar m_z^2 \\sigma_z^2 .
"""

from __future__ import annotations

__all__ = ["LogPartitions"]

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from pyro.poutine import Trace
from torch import Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.handlers import map_inner
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.partition import log_partition
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionKind
from pyro_genmodels.utils.distributions import unwrap


@dataclass
class _Known:
    """What is known of the constants at a site: one without a context, else one for each distinct context."""

    found: list[LogPartition] = field(default_factory=list)
    place: dict[bytes, int] = field(default_factory=dict)
    variances: list[float] = field(default_factory=list)
    uses: dict[int, float] = field(default_factory=dict)
    rows: dict[int, float] = field(default_factory=dict)


@dataclass
class LogPartitions:
    """Log Z of energies, one for a site without a context, and one for each context of another.

    Attributes:
        num_chains: behind an estimate.
        num_steps: betas of its path.
        progress: whether to show a progress bar.
        known: by role ("model" or "guide") and name of the site.
        kinds: of all that was found.
    """

    num_chains: int
    num_steps: int
    progress: bool = False
    known: dict[tuple[str, str], _Known] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)

    def put(self, trace: Trace, role: str) -> list[tuple[tuple[str, str], Tensor]]:
        """Has the energies of a trace count log Z; which of a site's constants each element has, of its batch shape."""
        places = []
        for name, site in traces.sample_sites(trace).items():
            dist: Any = unwrap(site["fn"])
            if not capabilities(dist).intractable:
                continue
            known = self.known.setdefault((role, name), _Known())
            value, place = self._shared(dist, known) if dist.context is None else self._of_contexts(dist, known)
            kind = max((found.kind for found in known.found), key=get_args(PartitionKind).index)
            given = LogPartition(value, torch.zeros_like(value), kind)
            site["fn"] = map_inner(site["fn"], lambda dist, given=given: dist.normalized(given))
            places.append(((role, name), place))
        return places

    def _shared(self, dist: Energy, known: _Known) -> tuple[Tensor, Tensor]:
        if not known.found:
            self._learn(known, dist)
        return known.found[0].value, torch.zeros(dist.batch_shape, dtype=torch.long)

    def _of_contexts(self, dist: Any, known: _Known) -> tuple[Tensor, Tensor]:
        rows, inverse = dist.context.detach().reshape(-1, dist.context.shape[-1]).unique(dim=0, return_inverse=True)
        keys = [row.tobytes() for row in rows.cpu().numpy()]
        new = [i for i, key in enumerate(keys) if key not in known.place]
        if new:
            first = sum(found.value.numel() for found in known.found)
            self._learn(known, dist.replace(context=rows[new], _batch_shape=torch.Size([len(new)])))
            known.place.update({keys[i]: first + n for n, i in enumerate(new)})
        place = torch.tensor([known.place[key] for key in keys])[inverse.cpu()]
        place = place.reshape(dist.context.shape[:-1]).expand(dist.batch_shape)
        values = torch.cat([found.value.reshape(-1) for found in known.found])
        return values[place.to(values.device)], place

    def _learn(self, known: _Known, dist: Energy) -> None:
        found = self._find(dist)
        known.found.append(found)
        known.variances += found.std_error.square().reshape(-1).tolist()
        self.kinds.add(found.kind)

    def _find(self, dist: Energy) -> LogPartition:
        known, wanted = dist.log_partition, max(self.num_chains, 2) * self.num_steps
        good = known is not None and known.kind == "estimate" and known.num_chains * known.num_steps >= wanted
        if known is not None and (known.kind == "exact" or good):
            return known
        return log_partition(dist, num_chains=max(self.num_chains, 2), num_steps=self.num_steps, progress=self.progress)

    # Errors.

    def variance(self, places: list[tuple[tuple[str, str], Tensor]], nesting: int, dim: int, share: float) -> Tensor:
        """The variance that log Z gives to each row of a run, (rows,): the mean over draws, if these are beside each other.

        Args:
            places: as `put` returned them.
            nesting: dimensions of plates; draws are in the one on their left.
            dim: of the rows.
            share: of this run in all draws of these rows.
        """
        total = torch.zeros(())
        for key, place in places:
            known = self.known[key]
            place = place.reshape((1,) * (nesting + 1 - place.dim()) + place.shape).movedim((0, dim), (0, 1))
            draws, rows, count = place.shape[0], place.shape[1], len(known.variances)
            cells = torch.arange(draws * rows)[:, None] * count + place.reshape(draws * rows, -1)
            pairs, times = cells.unique(return_counts=True)
            of = pairs % count
            variances = torch.tensor(known.variances, dtype=torch.float64)[of] * times.square()
            total = total + torch.zeros(draws * rows, dtype=torch.float64).index_add_(0, pairs // count, variances).reshape(
                draws, rows
            ).mean(0)
            for z, used, n in zip(*self._sums(of, times), strict=True):
                known.uses[z] = known.uses.get(z, 0.0) + used / draws * share
                known.rows[z] = known.rows.get(z, 0.0) + n / draws * share
        return total

    @staticmethod
    def _sums(of: Tensor, times: Tensor) -> tuple[list[int], list[float], list[float]]:
        distinct, inverse, rows = of.unique(return_inverse=True, return_counts=True)
        uses = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, inverse, times.double())
        return distinct.tolist(), uses.tolist(), rows.tolist()

    def shared_error(self, rows: int) -> float:
        """Standard error that the mean over so many rows has of the constants that several of them share."""
        variance = sum(
            (uses / rows) ** 2 * known.variances[z]
            for known in self.known.values()
            for z, uses in known.uses.items()
            if known.rows[z] > 1 or rows == 1
        )
        return float(variance) ** 0.5

    @property
    def single(self) -> LogPartition | None:
        """Log Z, where there is one for all."""
        found = [found for known in self.known.values() for found in known.found]
        return found[0] if len(found) == 1 and not found[0].value.dim() else None
