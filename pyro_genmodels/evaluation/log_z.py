r"""Log Z of the energies in a trace: computed or estimated once, subtracted from log densities, and its error propagated.

Errors of log Z are shared between rows: by all of them, or by all with the same label. A row in which an energy occurs several
times has its error as many times. Let row n subtract the constant z, of standard error :math:`\sigma_z`, :math:`m_{nz}` times:

.. math:: \mathrm{var}_n = \sum_z m_{nz}^2 \sigma_z^2, \qquad
    \mathrm{var}\Bigl(\tfrac1N \sum_n\Bigr) = \sum_z \bar m_z^2 \sigma_z^2 .
"""

from __future__ import annotations

__all__ = ["LogPartitions", "SiteConstants"]

from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

import torch
from pyro.poutine import Trace
from torch import Size, Tensor

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.wrappers import map_inner
from pyro_genmodels.distributions.capabilities import capabilities
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.partition import log_partition
from pyro_genmodels.distributions.energy.state import LogPartition, PartitionKind
from pyro_genmodels.utils.distributions import unwrap

Site = tuple[str, str]
"""Role ("model" or "guide") and name of a site."""


class SiteConstants(NamedTuple):
    """The constants that a site uses in one run.

    Attributes:
        site: role and name of the site.
        indices: index of the constant of each element of the site's batch shape.
    """

    site: Site
    indices: Tensor


@dataclass
class _Constants:
    """All constants of a site: one without a context, else one for each distinct context.

    Attributes:
        log_partitions: results, each of one or several constants.
        index_of: index of the constant of each context, given as bytes.
        variances: variance of each constant.
        uses: mean number of times that the rows so far subtract a constant, summed over rows.
        rows: mean number of rows so far that use a constant.
    """

    log_partitions: list[LogPartition] = field(default_factory=list)
    index_of: dict[bytes, int] = field(default_factory=dict)
    variances: list[float] = field(default_factory=list)
    uses: dict[int, float] = field(default_factory=dict)
    rows: dict[int, float] = field(default_factory=dict)

    def add(self, result: LogPartition) -> None:
        """Add the constants of a result."""
        self.log_partitions.append(result)
        self.variances += result.std_error.square().reshape(-1).tolist()

    def count(self, index: Tensor, times: Tensor, weight: float) -> None:
        """Count pairs of a row and a constant: the constants (n,), and how many times (n,) the row subtracts each."""
        distinct, inverse, rows = index.unique(return_inverse=True, return_counts=True)
        uses = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, inverse, times.double())
        for z, used, n in zip(distinct.tolist(), uses.tolist(), rows.tolist(), strict=True):
            self.uses[z] = self.uses.get(z, 0.0) + used * weight
            self.rows[z] = self.rows.get(z, 0.0) + n * weight


@dataclass
class LogPartitions:
    """Log Z of energies: one for a site without a context, and one for each distinct context of another.

    Attributes:
        num_chains: chains of an estimate.
        num_steps: betas of its path.
        progress: True to show a progress bar.
        n_jobs: number of processes for the chains; see `log_partition`.
        constants: constants of each site.
        kinds: kinds of all results.
    """

    num_chains: int
    num_steps: int
    progress: bool = False
    n_jobs: int | None = None
    constants: dict[Site, _Constants] = field(default_factory=dict)
    kinds: set[PartitionKind] = field(default_factory=set)

    def normalize(self, trace: Trace, role: str) -> list[SiteConstants]:
        """Replace the energies of a trace by normalised ones.

        Args:
            trace: trace of a model or guide; its sites are changed.
            role: "model" or "guide".

        Returns:
            The constants that each energy uses.
        """
        used = []
        for name, site in traces.sample_sites(trace).items():
            dist: Any = unwrap(site["fn"])
            if not capabilities(dist).intractable:
                continue
            constants = self.constants.setdefault((role, name), _Constants())
            value, index = self._shared(dist, constants) if dist.context is None else self._by_context(dist, constants)
            kind = max((result.kind for result in constants.log_partitions), key=get_args(PartitionKind).index)
            log_z = LogPartition(value, torch.zeros_like(value), kind)
            site["fn"] = map_inner(site["fn"], lambda dist, log_z=log_z: dist.normalized(log_z))
            used.append(SiteConstants((role, name), index))
        return used

    def _shared(self, dist: Energy, constants: _Constants) -> tuple[Tensor, Tensor]:
        """Return log Z of an energy without a context, and the index 0 for each element of its batch shape."""
        if not constants.log_partitions:
            self._add(constants, dist)
        return constants.log_partitions[0].value, torch.zeros(dist.batch_shape, dtype=torch.long)

    def _by_context(self, dist: Any, constants: _Constants) -> tuple[Tensor, Tensor]:
        """Return log Z and its index for each context of an energy, both of its batch shape."""
        rows, inverse = dist.context.detach().reshape(-1, dist.context.shape[-1]).unique(dim=0, return_inverse=True)
        keys = [row.tobytes() for row in rows.cpu().numpy()]
        new = [i for i, key in enumerate(keys) if key not in constants.index_of]
        if new:
            first = len(constants.variances)
            self._add(constants, dist.replace(context=rows[new], _batch_shape=Size([len(new)])))
            constants.index_of.update({keys[i]: first + n for n, i in enumerate(new)})
        index = torch.tensor([constants.index_of[key] for key in keys])[inverse.cpu()]
        index = index.reshape(dist.context.shape[:-1]).expand(dist.batch_shape)
        values = torch.cat([result.value.reshape(-1) for result in constants.log_partitions])
        return values[index.to(values.device)], index

    def _add(self, constants: _Constants, dist: Energy) -> None:
        result = self._log_partition(dist)
        constants.add(result)
        self.kinds.add(result.kind)

    def _log_partition(self, dist: Energy) -> LogPartition:
        """Return log Z if it is known well enough, and else compute or estimate it."""
        known, chains = dist.log_partition, max(self.num_chains, 2)
        if known is not None:
            as_good = known.kind == "estimate" and known.num_chains * known.num_steps >= chains * self.num_steps
            if known.kind == "exact" or as_good:
                return known
        options: Any = {"progress": self.progress, "n_jobs": self.n_jobs}
        return log_partition(dist, num_chains=chains, num_steps=self.num_steps, **options)

    # Errors.

    def variance(self, used: list[SiteConstants], nesting: int, dim: int, new: slice, weight: float) -> Tensor:
        """Return the variance that log Z gives to each new row of a run, and count its use of the constants.

        Args:
            used: constants of the run, as `normalize` returned them.
            nesting: number of dimensions of plates. Draws are in the dimension on their left.
            dim: dimension of the rows.
            new: rows that no earlier run has.
            weight: fraction of all draws of these rows that the run has.

        Returns:
            Variances averaged over draws, (rows,).
        """
        total = torch.zeros(())
        for site, indices in used:
            constants = self.constants[site]
            indices = indices.reshape((1,) * (nesting + 1 - indices.dim()) + indices.shape).movedim((0, dim), (0, 1))[:, new]
            draws, rows, count = indices.shape[0], indices.shape[1], len(constants.variances)
            pairs = torch.arange(draws * rows)[:, None] * count + indices.reshape(draws * rows, -1)
            pairs, times = pairs.unique(return_counts=True)
            constant = pairs % count
            variances = torch.tensor(constants.variances, dtype=torch.float64)[constant] * times.square()
            per_row = torch.zeros(draws * rows, dtype=torch.float64).index_add_(0, pairs // count, variances)
            total = total + per_row.reshape(draws, rows).mean(0)
            constants.count(constant, times, weight / draws)
        return total

    def shared_error(self, rows: int) -> float:
        """Return the standard error that constants shared by several rows give to the mean over all rows."""
        variance = sum(
            (uses / rows) ** 2 * constants.variances[z]
            for constants in self.constants.values()
            for z, uses in constants.uses.items()
            if constants.rows[z] > 1 or rows == 1
        )
        return float(variance) ** 0.5

    @property
    def single(self) -> LogPartition | None:
        """The only log Z, or None if there are several or none."""
        results = [result for constants in self.constants.values() for result in constants.log_partitions]
        return results[0] if len(results) == 1 and not results[0].value.dim() else None
