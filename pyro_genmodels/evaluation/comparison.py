r"""Comparison of several fits on the same held-out data.

For fits :math:`m` and held-out rows :math:`n`, with :math:`\ell_{mn}` the log-likelihood,

.. math:: \mathrm{elpd}_m = \sum_n \ell_{mn}, \qquad
    \mathrm{dse}_m = \sqrt{N}\,\mathrm{sd}_n(\ell_{\text{best},n} - \ell_{mn}), \qquad
    w = \operatorname{argmax}_{w \in \Delta} \sum_n \log \sum_m w_m e^{\ell_{mn}}.

The table has the columns of ArviZ's `compare`, but its elpd is computed on held-out data and is not a leave-one-out estimate.
elpd is a sum of log-likelihoods, so higher is better; nats and bits_per_dim are negative and per datum, so lower is better. A
fit without a likelihood has an empty row, unless samples are compared too. A fit with a NaN in any row is ranked behind those
without, and has no weight. Stacking weights: Yao et al., *Using Stacking to Average Bayesian Predictive Distributions* (arXiv
1704.02030).
"""

from __future__ import annotations

__all__ = ["Comparison", "compare"]

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_genmodels._pyro.handlers import side_effect_free
from pyro_genmodels._pyro.traces import as_pair
from pyro_genmodels.datasets import RowStream
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments, with_own_plate
from pyro_genmodels.evaluation.comparison_table import ComparisonTable, PairedValues, ranking, weights_of_known
from pyro_genmodels.evaluation.likelihood import has_likelihood, log_likelihood
from pyro_genmodels.evaluation.result import LikelihoodResult, LogLikelihood, StreamedLogLikelihood, no_likelihood
from pyro_genmodels.evaluation.row_batches import is_stream
from pyro_genmodels.evaluation.sample_quality import SampleQuality, sample_quality, split_rows
from pyro_genmodels.evaluation.streamed_comparison import StreamedComparison, compare_batches
from pyro_genmodels.evaluation.streaming import EvaluationOptions
from pyro_genmodels.utils.errors import type_with_article
from pyro_genmodels.utils.keywords import check_model_keywords, joined_keywords, option_names, runs_models
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import as_tensor

_OPTIONS = option_names(log_likelihood)


@dataclass(frozen=True)
class Comparison(ComparisonTable):
    """Log-likelihoods of several fits on the same held-out data, and the quality of their samples.

    Attributes:
        log_likelihoods: name of the fit -> its log-likelihoods, best first; then fits with NaN, and those of the kind "none".
        dims: number of dimensions of one datum; None if no data were given.
        sample_quality: name of the fit -> distances of its samples from the data; empty if samples were not compared.
    """

    log_likelihoods: Mapping[str, LogLikelihood]
    dims: int | None
    sample_quality: Mapping[str, SampleQuality] = field(default_factory=dict)

    @cached_property
    def _values(self) -> Tensor:
        """Log-likelihoods, (fits, N), in double precision."""
        return torch.stack([fit.values.double().cpu() for fit in self.log_likelihoods.values()])

    @cached_property
    def _paired(self) -> PairedValues:
        return PairedValues.of(self._values)

    @cached_property
    def _weights(self) -> Tensor:
        """Stacking weights (fits,), computed once, since this takes many steps."""
        return weights_of_known(self._values)


@overload
def compare(
    fits: Mapping[str, Any], x: RowStream | DataLoader | Iterator[Any], *args: Any, **kwargs: Any
) -> StreamedComparison: ...
@overload
def compare(fits: Mapping[str, StreamedLogLikelihood]) -> StreamedComparison: ...
@overload
def compare(fits: Mapping[str, Any], x: Any = None, *args: Any, **kwargs: Any) -> Comparison: ...


@runs_models(log_likelihood)
def compare(
    fits: Mapping[str, Any],
    x: Any = None,
    *args: Any,
    quality_samples: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Comparison | StreamedComparison:
    """Compare several fits by their log-likelihood on the same held-out data, and by the quality of their samples.

    A fit that can be sampled from but has no density, such as an `Implicit` site, is listed without a likelihood. The fits'
    modules run in evaluation mode, and their mode is restored afterwards.

    Args:
        fits: name -> fit, as `log_likelihood` takes it, or a `LogLikelihood` already computed on the same rows, in memory or
            in a folder.
        x: data that no fit was trained on, (N, ...): tensor, numpy array or data frame. Or a stream of them, as
            `log_likelihood` takes it, which is read once. Then only moments of the values are held, and stacking weights are
            found on at most 100,000 rows, chosen at random.
        args: other arguments of the models, passed to `log_likelihood` together with kwargs. To compare a conditional with an
            unconditional fit, pass a `LogLikelihood` of each.
        quality_samples: number of samples of each fit to compare with as many rows of x (at most half of all), by the maximum
            mean discrepancy and the sliced Wasserstein distance, in the units of the data. None compares no samples. A
            `LogLikelihood` has no samples.
        model_kwargs: keyword arguments of the models whose names are also options of `log_likelihood` or of this function.
        kwargs: options of `log_likelihood` (num_samples, batch_size, ...) and keyword arguments of the models.

    Returns:
        A `Comparison`; a `StreamedComparison`, with the same table and plot, for a stream or for values in folders.

    Raises:
        TypeError: if fits have no names, or x holds no numbers.
        ValueError: without fits; if the fits' rows differ; if samples are to be compared without data, fewer than 2 of them, or
            those of a model whose plate chooses rows, or with rows of a stream; if `out` is given.
        ImportError: if samples are to be compared and POT, of the extra ``eval``, is missing.

    Warns:
        RuntimeWarning: if values are unreliable, see `log_likelihood`.

    Example:
        >>> from pyro_genmodels import Flow, MAF, compare
        >>> x = torch.randn(50, 2)
        >>> list(compare({"spline": Flow((2,)), "affine": Flow((2,), transform=MAF())}, x).table["kind"])
        ['exact', 'exact']
    """
    if not isinstance(fits, Mapping):
        raise TypeError(f"compare wants fits by name, such as {{'flow': flow}}, but found {type_with_article(fits)}.")
    if not fits:
        raise ValueError("compare wants at least one fit, but found none.")
    if quality_samples is not None and x is None:
        raise ValueError(f"compare found quality_samples={quality_samples}, but no data x to compare samples with.")
    if quality_samples is not None and (isinstance(quality_samples, bool) or not isinstance(quality_samples, Integral)):
        raise TypeError(f"compare wants quality_samples as a number of samples or None, but found {quality_samples!r}.")
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    own = {name: value for name, value in kwargs.items() if name not in _OPTIONS}
    own = joined_keywords(own, model_kwargs)
    if "out" in options:
        raise ValueError("compare writes no values: give out to log_likelihood, once for each fit, and compare its results.")
    if is_stream(x) or any(isinstance(fit, StreamedLogLikelihood) for fit in fits.values()):
        return _streamed(fits, x, args, own, options, quality_samples)
    given, x = x, None if x is None else as_tensor(x, "compare")
    split = None if quality_samples is None or x is None else split_rows(x, quality_samples)
    log_likelihoods: dict[str, LogLikelihood] = {}
    qualities: dict[str, SampleQuality] = {}
    for name, fit in fits.items():
        if isinstance(fit, LogLikelihood):
            log_likelihoods[name] = fit
            continue
        if x is None:
            raise ValueError(f"compare was given the fit {name!r}, but no data x to evaluate it on.")
        model, guide = as_pair(fit)
        check_model_keywords(model, guide, (x, *args), own)
        data = row_arguments("compare", given, args, own, options.get("row_dim", 0), model=model)
        if split is not None:
            _check_rows_can_be_cut(name, fit, data)
            qualities[name] = sample_quality(fit, data, split)
        shared = {option: value for option, value in options.items() if option in option_names(has_likelihood)}
        has_one = has_likelihood(fit, *data.args, model_kwargs=data.kwargs, **shared)
        log_likelihoods[name] = (
            log_likelihood(fit, *data.args, model_kwargs=data.kwargs, **options) if has_one else no_likelihood(data.num_rows)
        )
    rows = {name: len(found.values) for name, found in log_likelihoods.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"compare wants the same data for all fits, but found rows {rows}.")
    best_first = sorted(log_likelihoods.items(), key=lambda item: ranking(item[1]))
    dims = None if x is None else prod(size for d, size in enumerate(x.shape) if d != options.get("row_dim", 0) % x.dim())
    return Comparison(dict(best_first), dims, qualities)


def _streamed(
    fits: Mapping[str, Any],
    x: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any],
    quality_samples: int | None,
) -> StreamedComparison:
    """Return the comparison of fits on rows that are read batch by batch, or whose values are in folders."""
    known = {name: isinstance(fit, LikelihoodResult) for name, fit in fits.items()}
    if x is None and not all(known.values()):
        raise ValueError(f"compare was given the fit {list(fits)[list(known.values()).index(False)]!r}, but no data x.")
    if quality_samples is not None or args or options.get("row_dim"):
        found = (
            "quality_samples" if quality_samples is not None else "row_dim" if options.get("row_dim") else "further arguments"
        )
        raise ValueError(
            f"compare reads rows batch by batch here, which {found} do not go with: let the batches hold (x, context), with "
            "rows first, and compare samples on rows in memory."
        )
    has_one = lambda fit, data: has_likelihood(fit, *data.args, model_kwargs=data.kwargs)  # noqa: E731
    own = {name: value for name, value in options.items() if name != "row_dim"}
    if x is not None and not is_stream(x):
        x = iter([as_tensor(x, "compare")])
    return compare_batches(fits, x, kwargs, EvaluationOptions(**own), has_one)


def _check_rows_can_be_cut(name: str, fit: Any, data: RowArguments) -> None:
    """Raise a ValueError unless a model can be given some rows of the data, for which it is to be sampled."""
    model, guide = as_pair(fit)
    with side_effect_free(model, guide), forked_rng():
        plate = with_own_plate(model, data).plate
    if data.row_dim or plate is not None:
        found = f"row_dim={data.row_dim}" if plate is None else f"the plate {plate.name!r} with subsample_size={plate.count}"
        raise ValueError(
            f"compare cuts rows of x, its first dimension, to compare samples of {name!r} with them, but found {found}. Leave "
            "quality_samples out."
        )
