r"""Importance sampling of the log-likelihood of each row, with the guide as proposal.

With k samples z from the guide, a row has the log weights and the estimate

.. math:: \log w_j = \log p(x_n, z_j) - \log q(z_j \mid x_n), \qquad \log \frac{1}{k} \sum_{j=1}^{k} w_j .

If the log density of a site is itself a random estimate, only the mean of the log weights is a bound, and is used instead.
The raw weights are averaged, because the mean of smoothed ones is no bound. k-hat tells if their mean can be trusted. The mean
of smoothed weights, which has less variance, is returned too.
"""

from __future__ import annotations

__all__ = ["FitStructure", "RowEstimates", "RowEstimator"]

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import messages, traces, vectorize
from pyro_genmodels.dynamics.reverse import PROGRESS_DELAY
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.evaluation.result import LikelihoodKind
from pyro_genmodels.utils.distributions import density_of, mean_inside_log, unwrap
from pyro_genmodels.utils.errors import one_line
from pyro_genmodels.utils.log_mean import log_mean_weight
from pyro_genmodels.utils.pareto import pareto_k


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
    """Run model and guide on the first rows, check that a likelihood can be had, and return the fit's structure."""
    with first.fixed_rows():
        model_trace, guide_trace = _first_run(model, guide, first)
        nesting = traces.max_plate_nesting(model, guide, first.args, first.kwargs)
        run_again = partial(traces.trace_of, guide, first.args, first.kwargs)
        masses = traces.point_masses(model_trace, guide_trace, run_again)
        is_fixed = not masses and traces.has_single_values(guide_trace, run_again)
    log_partitions.normalize(model_trace, "model")
    log_partitions.normalize(guide_trace, "guide")
    hint = _other_row_dim(model_trace, first)
    plates = _data_plates(model_trace, first, hint)
    _check_latents(model_trace, guide_trace, plates, hint)
    _check_guide(model_trace, guide_trace, plates, masses)
    sites = traces.sample_sites(model_trace)
    densities = {_checked_density(name, site) for name, site in sites.items()}
    inside = all(mean_inside_log(site["fn"]) for site in sites.values())
    has_noise, has_latents = "lower bound" in densities or not inside, bool(traces.latents(model_trace))
    is_sampled = has_noise or (has_latents and not is_fixed)
    is_bound = has_noise or has_latents
    kind: LikelihoodKind = "estimate" if "estimate" in densities else "lower bound" if is_bound else "exact"
    return FitStructure(kind, is_sampled, inside, plates, nesting)


def _first_run(model: Any, guide: Any, first: RowArguments) -> tuple[Any, Any]:
    """Run model and guide on the first rows, and return (model trace, the guide's trace as a proposal).

    Raises:
        ValueError: if they do not run on single rows.
    """
    try:
        model_trace, guide_trace = traces.run_pair(model, guide, first.args, first.kwargs)
    except vectorize.SHAPE_ERRORS as error:
        if messages.is_own(error):
            raise
        first_line = one_line(str(error).partition("\n")[0])
        raise ValueError(
            f"log_likelihood runs model and guide on some rows of the data, here {first.num_rows}, but they fail: "
            f"{type(error).__name__}: {first_line.rstrip('.')}. A guide of single rows reads x and has no size of "
            "its own. A model whose rows depend on each other has no likelihood of single rows: see to_arviz."
        ) from error
    return model_trace, traces.proposal(guide_trace)


def _data_plates(model_trace: Any, first: RowArguments, hint: str) -> list[str]:
    """Return the names of the plates that can be the data's, and add a hint to the error if there are none."""
    if first.plate is not None:
        return [first.plate.name]
    try:
        return list(traces.data_plates(model_trace, first.num_rows))
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None


def _other_row_dim(model_trace: Any, first: RowArguments) -> str:
    """Return a hint at another dimension of the data that is as long as a plate, or nothing if there is none."""
    frames = [frame for site in traces.sample_sites(model_trace).values() for frame in site["cond_indep_stack"]]
    plates = {frame.size: frame.name for frame in frames if frame.vectorized}
    shape = first.args[0].shape
    dims = [d for d, size in enumerate(shape) if d != first.row_dim and size in plates and size > 1]
    return "".join(f" If the rows of x are its dimension {d}, in plate {plates[shape[d]]!r}: row_dim={d}." for d in dims)


def _check_latents(model_trace: Any, guide_trace: Any, plates: list[str], hint: str) -> None:
    """Raise a ValueError unless the guide covers all latent variables by a density, row by row."""
    latents, sites = traces.latents(model_trace), traces.sample_sites(model_trace)
    unguided = [name for name in latents if name not in guide_trace.nodes]
    if unguided:
        enumerated = any(sites[name]["infer"].get("enumerate") for name in unguided)
        why = ": inference has summed them out" if enumerated else ""
        raise ValueError(
            f"log_likelihood wants a guide for every latent variable, but the guide has none for "
            f"{', '.join(map(repr, unguided))}{why}. Add them to the guide, or make an autoguide of a model without discrete "
            "variables."
        )
    shared = [name for name in latents if all(frame.name not in plates for frame in sites[name]["cond_indep_stack"])]
    if shared:
        raise ValueError(
            f"log_likelihood integrates over latent variables of single rows, but {', '.join(map(repr, shared))} lie outside "
            f"the plate {plates[0]!r} and are shared by all rows. Use to_arviz(fit, ...) and az.loo for such a posterior.{hint}"
        )


def _check_guide(model_trace: Any, guide_trace: Any, plates: list[str], masses: list[str]) -> None:
    """Raise a ValueError unless the guide has a density of its own for every row.

    Args:
        model_trace: trace of the model.
        guide_trace: trace of the guide.
        plates: names of the plates that can be the data's.
        masses: variables for which the guide has a single value.
    """
    if masses:
        raise ValueError(
            "log_likelihood averages over samples from the guide, but this guide is a point mass (AutoDelta, MAP, Delta) for "
            f"{', '.join(map(repr, masses))}, which gives no bound. Use a guide with a density, such as AutoNormal."
        )
    sites = traces.sample_sites(guide_trace)
    own = [name for name in sites if all(frame.name not in plates for frame in sites[name]["cond_indep_stack"])]
    if own and traces.latents(model_trace):
        raise ValueError(
            f"log_likelihood wants a guide with a density of each row, but {', '.join(map(repr, own))} of the guide lies "
            f"outside the plate {plates[0]!r}. Put what the guide samples into that plate, in a guide that reads x."
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


class RowEstimates(NamedTuple):
    """Estimates of rows, (N,) each.

    Attributes:
        values: log-likelihoods.
        std_error: their standard errors.
        pareto_k: k-hat of the weights of each row; None if nothing was sampled.
        smoothed: log means of smoothed weights; None if nothing was sampled, or log weights are averaged.
    """

    values: Tensor
    std_error: Tensor
    pareto_k: Tensor | None = None
    smoothed: Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence[RowEstimates]) -> RowEstimates:
        """Return the estimates of several parts of the rows, one after another."""
        joined: Any = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
        return cls(*joined)


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

    @classmethod
    def of(
        cls,
        model: Any,
        guide: Any,
        data: RowArguments,
        log_partitions: LogPartitions,
        *,
        num_samples: int,
        batch_size: int,
        parallel: bool | None,
    ) -> RowEstimator:
        """Return the estimator of a fit, after runs on some rows of the data; arguments are those of `log_likelihood`."""
        structure = structure_of(model, guide, data.first(1), log_partitions)
        k = num_samples if structure.is_sampled else 1
        if parallel is None:
            trial = data.first(max(1, min(5, batch_size // 3)))
            with trial.fixed_rows():
                parallel = k > 1 and vectorize.can_vectorize(model, guide, trial.args, trial.kwargs, structure.nesting)
        return cls(model, guide, structure, log_partitions, k, batch_size, parallel)

    @property
    def kind(self) -> LikelihoodKind:
        """Kind of the values so far, unless they are unreliable."""
        return max([self.structure.kind, *self.log_partitions.kinds], key=get_args(LikelihoodKind).index)

    def samples_behind(self) -> int:
        """Return the number of samples behind each value, or behind log Z."""
        sampled = self.structure.is_sampled or self.kind != "estimate"
        return self.num_samples if sampled else self.log_partitions.num_chains

    def progress_bar(self, rows: int | None, *, progress: bool) -> tqdm:
        """Return a progress bar for a number of rows, which may be unknown."""
        total = None if rows is None else rows * self.num_samples
        options: Any = {"delay": PROGRESS_DELAY, "disable": not progress, "leave": False}
        return tqdm(total=total, desc="log-likelihood", unit="sample", **options)

    def estimate(self, data: RowArguments, bar: tqdm) -> RowEstimates:
        """Return the log-likelihoods of all rows, and show on a progress bar how many samples are done."""
        rows = max(1, self.batch_size // self.num_samples) if self.parallel else self.batch_size
        parts = []
        for batch in data.batches(rows):
            log_weights, variance = self._log_weights(batch, bar)
            parts.append(self._average(log_weights[:, batch.new], variance))
        return RowEstimates.joined(parts)

    def _log_weights(self, batch: RowArguments, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Return log weights of k samples, (k, rows), and the variance that log Z adds to each new row."""
        block = max(1, self.batch_size // batch.num_rows) if self.parallel else 1
        parts = []
        for start in range(0, self.num_samples, block):
            num_samples = min(block, self.num_samples - start)
            parts.append(self._run(batch, num_samples))
            bar.update(num_samples * batch.num_rows)
        log_weights, variances = zip(*parts, strict=True)
        return torch.cat(log_weights), torch.stack(variances).mean(0)

    def _run(self, batch: RowArguments, num_samples: int) -> tuple[Tensor, Tensor]:
        """Run guide and model once, and return log weights (num_samples, rows) and the variance from log Z of new rows."""
        nesting, rows = self.structure.nesting, batch.num_rows
        plate = traces.particles(num_samples, nesting) if self.parallel else None
        with batch.fixed_rows():
            model_trace, guide_trace = traces.run_pair(self.model, self.guide, batch.args, batch.kwargs, plate)
        pair = model_trace, traces.proposal(guide_trace)
        places = self.log_partitions.normalize(pair[0], "model") + self.log_partitions.normalize(pair[1], "guide")
        dim = next(dim for name, dim in traces.data_plates(pair[0], rows).items() if name in self.structure.plates)
        log_p, log_q = (traces.log_prob(trace, (-nesting - 1, dim), scaled=False) for trace in pair)
        variance = self.log_partitions.variance(places, nesting, dim, batch.new, num_samples / self.num_samples)
        return (log_p - log_q.to(log_p)).expand(num_samples, rows), variance

    def _average(self, log_weights: Tensor, variance: Tensor) -> RowEstimates:
        """Return the log mean weight, or where that is no bound the mean log weight, with its error and k-hat."""
        variance = variance.to(log_weights).expand(log_weights.shape[1])
        if not self.structure.is_sampled:
            return RowEstimates(log_weights[0], variance.sqrt())
        if self.structure.mean_inside_log:
            mean = log_mean_weight(log_weights)
            return RowEstimates(mean.value, (mean.std_error.square() + variance).sqrt(), mean.pareto_k, mean.smoothed)
        values, k = log_weights.double().mean(0), len(log_weights)
        error = log_weights.double().var(0) / k if k > 1 else torch.full_like(values, torch.nan)
        std_error = (error + variance).sqrt().masked_fill(values.isinf(), torch.inf)
        below = (log_weights.max(0).values - log_weights).nan_to_num(nan=torch.inf, posinf=torch.inf)  # the heavier tail
        k_hat = pareto_k(below.log()).masked_fill((below == 0).all(0), -torch.inf)  # where all terms are equal
        return RowEstimates(values.to(log_weights), std_error.to(log_weights), k_hat.masked_fill(values.isnan(), torch.nan))
