"""Checks of the values of data: cheap predicates that accept and refuse what entry-wise comparisons do."""

import pytest
import torch
from torch.distributions import constraints

from pyro_genmodels.families.validation import check_values

TINY = 1e-45  # the smallest positive float32


def check(x, support, dtype=torch.float32):
    check_values("F", x, support, dtype=dtype, mapped=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool])
def test_zeros_and_ones_are_boolean(dtype):
    check((torch.rand(4, 5) > 0.5).to(dtype), constraints.boolean)


@pytest.mark.parametrize("wrong", [TINY, -TINY, 1 + 1e-6, 0.5, 2.0, -1.0, 3e38])
def test_one_other_value_among_many_is_not_boolean(wrong):
    x = (torch.rand(100, 50) > 0.5).float()
    x[30, 4] = wrong
    with pytest.raises(ValueError, match=r"outside its support .* in 1 places"):
        check(x, constraints.boolean)


@pytest.mark.parametrize("support", [constraints.boolean, constraints.real, constraints.unit_interval, constraints.positive])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(support, wrong):
    x = torch.ones(6, 2)
    x[3, 1] = wrong
    with pytest.raises(ValueError, match="1 of 6 rows, the first of them row 3"):
        check(x, support)


def test_values_whose_sum_overflows_are_finite():
    check(torch.full((4, 2), 3e38), constraints.real)


def test_doubles_beyond_the_precision_are_refused():
    x = torch.full((4, 2), 1e39, dtype=torch.float64)
    check(x, constraints.real, dtype=None)
    check(x, constraints.real, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"numbers up to 3.4e\+38"):
        check(x, constraints.real)


def test_counts_beyond_the_precision_are_refused():
    x = torch.full((4, 2), 1e39, dtype=torch.float64)
    check(x, constraints.nonnegative_integer, dtype=torch.float64)
    check(x / 1e39, constraints.nonnegative_integer)
    with pytest.raises(ValueError, match=r"numbers up to 3.4e\+38"):
        check(x, constraints.nonnegative_integer)
