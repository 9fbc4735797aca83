"""Every program of the table, captured: loss, gradients, random numbers, buffers and fits are those of stock Pyro."""

import pyro
import pytest
import torch
from eager_steps import Step, assert_same_step, assert_same_tensors, buffers, eager, losses_of, parameters
from programs import CAPTURED, PROGRAMS, SHOWN, Program, fresh
from pyro.infer import SVI
from pyro.optim import Adam, ClippedAdam
from scipy import stats
from teachers import assert_means

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, Compiled, CompiledSVI

SEEDS = (1, 2, 1)
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Tolerances of a graph that runs the same operations in another order."""


def rows(table: dict[str, Program], shown: dict[str, Program]) -> pytest.MarkDecorator:
    """Parametrise a test by `row`; rows that are not shown are slow."""
    marks = {name: () if name in shown else pytest.mark.slow for name in table}
    return pytest.mark.parametrize("row", [pytest.param(row, id=name, marks=marks[name]) for name, row in table.items()])


def captured_step(loss: CapturedLoss, run) -> Step:
    value, gradients = loss(*run.args, **run.kwargs)
    return Step(float(value), gradients)


def check_against_eager(row: Program, mode, **tolerance) -> None:
    """Check loss, gradients, random numbers and buffers of captured calls against eager ones, call by call."""
    run, wanted = fresh(row.build), []
    eager(run)  # makes what is made at the first run
    for seed in SEEDS:
        pyro.set_rng_seed(seed)
        wanted.append((eager(run), torch.get_rng_state()))
    wanted_buffers = buffers(run)

    run = fresh(row.build)
    eager(run)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=mode)
    found = []
    for seed in SEEDS:
        pyro.set_rng_seed(seed)
        found.append((captured_step(loss, run), torch.get_rng_state()))
    for (step, state), (wanted_step, wanted_state) in zip(found, wanted, strict=True):
        assert_same_step(step, wanted_step, **tolerance)
        assert torch.equal(state, wanted_state), "the graph leaves the random number generator in another state"
    for b, wanted_b in zip(buffers(run), wanted_buffers, strict=True):
        torch.testing.assert_close(b, wanted_b, **tolerance)
    if not row.deterministic:
        assert found[0][0].loss != found[1][0].loss, "two seeds give the same loss"
    if not wanted_buffers:
        assert found[0][0].loss == found[2][0].loss, "the same seed gives another loss"


@rows(CAPTURED, CAPTURED)
def test_captured_program_equals_eager(row):
    check_against_eager(row, Captured(), **ROUNDING)


@pytest.mark.slow
@rows(CAPTURED, CAPTURED)
def test_compiled_program_equals_eager(row):
    check_against_eager(row, Compiled(), rtol=1e-3, atol=1e-4)
