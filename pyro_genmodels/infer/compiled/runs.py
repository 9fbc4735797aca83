"""Runs of many steps: the arguments of one step after another, and when a run may end."""

from __future__ import annotations

__all__ = ["batches_of", "check_batches", "has_converged", "mean_loss"]

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pyro_genmodels.utils.errors import type_with_article


def mean_loss(losses: list[Any]) -> Tensor:
    """Return the mean of losses (n,) or (n, num_restarts), without those that are NaN."""
    return torch.tensor(losses, dtype=torch.float64).nanmean(0)


def has_converged(losses: list[Any], patience: int) -> bool:
    """Return True if the mean of the last losses is not below the mean of as many before."""
    if len(losses) < 2 * patience:
        return False
    return not (mean_loss(losses[-patience:]) < mean_loss(losses[-2 * patience : -patience])).any()


def check_batches(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return True if the arguments of a run are a loader.

    Raises:
        TypeError: if there is an iterator among them.
        ValueError: if there are arguments beside a loader.
    """
    values = (*args, *kwargs.values())
    for x in values:
        if isinstance(x, Iterator):
            raise TypeError(
                f"CompiledSVI.run walks through a loader again and again, but found {type_with_article(x)}, an iterator, which "
                "ends: pass the loader itself, not iter(loader)."
            )
    has_loader = any(isinstance(x, DataLoader) for x in values)
    if has_loader and (len(args) != 1 or not isinstance(args[0], DataLoader)):
        raise ValueError(
            "CompiledSVI.run takes a DataLoader alone: pass it as the only positional argument, with batches that hold the "
            "other arguments of the model. What is the same for all batches may be a keyword argument."
        )
    return has_loader


def batches_of(args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Sequence[Any], dict[str, Any]]]:
    """Return the arguments of step after step."""
    if len(args) == 1 and isinstance(args[0], DataLoader):
        return _walk(args[0], kwargs)
    return repeat((args, kwargs))


def _walk(loader: DataLoader, kwargs: dict[str, Any]) -> Iterator[tuple[Sequence[Any], dict[str, Any]]]:
    """Yield the batches of a loader as arguments, again and again."""
    while True:
        batch = None
        for batch in loader:
            if isinstance(batch, Mapping):
                yield (), kwargs | dict(batch)
            else:
                yield (tuple(batch) if isinstance(batch, list | tuple) else (batch,)), kwargs
        if batch is None:
            raise ValueError("The DataLoader has no batches. Are there fewer rows than batch_size, with drop_last=True?")
