"""Draws of a family or distribution in files, in bounded memory, and resumed where a run was interrupted."""

from __future__ import annotations

__all__ = ["sample_to"]

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from pyro_genmodels._pyro import handlers
from pyro_genmodels._pyro.identity import fit_digest
from pyro_genmodels.inference_data.arrays import to_numpy
from pyro_genmodels.utils.errors import check_positive_int, one_line, repr_or_class
from pyro_genmodels.utils.parts import Output, PartFolder, as_output, flat_columns, part_seed, rows_of_part
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.tensors import as_tensor
from pyro_genmodels.utils.zarr_arrays import ZarrArrays

PROGRESS_DELAY = 2
"""Seconds after which a progress bar is shown."""


def sample_to(
    fit: Any,
    num_samples: int,
    out: str | Path | Output,
    *,
    context: Any = None,
    columns: Sequence[str] | None = None,
    label: str = "label",
    batch_size: int = 10_000,
    progress: bool = True,
) -> Path:
    """Draw samples of a family, or of a distribution, into files, and hold no more of them in memory than one part.

    The samples are a function of the fit, the seed, ``batch_size`` and the number of draws of a part, and of nothing else:
    where a run was interrupted leaves no trace. The modules run in evaluation mode, and torch's random numbers stay as they
    were.

    Args:
        fit: family, result of `train`, or distribution without a batch shape. Draws of a posterior: see `to_arviz`.
        num_samples: number of samples.
        out: folder such as "draws.parquet", of parquet files with a column for each number of a sample; or "draws.zarr", with
            the array ``x``, (draw, *event_shape). Or an `evaluation.Output(path, resume=True, seed=1)`.
        context: contexts of a conditional family, (K, ...) vectors or (K,) labels, taken in turn: sample n is given context
            n mod K. Labels are written too.
        columns: names of the columns of parquet files; ``x0``, ``x1`` and so on by default.
        label: name for labels.
        batch_size: number of samples that are drawn at once.
        progress: True to show a progress bar after two seconds.

    Returns:
        Path of the folder.

    Raises:
        TypeError: if the fit is nothing to sample from.
        ValueError: if a number is not positive, there are other columns than the samples have, or the folder holds a run of
            another fit or by other settings, or a damaged part.
        FileExistsError: if the path exists, and the run is not resumed.
        OSError: if the disk is full. What is written stays, and is resumed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pandas
        >>> from pyro_genmodels import Flow
        >>> with TemporaryDirectory() as folder:
        ...     path = sample_to(Flow((2,)), 1000, f"{folder}/draws.parquet", columns=["height", "weight"], progress=False)
        ...     pandas.read_parquet(path).shape
        (1000, 2)
    """
    check_positive_int("sample_to", num_samples=num_samples, batch_size=batch_size)
    output = as_output("sample_to", out, (".parquet", ".zarr"))
    source = _Source(fit, context, batch_size, output.seed)
    first, labels = source.draw(-1, slice(0, 1))
    size = first.size
    names = None if columns is None else list(columns)
    if names is not None and len(names) != size:
        raise ValueError(f"sample_to wants the names of {size} columns, but found {len(names)}: {one_line(names, 80)}.")
    used = [*(names or flat_columns(first)), *([] if labels is None else [label])]
    if len(set(used)) < len(used):
        raise ValueError(f"sample_to wants columns of different names, with that of labels, but found {one_line(used, 80)}.")
    rows = rows_of_part(output, size)
    settings: dict[str, Any] = {
        "kind": "draws", "fit": source.digest(), "number_of_draws": num_samples, "draws_of_a_part": rows, "seed": output.seed,
        "batch_size": batch_size, "columns": names, "label": label,
    }  # fmt: skip
    as_zarr = Path(output.path).suffix == ".zarr"
    write: Callable[..., Path] = _to_zarr if as_zarr else _to_parquet
    with tqdm(total=num_samples, desc="samples", unit="sample", delay=PROGRESS_DELAY, disable=not progress, leave=False) as bar:
        return write(source, output, settings, num_samples, rows, names, label, bar)


def _to_parquet(
    source: _Source, output: Output, settings: Mapping[str, Any], size: int, rows: int, names: Any, label: str, bar: tqdm
) -> Path:
    """Write samples as parquet files."""
    folder = PartFolder(output, settings)
    for number, start in enumerate(range(0, size, rows)):
        draws = slice(start, min(start + rows, size))
        if folder.record(number) is None:
            x, labels = source.draw(number, draws)
            table = flat_columns(x, names) | ({} if labels is None else {label: labels})
            folder.write(number, table, {"rows": len(x)})
        bar.update(draws.stop - draws.start)
    folder.finish(rows=size)
    return folder.path


def _to_zarr(
    source: _Source, output: Output, settings: Mapping[str, Any], size: int, rows: int, names: Any, label: str, bar: tqdm
) -> Path:
    """Write samples as a zarr array."""
    if names is not None:
        raise ValueError("sample_to writes one array to a .zarr folder, without columns: leave columns out, or write parquet.")
    arrays = ZarrArrays(output, settings, size, rows)
    bar.update(min(arrays.done * rows, size))
    for draws in arrays.blocks:
        x, labels = source.draw(arrays.done, draws)
        arrays.put("", "x", x, ["draw", *(f"x_dim_{i}" for i in range(x.ndim - 1))], 0, draws)
        if labels is not None:
            arrays.put("", label, labels, ["draw"], 0, draws)
        arrays.save(arrays.done + 1)
        bar.update(draws.stop - draws.start)
    arrays.finish()
    return arrays.path


class _Source:
    """Samples of a family or distribution, part by part.

    Args:
        fit: the family, a fit of one, or the distribution.
        context: contexts that are taken in turn, or None.
        batch_size: number of samples that are drawn at once.
        seed: seed of all parts.
    """

    def __init__(self, fit: Any, context: Any, batch_size: int, seed: int) -> None:
        self._owner = getattr(fit, "family", fit)
        self._batch_size, self._seed = batch_size, seed
        is_family = callable(self._owner) and hasattr(self._owner, "data_support")
        if not (is_family or isinstance(self._owner, Distribution)):
            raise TypeError(
                f"sample_to draws from a family, a result of train or a distribution, but found "
                f"{one_line(repr_or_class(fit), 60)}. For draws of a posterior see to_arviz(fit, ..., out='posterior.zarr')."
            )
        if not is_family and (tuple(self._owner.batch_shape) or context is not None):
            found = "a context" if context is not None else f"the batch shape {tuple(self._owner.batch_shape)}"
            raise ValueError(f"sample_to draws from one distribution, but found {found}. Contexts are for families.")
        self._is_family = is_family
        self._is_discrete = bool(is_family and self._owner.data_support.is_discrete)
        self._context = None if context is None else torch.atleast_1d(as_tensor(context, "sample_to"))
        if self._context is not None and not len(self._context):
            raise ValueError(f"sample_to wants one or more contexts, but found the shape {tuple(self._context.shape)}.")

    def digest(self) -> str:
        """Return a checksum of the fit and its contexts."""
        tensors = [] if self._is_family else [value for value in vars(self._owner).values() if isinstance(value, Tensor)]
        return fit_digest([self._owner], tensors=[*tensors, *([] if self._context is None else [self._context])])

    def draw(self, number: int, draws: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the samples of a part, and their labels if the contexts are labels."""
        parts, labels = [], []
        with handlers.side_effect_free(self._owner), forked_rng(part_seed(self._seed, number + 1)):
            for start in range(draws.start, draws.stop, self._batch_size):
                stop = min(start + self._batch_size, draws.stop)
                x, context = self._batch(start, stop)
                parts.append(to_numpy(x.long() if self._is_discrete else x))
                if context is not None and context.dim() == 1 and not context.is_floating_point():
                    labels.append(to_numpy(context))
        return np.concatenate(parts), np.concatenate(labels) if labels else None

    def _batch(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Return some samples, and their contexts."""
        if self._context is None:
            dist = self._owner() if self._is_family else self._owner
            return dist.sample((stop - start,)), None
        context = self._context[torch.arange(start, stop) % len(self._context)]
        return self._owner(context.to(self._owner.loc.device)).sample(), context
