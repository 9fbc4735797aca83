"""`CompiledSVI` makes the steps of `SVI`: the same losses and parameters, for every optimiser, and in every way to run it."""

import pickle
from math import sqrt

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from marks import slow_unless
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_uniform
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import to_arviz
from pyro_genmodels.infer.compiled import (
    Captured,
    CapturedLoss,
    CaptureError,
    CompiledSVI,
    Eager,
    StaleGraphError,
    captures,
    updates,
)
from pyro_genmodels.infer.compiled import stepper as stepper_module
from pyro_genmodels.infer.compiled.steps import choose_unroll

X = torch.tensor([0.3, -1.2, 2.5, 0.7, 1.1])
PYTHON = Captured(script=False)  # builds in no time


def model(x=X):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, scale), obs=x)


def steps(make, optim, n=12, fit=model, loss=Trace_ELBO, **options):
    """The losses of some steps, and the parameters after them."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = make(fit, AutoNormal(fit), optim(), loss(), **options)
    losses = [svi.step(X) for _ in range(n)]
    return torch.tensor(losses), {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def per_parameter(module, name=None):
    return {"lr": 0.1 if "locs" in (name or module) else 0.01}


def schedule():
    return pyro.optim.ExponentialLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.8})


OPTIMISERS = {
    "Adam": lambda: pyro.optim.Adam({"lr": 0.03}),
    "ClippedAdam": lambda: pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.9, "clip_norm": 0.5, "weight_decay": 0.1}),
    "SGD, momentum": lambda: pyro.optim.SGD({"lr": 0.003, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "Adagrad": lambda: pyro.optim.Adagrad({"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "clipped": lambda: pyro.optim.Adam({"lr": 0.03}, {"clip_norm": 0.3, "clip_value": 0.2}),
    "options by parameter": lambda: pyro.optim.Adam(per_parameter),
}


@pytest.mark.parametrize("name", slow_unless(["Adam", "ClippedAdam", "SGD, momentum"], [*OPTIMISERS]))
def test_steps_are_those_of_svi(name):
    losses, parameters = steps(SVI, OPTIMISERS[name])
    captured, others = steps(CompiledSVI, OPTIMISERS[name], mode=PYTHON)
    torch.testing.assert_close(captured, losses, rtol=1e-5, atol=1e-5)
    for key, p in parameters.items():
        torch.testing.assert_close(others[key], p, rtol=1e-4, atol=1e-5)


def test_script_and_eager_modes_make_the_same_steps():
    losses, _ = steps(SVI, OPTIMISERS["Adam"])
    for mode in (Captured(), Eager()):
        torch.testing.assert_close(steps(CompiledSVI, OPTIMISERS["Adam"], mode=mode)[0], losses, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_compiler_makes_the_same_steps():
    losses, _ = steps(SVI, OPTIMISERS["Adam"])
    torch.testing.assert_close(steps(CompiledSVI, OPTIMISERS["Adam"])[0], losses, rtol=1e-4, atol=1e-4)


def test_a_schedule_is_followed():
    def run(make, **options):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        optim = schedule()
        svi = make(model, AutoNormal(model), optim, Trace_ELBO(), **options)
        losses = []
        for _ in range(4):
            losses += [svi.step(X) for _ in range(3)]
            optim.step()
        return torch.tensor(losses)

    torch.testing.assert_close(run(CompiledSVI, mode=PYTHON), run(SVI), rtol=1e-5, atol=1e-5)


def test_other_optimisers_run_outside_and_say_so():
    optim = lambda: pyro.optim.Adadelta({"lr": 0.5})  # noqa: E731
    losses, _ = steps(SVI, optim)
    with pytest.warns(UserWarning, match="outside of the graph.*Adadelta has no formula"):
        captured, _ = steps(CompiledSVI, optim, mode=PYTHON)
    torch.testing.assert_close(captured, losses, rtol=1e-5, atol=1e-5)


def test_the_optimiser_can_be_saved_and_gone_on_with(tmp_path):
    """State that the graph has written is read by Pyro's optimiser, and the other way round."""
    pyro.set_rng_seed(1)
    optim = pyro.optim.Adam({"lr": 0.03})
    guide = AutoNormal(model)
    stock, compiled = SVI(model, guide, optim, Trace_ELBO()), CompiledSVI(model, guide, optim, Trace_ELBO(), mode=PYTHON)
    mixed = [(compiled if i % 3 else stock).step(X) for i in range(12)]
    expected, _ = steps(SVI, OPTIMISERS["Adam"])
    torch.testing.assert_close(torch.tensor(mixed), expected, rtol=1e-5, atol=1e-5)


def test_evaluate_loss_makes_no_step():
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), TraceMeanField_ELBO(), mode=PYTHON)
    svi.step(X)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    pyro.set_rng_seed(2)
    found = svi.evaluate_loss(X)
    pyro.set_rng_seed(2)
    assert found == pytest.approx(SVI(model, svi.guide, svi.optim, svi.loss).evaluate_loss(X), rel=1e-6)
    for name, p in pyro.get_param_store().named_parameters():
        assert torch.equal(p, before[name])


def test_losses_of_enumerated_models_are_evaluated():
    def mixture():
        p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
        k = pyro.sample("k", dist.Bernoulli(p), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2 * k, 1.0), obs=torch.tensor(1.5))

    svi = CompiledSVI(mixture, lambda: None, pyro.optim.Adam({"lr": 0.1}), TraceEnum_ELBO(max_plate_nesting=0), mode=PYTHON)
    svi.step()
    assert svi.evaluate_loss() == pytest.approx(svi._stock.evaluate_loss(), rel=1e-6)


def test_a_step_that_computes_another_loss_is_found():
    """Built code that is wrong, as by a fault of a compiler, is compared with the program too."""

    class Wrong(Captured):
        def build(self, graph, inputs):
            return lambda *tensors: [graph.module(*tensors)[0] * 1.1]

    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=Wrong(script=False))
    svi.step(X)
    with pytest.raises(StaleGraphError, match="gives a loss of"):
        svi.step(X)


@pytest.mark.parametrize("disturb", ["parameter", "exp_avg_sq"])
def test_a_step_that_changes_something_else_is_found(disturb):
    """Built code whose loss is right may do wrong to a parameter, or to the state of its optimiser."""

    name = "AutoNormal.locs.loc"

    class Wrong(Captured):
        def build(self, graph, inputs):
            def run(*tensors):
                losses = graph.module(*tensors)
                p = pyro.param(name).unconstrained()
                (p.data if disturb == "parameter" else svi.optim.optim_objs[p].state[p][disturb]).mul_(1.01)
                return losses

            return run

    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=Wrong(script=False))
    svi.step(X)
    place = "the parameter" if disturb == "parameter" else f"{disturb} of the optimiser for the parameter"
    with pytest.raises(StaleGraphError, match=f"changes {place} {name} otherwise"):
        svi.step(X)


def test_a_formula_that_is_not_the_optimisers_is_found(monkeypatch):
    right = updates.FORMULAS[torch.optim.Adam]
    wrong = lambda p, g, state, group, lr: right(p, g, state, {**group, "eps": 0.3}, lr)  # noqa: E731
    monkeypatch.setitem(updates.FORMULAS, torch.optim.Adam, wrong)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    svi.step(X)
    with pytest.raises(StaleGraphError, match="otherwise than Adam does"):
        svi.step(X)


# `run`.


@pytest.mark.parametrize("unroll", [1, 2])
def test_run_makes_as_many_steps_as_told(unroll):
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    losses = svi.run(10, X, unroll=unroll, progress=False)
    assert losses.shape == (10,)
    if unroll == 1:
        expected, _ = steps(SVI, OPTIMISERS["Adam"], n=10)
        torch.testing.assert_close(losses.float(), expected, rtol=1e-5, atol=1e-5)


def test_a_number_of_steps_that_is_asked_for_is_taken_after_one_was_chosen():
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    svi.run(60, X, progress=False)  # chooses 1, since nothing pays in so short a run
    svi.run(2, X, unroll=2, progress=False)
    assert ("built", "2 steps") in [(finding.kind, finding.name) for finding in svi.findings]


def test_the_number_of_steps_in_a_graph_is_chosen_anew_for_each_run(monkeypatch):
    asked = []
    monkeypatch.setattr(stepper_module, "choose_unroll", lambda num_steps, *times: asked.append(num_steps) or 1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    for num_steps in (60, 20):
        svi.run(num_steps, X, progress=False)
    assert len(asked) == 2
    assert asked[0] < 60
    assert asked[1] == 20


@pytest.mark.parametrize("optimiser", ["Adam", "ClippedAdam"])
def test_unrolled_steps_are_those_of_single_steps_without_random_numbers(optimiser):
    """The loss of a guide of point masses has no random numbers, so that all ways must agree."""

    def run(unroll):
        pyro.clear_param_store()
        svi = CompiledSVI(model, pyro.infer.autoguide.AutoDelta(model), OPTIMISERS[optimiser](), Trace_ELBO(), mode=PYTHON)
        pyro.set_rng_seed(1)
        return svi.run(7, X, unroll=unroll, progress=False)

    torch.testing.assert_close(run(3), run(1), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_losses_of_unrolled_steps_have_the_law_of_single_steps():
    """A z-test of mean losses at a learning rate of 0. False-alarm rate 1e-5."""

    def losses(unroll):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        svi = CompiledSVI(model, AutoNormal(model), pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), mode=Captured())
        return svi.run(1601, X, unroll=unroll, progress=False)[1:]

    a, b = losses(1), losses(8)
    z = (a.mean() - b.mean()) / sqrt(a.var() / len(a) + b.var() / len(b))
    assert abs(z) < 4.42
    assert len(b.unique()) > 1590  # draws differ from step to step


def test_run_walks_through_a_loader_again_and_again():
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=5)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    assert svi.run(7, loader, progress=False).shape == (7,)


def test_run_ends_early():
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.SGD({"lr": 0.0}), Trace_ELBO(), mode=PYTHON)
    assert len(svi.run(1000, X, patience=10, progress=False)) < 200


def test_a_run_is_saved_and_gone_on_with(tmp_path):
    def fresh():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        return CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)

    svi = fresh()
    svi.run(6, X, checkpoint=tmp_path / "fit.pt", unroll=1, progress=False)
    pyro.set_rng_seed(5)
    expected = svi.run(5, X, unroll=1, progress=False)
    for is_run_before in (True, False):
        svi = fresh()
        if is_run_before:
            svi.evaluate_loss(X)
        svi.load(tmp_path / "fit.pt")
        pyro.set_rng_seed(5)
        torch.testing.assert_close(svi.run(5, X, unroll=1, progress=False), expected, rtol=1e-5, atol=1e-5)


def trained():
    pyro.clear_param_store()
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.3}), Trace_ELBO(), mode=PYTHON)
    svi.run(6, X, progress=False)
    return svi


def test_a_state_waits_for_the_parameters_and_is_not_passed_over():
    state = trained().state_dict()
    pyro.clear_param_store()
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.3}), Trace_ELBO(), mode=PYTHON)
    svi.load_state_dict(state)
    with pytest.raises(ValueError, match=r"waits for a first run.*evaluate_loss"):
        to_arviz(svi, X)
    waiting = svi.state_dict()["parameters"]
    svi.evaluate_loss(X)
    for name, p in state["parameters"].items():
        assert torch.equal(waiting[name], p)
        assert torch.equal(pyro.get_param_store()._params[name], p)
    assert svi.guide.median(X)["loc"] == state["parameters"]["AutoNormal.locs.loc"]


def test_a_state_waits_again_once_the_parameters_are_gone():
    svi = trained()
    state = svi.state_dict()
    svi.run(2, X, progress=False)
    pyro.clear_param_store()
    svi.load_state_dict(state)
    svi.run(1, X, progress=False)
    p = pyro.param("AutoNormal.locs.loc").detach()
    assert p != state["parameters"]["AutoNormal.locs.loc"]
    assert abs(p - state["parameters"]["AutoNormal.locs.loc"]) < 0.31


def test_a_state_of_something_else_is_refused():
    svi = trained()
    state = svi.state_dict()
    name, p = next(iter(state["parameters"].items()))
    with pytest.raises(ValueError, match=r"has the shape \(3,\) in the state to load, but \(\) in Pyro's param store"):
        svi.load_state_dict({**state, "parameters": {name: p.expand(3)}})
    svi.load_state_dict({**state, "parameters": {"other": p}})
    with pytest.raises(ValueError, match=r"has parameters other, which model and guide do not have: they have AutoNormal"):
        svi.step(X)
    several = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO(), mode=PYTHON, num_restarts=2)
    with pytest.raises(ValueError, match="Restarts begin at values of their own"):
        several.load_state_dict(state)


def test_the_number_of_steps_in_a_graph_weighs_compile_time():
    assert choose_unroll(100, 1e-4, 5.0) == 1
    assert choose_unroll(10**8, 1e-4, 5.0) == 64
    assert choose_unroll(10**8, 1e-4, 5.0, "cuda") == 16
    assert choose_unroll(10**8, 1.0, 5.0) == 1


# Losses that are no numbers.


def test_a_loss_that_is_not_finite_says_where():
    def broken(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.param("scale", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(loc, scale), obs=x)

    svi = CompiledSVI(broken, AutoNormal(broken), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    for _ in range(4):
        svi.step(torch.tensor(1.0))
    before = pyro.param("AutoNormal.locs.loc").detach().clone()
    with torch.no_grad():
        pyro.get_param_store()["scale"].fill_(-1.0)
    with pytest.raises(ValueError, match="scale"):
        svi.step(torch.tensor(1.0))
    assert torch.equal(pyro.param("AutoNormal.locs.loc"), before)


def with_buffers():
    """A model with BatchNorm, whose loss can be made infinite."""
    norm = torch.nn.BatchNorm1d(1)

    def model(x, extra):
        loc = pyro.param("loc", torch.tensor(0.5))
        pyro.factor("extra", extra)
        pyro.sample("x", dist.Normal(loc, 1.0).expand([5, 1]).to_event(2), obs=norm(x[:, None]))

    return norm, model


def test_a_step_whose_loss_is_not_finite_is_that_of_svi():
    def run(make, **options):
        pyro.clear_param_store()
        norm, model = with_buffers()
        optim = pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.5})
        svi = make(model, lambda x, extra: None, optim, Trace_ELBO(), **options)
        with pyro.validation_enabled(is_validate=False):
            for extra in (0.0, 0.0, -torch.inf, 0.0):
                svi.step(X, torch.tensor(extra))
        state = next(iter(optim.get_state().values()))
        return (
            pyro.param("loc").item(),
            int(norm.num_batches_tracked),
            state["param_groups"][0]["lr"],
            state["state"][0]["step"],
        )

    assert run(CompiledSVI, mode=PYTHON) == pytest.approx(run(SVI))


def test_unrolled_steps_whose_loss_is_not_finite_are_made_one_by_one():
    def run(make, **options):
        pyro.clear_param_store()
        _, model = with_buffers()
        svi = make(model, lambda x, extra: None, pyro.optim.SGD({"lr": 0.1}), Trace_ELBO(), **options)
        with pyro.validation_enabled(is_validate=False):
            if make is SVI:
                losses = [svi.step(X, torch.tensor(torch.inf)) for _ in range(6)]
            else:
                losses = svi.run(6, X, torch.tensor(torch.inf), unroll=2, progress=False).tolist()
        return [pyro.param("loc").item(), *losses]

    assert run(CompiledSVI, mode=PYTHON) == pytest.approx(run(SVI))


def test_a_parameter_without_a_gradient_moves_as_in_svi():
    """Pyro gives a parameter of the trace a gradient of zeros once it has had one, so that Adam's momentum goes on."""

    def model(flag):
        a, b = pyro.param("a", torch.tensor(1.0)), pyro.param("b", torch.tensor(1.0))
        pyro.factor("loss", -(a**2) - (b**2 if flag else 0.0))

    def run(make, **options):
        pyro.clear_param_store()
        svi = make(model, lambda flag: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), **options)
        for flag in (False, False, True, True, False, False, True):
            svi.step(flag)
        return pyro.param("a").item(), pyro.param("b").item()

    assert run(CompiledSVI, mode=PYTHON) == pytest.approx(run(SVI), rel=1e-5)


def test_gradients_that_share_memory_are_clipped_apart():
    def model():
        pyro.factor("loss", pyro.param("a", torch.tensor(1.0)) + pyro.param("b", torch.tensor(1.0)))

    def clip(module, name=None):
        return {"clip_norm": 0.1 if (name or module) == "a" else 1.0}

    def run(make, **options):
        pyro.clear_param_store()
        svi = make(model, lambda: None, pyro.optim.Adadelta({"lr": 1.0}, clip), Trace_ELBO(), **options)
        for _ in range(5):
            svi.step()
        return pyro.param("a").item(), pyro.param("b").item()

    expected = run(SVI)
    with pytest.warns(UserWarning, match="outside of the graph"):
        assert run(CompiledSVI, mode=PYTHON) == pytest.approx(expected, rel=1e-5)


def test_going_back_to_a_checkpoint_restores_the_optimiser():
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.03}), Trace_ELBO(), mode=PYTHON)
    svi.run(4, X, progress=False)
    state = svi.state_dict()
    pyro.set_rng_seed(5)
    expected = svi.run(4, X, progress=False)
    svi.load_state_dict(state)
    pyro.set_rng_seed(5)
    torch.testing.assert_close(svi.run(4, X, progress=False), expected, rtol=1e-5, atol=1e-5)


def test_loaders_without_batches_and_beside_arguments_are_refused():
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO(), mode=Eager())
    empty = DataLoader(TensorDataset(X), batch_size=64, drop_last=True)
    with pytest.raises(ValueError, match="has no batches"):
        svi.run(5, empty, progress=False)
    with pytest.raises(ValueError, match="takes a DataLoader alone"):
        svi.run(5, X, empty, progress=False)
    with pytest.raises(ValueError, match="leave unroll out"):
        svi.run(5, empty, unroll=4, progress=False)
    with pytest.raises(TypeError, match=r"an iterator, which ends: pass the loader itself"):
        svi.run(5, iter(empty), progress=False)


def test_batches_that_are_dictionaries_are_keyword_arguments_beside_those_of_all_batches():
    seen = []

    def model(x, beta):
        seen.append((x.tolist(), beta.item()))
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)) * beta, 1.0).expand([2]).to_event(1), obs=x)

    loader = DataLoader([{"x": torch.tensor(float(i))} for i in range(4)], batch_size=2)
    svi = CompiledSVI(model, lambda **kwargs: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), mode=Eager())
    svi.run(2, loader, beta=torch.tensor(0.5), progress=False)
    assert seen == [([0.0, 1.0], 0.5), ([2.0, 3.0], 0.5)]


# Restarts.


def bimodal():
    z = pyro.sample("z", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=torch.tensor(2.0))


def test_restarts_find_both_modes():
    pyro.set_rng_seed(1)
    guide = AutoNormal(bimodal, init_loc_fn=init_to_uniform, init_scale=0.05)
    svi = CompiledSVI(bimodal, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON, num_restarts=12)
    losses = svi.run(150, progress=False)
    assert losses.shape == (150, 12)
    best = svi.restarts.select()
    assert losses[-100:].mean(0).argmin() == best
    draws = svi.restarts.samples(40)["z"]
    assert draws.shape[:2] == (12, 40)
    signs = draws.reshape(12, -1).mean(1).sign()
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(abs(pyro.param("AutoNormal.locs.z").item()) - 2) < 0.2
    posterior = to_arviz({"z": draws.reshape(12, 40)}, model=bimodal).posterior
    assert dict(posterior.sizes) == {"chain": 12, "draw": 40}


@pytest.mark.parametrize("optimiser", ["ClippedAdam", "Adagrad", "clipped"])
def test_a_restart_makes_the_steps_of_its_own_fit(optimiser):
    """Without random numbers every restart is the fit that begins where it begins."""
    guide = pyro.infer.autoguide.AutoDelta(model, init_loc_fn=init_to_uniform)
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, guide, OPTIMISERS[optimiser](), Trace_ELBO(), mode=PYTHON, num_restarts=3)
    losses = svi.run(8, X, progress=False)
    first = svi._first_values
    for i in range(3):
        pyro.clear_param_store()
        single = pyro.infer.autoguide.AutoDelta(model)
        SVI(model, single, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(X)
        with torch.no_grad():
            for name, p in pyro.get_param_store().named_parameters():
                p.copy_(first[name][i])
        stock = SVI(model, single, OPTIMISERS[optimiser](), Trace_ELBO())
        expected = [stock.step(X) for _ in range(8)]
        torch.testing.assert_close(losses[:, i].float(), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_restarts_keep_their_parameters_apart_under_several_programs():
    def model(flag):
        names = ("a", "b") if flag else ("b", "a")
        start = {"a": lambda: torch.randn(()) + 5, "b": lambda: torch.randn(()) - 5}
        values = {name: pyro.param(name, start[name]) for name in names}
        pyro.factor("loss", -((values["a"] - 1) ** 2) - (values["b"] + 1) ** 2)

    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, lambda flag: None, pyro.optim.Adam({"lr": 0.3}), Trace_ELBO(), mode=PYTHON, num_restarts=3)
    first = svi.run(60, True, progress=False)
    assert svi.step(False).max() < first[0].min() / 10


def test_the_best_restart_is_selected_and_saved_at_the_end_of_a_run():
    pyro.set_rng_seed(1)
    guide = AutoNormal(bimodal, init_loc_fn=init_to_uniform, init_scale=0.05)
    svi = CompiledSVI(bimodal, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON, num_restarts=3)
    svi.run(20, progress=False)
    best = svi.restarts.values[0][svi.restarts.best()]
    assert torch.equal(svi.restarts.parameters[0], best)
    assert torch.equal(next(iter(svi.state_dict()["parameters"].values())), best)


def test_restarts_that_begin_alike_are_warned_of():
    def point():
        pyro.param("p", torch.tensor(1.0))
        pyro.sample("x", dist.Normal(pyro.param("p"), 1.0), obs=torch.tensor(0.0))

    svi = CompiledSVI(point, lambda: None, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(), mode=PYTHON, num_restarts=2)
    with pytest.warns(UserWarning, match="All 2 restarts begin at the same values"):
        svi.step()


def test_samples_of_restarts_are_of_latent_variables():
    def rows(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
        with pyro.plate("all", len(x), subsample_size=3), pyro.plate("d", 2):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[:3])

    guide = AutoNormal(rows, init_loc_fn=init_to_uniform)
    svi = CompiledSVI(rows, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON, num_restarts=2)
    svi.run(3, X, progress=False)
    assert {name: draws.shape for name, draws in svi.restarts.samples(4, X).items()} == {"loc": (2, 4)}


def test_restarts_need_a_graph():
    guide = AutoNormal(bimodal, init_loc_fn=init_to_uniform)
    svi = CompiledSVI(bimodal, guide, pyro.optim.Adadelta({}), Trace_ELBO(), mode=PYTHON, num_restarts=2)
    with pytest.warns(UserWarning, match="outside of the graph"), pytest.raises(CaptureError, match="Restarts need"):
        svi.step()
    with pytest.raises(ValueError, match="There are no restarts"):
        CompiledSVI(bimodal, AutoNormal(bimodal), pyro.optim.Adam({}), Trace_ELBO(), mode=PYTHON).restarts.best()


# What it is taken for.


def test_it_is_a_fit():
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON)
    svi.run(5, X, progress=False)
    posterior = to_arviz(svi, X, num_samples=30).posterior
    assert set(posterior.data_vars) == {"loc", "scale"}


def test_arguments_are_checked():
    guide, adam, elbo = AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO()
    found = {
        r"None\.": None,
        r"the class torch\.optim\.adam\.Adam\.": torch.optim.Adam,
        r"an object of torch\.optim\.adam\.Adam\.": torch.optim.Adam([X.clone().requires_grad_()]),
        r"a function of pyro\.optim\.pytorch_optimizers; call it": pyro.optim.Adam,
        r"a dict\.": {"lr": 0.1},
    }
    for text, optim in found.items():
        with pytest.raises(TypeError, match=rf"wants an optimiser of pyro\.optim.*but found {text}"):
            CompiledSVI(model, guide, optim, elbo)
    with pytest.raises(TypeError, match=r"found the class Trace_ELBO; call it: Trace_ELBO\(\)"):
        CompiledSVI(model, guide, adam, Trace_ELBO, mode=Eager())
    with pytest.raises(TypeError, match=r"wants a loss, .*but found 'elbo'"):
        CompiledSVI(model, guide, adam, "elbo")
    with pytest.raises(TypeError, match=r"wants a model, .*but found None"):
        CompiledSVI(None, guide, adam, elbo)
    with pytest.raises(TypeError, match=r"wants a guide, .*but found the class AutoNormal; call it"):
        CompiledSVI(model, AutoNormal, adam, elbo)
    with pytest.raises(TypeError, match=r"CapturedLoss wants a guide, .*but found 3"):
        CapturedLoss(model, 3, elbo)
    with pytest.raises(CaptureError, match="TraceGraph_ELBO has no differentiable loss"):
        CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({}), pyro.infer.TraceGraph_ELBO())
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({}), Trace_ELBO(), mode=PYTHON)
    with pytest.raises(ValueError, match="num_steps"):
        svi.run(0, X)
    with pytest.raises(ValueError, match="unroll"):
        svi.run(5, X, unroll=0)


def test_pickling_is_refused_by_name():
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON)
    with pytest.raises(TypeError, match=r"cannot be pickled.*save\(path\)"):
        pickle.dumps(svi)


def test_findings_and_repr_count():
    pyro.set_rng_seed(1)
    svi = CompiledSVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), mode=PYTHON)
    assert repr(svi) == "CompiledSVI(mode=Captured(script=False), 0 steps, 0 captures)"
    svi.run(4, X, progress=False)
    svi.run(4, X, unroll=2, progress=False)
    svi.step(X[:3])
    assert repr(svi) == "CompiledSVI(mode=Captured(script=False), 9 steps, 2 captures)"
    assert [finding.calls for finding in svi.findings if finding.kind == "capture"] == [1, 8]


# Numbers that change.


def annealed(x, beta=1.0):
    loc = pyro.sample("loc", dist.Normal(0.0, 5.0))
    with pyro.poutine.scale(scale=beta), pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


BETA = 1.0


def annealed_by_a_global(x, beta):
    annealed(x, BETA)


@pytest.mark.parametrize(
    ("fit", "text"),
    [
        (annealed, r"the argument beta was 0\.1, 0\.15, 0\.2, \.\.\."),
        pytest.param(annealed_by_a_global, "the global BETA", marks=pytest.mark.slow),
    ],
)
def test_a_number_that_changes_at_each_step_is_left_to_pyro(monkeypatch, fit, text):
    monkeypatch.setattr(captures, "WAIT", 5)

    def run(make, **options):
        global BETA
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        svi = make(fit, AutoNormal(fit), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(), **options)
        losses = []
        for step in range(32):
            BETA = min(1.0, round(0.05 * (step + 1), 2))
            losses.append(svi.step(X, beta=BETA if fit is annealed else X))
        return svi, torch.tensor(losses)

    _, expected = run(SVI)
    with pytest.warns(RuntimeWarning, match=rf"captured 8 times: .*{text}.* Pyro makes the steps .* until 5 are alike"):
        svi, losses = run(CompiledSVI, mode=PYTHON)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    found = [finding.calls for finding in svi.findings if finding.kind in ("capture", "changed")]
    assert found == [*range(1, 9), *([24] if fit is annealed else [14, 20])]  # the number is 1 from step 19 on
