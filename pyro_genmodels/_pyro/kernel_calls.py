"""The calls of kernels and of torch's operations that code compiled by Inductor makes, noted while it runs once.

Inductor writes a Python function that allocates memory and then calls kernels in C++ and operations of torch, always in the
same order, as its shapes are fixed. So the list of these calls, with the tensors of one run, is all that the function does. It
can be made again without the Python around it, which takes 20 times as long as the kernels of a small graph.
"""

from __future__ import annotations

__all__ = [
    "KernelCall",
    "OperationCall",
    "Recorded",
    "address_of",
    "load_code",
    "record_calls",
    "record_runs",
    "tensor_handles",
]

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATE = "empty_strided_cpu"
"""Name of the function by which the code allocates memory on the CPU."""


@dataclass(frozen=True)
class KernelCall:
    """A call of a kernel.

    Attributes:
        kernel: Python function around the kernel, which stands alone in a library.
        arguments: its arguments, tensors most often, of which it takes the addresses of the memory.
    """

    kernel: Any
    arguments: tuple[Any, ...]

    @property
    def address(self) -> int:
        """Address of the kernel's code."""
        return address_of(ctypes.CDLL(self.kernel.__self__.__file__).kernel)

    def again(self) -> Callable[[], Any]:
        """Return a function that makes the call again, with the same memory."""
        return partial(self.kernel, *self.arguments)


@dataclass(frozen=True)
class OperationCall:
    """A call of an operation of torch.

    Attributes:
        operation: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        results: its results.
    """

    operation: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[Tensor, ...]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments in the order of the schema: tensors, numbers, text or None."""
        schema = self.operation._schema.arguments
        given = dict(zip((argument.name for argument in schema), self.args, strict=False)) | dict(self.kwargs)
        return tuple(given.get(argument.name, argument.default_value) for argument in schema)

    def again(self) -> Callable[[], Any]:
        """Return a function that makes the call again, with the same memory."""
        function = partial(self.operation, *self.args, **self.kwargs)
        return function if self.operation._schema.is_mutable else partial(_copy_results, function, self.results)


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
    """A mode that notes every operation of torch that computes.

    Args:
        calls: list to which the calls are added.
        random: True if they may draw random numbers.
    """

    def __init__(self, calls: list[KernelCall | OperationCall], *, random: bool) -> None:
        super().__init__()
        self.calls, self.random = calls, random

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.is_view or str(func).startswith("aten.empty"):
            return results
        if torch.Tag.nondeterministic_seeded in func.tags and not self.random:
            raise _CannotRecordError
        listed = tuple(results) if isinstance(results, tuple | list) else () if results is None else (results,)
        if not all(isinstance(x, Tensor) for x in listed):  # a value that the code reads into Python
            raise _CannotRecordError
        self.calls.append(OperationCall(func, tuple(args), kwargs or {}, listed))
        return results


def record_calls(
    run: Callable[[list[Tensor]], Sequence[Any]],
    tensors: Sequence[Tensor],
    *,
    allocate: Callable[..., Tensor] | None = None,
    random: bool = False,
) -> Recorded | None:
    """Run compiled code once and return the calls that it made, or None if they cannot be repeated without Python.

    Args:
        run: function that Inductor wrote, as `direct_call` finds it.
        tensors: arguments, on the CPU. Their memory and all that the code allocates belong to the calls from now on.
        allocate: function that gives the code its memory, of size, stride and dtype; None for its own.
        random: True if the calls may draw random numbers.
    """
    function = getattr(run, "__func__", run)
    if not isinstance(function, FunctionType) or any(x.device.type != "cpu" for x in tensors):
        return None
    calls: list[KernelCall | OperationCall] = []
    names: dict[str, Any] = {name: _noted(x, calls) for name, x in function.__globals__.items() if _is_kernel(x)}
    if allocate is not None:
        names[ALLOCATE] = allocate
    copy = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    owner = () if function is run else (run.__self__,)  # type: ignore[attr-defined]
    try:
        with torch.no_grad(), _Operations(calls, random=random):
            results = tuple(copy(*owner, [x.detach() for x in tensors]))
    except _CannotRecordError:
        return None
    return Recorded(calls, results) if all(isinstance(x, Tensor) for x in results) else None


def record_runs(
    run: Callable[[list[Tensor]], Sequence[Any]], arguments: Sequence[Sequence[Tensor]], results: Sequence[Tensor]
) -> list[Callable[[], Any]] | None:
    """Return what compiled code does in some runs, one after another, as functions without arguments, or None.

    The code is run once for each. All runs use the same memory. The functions are valid as long as the arguments stay where
    they are in memory. Call them under `torch.no_grad`.

    It is None if the code cannot be recorded, or has no kernels. A kernel that is not found here would be left out: compare the
    results with those of the code itself.

    Args:
        run: function that Inductor wrote, on the CPU, with one result, as `direct_call` finds it.
        arguments: arguments of each run.
        results: memory for the result of each run.
    """
    own: Any = getattr(getattr(run, "__func__", run), "__globals__", {}).get(ALLOCATE)
    if own is None:
        return None
    functions: list[Callable[[], Any]] = []
    memory: list[Tensor] = []
    used = 0

    def allocate(*layout: Any) -> Tensor:
        nonlocal used
        if used == len(memory):
            memory.append(own(*layout))
        used += 1
        return memory[used - 1]

    place: int | None = None  # of the result among the memory
    for tensors, result in zip(arguments, results, strict=True):
        used = 0
        if place is not None:
            memory[place] = result.as_strided(memory[place].shape, memory[place].stride())
        recorded = record_calls(run, tensors, allocate=allocate, random=True)
        if recorded is None or not any(isinstance(call, KernelCall) for call in recorded.calls):
            return None
        functions += [call.again() for call in recorded.calls]
        (found,) = recorded.results
        if found.data_ptr() != result.data_ptr():
            functions.append(partial(result.copy_, found))
            layout = (found.data_ptr(), result.numel(), result.dtype)
            whole = [(x.data_ptr(), x.numel(), x.dtype) == layout for x in memory]
            place = whole.index(True) if True in whole else None
    return functions


def _copy_results(function: Callable[[], Any], memory: Sequence[Tensor]) -> None:
    """Write the results of a function where those of an earlier call are."""
    results = function()
    for old, new in zip(memory, results if isinstance(results, tuple | list) else (results,), strict=True):
        old.copy_(new)


def _is_kernel(x: Any) -> bool:
    """Return True for the Python function around a kernel, which stands alone in a library."""
    return isinstance(x, BuiltinFunctionType) and x.__name__ == "kernel" and hasattr(x.__self__, "__file__")


def _noted(kernel: Any, calls: list[KernelCall | OperationCall]) -> Callable[..., None]:
    """Return a function that calls a kernel and notes the call."""

    def call(*arguments: Any) -> None:
        kernel(*arguments)
        calls.append(KernelCall(kernel, arguments))

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
