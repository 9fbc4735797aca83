"""`train` improves a fit, keeps the best it saw, says what it did, and stops in time."""

import copy
import json
from contextlib import suppress
from functools import partial
from math import isfinite, log, pi
from pathlib import Path

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
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import MAF, VAE, Autoregressive, Bernoulli, Flow, Labels, MaximumLikelihood, Normal, train
from pyro_genmodels.training import Fit

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
    train((model, guide), x, batch_size=50, epochs=150, average=0.99, optim=partial(torch.optim.Adam, lr=2e-2))
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
    for _ in range(8):
        loc = loc - 0.1 * (loc - x.mean())
        average = loc if average is None else 0.9 * average + 0.1 * loc
        expected.append(0.5 * log(2 * pi) + 0.5 * (held_out - average).square().mean().item())
    fit = train((location, no_guide), x, valid=held_out, epochs=8, average=0.9, optim=SGD)
    assert [record["valid"] for record in fit.history] == pytest.approx(expected, rel=1e-9)
    best = min(expected)
    loc = pyro.param("loc")
    assert 0.5 * log(2 * pi) + 0.5 * (held_out - loc).square().mean().item() == pytest.approx(best, rel=1e-9)


def test_averaging_leaves_the_training_itself_alone(float64):
    x = torch.tensor([1.0, 2.0, 6.0])
    plain = train((location, no_guide), x, epochs=5, optim=SGD)
    pyro.clear_param_store()
    averaged = train((location, no_guide), x, epochs=5, optim=SGD, average=0.9, valid=x, patience=9)
    assert [record["train"] for record in averaged.history] == [record["train"] for record in plain.history]


def test_averaged_weights_of_a_family_give_its_best_loss():
    x, held_out = torch.randn(60, 2), torch.randn(60, 2)
    fit = train(affine_flow(), x, valid=held_out, epochs=4, average=0.9, batch_size=20)
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
    fit = train(Autoregressive((3,), likelihood=Bernoulli(), hidden=(4,)), x, valid=x, epochs=1)
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
    train((model, guide), x, valid=x, epochs=60, batch_size=50, average=0.9, optim=partial(torch.optim.Adam, lr=2e-2))
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
        flow, torch.randn(12, 2), valid=torch.randn(40, 2), epochs=25, patience=3, optim=ADAM, average=0.5, checkpoint=path
    )
    assert sorted(p.name for p in path.parent.iterdir()) == ["flow.v1.json", "flow.v1.safetensors"]
    saved = load_file(path.with_name("flow.v1.safetensors"))
    assert saved.keys() == flow.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in flow.state_dict().items())
    record = json.loads(path.with_name("flow.v1.json").read_text())
    assert record["best"] == fit.best
    assert record["history"] == fit.history[: fit.best["epoch"]]

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


# What it refuses.


@pytest.mark.parametrize("x", [torch.zeros(0, 2), np.zeros((0, 2)), torch.tensor(1.0)], ids=["tensor", "array", "scalar"])
def test_empty_data_are_refused(x):
    with pytest.raises(ValueError, match="one row"):
        train(affine_flow(), x)


def test_empty_held_out_data_are_refused():
    with pytest.raises(ValueError, match="one row"):
        train(affine_flow(), torch.randn(9, 2), valid=torch.zeros(0, 2))


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
        with pytest.raises(ValueError, match="NaN or infinite"):
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
    with pytest.raises(ValueError, match="positive"):
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
    made = Autoregressive((2,), likelihood=Normal(), hidden=(8,))
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
