"""Nothing stale: whatever a program reads is changed after the capture, in one way after another, and the graph follows.

Each row builds a small program and a change. After the change the captured loss must be that of the program, under the same
random numbers; where a change cannot be seen, the audit must raise. Every row also checks that the change matters: that the
program's own loss is another one.
"""

import dataclasses
import functools
import gc
import random
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from eager_steps import Step, assert_same_step, eager
from programs import Run
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import SGD, Adam
from torch import nn
from torch.distributions import constraints

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, Compiled, CompiledSVI, StaleGraphError
from pyro_genmodels.infer.compiled.losses import MAX_PROGRAMS

MODE = Captured(script=False)  # the quickest to build
X = torch.tensor([0.3, -0.2, 1.1])
SCALE, WEIGHT, PRIOR = torch.tensor(1.3), 0.7, dist.Normal(0.0, 1.0)
SETTINGS = {"scale": torch.tensor(1.3), "inner": {"weight": 0.7}, "list": [torch.tensor(0.1), 2.0]}
OUTER = types.ModuleType("outer")
HELPERS = types.SimpleNamespace(scale=torch.tensor(1.3))


class Change(NamedTuple):
    """A program and what is done to it after the capture.

    Attributes:
        run: the program.
        change: function that changes it; returns other arguments, or None.
    """

    run: Run
    change: Callable[[], Any]


TABLE: dict[str, Callable[[], Change]] = {}
UNSEEN: dict[str, Callable[[], Change]] = {}


def row(name: str, table: dict = TABLE):
    def add(build):
        assert name not in table
        table[name] = build
        return build

    return add


def program(body: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
    """Return a program whose likelihood has the location and scale that `body` computes of a latent variable."""

    def model(*args, **kwargs):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc, scale = body(z, *args, **kwargs)
        pyro.sample("x", dist.Normal(loc * torch.ones(3), scale).to_event(1), obs=X)

    def guide(*args, **kwargs):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 1.0))

    return Run(model, guide, Trace_ELBO(), args, kwargs)


# Values that change in place.


@row("a tensor of a closure, in place")
def _():
    scale = torch.tensor(1.3)
    return Change(program(lambda z: (z, scale)), lambda: scale.mul_(2))


@row("the data of a tensor of a closure")
def _():
    scale = torch.tensor(1.3)
    return Change(program(lambda z: (z, scale)), lambda: setattr(scale, "data", torch.tensor(2.0)))


@row("an entry of a dictionary, in place")
def _():
    values = {"scale": torch.tensor(1.3)}
    return Change(program(lambda z: (z, values["scale"])), lambda: values["scale"].mul_(2))


@row("a buffer, in place")
def _():
    layer = nn.BatchNorm1d(3).eval()
    return Change(program(lambda z: (layer((z * X)[None])[0], 1.0)), lambda: layer.running_mean.add_(1))


@row("an array read by torch.from_numpy, in place")
def _():
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    return Change(program(lambda z: (z * torch.from_numpy(array), 1.0)), lambda: array.__imul__(2))


@row("an array read by torch.as_tensor, in place")
def _():
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    return Change(program(lambda z: (z * torch.as_tensor(array), 1.0)), lambda: array.__imul__(2))


@row("an array read by torch.tensor, in place")
def _():
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    return Change(program(lambda z: (z * torch.tensor(array), 1.0)), lambda: array.__imul__(2))


@row("the values of a mask in a closure, in place")
def _():
    mask = torch.tensor([True, False, True])
    return Change(program(lambda z: (z * X[mask].sum(), 1.0)), lambda: mask.fill_(True))


@row("a count of a tensor in a closure, in place")
def _():
    lengths = torch.tensor([1, 2])
    return Change(program(lambda z: (z * int(lengths.max()), 1.0)), lambda: lengths.add_(2))


@row("the data of a tensor whose values are read")
def _():
    lengths = torch.tensor([1, 2])
    return Change(program(lambda z: (z * int(lengths.max()), 1.0)), lambda: setattr(lengths, "data", torch.tensor([3, 5])))


@row("load_state_dict")
def _():
    layer = nn.Linear(1, 3)
    state = {name: x + 1 for name, x in layer.state_dict().items()}

    def body(z):
        pyro.module("layer", layer)
        return layer(z[None]), 1.0

    return Change(program(body), lambda: layer.load_state_dict(state))


# Names bound anew.


@row("a tensor of a closure")
def _():
    scale = torch.tensor(1.3)

    def rebind():
        nonlocal scale
        scale = torch.tensor(2.0)

    return Change(program(lambda z: (z, scale)), rebind)


@row("a float of a closure")
def _():
    weight = 0.7

    def rebind():
        nonlocal weight
        weight = 0.2

    return Change(program(lambda z: (z * weight, 1.0)), rebind)


@row("a float of a closure of a closure")
def _():
    weight = 0.7

    def annealed(z):
        return weight * z

    def rebind():
        nonlocal weight
        weight = 0.2

    return Change(program(lambda z: (annealed(z), 1.0)), rebind)


def rebind_global(name, value):
    globals()[name] = value


@row("a global tensor")
def _():
    rebind_global("SCALE", torch.tensor(1.3))
    return Change(program(lambda z: (z, SCALE)), lambda: rebind_global("SCALE", torch.tensor(2.0)))


@row("a global float")
def _():
    rebind_global("WEIGHT", 0.7)
    return Change(program(lambda z: (z * WEIGHT, 1.0)), lambda: rebind_global("WEIGHT", 0.2))


@row("a global distribution")
def _():
    rebind_global("PRIOR", dist.Normal(0.0, 1.0))

    def model():
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=X)

    return Change(Run(model, AutoNormal(model), Trace_ELBO()), lambda: rebind_global("PRIOR", dist.Normal(1.0, 2.0)))


@row("the scale of a global distribution")
def _():
    rebind_global("PRIOR", dist.Normal(0.0, 1.0))

    def model():
        z = pyro.sample("z", PRIOR)
        pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=X)

    return Change(Run(model, AutoNormal(model), Trace_ELBO()), lambda: setattr(PRIOR, "scale", torch.tensor(2.0)))


def helper(z):
    return z * SETTINGS["inner"]["weight"], SETTINGS["scale"]


@row("an entry of a global dictionary, in a function that the model calls")
def _():
    SETTINGS["scale"] = torch.tensor(1.3)
    return Change(program(helper), lambda: SETTINGS.__setitem__("scale", torch.tensor(2.0)))


@row("an entry of a dictionary in a dictionary")
def _():
    SETTINGS["inner"]["weight"] = 0.7
    return Change(program(helper), lambda: SETTINGS["inner"].__setitem__("weight", 0.2))


@row("an entry of a list")
def _():
    values = [torch.tensor(0.1), 2.0]
    return Change(program(lambda z: (z + values[0], values[1])), lambda: values.__setitem__(1, 3.0))


@row("one more entry of a list")
def _():
    values = [torch.tensor(0.1)]
    return Change(program(lambda z: (z + sum(values), 1.0)), lambda: values.append(torch.tensor(0.5)))


@row("one more entry of a dictionary")
def _():
    values = {"a": 0.5}
    return Change(program(lambda z: (z + sum(values.values()), 1.0)), lambda: values.update(b=1.0))


@row("an attribute of an object")
def _():
    HELPERS.scale = torch.tensor(1.3)
    return Change(program(lambda z: (z, HELPERS.scale)), lambda: setattr(HELPERS, "scale", torch.tensor(2.0)))


@row("a field of a data class")
def _():
    @dataclasses.dataclass
    class Options:
        weight: float = 0.7

    options = Options()
    return Change(program(lambda z: (z * options.weight, 1.0)), lambda: setattr(options, "weight", 0.2))


@row("an attribute with slots")
def _():
    class Options:
        __slots__ = ("weight",)

        def __init__(self):
            self.weight = 0.7

    options = Options()
    return Change(program(lambda z: (z * options.weight, 1.0)), lambda: setattr(options, "weight", 0.2))


@row("an attribute of a class")
def _():
    class Options:
        weight = 0.7

    return Change(program(lambda z: (z * Options.weight, 1.0)), lambda: setattr(Options, "weight", 0.2))


@row("an attribute of a class, read by its object")
def _():
    class Options:
        weight = 0.7

    options = Options()
    return Change(program(lambda z: (z * options.weight, 1.0)), lambda: setattr(Options, "weight", 0.2))


@row("an attribute that a property reads")
def _():
    class Options:
        def __init__(self):
            self.temperature = 1.0

        @property
        def weight(self):
            return 0.7 / self.temperature

    options = Options()
    return Change(program(lambda z: (z * options.weight, 1.0)), lambda: setattr(options, "temperature", 5.0))


@row("a global that a property reads")
def _():
    rebind_global("WEIGHT", 0.7)

    class Options:
        @property
        def weight(self):
            return WEIGHT

    options = Options()
    return Change(program(lambda z: (z * options.weight, 1.0)), lambda: rebind_global("WEIGHT", 0.2))


@row("a name of a module in a module")
def _():
    OUTER.inner = types.ModuleType("inner")
    OUTER.inner.weight = 0.7
    return Change(program(lambda z: (z * OUTER.inner.weight, 1.0)), lambda: setattr(OUTER.inner, "weight", 0.2))


@row("the default of an argument")
def _():
    def body(z, weight=0.7):
        return z * weight, 1.0

    return Change(program(body), lambda: setattr(body, "__defaults__", (0.2,)))


@row("a keyword of functools.partial")
def _():
    def body(z, weights):
        return z * weights[0], 1.0

    weights = [0.7]
    return Change(program(functools.partial(body, weights=weights)), lambda: weights.__setitem__(0, 0.2))


@row("a method of an object")
def _():
    class Options:
        def weigh(self, z):
            return z * 0.7

    options = Options()
    return Change(program(lambda z: (options.weigh(z), 1.0)), lambda: setattr(options, "weigh", lambda z: z * 0.2))


@row("a function of a closure")
def _():
    def weigh(z):
        return z * 0.7

    def rebind():
        nonlocal weigh
        weigh = torch.tanh

    return Change(program(lambda z: (weigh(z), 1.0)), rebind)


@row("the state of an object with __call__")
def _():
    class Weigh:
        def __init__(self):
            self.weight = 0.7

        def __call__(self, z):
            return z * self.weight, 1.0

    weigh = Weigh()
    return Change(program(weigh), lambda: setattr(weigh, "weight", 0.2))


# Modules.


class Model(PyroModule):
    """A model with a buffer, a float, a submodule, a prior and a parameter."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.tensor(0.2))
        self.weight = 0.7
        self.net = nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.3), nn.Linear(16, 3))
        self.tilt = PyroSample(dist.Normal(0.0, 1.0))
        self.scale = PyroParam(torch.tensor(0.9), constraint=constraints.positive)

    def forward(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = self.net(z[None] - self.centre) * self.weight + self.tilt
        pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=X)


def module_row(name: str):
    def add(change: Callable[[Model], Any]):
        def build():
            model = Model()
            return Change(Run(model, AutoNormal(model), Trace_ELBO()), lambda: change(model))

        return row(name)(build)

    return add


module_row("a buffer bound anew")(lambda model: setattr(model, "centre", torch.tensor(0.9)))
module_row("a float of a module")(lambda model: setattr(model, "weight", 0.2))
module_row("evaluation mode")(lambda model: model.eval())
module_row("evaluation mode of one layer")(lambda model: model.net[1].eval())
module_row("the rate of a dropout")(lambda model: setattr(model.net[1], "p", 0.9))
module_row("a layer of a sequence")(lambda model: model.net.__setitem__(2, nn.Linear(16, 3)))
module_row("a submodule")(lambda model: setattr(model, "net", nn.Linear(1, 3)))
module_row("a prior of a PyroModule")(lambda model: setattr(model, "tilt", PyroSample(dist.Normal(2.0, 0.5))))
module_row("a PyroParam")(lambda model: setattr(model, "scale", PyroParam(torch.tensor(2.0), constraint=constraints.positive)))
module_row("a PyroParam by its constrained value")(lambda model: setattr(model, "scale", torch.tensor(2.0)))
module_row("a parameter in place")(lambda model: model.net[2].bias.data.add_(1.0))
module_row("a parameter bound anew")(lambda model: setattr(model.net[2], "bias", nn.Parameter(torch.ones(3))))
module_row("the method forward")(lambda model: setattr(model.net[2], "forward", lambda x: torch.ones(3) * x.sum()))


@row("a hook of a layer")
def _():
    layer = nn.Linear(1, 3)

    def body(z):
        pyro.module("layer", layer)
        return layer(z[None]), 1.0

    return Change(program(body), lambda: layer.register_forward_hook(lambda layer, args, y: 2 * y))


@row("the location of an AutoNormal, bound anew")
def _():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, torch.ones(3)).to_event(1), obs=X)

    guide = AutoNormal(model)
    return Change(Run(model, guide, Trace_ELBO()), lambda: setattr(guide.locs, "z", PyroParam(torch.tensor(2.0))))


# Parameters and the param store.


def parameter_program() -> Run:
    def model():
        loc = pyro.param("loc", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
        pyro.sample("x", dist.Normal(loc, scale * torch.ones(3)).to_event(1), obs=X + 0 * torch.rand(()))

    return Run(model, lambda: None, Trace_ELBO())


def store_row(name: str):
    def add(change: Callable[[Any], Any]):
        def build():
            return Change(parameter_program(), lambda: change(pyro.get_param_store()))

        return row(name)(build)

    return add


def restore(store):
    state = store.get_state()
    state = {part: dict(state[part]) for part in state}
    state["params"]["loc"] = torch.tensor(3.0, requires_grad=True)
    store.set_state(state)


def cleared(store):
    store["loc"] = torch.tensor(7.0)
    store.clear()
    store["loc"] = torch.tensor(3.0)


store_row("an entry of the param store, in place")(lambda store: store["loc"].unconstrained().data.add_(1))
store_row("an entry of the param store, bound anew")(lambda store: store.__setitem__("loc", torch.tensor(3.0)))
store_row("a constrained entry of the param store, bound anew")(lambda store: store.__setitem__("scale", torch.tensor(3.0)))
store_row("the state of the param store")(restore)
store_row("the param store cleared, and filled")(cleared)


@row("a parameter without gradient")
def _():
    run = parameter_program()

    def freeze():
        scale = pyro.get_param_store()["scale"].unconstrained()
        scale.requires_grad_(False)
        scale.fill_(1.0)

    return Change(run, freeze)


@row("the shape of a parameter in place")
def _():
    return Change(
        parameter_program(),
        lambda: setattr(pyro.get_param_store()["loc"].unconstrained(), "data", torch.tensor([1.0, 2.0, 3.0])),
    )


@row("the strides of a tensor in a closure")
def _():
    weight = torch.arange(9.0).reshape(3, 3)
    return Change(program(lambda z: (weight @ X + z, 1.0)), lambda: setattr(weight, "data", (weight + 1).t()))


@row("the dtype of a module")
def _():
    layer = nn.Linear(1, 3)

    def body(z):
        pyro.module("layer", layer)
        return layer(z[None].to(layer.weight.dtype)), 1.0

    def to_double():
        layer.double()
        layer.bias.data.add_(1.0)

    return Change(program(body), to_double)


# Arguments.


@row("another argument")
def _():
    return Change(program(lambda z, x: (z * x, 1.0), torch.tensor(2.0)), lambda: ((torch.tensor(3.0),), {}))


@row("an argument of another shape")
def _():
    return Change(program(lambda z, x: (z * x.sum(), 1.0), torch.ones(2)), lambda: ((torch.ones(5),), {}))


@row("an argument of another dtype")
def _():
    return Change(program(lambda z, x: (z * x, 1.0), torch.tensor(2)), lambda: ((torch.tensor(2.5),), {}))


@row("another float argument")
def _():
    return Change(program(lambda z, x: (z * x, 1.0), 2.0), lambda: ((3.0,), {}))


@row("another keyword")
def _():
    return Change(program(lambda z, weight=0.7: (z * weight, 1.0)), lambda: ((), {"weight": 0.2}))


@row("a bool in a dictionary argument")
def _():
    options = {"flip": False, "scale": torch.tensor(1.0)}
    run = program(lambda z, options: (-2 * z if options["flip"] else z, options["scale"]), options)
    return Change(run, lambda: (({"flip": True, "scale": torch.tensor(1.0)},), {}))


@row("an argument that is an object, changed inside")
def _():
    options = types.SimpleNamespace(weight=0.7)
    return Change(program(lambda z, options: (z * options.weight, 1.0), options), lambda: setattr(options, "weight", 0.2))


@row("an argument that is an array, changed inside")
def _():
    array = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    return Change(program(lambda z, x: (z * torch.as_tensor(x), 1.0), array), lambda: array.__imul__(2))


@row("the same tensor as argument and in a closure")
def _():
    x = torch.tensor(2.0)
    return Change(program(lambda z, y: (z * y, x), x), lambda: ((torch.tensor(3.0),), {}))


@row("the default dtype")
def _():
    def change():
        torch.set_default_dtype(torch.float64)

    return Change(program(lambda z: (z + 1e-9 * torch.tensor(1.0) + (torch.tensor(1.0).element_size() - 4), 1.0)), change)


# Handlers, losses, guides.


@row("the data of poutine.condition")
def _():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    data = {"x": torch.tensor(1.0)}
    conditioned = poutine.condition(model, data=data)
    return Change(Run(conditioned, AutoNormal(conditioned), Trace_ELBO()), lambda: data.__setitem__("x", torch.tensor(4.0)))


@row("the factor of poutine.scale")
def _():
    scaled = poutine.scale(scale=0.5)
    run = program(lambda z: (z, 1.0))
    handler = scaled
    model = scaled(run.model)
    return Change(run._replace(model=model), lambda: setattr(handler, "scale", 0.9))


@row("an attribute of the loss")
def _():
    class Weighted(Trace_ELBO):
        """A loss with a weight."""

        weight = 1.0

        def differentiable_loss(self, model, guide, *args, **kwargs):
            return self.weight * super().differentiable_loss(model, guide, *args, **kwargs)

        def loss_and_grads(self, model, guide, *args, **kwargs):
            loss = self.differentiable_loss(model, guide, *args, **kwargs)
            loss.backward()
            return loss.item()

    loss = Weighted()
    return Change(program(lambda z: (z, 1.0))._replace(loss=loss), lambda: setattr(loss, "weight", 2.0))


@row("the number of particles")
def _():
    loss = Trace_ELBO()
    return Change(program(lambda z: (z, 1.0))._replace(loss=loss), lambda: setattr(loss, "num_particles", 3))


def repeat(call: Callable[[], Any], times: int = 8) -> None:
    for _ in range(times):
        call()


def captured_step(loss: CapturedLoss, run: Run) -> Step:
    pyro.set_rng_seed(7)
    value, gradients = loss(*run.args, **run.kwargs)
    return Step(float(value), gradients)


def eager_step(run: Run) -> Step:
    pyro.set_rng_seed(7)
    return eager(run)


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def changed(build: Callable[[], Change], **options: Any) -> tuple[CapturedLoss, Run]:
    """Return a captured loss and its program, after calls, after the change; check that the change matters."""
    run, change = build()
    eager(run)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, **options)
    before = eager_step(run)
    for _ in range(3):
        assert_same_step(captured_step(loss, run), before)
    result = change()
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], tuple):
        run = run._replace(args=result[0], kwargs=result[1])
    after = eager_step(run)
    matters = after.loss != pytest.approx(before.loss, rel=1e-4) or after.gradients.keys() != before.gradients.keys()
    assert matters, "the change does not matter"
    return loss, run


SHOWN = {
    "a tensor of a closure, in place",
    "an array read by torch.as_tensor, in place",
    "the values of a mask in a closure, in place",
    "load_state_dict",
    "a float of a closure",
    "an entry of a dictionary in a dictionary",
    "a buffer bound anew",
    "evaluation mode",
    "a parameter in place",
    "the location of an AutoNormal, bound anew",
    "an entry of the param store, bound anew",
    "the state of the param store",
    "a parameter without gradient",
    "another argument",
    "an argument that is an object, changed inside",
    "an attribute of the loss",
}
"""Rows that are run by default."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SHOWN else pytest.mark.slow) for n in TABLE])
def test_a_change_is_seen(name, default_dtype):
    loss, run = changed(TABLE[name], audit=False)
    assert_same_step(captured_step(loss, run), eager_step(run))
    assert_same_step(captured_step(loss, run), eager_step(run))


# What cannot be seen.


@row("an array by a float", UNSEEN)
def _():
    array = np.array([1.0, 2.0, 3.0])
    return Change(program(lambda z: (z * float(array.sum()), 1.0)), lambda: array.__imul__(2))


@row("what an iterator holds", UNSEEN)
def _():
    array = np.array([0.7])
    values = map(lambda i: float(array[0]), range(10**6))  # noqa: C417
    return Change(program(lambda z: (z * next(values), 1.0)), lambda: array.fill(0.2))


@pytest.mark.parametrize("name", UNSEEN)
def test_the_audit_finds_what_cannot_be_seen(name):
    loss, run = changed(UNSEEN[name])
    with pytest.raises(StaleGraphError, match="same random numbers"):
        repeat(lambda: captured_step(loss, run))


@pytest.mark.parametrize("name", UNSEEN)
def test_the_audit_can_be_switched_off(name):
    loss, run = changed(UNSEEN[name], audit=False)
    repeat(lambda: captured_step(loss, run))
    assert captured_step(loss, run).loss != pytest.approx(eager_step(run).loss, rel=1e-4)


def test_a_counter_of_python_is_found_by_the_audit():
    count = iter(range(10**6))
    run = program(lambda z: (z * (1 + next(count)), 1.0))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE)
    with pytest.raises(StaleGraphError, match="counter"):
        repeat(loss)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_of_others_are_found_by_the_audit(draw):
    run = program(lambda z: (z * draw(), 1.0))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE)
    with pytest.raises(StaleGraphError, match="random numbers of Python or numpy"):
        repeat(loss)


# What is not captured again.


def test_nothing_is_captured_again_without_a_change():
    layer = nn.BatchNorm1d(3)

    def body(z, x):
        pyro.module("layer", layer)
        return layer((z * x)[None].expand(2, 3) + x[:2, None])[0], SETTINGS["scale"]

    run = program(body, torch.ones(3))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE)
    for _ in range(20):
        loss(torch.randn(3))
    assert sum(finding.kind != "audit" for finding in loss.findings) == 1


def test_a_ragged_last_batch_does_not_thrash():
    run = program(lambda z, x: (z * x.sum(), 1.0))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE)
    for _ in range(5):
        for size in (4, 4, 3):
            loss(torch.randn(size))
    assert sum(finding.kind != "audit" for finding in loss.findings) == 2


def test_the_finding_names_what_was_bound_anew():
    weight = 0.7

    def body(z):
        return z * weight, 1.0

    run = program(body)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE)
    loss()
    weight = 0.2
    loss()
    assert any(finding.kind == "changed" and "weight" in finding.name for finding in loss.findings)


def test_capturing_again_and_again_warns():
    weight = 0.0

    def body(z):
        return z * weight, 1.0

    run = program(body)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, audit=False)

    def anneal():
        nonlocal weight
        weight += 0.1
        loss()

    with pytest.warns(RuntimeWarning, match="weight"):
        repeat(anneal)


def test_a_counter_of_the_program_does_not_hide_what_is_called_alike():
    """What every run changes is not watched; that is no reason to be blind to an attribute of the same name."""

    def rate_of(holder):
        return lambda: holder.rate

    ticking, still = types.SimpleNamespace(rate=0.0), types.SimpleNamespace(rate=0.5)
    pair, rates = (ticking, still), (rate_of(ticking), rate_of(still))

    def body(z):
        pair[0].rate += 1
        return z * rates[1](), 1.0

    run = program(body)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, audit=False)
    repeat(loss)
    before = len(loss.findings)
    still.rate = 0.7
    loss()
    assert [(finding.kind, finding.name) for finding in loss.findings[before:]] == [("changed", "pair[1].rate")]


def test_a_keyword_default_is_seen():
    def body(z, *, weight=1.0):
        return z * weight, 1.0

    run = program(body)
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, audit=False)
    loss()
    body.__kwdefaults__["weight"] = 0.2
    loss()
    assert [finding.name for finding in loss.findings] == ["", "the default weight of body"]


def test_arguments_that_are_other_objects_each_time_warn_and_are_not_kept():
    run = program(lambda z, x: (z * torch.as_tensor(x).sum(), 1.0))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, audit=False)
    arrays = [np.full(3, i, dtype=np.float32) for i in range(20)]
    kept = [weakref.ref(x) for x in arrays]
    for x in arrays[:7]:
        loss(x)
    with pytest.warns(RuntimeWarning, match=r"8 times: the argument args was array\(.*, \.\.\.\."):
        loss(arrays[7])
    for x in arrays[8:]:  # no further warning
        loss(x)
    del arrays, x
    gc.collect()
    assert sum(reference() is not None for reference in kept) <= MAX_PROGRAMS


def test_an_argument_that_is_no_number_is_captured_once():
    run = program(lambda z, x: (z, 1.0 if x != x else x))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=MODE, audit=False)
    for _ in range(3):
        loss(float("nan"))
    loss(2.0)
    assert [finding.kind for finding in loss.findings] == ["capture", "capture"]


@pytest.mark.slow
def test_compiled_code_is_for_the_strides_of_its_arguments():
    """Inductor writes strides into its code: a transposed argument of the same shape needs code of its own."""
    run = program(lambda z, x: (z * (x @ torch.arange(3.0)), 1.0), torch.randn(3, 3))
    loss = CapturedLoss(run.model, run.guide, run.loss, mode=Compiled(), audit=False)
    for x in (run.args[0], run.args[0].t(), run.args[0].t().contiguous()):
        other = run._replace(args=(x,))
        assert_same_step(captured_step(loss, other), eager_step(other))


# The same in steps of CompiledSVI.


@pytest.mark.parametrize(
    "name",
    [
        "a float of a closure",
        "an entry of the param store, bound anew",
        pytest.param("evaluation mode", marks=pytest.mark.slow),
    ],
)
def test_a_change_between_steps_is_seen(name):
    """Steps of CompiledSVI before and after a change are those of SVI."""
    losses = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"mode": MODE})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        run, change = TABLE[name]()
        svi = cls(run.model, run.guide, Adam({"lr": 0.05}), run.loss, **options)
        found = [float(svi.step()) for _ in range(4)]
        change()
        losses.append(found + [float(svi.step()) for _ in range(4)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-4)


def test_the_learning_rate_and_other_options_of_the_optimiser_are_seen():
    losses = []
    for cls, options in ((SVI, {}), (CompiledSVI, {"mode": MODE})):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        run, optim = parameter_program(), SGD({"lr": 0.01, "momentum": 0.5})
        svi = cls(run.model, run.guide, optim, run.loss, **options)
        found = [float(svi.step()) for _ in range(4)]
        for optimizer in optim.optim_objs.values():
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.param_groups[0]["momentum"] = 0.9
        losses.append(found + [float(svi.step()) for _ in range(4)])
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-4)
