"""The measures behind docs/scaling.md count what they say, and what is proportional to nothing or to a size is so exactly."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `benchmarks` is
from benchmarks.scaling import Evaluations, kept_bytes, live_bytes, operations, slope
from pyro_genmodels import Autoregressive, DenseField, ODEFlow
from pyro_genmodels.families import RK4


def test_the_slope_of_a_power_is_its_exponent():
    assert slope([1, 4, 16], [5, 10, 20]) == (0.5, 0.0, 0.5)
    found, error, last = slope([1, 10, 100], [1, 2, 20])
    assert (found, last) == (0.651, 1.0)
    assert error > 0.1


@pytest.mark.slow
def test_operations_are_counted():
    linear, q = nn.Linear(3, 5), torch.randn(1, 2, 7, 4)
    assert operations(lambda: linear(torch.randn(11, 3))) == 2 * 3 * 5 * 11
    attention = nn.functional.scaled_dot_product_attention
    assert operations(lambda: attention(q, q, q)) == 2 * 2 * 2 * 7 * 7 * 4  # two products of two heads


def test_kept_bytes_are_those_that_the_gradient_needs_at_once():
    x = torch.randn(100, requires_grad=True)
    assert kept_bytes(lambda: x.exp()) == 400  # its result
    assert kept_bytes(lambda: x.exp().exp()) == 800
    assert kept_bytes(lambda: [x.exp() for _ in range(3)] and None) == 400 * 3
    assert kept_bytes(lambda: [x.exp().sum().backward() for _ in range(3)]) == 400  # each is let go before the next


@pytest.mark.slow
def test_live_bytes_are_those_of_all_tensors_once():
    before = live_bytes()
    x = torch.zeros(1000)
    views = [x[:10], x[5:]]
    assert live_bytes() - before == 4000
    del x, views
    assert live_bytes() == before


@pytest.mark.parametrize("adjoint", [False, True])
def test_the_adjoint_equation_keeps_the_same_for_any_number_of_steps(adjoint):
    flow, x = ODEFlow((2,), network=DenseField(16, blocks=1)), torch.randn(4, 2)
    kept = []
    for steps in (2, 4, 8):
        flow.solver = RK4(steps, adjoint=adjoint)
        kept.append(kept_bytes(lambda: flow().log_prob(x).sum()))
    if adjoint:
        assert kept[0] == kept[1] == kept[2]
    else:
        assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0  # the same for each step


def test_a_fixed_solver_evaluates_in_proportion_to_its_steps():
    flow = ODEFlow((2,), network=DenseField(16, blocks=1)).eval()
    for steps in (1, 5):
        flow.solver = RK4(steps)
        with torch.no_grad(), Evaluations(flow.network) as evaluations:
            flow().sample((3,))
        assert evaluations.count == 4 * steps


@pytest.mark.slow
def test_a_draw_of_a_masked_network_takes_fewer_operations_than_a_density():
    made = Autoregressive((64,), hidden=(32, 32)).eval()
    with torch.no_grad():
        assert operations(lambda: made().sample((1,))) < operations(lambda: made().log_prob(torch.zeros(1, 64)))
