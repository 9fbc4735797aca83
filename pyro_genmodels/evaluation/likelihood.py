r"""Log-likelihoods of held-out data under any fit.

Without latent variables :math:`\log p(x_n)` is a sum over the sites of row n. Latent variables inside the data's plate are
integrated by importance sampling: k samples from the guide give

.. math:: \log p(x_n) \ge \mathbb{E} \log \frac{1}{k} \sum_{j=1}^{k} \frac{p(x_n, z_j)}{q(z_j \mid x_n)},

a lower bound that rises with k and converges to the truth. The noise of a dequantised density is integrated in the same way.
Burda et al., *Importance Weighted Autoencoders* (arXiv 1509.00519).

A guide that is too narrow, or far too wide, makes the bound unreliable (`pyro_genmodels.evaluation.result`).

The normalising constant of an energy is computed, or estimated by annealed importance sampling. The estimate of log Z is too
low in expectation, so the likelihood is too high. Annealing backwards from the data errs the other way
(`conservative_log_likelihood`).
"""

from __future__ import annotations

__all__ = ["has_likelihood", "log_likelihood"]

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, overload

from torch.utils.data import DataLoader

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.datasets import RowStream
from pyro_genmodels.distributions.ode import fresh_probes
from pyro_genmodels.evaluation.arguments import row_arguments, with_plate_of_pair
from pyro_genmodels.evaluation.importance import RowEstimator
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.evaluation.result import LogLikelihood, StreamedLogLikelihood, checked
from pyro_genmodels.evaluation.row_batches import RowBatches, is_stream
from pyro_genmodels.evaluation.streaming import CURE, EvaluationOptions, score_batches
from pyro_genmodels.utils.distributions import density_of
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, runs_models
from pyro_genmodels.utils.parallel import check_n_jobs
from pyro_genmodels.utils.parts import Output, as_output
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import noting_frames

FRAMES = (
    "log_likelihood and train give a model its data frames as tensors: it reads a column by its place, x[:, 0], and not by its "
    "name."
)
"""Note on errors of a model that was given data frames."""


@overload
def log_likelihood(
    fit: Any, x: RowStream | DataLoader | Iterator[Any], *args: Any, out: str | Path | Output | None = None, **kwargs: Any
) -> StreamedLogLikelihood: ...
@overload
def log_likelihood(fit: Any, x: Any, *args: Any, out: str | Path | Output, **kwargs: Any) -> StreamedLogLikelihood: ...
@overload
def log_likelihood(fit: Any, x: Any, *args: Any, out: None = None, **kwargs: Any) -> LogLikelihood: ...


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
    out: str | Path | Output | None = None,
    n_jobs: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> LogLikelihood | StreamedLogLikelihood:
    """Return the log-likelihood (nats, higher is better) of each row of x.

    The fit's modules run in evaluation mode (no dropout), and their mode is restored afterwards. Scales of plates and of
    `poutine.scale` are ignored; masks are applied. A family of energies keeps the log Z that was found. If the model's own
    plate chooses rows (``subsample_size``), it is given all of them, block by block.

    Args:
        fit: family, `SVI`, or pair (model, guide); the data are the first argument of the model.
        x: data, (N, ...), in a plate of N rows: tensor, numpy array or data frame. Or a stream of them, which is read batch by
            batch: a `RowStream` of `pyro_genmodels.datasets.stream`, a `DataLoader`, or an iterator of tensors, of tuples of
            arguments, or of dictionaries of them. Then only the mean and the variance of the values are held.
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
        out: folder, such as "scores.parquet", for the values of rows in parquet files, in bounded memory; or an
            `Output(path, resume=True)`, with which an interrupted run goes on after the last part of the rows that is whole.
            Nothing else of the values is held than their mean and variance.
        n_jobs: number of processes, as joblib takes it, for the chains behind an estimated log Z; see `log_partition`.
        model_kwargs: keyword arguments of the model whose names are also options of this function.
        kwargs: other keyword arguments of the model, treated as args. Beside a stream they are the same for all rows.

    Returns:
        Values, standard errors (delta method), k-hat and kind. For energies the kind is "exact" if log Z is exact, "unreliable"
        if its estimate is unreliable, and "estimate" otherwise. A `StreamedLogLikelihood` for a stream, or with `out`.

    Raises:
        TypeError: if x holds no numbers.
        ValueError: if x has no rows; if latent variables lie outside the data's plate; if the guide is a point mass; if an
            observed site has no normalised density; if another plate than the data's chooses rows; if a keyword is the model's
            as well as an option; if `out` holds a run of another fit, of other data or by other settings, or a damaged part.
        FileExistsError: if `out` exists, and the run is not resumed.

    Warns:
        RuntimeWarning: if k-hat of the importance weights calls values unreliable (`pyro_genmodels.utils.pareto`), or if values
            are NaN, plus infinity, or minus infinity by overflow.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow, log_likelihood
        >>> log_likelihood(Flow((2,)), torch.randn(50, 2)).kind
        'exact'
    """
    model, guide = traces.as_pair(fit)
    check_positive_int("log_likelihood", num_samples=num_samples, num_steps=num_steps, batch_size=batch_size)
    if n_jobs is not None:
        check_n_jobs("log_likelihood", n_jobs)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    if out is not None or is_stream(x):
        options = EvaluationOptions(num_samples, num_steps, batch_size, parallel, progress, n_jobs)
        return _streamed(model, guide, x, args, kwargs, row_dim, out, options)
    data = row_arguments("log_likelihood", x, args, kwargs, row_dim, model=model)
    log_partitions = LogPartitions(num_samples, num_steps, progress=progress, n_jobs=n_jobs)
    with noting_frames((x, *args, *kwargs.values()), FRAMES), handlers.side_effect_free(model, guide), fresh_probes():
        data = with_plate_of_pair(model, guide, data)
        estimator = RowEstimator.of(
            model, guide, data, log_partitions, num_samples=num_samples, batch_size=batch_size, parallel=parallel
        )
        with estimator.progress_bar(data.num_rows, progress=progress) as bar:
            found = estimator.estimate(data, bar)
    likelihoods = LogLikelihood(
        found.values,
        found.std_error,
        estimator.kind,
        estimator.samples_behind(),
        log_partitions.single,
        log_partitions.shared_error(len(found.values)),
        pareto_k=found.pareto_k,
        smoothed=found.smoothed,
        is_bound=estimator.kind == "lower bound",
    )
    return checked("log_likelihood", likelihoods, data.args[0], cure=CURE)


def _streamed(
    model: Any, guide: Any, x: Any, args: tuple, kwargs: Mapping[str, Any], row_dim: int, out: Any, options: EvaluationOptions
) -> StreamedLogLikelihood:
    """Return the log-likelihoods of rows that are read batch by batch, or written to files."""
    if row_dim:
        raise ValueError(f"log_likelihood reads rows in batches along the first dimension of x, but found row_dim={row_dim}.")
    output = None if out is None else as_output("log_likelihood", out, (".parquet",))
    batches = RowBatches.of("log_likelihood", x, args, kwargs, model, guide)
    with noting_frames((x, *args, *kwargs.values()), FRAMES), handlers.side_effect_free(model, guide), fresh_probes():
        return score_batches(model, guide, batches, output, options)


@runs_models()
def has_likelihood(
    fit: Any, x: Any, *args: Any, row_dim: int = 0, model_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
) -> bool:
    """Return True if every site of a fit's model has a density; the model runs once, on the first row of x, (N, ...).

    Torch's random number generator is left as it was. Arguments are as those of `log_likelihood`.

    Example:
        >>> import torch
        >>> from pyro_genmodels import Flow
        >>> has_likelihood(Flow((2,)), torch.randn(5, 2))
        True
    """
    model, guide = traces.as_pair(fit)
    kwargs = joined_keywords(kwargs, model_kwargs)
    check_model_keywords(model, guide, (x, *args), kwargs)
    data = row_arguments("has_likelihood", x, args, kwargs, row_dim, model=model)
    with handlers.side_effect_free(model, guide), forked_rng():
        first = with_plate_of_pair(model, guide, data).first(1)
        with first.fixed_rows():
            trace, _ = traces.run_pair(model, guide, first.args, first.kwargs)
        return all(density_of(site["fn"])[0] != "none" for site in traces.sample_sites(trace).values())
