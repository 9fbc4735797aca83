"""What `record_runs` relies on: names in the code that Inductor writes, and that it returns memory that it allocated."""

import warnings

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_genmodels._pyro.inductor import compile_graph, direct_call
from pyro_genmodels._pyro.kernel_calls import record_runs


def compiled(function, *tensors):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        return direct_call(compile_graph(make_fx(function)(*tensors), tensors))


@pytest.mark.slow
def test_kernels_operations_and_random_numbers_are_made_again():
    x, weight = torch.randn(3, 3), torch.randn(3, 3)
    direct = compiled(lambda x, w: ((torch.mm(x.sin(), w) + torch.bernoulli(x.sigmoid())).cos(),), x, weight)
    results = [torch.empty(3, 3) for _ in range(2)]
    with torch.no_grad():
        calls = record_runs(direct.run, [[x, weight], [x + 1, weight]], results)
        x.mul_(2)
        weight.add_(1)
        torch.manual_seed(0)
        for call in calls:
            call()
        torch.manual_seed(0)
        expected = direct(x, weight)[0]
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)
    assert not torch.equal(results[0], results[1])


def test_other_functions_are_not_recorded():
    class Code:
        def call(self, tensors):
            return tensors

    assert record_runs(Code().call, [[torch.ones(1)]], [torch.ones(1)]) is None
    assert record_runs(lambda tensors: tensors, [[torch.ones(1)]], [torch.ones(1)]) is None
