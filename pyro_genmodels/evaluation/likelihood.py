r"""Log-likelihoods of held-out data under any fit, and what kind of number they are.

Without latent variables :math:`\log p(x_n)` is a sum over the sites of row n. Latent variables inside the data's plate are
integrated by importance sampling: k samples from the guide give

.. math:: \log p(x_n) \ge \mathbb{E} \log \frac{1}{k} \sum_{j=1}^{k} \frac{p(x_n, z_j)}{q(z_j \mid x_n)},

a lower bound that rises with k and converges to the truth. The noise of a dequantised density is integrated in the same way.
Burda et al., *Importance Weighted Autoencoders* (arXiv 1509.00519).

A guide that is too narrow, or far too wide, gives weights with a heavy tail, and the bound stays far below the truth for any
practical k. Their k-hat (`pyro_genmodels.utils.pareto`, arXiv 1507.02646) tells: if it is above .7 in more than one row of
twenty, the values are called an unreliable lower bound; on average they are still below the truth. `values` are means of the
raw weights, because the mean of Pareto-smoothed weights is no bound; that estimate, of less variance, is in `smoothed`.

Signs: `values`, `mean` and an elpd are log-likelihoods, so higher is better. "nats per datum", printed and in tables, and bits
per dimension are their negatives, as losses are, so lower is better.

The normalising constant of an energy is computed, or estimated by annealed importance sampling. The estimate of log Z is too
low in expectation, so the likelihood is too high. Annealing backwards from the data errs the other way
(`conservative_log_likelihood`).
"""

from __future__ import annotations

__all__ = ["LogLikelihood", "has_likelihood", "log_likelihood", "lower_bound", "no_likelihood"]

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Any, get_args

import torch
from torch import Tensor

from pyro_genmodels._pyro import handlers, traces, vectorize
from pyro_genmodels.distributions.energy.state import LogPartition
from pyro_genmodels.distributions.ode import fresh_probes
from pyro_genmodels.evaluation.arguments import row_arguments, with_plate_of_pair
from pyro_genmodels.evaluation.importance import LikelihoodKind, RowEstimator, structure_of
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.utils.distributions import density_of
from pyro_genmodels.utils.errors import check_positive_int, warn_caller
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.log_mean import LogMean
from pyro_genmodels.utils.pareto import MAX_PARETO_K, MIN_PARETO_DRAWS, count_unreliable, is_unreliable, largest_pareto_k
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import noting_frames


@dataclass(frozen=True, repr=False)
class LogLikelihood:
    """Log-likelihoods (nats), one per datum, and what is known about them.

    Attributes:
        values: log-likelihoods, (N,), higher is better; NaN if the kind is "none".
        std_error: Monte Carlo standard error of each value, (N,); 0 for values without sampling, NaN for a single sample.
        kind: meaning of the values; "unreliable" if k-hat of the rows says so, if log Z is, or if values are NaN, plus infinity
            or minus infinity by overflow; "none" for a fit that can be sampled from but has no likelihood.
        num_samples: k, the number of samples behind each value; 1 if nothing was sampled.
        log_partition: log Z that all values share, if they are of one energy; its error is part of each standard error.
        shared_error: standard error of the mean that comes from values of log Z shared by several rows.
        observation_noise: deviation of the Gaussian noise that was added to samples without a density
            (`gaussian_observation_likelihood`); None if none was added.
        pareto_k: k-hat of the importance weights of each row, (N,); NaN for fewer than 21 samples, None if nothing was sampled.
        smoothed: estimate of each value from Pareto-smoothed weights, (N,): of less variance than `values`, but no bound; None
            without importance weights.
        is_bound: True if the values are lower bounds on average, also where they are unreliable.
    """

    values: Tensor
    std_error: Tensor
    kind: LikelihoodKind
    num_samples: int
    log_partition: LogPartition | None = None
    shared_error: float = 0.0
    observation_noise: float | None = None
    pareto_k: Tensor | None = None
    smoothed: Tensor | None = None
    is_bound: bool = False

    @property
    def label(self) -> str:
        """Kind in words, such as "unreliable lower bound"."""
        return "unreliable lower bound" if self.kind == "unreliable" and self.is_bound else self.kind

    @property
    def mean(self) -> float:
        """Mean log-likelihood of a datum (nats), higher is better."""
        return self.values.double().mean().item()

    @property
    def nats(self) -> float:
        """Negative log-likelihood in nats per datum, lower is better."""
        return -self.mean

    @property
    def mean_std_error(self) -> float:
        """Standard error of the mean, with the data as a random sample; NaN for a single datum."""
        if len(self.values) < 2:
            return float("nan")
        return (self.values.double().var() / len(self.values) + self.shared_error**2).sqrt().item()

    @property
    def notes(self) -> list[str]:
        """Sentences on rows whose values say less than others: NaN, infinite, or of a k-hat that is above .7 or unknown."""
        if self.kind == "none":
            return []
        rows_of = {"the value is NaN": self.values.isnan(), "the value is infinite": self.values.isinf()}
        if self.pareto_k is not None:
            heavy = f"Pareto k-hat is above {MAX_PARETO_K} (largest {largest_pareto_k(self.pareto_k):.2f})"
            rows_of[heavy] = self.pareto_k > MAX_PARETO_K
            if self.num_samples < MIN_PARETO_DRAWS:
                unknown = f"Pareto k-hat is unknown, with fewer than {MIN_PARETO_DRAWS} samples,"
                rows_of[unknown] = self.pareto_k.isnan() & self.values.isfinite()
        return [f"{note} in {rows.sum()} of {len(rows)} rows" for note, rows in rows_of.items() if rows.any()]

    def bits_per_dim(self, dims: int) -> float:
        """Return the negative log-likelihood in bits per dimension, lower is better, for data of `dims` dimensions."""
        return -self.mean / (dims * log(2))

    def __repr__(self) -> str:
        return f"LogLikelihood({self})"

    def __str__(self) -> str:
        if self.kind == "none":
            return f"- (no likelihood, n={len(self.values)})"
        is_sampled = self.kind != "exact" and (self.kind != "unreliable" or self.is_bound or self.num_samples > 1)
        k = f", k={self.num_samples}" if is_sampled else ""
        noise = self.observation_noise
        about = f"{self.label}{k}, n={len(self.values)}"
        about += "" if noise is None else f", with Gaussian observation noise {noise:.3g}"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.nats:.3f} ± {self.mean_std_error:.3f} nats per datum, lower is better ({about}{notes})"


def _reliable_kind(owner: str, kind: LikelihoodKind, pareto_k: Tensor | None, num_samples: int, cure: str) -> LikelihoodKind:
    """Return the kind of some values, or "unreliable" if their k-hat says so.

    Args:
        owner: function that made the values.
        kind: their kind if they are reliable.
        pareto_k: k-hat of each, or None.
        num_samples: number of samples behind each.
        cure: what to do about unreliable ones.

    Warns:
        RuntimeWarning: if they are unreliable; it names how many.
    """
    if pareto_k is None or not is_unreliable(pareto_k, num_samples):
        return kind
    warn_caller(
        f"{owner}: Pareto k-hat is above {MAX_PARETO_K} in {count_unreliable(pareto_k)} of {len(pareto_k)} rows (largest "
        f"{largest_pareto_k(pareto_k):.2f}): a few samples carry the weight there, and the value and its standard error cannot "
        f"be relied on. {cure}",
    )
    return "unreliable"


def _finite_kind(owner: str, kind: LikelihoodKind, values: Tensor, x: Tensor) -> LikelihoodKind:
    """Return the kind of some values, or "unreliable" if some of them are no numbers.

    Minus infinity is right for an impossible datum, unless its square is too large for the precision of the values.

    Args:
        owner: function that made the values.
        kind: their kind if they are numbers.
        values: log-likelihoods, (N,).
        x: data, with N rows in any dimension.

    Warns:
        RuntimeWarning: if there are such values; it names how many, and the first row.
    """
    largest = torch.finfo(values.dtype).max ** 0.5
    overflows = values.isneginf() & bool((x.abs() > largest).any())
    wrong = values.isnan() | values.isposinf() | overflows
    if not wrong.any():
        return kind
    first = int(wrong.nonzero()[0])
    warn_caller(
        f"{owner}: the value is {values[first].item()} in {int(wrong.sum())} of {len(values)} rows, the first of them row "
        f"{first}, so that their mean says nothing. Look at these rows: numbers above about {largest:.0e} overflow in "
        f"{values.dtype}, and a NaN in data or parameters spreads.",
    )
    return "unreliable"


def lower_bound(
    owner: str, mean: LogMean, num_samples: int, x: Tensor, *, cure: str, observation_noise: float | None = None
) -> LogLikelihood:
    """Return lower bounds that are logs of mean weights; their kind is "unreliable" if k-hat or the values say so.

    Args:
        owner: function that made them, for warnings.
        mean: log mean weight of each row.
        num_samples: number of weights of each row.
        x: data, (N, ...).
        cure: what to do if k-hat is too large.
        observation_noise: deviation of the noise that was added to samples.

    Warns:
        RuntimeWarning: if they are unreliable.
    """
    kind = _reliable_kind(owner, "lower bound", mean.pareto_k, num_samples, cure)
    return LogLikelihood(
        mean.value,
        mean.std_error,
        _finite_kind(owner, kind, mean.value, x),
        num_samples,
        observation_noise=observation_noise,
        pareto_k=mean.pareto_k,
        smoothed=mean.smoothed,
        is_bound=True,
    )


@runs_models()
def log_likelihood(
    fit: Any,
    x: Any,
    *args: Any,
    num_samples: int = 1000,
    num_steps: int = 1000,
    batch_size: int = 20_000,
    parallel: bool | None = None,
    progress: bool = False,
    row_dim: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    """Return the log-likelihood (nats, higher is better) of each row of x.

    The fit's modules run in evaluation mode (no dropout), and their mode is restored afterwards. Scales of plates and of
    `poutine.scale` are ignored; masks are applied. A family of energies keeps the log Z that was found. If the model's own
    plate chooses rows (``subsample_size``), it is given all of them, block by block.

    Args:
        fit: family, `SVI`, or pair (model, guide); the data are the first argument of the model.
        x: data, (N, ...), in a plate of N rows: tensor, numpy array or data frame.
        args: other arguments of the model; tensors, arrays and frames of N rows, also inside lists and dicts, are cut into
            batches along with x.
        num_samples: k, the number of samples per row if anything is sampled; also the number of chains behind an estimated
            log Z (per row for a conditional energy).
        num_steps: number of betas of the annealing path on which log Z of an energy is estimated.
        batch_size: largest number of (sample, row) pairs held in memory at once.
        parallel: True to make samples together in one run. The model must allow it (no ``z[0]`` or ``z.sum()``). None tries
            it on a few rows.
        progress: True to show a progress bar, after five seconds and while log Z is estimated.
        row_dim: dimension of x that holds the rows, if it is not the first. Other tensors are cut in the same dimension, or in
            the first, where they have N rows.
        model_kwargs: keyword arguments of the model whose names are also options of this function.
        kwargs: other keyword arguments of the model, treated as args.

    Returns:
        Values, standard errors (delta method), k-hat and kind. For energies the kind is "exact" if log Z is exact, "unreliable"
        if its estimate is unreliable, and "estimate" otherwise.

    Raises:
        TypeError: if x holds no numbers.
        ValueError: if x has no rows; if latent variables lie outside the data's plate; if the guide is a point mass; if an
            observed site has no normalised density; if another plate than the data's chooses rows; if a keyword is the model's
            as well as an option.

    Warns:
        RuntimeWarning: if k-hat of the importance weights calls values unreliable (`pyro_genmodels.utils.pareto`), or if values
            are NaN, plus infinity, or minus infinity by overflow.

    Example:
        >>> from pyro_genmodels import Flow, log_likelihood
        >>> log_likelihood(Flow((2,)), torch.randn(50, 2)).kind
        'exact'
    """
    model, guide = traces.as_pair(fit)
    check_positive_int("log_likelihood", num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("log_likelihood", x, args, kwargs, row_dim)
    log_partitions = LogPartitions(num_samples, num_steps, progress=progress)
    note = (
        "log_likelihood and train give a model its data frames as tensors: it reads a column by its place, x[:, 0], and not by "
        "its name."
    )
    with noting_frames((x, *args, *kwargs.values()), note), handlers.side_effect_free(model, guide), fresh_probes():
        data = with_plate_of_pair(model, guide, data)
        structure = structure_of(model, guide, data.first(1), log_partitions)
        k = num_samples if structure.is_sampled else 1
        if parallel is None:
            trial = data.first(max(1, min(5, batch_size // 3)))
            with trial.fixed_rows():
                parallel = k > 1 and vectorize.can_vectorize(model, guide, trial.args, trial.kwargs, structure.nesting)
        estimator = RowEstimator(model, guide, structure, log_partitions, k, batch_size, parallel)
        found = estimator.estimate(data, progress=progress)
    least_known = max([structure.kind, *log_partitions.kinds], key=get_args(LikelihoodKind).index)
    cure = "Raise num_samples, or use a guide closer to the posterior: this one may be too narrow or too wide."
    kind = _reliable_kind("log_likelihood", least_known, found.pareto_k, k, cure)
    return LogLikelihood(
        found.values,
        found.std_error,
        _finite_kind("log_likelihood", kind, found.values, data.args[0]),
        k if structure.is_sampled or least_known == "exact" else num_samples,
        log_partitions.single,
        log_partitions.shared_error(len(found.values)),
        pareto_k=found.pareto_k,
        smoothed=found.smoothed,
        is_bound=least_known == "lower bound",
    )


@runs_models()
def has_likelihood(
    fit: Any, x: Any, *args: Any, row_dim: int = 0, model_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
) -> bool:
    """Return True if every site of a fit's model has a density; the model runs once, on the first row of x, (N, ...).

    Torch's random number generator is left as it was. Arguments are as those of `log_likelihood`.

    Example:
        >>> from pyro_genmodels import Flow
        >>> has_likelihood(Flow((2,)), torch.randn(5, 2))
        True
    """
    model, guide = traces.as_pair(fit)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("has_likelihood", x, args, kwargs, row_dim)
    with handlers.side_effect_free(model, guide), forked_rng():
        first = with_plate_of_pair(model, guide, data).first(1)
        with first.fixed_rows():
            trace, _ = traces.run_pair(model, guide, first.args, first.kwargs)
        return all(density_of(site["fn"])[0] != "none" for site in traces.sample_sites(trace).values())


def no_likelihood(num_rows: int) -> LogLikelihood:
    """Return the `LogLikelihood` of a fit without one: NaN for each row, of the kind "none"."""
    values = torch.full((num_rows,), torch.nan)
    return LogLikelihood(values, values, "none", 0)
