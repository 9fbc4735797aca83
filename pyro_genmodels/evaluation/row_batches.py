"""Rows that are read batch by batch, as arguments of a model: from loaders, streams, iterators or memory-mapped arrays."""

from __future__ import annotations

__all__ = ["RowBatches", "is_stream", "parts_of_rows", "rows_digest"]

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from pyro_genmodels._pyro.modules import reachable_modules
from pyro_genmodels.datasets import RowStream, stream
from pyro_genmodels.evaluation.arguments import RowArguments, row_arguments
from pyro_genmodels.utils.checksums import arguments_digest
from pyro_genmodels.utils.keywords import signature_of
from pyro_genmodels.utils.nested import map_nested

MAX_ROWS_READ = 100_000
"""Number of rows of an array that are read at once."""
ROWS_OF_DIGEST = 1000
"""Number of the first rows of the data by which a resumed run knows them again."""


def is_stream(x: Any) -> bool:
    """Return True if data are read batch by batch: a `RowStream`, a `DataLoader` or an iterator.

    Example:
        >>> is_stream(iter([torch.zeros(2, 3)])), is_stream(torch.zeros(2, 3))
        (True, False)
    """
    return isinstance(x, (RowStream, DataLoader, IterableDataset, Iterator))


@dataclass(frozen=True)
class RowBatches:
    """Arguments of a model, batch by batch.

    Attributes:
        read: function that returns the batches: tensors, tuples of arguments, or dictionaries of arguments.
        rows: number of rows, or None if it is not known.
        digest: checksum of all rows, or "" if it is not known.
        convert: function that returns the arguments of a batch, or None for one without rows.
    """

    read: Callable[[], Iterable[Any]]
    rows: int | None
    convert: Callable[[Any], RowArguments | None]
    digest: str = ""

    @classmethod
    def of(cls, owner: str, x: Any, args: tuple, kwargs: Mapping[str, Any], model: Any, guide: Any = None) -> RowBatches:
        """Return the batches of a stream, or of arrays.

        Args:
            owner: function that takes them, for error messages.
            x: a stream, see `is_stream`, whose batches hold all arguments with a value for each row; or the rows of x, which
                are read slice by slice if they are memory-mapped and the only argument.
            args: other positional arguments of the model. A stream has none.
            kwargs: keyword arguments of the model. Beside a stream they are the same for all rows.
            model: the model; batches are brought to the device of its parameters.
            guide: the guide.

        Raises:
            ValueError: if there are positional arguments beside a stream.
        """
        if isinstance(x, np.memmap) and not args and not kwargs:
            x = stream(x)
        if not is_stream(x):
            data = row_arguments(owner, x, args, kwargs, model=model)
            return cls(lambda: data.batches(MAX_ROWS_READ), data.num_rows, lambda batch: batch)
        if args:
            raise ValueError(
                f"{owner} was given a stream of rows and {len(args)} more positional arguments. Let its batches hold all that "
                "has a value for each row, as (x, context); give what is the same for all rows by keyword."
            )
        parameters = (p for module in reachable_modules(model, guide) for p in module.parameters())
        device = next((p.device for p in parameters), torch.device("cpu"))

        def convert(batch: Any) -> RowArguments | None:
            own, by_name = _as_arguments(batch, model)
            if not own or not len(own[0]):
                return None
            found = row_arguments(owner, own[0], own[1:], by_name, model=model)
            found = replace(found, args=_on(device, found.args), kwargs=_on(device, found.kwargs))
            return replace(found, kwargs={**kwargs, **found.kwargs}, constants=frozenset(kwargs))

        if isinstance(x, RowStream):
            return cls(lambda: x.batches(x.buffer_rows), len(x), convert, x.digest)
        return cls(lambda: x, _rows(x), convert)

    def __iter__(self) -> Iterator[RowArguments]:
        for batch in self.read():
            if (found := self.convert(batch)) is not None:
                yield found


def _as_arguments(batch: Any, model: Any) -> tuple[tuple, dict[str, Any]]:
    """Return a batch as positional and keyword arguments of a model, the first argument by position."""
    if isinstance(batch, Mapping):
        first = next(iter(signature_of(model).parameters))
        rest = {str(name): value for name, value in batch.items() if name != first}
        return ((batch[first],) if first in batch else ()), rest
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def _on(device: torch.device, values: Any) -> Any:
    return map_nested(lambda value: value.to(device) if isinstance(value, Tensor) else value, values)


def _rows(x: Any) -> int | None:
    """Return the number of rows of a loader, if it is known without reading them."""
    is_complete = isinstance(x, DataLoader) and x.batch_sampler is not None and not x.drop_last and x.sampler is not None
    if not is_complete or isinstance(x.dataset, IterableDataset) or not hasattr(x.dataset, "__len__"):
        return None
    return len(x.dataset)


def parts_of_rows(batches: Iterable[RowArguments], rows: int) -> Iterator[tuple[int, Iterator[RowArguments]]]:
    """Yield each part of the rows: its number, and its batches, which are cut at the ends of parts.

    Args:
        batches: batches of rows.
        rows: number of rows of a part; the last one may have fewer.
    """

    def pieces() -> Iterator[tuple[int, RowArguments]]:
        seen = 0
        for batch in batches:
            start = 0
            while start < batch.num_rows:
                stop = min(batch.num_rows, start + rows - seen % rows)
                yield seen // rows, batch if stop - start == batch.num_rows else batch.take(slice(start, stop))
                seen, start = seen + stop - start, stop

    for number, group in groupby(pieces(), key=lambda piece: piece[0]):
        yield number, (piece for _, piece in group)


def rows_digest(data: RowArguments) -> str:
    """Return a checksum of all arguments, of which those with rows are cut to the first."""
    first = data.first(ROWS_OF_DIGEST)
    return arguments_digest([first.args, dict(first.kwargs)])
