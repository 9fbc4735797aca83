"""Tensors from numpy arrays, data frames, lists and numbers, and what is refused."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_genmodels.utils.tensors import all_finite, as_tensor


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
        (pd.DataFrame({"a": pd.array([1, 2], dtype="Int64"), "b": [True, False]}), torch.tensor([[1, 1], [2, 0]])),
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


@pytest.mark.parametrize(("dtype", "wanted"), [("uint16", torch.int32), ("uint32", torch.int64), ("uint64", torch.int64)])
def test_unsigned_integers_become_those_that_torch_computes_with(dtype, wanted):
    array = np.array([3, 60000], dtype=dtype)
    for values in (array, torch.from_numpy(array), pd.Series(array), list(array)):
        found = as_tensor(values, "f")
        assert found.tolist() == [3, 60000]
        assert found.max() == 60000  # torch has no maximum of the others
    assert as_tensor(array, "f").dtype == wanted
    if dtype == "uint64":
        with pytest.raises(ValueError, match="integers up to 9223372036854775807, but found larger ones"):
            as_tensor(np.array([2**63 + 1], dtype=dtype), "f")


@pytest.mark.parametrize("missing", [pd.NA, None])
def test_missing_values_of_any_column_are_nan(missing):
    """They were an error in columns of objects and of booleans, and NaN in others."""
    frame = pd.DataFrame(
        {
            "a": [1.0, 2.0],
            "b": pd.Series([3.0, missing], dtype=object),
            "c": pd.array([True, missing], dtype="boolean"),
            "d": pd.array([missing, 7], dtype="Int64"),
        }
    )
    wanted = torch.tensor([[1.0, 3.0, 1.0, torch.nan], [2.0, torch.nan, torch.nan, 7.0]], dtype=torch.float64)
    torch.testing.assert_close(as_tensor(frame, "train"), wanted, equal_nan=True)
    for i, name in enumerate(frame):
        torch.testing.assert_close(as_tensor(frame[name], "train"), wanted[:, i], equal_nan=True)


def test_a_date_that_is_missing_is_no_number():
    with pytest.raises(TypeError, match="the column 'b' holds NaTType"):
        as_tensor(pd.DataFrame({"a": [1.0, 2.0], "b": pd.Series([1.0, pd.NaT], dtype=object)}), "train")


def test_decimal_numbers_are_numbers():
    frame = pd.DataFrame({"a": [Decimal("1.5"), Decimal(2)], "b": [1, 2]})
    assert as_tensor(frame, "f").tolist() == [[1.5, 1.0], [2.0, 2.0]]


def test_columns_of_a_frame_have_one_rule_whatever_stands_beside_them():
    """Integers were integers, but beside a column of booleans they became floats."""
    frame = pd.DataFrame({"a": [1, 2], "b": [True, False], "c": [0.5, 1.5]})
    assert as_tensor(frame[["a", "b"]], "it").dtype == as_tensor(frame[["a"]], "it").dtype == torch.int64
    assert as_tensor(frame[["b"]], "it").dtype == torch.bool
    assert as_tensor(frame, "it").dtype == torch.float64
    assert as_tensor(frame, "it").tolist() == [[1, 1, 0.5], [2, 0, 1.5]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_are_finite_even_if_their_sum_is_not(dtype):
    assert all_finite(torch.full((1000,), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize("wrong", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_one_entry_that_is_not_finite_is_found(wrong):
    assert not all_finite(torch.cat((torch.ones(100), torch.tensor(wrong))).requires_grad_())
