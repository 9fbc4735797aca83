"""An error of this package is one line, although Pyro appends the shapes of all sites to it."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.reparam import HaarReparam
from pyro.optim import Adam

from pyro_genmodels import Flow, MaximumLikelihood, to_arviz
from pyro_genmodels._pyro import traces

x = torch.randn(3, 2)


def reparametrised_data(x):
    """The error is raised by a handler, in a run inside two traces."""
    return poutine.reparam(lambda: pyro.sample("x", dist.Normal(x, 1.0).to_event(2), obs=x), {"x": HaarReparam()})()


def flow_of_other_data(x):
    """The error is raised by a family, inside the model."""
    Flow((5,)).model(x)


RUNS = {
    "a run of a pair": lambda model: traces.run_pair(model, traces.no_latents, (x,), {}),
    "a run inside a trace": lambda model: traces.trace_of(lambda x: poutine.trace(model).get_trace(x), (x,), {}),
    "to_arviz": lambda model: to_arviz((model, traces.no_latents), x, num_samples=2),
    "SVI": lambda model: SVI(model, traces.no_latents, Adam({}), MaximumLikelihood()).step(x),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("model", [reparametrised_data, flow_of_other_data])
def test_an_error_of_this_package_is_one_line(run, model):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        RUNS[run](model)
    assert "Trace Shapes:" in caught.value.trace_shapes
    assert caught.value.__cause__ is None


def test_an_error_of_the_users_code_keeps_the_shapes():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise ValueError("mine")

    for run in RUNS.values():
        with pytest.raises(ValueError, match=r"mine\n\s*Trace Shapes"):
            run(model)


def test_an_error_of_torch_keeps_the_shapes():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        torch.zeros(2) + torch.zeros(3)

    with pytest.raises(RuntimeError, match=r"must match.*\n\s*Trace Shapes"):
        to_arviz((model, traces.no_latents), x, num_samples=2)
