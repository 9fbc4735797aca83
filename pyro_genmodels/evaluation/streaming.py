"""Log-likelihoods of rows that are read batch by batch: moments in memory, values in a folder of parquet files.

Each part of the rows is evaluated and written with its moments, so that an interrupted run goes on after its last part. Random
numbers are seeded for each batch by the seed, the number of the part and that of the batch in it.
"""

from __future__ import annotations

__all__ = ["CURE", "EvaluationOptions", "score_batches"]

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro import traces
from pyro_genmodels._pyro.identity import fit_digest
from pyro_genmodels.evaluation.arguments import RowArguments, with_plate_of_pair
from pyro_genmodels.evaluation.importance import RowEstimates, RowEstimator
from pyro_genmodels.evaluation.log_z import LogPartitions
from pyro_genmodels.evaluation.result import LikelihoodKind, StreamedLogLikelihood, warned
from pyro_genmodels.evaluation.row_batches import RowBatches, parts_of_rows, rows_digest
from pyro_genmodels.evaluation.row_counts import RowTotals
from pyro_genmodels.utils.parts import MAX_ROWS_OF_PART, Output, PartFolder, part_seed
from pyro_genmodels.utils.rng import forked_rng

CURE = "Raise num_samples, or use a guide closer to the posterior: this one may be too narrow or too wide."
"""Advice about weights of a heavy tail."""


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of `log_likelihood`, with the same names."""

    num_samples: int = 1000
    num_steps: int = 1000
    batch_size: int = 20_000
    parallel: bool | None = None
    progress: bool = False
    n_jobs: int | None = None

    def estimator(self, model: Any, guide: Any, data: RowArguments) -> RowEstimator:
        """Return the estimator of a fit, after runs on some rows of the data."""
        log_partitions = LogPartitions(self.num_samples, self.num_steps, progress=self.progress, n_jobs=self.n_jobs)
        options: Any = {"num_samples": self.num_samples, "batch_size": self.batch_size, "parallel": self.parallel}
        return RowEstimator.of(model, guide, data, log_partitions, **options)


def score_batches(
    model: Any, guide: Any, batches: RowBatches, out: Output | None, options: EvaluationOptions
) -> StreamedLogLikelihood:
    """Return the log-likelihoods of rows in one pass; see `log_likelihood`.

    Args:
        model: model of the fit.
        guide: its guide.
        batches: the rows.
        out: where to write the values; None holds their moments only, and draws from torch's random numbers.
        options: options of `log_likelihood`.
    """
    first, rows = first_of(batches)
    check_no_plate(model, guide, first)
    with forked_rng(part_seed(out.seed)) if out else nullcontext():
        estimator = options.estimator(model, guide, first)
    folder = None if out is None else PartFolder(out, _settings(model, guide, first, batches, out, options))
    scores = _Scores(estimator, folder, 0 if out is None else out.seed)
    with estimator.progress_bar(batches.rows, progress=options.progress) as bar:
        for number, pieces in parts_of_rows(rows, rows_per_part(out)):
            scores.add(number, pieces, bar)
    return scores.result()


def rows_per_part(out: Output | None) -> int:
    """Return the number of rows of a part."""
    return (None if out is None else out.rows) or MAX_ROWS_OF_PART


def first_of(batches: Iterable[RowArguments]) -> tuple[RowArguments, Iterator[RowArguments]]:
    """Return the first batch, and all batches.

    Raises:
        ValueError: if there are none.
    """
    rows = iter(batches)
    first = next(rows, None)
    if first is None:
        raise ValueError(
            "The stream has no rows. An iterator can be read only once: pass a new one, or a DataLoader, which is read anew."
        )
    return first, chain([first], rows)


def check_no_plate(model: Any, guide: Any, first: RowArguments) -> None:
    """Raise a ValueError if the plate of the data chooses rows by itself, which needs all of them at once."""
    found = with_plate_of_pair(model, guide, first).plate
    if found is not None:
        raise ValueError(
            f"Rows are read batch by batch, but the plate {found.name!r} of the model chooses some by subsample_size, for "
            "which it wants all of them at once. Build the plate without it, with the number of rows of x."
        )


def _settings(
    model: Any, guide: Any, first: RowArguments, batches: RowBatches, out: Output, options: EvaluationOptions
) -> Mapping[str, Any]:
    """Return what a resumed run must have in common with the one that was interrupted."""
    one = first.first(1)
    found = {name: value for name, value in asdict(options).items() if name not in ("progress", "n_jobs")}
    return {
        "kind": "log_likelihood",
        "fit": fit_digest([model, guide], lambda: traces.run_pair(model, guide, one.args, one.kwargs)),
        "data": f"{rows_digest(first)} {batches.digest}".strip(),
        "number_of_rows": batches.rows,
        "rows_of_a_part": rows_per_part(out),
        "seed": out.seed,
        "annealed_in_blocks": options.n_jobs is not None,
        **found,
    }


@contextmanager
def naming_rows(start: int, rows: int) -> Iterator[None]:
    """Add to an error which rows of the stream it is about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"These are the rows {start} to {start + rows - 1} of the stream.")
        raise


class _Scores:
    """Estimates of rows, part by part.

    Args:
        estimator: estimator of the fit.
        folder: folder for the parts, or None.
        seed: seed of the parts in a folder.
    """

    def __init__(self, estimator: RowEstimator, folder: PartFolder | None, seed: int) -> None:
        self.estimator, self.folder, self.seed = estimator, folder, seed
        self.totals = RowTotals()
        self.kinds: set[LikelihoodKind] = {estimator.kind}
        self.rows_here, self.shared_error, self.dtype = 0, 0.0, torch.get_default_dtype()

    def add(self, number: int, pieces: Iterable[RowArguments], bar: tqdm) -> None:
        """Evaluate the rows of a part and write them, unless they were written before."""
        record = None if self.folder is None else self.folder.record(number)
        if record is not None:
            self._add_written(number, record, pieces, bar)
            return
        parts, totals = [], RowTotals()
        for i, piece in enumerate(pieces):
            seeded = forked_rng(part_seed(self.seed, number, i)) if self.folder else nullcontext()
            with naming_rows(self.totals.counts.rows + totals.counts.rows, piece.num_rows), seeded:
                found = self.estimator.estimate(piece, bar)
            totals += RowTotals.of(found.values, found.pareto_k, piece.args[0])
            self.rows_here, self.dtype = self.rows_here + piece.num_rows, found.values.dtype
            if self.folder is not None:
                parts.append(RowEstimates(*(None if t is None else t.cpu() for t in found)))  # type: ignore[arg-type]
        self.totals += totals
        self.kinds.add(self.estimator.kind)
        self.shared_error = self.estimator.log_partitions.shared_error(self.rows_here)
        if self.folder is not None:
            known = {"kind": self.estimator.kind, "shared_error": self.shared_error}
            self.folder.write(number, _columns(RowEstimates.joined(parts)), {**totals.as_record(), **known})

    def _add_written(self, number: int, record: Mapping[str, Any], pieces: Iterable[RowArguments], bar: tqdm) -> None:
        """Add the totals of a part that was written before."""
        rows, totals = sum(piece.num_rows for piece in pieces), RowTotals.from_record(record)
        if rows != totals.counts.rows:
            raise ValueError(
                f"Part {number} of the rows has {rows} rows, but {totals.counts.rows} were evaluated before: the data have "
                "changed. Resume with the same data, or write to another path."
            )
        self.totals += totals
        self.kinds.add(record["kind"])
        self.shared_error = self.shared_error if self.rows_here else record["shared_error"]
        bar.update(rows * self.estimator.num_samples)

    def result(self) -> StreamedLogLikelihood:
        """Return the result, with a warning if it is unreliable."""
        kind = max(self.kinds, key=get_args(LikelihoodKind).index)
        path = None if self.folder is None else self.folder.path
        k = self.estimator.samples_behind()
        is_bound = kind == "lower bound"
        found = StreamedLogLikelihood(self.totals, kind, k, path, self.shared_error, is_bound=is_bound)
        if warned("log_likelihood", found.counts, k, self.dtype, CURE):
            found = replace(found, kind="unreliable")
        if self.folder is not None:
            results = {"rows": found.num_rows, "mean": found.mean, "mean_std_error": found.mean_std_error, "label": found.label}
            self.folder.finish(**results)
        return found


def _columns(found: RowEstimates) -> dict[str, Any]:
    """Return estimates as columns of a table."""
    columns: dict[str, Tensor | None] = {
        "log_likelihood": found.values, "std_error": found.std_error, "pareto_k": found.pareto_k, "smoothed": found.smoothed
    }  # fmt: skip
    return {name: t.float().numpy() if t.dtype == torch.bfloat16 else t.numpy() for name, t in columns.items() if t is not None}
