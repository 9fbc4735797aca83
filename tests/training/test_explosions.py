"""Training that goes wrong ends with a warning and the last good parameters, or with an error if there are none."""

from functools import partial
from math import inf, nan

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_genmodels import GAN, MAF, Flow, SlicedWasserstein, train
from pyro_genmodels.training import Checkpoint, Fit
from pyro_genmodels.training import options as training_options

train = partial(train, progress=False)


class Location(PyroModule):
    """Unit normal with a mean: of a mean of 1e8 the loss is 5e15 nats, which is finite."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.loc, 1.0), obs=x)


class Thrown(torch.optim.SGD):
    """Gradient descent that throws the parameters far off at some of its steps."""

    at, to, back, steps = (), 1e8, (), 0  # torch leaves them out where it copies an optimiser

    def __init__(self, parameters, at=(), to=1e8, back=()):
        super().__init__(parameters, lr=0.1)
        self.at, self.to, self.back = at, to, back

    def step(self, closure=None):
        self.steps += 1
        (p,) = self.param_groups[0]["params"]
        if self.steps in self.at:
            p.data.fill_(self.to)
        elif self.steps in self.back:
            p.data.fill_(0.5)
        elif p.abs() < 1e3:
            return super().step(closure)
        return None


def no_guide(*args, **kwargs):
    pass


X = torch.linspace(-1.0, 1.0, 8)


def run(*, at, to=1e8, back=(), epochs=12, **kwargs):
    """Train by one step an epoch."""
    model = Location()
    return model, train((model, no_guide), X, epochs=epochs, optim=partial(Thrown, at=at, to=to, back=back), **kwargs)


@pytest.mark.parametrize("valid", [None, X], ids=["alone", "validated"])
def test_a_finite_explosion_stops_training_and_the_last_good_state_is_kept(valid, tmp_path):
    """The fifth step throws: epoch 6 begins far off, so that epoch 4 is the last that is known to be good."""
    with pytest.warns(RuntimeWarning, match=r"exploded to 5e\+15.*\(epoch 8\); the state of epoch . is kept") as found:
        model, fit = run(at=[5], valid=valid, checkpoint=tmp_path / "c")
    assert [w.filename for w in found] == [__file__]
    assert len(fit.history) == 8  # three epochs with exploded losses: 6, 7 and 8
    assert fit.best["epoch"] == 4
    assert 0 < model.loc < 2
    assert torch.equal(load_file(tmp_path / "c.safetensors")["loc"], model.loc.detach())


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_that_exploded_is_resumed_from_the_state_that_was_kept(ema_decay, tmp_path):
    options = {"ema_decay": ema_decay, "epochs": 8}
    with pytest.warns(RuntimeWarning, match="the state of epoch 4 is kept"):
        model, _ = run(at=[5], checkpoint=tmp_path / "c", **options)
    kept = model.loc.item()
    pyro.clear_param_store()
    model, fit = run(at=[], checkpoint=Checkpoint(tmp_path / "c", resume=True), **options | {"epochs": 9})
    assert fit.best["epoch"] == len(fit.history) == 9
    assert 0 < model.loc < kept < 2


def test_an_explosion_in_the_last_epochs_is_noticed():
    with pytest.warns(RuntimeWarning, match="exploded"):
        model, fit = run(at=[5], epochs=6)
    assert fit.best["epoch"] == 4
    assert abs(model.loc) < 2


def test_an_explosion_in_the_first_epoch_is_an_error():
    model = Location()
    with pytest.raises(FloatingPointError, match="exploded"):
        train((model, no_guide), X.repeat(4), batch_size=8, optim=partial(Thrown, at=[2]))
    assert model.loc == 2.0


def test_training_may_recover():
    model, fit = run(at=[5], back=[7])
    assert fit.best["epoch"] == len(fit.history) == 12
    assert max(record["train"] for record in fit.history) > 1e15
    assert abs(model.loc) < 0.5


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
@pytest.mark.parametrize(("to", "words"), [(1e30, "loss is inf at step 1"), (nan, "a parameter is not finite")])
def test_a_state_whose_loss_is_not_finite_is_not_kept(to, words):
    """Without validation the parameters at the end of an epoch are judged by the first step of the next."""
    with pytest.warns(RuntimeWarning, match=words):
        model, fit = run(at=[5], to=to)
    assert fit.best["epoch"] == 4
    loss = -dist.Normal(model.loc, 1.0).log_prob(X).mean()
    assert loss < fit.best["train"] < 10


HONEST = {
    "many dimensions": [1.2e6, 9e5, 8e5, 7.9e5, 8.1e5],
    "another unit": [-2.1e4, -2.3e4, -2.31e4],
    "through zero": [3.0, 0.001, -2.0, 0.002, 40.0],
    "warm-up of a weight": [0.01, 0.3, 5.0, 60.0, 180.0],
    "outliers in each epoch": [1e9, 9e8, 1.1e9, 9.5e8],
    "around zero": [0.0, 1e-5, -0.02, 7.0, -50.0, 300.0],
}


@pytest.mark.parametrize("losses", HONEST.values(), ids=HONEST)
def test_large_and_rising_losses_may_be_honest(losses):
    fit = Fit(None, usual_loss=max(1.0, abs(losses[0])))
    assert all(fit.append({"epoch": i, "train": loss}) for i, loss in enumerate(losses, 1))
    assert fit.exploded_epochs == 0
    assert fit.best["epoch"] == len(losses)


@pytest.mark.parametrize(
    ("losses", "kept", "exploded"),
    [
        ([2.8, 2.7, 1e16], 2, 1),
        ([2.8, 1e5, 2.6], 3, 0),
        ([1e16, 1e17, 1e18], 0, 3),
        ([1e16, 2.0, 1.9], 3, 0),
        ([-5e3, -6e3, 1e9, 1e9], 2, 2),
    ],
)
def test_what_an_explosion_is(losses, kept, exploded):
    fit = Fit(None, usual_loss=max(1.0, abs(losses[0]) if losses[0] < 1e9 else 0.0))
    for i, loss in enumerate(losses, 1):
        fit.append({"epoch": i, "train": loss})
    assert (fit.best.get("epoch", 0), fit.exploded_epochs) == (kept, exploded)


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_validation_loss_that_is_not_finite_is_never_the_best(bad):
    fit = Fit(None)
    fit.append({"epoch": 1, "train": 1.0, "valid": bad})
    assert fit.best == {}
    fit.append({"epoch": 2, "train": 1.0, "valid": 3.0})
    fit.append({"epoch": 3, "train": 1.0, "valid": bad})
    assert fit.best["epoch"] == 2


def test_an_exploded_epoch_is_not_the_best_whatever_its_validation_loss():
    """A distance of samples may overflow to 0, the best that there is."""
    fit = Fit(None)
    for i, (loss, valid) in enumerate([(1.0, 0.5), (1e20, 0.0)], 1):
        fit.append({"epoch": i, "train": loss, "valid": valid})
    assert fit.best["valid"] == 0.5


def test_a_sample_loss_never_keeps_an_exploded_model():
    """Samples of 1e20: the sliced Wasserstein distance is 1e40, and was 0 in float32."""

    class Scaled(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(self.loc.expand(2), 1.0).to_event(1), obs=x)

    model, x = Scaled(), torch.randn(32, 2)
    with pytest.warns(RuntimeWarning, match="is kept"):
        fit = train(
            (model, no_guide),
            x,
            valid=x,
            objective=SlicedWasserstein(num_projections=8),
            optim=partial(Thrown, at=[3], to=1e20),
        )
    assert fit.best["epoch"] <= 2
    assert model.loc.abs() < 1


class Later(Dataset):
    """Rows of which one is NaN once it was read a number of times."""

    def __init__(self, rows, reads):
        self.rows, self.reads = rows, reads

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.reads -= i == len(self.rows) - 1
        return self.rows[i] if self.reads >= 0 or i < len(self.rows) - 1 else self.rows[i] * nan


def pair():
    def model(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return model, no_guide


FITS = {
    "flow": lambda: Flow((2,), transform=MAF(transforms=1, hidden=(8,))),
    "gan": lambda: GAN((2,)),
    "pair": pair,
}


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
@pytest.mark.parametrize("wrap", [partial(DataLoader, batch_size=4), lambda rows: rows], ids=["loader", "dataset"])
@pytest.mark.parametrize("make", FITS.values(), ids=FITS)
def test_nan_from_a_loader_ends_every_training_alike(make, wrap, monkeypatch):
    """The rows that are looked at first are good."""
    monkeypatch.setattr(training_options, "STANDARDIZE_ROWS", 4)
    words = r"1 of its 4 rows have NaN or infinite values in argument 1, the first of them row \d of the batch"
    options = {"epochs": 4, "batch_size": 4}
    with pytest.raises(FloatingPointError, match=f"step .: {words}$"):
        train(make(), wrap(Later(torch.randn(8, 2), 0)), **options)
    pyro.clear_param_store()
    with pytest.warns(RuntimeWarning, match=f"(?s){words}.*(epoch 3).*is kept"):
        fit = train(make(), wrap(Later(torch.randn(8, 2), 2)), **options)
    assert fit.best["epoch"] == 2
    assert len(fit.history) == 2
    pyro.clear_param_store()
    with pytest.raises(FloatingPointError, match="no epoch has a finite validation loss"):
        train(make(), torch.randn(8, 2), valid=DataLoader(Later(torch.randn(8, 2), 0), 4), epochs=1, batch_size=4)


@pytest.mark.parametrize("make", [FITS["flow"], FITS["gan"]], ids=["flow", "gan"])
@pytest.mark.parametrize(
    "form", [torch.as_tensor, np.asarray, lambda x: x.tolist(), lambda x: DataLoader(x, batch_size=4), lambda x: {"x": x}]
)
def test_rows_with_nan_are_refused_in_every_form(make, form):
    x = torch.randn(8, 2)
    x[5, 1] = nan
    for data, valid in ((form(x), None), (torch.randn(8, 2), form(x))):
        with pytest.raises(ValueError, match="NaN or infinite values in 1 of 8 rows, the first of them row 5"):
            train(make(), data, valid=valid, epochs=1)


@pytest.mark.parametrize("size", [1e39, 1e200, 1e-200])
def test_numbers_out_of_range_are_refused_with_words_and_right_in_double_precision(size):
    x = size * torch.randn(50, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"computes in torch.float32, with numbers .*float64"):
        train(FITS["flow"](), x, epochs=1)
    with pytest.raises(ValueError, match=r"torch\.float32 cannot hold data of") if size > 1 else pytest.warns(RuntimeWarning):
        train(pair(), x, epochs=1)
    pyro.clear_param_store()
    history = train(FITS["flow"]().double(), x, epochs=1).history
    assert abs(history[0]["train"] - 2 * np.log(size)) < 10


def test_half_precision_is_named_where_it_cannot_be_trained():
    flow = Flow((2,), transform=MAF(hidden=(4,))).half()
    with pytest.raises(ValueError, match=r"float16 is not for training.*call \.float\(\)"):
        train(flow, torch.randn(40, 2, generator=torch.Generator().manual_seed(0)).half(), epochs=2)
