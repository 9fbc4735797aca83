"""Parts of Pyro and torch that are replaced during a capture: each replacement computes the same, and is taken back."""

import copy
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate, trace_elbo, util
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pyro_genmodels._pyro.capturing import capturable, copy_pair, find_parameters, has_handlers, has_hooks

X = torch.tensor([0.3, -0.2, 1.1])


def replaced():
    """Return what the names are bound to that a capture replaces."""
    return {
        "torch_item": trace_elbo.torch_item,
        "warn_if_nan": trace_elbo.warn_if_nan,
        "one_hot": functional.one_hot,
        "expectation": util.Dice.compute_expectation,
        "validation": [Distribution._validate_sample, dist.Delta._validate_sample],
        "enabled": Distribution._validate_args,
    }


def test_names_are_replaced_inside_and_put_back_afterwards():
    before = replaced()
    with capturable():
        inside = replaced()
    assert all(inside[name] != before[name] for name in before)
    assert replaced() == before
    with pytest.raises(ZeroDivisionError), capturable():
        raise ZeroDivisionError
    assert replaced() == before


def test_numbers_stay_tensors_without_gradient():
    x = torch.tensor(2.0, requires_grad=True)
    with capturable():
        item = trace_elbo.torch_item(x)
        assert isinstance(item, torch.Tensor)
        assert not item.requires_grad
        assert trace_elbo.torch_item(3.0) == 3.0
        assert trace_elbo.warn_if_nan(x / 0 * 0, "loss").isnan()  # neither read nor warned of
    assert trace_elbo.torch_item(x) == 2.0


def test_values_and_arguments_of_distributions_are_not_checked():
    checked = dist.Normal(0.0, 1.0, validate_args=True)
    with capturable():
        assert checked.log_prob(torch.tensor(torch.nan)).isnan()
        dist.Normal(0.0, -1.0)
    with pytest.raises(ValueError, match="value"):
        checked.log_prob(torch.tensor(torch.nan))


@pytest.mark.parametrize("shape", [(), (2,), (2, 3)])
def test_one_hot_codes_are_those_of_torch(shape):
    x = torch.randint(4, shape)
    with capturable():
        found = functional.one_hot(x, 4)
        make_fx(lambda x: functional.one_hot(x, 4))(x)
    wanted = functional.one_hot(x, 4)
    assert torch.equal(found, wanted)
    assert found.dtype == wanted.dtype


@config_enumerate
def mixture(x):
    weights = pyro.param("weights", torch.tensor([0.2, 0.5, 0.3]))
    locs = pyro.param("locs", torch.tensor([-1.0, 0.0, 1.0]))
    first = pyro.sample("first", dist.Categorical(weights))
    with pyro.plate("rows", len(x)):
        k = pyro.sample("k", dist.Categorical(weights.roll(1) if first.dim() == 0 else weights))
        pyro.sample("x", dist.Normal(locs[k] + 0.1 * first, 1.0), obs=x)


@config_enumerate
def mixture_guide(x):
    logits = pyro.param("logits", torch.zeros(3))
    pyro.sample("first", dist.Categorical(logits=logits))
    with pyro.plate("rows", len(x)):
        pyro.sample("k", dist.Categorical(pyro.param("probs", torch.tensor([[0.0, 0.4, 0.6]] * 3))))  # one of them is 0


@pytest.mark.parametrize("guide", [mixture_guide, lambda x: None], ids=["in the guide", "in the model"])
def test_the_expectation_over_enumerated_variables_is_pyros(guide):
    """Also where a probability is 0, which Pyro leaves out by a mask."""
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    found = []
    for context in (capturable, torch.enable_grad):
        parameters = list(find_parameters(lambda: loss.differentiable_loss(mixture, guide, X)).values())
        with context():
            value = loss.differentiable_loss(mixture, guide, X)
            found.append([value.detach(), *torch.autograd.grad(value, parameters, allow_unused=True)])
    for mine, pyros in zip(*found, strict=True):
        assert (mine is None) == (pyros is None)
        if mine is not None:
            torch.testing.assert_close(mine, pyros)


def test_the_expectation_counts_the_scale_of_samples_that_are_not_enumerated():
    def model():
        pyro.sample("x", dist.Normal(pyro.sample("k", dist.Bernoulli(0.3)), 1.0), obs=torch.tensor(0.2))

    def guide():
        pyro.sample("k", dist.Bernoulli(pyro.param("p", torch.tensor(0.4))), infer={"enumerate": "parallel", "num_samples": 5})

    loss, found = TraceEnum_ELBO(max_plate_nesting=0), []
    for context in (capturable, torch.enable_grad):
        pyro.set_rng_seed(3)
        with context():
            found.append(loss.differentiable_loss(model, guide).detach())
    torch.testing.assert_close(*found)


def test_parameters_are_found_by_name_as_unconstrained_leaves():
    def model():
        pyro.param("scale", torch.tensor(2.0), constraint=dist.constraints.positive)
        pyro.param("loc", torch.tensor(1.0))

    found = find_parameters(model)
    assert set(found) == {"scale", "loc"}
    assert all(p.is_leaf and p.requires_grad for p in found.values())
    assert float(found["scale"].detach().exp()) == pytest.approx(2.0)
    assert found["loc"] is pyro.get_param_store()["loc"].unconstrained()


def test_handlers_around_a_call_are_noticed():
    assert not has_handlers()
    with poutine.scale(scale=2.0):
        assert has_handlers()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert has_handlers()
    assert not has_handlers()


class Layer(nn.Module):
    """A model with a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        pyro.module("layer", self)
        loc = pyro.sample("loc", dist.Normal(self.weight, 1.0))
        pyro.sample("x", dist.Normal(loc, torch.ones(3)).to_event(1), obs=x)


def test_a_guide_of_pyro_loses_its_model_when_it_is_copied():
    guide = AutoNormal(mixture)
    assert guide._model is not None
    copy.deepcopy(guide)
    assert guide._model is None


def test_copies_of_a_pair_have_their_models():
    model = Layer()
    guide = AutoNormal(model)
    guide(X)
    model_copy, guide_copy = copy_pair(model, guide)
    assert guide.model.args[-1] is model
    assert guide_copy.model.args[-1] is model_copy is not model
    assert model_copy.weight is not model.weight
    Trace_ELBO().loss(model_copy, guide_copy, X)


def test_a_second_thread_cannot_replace_the_names_too():
    errors = []

    def other():
        try:
            with capturable():
                pass
        except RuntimeError as error:
            errors.append(str(error))

    with capturable():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "another thread" in errors[0]


# What the recorder of operations relies on.


def test_views_share_the_address_of_their_storage_and_copies_do_not():
    x = torch.randn(3)
    assert x.untyped_storage()._cdata == x[1:].untyped_storage()._cdata == x.detach().untyped_storage()._cdata
    assert x.untyped_storage()._cdata != x.clone().untyped_storage()._cdata


def test_the_version_of_a_tensor_counts_what_is_written_to_it():
    x = torch.zeros(3)
    before = x._version
    x[0] = 1
    assert x._version > before
    before, address = x._version, x.data_ptr()
    x.data = torch.ones(3)
    assert x._version > before or x.data_ptr() != address


def test_batch_norm_changes_its_statistics_though_its_schema_does_not_say_so():
    operation = torch.ops.aten.native_batch_norm.default
    mean, var = torch.zeros(2), torch.ones(2)
    operation(torch.randn(5, 2), None, None, mean, var, True, 0.1, 1e-5)
    assert not torch.equal(mean, torch.zeros(2))
    assert not operation._schema.is_mutable
    names = [argument.name for argument in operation._schema.arguments]
    assert names[3:6] == ["running_mean", "running_var", "training"]


@pytest.mark.parametrize("method", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_gradients_are_found(method):
    x = torch.ones(2, requires_grad=True)
    assert not has_hooks(x)
    handle = getattr(x, method)(lambda g: None)
    assert has_hooks(x)
    handle.remove()
    assert not has_hooks(x)
