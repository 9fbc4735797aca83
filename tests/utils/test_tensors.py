"""Tensors from numpy arrays, data frames, lists and numbers, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_genmodels.utils.tensors import as_tensor


def test_a_tensor_is_returned_as_it_is():
    x = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    assert as_tensor(x, "f") is x


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.arange(4.0)[::-1], torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)),
        (np.arange(3, dtype=">i4"), torch.tensor([0, 1, 2], dtype=torch.int32)),
        (np.array([True, False]), torch.tensor([True, False])),
        (np.ones(2, dtype=np.longdouble), torch.ones(2, dtype=torch.float64)),
        ([[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]])),
        ([torch.ones(2), torch.zeros(2)], torch.tensor([[1.0, 1.0], [0.0, 0.0]])),
        (3, torch.tensor(3)),
        (pd.Series([1, 2], index=[4, 5]), torch.tensor([1, 2])),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1]}, index=[4, 5]), torch.tensor([[1, 0.5], [2, 1]], dtype=torch.float64)),
        (pd.DataFrame({"a": pd.array([1, 2], dtype="Int64"), "b": [True, False]}), torch.tensor([[1.0, 1], [2, 0]]).double()),
    ],
    ids=["reversed", "big-endian", "booleans", "long double", "list", "tensors", "number", "series", "frame", "nullable"],
)
def test_what_holds_numbers_becomes_a_tensor(values, wanted):
    found = as_tensor(values, "f")
    assert found.dtype == wanted.dtype
    assert found.equal(wanted)


@pytest.mark.parametrize("values", [0.1, [0.1, 2], [[0.1], [2]], ((0.1,),)])
def test_the_dtype_of_pythons_floats_is_chosen_by_the_caller(values):
    assert as_tensor(values, "f").dtype == torch.float64
    assert as_tensor(values, "f", floats=torch.float32).equal(torch.tensor(values))
    assert as_tensor(values, "f", floats=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "values", [np.float64(0.1), np.array([0.1]), [np.array([0.1])], pd.Series([0.1]), [torch.ones(1).double()]]
)
def test_numbers_with_a_dtype_keep_it(values):
    assert as_tensor(values, "f", floats=torch.float32).dtype == torch.float64
    assert as_tensor([1, 2], "f", floats=torch.float32).dtype == torch.int64


def test_an_array_that_changes_later_does_not_change_the_tensor():
    array = np.zeros(2)
    tensor = as_tensor(array, "f")
    array[0] = 1.0
    assert tensor.equal(torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("ab", "found str"),
        (None, "found NoneType"),
        ({"a": 1}, "found dict"),
        (int, "found type"),
        ([[1], [2, 3]], "rows differ in shape"),
        (np.array(["a"]), "ndarray of <U1"),
        (np.array([1j]), "complex128"),
        (pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}), "the column 'b' holds str"),
        (pd.to_datetime(pd.Series(["2020-01-01"])), "datetime64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_holds_no_numbers_is_refused(values, words):
    with pytest.raises(TypeError, match=f"f wants numbers.*{words}"):
        as_tensor(values, "f")
