"""A limit on the memory and the number of operations that a block of torch code may take, checked before each operation.

Each operation is first tried on the meta device, whose tensors have a shape and no memory, so that its result's size is known
before it is allocated.
"""

from __future__ import annotations

__all__ = ["LimitError", "limited"]

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_genmodels.utils.nested import leaves, map_nested

SMALL = 2**12
"""Number of elements up to which results are not counted in bytes, since the meta device is slow to start."""


class LimitError(RuntimeError):
    """The end of a block that would take more memory or more operations than it may."""


def limited(*, max_bytes: int, max_operations: int) -> AbstractContextManager[Any]:
    """Return a context that limits the memory and the number of torch operations on this thread.

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
        pyro_genmodels.training.allocation.LimitError: it takes more than 1,000 bytes
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
    if not _is_large((args, kwargs)):
        return 0
    try:
        with torch.device("meta"):
            kwargs = {**kwargs, **({"device": "meta"} if "device" in kwargs else {})}
            results = func(*map_nested(_on_meta, args), **map_nested(_on_meta, kwargs))
            return sum(tensor.nbytes for tensor in _tensors(results))
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return 8 * sum(tensor.numel() for tensor in _tensors((args, kwargs)))


def _is_large(values: Any) -> bool:
    """Return True if the product of all sizes in the arguments of a function is above `SMALL`.

    The product is a bound on the elements of the results. It stops there, since that of a long list has as many digits.
    """
    product = 1
    for _, v in leaves(values):
        product *= max(v.numel() if isinstance(v, Tensor) else abs(v) if isinstance(v, int) else 1, 1)
        if product > SMALL:
            return True
    return False


def _on_meta(value: Any) -> Any:
    """Return a tensor on the meta device, and any other value unchanged."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results."""
    return (value for _, value in leaves(values) if isinstance(value, Tensor))
