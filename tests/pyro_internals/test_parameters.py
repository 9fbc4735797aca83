"""Statements of parameters: a family makes them where they have an effect, and leaves them out where they have none."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger

from pyro_genmodels import VAE, Flow, MaximumLikelihood
from pyro_genmodels._pyro import params, traces


class Listener(Messenger):
    """Handler that notes the names of parameters."""

    def __init__(self):
        super().__init__()
        self.names = []

    def _pyro_param(self, msg):
        self.names.append(msg["name"])


@pytest.fixture
def flow():
    return Flow((2,))


def names(family):
    return {name for name, _ in params.named_parameters(family)}


def test_the_first_call_puts_the_parameters_into_the_store(flow):
    flow()
    assert set(pyro.get_param_store().keys()) == names(flow)
    pyro.clear_param_store()
    flow()
    assert set(pyro.get_param_store().keys()) == names(flow)


def test_names_are_those_that_pyro_gives():
    vae = VAE((3,), latent_dim=2, hidden=(4,), prior=Flow((2,)))
    x = torch.randn(8, 3)
    SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()).step(x)
    assert set(pyro.get_param_store().keys()) == names(vae)


def test_a_handler_of_parameters_hears_all_of_them_at_every_call(flow):
    for _ in range(2):
        with Listener() as listener:
            flow()
        assert set(listener.names) == names(flow)


def test_a_handler_around_a_loss_hears_the_parameters(flow):
    loss, x = MaximumLikelihood()(flow), torch.randn(8, 2)
    loss(x)
    with Listener() as listener:
        loss(x)
    assert set(listener.names) == names(flow)


def test_a_trace_of_a_model_records_the_parameters(flow):
    flow.model(torch.randn(8, 2))
    trace = poutine.trace(flow.model).get_trace(torch.randn(8, 2))
    assert set(trace.param_nodes) == names(flow)


def test_the_traces_of_a_pair_hold_samples_only(flow):
    flow.model(torch.randn(8, 2))
    model_trace, _ = traces.run_pair(flow.model, flow.guide, (torch.randn(8, 2),), {})
    assert model_trace.param_nodes == []
    assert traces.observed(model_trace) == ["x"]


def test_parameters_are_replayed_also_after_they_were_stored(flow):
    flow()
    name = next(iter(names(flow)))
    given = torch.zeros(1)
    given.unconstrained = lambda: given
    with poutine.replay(params={name: given}), poutine.trace() as handler:
        flow()
    assert handler.trace.nodes[name]["value"] is given


def test_a_submodule_with_another_tensor_under_its_name_is_not_stored(flow):
    flow()
    assert params.is_stored(flow, "transform")
    name, parameter = params.named_parameters(flow)[0]
    pyro.get_param_store()[name] = torch.zeros_like(parameter)
    assert not params.is_stored(flow, "transform")
    flow()
    assert params.is_stored(flow, "transform")


def test_replaced_parameters_are_stored_at_the_next_call(flow):
    flow()
    flow.transform.transforms[0].hyper = torch.nn.Linear(2, 2)
    assert not params.is_stored(flow, "transform")
    flow()
    assert params.is_stored(flow, "transform")


def test_a_messenger_without_methods_for_parameters_does_not_act_on_them():
    assert not params._acts_on_parameters(Messenger())
    assert params._acts_on_parameters(Listener())
    assert params._acts_on_parameters(poutine.block().__class__())
    assert params._acts_on_parameters(poutine.trace())
    assert not params._acts_on_parameters(traces._SampleTrace())


@pytest.mark.parametrize("name", ["_pyro_param", "_pyro_post_param", "_process_message", "_postprocess_message"])
@pytest.mark.parametrize("handler", [Messenger, poutine.trace().__class__, lambda: poutine.replay(params={})])
def test_a_method_of_one_handler_alone_hears_the_parameters(flow, handler, name):
    flow()
    heard, handler = [], handler()
    setattr(handler, name, lambda msg: heard.append(msg["name"]))
    assert params._acts_on_parameters(handler)
    with handler:
        flow()
    assert names(flow) <= set(heard)


def test_a_parameter_of_the_store_becomes_one_that_a_module_can_hold():
    pyro.clear_param_store()
    scale = pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
    before = scale.unconstrained()
    parameter = params.as_module_parameter("scale")
    assert isinstance(parameter, torch.nn.Parameter)
    assert parameter.data_ptr() == before.data_ptr()
    assert params.as_module_parameter("scale") is parameter is params.unconstrained("scale")
    with torch.no_grad():
        parameter.zero_()
    assert pyro.param("scale").item() == 1.0
    assert pyro.get_param_store().param_name(parameter) == "scale"
    pyro.param("scale").log().backward()
    assert parameter.grad.item() == pytest.approx(1.0)
