"""Captured programs in threads, in forked processes, pickled and copied."""

import copy
import multiprocessing
import pickle
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from eager_steps import parameters
from programs import CAPTURED, fresh
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam

from pyro_genmodels.infer.compiled import Captured, CapturedLoss, Compiled, CompiledSVI

MODES = pytest.mark.parametrize("mode", [Captured(), pytest.param(Compiled(), marks=pytest.mark.slow)], ids=str)
X = torch.tensor([0.3, -0.2, 1.1])


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


class NormalGuide:
    """A guide that can be pickled."""

    def __call__(self, x):
        pyro.sample("loc", dist.Normal(pyro.param("mean", torch.tensor(0.3)), 1.0))


def in_threads(*functions):
    """Run functions at once, each in a thread of its own, and return their results; an error is raised here."""
    results: list = [None] * len(functions)
    together = threading.Barrier(len(functions))

    def call(i):
        together.wait()
        try:
            results[i] = functions[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@MODES
def test_threads_may_share_a_captured_loss(mode):
    """A loss without random numbers, at several data: each thread gets the losses of its own data."""
    loss = CapturedLoss(model, AutoDelta(model), Trace_ELBO(), mode=mode, audit=False)
    data = [torch.full((3,), float(i)) for i in range(4)]
    wanted = [float(loss(x)[0]) for x in data]
    assert len(set(wanted)) == 4
    found = in_threads(*(lambda x=x: {float(loss(x)[0]) for _ in range(100)} for x in data))
    assert found == [{value} for value in wanted]


@MODES
def test_threads_may_fit_two_programs(mode):
    """Two fits, captured before, make steps at once; the losses are those that each makes alone."""

    def fits():
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        made = []
        for name, x in (("a", X), ("b", X + 1)):
            guide = AutoDelta(model)
            guide._pyro_name = f"guide_{name}"
            svi = CompiledSVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO(), mode=mode, audit=False)
            made.append((svi, x, [svi.step(x) for _ in range(3)]))
        return made

    alone = [[svi.step(x) for _ in range(30)] for svi, x, _ in fits()]
    first, second = fits()
    together = in_threads(*(lambda svi=svi, x=x: [svi.step(x) for _ in range(30)] for svi, x, _ in (first, second)))
    assert together == alone


def test_a_capture_waits_for_another_in_a_thread():
    """Pyro has one stack of handlers: two threads capture one after the other, and each gets its own loss."""
    inside, leave = threading.Event(), threading.Event()

    def held(x):
        inside.set()
        assert leave.wait(60)
        model(x)

    guides = AutoDelta(model), AutoDelta(model)
    for i, guide in enumerate(guides):
        guide._pyro_name = f"guide_{i}"
        pyro.set_rng_seed(0)  # the same first values
        guide(X)

    def second():
        assert inside.wait(60)
        threading.Timer(0.2, leave.set).start()  # while this thread waits
        return float(CapturedLoss(model, guides[1], Trace_ELBO(), mode=Captured())(X)[0])

    found = in_threads(lambda: float(CapturedLoss(held, guides[0], Trace_ELBO(), mode=Captured())(X)[0]), second)
    assert found[0] == found[1] == pytest.approx(Trace_ELBO().loss(model, guides[0], X), rel=1e-6)


def losses_in_child(svi, queue):
    pyro.set_rng_seed(3)
    queue.put(([svi.step(X) for _ in range(5)], {name: x.tolist() for name, x in parameters().items()}))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@MODES
def test_a_forked_process_goes_on_with_the_graph(mode):
    pyro.set_rng_seed(0)
    svi = CompiledSVI(model, AutoNormal(model), Adam({"lr": 0.05}), Trace_ELBO(), mode=mode)
    for _ in range(3):
        svi.step(X)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=losses_in_child, args=(svi, queue))
    child.start()
    losses, fitted = queue.get(timeout=120)
    child.join()
    assert child.exitcode == 0
    pyro.set_rng_seed(3)
    assert losses == [svi.step(X) for _ in range(5)]
    assert fitted == {name: x.tolist() for name, x in parameters().items()}


def test_a_fit_is_saved_by_name_not_pickled():
    svi = CompiledSVI(model, NormalGuide(), Adam({"lr": 0.05}), Trace_ELBO(), mode=Captured())
    svi.step(X)
    with pytest.raises(TypeError, match=r"save\(path\)"):
        pickle.dumps(svi)


def test_a_pickled_loss_captures_anew():
    loss = CapturedLoss(model, NormalGuide(), Trace_ELBO(), mode=Captured())
    pyro.set_rng_seed(3)
    wanted = float(loss(X)[0])
    again = pickle.loads(pickle.dumps(loss))
    pyro.set_rng_seed(3)
    assert float(again(X)[0]) == pytest.approx(wanted, rel=1e-6)


def test_a_copied_loss_captures_anew():
    loss = CapturedLoss(model, NormalGuide(), Trace_ELBO(), mode=Captured())
    pyro.set_rng_seed(3)
    wanted = float(loss(X)[0])
    copied = copy.deepcopy(loss)
    assert copied.findings == []
    pyro.set_rng_seed(3)
    assert float(copied(X)[0]) == pytest.approx(wanted, rel=1e-6)
    assert copied.findings[0].kind == "capture"


# What is special about a step.


def test_a_loss_that_is_not_finite_is_said_by_pyros_own_step():
    def fails(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0 / (x - 5.0)), obs=x)

    svi = CompiledSVI(fails, AutoNormal(fails), Adam({"lr": 0.05}), Trace_ELBO(), mode=Captured())
    for _ in range(3):
        svi.step(X + 10)
    before = parameters()
    with pytest.raises(ValueError, match="Expected parameter scale"):
        svi.step(torch.full((3,), 5.0) - torch.tensor([0.0, 1.0, 2.0]))  # a scale of infinity, and negative ones
    for name, x in parameters().items():
        assert torch.equal(x, before[name]), "the parameters have moved"


def test_evaluate_loss_is_that_of_svi():
    run = fresh(CAPTURED["VAE, BatchNorm"].build)
    stock = SVI(run.model, run.guide, Adam({"lr": 0.01}), run.loss)
    svi = CompiledSVI(run.model, run.guide, Adam({"lr": 0.01}), run.loss, mode=Captured())
    svi.step(*run.args)
    svi.step(*run.args)
    for seed in range(3):
        found = []
        for one in (stock, svi):
            pyro.set_rng_seed(seed)
            found.append(one.evaluate_loss(*run.args))
        assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_handler_around_a_step_is_obeyed():
    """A step inside of `poutine.scale` is Pyro's own: the handler is no part of the program."""
    svi = CompiledSVI(model, AutoDelta(model), Adam({"lr": 0.0}), Trace_ELBO(), mode=Captured())
    losses = [svi.step(X) for _ in range(3)]
    with pyro.poutine.scale(scale=2.0):
        assert svi.step(X) == pytest.approx(2 * losses[-1], rel=1e-5)
