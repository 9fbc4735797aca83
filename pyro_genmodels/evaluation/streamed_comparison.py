"""Comparison of fits on rows that are read once, batch by batch, or on values that were written to folders.

Sums and variances of the values and of all their differences are merged over batches, so that the table is that of rows in
memory, to rounding. Stacking weights want all rows at every step of their search: they are found on 100,000 rows chosen at
random, which are all rows if there are no more.
"""

from __future__ import annotations

__all__ = ["StreamedComparison", "compare_batches"]

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import repeat
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro.handlers import side_effect_free
from pyro_genmodels._pyro.traces import as_pair
from pyro_genmodels.distributions.ode import fresh_probes
from pyro_genmodels.dynamics.reverse import PROGRESS_DELAY
from pyro_genmodels.evaluation.arguments import RowArguments
from pyro_genmodels.evaluation.comparison_table import ComparisonTable, PairedValues, differences, ranking, weights_of_known
from pyro_genmodels.evaluation.importance import RowEstimator
from pyro_genmodels.evaluation.result import LikelihoodResult, StreamedLogLikelihood, warned
from pyro_genmodels.evaluation.row_batches import RowBatches
from pyro_genmodels.evaluation.row_counts import RowTotals
from pyro_genmodels.evaluation.streaming import CURE, EvaluationOptions, check_no_plate, naming_rows
from pyro_genmodels.utils.keywords import check_model_keywords
from pyro_genmodels.utils.moments import Moments

ROWS_FOR_WEIGHTS = 100_000
"""Largest number of rows on which stacking weights are found."""


@dataclass(frozen=True)
class StreamedComparison(ComparisonTable):
    """Log-likelihoods of several fits on the same held-out rows, of which only moments are held.

    Attributes:
        log_likelihoods: name of the fit -> its log-likelihoods, best first; then fits with NaN, and those of the kind "none".
        dims: number of dimensions of one datum; None if no data were given.
        paired: sums and variances of the values and of their differences to the best.
        some_values: values of at most 100,000 rows chosen at random, (fits, rows), on which stacking weights are found.
    """

    log_likelihoods: Mapping[str, LikelihoodResult]
    dims: int | None
    paired: PairedValues = field(repr=False)
    some_values: Tensor = field(repr=False)
    sample_quality: Mapping[str, Any] = field(default_factory=dict)

    @property
    def _paired(self) -> PairedValues:
        return self.paired

    @cached_property
    def _weights(self) -> Tensor:
        return weights_of_known(self.some_values)


def compare_batches(
    fits: Mapping[str, Any],
    x: Any,
    kwargs: Mapping[str, Any],
    options: EvaluationOptions,
    has_one: Callable[[Any, RowArguments], bool],
) -> StreamedComparison:
    """Return the comparison of fits in one pass over a stream; see `compare`.

    Args:
        fits: name -> fit, or its log-likelihoods.
        x: stream of rows; None if all fits are log-likelihoods.
        kwargs: keyword arguments of the models.
        options: options of `log_likelihood`.
        has_one: function that returns True if a fit has a likelihood, given its arguments.
    """
    scorers = {name: _scorer(fit, x, kwargs, options, has_one) for name, fit in fits.items()}
    rows = next((scorer.rows for scorer in scorers.values() if scorer.rows is not None), None)
    batches = RowBatches.of("compare", x, (), kwargs, None).read() if x is not None else repeat(None)
    merged, dims = _Merged(len(scorers)), None
    with tqdm(total=rows, desc="compare", unit="row", delay=PROGRESS_DELAY, disable=not options.progress, leave=False) as bar:
        for batch in batches:
            with nullcontext() if batch is None else naming_rows(merged.rows, _number_of_rows(batch)):
                scored = {name: scorer.score(batch) for name, scorer in scorers.items()}
            counts = {name: len(values) for name, values in scored.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(
                    f"compare wants the same data for all fits, but found rows {counts} from row {merged.rows} on."
                )
            if not (count := next(iter(counts.values()))):
                if x is None:
                    break
                continue
            merged.add(torch.stack(list(scored.values())))
            bar.update(count)
            dims = next((scorer.dims for scorer in scorers.values() if scorer.dims is not None), None)
    if not merged.rows:
        raise ValueError("compare found no rows in the stream. An iterator can be read only once: pass a new one.")
    results = {name: scorer.finished() for name, scorer in scorers.items()}
    order = sorted(range(len(fits)), key=lambda i: ranking(results[list(results)[i]]))
    names = [list(results)[i] for i in order]
    return StreamedComparison({name: results[name] for name in names}, dims, merged.paired(order), merged.sample(order))


def _scorer(fit: Any, x: Any, kwargs: Mapping[str, Any], options: EvaluationOptions, has_one: Any) -> _Scorer | _Known:
    """Return what scores batches by a fit, or reads what is known of them."""
    if isinstance(fit, LikelihoodResult):
        return _Known(fit)
    model, guide = as_pair(fit)
    check_model_keywords(model, guide, (x,), kwargs)
    return _Scorer(fit, model, guide, RowBatches.of("compare", x, (), kwargs, model, guide), options, has_one)


@dataclass
class _Known:
    """Log-likelihoods that are there already, read batch by batch.

    Attributes:
        result: the log-likelihoods, in memory or in a folder.
    """

    result: LikelihoodResult
    dims: ClassVar[None] = None

    def __post_init__(self) -> None:
        self._rest = torch.zeros(0, dtype=torch.float64)
        self._parts = self.result.parts()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.result.num_rows

    def score(self, batch: Any) -> Tensor:
        """Return the values of the next rows: as many as the batch has, or those that are read at once."""
        wanted = None if batch is None else _number_of_rows(batch)
        while wanted is None or len(self._rest) < wanted:
            part = next(self._parts, None)
            if part is None:
                break
            self._rest = torch.cat([self._rest, part.double().cpu()])
            if wanted is None and len(self._rest) >= ROWS_FOR_WEIGHTS:
                break
        found, self._rest = self._rest[: wanted or ROWS_FOR_WEIGHTS], self._rest[wanted or ROWS_FOR_WEIGHTS :]
        return found

    def finished(self) -> LikelihoodResult:
        """Return the log-likelihoods.

        Raises:
            ValueError: if they have more rows than were compared.
        """
        if len(self._rest) or next(self._parts, None) is not None:
            raise ValueError(f"compare wants the same data for all fits, but one of them has {self.result.num_rows} rows.")
        return self.result


def _number_of_rows(batch: Any) -> int:
    first = (
        next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0] if isinstance(batch, (tuple, list)) else batch
    )
    return len(first)


@dataclass
class _Scorer:
    """A fit that scores batches.

    Attributes:
        fit: the fit.
        model: its model.
        guide: its guide.
        batches: function that makes a batch the arguments of the model.
        options: options of `log_likelihood`.
        has_one: function that returns True if the fit has a likelihood.
        estimator: estimator of the fit, once there was a batch; None for a fit without a likelihood.
    """

    fit: Any
    model: Any
    guide: Any
    batches: RowBatches
    options: EvaluationOptions
    has_one: Callable[[Any, RowArguments], bool]
    estimator: RowEstimator | None = None
    totals: RowTotals = field(default_factory=RowTotals)
    dims: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int | None:
        """Number of rows, if it is known before they are read."""
        return self.batches.rows

    def score(self, batch: Any) -> Tensor:
        """Return the values of a batch in double precision, (rows,); NaN without a likelihood."""
        data = self.batches.convert(batch)
        if data is None:
            return torch.zeros(0, dtype=torch.float64)
        if self.dims is None:
            self.dims = prod(data.args[0].shape[1:])
            if self.has_one(self.fit, data):
                with side_effect_free(self.model, self.guide), fresh_probes():
                    check_no_plate(self.model, self.guide, data)
                    self.estimator = replace(self.options, progress=False).estimator(self.model, self.guide, data)
        if self.estimator is None:
            values, pareto_k = torch.full((data.num_rows,), torch.nan), None
        else:
            with (
                side_effect_free(self.model, self.guide),
                fresh_probes(),
                self.estimator.progress_bar(None, progress=False) as bar,
            ):
                found = self.estimator.estimate(data, bar)
            values, pareto_k, self.dtype = found.values, found.pareto_k, found.values.dtype
        self.totals += RowTotals.of(values, pareto_k, data.args[0])
        return values.double().cpu()

    def finished(self) -> LikelihoodResult:
        """Return the log-likelihoods, with a warning if they are unreliable."""
        if self.estimator is None:
            return StreamedLogLikelihood(self.totals, "none", 0)
        kind = self.estimator.kind
        shared = self.estimator.log_partitions.shared_error(self.totals.counts.rows)
        k, is_bound = self.estimator.samples_behind(), kind == "lower bound"
        if warned("log_likelihood", self.totals.counts, k, self.dtype, CURE):
            kind = "unreliable"
        return StreamedLogLikelihood(self.totals, kind, k, shared_error=shared, is_bound=is_bound)


class _Merged:
    """Moments of values and of the differences of all pairs of fits, and the values of some rows.

    Args:
        fits: number of fits.
    """

    def __init__(self, fits: int) -> None:
        self.rows = 0
        self._moments = Moments()
        self._some, self._keys = torch.zeros(fits, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, values: Tensor) -> None:
        """Add the values of a batch, (fits, rows)."""
        self.rows += values.shape[1]
        table = torch.stack([values, *(differences(best, values) for best in values)])  # (1 + fits, fits, rows)
        self._moments += Moments.of(table.movedim(-1, 0))
        keys = torch.rand(values.shape[1], generator=self._generator, dtype=torch.float64)
        self._some, self._keys = torch.cat([self._some, values], 1), torch.cat([self._keys, keys])
        if len(self._keys) > ROWS_FOR_WEIGHTS:  # those of the largest keys, in the order of the rows
            kept = self._keys.topk(ROWS_FOR_WEIGHTS).indices.sort().values
            self._some, self._keys = self._some[:, kept], self._keys[kept]

    def paired(self, order: list[int]) -> PairedValues:
        """Return sums and variances of fits in an order, the best first."""
        total, variance, best = self._moments.total[:, order], self._moments.variance[:, order], 1 + order[0]
        return PairedValues(self.rows, total[0], variance[0], total[best], variance[best])

    def sample(self, order: list[int]) -> Tensor:
        """Return the values of some rows, (fits, rows), in an order of the fits."""
        return self._some[order]
