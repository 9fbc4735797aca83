"""Private names of torch with which the calls of compiled code are noted."""

import ctypes
import warnings

import pytest
import torch

from pyro_genmodels._pyro.inductor import compile_graph, direct_call
from pyro_genmodels._pyro.kernel_calls import KernelCall, address_of, load_code, record_calls, tensor_handles
from pyro_genmodels._pyro.tracing import make_fx


def test_code_is_loaded():
    assert load_code('extern "C" int seven() { return 7; }').seven() == 7


def test_a_handle_is_what_torchs_c_functions_take():
    source = """
    #include <cstdint>
    extern "C" int32_t aoti_torch_get_data_ptr(void *, void **);
    extern "C" void *data(void *handle) { void *p = nullptr; return aoti_torch_get_data_ptr(handle, &p) ? nullptr : p; }
    """
    data = load_code(source).data
    data.restype, data.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    x = torch.ones(3)
    with tensor_handles([x, x[1:]]) as (first, second):
        assert data(first) == x.data_ptr()
        assert data(second) == x.data_ptr() + 4


@pytest.mark.slow
def test_the_kernels_of_compiled_code_are_noted():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        compiled = compile_graph(make_fx(lambda x, y: ((x * y).sum(),))(x, y), [x, y])
        direct = direct_call(compiled)
        assert direct(x, y)[0] == 11
        recorded = record_calls(direct.run, [x, y])
    (call,) = recorded.calls
    assert isinstance(call, KernelCall)
    (result,) = recorded.results
    y.mul_(10)
    assert result == 11
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in call.arguments]
    ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers))(call.address)(*pointers)
    assert result == 110
    assert address_of(ctypes.CFUNCTYPE(None)(call.address)) == call.address
