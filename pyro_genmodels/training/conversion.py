"""Conversion of data to arguments of a model, as tensors on the device and in the precision of a fit."""

from __future__ import annotations

__all__ = ["Conversion"]

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_genmodels.training.arguments import Batch, as_arguments, by_place, joined, number_of_rows
from pyro_genmodels.utils.errors import listed, warn_caller
from pyro_genmodels.utils.nested import is_array, map_nested
from pyro_genmodels.utils.tensors import as_tensor

MAX_ROUNDING = 1e-3
"""Largest change of a column by rounding to the precision of a fit, relative to its range, that goes without a warning."""
EXACT_ROUNDING = 1e-6
"""The same, above which a family is given the unrounded data. It subtracts their mean before it rounds."""


class Conversion:
    """Function from data to arguments of a model.

    Args:
        like: tensor with the device and precision for the arguments.
        family: name of the family that is trained, which takes x or (x, context); None for a model that takes any arguments.
        exact: number of leading arguments that may be of higher precision, if rounding would change them noticeably.
        arrange: function that returns x with the columns of a data frame in the order of the family, or None.
        model_kwargs: further keyword arguments of the model, the same in every batch.

    Attributes:
        device: device of the arguments.

    Example:
        >>> convert = Conversion(torch.empty(0), model_kwargs={"scale": 2.0})
        >>> convert([[1, 2], [3, 4]])
        Batch(args=(tensor([[1, 2],
                [3, 4]]),), kwargs={'scale': 2.0}, rows=2)
    """

    def __init__(
        self,
        like: Tensor,
        *,
        family: str | None = None,
        exact: int = 0,
        arrange: Callable[[Any], Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.device, self.dtype, self.family = like.device, like.dtype, family
        self.model_kwargs, self.exact, self.arrange = dict(model_kwargs or {}), exact, arrange
        self._keeps: dict[int, bool] = {}  # by the place of an argument: True if its precision is kept

    def __call__(self, data: Any, *, warns: bool = False) -> Batch:
        """Return data as arguments of the model.

        Args:
            data: arguments of the model for some rows: tensors, arrays, lists of numbers or frames, alone, in a tuple of
                positional arguments or in a dictionary of keyword arguments, which may hold lists and dictionaries of them.
            warns: True to warn if rounding changes a column noticeably.

        Raises:
            TypeError: if the data cannot be converted to tensors.
            ValueError: if a tensor has another number of rows, or values are too large for the precision.
        """
        args, kwargs = as_arguments(data)
        if self.family is not None:
            args, kwargs = self._arguments_of_family(args, kwargs), {}
            args = args if self.arrange is None else (self.arrange(args[0]), *args[1:])
        for name in kwargs:
            if name in self.model_kwargs:
                raise ValueError(f"The data and model_kwargs both have {name!r}: give it once.")
            if name == "size":
                raise ValueError(
                    "The data have the key 'size', which is the number of all rows that train gives the model. Rename it."
                )
        args = tuple(
            map_nested(partial(self._converted, place, warns=warns), value, is_array) for place, value in enumerate(args)
        )
        kwargs = map_nested(partial(self._converted, None, warns=warns), kwargs, is_array)
        return Batch(args, kwargs | self.model_kwargs, number_of_rows(by_place(args, kwargs)))

    def to(self, t: Tensor) -> Tensor:
        """Return a tensor on the device, and in the precision if it holds floats.

        Raises:
            ValueError: if values are too large for that precision.
        """
        if not t.is_floating_point() or t.dtype == self.dtype:
            return t.to(self.device, non_blocking=True)
        new = t.to(self.device, self.dtype, non_blocking=True)
        if torch.finfo(t.dtype).max > torch.finfo(self.dtype).max and not _same_finite(new, t):
            raise ValueError(
                f"Training in {self.dtype} cannot hold data of {t[t.isfinite()].abs().max():.3g}. Divide them by their "
                "size, or train in float64: family.double()."
            )
        return new

    def moved(self, batch: Batch) -> Batch:
        """Return a batch on the device."""
        args, kwargs = (map_nested(self.to, part, is_array) for part in batch[:2])
        return Batch(args, kwargs, batch.rows)

    def cut(self, batch: Batch, rows: Tensor) -> Batch:
        """Return the rows of these numbers of a batch."""

        def cut(t: Any) -> Any:
            return t[rows.to(t.device)] if isinstance(t, Tensor) and t.dim() else t

        kwargs = {n: v if n in self.model_kwargs else map_nested(cut, v, is_array) for n, v in batch.kwargs.items()}
        return Batch(map_nested(cut, batch.args, is_array), kwargs, len(rows))

    def joined(self, parts: Sequence[Batch]) -> Batch:
        """Return the rows of several batches, one after the other."""
        args = joined([part.args for part in parts])
        kwargs = joined([{n: v for n, v in part.kwargs.items() if n not in self.model_kwargs} for part in parts])
        return Batch(args, kwargs | self.model_kwargs, sum(part.rows for part in parts))

    def _arguments_of_family(self, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Return x or (x, context)."""
        if kwargs:
            if "x" not in kwargs or not kwargs.keys() <= {"x", "context"}:
                raise ValueError(f"{self.family} wants data with the keys 'x' and 'context', but found {listed(kwargs)}.")
            args = tuple(kwargs[name] for name in ("x", "context") if name in kwargs)
        args = args[:1] if len(args) == 2 and args[1] is None else args
        if not 1 <= len(args) <= 2:
            raise ValueError(
                f"A batch of {self.family} wants x or (x, context), but found {len(args)} parts. Combine them in the dataset; "
                "rows in a list are joined by torch.stack(rows)."
            )
        return args

    def _converted(self, place: int | None, value: Any, *, warns: bool) -> Any:
        """Return a value in the argument at this place: an array as a tensor, and anything else unchanged."""
        if not is_array(value):
            return value
        t = as_tensor(value, "train")
        if place is not None and place < self.exact:
            if place not in self._keeps:
                self._keeps[place] = bool((_rounding(t, self.dtype) > EXACT_ROUNDING).any())
            if self._keeps[place]:
                return t.to(self.device, non_blocking=True)
        elif warns and (lost := _rounding(t, self.dtype)).max() > MAX_ROUNDING and lost.isfinite().all():
            warn_caller(
                f"In {self.dtype} the data change by {lost.max():.0%} of their range in column {int(lost.argmax())}. Subtract "
                "an offset from them, or train in float64: model.double(), or torch.set_default_dtype(torch.float64).",
            )
        return self.to(t)


def _rounding(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the largest change of each column by rounding to a precision, relative to the column's range.

    It is 0 for a column that is constant apart from rounding, and infinite if values become infinite.
    """
    if not (t.numel() and t.dim() and t.is_floating_point()) or torch.finfo(t.dtype).eps >= torch.finfo(dtype).eps:
        return torch.zeros(1)
    rows = t.detach().reshape(len(t), -1)
    seen = rows.isfinite()
    known = torch.where(seen, rows, 0.0).sum(0) / seen.sum(0).clamp(min=1)  # missing values must not widen the range
    rows = torch.where(seen, rows, known.where(known.isfinite(), 0.0))
    change = (rows.to(dtype).to(t.dtype) - rows).abs().amax(0)
    spread = rows.amax(0) - rows.amin(0)
    is_constant = spread <= 1e3 * torch.finfo(t.dtype).eps * rows.abs().amax(0)
    return torch.where(is_constant & change.isfinite(), 0.0, change / spread)


def _same_finite(new: Tensor, old: Tensor) -> bool:
    """Return True if rounding made no number infinite."""
    return bool((new.isfinite() == old.isfinite().to(new.device)).all())
