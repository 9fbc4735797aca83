"""Captured functions read tensors live, take inputs of one shape in any order in memory, and say so if they cannot go on."""

import numpy as np
import pytest
import torch

from pyro_genmodels.infer.compiled import Captured, Compiled, Eager, StaleGraphError, capture
from pyro_genmodels.infer.compiled.graph import trace

PYTHON = Captured(script=False)
MODES = [PYTHON, Captured(), pytest.param(Compiled(), marks=pytest.mark.slow)]


@pytest.mark.parametrize("mode", MODES, ids=["python", "script", "compiled"])
def test_tensors_are_read_live_and_inputs_in_any_order_in_memory(mode):
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    function = capture(lambda x: (x * weight, (x + weight).sum()), torch.zeros(2, 3), mode=mode)
    x = torch.arange(6.0).reshape(3, 2)
    for given in (x.reshape(2, 3), x.T, torch.zeros(1, 3).expand(2, 3)):
        product, total = function(given)
        assert torch.equal(product, given * weight)
        assert total == (given + weight).sum()
    weight += 1
    assert torch.equal(function(x.T)[0], x.T * weight)


@pytest.mark.parametrize("mode", MODES, ids=["python", "script", "compiled"])
@pytest.mark.parametrize("size", [1, 3])
def test_arrays_of_numpy_are_read_live(mode, size):
    array = np.ones(size, dtype=np.float32)
    makers = (torch.from_numpy, torch.as_tensor, torch.tensor, lambda a: torch.tensor(a, dtype=torch.float64))
    function = capture(lambda x: [x * make(array) for make in makers], torch.ones(size), mode=mode)
    array[:] = 7
    assert [x.tolist() for x in function(torch.ones(size))] == 4 * [size * [7.0]]


def test_an_array_of_which_python_code_has_read_a_value_may_not_change():
    array = np.array([2, 3])
    function = capture(lambda x: (x[: int(torch.as_tensor(array)[0])].sum(),), torch.ones(5), mode=PYTHON)
    assert function(torch.ones(5)) == (2,)
    array[0] = 4
    with pytest.raises(StaleGraphError, match="that Python code reads"):
        function(torch.ones(5))


def test_other_inputs_are_refused():
    function = capture(lambda x: (x + 1,), torch.zeros(3), mode=PYTHON)
    for bad in (torch.zeros(4), torch.zeros(3, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"wants an input \(3,\) of torch.float32 on cpu, but found"):
            function(bad)


def test_a_tensor_that_was_given_another_layout_is_refused():
    weight = torch.ones(2, 3)
    function = capture(lambda x: (x @ weight,), torch.zeros(4, 2), mode=PYTHON)
    weight.data = torch.ones(3, 2).T
    with pytest.raises(StaleGraphError, match="the layout of a tensor that it reads"):
        function(torch.zeros(4, 2))


def test_values_that_python_code_has_read_may_not_change():
    length = torch.tensor(2)
    function = capture(lambda x: (x[: int(length)].sum(),), torch.ones(5), mode=PYTHON)
    assert function(torch.ones(5)) == (2,)
    length += 1
    with pytest.raises(StaleGraphError, match="that Python code reads"):
        function(torch.ones(5))


def test_values_that_python_code_has_read_may_not_change_past_the_count_of_writes():
    lengths = torch.tensor([float("nan"), 1.0, 2.0])
    function = capture(lambda x: (x[: int(lengths[1])].sum() + x[: int(lengths[2])].sum(),), torch.ones(5), mode=PYTHON)
    lengths.mul_(1)  # the same values
    assert function(torch.ones(5)) == (3,)
    lengths.data[2] = 4  # the version of the tensor stays
    with pytest.raises(StaleGraphError, match="that Python code reads"):
        function(torch.ones(5))


def test_gradients_inside_and_none_are_kept():
    def value_and_gradient(x):
        x = x.detach().requires_grad_()
        y = x.square().sum()
        return y, None, *torch.autograd.grad(y, x)

    value, nothing, gradient = capture(value_and_gradient, torch.zeros(2), mode=PYTHON)(torch.tensor([1.0, 2.0]))
    assert (value.item(), nothing) == (5, None)
    assert torch.equal(gradient, torch.tensor([2.0, 4.0]))


def test_the_eager_mode_runs_a_function_as_it_is():
    weight = 2.0

    def function(x):
        return (weight * x if x.sum() > 0 else -x), None

    eager = capture(function, torch.ones(2), mode=Eager())
    assert eager(torch.ones(2))[0].tolist() == [2, 2]
    weight = 5.0
    assert eager(torch.ones(2))[0].tolist() == [5, 5]
    assert eager(-torch.ones(2, requires_grad=True))[0].tolist() == [1, 1]
    assert not eager(-torch.ones(2, requires_grad=True))[0].requires_grad


@pytest.mark.parametrize(("rows", "operation"), [(4096, "mm"), (16, "mv")])
def test_a_large_matrix_times_a_vector_is_a_product_of_matrices(rows, operation):
    x = torch.randn(rows, 2, requires_grad=True)

    def function(v):
        v = v.requires_grad_()
        return x @ v, torch.autograd.grad((x @ v).sum(), v)[0]

    graph = trace(function, torch.ones(2))
    names = [str(node.target) for node in graph.module.graph.nodes]
    assert {"mm": "aten.mm.default", "mv": "aten.mv.default"}[operation] in names
    assert {"mm": "aten.mv.default", "mv": "aten.mm.default"}[operation] not in names
    v = torch.tensor([0.5, -2.0])
    product, gradient = graph(v)
    torch.testing.assert_close(product, x.detach() @ v)
    torch.testing.assert_close(gradient, x.detach().sum(0), rtol=1e-4, atol=1e-3)
