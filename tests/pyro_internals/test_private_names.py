"""Private names of Pyro and torch that the package relies on: each exists, and does what is relied on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.infer import ELBO, MCMC, NUTS
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam import AutoReparam, LocScaleReparam
from pyro.infer.trace_elbo import _compute_log_r
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR, _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from pyro_genmodels._pyro import params, sites
from pyro_genmodels._pyro.modules import output_without_view
from pyro_genmodels._pyro.reparam import MarkComputed
from pyro_genmodels._pyro.subsampling import GivenRows


def test_the_stack_holds_the_handlers_of_the_current_run():
    with poutine.trace() as outer:
        assert any(handler is outer for handler in _PYRO_STACK)
        assert isinstance(outer, TraceMessenger)
        pyro.sample("z", dist.Normal(0.0, 1.0))
        assert "z" in outer.trace.nodes  # the trace of a run can be read before the run ends
    assert not _PYRO_STACK


def test_the_allocator_knows_the_dimensions_that_are_enumerated():
    seen = []

    def model():
        pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        seen.append(list(_ENUM_ALLOCATOR.dim_to_id))

    trace = poutine.trace(poutine.enum(model, first_available_dim=-2)).get_trace()
    assert seen == [[-2]]
    assert trace.nodes["k"]["infer"]["_enumerate_dim"] == -2
    assert sites.enumeration_dim(trace.nodes["k"]) == -2


@pytest.mark.parametrize("mask", [True, False, torch.tensor([True, False])])
def test_a_masked_distribution_keeps_its_mask(mask):
    assert MaskedDistribution(dist.Normal(torch.zeros(2), 1.0), mask)._mask is mask


def test_pyro_wraps_distributions_in_three_classes_with_a_base():
    normal = dist.Normal(torch.zeros(2), 1.0)
    for wrapped in (normal.mask(torch.tensor([True, False])), normal.to_event(1), ExpandedDistribution(normal, (3, 2))):
        assert wrapped.base_dist is normal


def test_a_deterministic_site_says_so():
    site = poutine.trace(lambda: pyro.deterministic("d", torch.ones(2))).get_trace().nodes["d"]
    assert site["infer"]["_deterministic"]
    assert sites.is_deterministic(site)


@pytest.mark.parametrize("strategy", [False, True])
def test_a_reparametrised_variable_is_an_observed_delta_without_density(strategy):
    config = AutoReparam(centered=0.0) if strategy else {"z": LocScaleReparam(0.0)}
    model = poutine.reparam(lambda: pyro.sample("z", dist.Normal(1.0, 2.0)), config)
    assert not sites.is_computed(poutine.trace(model).get_trace().nodes["z"])
    with MarkComputed():
        site = poutine.trace(model).get_trace().nodes["z"]
    assert site["is_observed"]
    assert site["fn"]._mask is False
    assert isinstance(sites.innermost(site["fn"]), dist.Delta)
    assert sites.is_computed(site)
    assert not sites.is_deterministic(site)


def test_unconditioning_keeps_the_observed_value():
    def model():
        return pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(7.0))

    site = poutine.trace(poutine.uncondition(model)).get_trace().nodes["x"]
    assert site["infer"]["was_observed"]
    assert site["infer"]["obs"] == 7.0
    assert site["value"] != 7.0
    assert not site["is_observed"]
    assert sites.was_observed(site)
    assert sites.observed_value(site) == 7.0


class Model(PyroModule):
    def __init__(self):
        super().__init__("model")
        self.weight = PyroParam(torch.ones(2), dist.constraints.positive)
        self.inner = PyroModule[nn.Linear](2, 1)
        self.plain = nn.Sequential(nn.Linear(2, 2))

    def forward(self):
        pyro.module("model.plain", self.plain)
        return self.weight, self.inner.weight


def test_a_module_has_a_name_that_can_be_set_again():
    model = Model()
    assert model._pyro_name == "model"
    model._pyro_context.used = False
    model._pyro_set_supermodule("renamed", model._pyro_context)
    assert model._pyro_name == "renamed"
    assert model.inner._pyro_name == "renamed.inner"


def test_a_used_module_cannot_be_renamed():
    """Otherwise `_pyro_context.used` need not be reset."""
    model = Model()
    model()
    assert model._pyro_context.used
    with pytest.raises(Exception, match=r"already|used|name"):
        model._pyro_set_supermodule("renamed", model._pyro_context)


def test_a_module_knows_its_random_parameters():
    model = PyroModule[nn.Linear](2, 2)
    assert not list(params.random_parameters(model))
    model.weight = PyroSample(dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
    assert "weight" in model._pyro_samples
    assert list(params.random_parameters(nn.Sequential(model))) == [(model, "weight")]


def test_the_store_knows_parameters_by_names_of_modules():
    model = Model()
    model()
    store = pyro.get_param_store()
    assert set(store) == {"model.weight", "model.inner.weight", "model.plain$$$0.weight", "model.plain$$$0.bias"}
    assert store._params["model.weight"] is model._parameters["weight_unconstrained"]
    assert store._params["model.inner.weight"] is model._modules["inner"]._parameters["weight"]


def test_the_store_gives_and_takes_its_state():
    model = Model()
    model()
    store = pyro.get_param_store()
    state = store.get_state()
    store.clear()
    assert not list(store)
    store.set_state(state)
    assert store._params["model.weight"] is model._parameters["weight_unconstrained"]


def test_the_log_ratio_is_summed_to_the_plates_of_a_site():
    def guide():
        with pyro.plate("n", 3, dim=-1):
            return pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.8])))

    def model():
        with pyro.plate("n", 3, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(3))

    guide_trace = prune_subsample_sites(poutine.trace(guide).get_trace())
    model_trace = prune_subsample_sites(poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace())
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    nodes = model_trace.nodes
    expected = nodes["z"]["log_prob"] + nodes["x"]["log_prob"] - guide_trace.nodes["z"]["log_prob"]
    log_r = _compute_log_r(model_trace, guide_trace)
    torch.testing.assert_close(log_r.sum_to(guide_trace.nodes["z"]["cond_indep_stack"]), expected)
    torch.testing.assert_close(log_r.sum_to(()), expected.sum())


def test_a_loss_of_pyro_asks_for_traces_by_two_methods():
    assert {"_get_trace", "_get_traces"} <= set(vars(ELBO))


def test_an_autoguide_sets_up_by_one_method():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoNormal(model)
    guide._setup_prototype()
    assert "z" in guide.prototype_trace.nodes


def test_validation_of_a_distribution_is_an_attribute():
    normal = dist.Normal(0.0, 1.0, validate_args=True)
    normal._validate_args = False
    assert normal.log_prob(torch.tensor(float("nan"))).isnan()
    assert torch.distributions.Distribution._validate_args in (True, False)


def test_a_capture_is_noticed():
    seen = []

    def double(x):
        seen.append(get_proxy_mode() is not None)
        return 2 * x

    make_fx(double)(torch.ones(2))
    assert seen == [True]
    assert get_proxy_mode() is None


def test_subsample_sites_hold_the_size_of_their_plate():
    def model():
        with pyro.plate("n", 10, subsample_size=4):
            pass

    site = poutine.trace(model).get_trace().nodes["n"]
    assert poutine.util.site_is_subsample(site)
    assert (site["fn"].size, site["fn"].subsample_size, len(site["value"])) == (10, 4, 4)


def test_a_run_of_mcmc_keeps_its_arguments_and_diagnostics():
    def model(x):
        pyro.sample("z", dist.Normal(x, 1.0))

    mcmc = MCMC(kernel := NUTS(model), num_samples=3, warmup_steps=2, disable_progbar=True)
    assert mcmc._samples is None
    assert mcmc._args is None
    kernel.diagnostics = lambda: {"own": (kernel._t, kernel._warmup_steps, kernel._mean_accept_prob)}
    mcmc.run(torch.tensor(1.0))
    assert mcmc._args == (torch.tensor(1.0),)
    assert mcmc._kwargs == {}
    assert set(mcmc._samples) == {"z"}
    steps, warmup, rate = mcmc._diagnostics[0]["own"]
    assert (steps, warmup) == (5, 2)
    assert 0 <= rate <= 1


class _Names(Messenger):
    """Handler that notes the names of sites."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def _pyro_sample(self, msg):
        self.seen.append(msg["name"])


def test_a_kernel_caches_its_potential_energy_and_samples_at_sites():
    kernel = NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    kernel.setup(0)
    with _Names(seen := []):
        z = kernel.sample(kernel.initial_params)["z"]
    torch.testing.assert_close(kernel._potential_energy_last, -dist.Normal(0.0, 1.0).log_prob(z))
    assert [name for name in seen if name.startswith("r_t=")] == ["r_t=0_('z',)"]
    assert "direction_t=0_treedepth=0" in seen


def test_a_plate_with_given_rows_says_so_before_it_is_replayed():
    given = GivenRows()
    with given, poutine.trace() as capture:
        pyro.plate("data", 5, subsample=[3, 1])
    assert given.rows == {"data": [3, 1]}
    assert capture.trace.nodes["data"]["fn"].subsample_size is None


def test_a_view_knows_the_tensor_that_it_is_of():
    x = torch.zeros(4)
    assert x._base is None
    assert output_without_view(nn.Identity(), (), x) is x
    view = x.view(2, 2)
    assert view._base is x
    assert output_without_view(nn.Identity(), (), view)._base is None
