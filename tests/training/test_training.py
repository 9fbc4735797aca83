"""`train` improves a fit, keeps the best it saw, says what it did, and stops in time."""

import copy
import itertools
import json
from contextlib import suppress
from functools import partial
from math import isfinite, log, pi
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule
from safetensors.torch import load_file
from torch import nn
from torch.distributions import constraints
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import (
    MAF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    EnergyModel,
    Flow,
    Labels,
    MaximumLikelihood,
    NormalLikelihood,
    train,
)
from pyro_genmodels.families import Annealed
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.training import Checkpoint, Fit, TrainingInterrupted, checkpoints, loop
from pyro_genmodels.training import epochs as training_epochs
from pyro_genmodels.training import runs as training_runs
from pyro_genmodels.training.batches import Batches

train = partial(train, progress=False)
SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=1e-2)


def affine_flow(d=2, **kwargs):
    return Flow((d,), transform=MAF(transforms=1, hidden=(8,)), **kwargs)


def small_vae(**kwargs):
    return VAE((2,), latent_dim=1, hidden=(8,), **kwargs)


def state(fit):
    return {name: value.clone() for name, value in fit.state_dict().items()}


def nats(family, x, *args):
    with torch.no_grad():
        return -family(*args).log_prob(x).mean().item()


def losses(fit):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in fit.history]


def no_guide(x, *args, **kwargs):
    pass


def location(x):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


# What it achieves.


def test_a_gaussian_is_learned_to_its_entropy():
    truth = dist.MultivariateNormal(torch.tensor([3.0, -1.0]), torch.tensor([[4.0, 1.5], [1.5, 1.0]]))
    x, held_out = truth.sample((1500,)), truth.sample((4000,))
    flow = affine_flow()
    before = nats(flow, held_out)
    fit = train(flow, x, valid=held_out, epochs=40, optim=ADAM, patience=10)
    # -log p(x) has variance d / 2 = 1; 4.5 standard errors: false-alarm rate 7e-6
    assert abs(fit.best["valid"] - truth.entropy().item()) < 4.5 / 4000**0.5
    assert fit.best["valid"] < before - 0.5
    assert fit.best["valid"] + truth.log_prob(held_out).mean().item() < 0.02


def test_the_loss_is_nats_per_datum_whatever_the_batch_size():
    flow, x = affine_flow().eval(), torch.randn(103, 2)
    flow.standardize(x)
    expected = nats(flow, x)
    for batch_size in (1, 10, 103, 1000):
        fit = train(copy.deepcopy(flow), x, valid=x, epochs=1, batch_size=batch_size, optim=partial(torch.optim.SGD, lr=0.0))
        assert fit.best["train"] == pytest.approx(expected, rel=1e-5)
        assert fit.best["valid"] == pytest.approx(expected, rel=1e-5)


def test_every_row_is_seen_once_an_epoch():
    seen = []

    def model(x):
        seen.append(x.clone())
        location(x)

    train((model, no_guide), torch.arange(50.0), epochs=3, batch_size=7)
    rows = torch.cat(seen)[-150:].reshape(3, 50)
    assert torch.equal(rows.sort(1).values, torch.arange(50.0).expand(3, 50))
    assert not torch.equal(rows[0], rows[1])


def test_the_fit_is_left_in_evaluation_mode_also_on_failure():
    flow = affine_flow().train()
    train(flow, torch.randn(20, 2), epochs=1)
    assert not any(module.training for module in flow.modules())

    def objective_fails(*args, **kwargs):
        raise KeyError("in the middle")

    objective = MaximumLikelihood()
    flow.train()
    objective.loss = objective_fails
    with pytest.raises(KeyError):
        train(flow, torch.randn(20, 2), valid=torch.randn(20, 2), objective=objective, epochs=1)
    assert not any(module.training for module in flow.modules())


def test_progress_is_told_only_if_asked(capfd):
    train(affine_flow(), torch.randn(20, 2), epochs=2)
    assert capfd.readouterr() == ("", "")
    train(affine_flow(), torch.randn(20, 2), epochs=2, progress=True)
    assert "epoch" in capfd.readouterr().err


# The objective and what it sees.


@pytest.mark.parametrize(
    ("make", "expected"), [(affine_flow, MaximumLikelihood), (small_vae, Trace_ELBO)], ids=["density", "latents"]
)
def test_the_objective_is_read_from_the_fit(make, expected, monkeypatch):
    used = set()
    for objective in (MaximumLikelihood, Trace_ELBO):
        original = objective.loss_and_grads

        def spy(self, *args, _original=original, **kwargs):
            used.add(type(self))
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(objective, "loss_and_grads", spy)
    fit = train(make(), torch.randn(20, 2), epochs=1)
    assert used == {expected}
    assert isfinite(fit.best["train"])


def test_another_objective_is_used_if_given():
    class Doubled(MaximumLikelihood):
        def per_datum(self, dist, x):
            return 2 * super().per_datum(dist, x)

    flow, x = affine_flow(), torch.randn(20, 2)
    still = partial(torch.optim.SGD, lr=0.0)
    once, twice = (train(flow, x, objective=o, epochs=1, optim=still) for o in (None, Doubled()))
    assert twice.best["train"] == pytest.approx(2 * once.best["train"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [100, 25])
def test_a_global_term_counts_once_in_the_data(batch_size):
    def model(x, *, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    def guide(x, *, size=None):
        pyro.sample("mu", dist.Delta(pyro.param("mu_hat", torch.tensor(2.0))))

    x, held_out = torch.randn(100), torch.randn(600)
    fit = train((model, guide), x, valid=held_out, epochs=1, batch_size=batch_size, optim=partial(torch.optim.SGD, lr=0.0))
    prior = dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))
    for key, rows in (("train", x), ("valid", held_out)):
        expected = -(prior + dist.Normal(2.0, 1.0).log_prob(rows).sum()) / len(rows)
        assert fit.best[key] == pytest.approx(expected.item(), rel=1e-5)


def test_a_global_latent_finds_its_posterior_from_minibatches(float64):
    def model(x, *, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    x, guide = 2 + torch.randn(200), AutoNormal(model)
    train((model, guide), x, batch_size=50, epochs=150, ema_decay=0.99, optim=partial(torch.optim.Adam, lr=2e-2))
    loc, scale = guide._get_loc_and_scale("mu")
    assert loc.item() == pytest.approx((x.sum() / 201).item(), abs=0.3 / 201**0.5)
    assert scale.item() == pytest.approx(201**-0.5, rel=0.15)


# What it keeps.


@pytest.fixture
def overfitted():
    x, held_out = torch.randn(12, 2), torch.randn(60, 2)
    made = Autoregressive((2,), hidden=(64,))
    made.standardize(x)
    return train(made, x, valid=held_out, epochs=200, patience=5, optim=partial(torch.optim.Adam, lr=3e-2)), held_out


def test_early_stopping_keeps_the_best_epoch(overfitted):
    fit, held_out = overfitted
    valid = [record["valid"] for record in fit.history]
    assert fit.best["valid"] == min(valid) < valid[-1]
    assert fit.best == fit.history[valid.index(min(valid))]
    assert nats(fit.family, held_out) == pytest.approx(fit.best["valid"], abs=1e-6)


def test_early_stopping_waits_for_its_patience(overfitted):
    fit, _ = overfitted
    assert len(fit.history) == fit.best["epoch"] + 5 < 200
    assert "5 epochs" in fit.stopped


def test_without_held_out_data_the_last_epoch_is_kept():
    x = torch.full((10,), 3.0)
    fit = train((location, no_guide), x, epochs=5, patience=1, optim=SGD)
    assert fit.best == fit.history[-1]
    assert fit.best["epoch"] == 5
    assert fit.stopped == "5 epochs"
    assert pyro.param("loc").item() == pytest.approx(3 * (1 - 0.9**5), rel=1e-5)


def test_history_records_every_epoch():
    fit = train(affine_flow(), torch.randn(20, 2), valid=torch.randn(10, 2), epochs=4, patience=4)
    assert [record["epoch"] for record in fit.history] == [1, 2, 3, 4]
    assert all(record.keys() == {"epoch", "train", "valid", "seconds"} for record in fit.history)
    seconds = [record["seconds"] for record in fit.history]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    json.dumps(fit.history)
    assert all("valid" not in record for record in train(affine_flow(), torch.randn(20, 2), epochs=2).history)


def test_a_fit_is_itself_a_fit():
    flow, x = affine_flow(), torch.randn(20, 2)
    fit = train(flow, x, epochs=1)
    assert isinstance(fit, Fit)
    assert fit.family is flow
    assert (fit.model, fit.guide) == (flow.model, flow.guide)
    pair = (location, no_guide)
    assert train(pair, x[:, 0], epochs=1).model is location
    assert SVI(fit.model, fit.guide, pyro.optim.Adam({"lr": 1e-3}), MaximumLikelihood()).evaluate_loss(x) > 0


def test_averaged_weights_are_validated_and_kept(float64):
    """Against gradient descent on -log N(x | loc, 1), and its moving average, by hand."""
    x, held_out = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.5, 4.0])
    loc, average, expected = torch.tensor(0.0), None, []
    for t in range(8):
        loc = loc - 0.1 * (loc - x.mean())
        decay = min(0.35, (1 + t) / (10 + t))  # first the one, then the other
        average = loc if average is None else decay * average + (1 - decay) * loc
        expected.append(0.5 * log(2 * pi) + 0.5 * (held_out - average).square().mean().item())
    fit = train((location, no_guide), x, valid=held_out, epochs=8, ema_decay=0.35, optim=SGD)
    assert [record["valid"] for record in fit.history] == pytest.approx(expected, rel=1e-9)
    best = min(expected)
    loc = pyro.param("loc")
    assert 0.5 * log(2 * pi) + 0.5 * (held_out - loc).square().mean().item() == pytest.approx(best, rel=1e-9)


def test_averaging_leaves_the_training_itself_alone(float64):
    x = torch.tensor([1.0, 2.0, 6.0])
    plain = train((location, no_guide), x, epochs=5, optim=SGD)
    pyro.clear_param_store()
    averaged = train((location, no_guide), x, epochs=5, optim=SGD, ema_decay=0.9, valid=x, patience=9)
    assert [record["train"] for record in averaged.history] == [record["train"] for record in plain.history]


def test_averaged_weights_of_a_family_give_its_best_loss():
    x, held_out = torch.randn(60, 2), torch.randn(60, 2)
    fit = train(affine_flow(), x, valid=held_out, epochs=4, ema_decay=0.9, batch_size=20)
    assert nats(fit.family, held_out) == pytest.approx(fit.best["valid"], abs=1e-6)


# Seeds.


@pytest.mark.parametrize("make", [affine_flow, small_vae, partial(Autoregressive, (2,), hidden=(8,), dropout=0.5)])
def test_a_seed_says_everything(make):
    x, held_out, family = torch.randn(40, 2), torch.randn(20, 2), make()

    def run(seed):
        twin = copy.deepcopy(family)
        fit = train(twin, x, valid=held_out, epochs=2, batch_size=10, seed=seed, optim=ADAM)
        return losses(fit), state(twin)

    first, again, other = run(1), run(1), run(2)
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert first[0] != other[0]


def test_validation_takes_no_randomness_from_training():
    x, held_out, vae = torch.randn(40, 2), torch.randn(20, 2), small_vae()
    with_valid = train(copy.deepcopy(vae), x, valid=held_out, epochs=3, batch_size=10, seed=0)
    without = train(copy.deepcopy(vae), x, epochs=3, batch_size=10, seed=0)
    assert [r["train"] for r in with_valid.history] == [r["train"] for r in without.history]


# The forms of data.


def test_a_context_goes_with_its_row():
    c = torch.randn(400, 1)
    x = 3 * c + 0.5 * torch.randn(400, 1)
    flow = affine_flow(1, context=1)
    fit = train(
        flow,
        x[:300],
        context=c[:300],
        valid=(x[300:], c[300:]),
        epochs=30,
        batch_size=50,
        optim=partial(torch.optim.Adam, lr=3e-2),
    )
    assert nats(flow, x[300:], c[300:]) == pytest.approx(fit.best["valid"], abs=1e-6)
    assert fit.best["valid"] < 1.3  # the truth has 0.73 nats, x alone 2.5


def test_labels_are_a_context():
    labels = torch.arange(200) % 2
    x = 10.0 * labels[:, None] + torch.randn(200, 2)
    made = Autoregressive((2,), context=Labels(2), hidden=(8,))
    train(made, x, context=labels, valid=[x, labels], epochs=20, batch_size=20, optim=partial(torch.optim.Adam, lr=3e-2))
    means = [made(torch.full((500,), k)).sample().mean(0) for k in (0, 1)]
    assert (means[1] - means[0] > 5).all()


def test_a_loader_gives_rows_or_rows_with_context():
    x, c = torch.randn(50, 2), torch.randn(50, 3)
    for shape in (x, TensorDataset(x)):
        fit = train(affine_flow(), DataLoader(shape, batch_size=20), valid=DataLoader(shape, batch_size=30), epochs=2)
        assert nats(fit.family, x) == pytest.approx(fit.best["valid"], abs=1e-5)
    loader = DataLoader(TensorDataset(x, c), batch_size=20, shuffle=True)
    fit = train(affine_flow(context=3), loader, valid=(x, c), epochs=2)
    assert nats(fit.family, x, c) == pytest.approx(fit.best["valid"], abs=1e-5)


def test_a_loader_is_the_tensor_in_batches(float64):
    x, flow = torch.randn(40, 2), affine_flow(standardize=False)
    twins = copy.deepcopy(flow), copy.deepcopy(flow)
    train(twins[0], x, epochs=2, batch_size=40, optim=SGD)
    train(twins[1], DataLoader(x, batch_size=40, shuffle=True), epochs=2, optim=SGD)
    assert all(torch.allclose(p, q) for p, q in zip(*map(nn.Module.parameters, twins), strict=True))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: x.double(), lambda x: x.numpy(), lambda x: x.double().numpy()])
def test_arrays_and_doubles_train_a_float32_family(wrap):
    x = torch.randn(30, 2)
    flow = affine_flow()
    fit = train(flow, wrap(x), valid=wrap(x), epochs=2, seed=0)
    assert all(p.dtype == torch.float32 for p in flow.parameters())
    assert nats(flow, x) == pytest.approx(fit.best["valid"], abs=1e-6)


def test_integers_stay_integers():
    x = np.random.default_rng(0).integers(0, 2, (30, 3))
    fit = train(Autoregressive((3,), likelihood=BernoulliLikelihood(), hidden=(4,)), x, valid=x, epochs=1)
    assert isfinite(fit.best["valid"])


def test_doubles_train_a_float64_family():
    flow = affine_flow().double()
    train(flow, torch.randn(30, 2), epochs=1)
    assert all(p.dtype == torch.float64 for p in flow.parameters())


@pytest.mark.parametrize("data", [lambda x: x, lambda x: DataLoader(x, batch_size=16)], ids=["tensor", "loader"])
def test_a_flow_is_standardised_by_the_whole_training_data(data):
    x = torch.cat([torch.randn(50, 2), 100 + 9 * torch.randn(50, 2)])
    flow = affine_flow()
    train(flow, data(x), valid=torch.randn(30, 2), batch_size=10, epochs=2)
    torch.testing.assert_close(flow.loc, x.mean(0))
    torch.testing.assert_close(flow.scale, x.std(0))


# Other fits than families.


@pytest.mark.parametrize(
    "optim",
    [
        partial(torch.optim.Adam, lr=0.1),
        SGD,
        pyro.optim.Adam({"lr": 0.1}),
        pyro.optim.ClippedAdam({"lr": 0.1}),
        pyro.optim.SGD({"lr": 0.1}),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    ],
    ids=["Adam", "SGD", "pyro Adam", "pyro ClippedAdam", "pyro SGD", "function"],
)
def test_plain_functions_train_by_any_optimiser(optim):
    fit = train((location, no_guide), 3 + torch.randn(100), epochs=150, optim=optim)
    assert pyro.param("loc").item() == pytest.approx(3, abs=0.5)  # 5 standard errors of the mean: 6e-7
    assert fit.history[-1]["train"] < fit.history[0]["train"]


def test_a_learning_rate_schedule_is_followed_or_refused():
    schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 1e-9})
    with suppress(TypeError, ValueError):
        train((location, no_guide), torch.full((10,), 3.0), epochs=5, optim=schedule)
        assert pyro.param("loc").item() < 3 * (1 - 0.9**2)


def test_a_constrained_parameter_of_a_guide_is_trained_and_kept(float64):
    """x ~ N(z, 1) with z ~ N(0, 1) has posterior N(x / 2, 1 / 2)."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    x = 2**0.5 * torch.randn(500)
    train((model, guide), x, valid=x, epochs=60, batch_size=50, ema_decay=0.9, optim=partial(torch.optim.Adam, lr=2e-2))
    assert pyro.param("slope").item() == pytest.approx(0.5, abs=0.05)
    assert pyro.param("scale").item() == pytest.approx(0.5**0.5, abs=0.05)


class Line(PyroModule):
    """y = weight * x, both the slope and the noise learned."""

    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1)

    def forward(self, y, x):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(self.linear(x).squeeze(-1), 0.1), obs=y)


def test_a_module_and_its_context_are_a_pair():
    x = torch.randn(100, 1)
    line = Line()
    train(
        (line, no_guide), 2 * x.squeeze(-1) + 1, context=x, epochs=80, batch_size=20, optim=partial(torch.optim.Adam, lr=5e-2)
    )
    assert line.linear.weight.item() == pytest.approx(2, abs=0.1)
    assert line.linear.bias.item() == pytest.approx(1, abs=0.1)
    assert not line.training


def test_the_norm_of_the_gradient_is_clipped():
    x, step = torch.full((10,), 1000.0), partial(torch.optim.SGD, lr=1.0)
    for clip_norm, expected in ((0.5, 0.5), (10.0, 10.0), (None, 1000.0)):
        pyro.clear_param_store()
        train((location, no_guide), x, epochs=1, clip_norm=clip_norm, optim=step)
        assert pyro.param("loc").item() == pytest.approx(expected, rel=1e-4)


# Checkpoints.


def test_a_checkpoint_holds_the_kept_state(tmp_path):
    flow, path = affine_flow(), tmp_path / "deep" / "down" / "flow.v1"
    fit = train(
        flow, torch.randn(12, 2), valid=torch.randn(40, 2), epochs=25, patience=3, optim=ADAM, ema_decay=0.5, checkpoint=path
    )
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "flow.v1.json",
        "flow.v1.safetensors",
        "flow.v1.training.safetensors",
    ]
    saved = load_file(path.with_name("flow.v1.safetensors"))
    assert saved.keys() == flow.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in flow.state_dict().items())
    record = json.loads(path.with_name("flow.v1.json").read_text())
    assert record["best"] == fit.best
    assert record["history"] == fit.history
    assert record["stopped"] == fit.stopped

    twin = affine_flow().eval()
    twin.load_state_dict(saved)
    x = torch.randn(5, 2)
    assert torch.equal(twin().log_prob(x), flow().log_prob(x))


def test_a_checkpoint_of_a_pair_holds_both(tmp_path):
    def model(x, *, size=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    guide = AutoNormal(model)
    train((model, guide), torch.randn(20), epochs=2, checkpoint=tmp_path / "pair")
    saved = list(load_file(tmp_path / "pair.safetensors").values())
    assert all(any(torch.equal(p, q) for q in saved) for p in guide.state_dict().values())


def test_a_checkpoint_of_two_modules_mixes_no_names(tmp_path):
    class Encoder(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[nn.Linear](1, 1)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.linear(x[:, None]).squeeze(-1), 1.0))

    class Decoder(Encoder):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(self.linear(z[..., None]).squeeze(-1), 1.0), obs=x)

    model, guide = Decoder(), Encoder()
    model._pyro_set_supermodule("decoder", model._pyro_context)
    guide._pyro_set_supermodule("encoder", guide._pyro_context)
    train((model, guide), torch.randn(20), epochs=1, checkpoint=tmp_path / "pair")
    saved = list(load_file(tmp_path / "pair.safetensors").values())
    for module in (model, guide):
        assert all(any(torch.equal(p, q) for q in saved) for p in module.parameters())


def test_a_checkpoint_of_plain_functions_holds_their_parameters(tmp_path):
    train((location, no_guide), torch.randn(20), epochs=2, checkpoint=tmp_path / "pair")
    saved = load_file(tmp_path / "pair.safetensors")
    assert [value.item() for value in saved.values()] == [pyro.param("loc").item()]


def test_a_checkpoint_of_a_fit_is_that_of_its_family(tmp_path):
    fit = train(affine_flow(), torch.randn(20, 2), epochs=1)
    train(fit, torch.randn(20, 2), epochs=1, checkpoint=tmp_path / "again")
    assert load_file(tmp_path / "again.safetensors").keys() == fit.family.state_dict().keys()


# Going on from a run.


def functions_of_pyro():
    """A pair of plain functions, with a constrained parameter in each."""

    def model(x):
        noise = pyro.param("noise", torch.tensor(1.5), constraint=constraints.interval(0.5, 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, noise), obs=x[:, 0])

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.0))
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x[:, 0], scale))

    return model, guide


FITS = {
    "flow": affine_flow,
    "double": lambda: affine_flow().double(),
    "dropout": lambda: Autoregressive((2,), hidden=(8,), dropout=0.5),
    "vae": small_vae,
    "functions": functions_of_pyro,
}
ROWS, HELD_OUT = (torch.randn(n, 2, generator=torch.Generator().manual_seed(n)) for n in (40, 30))
STEPS = 4  # an epoch, of batches of 10


def run(make, checkpoint, epochs, *, data=ROWS, valid=HELD_OUT, optim=ADAM, resume=False, **options):
    """Of a fit made afresh, in a store of its own; one that goes on is made from other random numbers."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1 + resume)
    options = {"batch_size": 10, "seed": 3, **options}
    notes = options.pop("notes", {})
    if checkpoint is not None:
        options["checkpoint"] = Checkpoint(checkpoint, resume=resume, notes=notes)
    return train(make(), data, valid=valid, epochs=epochs, optim=optim, **options)


def kept(fit):
    return state(fit.family) if isinstance(fit.family, nn.Module) else dict(pyro.get_param_store().items())


def files(path):
    return {p.name: p.read_bytes() for p in sorted(path.parent.iterdir()) if p.is_file()}


def without_seconds(record):
    return {key: value for key, value in record.items() if key != "seconds"}


def check_same(fit, params, path, whole, whole_params, whole_path):
    """Bit for bit the same, but for the seconds: the history, the parameters, and what is on disk."""
    assert losses(fit) == losses(whole)
    assert without_seconds(fit.best) == without_seconds(whole.best)
    assert fit.best in fit.history
    assert fit.stopped == whole.stopped
    assert params.keys() == whole_params.keys()
    assert all(torch.equal(params[name], whole_params[name]) for name in params)
    for suffix in (".safetensors", ".training.safetensors"):
        a, b = (load_file(f"{p}{suffix}") for p in (path, whole_path))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    seconds = [record["seconds"] for record in fit.history]
    assert seconds == sorted(seconds)


OPTIMS = {
    "Adam": ADAM,
    "SGD": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "AdamW": partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1, amsgrad=True),
}


def combinations():
    """All combinations of fit, optimiser, averaging and validation; by default each value of each with a few of the others."""
    usual = {(make, "Adam", 0.9, "validated") for make in FITS} | {("vae", optim, None, "alone") for optim in OPTIMS}
    for parts in itertools.product(FITS, OPTIMS, [None, 0.9], ["alone", "validated"]):
        yield pytest.param(*parts, marks=() if parts in usual else pytest.mark.slow, id="-".join(map(str, parts)))


@pytest.mark.parametrize(("make", "optim", "average", "valid"), list(combinations()))
def test_a_run_that_goes_on_ends_as_if_it_had_never_stopped(make, optim, average, valid, tmp_path):
    valid = None if valid == "alone" else HELD_OUT
    go = partial(run, FITS[make], optim=OPTIMS[optim], ema_decay=average, valid=valid, batch_size=20)
    whole = go(tmp_path / "whole", 3)
    whole_params = kept(whole)
    go(tmp_path / "parts", 1)
    fit = go(tmp_path / "parts", 3, resume=True)
    assert len(fit.history) == 3
    check_same(fit, kept(fit), tmp_path / "parts", whole, whole_params, tmp_path / "whole")


@pytest.mark.parametrize(
    "optim",
    [
        partial(torch.optim.SGD, lr=1e-2),
        partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
        partial(torch.optim.NAdam, lr=1e-3),
        partial(torch.optim.ASGD, lr=1e-3),
        lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(1e-2), foreach=False),
        lambda parameters: torch.optim.Adam([{"params": [p], "lr": 1e-2 / (1 + i)} for i, p in enumerate(parameters)]),
        pyro.optim.ClippedAdam({"lr": 1e-2, "lrd": 0.99}),
        pyro.optim.AdagradRMSProp({"eta": 0.1}),
    ],
    ids=["SGD", "RMSprop", "NAdam", "ASGD", "rate in a tensor", "groups", "ClippedAdam", "AdagradRMSProp"],
)
def test_a_run_goes_on_by_any_optimiser(optim, tmp_path):
    whole = run(affine_flow, tmp_path / "whole", 5, optim=optim)
    whole_params = kept(whole)
    run(affine_flow, tmp_path / "parts", 2, optim=optim)
    fit = run(affine_flow, tmp_path / "parts", 5, optim=optim, resume=True)
    check_same(fit, kept(fit), tmp_path / "parts", whole, whole_params, tmp_path / "whole")


class Slowed(torch.optim.SGD):
    """An optimiser of one's own, with attributes: the rate is divided by a number, and a parameter is known by itself."""

    def __init__(self, parameters, lr, divisor):
        super().__init__(list(parameters), lr=lr)
        self.divisor, self.first = divisor, self.param_groups[0]["params"][0]

    def step(self, closure=None):
        assert any(self.first is p for p in self.param_groups[0]["params"])
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= self.param_groups[0]["lr"] / self.divisor * p.grad
                self.state[p]["last"] = np.float32(1 / self.divisor)


@pytest.mark.parametrize(
    "optim",
    [
        lambda parameters: Slowed(parameters, 1e-2, 2),
        partial(torch.optim.Adam, lr=np.float32(1e-3), betas=(np.float64(0.9), 0.99)),
        lambda parameters: scheduled(torch.optim.SGD(parameters, lr=1e-2)),
    ],
    ids=["attributes", "numbers of numpy", "a schedule's step"],
)
def test_a_run_goes_on_by_an_optimiser_of_ones_own(optim, tmp_path):
    run(affine_flow, tmp_path / "parts", 2, optim=optim)
    fit = run(affine_flow, tmp_path / "parts", 5, optim=optim, resume=True)
    whole = run(affine_flow, tmp_path / "whole", 5, optim=optim)
    check_same(fit, kept(fit), tmp_path / "parts", whole, kept(whole), tmp_path / "whole")


def scheduled(optimiser):
    """A schedule replaces `step` by a function that steps this very optimiser."""
    torch.optim.lr_scheduler.ExponentialLR(optimiser, 1.0)
    return optimiser


def test_numbers_of_numpy_are_options_with_and_without_a_checkpoint(tmp_path):
    optim = partial(torch.optim.Adam, lr=np.float32(1e-3))
    for checkpoint in (None, tmp_path / "flow"):
        train(affine_flow(), ROWS, optim=optim, clip_norm=np.float32(5), epochs=1, checkpoint=checkpoint, progress=False)
    settings = checkpoints.read_record(tmp_path / "flow")["run"]["settings"]
    assert settings["clip_norm"] == 5.0
    assert settings["optim"][1]["lr"] == float(np.float32(1e-3))


def test_an_option_that_cannot_be_saved_is_named_and_asked_for_by_a_checkpoint_only(tmp_path):
    def optim(parameters):
        return torch.optim.SGD([{"params": list(parameters), "schedule": lambda step: 1.0}], lr=1e-3)

    train(affine_flow(), ROWS, optim=optim, epochs=1, progress=False)
    with pytest.raises(TypeError, match=r"schedule= of SGD is a function.*without a checkpoint"):
        train(affine_flow(), ROWS, optim=optim, epochs=1, checkpoint=tmp_path / "flow", progress=False)
    assert not list(tmp_path.iterdir())


def test_checksums_are_made_for_a_checkpoint_only(monkeypatch):
    monkeypatch.setattr(Batches, "digest", property(lambda self: pytest.fail("it was made")))
    train(affine_flow(), ROWS, epochs=1, progress=False)


def test_a_run_goes_on_more_than_once(tmp_path):
    whole = run(affine_flow, tmp_path / "whole", 5)
    for epochs in (1, 2, 4, 5):
        fit = run(affine_flow, tmp_path / "parts", epochs, resume=epochs > 1)
    check_same(fit, kept(fit), tmp_path / "parts", whole, kept(whole), tmp_path / "whole")


def test_a_run_goes_on_from_a_loader(tmp_path):
    loader = DataLoader(ROWS, batch_size=10, shuffle=True)
    whole = run(affine_flow, tmp_path / "whole", 5, data=loader)
    run(affine_flow, tmp_path / "parts", 3, data=loader)
    fit = run(affine_flow, tmp_path / "parts", 5, data=loader, resume=True)
    check_same(fit, kept(fit), tmp_path / "parts", whole, kept(whole), tmp_path / "whole")


def test_a_run_goes_on_with_labels_and_without_a_seed(tmp_path):
    labels = torch.arange(40) % 2
    make = partial(affine_flow, context=Labels(2))
    go = partial(run, make, data=(ROWS, labels), valid=(ROWS, labels), seed=None)
    whole = go(tmp_path / "whole", 4)
    go(tmp_path / "parts", 2)
    fit = go(tmp_path / "parts", 4, resume=True)
    check_same(fit, kept(fit), tmp_path / "parts", whole, kept(whole), tmp_path / "whole")


OVERFITTING = {
    "make": partial(Autoregressive, (2,), hidden=(64,)),
    "data": ROWS[:12],
    "batch_size": 12,
    "patience": 5,
    "optim": partial(torch.optim.Adam, lr=3e-2),
}


@pytest.mark.parametrize("after", [-1, 1, 3], ids=["before the best epoch", "after the best", "late"])
def test_early_stopping_goes_on_counting(after, tmp_path):
    whole = run(checkpoint=tmp_path / "whole", epochs=200, **OVERFITTING)
    best = int(whole.best["epoch"])
    assert best > 1
    assert len(whole.history) == best + 5
    run(checkpoint=tmp_path / "parts", epochs=best + after, **OVERFITTING)
    fit = run(checkpoint=tmp_path / "parts", epochs=200, resume=True, **OVERFITTING)
    check_same(fit, kept(fit), tmp_path / "parts", whole, kept(whole), tmp_path / "whole")


@pytest.mark.parametrize("epochs", [3, 4, 200], ids=["fewer", "as many", "more"])
def test_a_run_that_has_ended_stays_as_it_is(epochs, tmp_path):
    """By its patience it has ended however many epochs are offered; else only if no more are."""
    options = {"make": affine_flow} if epochs < 200 else OVERFITTING
    whole = run(checkpoint=tmp_path / "run", epochs=4 if epochs < 200 else 200, **options)
    before = {name: load_file(tmp_path / name) for name in ("run.safetensors", "run.training.safetensors")}
    params = kept(whole)
    fit = run(checkpoint=tmp_path / "run", epochs=epochs, resume=True, **options)
    assert fit.history == whole.history
    assert fit.best == whole.best
    assert all(torch.equal(value, params[name]) for name, value in kept(fit).items())
    for name, tensors in before.items():
        again = load_file(tmp_path / name)
        assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_another_run_is_refused(tmp_path):
    path = tmp_path / "run"
    run(affine_flow, path, 2, ema_decay=0.9)
    before = files(path)
    for words, change in [
        ('fit class was "Flow" and is "VAE"', {"make": small_vae}),
        ("trained on other data", {"data": ROWS + 1.0}),
        (
            "fit arguments context was 0",
            {"make": partial(affine_flow, context=Labels(2)), "data": (ROWS, torch.arange(40) % 2)},
        ),
        ("ema_decay was 0.9 and is null", {"ema_decay": None}),
        ('optim was "Adam" and is "SGD"', {"optim": SGD}),
        ('optim was "Adam" and is "AdamW"', {"optim": partial(torch.optim.AdamW, lr=1e-2)}),
        ("optim lr was 0.01 and is 0.02", {"optim": partial(torch.optim.Adam, lr=2e-2)}),
        ("seed was 3 and is 4", {"seed": 4}),
        ("batch_size was 10 and is 20", {"batch_size": 20}),
        ("clip_norm was 10.0 and is null", {"clip_norm": None}),
        ('objective was "MaximumLikelihood" and is "Trace_ELBO"', {"objective": Trace_ELBO()}),
        ("fit arguments standardize was", {"make": partial(affine_flow, standardize=False)}),
        ("validated on other data", {"valid": HELD_OUT[:-1]}),
        ("40 rows of data, but found 39", {"data": ROWS[:39]}),
    ]:
        options = {"make": affine_flow, "ema_decay": 0.9, **change}
        options.setdefault("valid", options["data"] if isinstance(options.get("data"), tuple) else HELD_OUT)
        with pytest.raises(ValueError, match=words):
            run(checkpoint=path, epochs=4, resume=True, **options)
        assert files(path) == before


def test_another_seed_is_told_before_the_rows_that_it_held_out(tmp_path):
    go = partial(train, data=ROWS, valid=0.1, batch_size=10, progress=False)
    go(affine_flow(), epochs=1, seed=5, checkpoint=tmp_path / "run")
    again = partial(go, epochs=2, checkpoint=Checkpoint(tmp_path / "run", resume=True))
    with pytest.raises(ValueError, match=r"seed was 5 and is 1, so that valid=0\.1 held out other rows"):
        again(affine_flow(), seed=1)
    with pytest.raises(ValueError, match=r"other data.*pass seed=5"):
        again(affine_flow())
    with pytest.raises(ValueError, match=r"valid was 0\.1 and is 0\.2"):
        again(affine_flow(), seed=5, valid=0.2)
    assert len(again(affine_flow(), seed=5).history) == 2


def test_a_run_that_lost_patience_goes_on_with_more(tmp_path):
    few = run(checkpoint=tmp_path / "run", epochs=200, **OVERFITTING)
    more = run(checkpoint=tmp_path / "run", epochs=200, resume=True, **{**OVERFITTING, "patience": 8})
    assert len(more.history) > len(few.history)
    assert more.history[: len(few.history)] == few.history


def test_a_difference_of_a_list_is_told_once(tmp_path):
    run(partial(Autoregressive, (2,), hidden=(8, 8)), tmp_path / "run", 1)
    with pytest.raises(ValueError, match=r"hidden was \[8, 8\] and is \[4, 4\]\. Resume"):
        run(partial(Autoregressive, (2,), hidden=(4, 4)), tmp_path / "run", 2, resume=True)


def test_a_refused_run_leaves_the_parameters_as_they_came(tmp_path):
    run(affine_flow, tmp_path / "run", 2)
    flow = affine_flow()
    before = [p.clone() for p in flow.parameters()]
    with pytest.raises(ValueError, match="other data"):
        run(lambda: flow, tmp_path / "run", 4, data=ROWS.flip(0), resume=True)
    assert all(torch.equal(p, q) for p, q in zip(flow.parameters(), before, strict=True))
    assert not flow.training


def test_where_there_is_no_run_is_said(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"run\.training\.safetensors to resume\. To begin one, do not pass resume=True"
    ):
        run(affine_flow, tmp_path / "run", 2, resume=True)
    run(affine_flow, tmp_path / "run", 1)
    (tmp_path / "run.training.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"run\.training\.safetensors"):
        run(affine_flow, tmp_path / "run", 2, resume=True)


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_what_is_no_run_is_refused_by_the_name_of_its_file(tmp_path):
    place = tmp_path / "run.training"
    checkpoints.save(place, affine_flow())
    with pytest.raises(ValueError, match=r"run\.training\.safetensors"):
        run(affine_flow, tmp_path / "run", 2, resume=True)
    checkpoints.write(place, affine_flow().state_dict(), {"rows": len(ROWS)})
    with pytest.raises(ValueError, match=r"run\.training\.safetensors"):
        run(affine_flow, tmp_path / "run", 2, resume=True)
    run(affine_flow, tmp_path / "run", 1)
    raw = bytearray(place.with_name("run.training.safetensors").read_bytes())
    raw[-1] ^= 1
    place.with_name("run.training.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=r"run\.training\.safetensors is damaged"):
        run(affine_flow, tmp_path / "run", 2, resume=True)


# Ctrl-C.


class Terminated(KeyboardInterrupt):
    """As the command line makes it of SIGTERM."""


def stopping(at, *, error=KeyboardInterrupt, objective=MaximumLikelihood, held_out=False):
    """An objective that at that step, or at that loss of held-out data, is stopped."""
    objective, calls = objective(), []
    name = "loss" if held_out else "loss_and_grads"
    original = getattr(objective, name)

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at + (not held_out):  # the first call looks for the parameters
            raise error
        return original(*args, **kwargs)

    setattr(objective, name, stopped)
    return objective


MADE = []


def remembering(make):
    """Keeps what is made, and how it was."""

    def made():
        fit = make()
        MADE.append((fit, state(fit)))
        return fit

    return made


WHEN = {
    "at the first step": (1, False),
    "in the first epoch": (3, False),
    "as the first epoch is judged": (1, True),
    "as the second epoch begins": (STEPS + 1, False),
    "in the third epoch": (2 * STEPS + 2, False),
    "as the third epoch ends": (3 * STEPS, False),
    "as the third epoch is judged": (3, True),
}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    ("error", "average"),
    [
        (KeyboardInterrupt, 0.9),
        pytest.param(Terminated, None, marks=pytest.mark.slow),
        pytest.param(Terminated, 0.9, marks=pytest.mark.slow),
        pytest.param(KeyboardInterrupt, None, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_can_be_gone_on_with(when, error, average, tmp_path):
    at, held_out = WHEN[when]
    done = at - 1 if held_out else (at - 1) // STEPS
    whole = run(affine_flow, tmp_path / "whole", 5, ema_decay=average)
    whole_params = kept(whole)
    objective = stopping(at, error=error, held_out=held_out)
    with pytest.raises(TrainingInterrupted, match=r"parts\.safetensors") as caught:
        run(remembering(affine_flow), tmp_path / "parts", 5, ema_decay=average, objective=objective)
    flow, first = MADE[-1]
    assert isinstance(caught.value.__cause__, error)
    assert (caught.value.path, caught.value.epoch) == (tmp_path / "parts.safetensors", done)
    assert not any(module.training for module in flow.modules())
    saved = load_file(tmp_path / "parts.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in flow.state_dict().items())
    if done:
        assert nats(flow, HELD_OUT) == pytest.approx(checkpoints.read(tmp_path / "parts")[1]["best"]["valid"], abs=1e-6)
    else:
        assert all(torch.equal(p, first[name]) for name, p in flow.named_parameters())
    assert len(checkpoints.read(tmp_path / "parts.training")[1]["history"]) == done

    fit = run(affine_flow, tmp_path / "parts", 5, ema_decay=average, resume=True)
    check_same(fit, kept(fit), tmp_path / "parts", whole, whole_params, tmp_path / "whole")


BETWEEN = {
    "as the best is kept": (TrainedWeights, "keep_best", 2),
    "as the average is taken": (TrainedWeights, "update", 10),
    "as the run is copied": (training_runs, "capture", 4),
    "as the best is written": (checkpoints, "write", 3),
}


@pytest.mark.parametrize("when", BETWEEN)
def test_a_run_that_is_stopped_between_two_steps_can_be_gone_on_with(when, tmp_path, monkeypatch):
    """Whatever Ctrl-C falls into: what is on disk belongs together."""
    whole = run(affine_flow, tmp_path / "whole", 6, ema_decay=0.5)
    params = kept(whole)
    holder, function, at = BETWEEN[when]
    original, calls = getattr(holder, function), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, function, stopped)
        with pytest.raises(KeyboardInterrupt):
            run(affine_flow, tmp_path / "parts", 6, ema_decay=0.5)
    record = checkpoints.read(tmp_path / "parts")[1]
    assert nats(checkpoints.load(tmp_path / "parts"), HELD_OUT) == pytest.approx(record["best"]["valid"], abs=1e-6)
    fit = run(affine_flow, tmp_path / "parts", 6, ema_decay=0.5, resume=True)
    check_same(fit, kept(fit), tmp_path / "parts", whole, params, tmp_path / "whole")


def test_a_run_without_a_checkpoint_that_is_stopped_leaves_the_best():
    params = kept(run(affine_flow, None, 2))
    with pytest.raises(KeyboardInterrupt) as caught:
        run(remembering(affine_flow), None, 5, objective=stopping(2 * STEPS + 2))
    assert not isinstance(caught.value, TrainingInterrupted)
    flow, _ = MADE[-1]
    assert not flow.training
    assert all(torch.equal(value, params[name]) for name, value in flow.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*holds another run")
def test_a_good_checkpoint_is_not_replaced_before_there_is_another(tmp_path):
    """A second run by the same name that is stopped, or diverges, in its first epoch."""
    run(affine_flow, tmp_path / "run", 3)
    before = files(tmp_path / "run")
    with pytest.raises(FloatingPointError):
        run(affine_flow, tmp_path / "run", 3, objective=stopping(2, error=FloatingPointError("the loss is nan")))
    assert files(tmp_path / "run") == before
    with pytest.raises(KeyboardInterrupt):
        run(affine_flow, tmp_path / "run", 3, objective=stopping(2))
    assert files(tmp_path / "run")["run.safetensors"] == before["run.safetensors"]


# What it costs.


@pytest.mark.parametrize("objective", [None, Trace_ELBO()], ids=["by default", "given"])
@pytest.mark.parametrize("valid", [None, torch.ones(5)], ids=["alone", "validated"])
def test_a_model_is_run_twice_to_begin_with_and_once_a_batch(objective, valid):
    runs = []

    def model(x):
        runs.append(len(x))
        location(x)

    # Twice to begin with: with many rows as far as its first site in a plate, to see if it subsamples, and with a batch.
    train((model, no_guide), torch.ones(9), valid=valid, objective=objective, epochs=3, batch_size=3)
    epoch = [3, 3, 3] if valid is None else [3, 3, 3, 5]
    assert runs == [9, 3, *epoch, *epoch, *epoch]


class Copies(TorchDispatchMode):
    """Counts the numbers that are copied, but for those in scalars and random states."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy):
            self.count += args[0].numel() if args[0].is_floating_point() else 0
        return result


def copies(epochs, path, **options):
    """How many numbers a training copies of a model of 100,000 parameters."""

    class Wide(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(100_000))

        def forward(self, x):
            pyro.factor("x", -(self.loc - x.mean()).square().sum())

    pyro.clear_param_store()
    with Copies() as copied:
        train((Wide(), no_guide), torch.ones(2), objective=Trace_ELBO(), epochs=epochs, checkpoint=path, **options)
    return copied.count


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"optim": SGD}, 2),  # the best, and the parameters themselves
        ({"optim": ADAM}, 4),  # and Adam's two means
        ({"optim": ADAM, "ema_decay": 0.9, "valid": torch.ones(2)}, 8),  # and the average, which is exchanged for validation
    ],
    ids=["SGD", "Adam", "averaged"],
)
def test_an_epoch_with_a_checkpoint_copies_the_parameters_few_times(options, times, tmp_path):
    one, three = (copies(epochs, tmp_path / str(epochs), **options) for epochs in (1, 3))
    assert (three - one) / 2 / 100_000 <= times + 0.01


# Files.


def test_the_run_is_written_about_twice_a_minute(tmp_path, monkeypatch):
    clock, written = itertools.count(0.0, 2.0), []  # two seconds pass whenever the time is asked for
    original = checkpoints.write

    def write(path, *args, **kwargs):
        written.append((Path(path).name, next(clock)))
        return original(path, *args, **kwargs)

    for module in (loop, training_epochs, training_runs):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(checkpoints, "write", write)
    fit = run(affine_flow, tmp_path / "run", 60, patience=60)
    assert len(fit.history) == 60
    times = [at for name, at in written if "training" in name]
    total = fit.history[-1]["seconds"]
    assert total / 60 < len(times) <= total / 30 + 1
    assert all(b - a >= 30 for a, b in itertools.pairwise(times[:-1]))
    assert max(b - a for a, b in itertools.pairwise(times)) < 45


def test_a_run_that_is_killed_goes_on_from_what_was_written_last(tmp_path, monkeypatch):
    """Every epoch is written here, after each of its steps too, and then the files of the third are put back."""
    monkeypatch.setattr(training_runs.RunCheckpoint, "SECONDS", 0.0)
    whole = run(affine_flow, tmp_path / "whole", 6)
    params, name = kept(whole), "run.training.safetensors"
    original, copies = checkpoints.write, []

    def write(path, *args, **kwargs):
        written = original(path, *args, **kwargs)
        if written.name == name and "part" not in args[1]:
            copies.append(files(tmp_path / "run"))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", write)
        run(affine_flow, tmp_path / "run", 6)
    assert len(copies) == 8  # as it begins, after each epoch, and as it ends
    for file, raw in copies[3].items():
        (tmp_path / file).write_bytes(raw)
    assert len(checkpoints.read(tmp_path / name)[1]["history"]) == 3
    fit = run(affine_flow, tmp_path / "run", 6, resume=True)
    check_same(fit, kept(fit), tmp_path / "run", whole, params, tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*holds another run")
@pytest.mark.parametrize("room", [1000, 8000], ids=["for nothing", "for the parameters alone"])
def test_a_full_disk_is_an_error_and_leaves_what_was_there(room, tmp_path):
    resource = pytest.importorskip("resource")
    run(affine_flow, tmp_path / "run", 2)
    before = files(tmp_path / "run")
    sizes = {name: len(raw) for name, raw in before.items()}
    assert sizes["run.safetensors"] < 8000 < sizes["run.training.safetensors"]
    flow, limits = affine_flow(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"run(\.training)?\.safetensors"):
            run(lambda: flow, tmp_path / "run", 3, seed=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = files(tmp_path / "run")
    assert after.keys() == before.keys()
    assert after["run.training.safetensors"] == before["run.training.safetensors"]
    assert (after["run.safetensors"] == before["run.safetensors"]) == (room == 1000)
    assert not flow.training
    checkpoints.load(tmp_path / "run")


def test_what_notes_say_is_kept_over_a_run_that_goes_on(tmp_path):
    note = {"source": "a.csv", "levels": None, "rate": 1e-3}
    run(affine_flow, tmp_path / "run", 1, notes=note)
    run(affine_flow, tmp_path / "run", 2, notes=note, resume=True)
    for name in ("run", "run.training"):
        record = checkpoints.read(tmp_path / name)[1]
        assert record["notes"] == note
        assert record["rows"] == 40
        assert len(record["history"]) == 2


# What it refuses.


@pytest.mark.parametrize("x", [torch.zeros(0, 2), np.zeros((0, 2)), torch.tensor(1.0)], ids=["tensor", "array", "scalar"])
def test_empty_data_are_refused(x):
    with pytest.raises(ValueError, match="one row"):
        train(affine_flow(), x)


def test_empty_held_out_data_are_refused():
    with pytest.raises(ValueError, match="one row"):
        train(affine_flow(), torch.randn(9, 2), valid=torch.zeros(0, 2))


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), "10"])
def test_a_norm_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="positive number as clip_norm, or None not to clip, but found"):
        train(Flow((2,)), torch.randn(8, 2), clip_norm=bad, epochs=1, progress=False)


@pytest.mark.parametrize("bad", [3, True])
def test_what_is_no_checkpoint_is_refused(bad):
    with pytest.raises(TypeError, match=f"a path or a Checkpoint.* but found {bad}"):
        train(Flow((2,)), torch.randn(8, 2), checkpoint=bad, epochs=1, progress=False)


@pytest.mark.parametrize(("bad", "kind"), [(None, TypeError), ([], ValueError)])
def test_what_is_no_data_is_refused(bad, kind):
    with pytest.raises(kind, match=r"wants .*but found"):
        train(Flow((2,)), bad, epochs=1, progress=False)


def test_rows_without_their_context_are_refused():
    flow, x, c = affine_flow(context=1), torch.randn(10, 2), torch.randn(9, 1)
    with pytest.raises(ValueError, match="10 rows of data but 9 of context"):
        train(flow, x, context=c)
    with pytest.raises(ValueError, match="10 rows of data but 9 of context"):
        train(flow, x[:9], context=c, valid=(x, c))
    with pytest.raises(ValueError, match="DataLoader"):
        train(flow, DataLoader(x), context=torch.randn(10, 1))
    with pytest.raises(ValueError, match="3 parts"):
        train(flow, x[:9], context=c, valid=(x, c, c))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_data_are_refused_before_training(bad):
    x, good = torch.randn(300, 2), torch.randn(300, 2)
    x[299, 1] = bad
    flow = affine_flow()
    before = state(flow)
    for data, valid in ((x, None), (good, x), (DataLoader(x, batch_size=300), None)):
        with pytest.raises(ValueError, match="infinite values"):
            train(flow, data, valid=valid, epochs=1)
    assert all(
        torch.equal(before[name], value)
        for name, value in flow.state_dict().items()
        if name not in ("loc", "scale", "standardized")
    )


def test_data_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="shape"):
        train(affine_flow(), torch.randn(10, 3))


pyro_names_the_frozen = pytest.mark.filterwarnings("ignore:.*was not registered in the param store:UserWarning")


@pyro_names_the_frozen
def test_nothing_to_train_is_refused():
    def fixed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="nothing to train"):
        train((fixed, no_guide), torch.randn(9))
    flow = affine_flow().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        train(flow, torch.randn(9, 2))


@pytest.mark.parametrize("option", ["epochs", "batch_size", "patience"])
@pytest.mark.parametrize("value", [0, -1])
def test_counts_are_positive(option, value):
    with pytest.raises(ValueError, match="of 1 or more"):
        train(affine_flow(), torch.randn(9, 2), **{option: value})


def test_an_optimiser_is_made_here():
    flow = affine_flow()
    with pytest.raises(TypeError, match=r"functools\.partial"):
        train(flow, torch.randn(9, 2), optim=torch.optim.Adam(flow.parameters()))
    with pytest.raises(TypeError, match=r"functools\.partial"):
        train(flow, torch.randn(9, 2), optim="adam")


def test_the_loss_is_the_objectives_own_also_where_that_is_not_linear():
    vae, x = VAE((2,), latent_dim=1, hidden=(4,)), torch.randn(40, 2)
    still, objective = partial(torch.optim.SGD, lr=0.0), RenyiELBO(alpha=0.0, num_particles=300, vectorize_particles=True)
    fit = train(vae, x, objective=objective, epochs=3, batch_size=40, optim=still)
    losses = [objective.loss(vae.model, vae.guide, x) / 40 for _ in range(3)]
    elbo = Trace_ELBO(num_particles=300, vectorize_particles=True).loss(vae.model, vae.guide, x) / 40
    assert fit.best["train"] == pytest.approx(sum(losses) / 3, abs=0.1 * (elbo - losses[0]))


def test_with_parameters_of_the_module_alone():
    with pyro.settings.context(module_local_params=True):
        flow, x = affine_flow(), torch.randn(200, 2)
        history = train(flow, x, epochs=5, optim=partial(torch.optim.Adam, lr=1e-2)).history
    assert history[-1]["train"] < history[0]["train"]


def test_options_by_parameter_name_are_refused():
    with pytest.raises(TypeError, match="one set of options"):
        train(affine_flow(), torch.randn(9, 2), optim=pyro.optim.Adam(lambda name: {"lr": 1e-3}))


def test_what_is_no_fit_is_refused():
    with pytest.raises(TypeError, match="model, guide"):
        train(nn.Linear(1, 1), torch.randn(9, 1))


@pyro_names_the_frozen
def test_frozen_parameters_stay():
    made = Autoregressive((2,), likelihood=NormalLikelihood(), hidden=(8,))
    frozen = next(made.parameters()).requires_grad_(False)
    before = frozen.clone()
    train(made, torch.randn(20, 2), epochs=2, optim=SGD)
    assert torch.equal(frozen, before)


# When it goes wrong.

pyro_says_nan_too = pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")  # Pyro's own word before ours


class Breaking(PyroModule):
    """Minus the loss (x - loc)^2 / 2, until it turns bad after a number of calls in training."""

    def __init__(self, bad, after):
        super().__init__()
        self.bad, self.after, self.calls = bad, after, 0
        self.loc = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        self.calls += self.training
        pyro.factor("x", -0.5 * (x - self.loc).square().sum() + (self.bad if self.calls > self.after else 0.0))


class Jumping(torch.optim.SGD):
    """Gradient descent that after five steps makes a step of 1e30."""

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        self.param_groups[0]["lr"] = 1e-3 if self.steps <= 5 else 1e30
        return super().step(closure)


def finite(module):
    return all(p.isfinite().all() for p in module.state_dict().values())


@pyro_says_nan_too
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("valid", [None, torch.ones(5)], ids=["alone", "validated"])
def test_a_diverging_loss_stops_training_and_keeps_the_best(bad, valid, tmp_path):
    model, objective = Breaking(bad, after=12), Trace_ELBO()
    with pyro.validation_enabled(False), pytest.warns(RuntimeWarning, match="is kept") as caught:
        fit = train((model, no_guide), torch.ones(10), valid=valid, objective=objective, optim=SGD, checkpoint=tmp_path / "c")
    assert [w.filename for w in caught if issubclass(w.category, RuntimeWarning)] == [__file__]
    assert finite(model)
    assert 0 < len(fit.history) < 14
    assert fit.best in fit.history
    assert "loss is" in fit.stopped
    assert torch.equal(load_file(tmp_path / "c.safetensors")["loc"], model.loc.detach())
    assert not model.training


@pyro_says_nan_too
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverging_loss_is_told_by_step_and_epoch_and_the_best_stays_on_disk(bad, tmp_path):
    model, objective = Breaking(bad, after=1 + 3 * 3 + 1), Trace_ELBO()  # bad is the second of three steps in the fourth epoch
    words = r"loss is -?(nan|inf) at step 2\b.*epoch 4\b.*epoch 3 is kept"
    options = {"objective": objective, "optim": SGD, "batch_size": 3, "checkpoint": tmp_path / "c"}
    with pyro.validation_enabled(False), pytest.warns(RuntimeWarning, match=words):
        fit = train((model, no_guide), torch.ones(9), **options)
    assert len(fit.history) == 3
    loc = model.loc.detach().clone()
    for name in ("c", "c.training"):
        record = checkpoints.read(tmp_path / name)[1]
        assert record["history"] == fit.history
        assert record["best"] == fit.best
    assert checkpoints.read(tmp_path / "c")[1]["stopped"] == fit.stopped
    assert torch.equal(load_file(tmp_path / "c.safetensors")["loc"], loc)

    pyro.clear_param_store()
    cured = Breaking(0.0, after=0)
    options["checkpoint"] = Checkpoint(tmp_path / "c", resume=True)
    fit = train((cured, no_guide), torch.ones(9), epochs=5, **options)
    assert [record["epoch"] for record in fit.history] == [1, 2, 3, 4, 5]
    assert abs(cured.loc - 1) < abs(loc - 1)


@pyro_says_nan_too
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [0, 5], ids=["at once", "in the first epoch"])
def test_a_loss_that_diverges_before_there_is_anything_to_keep_is_an_error(bad, after):
    model = Breaking(bad, after)
    with pyro.validation_enabled(False), pytest.raises(FloatingPointError, match="learning rate"):
        train((model, no_guide), torch.ones(10), objective=Trace_ELBO(), optim=SGD, batch_size=1)
    assert not model.training
    assert finite(model)


@pyro_says_nan_too
def test_parameters_that_are_not_finite_are_never_kept():
    """The loss at the last step of an epoch is finite, its gradient is not."""

    class Cusp(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(1.0))

        def forward(self, x):
            pyro.factor("x", -(self.loc - 1).abs().sqrt())

    model = Cusp()
    with pytest.raises(FloatingPointError):
        train((model, no_guide), torch.ones(1), objective=Trace_ELBO(), optim=SGD, epochs=5)
    assert finite(model)


@pyro_says_nan_too
def test_an_epoch_whose_held_out_loss_is_nan_is_not_the_best():
    class Late(Breaking):
        def forward(self, x):
            self.calls += not self.training
            nan = float("nan") if not self.training and self.calls == 1 else 0.0
            pyro.factor("x", -0.5 * (x - self.loc).square().sum() + nan)

    model = Late(0.0, after=0)
    with pyro.validation_enabled(False):
        fit = train(
            (model, no_guide), torch.ones(5), valid=torch.ones(5), objective=Trace_ELBO(), optim=SGD, epochs=6, patience=3
        )
    assert isfinite(fit.best["valid"])
    assert fit.best["epoch"] == 6


@pyro_says_nan_too
@pytest.mark.parametrize("make", [affine_flow, small_vae], ids=["flow", "vae"])
@pytest.mark.parametrize("batch_size", [8, 64], ids=["steps", "epochs"])
def test_a_huge_step_ends_in_a_finite_family(make, batch_size):
    """One step an epoch: the best epoch is kept. Many steps: nothing to keep yet, and the family is as it came."""
    family, x = make(), torch.randn(64, 2)
    options = {"valid": x, "epochs": 30, "optim": partial(Jumping, lr=1e-3), "clip_norm": None, "batch_size": batch_size}
    with pytest.raises(FloatingPointError) if batch_size == 8 else pytest.warns(RuntimeWarning, match="is kept"):
        fit = train(family, x, **options)
        assert isfinite(fit.best["valid"])
        assert fit.best["epoch"] <= 6
    assert finite(family)
    assert not family.training


@pyro_says_nan_too
@pytest.mark.parametrize("valid", [None, torch.ones(4)], ids=["alone", "validated"])
def test_a_pyro_model_that_diverges_stops_with_the_same_warning(valid):
    """Pyro's validation meets the NaN in a distribution's parameters before the loss does."""

    def model(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc.exp() - loc.square(), 1.0), obs=x)

    x = torch.tensor([6.0, -2.0] * 3)
    with pytest.warns(RuntimeWarning, match="is kept"):
        train((model, no_guide), x, epochs=20, optim=partial(Jumping, lr=1e-3), clip_norm=None, valid=valid)
    assert pyro.param("loc").isfinite()


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        train(affine_flow(), torch.randn(9, 2), epochs=1, checkpoint=Path(tmp_path / "file" / "c"))


def test_validation_that_lacks_log_z_of_each_context_is_warned_of():
    energy = EnergyModel((1,), context=2, negatives=Annealed(4, steps=2))
    x, context = torch.randn(8, 1), torch.randn(8, 2)
    with pytest.warns(RuntimeWarning, match="lack log Z of each") as found:
        train(energy, (x, context), valid=(x, context), objective=Trace_ELBO(), epochs=2, progress=False)
    assert len([w for w in found if "lack log Z" in str(w.message)]) == 1
    train(energy, (x, context), valid=(x, context), epochs=1, progress=False)  # by ContrastiveDivergence, which knows them


def test_no_epoch_is_begun_after_the_time_limit_which_counts_a_resumed_run(tmp_path):
    x = torch.randn(20, 2)
    for resume in (False, True):
        flow = Flow((2,), name="limited")
        path = Checkpoint(tmp_path / "flow", resume=resume)
        fit = train(flow, x, epochs=5, max_seconds=1e-9, checkpoint=path, progress=False)
        assert len(fit.history) == 1
        assert fit.stopped == "1 epochs in 1e-09 seconds"
    assert len(train(flow, x, epochs=2, max_seconds=1e9, progress=False).history) == 2
