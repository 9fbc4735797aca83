"""Training on rows larger than memory, and checkpoints within an epoch: what is resumed ends as if it had never stopped."""

import resource
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from pyro_genmodels import GAN, MAF, VAE, Autoregressive, Diffusion, EnergyModel, Flow, Labels, ODEFlow, train
from pyro_genmodels.datasets import RowStream, stream
from pyro_genmodels.datasets.statistics import ColumnStatistics
from pyro_genmodels.training import Checkpoint, TrainingInterrupted, checkpoints, loop
from pyro_genmodels.training.adversarial_steps import AdversarialStep
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.runs import RunCheckpoint
from pyro_genmodels.training.steps import LossStep
from pyro_genmodels.utils.ranks import Ranks

FILES, ROWS_OF_FILE = 4, 40
X = torch.from_numpy(np.random.default_rng(0).normal(size=(FILES * ROWS_OF_FILE, 2)) * [1.0, 3.0] + [0.0, 1e3]).float()
LABELS = torch.arange(len(X)) % 3
BATCH_SIZE = 20


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rows").mkdir()
    for number, rows in enumerate(X.split(ROWS_OF_FILE)):
        np.save(tmp_path / "rows" / f"part-{number}.npy", rows.numpy())
    return tmp_path / "rows"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run"


def make_flow(**options):
    pyro.set_rng_seed(1)
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)), **options)


def train_on(data, make=make_flow, *, epochs=2, **options):
    pyro.clear_param_store()
    return train(make(), data, epochs=epochs, batch_size=BATCH_SIZE, progress=False, **{"seed": 3, **options})


def records(fit):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in fit.history]


def same_state(a, b):
    return all(map(torch.equal, a.family.state_dict().values(), b.family.state_dict().values()))


# Training.


def test_mean_and_deviation_are_those_of_all_rows(folder):
    """The in-memory fit standardises by all rows, in another order of summation."""
    streamed, held = (train_on(data, epochs=1).family for data in (stream(folder, buffer_rows=16), X))
    assert torch.allclose(streamed.loc, held.loc, rtol=1e-7)
    assert torch.allclose(streamed.scale, held.scale, rtol=1e-6)


@pytest.mark.parametrize("standardize", ["jointly", pytest.param("robust", marks=pytest.mark.slow), False])
def test_every_kind_of_standardisation(standardize, folder):
    """Robust standardisation is by a sample, which here is all rows."""
    streamed, held = (train_on(d, partial(make_flow, standardize=standardize), epochs=1).family for d in (stream(folder), X))
    assert torch.allclose(streamed.loc, held.loc, rtol=1e-6)
    assert torch.allclose(streamed.scale, held.scale, rtol=1e-6)


def test_a_step_on_all_rows_is_that_of_tensors(folder):
    """With one batch of all rows, an epoch is one step of gradient descent, whatever the order of the rows."""
    options = {"epochs": 1, "batch_size": len(X), "optim": partial(torch.optim.SGD, lr=0.1), "progress": False}
    fits = []
    for data in (stream(folder, buffer_rows=16), X):
        pyro.clear_param_store()
        fits.append(train(make_flow().double(), data, **options))
    states = [fit.family.state_dict() for fit in fits]
    assert all(torch.allclose(states[0][name], states[1][name], rtol=1e-6, atol=1e-8) for name in states[0])
    assert fits[0].history[0]["train"] == pytest.approx(fits[1].history[0]["train"], rel=1e-7)


def test_held_out_rows_of_a_stream_give_the_loss_of_tensors(folder):
    losses = [train_on(X, valid=valid, epochs=1).history[0]["valid"] for valid in (stream(folder), X)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_share_of_a_stream_is_held_out_as_a_stream(folder):
    fit = train_on(stream(folder, buffer_rows=32), valid=0.25)
    assert isinstance(fit.held_out, RowStream)
    assert len(fit.held_out) == 40
    assert len(fit.history) == 2


def test_contexts_come_with_their_rows(tmp_path):
    arrays = X.numpy(), LABELS.numpy()
    assert len(train_on(stream(arrays, buffer_rows=16), partial(make_flow, context=Labels(3))).history) == 2
    fit = train_on(stream(np.concatenate([X, X], 1), context=[2, 3], buffer_rows=16), partial(make_flow, context=2))
    assert torch.allclose(fit.family.context.loc, X.double().mean(0).float(), rtol=1e-6)
    arrays[1][-1] = 3
    with pytest.raises(ValueError, match=r"Labels\(3\) wants labels from 0 to 2, but found 0 to 3"):
        train_on(stream(arrays, buffer_rows=16), partial(make_flow, context=Labels(3)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: GAN((2,)), lambda: EnergyModel((2,))], ids=["gan", "energy"])
def test_other_losses_take_streams(make, folder):
    assert len(train_on(stream(folder), make, epochs=1, valid=X[:30]).history) == 1


def test_any_loader_with_a_stated_number_of_rows_is_a_stream():
    loader = DataLoader(TensorDataset(X), batch_size=16)
    fit = train_on(stream(loader, rows=len(X), buffer_rows=64))
    assert torch.allclose(fit.family.loc, X.double().mean(0).float(), rtol=1e-6)


def test_a_pyro_model_takes_streams(folder):
    loc = pyro.nn.PyroParam(torch.zeros(2))

    class Model(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = loc

        def forward(self, x, size=None):
            with pyro.plate("data", size or len(x), subsample=torch.arange(len(x))):
                pyro.sample("x", dist.Normal(self.loc, 3.0).to_event(1), obs=x)

    model = Model()
    train_on(
        stream(folder, buffer_rows=32), lambda: (model, lambda x, size=None: None), optim=partial(torch.optim.Adam, lr=0.1)
    )
    assert (model.loc != 0).all()

    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=5) as i:
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(2)), 3.0).to_event(1), obs=x[i])

    with pytest.raises(TypeError, match="not in a RowStream"):
        train_on(stream(folder), lambda: (subsampling, lambda x: None))


def test_progress_is_shown_within_an_epoch(folder, monkeypatch, capsys):
    make_bar = loop._progress_bar

    def at_every_step(*args, **options):
        bar = make_bar(*args, **options)
        bar.mininterval = 0.0
        return bar

    monkeypatch.setattr(loop, "SHOWN_SECONDS", 0.0)
    monkeypatch.setattr(loop, "_progress_bar", at_every_step)
    pyro.clear_param_store()
    train(make_flow(), stream(folder), epochs=1, batch_size=10, seed=0, progress=True)
    shown = capsys.readouterr().err
    assert "statistics: 100%" in shown
    assert "of epoch 1, train=" in shown


# Checkpoints within an epoch.


class Stopped(KeyboardInterrupt):
    pass


@pytest.fixture
def stop_at(monkeypatch):
    """Write the run at every step, and end it at a step, counted over all epochs, by Ctrl-C."""

    def stop(number, step=LossStep):
        count, original = [0], step.step

        def counted(self, batch, k):
            count[0] += 1
            if count[0] == number:
                raise Stopped
            return original(self, batch, k)

        monkeypatch.setattr(step, "step", counted)

    monkeypatch.setattr(RunCheckpoint, "SECONDS", 0.0)
    return stop


DATA = {
    "stream": lambda folder: stream(folder, buffer_rows=32),
    "tensor": lambda folder: X,
    "dataset": lambda folder: TensorDataset(X),
    "iterable": lambda folder: stream(lambda: iter(X.split(7)), rows=len(X), buffer_rows=32),
}


SLOW_STOPS = [("stream", 3), ("stream", 9), ("tensor", 12), ("dataset", 10), ("iterable", 3)]


@pytest.mark.parametrize(
    ("kind", "at"), [("stream", 7), ("tensor", 3), *(pytest.param(*stop, marks=pytest.mark.slow) for stop in SLOW_STOPS)]
)
def test_a_run_resumed_within_an_epoch_ends_as_if_it_had_never_stopped(kind, at, folder, path, stop_at, monkeypatch):
    """Bit for bit: parameters, history, and the rows that are seen."""
    seen = []
    original = LossStep.step

    def watched(self, batch, number):
        found = original(self, batch, number)
        seen.append(batch.x)
        return found

    monkeypatch.setattr(LossStep, "step", watched)
    valid = X[:20]
    whole = train_on(DATA[kind](folder), valid=valid, ema_decay=0.9)
    steps = list(seen)
    seen.clear()
    stop_at(at)
    with pytest.raises(TrainingInterrupted) as interrupt:
        train_on(DATA[kind](folder), valid=valid, ema_decay=0.9, checkpoint=path)
    monkeypatch.setattr(LossStep, "step", watched)
    assert (interrupt.value.epoch, interrupt.value.steps) == divmod(at - 1, 8)
    resumed = train_on(DATA[kind](folder), valid=valid, ema_decay=0.9, checkpoint=Checkpoint(path, resume=True))
    assert same_state(resumed, whole)
    assert records(resumed) == records(whole)
    assert len(seen) == len(steps) == 16
    assert all(map(torch.equal, seen, steps))
    rows = torch.cat(seen[:8])
    assert torch.equal(rows.sort(0).values, X.sort(0).values)


@pytest.mark.slow
def test_adversarial_runs_are_resumed_within_an_epoch(folder, path, stop_at):
    def run(**options):
        def make():
            pyro.set_rng_seed(1)
            return GAN((2,))

        return train_on(stream(folder, buffer_rows=32), make, **options)

    whole = run()
    stop_at(5, AdversarialStep)
    with pytest.raises(TrainingInterrupted, match="after epoch 0 and 4 steps of the next"):
        run(checkpoint=path)
    stop_at(0, AdversarialStep)
    resumed = run(checkpoint=Checkpoint(path, resume=True))
    assert same_state(resumed, whole)
    assert records(resumed) == records(whole)


@pytest.mark.slow
def test_the_seed_of_a_resumed_run_orders_its_rows(folder, path, stop_at):
    whole = train_on(stream(folder, buffer_rows=32))
    stop_at(4)
    with pytest.raises(TrainingInterrupted):
        train_on(stream(folder, buffer_rows=32), checkpoint=path)
    assert same_state(train_on(stream(folder, buffer_rows=32), seed=None, checkpoint=Checkpoint(path, resume=True)), whole)


def test_a_run_in_its_first_epoch_leaves_older_parameters_alone(folder, path, stop_at):
    older = train_on(X, epochs=1, checkpoint=path)
    stop_at(4)
    with pytest.warns(UserWarning, match="holds another run"), pytest.raises(TrainingInterrupted):
        train_on(stream(folder), checkpoint=path)
    assert torch.equal(checkpoints.load(path).state_dict()["loc"], older.family.state_dict()["loc"])
    assert len(list(path.parent.glob("run.*Z-*.training.safetensors"))) == 1
    stop_at(0)
    assert len(train_on(stream(folder), checkpoint=Checkpoint(path, resume=True)).history) == 2


def test_a_loader_is_resumed_after_full_epochs_only(path, stop_at):
    loader = DataLoader(TensorDataset(X), batch_size=BATCH_SIZE, shuffle=True)
    stop_at(12)
    with pytest.raises(TrainingInterrupted) as interrupt:
        train_on(loader, checkpoint=path)
    assert (interrupt.value.epoch, interrupt.value.steps) == (1, 0)


def test_another_order_of_rows_is_another_run(folder, path, stop_at):
    stop_at(4)
    with pytest.raises(TrainingInterrupted):
        train_on(stream(folder, buffer_rows=32), checkpoint=path)
    with pytest.raises(ValueError, match="was trained on other data with as many rows"):
        train_on(stream(folder, buffer_rows=33), checkpoint=Checkpoint(path, resume=True))


def test_a_damaged_part_of_an_epoch_is_refused(folder, path, stop_at):
    stop_at(4)
    with pytest.raises(TrainingInterrupted):
        train_on(stream(folder), checkpoint=path)
    stop_at(0)
    file = path.with_name("run.training.safetensors")
    tensors, record = checkpoints.read(file)
    part = record["part"]
    for entry in (part | {"steps": 0}, part | {"losses": {}}, part | {"first_loss": []}, part | {"seconds": np.inf}, []):
        with pytest.raises(ValueError, match="its entry 'part' should be"):
            checkpoints.write(file, tensors, record | {"part": entry}, readable=False)
    no_order = {name: t for name, t in tensors.items() if name != "random.order"}
    for state, entry, message in (
        (tensors, part | {"steps": 99}, "made 99 of the 8 steps"),
        (no_order, part, "lacks the random"),
    ):
        checkpoints.write(file, state, record | {"part": entry}, readable=False)
        with pytest.raises(ValueError, match=message):
            train_on(stream(folder), checkpoint=Checkpoint(path, resume=True))


# Faults.


def spoil_row(folder, value=np.nan):
    file = folder / "part-2.npy"
    rows = np.load(file)
    rows[17, 1] = value
    np.save(file, rows)


def test_a_missing_value_in_one_shard_is_named_before_training(folder):
    spoil_row(folder)
    with pytest.raises(ValueError, match=r"1 of 160 rows have NaN or infinite values, the first of them .*part-2.npy, row 17"):
        train_on(stream(folder))


def test_a_missing_value_is_named_where_no_family_looks_for_it(folder):
    spoil_row(folder, np.inf)

    def model(x):
        with pyro.plate("data", len(x)):
            normal = dist.Normal(pyro.param("m", torch.zeros(2)), 3.0, validate_args=False).to_event(1)
            pyro.sample("x", normal, obs=x)

    with pytest.raises(FloatingPointError, match=r"In the files the first such row is .*part-2.npy, row 17"):
        train_on(stream(folder), lambda: (model, lambda x: None))


def test_a_file_that_changes_during_training_ends_it_and_the_run_is_resumed_once_it_is_back(folder, path, monkeypatch, stop_at):
    rows = stream(folder, buffer_rows=8)
    whole = train_on(rows, epochs=2)
    data = (folder / "part-1.npy").read_bytes()
    state = (folder / "part-1.npy").stat()
    original, count = LossStep.step, [0]

    def step(self, batch, number):
        count[0] += 1
        if count[0] == 10:
            (folder / "part-1.npy").write_bytes(data[:-8])
        return original(self, batch, number)

    monkeypatch.setattr(LossStep, "step", step)
    with pytest.raises(ValueError, match=r"part-1.npy has changed since the stream was opened"):
        train_on(rows, checkpoint=path)
    (folder / "part-1.npy").write_bytes(data)
    assert state.st_size == len(data)
    resumed = train_on(stream(folder, buffer_rows=8), checkpoint=Checkpoint(path, resume=True))
    assert same_state(resumed, whole)


def test_a_full_disk_leaves_the_checkpoint_before(folder, path, monkeypatch, stop_at):
    """A limit on the size of files fails writes as a full disk does: after some bytes, by an OSError."""
    rows = stream(folder, buffer_rows=32)
    whole = train_on(rows)
    original, count, before = LossStep.step, [0], resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, batch, number):
        count[0] += 1
        if count[0] == 11:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        return original(self, batch, number)

    monkeypatch.setattr(LossStep, "step", step)
    try:
        with pytest.raises(OSError, match=r"run.safetensors cannot be written.*File too large"):
            train_on(rows, checkpoint=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(path.parent.glob(".*"))  # no part of a file is left
    assert checkpoints.read_record(path.with_name("run.training.safetensors"))["part"]["steps"] == 2
    assert same_state(train_on(rows, checkpoint=Checkpoint(path, resume=True)), whole)


# Seams.


@pytest.mark.parametrize(
    "make",
    [
        lambda: GAN((2,)),
        lambda: EnergyModel((2,)),
        lambda: VAE((2,), context=1),
        lambda: Autoregressive((2,), context=1),
        lambda: ODEFlow((2,), standardize="jointly", context=1),
        lambda: Diffusion((2,), context=1),
    ],
    ids=["gan", "energy", "vae", "autoregressive", "ode_flow", "diffusion"],
)
def test_a_sample_with_statistics_of_all_rows_prepares_a_family_like_all_rows(make):
    by_sample, by_all = make(), make()
    context = [] if by_all.context is None else [X[:, :1] ** 2]
    by_all.prepare(X, *context)
    assert not by_sample.is_prepared
    by_sample.prepare(X[:9], *(t[:9] for t in context), statistics=[ColumnStatistics.of(t, "x", 0) for t in (X, *context)])
    assert by_sample.is_prepared
    own, expected = by_sample.state_dict(), by_all.state_dict()
    units = [name for name in own if name.endswith(("loc", "scale"))]
    assert len(units) >= 2
    assert all(torch.allclose(own[name], expected[name], rtol=1e-6) for name in units)


def test_the_noise_of_integers_counts_in_mean_and_deviation():
    """Uniform noise on (0, 1) adds 1/2 to the mean, and 1/12 to the variance."""
    levels, gan = torch.arange(40).reshape(20, 2) % 4, GAN((2,), levels=4).double()
    gan.prepare(levels[:5], statistics=[ColumnStatistics.of(levels, "x", 0)])
    assert torch.allclose(gan.loc, levels.double().mean(0) + 0.5)
    assert torch.allclose(gan.scale**2, levels.double().var(0) + 20 / 19 / 12)


@pytest.mark.parametrize("seed", [None, 5])
def test_the_ranks_of_a_run_share_the_rows_of_each_batch(seed, folder):
    batches = Batches(stream(folder, buffer_rows=32), None, 30, torch.empty(0))
    parts = [list(batches.shares(Ranks(rank=rank, size=3), seed)) for rank in range(3)]
    for step in zip(*parts, strict=True):
        [rows] = {rows for _, rows in step}
        assert sum(batch.rows for batch, _ in step) == rows
        assert max(batch.rows for batch, _ in step) - min(batch.rows for batch, _ in step) <= 1
    rows = torch.cat([batch.x for part in parts for batch, _ in part])
    assert torch.equal(rows.sort(0).values, X.sort(0).values)
