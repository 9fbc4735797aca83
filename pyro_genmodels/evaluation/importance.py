r"""Importance sampling of the log-likelihood of each row, with the guide as proposal.

With k samples z from the guide, a row has the log weights and the estimate

.. math:: \log w_j = \log p(x_n, z_j) - \log q(z_j \mid x_n), \qquad \log \frac{1}{k} \sum_{j=1}^{k} w_j .

If the log density of a site is itself a random estimate, only the mean of the log weights is a bound, and is used instead.
"""

from __future__ import annotations

__all__ = ["FitStructure", "LikelihoodKind", "RowEstimator", "structure_of"]

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import traces
from pyro_genmodels.dynamics.reverse import PROGRESS_DELAY
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.utils.distributions import density_of, mean_inside_log, unwrap

LikelihoodKind = Literal["exact", "lower bound", "estimate", "unreliable", "none"]
"""Meaning of a log-likelihood."""


@dataclass(frozen=True)
class FitStructure:
    """Properties of a fit that one run on one row shows.

    Attributes:
        kind: kind of the values, before the kinds of log Z are known.
        is_sampled: True if each value is an average over samples.
        mean_inside_log: True if the log of the mean weight is a tighter bound than the mean log weight.
        plates: names of the plates that can be the data's.
        nesting: number of batch dimensions taken by plates.
    """

    kind: LikelihoodKind
    is_sampled: bool
    mean_inside_log: bool
    plates: list[str]
    nesting: int


def structure_of(model: Any, guide: Any, first: RowArguments, log_partitions: LogPartitions) -> FitStructure:
    """Run model and guide on the first row, check that a likelihood can be had, and return the fit's structure."""
    model_trace, guide_trace = traces.run_pair(model, guide, first.args, first.kwargs)
    log_partitions.normalize(model_trace, "model")
    log_partitions.normalize(guide_trace, "guide")
    plates = list(traces.data_plates(model_trace, 1))
    _check_latents(model_trace, guide_trace, plates)
    sites = traces.sample_sites(model_trace)
    densities = {_checked_density(name, site) for name, site in sites.items()}
    inside = all(mean_inside_log(site["fn"]) for site in sites.values())
    is_sampled = bool(traces.latents(model_trace)) or "lower bound" in densities or not inside
    kind: LikelihoodKind = "estimate" if "estimate" in densities else "lower bound" if is_sampled else "exact"
    return FitStructure(kind, is_sampled, inside, plates, traces.max_plate_nesting(model, guide, first.args, first.kwargs))


def _check_latents(model_trace: Any, guide_trace: Any, plates: list[str]) -> None:
    """Raise a ValueError unless the guide covers all latent variables by a density, row by row."""
    latents, sites = traces.latents(model_trace), traces.sample_sites(model_trace)
    unguided = [name for name in latents if name not in guide_trace.nodes]
    if unguided:
        raise ValueError(
            f"log_likelihood wants a guide for every latent variable, but the guide has none for "
            f"{', '.join(map(repr, unguided))}. Add them to the guide, or make an autoguide of the model."
        )
    if traces.is_point_mass(guide_trace):
        raise ValueError(
            "log_likelihood averages over samples from the guide, but this guide is a point mass (AutoDelta, MAP), which gives "
            "no bound. Use a guide with a density, such as AutoNormal."
        )
    shared = [name for name in latents if all(frame.name not in plates for frame in sites[name]["cond_indep_stack"])]
    if shared:
        raise ValueError(
            f"log_likelihood integrates over latent variables of single rows, but {', '.join(map(repr, shared))} lie outside "
            f"the plate {plates[0]!r} and are shared by all rows. Use to_arviz(fit, ...) and az.loo for such a posterior."
        )


def _checked_density(name: str, site: Any) -> str:
    """Return the kind of a site's density; raise a ValueError if it is not normalised."""
    density, advice = density_of(site["fn"])
    if density in ("none", "unnormalized"):
        raise ValueError(
            f"log_likelihood needs a density, but site {name!r} holds {type(unwrap(site['fn'])).__name__}, whose "
            f"density is: {density}. {advice}"
        )
    return density


@dataclass(frozen=True)
class RowEstimator:
    """Importance sampling of the log-likelihood of each row.

    Attributes:
        model: function with Pyro statements.
        guide: proposal for the model's latent variables.
        structure: structure of the fit.
        log_partitions: log Z of the energies in the traces.
        num_samples: k, the number of samples per row.
        batch_size: largest number of (sample, row) pairs in one run.
        parallel: True to make samples in an outermost plate, False to run the model once per sample.
    """

    model: Any
    guide: Any
    structure: FitStructure
    log_partitions: LogPartitions
    num_samples: int
    batch_size: int
    parallel: bool

    def estimate(self, data: RowArguments, *, progress: bool) -> tuple[Tensor, Tensor]:
        """Return the log-likelihoods of all rows and their standard errors, (N,) each."""
        rows = max(1, self.batch_size // self.num_samples) if self.parallel else self.batch_size
        parts = []
        with tqdm(
            total=data.num_rows * self.num_samples,
            desc="log-likelihood",
            unit="sample",
            delay=PROGRESS_DELAY,
            disable=not progress,
            leave=False,
        ) as bar:
            for batch in data.batches(rows):
                parts.append(self._average(*self._log_weights(batch, bar)))
        values, std_error = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(std_error)

    def _log_weights(self, batch: RowArguments, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Return log weights of k samples, (k, rows), and the variance that log Z adds to each row, (rows,)."""
        block = max(1, self.batch_size // batch.num_rows) if self.parallel else 1
        parts = []
        for start in range(0, self.num_samples, block):
            num_samples = min(block, self.num_samples - start)
            parts.append(self._run(batch, num_samples))
            bar.update(num_samples * batch.num_rows)
        log_weights, variances = zip(*parts, strict=True)
        return torch.cat(log_weights), torch.stack(variances).mean(0)

    def _run(self, batch: RowArguments, num_samples: int) -> tuple[Tensor, Tensor]:
        """Run guide and model once, and return log weights (num_samples, rows) and the variance from log Z (rows,)."""
        nesting, rows = self.structure.nesting, batch.num_rows
        plate = traces.particles(num_samples, nesting) if self.parallel else None
        pair = traces.run_pair(self.model, self.guide, batch.args, batch.kwargs, plate)
        places = self.log_partitions.normalize(pair[0], "model") + self.log_partitions.normalize(pair[1], "guide")
        dim = next(dim for name, dim in traces.data_plates(pair[0], rows).items() if name in self.structure.plates)
        log_p, log_q = (traces.log_prob(trace, (-nesting - 1, dim), scaled=False) for trace in pair)
        variance = self.log_partitions.variance(places, nesting, dim, num_samples / self.num_samples)
        return (log_p - log_q.to(log_p)).expand(num_samples, rows), variance

    def _average(self, log_weights: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log mean weight, or where that is no bound the mean log weight, and its standard error, (rows,) each."""
        k, inside = self.num_samples, self.structure.mean_inside_log
        values = log_weights.logsumexp(0) - log(k) if inside else log_weights.mean(0)
        variance = variance.to(values).expand_as(values)
        if not self.structure.is_sampled:
            return values, variance.sqrt()
        if k == 1:
            return values, torch.full_like(values, float("nan"))
        deviations = (log_weights - values).exp() if inside else log_weights
        return values, (deviations.var(0) / k + variance).sqrt()
