"""The formulas of optimisers make the steps of torch's and Pyro's optimisers."""

import pyro.optim
import pytest
import torch
from torch import nn

from pyro_genmodels.infer.compiled.updates import has_stepped, update_of

OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.03}),
    "Adam, weight decay": lambda: pyro.optim.Adam({"lr": 0.03, "betas": (0.8, 0.9), "weight_decay": 0.1, "eps": 1e-3}),
    "AMSGrad": lambda: pyro.optim.Adam({"lr": 0.03, "amsgrad": True}),
    "Adam, maximize": lambda: pyro.optim.Adam({"lr": 0.03, "maximize": True}),
    "AdamW": lambda: pyro.optim.AdamW({"lr": 0.03, "weight_decay": 0.2}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
    "ClippedAdam, centered": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "centered_variance": True}),
    "SGD": lambda: pyro.optim.SGD({"lr": 0.03, "weight_decay": 0.1}),
    "SGD, momentum": lambda: pyro.optim.SGD({"lr": 0.03, "momentum": 0.9, "dampening": 0.2}),
    "SGD, nesterov": lambda: pyro.optim.SGD({"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "RMSprop": lambda: pyro.optim.RMSprop({"lr": 0.01}),
    "RMSprop, options": lambda: pyro.optim.RMSprop({"lr": 0.01, "centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "clipped by norm": lambda: pyro.optim.Adam({"lr": 0.03}, {"clip_norm": 0.3}),
    "clipped by value": lambda: pyro.optim.Adam({"lr": 0.03}, {"clip_value": 0.2}),
    "schedule": lambda: pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8}),
}


def make_step(optim, p, gradient):
    p.grad = gradient.clone()
    optim([p])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_formulas_make_the_steps_of_the_optimiser(name, dtype):
    torch.manual_seed(0)
    gradients = torch.randn(6, 4, dtype=dtype)
    start = torch.randn(4, dtype=dtype)
    stock, ours = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    pyro.get_param_store()["stock"], pyro.get_param_store()["ours"] = stock, ours
    optim, other = OPTIMISERS[name](), OPTIMISERS[name]()
    make_step(optim, stock, gradients[0])
    make_step(other, ours, gradients[0])
    assert has_stepped(other, [ours])
    update = update_of(other, [ours])
    for gradient in gradients[1:]:
        make_step(optim, stock, gradient)
        states = update.states()
        with torch.no_grad():
            rates = torch.tensor(update.rates()[0], dtype=torch.float64)
            [value], [state] = update.step([ours], [gradient], states, rates)
            ours.copy_(value)
            for key, x in state.items():
                states[0][key].copy_(x)
        update.count()
        precision = 1e-5 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(ours, stock, rtol=precision, atol=precision)
    make_step(optim, stock, gradients[0])
    make_step(other, ours, gradients[0])  # goes on from the state that the formula has written
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


def test_rates_of_later_steps_are_known():
    p = nn.Parameter(torch.zeros(1))
    pyro.get_param_store()["p"] = p
    optim = OPTIMISERS["ClippedAdam"]()
    make_step(optim, p, torch.ones(1))
    update = update_of(optim, [p])
    ahead = update.rates(3)
    for expected in ahead:
        assert update.rates()[0] == pytest.approx(expected)
        update.count()


def test_what_is_not_in_the_list_says_why():
    p = nn.Parameter(torch.zeros(1))
    pyro.get_param_store()["p"] = p
    optim = pyro.optim.Adadelta({"lr": 0.1})
    make_step(optim, p, torch.ones(1))
    assert update_of(optim, [p]) == "Adadelta has no formula here"
    assert not has_stepped(pyro.optim.Adam({}), [p])


def test_a_schedule_that_changes_the_momentum_says_so():
    p = nn.Parameter(torch.zeros(1))
    pyro.get_param_store()["p"] = p

    def one_cycle(**options):
        arguments = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "max_lr": 0.2, "total_steps": 10}
        return pyro.optim.OneCycleLR(arguments | options)

    optim = one_cycle()
    make_step(optim, p, torch.ones(1))
    assert "OneCycleLR changes the momentum" in update_of(optim, [p])
    optim = one_cycle(cycle_momentum=False)
    make_step(optim, p, torch.ones(1))
    assert not isinstance(update_of(optim, [p]), str)
