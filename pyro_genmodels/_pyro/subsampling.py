"""Plates that choose their rows by themselves (``subsample_size``), run block by block so that each row counts once.

Such a plate refuses indices of another number than its own. It takes a block of that many, and the last block begins with rows
that an earlier one has.
"""

from __future__ import annotations

__all__ = [
    "GivenRows",
    "RowBlock",
    "SameRows",
    "SubsampledPlate",
    "fixed_rows",
    "plates_with_subsample_size",
    "row_blocks",
    "subsampled_plates",
]

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_genmodels._pyro import traces


class RowBlock(NamedTuple):
    """Rows of a subsampled plate that one run sees.

    Attributes:
        indices: indices of these rows in the plate.
        new: slice of them that no earlier block has.
        to: position of the new rows among all.
    """

    indices: Tensor
    new: slice
    to: slice


@dataclass(frozen=True)
class SubsampledPlate:
    """A plate that chooses rows at random.

    Attributes:
        name: name of the plate.
        size: number of its rows.
        count: number of rows that a run sees.
        device: device of their indices.
    """

    name: str
    size: int
    count: int
    device: Any = "cpu"

    def blocks(self) -> Iterator[RowBlock]:
        """Yield blocks of rows that are all rows together."""
        return row_blocks(self.size, self.count, self.device)


def row_blocks(size: int, count: int, device: Any = "cpu") -> Iterator[RowBlock]:
    """Yield blocks of ``count`` rows that are all rows together. The last begins with rows that an earlier block has.

    Example:
        >>> [(block.indices.tolist(), block.new, block.to) for block in row_blocks(3, 2)]
        [([0, 1], slice(0, 2, None), slice(0, 2, None)), ([1, 2], slice(1, 2, None), slice(2, 3, None))]
    """
    for start in range(0, size, count):
        first = min(start, size - count)
        indices = torch.arange(first, first + count, device=device)
        yield RowBlock(indices, slice(start - first, count), slice(start, first + count))


def fixed_rows(indices: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """Return a context in which plates take these rows, {name of the plate: indices}, instead of choosing them."""
    return ReplayMessenger(trace=traces.holding(indices))


class SameRows(Messenger):
    """Handler of several runs, in which a plate that chooses rows at random takes those of the first run again."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["name"] in self._rows and msg["value"] is None:
            msg["value"] = self._rows[msg["name"]]

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self._rows.setdefault(msg["name"], msg["value"])


class GivenRows(Messenger):
    """Handler that notes the rows which a model gives to its plates, ``pyro.plate(name, size, subsample=rows)``.

    It must be the innermost handler: `poutine.replay` puts the rows of a guide in their place.

    Attributes:
        rows: indices by name of the plate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and msg["value"] is not None:
            self.rows[msg["name"]] = msg["value"]

    def other_than(self, guide_trace: Trace) -> dict[str, Any]:
        """Return the given rows of the plates for which a guide chooses rows at random, or is given others."""
        nodes = guide_trace.nodes.items()
        plates: dict[str, Any] = {name: site for name, site in nodes if site_is_subsample(site) and name in self.rows}
        given = {name: self.rows[name] for name, site in plates.items() if self.rows[name] is not site["value"]}
        return {
            name: rows
            for name, rows in given.items()
            if plates[name]["fn"].subsample_size is not None
            or not torch.equal(torch.as_tensor(rows), torch.as_tensor(plates[name]["value"]))
        }


class _PlatesSeenError(Exception):
    """The end of a run that has shown its plates."""


class _PlatesMessenger(Messenger):
    """Handler that records plates with ``subsample_size``, up to the first site inside a plate."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, SubsampledPlate] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            fn: Any = msg["fn"]
            if msg["value"] is None and fn.subsample_size is not None:
                self.found[msg["name"]] = SubsampledPlate(msg["name"], fn.size, fn.subsample_size, fn.device)
        elif any(frame.vectorized for frame in msg["cond_indep_stack"]):
            raise _PlatesSeenError


def subsampled_plates(fn: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> list[SubsampledPlate]:
    """Return the plates that choose rows at random around the first site of a function that lies inside a plate.

    The function runs no further than that site, so that this is cheap for any number of rows. Errors of the function, such as
    that of a distribution which refuses a draw from the prior, end the run and are not raised, except for a lack of memory:
    the fit itself, run later, raises those that concern it.
    """
    return [plate for plate in plates_with_subsample_size(fn, args, kwargs) if plate.count < plate.size]


def plates_with_subsample_size(fn: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> list[SubsampledPlate]:
    """Return the plates of `subsampled_plates`, and those that would choose rows if the arguments had more of them."""
    plates = _PlatesMessenger()
    try:
        with poutine.block(), torch.no_grad(), plates:
            fn(*args, **kwargs)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
    return list(plates.found.values())
