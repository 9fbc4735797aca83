"""The calls of kernels and of torch's operations that code compiled by Inductor makes, noted while it runs once.

Inductor writes a Python function that allocates memory and then calls kernels in C++ and operations of torch, always in the
same order, as its shapes are fixed. So the list of these calls, with the tensors of one run, is all that the function does.
"""

from __future__ import annotations

__all__ = ["KernelCall", "OperationCall", "Recorded", "address_of", "load_code", "record_calls", "tensor_handles"]

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel.

    Attributes:
        address: address of the kernel's code.
        tensors: its arguments; it takes the address of each one's memory.
    """

    address: int
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class OperationCall:
    """A call of an operation of torch.

    Attributes:
        operation: the operation.
        arguments: its arguments in the order of its schema: tensors, numbers, text or None.
        results: its results.
    """

    operation: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    results: tuple[Tensor, ...]


class Recorded(NamedTuple):
    """A run of compiled code.

    Attributes:
        calls: calls that it made. They keep all memory that it used.
        results: what it returned.
    """

    calls: list[KernelCall | OperationCall]
    results: tuple[Tensor, ...]


class _CannotRecordError(Exception):
    """An error of code that does what no list of calls can repeat."""


class _Operations(TorchDispatchMode):
    """A mode that notes every operation of torch that computes."""

    def __init__(self, calls: list[KernelCall | OperationCall]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.is_view or func is aten.empty_strided.default:
            return results
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _CannotRecordError
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        arguments = tuple(given.get(argument.name, argument.default_value) for argument in func._schema.arguments)
        listed = tuple(results) if isinstance(results, tuple | list) else () if results is None else (results,)
        if not all(isinstance(x, Tensor) for x in listed):
            raise _CannotRecordError
        self.calls.append(OperationCall(func, arguments, listed))
        return results


def record_calls(run: Callable[[list[Tensor]], Sequence[Any]], tensors: Sequence[Tensor]) -> Recorded | None:
    """Run compiled code once and return the calls that it made, or None if they cannot be repeated without Python.

    Args:
        run: function that Inductor wrote, as `direct_call` finds it.
        tensors: arguments, on the CPU. Their memory and all that the code allocates belong to the calls from now on.
    """
    function = getattr(run, "__func__", run)
    if not isinstance(function, FunctionType) or any(x.device.type != "cpu" for x in tensors):
        return None
    calls: list[KernelCall | OperationCall] = []
    names = {name: _noted(x, calls) for name, x in function.__globals__.items() if _is_kernel(x)}
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    owner = () if function is run else (run.__self__,)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), _Operations(calls):
            results = tuple(copy(*owner, [x.detach() for x in tensors]))
    except _CannotRecordError:
        return None
    return Recorded(calls, results) if all(isinstance(x, Tensor) for x in results) else None


def _is_kernel(x: Any) -> bool:
    """Return True for the Python function around a kernel, which stands alone in a library."""
    return isinstance(x, BuiltinFunctionType) and x.__name__ == "kernel" and hasattr(x.__self__, "__file__")


def _noted(kernel: Any, calls: list[KernelCall | OperationCall]) -> Callable[..., None]:
    """Return a function that calls a kernel and notes the call."""
    address = address_of(ctypes.CDLL(kernel.__self__.__file__).kernel)

    def call(*tensors: Any) -> None:
        if not all(isinstance(x, Tensor) for x in tensors):
            raise _CannotRecordError
        kernel(*tensors)
        calls.append(KernelCall(address, tensors))

    return call


def address_of(function: Any) -> int:
    """Return the address of a function of a loaded library."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def load_code(source: str) -> ctypes.CDLL:
    """Compile C++ code by Inductor's compiler, or find it on disk, and return it loaded."""
    from torch._inductor.codecache import CppCodeCache

    library: ctypes.CDLL = CppCodeCache.load(source)
    return library


@contextmanager
def tensor_handles(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Give addresses of tensors as torch's C functions take them, valid inside of the block."""
    capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(list(tensors))
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        yield [address(capsule, None) for capsule in capsules]
    finally:
        torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules)
