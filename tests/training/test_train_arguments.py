"""What `train` accepts as data and options, and how it refuses everything else."""

import importlib.util
import threading
from functools import partial

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import GAN, MAF, Adversarial, Flow, Labels, MaximumLikelihood, log_likelihood, to_arviz, train
from pyro_genmodels._pyro import handlers
from pyro_genmodels.datasets import load
from pyro_genmodels.training import Checkpoint, base_step, checkpoints

train = partial(train, progress=False)


def flow(**kwargs):
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)), **kwargs)


def no_guide(*args, **kwargs):
    pass


X, C = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 30)[:, None]


# Wrong arguments.


def swallowing(x, *, batch_size=None):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1), obs=x)


CONDITIONAL = {"fit": lambda: flow(context=1), "context": C}
BAD = {
    "a distribution": ({"fit": lambda: flow()()}, TypeError, "Pass the family itself, not the distribution"),
    "a class": ({"fit": lambda: Flow}, TypeError, r"found the class Flow: build it, as in Flow\(\.\.\.\)"),
    "a model alone": ({"fit": lambda: swallowing}, TypeError, r"a pair \(model, guide\), but found function"),
    "a network": ({"fit": lambda: nn.Linear(2, 1)}, TypeError, "but found Linear"),
    "an optimiser": ({"optim": torch.optim.Adam([nn.Parameter(X)])}, TypeError, r"function of the parameters.*found a Adam"),
    "an optimiser's name": ({"optim": "adam"}, TypeError, r"functools\.partial.*found a str"),
    "no optimiser": ({"optim": lambda parameters: None}, TypeError, "it returned NoneType"),
    "a class of objectives": ({"objective": MaximumLikelihood}, TypeError, "the class MaximumLikelihood; call it"),
    "the class Adversarial": ({"objective": Adversarial}, TypeError, "the class Adversarial; call it"),
    "an objective's name": ({"objective": "elbo"}, TypeError, "objective wants a Pyro loss.*found str"),
    "max_seconds=0": ({"max_seconds": 0}, ValueError, "positive number as max_seconds"),
    "max_seconds=True": ({"max_seconds": True}, ValueError, "positive number as max_seconds.*found True"),
    "clip_norm=True": ({"clip_norm": True}, ValueError, "positive number as clip_norm.*found True"),
    "clip_norm=0": ({"clip_norm": 0}, ValueError, "positive number as clip_norm"),
    "seed='a'": ({"seed": "a"}, ValueError, r"an integer from 0 to 2\*\*32 - 1 as seed, or None, but found 'a'"),
    "seed=-1": ({"seed": -1}, ValueError, "as seed.*found -1"),
    "seed=1.5": ({"seed": 1.5}, ValueError, r"as seed.*found 1\.5"),
    "seed=2**32": ({"seed": 2**32}, ValueError, "as seed.*found 4294967296"),
    "ema_decay=2": ({"ema_decay": 2}, ValueError, r"decay such as 0\.999.*found 2"),
    "ema_decay=True": ({"ema_decay": True}, ValueError, r"decay such as 0\.999.*found True"),
    "ema_decay='yes'": ({"ema_decay": "yes"}, ValueError, r"decay such as 0\.999.*found 'yes'"),
    "threads=0": ({"threads": 0}, ValueError, "integer threads of 1 or more, but found 0"),
    "epochs=1.5": ({"epochs": 1.5}, ValueError, r"integer epochs of 1 or more, but found 1\.5"),
    "batch_size=True": ({"batch_size": True}, ValueError, "integer batch_size of 1 or more, but found True"),
    "checkpoint=True": ({"checkpoint": True}, TypeError, r"a path or a Checkpoint\(path\)"),
    "the class Checkpoint": ({"checkpoint": Checkpoint}, TypeError, r"a path or a Checkpoint\(path\)"),
    "model_kwargs of a family": ({"model_kwargs": {"temperature": 1.0}}, TypeError, "temperature"),
    "model_kwargs of no names": ({"model_kwargs": ["a"]}, TypeError, "model_kwargs as a dictionary"),
    "no data": ({"data": None}, TypeError, "found NoneType"),
    "data by name": ({"data": "moons"}, TypeError, "found str"),
    "a record of data": ({"data": load("moons")}, TypeError, r"found Dataset\. Pass its rows, such as data\.train"),
    "empty data": ({"data": X[:0]}, ValueError, "at least one row"),
    "one number": ({"data": 1.0}, ValueError, "the single number 1"),
    "rows of different lengths": ({"data": [[1.0, 2.0], [3.0]]}, TypeError, "rows differ in shape"),
    "words in a frame": ({"data": pd.DataFrame({"a": ["u"], "b": [1.0]})}, TypeError, "the column 'a' holds str"),
    "one dimension": ({"fit": lambda: Flow((1,)), "data": X[:, 0]}, ValueError, r"data of shape \(N, 1\), but found \(30,\)"),
    "another shape": ({"data": X[:, :1]}, ValueError, r"data of shape \(N, 2\), but found \(30, 1\)"),
    "integers": ({"data": X.long()}, ValueError, r"models real numbers, but was given data of torch\.int64"),
    "context of another length": ({**CONDITIONAL, "context": C[:9]}, ValueError, "30 rows of data but 9 of context"),
    "context of another width": ({**CONDITIONAL, "context": X}, ValueError, r"context of floats, \(\.\.\., 1\).*\(30, 2\)"),
    "context with NaN": ({**CONDITIONAL, "context": C / 0 * 0}, ValueError, "NaN or infinite values in argument 2"),
    "no context": ({**CONDITIONAL, "context": None}, ValueError, "wants a context, but was given none"),
    "superfluous context": ({"context": C}, ValueError, "built without a context"),
    "context twice": ({**CONDITIONAL, "data": (X, C)}, ValueError, "leave context= out"),
    "x and context swapped": ({**CONDITIONAL, "data": C, "context": X}, ValueError, r"Swap them: \(x, context\)"),
    "labels of floats": ({"fit": lambda: flow(context=Labels(2)), "context": C[:, 0]}, ValueError, "Labels wants integers"),
    "valid of another form": (
        {**CONDITIONAL, "valid": X},
        ValueError,
        r"valid holds argument 1, but the data hold .*argument 2",
    ),
    "valid of another shape": ({"valid": X[:, :1]}, ValueError, r"data of shape \(N, 2\), but found \(30, 1\)"),
    "valid=True": ({"valid": True}, ValueError, "a share of the data between 0 and 1, but found True"),
    "valid=20": ({"valid": 20}, ValueError, "a share of the data between 0 and 1, but found 20"),
    "valid by name": ({"valid": "auto"}, TypeError, "found str"),
    "a share of a loader": ({"data": DataLoader(X), "valid": 0.1}, TypeError, "random_split"),
    "unknown keys": ({"data": {"y": X}}, ValueError, "the keys 'x' and 'context', but found y"),
    "a key of ours": ({"fit": lambda: (swallowing, no_guide), "data": {"x": X, "size": X}}, ValueError, "Rename it"),
    "a keyword of both": ({"fit": lambda: (swallowing, no_guide), "batch_size": 8}, ValueError, "model_kwargs={'batch_size': "),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments_are_refused_in_one_line(arguments, error, message):
    arguments = {"fit": flow, "data": X, "epochs": 1, **arguments}
    fit = arguments.pop("fit")()
    with pytest.raises(error, match=message) as found:
        train(fit, arguments.pop("data"), **arguments)
    assert "\n" not in str(found.value)


# Data in other forms.


FORMS = {
    "array": X.numpy(),
    "array of doubles": X.double().numpy(),
    "list": X.tolist(),
    "frame": pd.DataFrame(X.numpy(), columns=["a", "b"]),
    "dictionary": {"x": X},
    "tuple": (X,),
    "TensorDataset": TensorDataset(X),
}


@pytest.mark.parametrize("data", FORMS.values(), ids=FORMS)
def test_data_train_alike_in_every_form(data):
    def losses(data):
        pyro.set_rng_seed(0)
        fit = train(flow(), data, valid=data, epochs=2, batch_size=8, seed=1)
        return [(record["train"], record["valid"]) for record in fit.history]

    assert losses(data) == losses(X)


def regression(x, covariates, *, scale=1.0):
    a, b = pyro.param("a", torch.tensor(0.0)), pyro.param("b", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(a * covariates[0] + b * covariates[1], scale), obs=x)


def by_name(*, x, covariates, scale=1.0):
    regression(x, [covariates["a"], covariates["b"].squeeze(-1)], scale=scale)


@pytest.mark.parametrize("form", ["list", "dictionary", "loader", "loader of dictionaries"])
def test_covariates_go_with_their_rows(form):
    """Rows of 2 a - 3 b: least squares finds the coefficients only if each row has its own covariates."""
    a, b = torch.randn(60), torch.randn(60)
    x = 2 * a - 3 * b
    named = {"x": x, "covariates": {"a": a.numpy(), "b": pd.DataFrame(b.numpy())}}
    rows = [{"x": x[i], "covariates": {"a": a[i], "b": b[i : i + 1]}} for i in range(60)]
    model, data = {
        "list": (regression, (x, [a, b])),
        "dictionary": (by_name, named),
        "loader": (regression, DataLoader(TensorDataset(x, torch.stack([a, b], 1)), batch_size=20, collate_fn=_columns)),
        "loader of dictionaries": (by_name, DataLoader(rows, batch_size=20, shuffle=True)),
    }[form]
    options = {"optim": partial(torch.optim.Adam, lr=0.5), "epochs": 25, "batch_size": 20}
    train((model, no_guide), data, valid=data, model_kwargs={"scale": 2.0}, **options)
    assert pyro.param("a").item() == pytest.approx(2, abs=0.05)
    assert pyro.param("b").item() == pytest.approx(-3, abs=0.05)


def _columns(rows):
    x, covariates = zip(*rows, strict=True)
    return torch.stack(x), list(torch.stack(covariates, 1))


@pytest.mark.parametrize("make", [flow, lambda: GAN((2,))], ids=["flow", "gan"])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: DataLoader(x, batch_size=10)], ids=["tensor", "loader"])
def test_a_constant_column_is_said_once(make, form):
    x = torch.stack([X[:, 0], torch.full((30,), 3.0)], 1)
    with pytest.warns(UserWarning, match="constant") as found:
        train(make(), form(x), valid=form(x), epochs=3, batch_size=10)
    assert len(found) == 1


def test_a_constant_column_is_said_in_a_model_of_ones_own():
    x, family = torch.stack([X[:, 0], torch.full((30,), 3.0)], 1), flow()

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", family(), obs=x)

    with pytest.warns(UserWarning, match="constant"):
        family.standardize(x)
    train((model, no_guide), x, epochs=2)  # not again


def test_a_constant_context_is_said_once():
    with pytest.warns(UserWarning, match="constant") as found:
        train(flow(context=1), X, context=torch.full((30, 1), 2005.0), epochs=2)
    assert len(found) == 1


def test_a_share_is_held_out():
    def fitted(seed):
        pyro.set_rng_seed(0)
        return train(flow(), X, valid=0.2, epochs=2, seed=seed)

    fit = fitted(3)
    rows = fit.held_out
    assert len(rows) == 6
    kept = torch.ones(30, dtype=torch.bool)
    kept[rows] = False
    pyro.set_rng_seed(0)
    by_hand = train(flow(), X[kept], valid=X[rows], epochs=2, seed=3)
    assert [r["valid"] for r in by_hand.history] == [r["valid"] for r in fit.history]
    assert torch.equal(fitted(3).held_out, rows)
    assert not torch.equal(fitted(4).held_out, rows)
    assert by_hand.held_out is None
    with_context = train(flow(context=1), (X, C), valid=0.5, epochs=1)
    assert torch.allclose(with_context.family.context.loc, C[sorted({*range(30)} - {*with_context.held_out.tolist()})].mean(0))


def test_a_run_that_holds_out_a_share_goes_on_with_the_same_rows(tmp_path):
    whole = train(flow(), X, valid=0.2, epochs=1, checkpoint=tmp_path / "c")
    resumed = train(flow(), X, valid=0.2, epochs=2, checkpoint=Checkpoint(tmp_path / "c", resume=True))
    assert torch.equal(whole.held_out, resumed.held_out)
    assert len(resumed.history) == 2


def test_the_models_keyword_is_passed_on():
    seen = []

    def model(x, batch_size=None):
        seen.append(batch_size)
        swallowing(x)

    train((model, no_guide), X, epochs=1, batch_size=30, model_kwargs={"batch_size": 7})
    assert set(seen) == {7}
    pyro.clear_param_store()
    seen.clear()
    train((model, no_guide), X, epochs=1)  # no batch_size= of train: no clash
    assert set(seen) == {None}
    with pytest.raises(ValueError, match="batch_size= is a keyword of train and of the model"):
        train((model, no_guide), X, epochs=1, batch_size=128)  # its default, but given
    seen.clear()
    train((model, no_guide), (X, torch.ones(len(X))), epochs=1, batch_size=1000)  # the data fill it
    train((model, no_guide), {"x": X, "batch_size": torch.ones(len(X))}, epochs=1, batch_size=1000)
    assert all(len(found) == len(X) for found in seen)


# Models that draw their minibatches themselves.

Y, LOC = torch.linspace(-1.0, 4.0, 50), torch.tensor(0.5)
STILL = partial(torch.optim.SGD, lr=0.0)


def point(model):
    return lambda y: pyro.sample("loc", dist.Delta(pyro.param("q", LOC.clone())))


def subsampling(size, count):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        with pyro.plate("data", size or len(y), subsample_size=count) as rows:
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y[rows])

    return model


@pytest.mark.parametrize("batch_size", [10, 17, 20, 128])
@pytest.mark.parametrize("size", [None, 50], ids=["len(y)", "50"])
@pytest.mark.parametrize("make_guide", [lambda model: AutoDelta(model, init_loc_fn=init_to_value(values={"loc": LOC})), point])
def test_a_model_that_subsamples_is_given_all_rows(make_guide, size, batch_size):
    """With equal rows and a guide without noise each step has the loss of all rows, and shared variables count once."""
    model = subsampling(size, 20)
    fit = train((model, make_guide(model)), torch.ones(50), epochs=1, batch_size=batch_size, optim=STILL)
    loss = -dist.Normal(LOC, 1.0).log_prob(torch.ones(50)).sum() - dist.Normal(0.0, 3.0).log_prob(LOC)
    assert fit.best["train"] == pytest.approx(loss.item() / 50, rel=1e-5)


def test_a_model_that_subsamples_takes_as_many_steps_as_it_has_minibatches():
    sizes = []

    def model(y):
        with pyro.plate("data", 50, subsample_size=20) as rows:
            sizes.append((len(y), len(rows)))
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=y[rows])

    train((model, no_guide), Y, epochs=2)
    assert sizes[-6:] == [(50, 20)] * 6
    assert len(sizes) <= 6 + 3


def test_local_latents_of_a_model_that_subsamples_are_all_trained():
    def model(y):
        with pyro.plate("data", len(y), subsample_size=10) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])

    guide = AutoNormal(model)
    train((model, guide), Y, epochs=15, optim=partial(torch.optim.Adam, lr=0.2), batch_size=20)
    assert guide.locs.z.shape == (50,)
    assert (guide.locs.z - Y / 2).square().mean() < 0.3 < (Y / 2).square().mean()


@pytest.mark.parametrize(("width", "most"), [(1, 10_000), (2**10, 64), (2**12, 50)], ids=["narrow", "wide", "wider"])
def test_the_first_look_at_a_model_takes_little_memory(width, most, monkeypatch):
    """10,000 images of 256 x 256 pixels in three colours took 8 GB, by whatever batch size."""
    monkeypatch.setattr(base_step, "MANY_BYTES", 2**18)
    seen = []

    def model(x):
        seen.append(len(x))
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).expand([width]).to_event(1), obs=x)

    train((model, no_guide), torch.zeros(10_100 if width == 1 else 100, width), epochs=1, batch_size=50)
    assert max(seen) == most


def test_memory_that_is_short_at_the_first_look_is_an_error():
    def model(x):
        pyro.param("loc", torch.tensor(0.0))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        train((model, no_guide), Y, epochs=1)


def test_a_plate_that_fits_the_batch_is_left_alone():
    """``plate("data", size, subsample_size=len(x))`` is how a model scales the minibatch that it is given."""
    seen = []

    def model(x, *, size):
        seen.append(len(x))
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=x)

    train((model, no_guide), Y, epochs=1, batch_size=25)
    assert seen == [50, 25, 25, 25]  # the first looks for plates that subsample


def test_models_that_subsample_need_all_rows():
    fixed = (subsampling(50, 20), no_guide_of_loc)
    with pytest.raises(TypeError, match=r"minibatches of 20 rows itself \(subsample_size\).*not in a DataLoader"):
        train(fixed, DataLoader(Y, batch_size=10), epochs=1)
    with pytest.raises(ValueError, match=r"a plate of 50 rows for any data, but valid has 9\. .*len\(x\)"):
        train(fixed, Y, valid=Y[:9], epochs=1)
    free = (subsampling(None, 5), no_guide_of_loc)
    assert train(free, Y, valid=Y[:9], epochs=1).best["valid"] > 0


def no_guide_of_loc(y):
    pyro.sample("loc", dist.Normal(pyro.param("q", torch.tensor(0.0)), 1.0))


def test_other_index_errors_are_not_touched():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.zeros(3))[7], 1.0), obs=y)

    with pytest.raises(IndexError):
        train((model, no_guide), Y, epochs=1)


# Threads.


def test_threads_are_set_for_the_training_only():
    seen = []

    def model(x):
        seen.append(torch.get_num_threads())
        swallowing(x)

    before = torch.get_num_threads()
    train((model, no_guide), X, epochs=1, threads=2)
    assert set(seen) == {2}
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeError, match="stop"):
        train((lambda x: _stop(), no_guide), X, epochs=1, threads=2)
    assert torch.get_num_threads() == before


def _stop():
    raise RuntimeError("stop")


class Elsewhere:
    """Another thread that is inside `train` until the block ends."""

    def __enter__(self):
        self.inside, self.go_on, self.errors = threading.Event(), threading.Event(), []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.inside.wait(20)
        return self

    def __exit__(self, *exc):
        self.go_on.set()
        self.thread.join()

    def run(self):
        def model(x):
            self.inside.set()
            assert self.go_on.wait(20)
            swallowing(x)

        try:
            train((model, no_guide), X, epochs=1)
        except BaseException as error:
            self.errors.append(error)


def test_a_second_thread_is_refused_and_the_first_goes_on():
    fit, gan = flow(), GAN((2,))
    calls = {
        "train": lambda: train(flow(), X, epochs=1),
        "log_likelihood": lambda: log_likelihood(fit, X),
        "to_arviz": lambda: to_arviz(fit, num_samples=10),
        "step": lambda: Adversarial(gan.model, gan.critic).step(X),
    }
    with Elsewhere() as other:
        for call in calls.values():
            with pytest.raises(RuntimeError, match=r"while train runs in another thread.*joblib\.Parallel"):
                call()
    assert other.errors == []
    for call in calls.values():
        call()


def test_calls_may_be_nested_and_errors_release():
    with handlers.exclusive("a"), handlers.exclusive("b"):
        pass
    with pytest.raises(KeyError), handlers.exclusive("a"):
        raise KeyError
    errors = []

    def run():
        try:
            with handlers.exclusive("c"):
                pass
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


def test_a_fork_before_another_thread_is_listed_leaves_no_lock(monkeypatch):
    monkeypatch.setattr(handlers, "_lock", threading.RLock())
    monkeypatch.setattr(handlers, "_running", [])
    thread = threading.Thread(target=handlers._lock.acquire)  # another thread between the lock and its entry
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="another call runs in another thread"), handlers.exclusive("train"):
        pass
    handlers._after_fork()
    with handlers.exclusive("train"):
        pass


def test_a_fork_inside_a_run_keeps_its_lock():
    with handlers.exclusive("train"):
        lock = handlers._lock
        handlers._after_fork()
        assert handlers._lock is lock
        assert len(handlers._running) == 1


def test_a_system_without_forks_can_import_the_handlers(monkeypatch):
    monkeypatch.delattr("os.register_at_fork")
    spec = importlib.util.find_spec("pyro_genmodels._pyro.handlers")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_forked_process_is_free_of_another_threads_lock():
    inside, go_on = threading.Event(), threading.Event()

    def hold():
        with handlers.exclusive("train"):
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(20)
    lock, running = handlers._lock, list(handlers._running)
    try:
        handlers._after_fork()  # as the main thread of a forked process does
        with handlers.exclusive("train"):
            pass
    finally:
        handlers._lock = lock
        handlers._running[:] = running
        go_on.set()
        thread.join()


def test_svi_in_one_thread_is_as_ever():
    svi = SVI(swallowing, no_guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    assert np.isfinite(svi.step(X))


def test_contexts_of_another_kind_are_told_with_all_their_rows():
    x, numbers = torch.randn(300, 2), torch.arange(600).reshape(300, 2)
    with pytest.raises(ValueError, match=r"found torch\.int64 of shape \(300, 2\)"):
        train(Flow((2,), context=2), x, context=numbers, epochs=1, progress=False)
    with pytest.raises(ValueError, match="found 0 to 299"):
        train(Flow((2,), context=Labels(3)), x, context=torch.arange(300), epochs=1, progress=False)


def test_numbers_of_numpy_are_integers_too(tmp_path):
    family = Flow((np.int64(2),), context=np.int32(3), name="numbers")
    assert family.event_shape == (2,)
    fit = train(family, torch.randn(20, 2), context=torch.randn(20, 3), epochs=1, seed=np.int64(7), progress=False)
    assert type(fit.family.context_size) is int
    with pytest.raises(ValueError, match=r"wants an event_shape of positive integers"):
        Flow((np.float64(2.0),))
    path = checkpoints.save(tmp_path / "flow", family)
    assert checkpoints.load(path).event_shape == (2,)
