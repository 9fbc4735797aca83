"""Programs that no graph can hold: refused by cause, site and line, without side effect, and run in the eager mode."""

import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from eager_steps import buffers, eager
from programs import REFUSED, Run, fresh, refused_model
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, CaptureError, CompiledSVI, Eager, StaleGraphError, capture

X = torch.tensor([0.3, -0.2, 1.1])

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


@ROWS
def test_refused_program_runs_in_the_eager_mode(row):
    run = fresh(row.build)
    svi = CompiledSVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss, mode=Eager())
    stock = SVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss)
    losses = []
    for one in (stock, stock, svi):  # the first makes parameters
        pyro.set_rng_seed(1)
        losses.append(one.step(*run.args, **run.kwargs))
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in REFUSED.items() if row.refused not in BY_LOSS])
def test_a_refused_loss_is_computed_in_the_eager_mode(row):
    run = fresh(row.build)
    eager(run)
    pyro.set_rng_seed(1)
    wanted = eager(run)
    pyro.set_rng_seed(1)
    loss, gradients = call(run, mode=Eager())
    assert loss.item() == pytest.approx(wanted.loss, rel=1e-6)
    assert gradients.keys() == wanted.gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, wanted.gradients[name], rtol=1e-5, atol=1e-6)


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


def test_the_way_out_of_loops_over_a_plate_and_of_asserts_is_named():
    run = fresh(REFUSED["refused: sequential subsampled plate"].build)
    with pytest.raises(CaptureError, match=r"write `with pyro\.plate\(\.\.\.\) as i`"):
        call(run, mode=Captured())

    def body(z, x):
        assert torch.isfinite(z).all()
        return z

    with pytest.raises(CaptureError, match=r"`assert x > 0`.*line .*assert torch\.isfinite") as error:
        call(fresh(refused_model(body)), mode=Captured())
    assert "pyro.plate" not in str(error.value)


@pytest.mark.parametrize("name", ["refused: if on a latent", "refused: sequential subsampled plate"])
def test_a_refused_step_says_that_it_may_run_eagerly(name):
    run = fresh(REFUSED[name].build)
    svi = CompiledSVI(run.model, run.guide, SGD({"lr": 0.0}), run.loss, mode=Captured())
    svi.step(*run.args, **run.kwargs)  # Pyro's own
    with pytest.raises(CaptureError, match=r"Eager\(\)"):
        svi.step(*run.args, **run.kwargs)


def simple(body, x):
    """Return a captured loss of a model whose data have the location that `body` computes of a parameter and an argument."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("x", dist.Normal(body(loc, x), 1.0).to_event(1), obs=torch.zeros(3))

    pyro.clear_param_store()
    return CapturedLoss(model, lambda x: None, Trace_ELBO(), mode=Captured(script=False))


def test_a_generator_of_its_own_is_refused():
    generator = torch.Generator()
    with pytest.raises(CaptureError, match="generator of the program's own"):
        simple(lambda loc, x: loc + torch.randn(3, generator=generator), X)(X)


def test_sparse_tensors_are_refused():
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(CaptureError, match=r"an argument of shape \(3, 3\) is sparse"):
        simple(lambda loc, x: loc + x @ X, sparse)(sparse)
    with pytest.raises(CaptureError, match=r"an argument of shape \(3, 3\) is sparse"):
        capture(lambda x: (x @ X,), sparse, mode=Captured())
    with pytest.raises(CaptureError, match="a sparse tensor is used"):
        simple(lambda loc, x: loc + sparse @ x, X)(X)


def test_an_argument_computed_from_a_parameter_is_refused():
    x = X * torch.ones((), requires_grad=True)
    with pytest.raises(CaptureError, match="An argument was computed from a parameter"):
        simple(lambda loc, x: loc + x, x)(x)


def test_a_function_to_be_captured_returns_a_tuple():
    with pytest.raises(TypeError, match="returns a tuple of tensors"):
        capture(lambda x: x + 1, X, mode=Captured())


def test_a_loss_of_one_number_has_any_shape():
    def loss(model, guide, x):
        return Trace_ELBO().differentiable_loss(model, guide, x).reshape(1)

    captured = simple(lambda loc, x: loc + x, X)
    shaped = CapturedLoss(captured.model, captured.guide, loss, mode=captured.mode)
    assert shaped(X)[0].shape == ()
    assert shaped(X)[0] == captured(X)[0]


def test_an_error_of_the_program_is_not_blamed_on_the_tracer(tmp_path):
    folder = tmp_path / "fx_proxy_tensor_subclasses"
    folder.mkdir()
    file = folder / "rates_of_fx.py"
    file.write_text("def body(loc, x):\n    raise ValueError('an error of the model')\n")
    names = {}
    exec(compile(file.read_text(), str(file), "exec"), names)
    with pytest.raises(ValueError, match="an error of the model") as error:
        capture(lambda x: names["body"](x, x), X, mode=Captured())
    assert not isinstance(error.value, CaptureError)


def test_places_of_a_split_that_vary_are_refused():
    places = torch.tensor([1])
    for split in (torch.tensor_split, torch.Tensor.tensor_split):
        with pytest.raises(CaptureError, match="the shapes of the results of tensor_split depend on values"):
            capture(lambda x, k: split(x, k), X, places, mode=Captured())  # noqa: B023
        captured = capture(lambda x: split(x, places), X, mode=Captured(script=False))  # noqa: B023
        assert [len(part) for part in captured(X)] == [1, 2]
    places += 1
    with pytest.raises(StaleGraphError, match="that Python code reads"):
        captured(X)
