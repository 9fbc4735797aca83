"""Several steps made at once: compiled code that is recorded makes the steps of the code itself."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyro_genmodels.infer.compiled import Compiled, CompiledSVI
from pyro_genmodels.infer.compiled import steps as steps_module

pytestmark = pytest.mark.slow  # it compiles


def model(x, y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 1 / rate), obs=y)


def gamma_guide(x, y):
    shape = pyro.param("shape", torch.tensor(2.0), constraint=dist.constraints.positive)
    pyro.sample("rate", dist.Gamma(shape, 1.0))  # drawn by an operation of torch, at each step
    loc = pyro.param("loc", torch.zeros(3))
    pyro.sample("weight", dist.Normal(loc, 0.1).to_event(1))


GUIDES = {"normal": lambda: AutoNormal(model), "gamma": lambda: gamma_guide}


def runs(guide, steps):
    """Losses and parameters of runs between which data and parameters move in memory, and whether they are recorded."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40)
    svi = CompiledSVI(model, GUIDES[guide](), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=Compiled(), audit=False)
    for _ in range(2):
        svi.step(x, y)
    recorded = []
    monitored = steps_module.Steps._record

    def noted(self, inputs):
        recording = monitored(self, inputs)
        recorded.append(bool(recording.calls))
        return recording

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module.Steps, "_record", noted)
        if not steps:
            patch.setattr(steps_module, "record_runs", lambda *args: None)
        losses = [svi.run(12, x, y, unroll=4, progress=False)]
        x += 1
        losses.append(svi.run(8, x, y, unroll=4, progress=False))
        losses.append(svi.run(8, x.clone() - 1, y, unroll=4, progress=False))
        for p in pyro.get_param_store().named_parameters():
            p[1].data = p[1].data.clone() + 0.1
        losses.append(svi.run(8, x, y, unroll=4, progress=False))
    return [torch.cat(losses), *(p.detach().clone() for _, p in pyro.get_param_store().named_parameters())], recorded


@pytest.mark.parametrize("guide", GUIDES)
def test_recorded_steps_are_those_of_the_code(guide):
    found, recorded = runs(guide, True)
    expected, not_recorded = runs(guide, False)
    assert len(recorded) >= 3
    assert all(recorded)
    assert not any(not_recorded)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(found[0].unique()) == len(found[0])


def test_a_recording_that_differs_from_the_code_is_not_used():
    record = steps_module.record_runs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_module, "record_runs", lambda *args: record(*args)[:-1])  # a kernel is left out
        _, recorded = runs("normal", True)
    assert not any(recorded)
