"""A limit on the memory and the number of operations that a block of torch code may take, checked before each operation.

Each operation is first tried on the meta device, whose tensors have a shape and no memory, so that its result's size is known
before it is allocated.
"""

from __future__ import annotations

__all__ = ["LimitError", "limited"]

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SMALL = 2**12
"""Number of elements up to which results are not counted in bytes, which spares the meta device (slow to start) most calls."""


class LimitError(RuntimeError):
    """The end of a block that would take more memory or more operations than it may."""


def limited(*, max_bytes: int, max_operations: int) -> AbstractContextManager[Any]:
    """Return a context in which torch operations on this thread may take so much memory, and may be so many.

    The results of all operations are counted, also those that are freed again, except for small ones.

    Args:
        max_bytes: largest number of bytes of all results.
        max_operations: largest number of operations.

    Raises:
        LimitError: in the block, before the operation that would exceed a limit.

    Example:
        >>> with limited(max_bytes=1000, max_operations=10):
        ...     _ = torch.ones(10**12)
        Traceback (most recent call last):
        pyro_genmodels.utils.allocation.LimitError: it takes more than 1,000 bytes
    """
    return _Limits(max_bytes, max_operations)


class _Limits(TorchFunctionMode):
    """A mode that counts the calls of torch's functions and the bytes of their results."""

    def __init__(self, max_bytes: int, max_operations: int) -> None:
        super().__init__()
        self.max_bytes, self.max_operations = max_bytes, max_operations
        self.bytes = self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function if its result is small enough."""
        kwargs = kwargs or {}
        self.operations += 1
        if self.operations > self.max_operations:
            raise LimitError(f"it takes more than {self.max_operations:,} operations")
        self.bytes += _result_bytes(func, args, kwargs)
        if self.bytes > self.max_bytes:
            raise LimitError(f"it takes more than {self.max_bytes:,} bytes")
        return func(*args, **kwargs)


def _result_bytes(func: Any, args: Any, kwargs: Any) -> int:
    """Return the number of bytes of a function's results, as far as they follow from the shapes of the arguments.

    For others, such as the unique elements of a tensor, it is a bound: one number of 8 bytes for each element of the arguments.
    """
    if _product((args, kwargs)) <= SMALL:
        return 0
    try:
        with torch.device("meta"):
            return _bytes(func(*_on_meta(args), **_on_meta({**kwargs, **({"device": "meta"} if "device" in kwargs else {})})))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return 8 * _elements((args, kwargs))


def _elements(value: Any) -> int:
    """Return the number of elements of all tensors in the arguments of a function."""
    if isinstance(value, Tensor):
        return value.numel()
    value = tuple(value.values()) if isinstance(value, dict) else value
    return sum(map(_elements, value)) if isinstance(value, list | tuple) else 0


def _product(value: Any) -> int:
    """Return the product of all sizes in the arguments of a function, which is a bound on the elements of its results."""
    if isinstance(value, Tensor):
        return max(value.numel(), 1)
    if isinstance(value, int):
        return max(abs(value), 1)
    if isinstance(value, dict):
        value = tuple(value.values())
    return prod(map(_product, value)) if isinstance(value, list | tuple) else 1


def _on_meta(value: Any) -> Any:
    """Return arguments with tensors on the meta device."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {name: _on_meta(v) for name, v in value.items()}
    return type(value)(map(_on_meta, value)) if type(value) in (list, tuple) else value


def _bytes(value: Any) -> int:
    """Return the number of bytes of the tensors in a result."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
