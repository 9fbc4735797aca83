"""Programs that no graph can hold: refused by cause, site and line, without side effect, and run in the eager mode."""

import re
from pathlib import Path

import pyro
import pytest
import torch
from eager_steps import buffers, eager
from programs import REFUSED, Run, fresh, refused_model
from pyro.infer import SVI
from pyro.optim import SGD

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, CaptureError, CompiledSVI, Eager

ROWS = pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in REFUSED.items()])
BY_LOSS = ("TraceGraph_ELBO", "ReweightedWakeSleep")
"""Losses of Pyro that have no differentiable form, so that they are refused before anything is run."""


def call(run: Run, **options):
    return CapturedLoss(run.model, run.guide, run.loss, **options)(*run.args, **run.kwargs)


@ROWS
def test_program_is_refused_by_name(row):
    run = fresh(row.build)
    SVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss).step(*run.args, **run.kwargs)  # Pyro itself runs it
    state, before = torch.get_rng_state(), buffers(run)
    names = set(pyro.get_param_store())
    with pytest.raises((CaptureError, NotImplementedError), match=row.refused) as error:
        call(run, mode=Captured())
    assert "Trace Shapes" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), state), "the refusal has drawn random numbers"
    assert set(pyro.get_param_store()) == names
    for b, wanted in zip(buffers(run), before, strict=True):
        assert torch.equal(b, wanted)


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in REFUSED.items() if row.refused not in BY_LOSS])
def test_refused_program_runs_in_the_eager_mode(row):
    run = fresh(row.build)
    eager(run)
    pyro.set_rng_seed(1)
    wanted = eager(run)
    svi = CompiledSVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss, mode=Eager())
    pyro.set_rng_seed(1)
    assert svi.step(*run.args, **run.kwargs) == pytest.approx(wanted.loss, rel=1e-6)


def test_the_line_that_is_named_is_the_one_at_fault():
    def body(z, x):
        y = z + 1
        if y.sum() > 0:  # the line at fault
            y = -y
        return y

    run = fresh(refused_model(body))
    with pytest.raises(CaptureError) as error:
        call(run, mode=Captured())
    number = int(re.search(r"line (\d+) of \S*test_refused\.py", str(error.value)).group(1))
    assert Path(__file__).read_text().splitlines()[number - 1].strip().endswith("# the line at fault")
    assert "'rows'" in str(error.value)  # the site before


def test_an_error_of_the_program_itself_stays_what_it_is():
    def body(z, x):
        raise ZeroDivisionError("of the program")

    run = fresh(refused_model(body))
    with pytest.raises(ZeroDivisionError, match="of the program"):
        call(run, mode=Captured())


def test_an_invalid_value_is_found_by_pyros_validation_at_the_capture():
    run = fresh(refused_model(lambda z, x: z * torch.nan))
    with pytest.raises(ValueError, match="Expected parameter loc"):
        call(run, mode=Captured())


@pytest.mark.parametrize("name", ["refused: if on a latent", "refused: sequential subsampled plate"])
def test_a_refused_step_says_that_it_may_run_eagerly(name):
    run = fresh(REFUSED[name].build)
    svi = CompiledSVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss, mode=Captured())
    svi.step(*run.args, **run.kwargs)  # Pyro's own
    with pytest.raises(CaptureError, match=r"Eager\(\)"):
        svi.step(*run.args, **run.kwargs)
