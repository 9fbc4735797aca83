"""`side_effect_free` puts every module that a fit can call into evaluation mode before the fit runs, and puts all back."""

from collections import deque
from functools import lru_cache, partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from torch import nn

from pyro_genmodels import MAF, VAE, Autoregressive, Diffusion, Flow, ODEFlow, to_arviz
from pyro_genmodels._pyro.handlers import side_effect_free
from pyro_genmodels._pyro.modules import reachable_modules
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.nn.fields import DenseField


def network():
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))


GLOBAL_NETWORK = network()


class Holder:
    """An object of the user's own that holds a network."""

    def __init__(self):
        self.network = network()

    def model(self):
        return self.network(torch.ones(2))

    def __call__(self):
        return self.network(torch.ones(2))


class Inner(PyroModule):
    def __init__(self, net):
        super().__init__()
        self.hidden = [lambda: net(torch.ones(2))]  # not a submodule

    def forward(self):
        return self.hidden[0]()


def calls_global():
    return GLOBAL_NETWORK(torch.ones(2))


def calls_a_function_that_calls_global():
    return calls_global()


def by_closure(net):
    return lambda: net(torch.ones(2))


def by_dictionary(net):
    networks = {"encoder": [net]}
    return lambda: networks["encoder"][0](torch.ones(2))


def by_default(net):
    def model(net=net):
        return net(torch.ones(2))

    return model


def by_attribute(net):
    holder = Holder()
    holder.network = net
    return lambda: holder.network(torch.ones(2))


def by_bound_method(net):
    holder = Holder()
    holder.network = net
    return holder.model


def by_callable_object(net):
    holder = Holder()
    holder.network = net
    return holder


def by_partial(net):
    return partial(lambda fn: fn(torch.ones(2)), net)


def by_handlers(net):
    return poutine.scale(poutine.mask(by_closure(net), mask=torch.tensor(True)), 2.0)


def by_inner_function(net):
    def model():
        def inner():
            return net(torch.ones(2))

        return inner()

    return model


def by_module(net):
    return Inner(net)


def by_method_of_a_module(net):
    return Inner(net).forward


def by_autoguide(net):
    def model():
        return pyro.sample("z", dist.Normal(net(torch.ones(2)), 1.0).to_event(1))

    return AutoNormal(model)


def by_distribution(net):
    prior = dist.ConditionalTransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [])
    prior.network = net
    return lambda: prior.sample()


def by_slots(net):
    class Slotted:
        __slots__ = ("network",)

        def __call__(self):
            return self.network(torch.ones(2))

    model = Slotted()
    model.network = net
    return model


def by_deque(net):
    networks = deque([net])
    return lambda: networks[0](torch.ones(2))


def by_lru_cache(net):
    return lru_cache(by_closure(net))


class Namespace:
    """Models that refer to a network by an attribute of their class."""

    network = None
    count = 3  # named below: a value that is searched no further

    @staticmethod
    def static():
        return Namespace.network(torch.ones(2)) * Namespace.count

    @classmethod
    def by_class(cls):
        return cls.network(torch.ones(2))

    @property
    def attribute(self):
        return Namespace.network

    def helper(self):
        return self.attribute(torch.ones(2))

    def __call__(self):
        return self.helper()


def by_static_method(net):
    Namespace.network = net
    return Namespace.static


def by_class_method(net):
    Namespace.network = net
    return Namespace.by_class


def by_helper_method(net):
    Namespace.network = net
    return Namespace()


WAYS = [
    by_closure, by_dictionary, by_default, by_attribute, by_bound_method, by_callable_object, by_partial, by_handlers,
    by_inner_function, by_module, by_method_of_a_module, by_autoguide, by_distribution, by_slots, by_deque,
    by_lru_cache, by_static_method, by_class_method, by_helper_method,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_modules_are_found_however_a_function_refers_to_them(way):
    net = network()
    fn = way(net)
    assert {id(part) for part in net.modules()} <= {id(module) for module in reachable_modules(fn)}
    with side_effect_free(fn):
        assert not any(part.training for part in net.modules())
    assert all(part.training for part in net.modules())


@pytest.mark.parametrize("fn", [calls_global, calls_a_function_that_calls_global, lambda: calls_global])
def test_modules_are_found_behind_globals(fn):
    with side_effect_free(fn):
        assert not GLOBAL_NETWORK[1].training
    assert GLOBAL_NETWORK[1].training


def test_other_modules_stay_as_they_are():
    net, other = network(), network()
    other[1].eval()
    with side_effect_free(by_closure(net)):
        assert other.training
        assert not other[1].training
    assert net.training
    assert not other[1].training


def test_a_module_in_evaluation_mode_stays_in_it():
    net = network()
    net[1].eval()
    with side_effect_free(net):
        pass
    assert net.training
    assert not net[1].training


def test_all_is_put_back_after_an_error():
    net = network()
    frozen = torch.zeros(2)

    def model():
        pyro.param("frozen", frozen)
        return net(torch.ones(2))

    def fail():
        model()
        raise KeyError

    with pytest.raises(KeyError), side_effect_free(model):
        fail()
    assert net.training
    assert not list(pyro.get_param_store())
    assert not frozen.requires_grad


def test_neither_gradients_nor_sites_nor_parameters_come_out():
    def model():
        scale = pyro.param("scale", torch.tensor(2.0))
        return pyro.sample("z", dist.Normal(0.0, scale))

    with poutine.trace() as outer, side_effect_free(model):
        value = model()
    assert not value.requires_grad
    assert "z" not in outer.trace.nodes
    assert not list(pyro.get_param_store())


def test_a_trainer_is_searched_for_its_networks():
    flow, critic = Flow((2,), transform=MAF(transforms=1, hidden=(8,), dropout=0.5)), network()
    trainer = Adversarial(flow.model, critic)
    with side_effect_free(trainer):
        assert not any(module.training for root in (flow, critic) for module in root.modules())


FAMILIES = {
    "autoregressive": lambda: Autoregressive((2,), hidden=(8,), dropout=0.9),
    "flow": lambda: Flow((2,), transform=MAF(transforms=1, hidden=(8,), dropout=0.9)),
    "ode flow": lambda: ODEFlow((2,), network=DenseField(8, 1, dropout=0.9)),
    "diffusion": lambda: Diffusion((2,), network=DenseField(8, 1, dropout=0.9)),
    "vae": lambda: VAE((2,), latent_dim=1, hidden=(8,), dropout=0.9),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("with_data", [False, True])
def test_arviz_data_of_a_family_with_dropout_are_made_in_evaluation_mode(name, with_data):
    family = FAMILIES[name]()
    args = (torch.randn(3, 2),) if with_data else ()

    def export():
        pyro.set_rng_seed(1)
        return to_arviz(family, *args, num_samples=2, progress=False)["posterior_predictive"]["x"].to_numpy()

    draws = export()
    assert all(module.training for module in family.modules())
    family.eval()
    torch.testing.assert_close(draws, export())


def test_a_plain_model_that_calls_a_family_is_in_evaluation_mode():
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,), dropout=0.9))

    def model(y):
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    data = to_arviz((model, guide), torch.ones(2), num_samples=5, progress=False)
    assert data["prior"]["z"].shape == (1, 5, 2)
    assert flow.training


@pytest.mark.parametrize("module", [nn.Linear(1, 1)])
def test_the_assert_statements_of_a_model_lead_to_nothing_that_pytest_holds(module):
    """pytest rewrites them, and holds all tests with their parameters, this module among them."""

    def model(x):
        assert x is not None
        return x

    assert module not in reachable_modules(model)
    assert module in reachable_modules(lambda: module)
