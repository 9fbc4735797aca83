"""The audit compares what is run with the program: values, places that are no numbers, and the state of the random numbers."""

import dataclasses

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, CaptureError, StaleGraphError

MODE = Captured(script=False)
X = torch.tensor([0.3, -0.2, 1.1])


def no_guide(*args):
    pass


def captured(body, mode=MODE, **kwargs):
    """Return a captured loss whose likelihood has the location that `body` computes of a parameter and the data."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.sample("x", dist.Normal(body(loc, x), 1.0).to_event(1), obs=x)

    pyro.clear_param_store()
    return CapturedLoss(model, no_guide, Trace_ELBO(), mode=mode, **kwargs)


def repeat(loss, x=X):
    for _ in range(9):
        loss(x)


@pytest.mark.parametrize("factor", [1.001, 0.999, float("nan")])
def test_a_small_change_that_cannot_be_seen_is_found(factor):
    array = np.ones(3)
    loss = captured(lambda loc, x: loc * float(array[0]) + 0 * x)
    loss(X)
    array *= factor
    with pytest.raises((StaleGraphError, ValueError), match=r"same random numbers|NaN|nan"):
        repeat(loss)


def test_a_number_where_the_program_has_none_is_found():
    loss = captured(lambda loc, x: loc + 0 * x)
    program, _ = loss.program((X,), {})
    number, other = torch.tensor(1.0), torch.tensor(float("nan"))
    for a, b in [(number, other), (other, number), (other.abs() * torch.inf, number), (number / 0, -number / 0)]:
        with pytest.raises(StaleGraphError, match="same random numbers"):
            program.compare([number, a], [number, b])
        with pytest.raises(StaleGraphError, match="same random numbers"):
            program.compare([a, number], [b, number])
    assert program.compare([other, number / 0], [other, number / 0]) == 0


def test_gradients_are_compared_by_their_own_size():
    loss = captured(lambda loc, x: loc + 0 * x)
    program, _ = loss.program((X,), {})
    small = torch.tensor(1e-4)
    with pytest.raises(StaleGraphError):
        program.compare([small, small], [small, 1.01 * small])


def test_coarse_numbers_leave_the_comparison_awake():
    array = np.ones(3)
    half = torch.bfloat16

    def body(loc, x):
        return loc.to(half) + x.to(half) * torch.tensor(float(array[0]), dtype=half)

    loss = captured(body)
    loss(X)
    array *= 5
    with pytest.raises(StaleGraphError):
        repeat(loss)


def test_data_of_a_finer_dtype_are_no_alarm():
    def model(x):
        for i in range(3):
            loc = pyro.param(f"loc{i}", torch.tensor(0.1 * i))
            pyro.sample(f"x{i}", dist.Normal(loc, 1.3).expand([3]).to_event(1), obs=x)

    pyro.clear_param_store()
    repeat(CapturedLoss(model, no_guide, Trace_ELBO(), mode=MODE), torch.randn(3).double())


@dataclasses.dataclass(frozen=True)
class Wrong(Captured):
    """A mode whose code computes something else."""

    def build(self, graph, inputs):
        return lambda *tensors: [1.1 * x for x in graph.module(*tensors)]


def test_what_is_run_is_compared():
    loss = captured(lambda loc, x: loc + 0 * x, Wrong())
    with pytest.raises(StaleGraphError, match="compiled code gives a loss of"):
        repeat(loss)


def test_other_code_that_was_built_can_be_compared():
    loss = captured(lambda loc, x: loc + 0 * x)
    program, inputs = loss.program((X,), {})

    def off_by(difference):
        return lambda program, inputs, own: program.compare(own, [program.graph(*inputs)[0] + difference], is_built=True)

    program.audit(inputs, off_by(0))
    with pytest.raises(StaleGraphError, match="compiled code gives a loss of"):
        program.audit(inputs, off_by(1))


def test_a_seed_that_is_set_by_the_model_is_found():
    def body(loc, x):
        torch.manual_seed(3)
        return loc + 0 * x

    with pytest.raises(StaleGraphError, match="sets a seed"):
        repeat(captured(body))


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_switched_off_are_refused(block):
    loss = captured(lambda loc, x: loc + 0 * x)
    with block(), pytest.raises(CaptureError, match="Gradients are switched off around the call"):
        loss(X)
    assert loss(X)[1].keys() == {"loc"}


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_a_loss_alone_can_be_captured_where_gradients_are_switched_off(block):
    loss = captured(lambda loc, x: loc + 0 * x)
    with block():
        program, inputs = loss.program((X + 0,), {}, gradients=False)
        inside = loss.call(program, inputs)[0]
    assert not inside.requires_grad
    assert inside.item() == loss(X)[0].item()
    assert loss(X)[1].keys() == {"loc"}


def test_a_loss_that_needs_gradients_to_run_can_be_captured_alone():
    @config_enumerate
    def model(x):
        k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor([0.1, 0.2]))[k], 1.0), obs=x)

    pyro.clear_param_store()
    loss = CapturedLoss(model, no_guide, TraceEnum_ELBO(), mode=MODE)
    program, inputs = loss.program((X[0],), {}, gradients=False)
    with torch.no_grad():
        alone = loss.call(program, inputs)[0].item()
    assert alone == pytest.approx(loss(X[0])[0].item(), rel=1e-5)


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_parameter_is_refused_by_name(method):
    loss = captured(lambda loc, x: loc + 0 * x, audit=False)
    loss(X)
    handle = getattr(pyro.param("loc").unconstrained(), method)(lambda g: None)
    for _ in range(2):
        with pytest.raises(CaptureError, match="The parameter loc has a hook of its gradient"):
            loss(X)
    handle.remove()
    assert loss(X)[1].keys() == {"loc"}
