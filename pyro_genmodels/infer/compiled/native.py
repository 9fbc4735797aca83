"""A compiled log density as one function of C, for a sampler that is not written in Python.

Code compiled by Inductor is a list of calls of kernels and of torch's operations, from Python. Here this list is noted in one
run, and written as a function of C++ that makes the same calls on the same memory, without Python between them.
"""

from __future__ import annotations

__all__ = ["NativeDensity", "native_density"]

import ctypes
import struct
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels._pyro.inductor import DirectCall
from pyro_genmodels._pyro.kernel_calls import (
    KernelCall,
    OperationCall,
    Recorded,
    address_of,
    load_code,
    record_calls,
    tensor_handles,
)
from pyro_genmodels.utils.errors import one_line, warn_caller

REJECTED = 1
"""Return value of the function where there is no density. The sampler goes on. A negative one ends it."""

SOURCE = """
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>

extern "C" {{
int32_t aoti_torch_call_dispatcher(const char *, const char *, uint64_t *);
int32_t aoti_torch_new_tensor_handle(void *, void **);
int32_t aoti_torch_delete_tensor_object(void *);
int32_t aoti_torch_get_data_ptr(void *, void **);
}}

static uint64_t tensor(void *handle) {{
    void *copy = nullptr;
    if (aoti_torch_new_tensor_handle(handle, &copy)) throw std::exception();
    return reinterpret_cast<uint64_t>(copy);
}}

static void call(const char *name, const char *overload, uint64_t *stack) {{
    if (aoti_torch_call_dispatcher(name, overload, stack)) throw std::exception();
}}

static void keep(uint64_t result, void *memory, uint64_t bytes) {{
    void *handle = reinterpret_cast<void *>(result), *data = nullptr;
    if (aoti_torch_get_data_ptr(handle, &data)) throw std::exception();
    if (data != memory) std::memcpy(memory, data, bytes);
    aoti_torch_delete_tensor_object(handle);
}}

extern "C" int64_t log_density(uint64_t dim, const double *z, double *gradient, double *value, void *memory) {{
    void **p = static_cast<void **>(memory);
    std::memcpy(p[1], z, dim * sizeof(double));
    try {{
{calls}
    }} catch (...) {{
        return -1;
    }}
    *value = *static_cast<double *>(p[2]);
    std::memcpy(gradient, p[3], dim * sizeof(double));
    bool finite = std::isfinite(*value);
    for (uint64_t i = 0; i < dim; i++) finite = finite && std::isfinite(gradient[i]);
    return finite ? 0 : {rejected};
}}

extern "C" int64_t draw(uint64_t dim, uint64_t, const double *z, double *out, void *memory) {{
    std::memcpy(out, z, dim * sizeof(double));
    ++*static_cast<int64_t *>(static_cast<void **>(memory)[0]);
    return 0;
}}
"""
"""The code, without the calls. `memory` is a table of addresses: of the number of draws, of z, of value and gradient, and of
what the calls need."""


PLAIN: dict[str, Any] = {"Tensor": Tensor, "int": int, "bool": bool, "float": float}
"""Types of arguments that torch's C functions take, by their names in a schema."""

CHECK = torch.ops.aten._linalg_check_errors.default
"""Operation that raises an error if a decomposition of a matrix has failed."""


def native_density(compiled: DirectCall, z: Tensor, read: Sequence[Tensor]) -> NativeDensity | None:
    """Return compiled code of a log density as a function of C, or None if it does more than such a function can.

    It may call the kernels that the compiler wrote, and operations of torch whose arguments are tensors and plain numbers, such
    as matrix products and decompositions. It may not draw random numbers. Coordinates are doubles on the CPU.

    Args:
        compiled: compiled code; its first results are the log density, (), and its gradient, (dim,).
        z: coordinates at which it can run, (dim,).
        read: tensors that it reads. They are read where they are now.
    """
    if z.dtype != torch.float64:
        return None
    z = z.clone()
    recorded = record_calls(compiled.run, [z, *read])
    if recorded is None or not all(map(_can_be_called, recorded.calls)):
        return None
    value, gradient = recorded.results[:2]
    if {value.dtype, gradient.dtype} != {torch.float64} or gradient.shape != z.shape or not gradient.is_contiguous():
        return None
    try:
        native = NativeDensity(z, recorded)
    except Exception as error:  # of any kind: the compiled code itself is right
        warn_caller(
            "The compiler failed, so that the sampler calls the log density through Python: "
            f"{type(error).__name__}: {one_line(error)}"
        )
        return None
    point = z.clone()
    return native if all(map(torch.equal, native(point), compiled(point, *read))) else None


class NativeDensity:
    """A log density as code that needs no Python.

    Its memory is its own, so only one thread may call it at a time. A forked process has a copy.

    Attributes:
        address: address of the function that computes value and gradient.
        draw_address: address of the function that is called for each draw, copies it and counts it.
        memory: table of addresses that both functions want as their last argument.
        draws: number of draws so far, (1,).
    """

    def __init__(self, z: Tensor, recorded: Recorded) -> None:
        self._z = z
        self._recorded = recorded
        self.draws = np.zeros(1, np.int64)
        value, gradient = recorded.results[:2]
        self._handles = ExitStack()
        weakref.finalize(self, self._handles.close)
        table = [self.draws.ctypes.data, z.data_ptr(), value.data_ptr(), gradient.data_ptr()]
        lines = [line for call in recorded.calls for line in self._lines(call, table)]
        code = load_code(SOURCE.format(calls="\n".join(f"        {line}" for line in lines), rejected=REJECTED))
        self.memory = np.array(table, np.uintp)
        self._function = code.log_density
        self._function.restype = ctypes.c_int64
        self.address, self.draw_address = (address_of(x) for x in (code.log_density, code.draw))

    def __call__(self, z: Tensor) -> Sequence[Tensor]:
        """Return the log density and its gradient, NaN where a matrix has no decomposition."""
        z, gradient, value = z.contiguous(), torch.empty_like(z), z.new_empty(())
        pointers = [ctypes.c_void_p(x) for x in (z.data_ptr(), gradient.data_ptr(), value.data_ptr(), self.memory.ctypes.data)]
        if self._function(ctypes.c_uint64(len(z)), *pointers) < 0:
            raise RuntimeError("The compiled log density failed outside of Python.")
        return value, gradient

    def _lines(self, call: KernelCall | OperationCall, table: list[int]) -> list[str]:
        """Return the lines of code of a call, and add the addresses that they need to the table."""

        def place(address: int) -> str:
            table.append(address)
            return f"p[{len(table) - 1}]"

        if isinstance(call, KernelCall):
            function, types = place(call.address), ", ".join(["void *"] * len(call.arguments))
            arguments = ", ".join(place(x.data_ptr()) for x in call.arguments)
            return [f"reinterpret_cast<void (*)({types})>({function})({arguments});"]
        if call.operation is CHECK:
            info = call.arguments[0]
            failed = f"static_cast<int32_t *>({place(info.data_ptr())})[i]"
            no_density = f"gradient[j] = *value = NAN; return {REJECTED};"
            failure = f"if ({failed}) {{ for (uint64_t j = 0; j < dim; j++) {no_density} }}"
            return [f"for (int64_t i = 0; i < {info.numel()}; i++) {failure}"]
        tensors = [x for x in call.arguments if isinstance(x, Tensor)]
        handles = iter(self._handles.enter_context(tensor_handles(tensors)))
        stack = [f"tensor({place(next(handles))})" if isinstance(x, Tensor) else _number(x) for x in call.arguments]
        stack += ["0"] * (len(call.results) - len(stack))
        name, overload = call.operation._schema.name, call.operation._schema.overload_name
        kept = [f"keep(stack[{i}], {place(x.data_ptr())}, {x.nbytes});" for i, x in enumerate(call.results)]
        return [f'{{ uint64_t stack[] = {{{", ".join(stack)}}}; call("{name}", "{overload}", stack); {" ".join(kept)} }}']


def _can_be_called(call: KernelCall | OperationCall) -> bool:
    """Return True for a call whose arguments and results code of C can pass on."""
    if isinstance(call, KernelCall):
        return all(isinstance(x, Tensor) for x in call.arguments)
    if call.operation is CHECK:
        return bool(call.arguments[0].dtype == torch.int32 and call.arguments[0].is_contiguous())
    memory = {x.data_ptr() for x in call.arguments if isinstance(x, Tensor)}
    return all(
        isinstance(x, PLAIN.get(str(argument.type), ()))
        for x, argument in zip(call.arguments, call.operation._schema.arguments, strict=True)
    ) and all(x.data_ptr() in memory or x.untyped_storage().nbytes() == x.nbytes for x in call.results)


def _number(x: float) -> str:
    """Return a number as the 64 bits in which torch's C functions take it."""
    return f"{struct.unpack('Q', struct.pack('d' if isinstance(x, float) else 'q', x))[0]}ull"
