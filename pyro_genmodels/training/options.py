"""The arguments of `train`: checks of its options, the data in batches, and a family made ready for them."""

from __future__ import annotations

__all__ = [
    "EMA_DECAY",
    "VALIDATION_SEED",
    "buffers_restored",
    "check_options",
    "identity_of",
    "load_data",
    "prepare_family",
    "statistics_restored_on_error",
    "subsample_held_out",
    "torch_threads",
]

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_genmodels._pyro import handlers
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.families.context import Labels, VectorContext
from pyro_genmodels.families.family import Family
from pyro_genmodels.infer.compiled.modes import check_mode
from pyro_genmodels.optim.averaging import moving_average
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.runs import Checkpoint
from pyro_genmodels.utils.errors import check_positive_int, listed
from pyro_genmodels.utils.rng import forked_rng

EMA_DECAY = 0.999
"""Default decay of the average, for fits that need one."""
VALIDATION_SEED = 0x9E3779B9
"""Seed of every validation, so that epochs are compared with the same random numbers. No data are drawn from it."""
STANDARDIZE_ROWS = 10_000
"""Number of rows of a DataLoader that are validated and set a family's mean and deviation. Of a tensor all rows are used.

Of a `RowStream` as many rows are validated, from all over the data, and all rows set mean and deviation.
"""


def check_options(
    epochs: Any,
    batch_size: Any,
    patience: Any,
    ema_decay: Any,
    clip_norm: Any,
    checkpoint: Any,
    seed: Any,
    threads: Any,
    mode: Any,
    max_seconds: Any,
) -> None:
    """Check the options of `train` that are numbers, paths or modes."""
    check_mode("train", mode)
    _check_autocast()
    is_number = isinstance(max_seconds, Real) and not isinstance(max_seconds, bool)
    if not (max_seconds is None or (is_number and float(max_seconds) > 0)):
        raise ValueError(f"train wants a positive number as max_seconds, or None for no limit, but found {max_seconds!r}.")
    check_positive_int("train", epochs=epochs, batch_size=batch_size, patience=patience)
    if threads is not None:
        check_positive_int("train", threads=threads)
    if not (clip_norm is None or (isinstance(clip_norm, Real) and not isinstance(clip_norm, bool) and float(clip_norm) > 0)):
        raise ValueError(f"train wants a positive number as clip_norm, or None not to clip, but found {clip_norm!r}.")
    if not (checkpoint is None or isinstance(checkpoint, str | Path | Checkpoint)):
        raise TypeError(f"train wants a path or a Checkpoint(path) as checkpoint, but found {checkpoint!r}.")
    if not (seed is None or (isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) < 2**32)):
        raise ValueError(f"train wants an integer from 0 to 2**32 - 1 as seed, or None, but found {seed!r}.")
    if isinstance(ema_decay, bool):
        raise ValueError(f"train wants a decay such as 0.999 as ema_decay, None or 'auto', but found {ema_decay!r}.")
    if not (ema_decay is None or ema_decay == "auto"):
        moving_average(ema_decay)  # raises an error for a bad decay


def _check_autocast() -> None:
    """Raise a ValueError under autocast to float16, in which small gradients vanish."""
    if any(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16 for kind in ("cpu", "cuda")):
        raise ValueError(
            "train was called under torch.autocast to float16, in which small gradients vanish, because it does not scale the "
            'loss. Use dtype=torch.bfloat16, or a Trainer(precision="16-mixed") of Lightning, which scales it.'
        )


def load_data(
    data: Any,
    context: Any,
    valid: Any,
    batch_size: int,
    seed: int | None,
    model: Callable[..., Any],
    modules: list[nn.Module],
    model_kwargs: Mapping[str, Any] | None,
) -> tuple[Batches, Batches | None, Any]:
    """Return the data and the held-out data in batches, and the numbers of the rows if these are a share of the data, or a
    stream.

    Batches are on the device and in the precision of the modules.
    """
    like = next((p for m in modules for p in m.parameters()), torch.empty(0))
    family = _family_of(model)
    form: Any = {"model_kwargs": model_kwargs, "seed": 0 if seed is None else seed}
    if family is not None:
        is_own_module = not isinstance(family.context, VectorContext | None)  # which is given contexts in its precision
        form |= {"family": family.name, "exact": 1 if is_own_module else 2, "arrange": getattr(family, "arranged", None)}
    batches = Batches(data, context, batch_size, like, **form)
    if valid is None:
        return batches, None, None
    if isinstance(valid, Real):
        if not 0 < float(valid) < 1:
            raise ValueError(
                f"train wants held-out rows as valid, or a share of the data between 0 and 1, but found {valid!r}."
            )
        return batches.split(float(valid), seed)
    held_out = Batches(valid, None, max(batch_size, 256), like, **form)
    if batches.all and held_out.all and (batches.all.names != held_out.all.names):
        raise ValueError(
            f"valid holds {listed(held_out.all.names)}, but the data hold {listed(batches.all.names)}. Pass it in the form "
            "of the data, such as valid=(x, context)."
        )
    return batches, held_out, None


def prepare_family(model: Callable[..., Any], batches: Batches, held_out: Batches | None, *, progress: bool = False) -> None:
    """Validate the data of a family, and set mean and deviation of data and contexts by those to train on.

    Args:
        model: the family's model, or another, of which nothing is known.
        batches: the data.
        held_out: the held-out data, or None.
        progress: True to show the progress of a pass over the data.
    """
    family = _family_of(model)
    if family is None:
        return
    statistics = () if family.is_prepared else batches.source.statistics(progress=progress)
    _check_statistics(family, statistics)
    rows = batches.head(STANDARDIZE_ROWS)
    for part in (rows, *([] if held_out is None else [held_out.head(STANDARDIZE_ROWS)])):
        _check_swapped(family, part)
        family.validate(part.x)
        if found := part.nonfinite_rows(known=part.x):  # in the context
            raise ValueError(f"{family.name} cannot be trained on these data: {found}. Drop or impute these rows first.")
        if isinstance(family.context, Labels | VectorContext) and part.context is not None:
            family.context.check(part.context)  # of all rows
        with handlers.side_effect_free(family):
            family.embed(part.context if part.context is None else part.context[:256])
    family.prepare(rows.x, rows.context, statistics=statistics)


def _check_statistics(family: Family, statistics: tuple[ColumnStatistics, ...]) -> None:
    """Raise an error if there are rows with values that a family refuses, by the statistics of all rows."""
    for what, found in zip(("data", "contexts"), statistics, strict=False):
        if found.nonfinite and not (what == "data" and getattr(family, "missing", False)):
            raise ValueError(
                f"{family.name} cannot be trained on these {what}: {found.nonfinite:,} of {found.rows:,} rows have NaN or "
                f"infinite values, the first of them {found.first_nonfinite}. Drop or impute these rows first."
            )
    if len(statistics) > 1 and isinstance(family.context, Labels):
        family.context.check(torch.stack([statistics[1].low, statistics[1].high]).to(statistics[1].dtype))


def _check_swapped(family: Family, batch: Batch) -> None:
    """Raise an error if x has another shape than the family's events, and the context has this shape."""
    shapes = [tuple(t.shape[1:]) for t in (batch.x, batch.context) if isinstance(t, Tensor)]
    wanted = tuple(family.event_shape)
    if len(shapes) == 2 and shapes[0] != wanted == shapes[1]:
        raise ValueError(
            f"{family.name} wants events of shape {wanted}, but those of x are {shapes[0]}, and those of the context {wanted}. "
            "Swap them: (x, context)."
        )


def subsample_held_out(step: Any, batches: Batches, held_out: Batches) -> None:
    """Give all held-out rows to a model that draws its minibatches itself.

    Raises:
        ValueError: if its plate has a fixed number of rows.
    """
    held_out.subsample(ceil(batches.rows / batches.count))
    try:
        with handlers.side_effect_free(step), forked_rng():
            step.loss(held_out.first())
    except IndexError as error:
        raise ValueError(
            f"The model has a plate of {batches.rows} rows for any data, but valid has {held_out.rows}. Write the plate by the "
            "rows that the model is given: pyro.plate(name, len(x), subsample_size=...)."
        ) from error


def identity_of(batches: Batches, held_out: Batches | None) -> dict[str, Any]:
    """Return the number of rows, and checksums of data and held-out data."""
    return {"rows": batches.rows, "data": batches.digest, "valid": None if held_out is None else held_out.digest}


@contextmanager
def statistics_restored_on_error(model: Callable[..., Any]) -> Iterator[None]:
    """Restore a family's means and deviations, of data and contexts, if the block raises an error."""
    family = _family_of(model)
    if family is None:
        yield
        return
    own = ("loc", "scale", "standardized")
    before = {name: buffer.clone() for name, buffer in family.named_buffers() if name.rpartition(".")[2] in own}
    try:
        yield
    except BaseException:
        family.load_state_dict(before, strict=False)
        raise


def _family_of(model: Callable[..., Any]) -> Family | None:
    """Return the family whose model this is, or None."""
    owner = getattr(model, "__self__", None)
    return owner if isinstance(owner, Family) else None


@contextmanager
def buffers_restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore the buffers of modules at the end of the block."""
    buffers = [b for module in modules for b in module.buffers()]
    before = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for b, value in zip(buffers, before, strict=True):
            b.copy_(value)


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Set torch's number of threads, and the former one at the end; None changes nothing."""
    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)
