"""The command line does its main jobs, refuses what it cannot do in one line, and starts at once."""

import csv
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import log
from pathlib import Path
from types import SimpleNamespace

import arviz as az
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from matplotlib.image import imread
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch.distributions import constraints
from typer.testing import CliRunner

import pyro_genmodels
from pyro_genmodels import (
    GAN,
    MAF,
    VAE,
    Autoregressive,
    BernoulliLikelihood,
    DenseCritic,
    DenseEnergy,
    DenseField,
    DenseGenerator,
    Diffusion,
    DiscretizedLogisticLikelihood,
    EnergyModel,
    Flow,
    FlowDensity,
    Hutchinson,
    Labels,
    Langevin,
    NormalLikelihood,
    ODEFlow,
    RestrictedBoltzmannMachine,
    UNet,
    VariationalBound,
    train,
)
from pyro_genmodels.cli import app as app_module
from pyro_genmodels.cli import console, recipes, reports
from pyro_genmodels.cli.app import app
from pyro_genmodels.cli.notes import DataSource, Notes
from pyro_genmodels.cli.options import DATA, FAMILIES
from pyro_genmodels.datasets import load
from pyro_genmodels.distributions import Implicit
from pyro_genmodels.evaluation import LogLikelihood, compare, plots
from pyro_genmodels.families import DDIM, RK4, Contrastive
from pyro_genmodels.families.family import Family
from pyro_genmodels.infer.compiled import Captured, Eager
from pyro_genmodels.training import Fit, checkpoints, loop

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Pareto k-hat:RuntimeWarning"),  # one epoch trains no wide guide
    pytest.mark.filterwarnings("ignore:.*holds another run:UserWarning"),  # with --force
]

PNG = b"\x89PNG"
QUICK = ["compare", "--data", "digits", "--epochs", "1", "--families", "autoregressive"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def done(*args):
    """What a command prints that ends well."""
    result = invoke(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def python(*args, **options):
    options = {"capture_output": True, "text": True, "timeout": 300, "env": ENVIRONMENT, **options}
    return subprocess.run([sys.executable, *map(str, args)], **options)


def rows(out):
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def check_png(path, *, shape=None):
    """A picture of a plausible size, on which there is something."""
    assert path.read_bytes().startswith(PNG)
    picture = imread(path)
    height, width = picture.shape[:2]
    assert 100 < height < 3000
    assert 100 < width < 4000
    assert picture[..., :3].std() > 0.01
    if shape is not None:
        assert (width > height) == (shape == "wide")


def check_outputs(out, families, *, event_shape=(8, 8), levels=17):
    assert {row["family"] for row in rows(out)} == set(families)
    assert set(rows(out)[0]) >= {"family", "kind", "nats", "se", "bits_per_dim", "seconds"}
    for picture in ("loss.png", "compare.png", "samples.png", *(f"samples_{family}.png" for family in families)):
        check_png(out / picture)
    for family in families:
        draws = az.from_netcdf(out / f"{family}.nc").posterior_predictive["x"]
        assert draws.dims[:2] == ("chain", "draw")
        assert draws.shape[2:] == event_shape
        assert set(draws.to_numpy().ravel()) <= set(range(levels))
        assert load_file(out / f"{family}.safetensors")
        assert json.loads((out / f"{family}.json").read_text())["best"]["epoch"] == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def check_refusal(result, *words):
    assert result.exit_code == 2, (result.output, result.exception)
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert result.stderr.startswith("pyro-genmodels: ")
    for word in words:
        assert str(word) in result.stderr


VERDICT = re.compile(
    r"(?P<family>\w+) on (?P<data>\S+) \((?P<split>\w+)\): (?P<nats>\S+) ± (?P<se>\S+) nats per datum, lower is better "
    r"\((?P<kind>exact|(lower bound|estimate|unreliable|unreliable lower bound), k=\d+), n=(?P<n>\d+)\)"
    r"(; (?P<bits>\S+) bits per dimension)?"
    r"(; Pareto k-hat is .* rows)*"
)
WITHOUT = re.compile(
    r"(?P<family>gan) on (?P<data>\S+) \((?P<split>\w+)\): - \((?P<kind>no likelihood), n=(?P<n>\d+)\); "
    r"sliced Wasserstein distance of samples (?P<nats>\S+), baseline (?P<se>\S+); MMD p=(?P<bits>\S+)"
)


def verdict(text):
    """What `fit` and `evaluate` say of a family, by name."""
    [found] = [match for line in text.splitlines() if (match := VERDICT.fullmatch(line) or WITHOUT.fullmatch(line))]
    said = found.groupdict()
    return {**said, **{name: float(said[name]) for name in ("nats", "se", "bits") if said[name]}, "n": int(said["n"])}


# Small networks, few chains.


def small_build(name):
    """The builder of a family with a network of a few units, and few steps of what samples."""

    def build(data, context):
        shape, levels = data.train.shape[1:], data.levels
        options = {"context": context}
        discrete = BernoulliLikelihood() if levels == 2 else DiscretizedLogisticLikelihood(levels) if levels else None
        if name == "flow":
            return Flow(shape, levels=levels, transform=MAF(transforms=1, hidden=(8,)), **options)
        if name == "vae":
            return VAE(shape, latent_dim=2, likelihood=discrete or NormalLikelihood(), hidden=(8,), dropout=0.1, **options)
        if name == "autoregressive":
            return Autoregressive(shape, likelihood=discrete or NormalLikelihood(), hidden=(8,), dropout=0.5, **options)
        if name == "energy" and levels:
            support = constraints.integer_interval(0, levels - 1)
            energy = RestrictedBoltzmannMachine(20)  # too many units to sum over
            return EnergyModel(shape, energy=energy, support=support, negatives=Contrastive(steps=1), num_steps=10, **options)
        if name == "energy":
            return EnergyModel(shape, energy=DenseEnergy((8,)), sampler=Langevin(), num_steps=10, **options)
        if name == "ode_flow":
            solver = {"solver": RK4(2), "trace": Hutchinson()} if levels else {"solver": RK4(2)}
            return ODEFlow(shape, levels=levels, network=DenseField(8, blocks=1), **solver, **options)
        if name == "diffusion":
            likelihood = VariationalBound() if levels else FlowDensity(RK4(2))
            network = DenseField(8, blocks=1, dropout=0.05)
            return Diffusion(shape, levels=levels, network=network, sampler=DDIM(5), likelihood=likelihood, **options)
        return GAN(shape, levels=levels, generator=DenseGenerator((8,)), critic=DenseCritic((8,)), latent_dim=2, **options)

    return build


@pytest.fixture(scope="session", autouse=True)
def small_recipes():
    """The command line with small families; `test_every_recipe_is_fitted` and the subprocesses use the true ones."""
    torch.set_num_threads(1)  # before the fixtures of this module; `clean_slate` comes after them
    true = recipes.FAMILIES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "log_likelihood", partial(recipes.log_likelihood, num_steps=20))
        patch.setattr(reports, "plot_fits", lambda *args, **kwargs: None)
        patch.setattr(recipes, "FAMILIES", {name: replace(true[name], build=small_build(name)) for name in true})
        yield true


PLOT_FITS, LATTICE, SAVE_FIGURE = reports.plot_fits, plots.lattice, reports.save_figure


@contextmanager
def plotting():
    """Plots, which otherwise are left out, of few samples and on a coarse lattice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reports, "plot_fits", PLOT_FITS)
        patch.setattr(reports, "SAMPLES_IN_PLANE", 200)
        patch.setattr(reports, "SAMPLES_IN_PLANE_OF_CHAINS", 50)
        patch.setattr(plots, "lattice", lambda low, high, n: LATTICE(low, high, 12))
        yield


@pytest.fixture
def plotted():
    with plotting():
        yield


def save_only(patch, *names):
    """Save the figures whose file names start with one of these. Other tests save every figure."""
    patch.setattr(reports, "save_figure", lambda figure, path: path.name.startswith(names) and SAVE_FIGURE(figure, path))


# Data.

N = 160


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Files of rows: three columns and a class; points in the plane; images of 4 x 4 in five levels."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    kind = np.arange(N) % 3
    x = rng.normal(size=(N, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.0, 0.0, 2.0]]) + 3 * kind[:, None]
    frame = pd.DataFrame(x, columns=["height", "width", "depth"]).assign(kind=kind)
    frame.to_csv(folder / "measures.csv", index=False)
    frame.to_parquet(folder / "measures.parquet") if importlib.util.find_spec("pyarrow") else None
    frame[["height", "width", "depth"]].to_csv(folder / "plain.csv", index=False)
    frame[["height", "width"]].to_csv(folder / "plane.csv", index=False)
    np.save(folder / "reals.npy", x)
    np.savez(folder / "named.npz", rows=x, kind=kind, x_other=x[:, :2])
    images = rng.integers(0, 5, (N, 4, 4)) * (np.arange(4) > kind[:, None, None])
    images[0] = 4
    np.savez(folder / "images.npz", x=images, label=kind)
    counts = frame.astype({"height": int, "width": int, "depth": int}).clip(0, 9)
    counts.iloc[0, 0] = 9
    counts.to_csv(folder / "counts.csv", index=False)
    return folder


MEASURES = ["--columns", "height,width,depth"]


def fit(out, *args, epochs=2):
    """Fits, and returns the path of the checkpoint."""
    done("fit", *args, "--epochs", epochs, "--out", out, "--quiet", "--force")
    [path] = [path for path in Path(out).glob("*.safetensors") if ".training" not in path.name]
    return path


@pytest.fixture(scope="module")
def flow(data, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("flow"), "--data", data / "measures.csv", *MEASURES)


@pytest.fixture(scope="module")
def labelled(data, tmp_path_factory):
    args = ["--data", data / "measures.csv", *MEASURES, "--labels", "kind", "--batch-size", 16, "--learning-rate", 0.01]
    return fit(tmp_path_factory.mktemp("labelled"), *args, epochs=25)


@pytest.fixture(scope="module")
def images(data, tmp_path_factory):
    args = ["--data", data / "images.npz", "--labels", "label", "--family", "vae"]
    return fit(tmp_path_factory.mktemp("images"), *args, epochs=5)


# Compare.


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "made" / "here"
    with plotting():
        result = invoke("compare", "--data", data / "images.npz", "--epochs", 1, "--seed", 3, "--out", out)
    return result, out


def test_compare_writes_what_it_promises(run):
    result, out = run
    assert result.exit_code == 0, result.output
    check_outputs(out, FAMILIES, event_shape=(4, 4), levels=5)


def test_compare_says_what_it_knows_and_of_what_kind(run):
    result, out = run
    for row in rows(out):
        assert row["family"] in result.stdout
        wanted = [f"{float(row['nats']) + off:.2f}" for off in (-1e-4, 1e-4)] if row["nats"] else ["- (no likelihood)"]
        assert any(text in result.stdout for text in wanted)  # the table has six digits
    kinds = {row["family"]: row["kind"] for row in rows(out)}
    wanted = {"flow": "lower bound", "vae": "lower bound", "autoregressive": "exact", "energy": "estimate"}
    wanted |= {"ode_flow": "estimate", "diffusion": "lower bound", "gan": "none"}
    sampled = {"flow", "vae", "energy", "diffusion"}  # little training leaves guides that k-hat calls unreliable
    assert all(kind == wanted[name] or (name in sampled and kind == "unreliable") for name, kind in kinds.items())
    assert "exact" in result.stdout
    assert "held-out" in result.stdout
    assert "loo" not in result.stdout.lower()


def test_bits_per_dimension_are_nats_over_dimensions_and_log_2(run):
    for row in rows(run[1]):
        if row["family"] == "gan":
            assert not row["bits_per_dim"]
            continue
        assert float(row["bits_per_dim"]) == pytest.approx(float(row["nats"]) / (16 * log(2)), rel=1e-4)


def test_rows_are_best_first(run):
    nats = [float(row["nats"] or "inf") for row in rows(run[1])]  # without a likelihood last
    assert nats == sorted(nats)


def test_draws_of_every_family_are_compared_with_data(run):
    for row in rows(run[1]):
        assert float(row["sliced_wasserstein"]) > 0
        assert 0 < float(row["mmd_p"]) <= 1


def test_run_json_tells_how_it_was_run(run, data):
    record = json.loads((run[1] / "run.json").read_text())
    expected = {"data": str(data / "images.npz"), "families": list(FAMILIES), "seed": 3, "device": "cpu", "epochs": 1}
    assert record["arguments"].items() >= expected.items()
    assert record["versions"].keys() >= {"python", "torch", "pyro-ppl", "zuko", "arviz", "numpy", "scikit-learn"}
    assert record["versions"]["pyro-genmodels"] == pyro_genmodels.__version__


def test_checkpoint_is_the_state_of_the_best_epoch(run):
    record = json.loads((run[1] / "run.json").read_text())
    for family in FAMILIES:
        saved = json.loads((run[1] / f"{family}.json").read_text())
        assert saved["best"] == record["fits"][family]["best"]


def test_what_compare_wrote_can_be_drawn_from_judged_and_gone_on_with(run, tmp_path):
    out = run[1]
    table = {row["family"]: row for row in rows(out)}
    said = verdict(done("evaluate", out / "autoregressive"))
    assert said["nats"] == pytest.approx(float(table["autoregressive"]["nats"]), abs=1e-3)
    assert said["se"] == pytest.approx(float(table["autoregressive"]["se"]), abs=1e-3)
    done("sample", out / "vae", "-n", 5, "--out", tmp_path / "draws.npy")
    assert np.load(tmp_path / "draws.npy").shape == (5, 4, 4)
    shutil.copytree(out, tmp_path / "copy")
    done("fit", "--resume", tmp_path / "copy" / "autoregressive", "--epochs", 2)
    history = json.loads((tmp_path / "copy" / "autoregressive.json").read_text())["history"]
    assert [record["epoch"] for record in history] == [1, 2]


@pytest.mark.usefixtures("plotted")
def test_digits_are_compared(tmp_path):
    assert "bits/dim" in done(*QUICK, "--out", tmp_path)
    check_outputs(tmp_path, ["autoregressive"])


def test_a_seed_says_everything_whatever_families_are_compared_with(run, data, tmp_path):
    def nats(seed):
        args = ["--data", data / "images.npz", "--families", "autoregressive", "--epochs", 1, "--seed", seed, "--force"]
        done("compare", *args, "--out", tmp_path, "--quiet")
        return rows(tmp_path)[0]["nats"]

    before = next(row["nats"] for row in rows(run[1]) if row["family"] == "autoregressive")
    assert nats(3) == before
    assert nats(4) != before


def test_quiet_prints_the_table_alone(data, tmp_path):
    args = ["compare", "--data", data / "plain.csv", "--epochs", 1, "--families", "autoregressive"]
    result = invoke(*args, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "autoregressive" in result.stdout
    assert "epoch" not in result.stdout
    assert str(tmp_path) not in result.stdout


def test_progress_goes_to_stderr_and_the_folder_is_named(data, tmp_path):
    result = invoke("compare", "--data", data / "plain.csv", "--epochs", 1, "--families", "flow", "--out", tmp_path)
    assert "epoch" in result.stderr
    assert "epoch" not in result.stdout
    assert str(tmp_path) in result.stdout.replace("\n", "")


def test_a_family_named_twice_is_fitted_once(data, tmp_path):
    families = ["--families", "autoregressive, autoregressive,"]
    done("compare", "--data", data / "plain.csv", "--epochs", 1, *families, "--out", tmp_path)
    assert len(rows(tmp_path)) == 1
    assert len(json.loads((tmp_path / "run.json").read_text())["arguments"]["families"]) == 1


class Ring(Family):
    """Draws on a circle, with no density."""

    def forward(self, context=None):
        prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        return Implicit(prior, lambda z, c: dist.Delta(torch.nn.functional.normalize(z, dim=-1), event_dim=1), (2,))


@pytest.mark.usefixtures("plotted")
@pytest.mark.parametrize("beside", [True, False])
def test_a_family_without_a_likelihood_is_a_row_of_dashes(beside, tmp_path, capsys):
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(4,)))
    data = replace(load("ring"), test=load("ring").test[:50])
    history = [{"epoch": 1, "train": 1.0, "valid": 1.0, "seconds": 0.5}]
    made = {"implicit": Ring((2,))} | ({"flow": flow} if beside else {})
    fits = {name: Fit(family, history, history[0]) for name, family in made.items()}
    judged = {name: recipes.evaluate(fit, data.test, None) for name, fit in fits.items()}
    said = console.describe(
        judged["implicit"], None, data.test, lambda: recipes.sample_quality_of(fits["implicit"], data.test, None)
    )
    assert said.startswith("- (no likelihood, n=50); sliced Wasserstein distance of samples ")
    assert console.describe(judged["implicit"], None, data.test[:3], pytest.fail) == "- (no likelihood, n=3)"
    comparison = reports.write(fits, judged, data, tmp_path, {"seed": 0}, conditional=False)
    console.print_table(comparison, data)
    assert "- (no likelihood)" in capsys.readouterr().out
    row = next(row for row in rows(tmp_path) if row["family"] == "implicit")
    assert row["kind"] == "none"
    assert all(row[name] == "" for name in ("nats", "se", "bits_per_dim", "elpd", "elpd_diff", "dse", "weight"))
    assert (tmp_path / "compare.png").exists() == beside
    check_png(tmp_path / "density.png", shape="wide" if beside else None)


@pytest.mark.usefixtures("plotted")
def test_compare_of_the_plane_pictures_its_density_and_knows_the_truth(tmp_path, monkeypatch):
    save_only(monkeypatch, "density.png", "samples.png")
    text = done("compare", "--data", "ring", "--families", "flow,autoregressive", "--epochs", 1, "--out", tmp_path)
    for picture in ("density.png", "samples.png"):
        check_png(tmp_path / picture, shape="wide")
    said = re.search(r"The true density has (\S+) ± (\S+) nats\.", text)
    # log 8 + the entropy of N(0, 0.01^2 I), which 10,000 rows give to 0.01 (variance 1): 4.5 standard errors, 7e-6
    assert float(said[1]) == pytest.approx(log(8) + 1 + log(2 * np.pi * 0.01**2), abs=0.045 + 5e-4)
    assert float(said[2]) == pytest.approx(0.01, abs=1e-3)


def test_compare_given_labels_judges_given_labels(data, tmp_path):
    args = ["--data", data / "measures.csv", *MEASURES, "--families", "flow", "--epochs", 1]
    done("compare", *args, "--labels", "kind", "--out", tmp_path)
    said = verdict(done("evaluate", tmp_path / "flow"))
    assert said["nats"] == pytest.approx(float(rows(tmp_path)[0]["nats"]), abs=1e-3)
    assert checkpoints.load(tmp_path / "flow").context_size == 3


def test_a_family_that_cannot_be_trained_leaves_the_others(data, tmp_path, monkeypatch):
    original = recipes.fit

    def fails(name, *args, **kwargs):
        if name == "vae":
            raise FloatingPointError("the loss is nan at step 3")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(recipes, "fit", fails)
    families = ["--families", "flow,vae,autoregressive"]
    result = invoke("compare", "--data", data / "plain.csv", "--epochs", 1, *families, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0
    assert {row["family"] for row in rows(tmp_path)} == {"flow", "autoregressive"}
    assert result.stderr.splitlines() == ["pyro-genmodels: warning: vae could not be trained: the loss is nan at step 3."]
    refused = invoke("compare", "--data", data / "plain.csv", "--families", "vae", "--out", tmp_path / "none", "--quiet")
    assert refused.exit_code == 2
    assert "none of the families" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "none" / "table.csv").exists()


@pytest.mark.slow
def test_compare_by_default_fits_every_family(tmp_path):
    result = python("-m", "pyro_genmodels", "compare", "--data", "digits", "--epochs", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    check_outputs(tmp_path, FAMILIES)


# Fit, evaluate, sample.


@pytest.mark.usefixtures("plotted")
@pytest.mark.parametrize(
    "name",
    [
        "moons",
        "ring",
        *(pytest.param(name, marks=pytest.mark.slow) for name in DATA if name not in ("digits", "moons", "ring")),
    ],
)
def test_points_in_the_plane_are_fitted_judged_and_pictured(name, tmp_path):
    text = done("fit", "--data", name, "--epochs", 1, "--out", tmp_path)
    said = verdict(text)
    assert (said["family"], said["data"], said["split"], said["kind"], said["n"]) == ("flow", name, "test", "exact", 10_000)
    assert str(tmp_path / "flow.safetensors") in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "density_flow.png",
        "flow.json",
        "flow.safetensors",
        "flow.training.safetensors",
        "loss_flow.png",
        "samples_flow.png",
    ]
    check_png(tmp_path / "samples_flow.png", shape="wide")
    check_png(tmp_path / "loss_flow.png", shape="wide")
    check_png(tmp_path / "density_flow.png", shape="wide" if name in ("ring", "grid", "checkerboard") else None)
    assert verdict(done("evaluate", tmp_path / "flow.safetensors")) == said
    done("sample", tmp_path / "flow", "-n", 300, "--out", tmp_path / "draws.npy", "--picture", tmp_path / "draws.png")
    assert np.load(tmp_path / "draws.npy").shape == (300, 2)
    check_png(tmp_path / "draws.png")


@pytest.mark.usefixtures("plotted")
def test_digits_are_fitted_given_their_labels_drawn_by_label_and_judged(tmp_path):
    args = ["--data", "digits", "--family", "autoregressive", "--labels", "label", "--epochs", 1]
    said = verdict(done("fit", *args, "--out", tmp_path))
    assert (said["data"], said["kind"], said["n"]) == ("digits", "exact", 180)
    assert said["bits"] == pytest.approx(said["nats"] / 64 / log(2), abs=1e-3)
    assert verdict(done("evaluate", tmp_path / "autoregressive")) == said
    draws = tmp_path / "threes.npz"
    picture = ["--picture", tmp_path / "threes.png"]
    done("sample", tmp_path / "autoregressive", "--label", 3, "-n", 20, "--out", draws, *picture)
    with np.load(draws) as file:
        assert file["x"].shape == (20, 8, 8)
        assert set(file["x"].ravel()) <= set(range(17))
        assert set(file["label"]) == {3}
    check_png(tmp_path / "threes.png")
    check_png(tmp_path / "samples_autoregressive.png")
    assert verdict(done("evaluate", tmp_path / "autoregressive", "--data", draws))["n"] == 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "args",
    [
        ["measures.csv", *MEASURES, "--labels", "kind"],
        pytest.param(["images.npz"], marks=pytest.mark.slow),
        pytest.param(["measures.csv", *MEASURES], marks=pytest.mark.slow),
        pytest.param(["images.npz", "--labels", "label"], marks=pytest.mark.slow),
        pytest.param(["counts.csv", *MEASURES, "--levels", "0"], marks=pytest.mark.slow),
    ],
    ids=["reals by label", "images", "reals", "images by label", "integers as reals"],
)
@pytest.mark.filterwarnings("ignore:.*one value in many rows")  # of integers as reals
def test_fit_and_evaluate_say_the_same(family, args, data, tmp_path):
    args = ["--data", data / args[0], *args[1:], "--family", family, "--seed", 5]
    text = done("fit", *args, "--epochs", 1, "--out", tmp_path)
    said = verdict(text)
    assert said["n"] == N // 10
    assert verdict(done("evaluate", tmp_path / family, "--seed", 5)) == said
    if "k=" in said["kind"]:
        other = verdict(done("evaluate", tmp_path / family, "--seed", 6, "-n", 100))
        assert "unreliable" in other["kind"] or other["kind"].split(",")[0] in said["kind"]
        assert other["kind"].endswith(", k=100")
        assert other["nats"] == pytest.approx(said["nats"], abs=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("args", [["measures.csv", *MEASURES], ["images.npz"]], ids=["measures", "images"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_is_fitted(family, args, data, tmp_path, small_recipes, monkeypatch):
    monkeypatch.setattr(recipes, "FAMILIES", small_recipes)
    said = verdict(done("fit", "--data", data / args[0], *args[1:], "--family", family, "--epochs", 1, "--out", tmp_path))
    assert verdict(done("evaluate", tmp_path / family)) == said


KINDS = {"reals": (3, None), "plane": (2, None), "integers": (5, 7), "binary": (5, 2), "image": ((4, 4), 7)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_recipe_builds_a_family_that_a_checkpoint_can_hold(family, kind, small_recipes, tmp_path):
    shape, levels = KINDS[kind]
    shape = shape if isinstance(shape, tuple) else (shape,)
    x = torch.randn(20, *shape) if levels is None else torch.randint(levels, (20, *shape))
    data = SimpleNamespace(train=x, levels=levels)
    for context in (0, Labels(3)):
        made = small_recipes[family].build(data, context)
        args = () if context == 0 else (torch.tensor([0, 2]),)
        assert tuple(made(*args).event_shape) == shape
        made.validate(x)
        checkpoints.save(tmp_path / "made", made)
        assert type(checkpoints.load(tmp_path / "made")) is type(made)


def test_images_of_integers_have_a_network_and_settings_of_their_own(small_recipes):
    recipe = small_recipes["autoregressive"]
    found = {}
    for kind, (shape, levels) in KINDS.items():
        data = SimpleNamespace(train=torch.zeros(2, *(shape if isinstance(shape, tuple) else (shape,))), levels=levels)
        found[kind] = type(recipe.build(data, 0).conditionals).__name__, recipe.training(data).epochs
    assert found.pop("image") == ("_PixelCNN", 24)
    assert set(found.values()) == {("MADE", 300)}


def test_what_evaluate_says_is_the_mean_log_likelihood_of_the_rows(flow, data, tmp_path):
    x = torch.from_numpy(pd.read_csv(data / "plain.csv").to_numpy(np.float32))
    values = checkpoints.load(flow)().log_prob(x).detach().double()
    said = verdict(done("evaluate", flow, "--data", data / "plain.csv", "--out", tmp_path / "deep" / "values.csv"))
    assert (said["split"], said["n"], said["data"]) == ("all", N, "plain.csv")
    assert said["nats"] == pytest.approx(-values.mean().item(), abs=6e-4)
    assert said["se"] == pytest.approx((values.std() / N**0.5).item(), abs=6e-4)
    table = pd.read_csv(tmp_path / "deep" / "values.csv", index_col="row")
    np.testing.assert_allclose(table["log_likelihood"], values.numpy(), rtol=1e-4, atol=1e-4)
    assert (table["std_error"] == 0).all()
    assert list(table.index) == list(range(N))


@pytest.mark.parametrize("split", ["train", "valid", "test", "all"])
def test_the_rows_of_evaluate_are_those_of_the_file(split, flow, data, tmp_path):
    """Counted from 0 and without the header, as pandas does, also of a part of the file."""
    out = tmp_path / "values.csv"
    done("evaluate", flow, "--split", split, "--out", out)
    table = pd.read_csv(out)
    assert len(table) == {"train": 128, "valid": 16, "test": 16, "all": N}[split]
    assert list(table.row) == sorted(set(table.row))
    x = torch.from_numpy(pd.read_csv(data / "plain.csv").iloc[table.row].to_numpy(np.float32))
    expected = checkpoints.load(flow)().log_prob(x).detach()
    np.testing.assert_allclose(table["log_likelihood"], expected.numpy(), rtol=1e-4, atol=1e-4)


def test_the_rows_of_digits_are_those_of_scikit_learn(tmp_path):
    images = torch.from_numpy(load_digits().images).long()
    family = Autoregressive((8, 8), likelihood=DiscretizedLogisticLikelihood(17), hidden=(8,)).eval()
    checkpoints.save(tmp_path / "mine", family)
    done("evaluate", tmp_path / "mine", "--data", "digits", "--out", tmp_path / "values.csv")
    table = pd.read_csv(tmp_path / "values.csv")
    assert len(table) == 180
    np.testing.assert_allclose(
        table["log_likelihood"], family().log_prob(images[table.row.tolist()]).detach().numpy(), rtol=1e-4
    )


def test_the_splits_are_all_rows_each_once(flow):
    parts = {split: verdict(done("evaluate", flow, "--split", split)) for split in ("train", "valid", "test", "all")}
    assert [part["n"] for part in parts.values()] == [128, 16, 16, 160]
    mean = sum(parts[split]["nats"] * parts[split]["n"] for split in ("train", "valid", "test")) / N
    assert parts["all"]["nats"] == pytest.approx(mean, abs=1.5e-3)
    assert verdict(done("evaluate", flow)) == parts["test"]


def test_the_file_it_was_fitted_to_is_known_by_any_path(flow, data, monkeypatch):
    """Or the rows of training would be judged by unasked."""
    said = verdict(done("evaluate", flow))
    assert verdict(done("evaluate", flow, "--data", data / "measures.csv")) == said
    monkeypatch.chdir(data)
    for path in ("measures.csv", "./measures.csv", f"../{data.name}/measures.csv"):
        assert verdict(done("evaluate", flow, "--data", path)) == said


def test_a_named_data_set_is_judged_by_a_family_of_a_file(data, tmp_path):
    args = ["--data", data / "measures.csv", "--columns", "height,width", "--family", "autoregressive"]
    path = fit(tmp_path, *args, epochs=1)
    said = verdict(done("evaluate", path, "--data", "moons"))
    assert (said["data"], said["split"], said["n"]) == ("moons", "test", 10_000)


def test_columns_are_found_by_their_names(flow, data, tmp_path):
    frame = pd.read_csv(data / "measures.csv")
    expected = verdict(done("evaluate", flow, "--split", "all"))["nats"]
    frame[["depth", "kind", "width", "height"]].to_csv(tmp_path / "mixed.csv", index=False)
    assert verdict(done("evaluate", flow, "--data", tmp_path / "mixed.csv"))["nats"] == expected
    path = fit(tmp_path / "plain", "--data", data / "plain.csv", epochs=1)
    expected = verdict(done("evaluate", path, "--split", "all"))["nats"]
    frame[["depth", "width", "height"]].to_csv(tmp_path / "turned.csv", index=False)
    assert verdict(done("evaluate", path, "--data", tmp_path / "turned.csv"))["nats"] == expected


SUFFIXES = [".npy", ".npz", ".csv", *([".parquet"] if importlib.util.find_spec("pyarrow") else [])]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_draws_are_a_file_that_evaluate_reads(suffix, flow, tmp_path):
    out = tmp_path / "made" / f"draws{suffix}"
    assert str(out) in done("sample", flow, "-n", 70, "--out", out)
    columns = ["--columns", "x"] if suffix == ".npz" else []
    said = verdict(done("evaluate", flow, "--data", out, *columns))
    assert (said["n"], said["split"]) == (70, "all")
    if suffix in (".csv", ".parquet"):
        frame = pd.read_csv(out) if suffix == ".csv" else pd.read_parquet(out)
        assert list(frame.columns) == ["height", "width", "depth"]


@pytest.mark.parametrize("source", ["reals.npy", "plain.csv", "plane.csv"])
def test_draws_of_a_family_of_all_columns_are_judged_as_they_are(source, data, tmp_path):
    path = fit(tmp_path, "--data", data / source, "--family", "autoregressive", epochs=1)
    said = []
    for suffix in SUFFIXES:
        done("sample", path, "-n", 70, "--out", tmp_path / f"draws{suffix}")
        said.append(verdict(done("evaluate", path, "--data", tmp_path / f"draws{suffix}")))
        assert said[-1]["n"] == 70
    assert all(one["nats"] == pytest.approx(said[0]["nats"], abs=1.1e-3) for one in said)


def test_draws_of_a_file_without_header_are_judged_as_they_are(data, tmp_path):
    pd.read_csv(data / "plain.csv").to_csv(tmp_path / "bare.csv", index=False, header=False)
    path = fit(tmp_path / "out", "--data", tmp_path / "bare.csv", epochs=1)
    done("sample", path, "-n", 50, "--out", tmp_path / "draws.csv")
    assert verdict(done("evaluate", path, "--data", tmp_path / "draws.csv"))["n"] == 50


def test_draws_given_labels_are_judged_as_they_are(labelled, images, data, tmp_path):
    done("sample", labelled, "-n", 50, "--out", tmp_path / "draws.csv")
    assert verdict(done("evaluate", labelled, "--data", tmp_path / "draws.csv"))["n"] == 50
    done("sample", images, "-n", 50, "--out", tmp_path / "draws.npz")
    assert verdict(done("evaluate", images, "--data", tmp_path / "draws.npz"))["n"] == 50


def test_labels_do_not_take_the_place_of_a_column_by_that_name(data, tmp_path):
    frame = pd.read_csv(data / "measures.csv").rename(columns={"height": "label"})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    args = ["--data", tmp_path / "rows.csv", "--columns", "label,width,depth", "--labels", "kind"]
    path = fit(tmp_path / "out", *args, epochs=1)
    done("sample", path, "-n", 30, "--out", tmp_path / "draws.csv")
    draws = pd.read_csv(tmp_path / "draws.csv")
    assert draws.shape == (30, 4)
    assert (draws["label"] % 1 != 0).any()


def test_draws_of_an_array_by_name_are_judged_as_they_are(data, tmp_path):
    args = ["--data", data / "named.npz", "--columns", "rows", "--labels", "kind"]
    path = fit(tmp_path / "out", *args, epochs=1)
    done("sample", path, "-n", 50, "--out", tmp_path / "draws.npz")
    assert verdict(done("evaluate", path, "--data", tmp_path / "draws.npz"))["n"] == 50


def test_draws_are_those_of_the_family_by_their_seed(flow, tmp_path):
    family = checkpoints.load(flow)
    for seed in (0, 4):
        pyro.set_rng_seed(seed)
        expected = family().sample((30,)).detach().numpy()
        done("sample", flow, "-n", 30, "--seed", seed, "--out", tmp_path / "draws.npy", "--force")
        assert np.array_equal(np.load(tmp_path / "draws.npy"), expected)


def test_labels_are_drawn_in_turn_or_one(labelled, images, tmp_path):
    for checkpoint, name, mean in ((labelled, "draws.csv", True), (images, "draws.npz", False)):
        tables = {}
        for label in (None, 0, 2):
            args = [] if label is None else ["--label", label]
            done("sample", checkpoint, "-n", 90, *args, "--out", tmp_path / name, "--force")
            file = tmp_path / name
            tables[label] = pd.read_csv(file) if name.endswith("csv") else pd.DataFrame({"label": np.load(file)["label"]})
        column = tables[None].columns[-1]
        assert list(tables[None][column]) == [0, 1, 2] * 30
        assert set(tables[0][column]) == {0}
        assert set(tables[2][column]) == {2}
        if mean:  # the classes are 6 apart in each coordinate, of deviation 2 at most: at 2, 7 standard errors, 1e-11
            assert ((tables[2] - tables[0]).mean()[["height", "width", "depth"]] > 2).all()


@pytest.mark.usefixtures("plotted")
def test_a_family_of_labels_pictures_its_draws_and_density(data, tmp_path):
    frame = pd.read_csv(data / "measures.csv")[["height", "width", "kind"]]
    frame.to_csv(tmp_path / "plane.csv", index=False)
    fit(tmp_path / "out", "--data", tmp_path / "plane.csv", "--labels", "kind", epochs=1)
    check_png(tmp_path / "out" / "density_flow.png")
    check_png(tmp_path / "out" / "samples_flow.png", shape="wide")


@pytest.mark.usefixtures("plotted")
@pytest.mark.parametrize(
    ("name", "conditional"),
    [
        ("moons", True),
        ("digits", False),
        pytest.param("moons", False, marks=pytest.mark.slow),
        pytest.param("digits", True, marks=pytest.mark.slow),
    ],
)
def test_ways_from_noise_to_data_are_pictured(name, conditional, tmp_path, monkeypatch):
    save_only(monkeypatch, "trajectory")
    data, context = load(name), Labels(10) if conditional else 0
    shape, network = data.train.shape[1:], UNet((8, 8)) if name == "digits" else DenseField(8, 1)
    solver, options = RK4(1), {"context": context, "levels": data.levels, "network": network}
    families = {
        "ode_flow": ODEFlow(shape, solver=solver, **options),
        "diffusion": Diffusion(shape, sampler=DDIM(5), likelihood=FlowDensity(solver), **options),
        "autoregressive": Autoregressive(
            shape, context=context, hidden=(4,), likelihood=DiscretizedLogisticLikelihood(17) if data.levels else None
        ),
    }
    history = [{"epoch": 1, "train": 1.0, "valid": 1.0}]
    fits = {key: Fit(family.eval(), history) for key, family in families.items()}
    PLOT_FITS(fits, data, tmp_path, conditional=conditional, suffix="_all")
    check_png(tmp_path / "trajectory_all.png", shape="wide")
    PLOT_FITS({"autoregressive": fits["autoregressive"]}, data, tmp_path, conditional=conditional, suffix="_one")
    assert not (tmp_path / "trajectory_one.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_pictures_of_draws_are_of_the_kind_asked_for(suffix, images, tmp_path):
    start = {".png": PNG, ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix]
    picture = tmp_path / "made" / f"draws{suffix}"
    done("sample", images, "-n", 12, "--out", tmp_path / "draws.npy", "--picture", picture)
    assert picture.read_bytes().startswith(start)


def test_shapes_of_any_kind_are_fitted_and_drawn(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((40,), (40, 1), (40, 2, 3), (40, 2, 2, 2)):
        np.save(tmp_path / "rows.npy", rng.normal(size=shape))
        path = fit(tmp_path / "out", "--data", tmp_path / "rows.npy", "--family", "autoregressive", epochs=1)
        done("sample", path, "-n", 7, "--out", tmp_path / "draws.npy", "--force")
        assert np.load(tmp_path / "draws.npy").shape == (7, *shape[1:])
        assert verdict(done("evaluate", path, "--data", tmp_path / "draws.npy"))["n"] == 7


@pytest.mark.filterwarnings("ignore:.*one value in many rows")
def test_levels_are_counted_said_or_taken_for_reals(data, tmp_path):
    for args, levels in (([], 10), (["--levels", 12], 12), (["--levels", 0], None)):
        path = fit(tmp_path, "--data", data / "counts.csv", "--columns", "height,width", *args, epochs=1)
        assert checkpoints.load(path).levels == levels
        said = verdict(done("evaluate", path))
        assert (said["bits"] is None) == (levels is None)
        done("sample", path, "-n", 50, "--out", tmp_path / "draws.csv", "--force")
        draws = pd.read_csv(tmp_path / "draws.csv").to_numpy()
        assert (levels is None) == bool((draws % 1).any())
        assert verdict(done("evaluate", path, "--data", tmp_path / "draws.csv"))["n"] == 50


@pytest.mark.usefixtures("plotted")
def test_the_smallest_file_that_is_taken_is_fitted_without_a_warning(data, tmp_path):
    pd.read_csv(data / "plane.csv")[:10].to_csv(tmp_path / "ten.csv", index=False)
    result = invoke("fit", "--data", tmp_path / "ten.csv", "--epochs", 1, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.exception
    assert result.stderr == ""


def test_a_column_of_unix_times_is_fitted_to_the_second(tmp_path):
    """float32 tells every second minute apart. Right value: the entropy of a normal of deviation 1000, 8.33 nats."""
    times = 1.7e9 + 1000 * np.random.default_rng(0).normal(size=200)
    pd.DataFrame({"t": times, "b": times[::-1] - 1.7e9}).to_csv(tmp_path / "times.csv", index=False)
    path = fit(tmp_path / "out", "--data", tmp_path / "times.csv", epochs=1)
    result = done("evaluate", path, "--data", tmp_path / "times.csv", "--out", tmp_path / "values.csv")
    nats = -pd.read_csv(tmp_path / "values.csv").iloc[:, 1].mean()
    assert 15.5 < nats < 19.0, result.stdout  # 16.7
    done("sample", path, "-n", 50, "--out", tmp_path / "draws.csv")
    draws = pd.read_csv(tmp_path / "draws.csv")["t"]
    assert draws.between(1.7e9 - 1e4, 1.7e9 + 1e4).all()
    assert (draws % 1 != 0).all()


def test_one_draw_is_pictured_without_a_warning(data, tmp_path):
    path = fit(tmp_path / "out", "--data", data / "plane.csv", epochs=1)
    result = invoke("sample", path, "-n", 1, "--out", tmp_path / "one.npy", "--picture", tmp_path / "one.png")
    assert result.exit_code == 0, result.exception
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_a_seed_says_everything_and_the_same_folder_may_be_used_again(data, tmp_path):
    go = partial(fit, tmp_path / "out", "--data", data / "plane.csv", epochs=2)
    first = load_file(go("--seed", 1))
    before = [path.name for path in (tmp_path / "out").iterdir()]
    again, other = load_file(go("--seed", 1)), None
    after = [path.name for path in (tmp_path / "out").iterdir()]
    [older] = {*after} - {*before}
    assert re.fullmatch(r"flow\.\d{8}T\d{6}Z-[0-9a-f]{6}\.training\.safetensors", older)
    other = load_file(go("--seed", 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.usefixtures("plotted")
def test_quiet_fit_says_the_number_alone(data, tmp_path):
    result = invoke("fit", "--data", data / "plain.csv", "--epochs", 1, "--out", tmp_path, "--quiet")
    assert verdict(result.stdout)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
    result = invoke("sample", tmp_path / "flow", "--out", tmp_path / "d.npy", "-n", 3, "--quiet")
    assert (result.stdout, result.stderr) == ("", "")


def test_the_options_of_training_are_followed(data, tmp_path, monkeypatch):
    seen = {}

    def spy(*args, **kwargs):
        seen.update(kwargs)
        return train(*args, **kwargs)

    monkeypatch.setattr(recipes, "train", spy)
    options = ["--batch-size", 32, "--learning-rate", 0.25, "--patience", 3, "--epochs", 4]
    done("fit", "--data", data / "plain.csv", *options, "--out", tmp_path)
    assert (seen["batch_size"], seen["patience"], seen["epochs"]) == (32, 3, 4)
    assert seen["optim"].keywords == {"lr": 0.25}
    notes = checkpoints.read(tmp_path / "flow")[1]["notes"]
    assert (notes["batch_size"], notes["learning_rate"], notes["patience"]) == (32, 0.25, 3)


@pytest.mark.parametrize("family", ["flow", "gan"])
def test_the_training_step_is_compiled_if_it_is_asked_for(family, data, tmp_path, monkeypatch):
    """Captured instead, which takes less time."""
    fits = []
    monkeypatch.setattr(recipes, "train", lambda *args, **kwargs: fits.append(train(*args, **kwargs)) or fits[-1])
    monkeypatch.setattr(recipes, "default_mode", lambda: Captured(script=False))
    args = ["--data", data / "plain.csv", "--family", family, "--epochs", 2]
    done("fit", *args, "--out", tmp_path / "eager")
    done("fit", *args, "--out", tmp_path / "compiled", "--compile")
    assert [fit.mode for fit in fits] == [Eager(), Captured(script=False)]
    one, two = (fit.history[-1]["train"] for fit in fits)
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)


# Going on.


def same_run(a, b):
    """Whether the checkpoints of two runs are the same, but for the seconds."""
    for suffix in (".safetensors", ".training.safetensors"):
        one, two = (load_file(path.with_suffix("").with_suffix(suffix)) for path in (a, b))
        if one.keys() != two.keys() or not all(torch.equal(one[name], two[name]) for name in one):
            return False
    histories = [checkpoints.read(path)[1]["history"] for path in (a, b)]
    one, two = ([{k: v for k, v in record.items() if k != "seconds"} for record in history] for history in histories)
    return one == two


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in ("vae", "gan") else pytest.mark.slow) for f in FAMILIES])
def test_a_run_that_goes_on_ends_as_if_it_had_never_stopped(family, data, tmp_path):
    args = ["--data", data / "measures.csv", *MEASURES, "--labels", "kind", "--family", family, "--seed", 2]
    args += ["--batch-size", 40, "--learning-rate", 0.01, "--patience", 9]
    whole = done("fit", *args, "--epochs", 5, "--out", tmp_path / "whole")
    done("fit", *args, "--epochs", 2, "--out", tmp_path / "parts")
    done("fit", "--resume", tmp_path / "parts" / f"{family}.safetensors", "--epochs", 3)
    text = done("fit", "--resume", tmp_path / "parts" / family, "--epochs", 5)
    assert verdict(text) == verdict(whole)
    assert same_run(tmp_path / "parts" / f"{family}.safetensors", tmp_path / "whole" / f"{family}.safetensors")
    notes = [checkpoints.read(tmp_path / name / family)[1]["notes"] for name in ("parts", "whole")]
    assert notes[0] == notes[1]


def test_data_and_checkpoint_may_have_moved(data, tmp_path):
    shutil.copy(data / "plain.csv", tmp_path / "rows.csv")
    path = fit(tmp_path / "out", "--data", tmp_path / "rows.csv", epochs=2)
    said = verdict(done("evaluate", path))
    (tmp_path / "out").rename(tmp_path / "there")
    (tmp_path / "rows.csv").rename(tmp_path / "there" / "rows.csv")
    path = tmp_path / "there" / "flow.safetensors"
    check_refusal(invoke("evaluate", path), "rows.csv")
    check_refusal(invoke("fit", "--resume", path), "rows.csv")
    moved = ["--data", tmp_path / "there" / "rows.csv"]
    assert verdict(done("evaluate", path, *moved, "--split", "test")) == said
    done("fit", "--resume", path, *moved, "--epochs", 3)
    assert verdict(done("evaluate", path))["n"] == said["n"]
    assert len(checkpoints.read(path)[1]["history"]) == 3


@pytest.mark.parametrize(
    "option",
    [
        "--family=vae",
        "--columns=height",
        "--labels=kind",
        "--levels=3",
        "--seed=0",
        "--batch-size=5",
        "--learning-rate=1",
        "--out=elsewhere",
    ],
)
def test_settings_of_ones_own_do_not_go_with_resume(option, flow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(flow.parent, tmp_path / "copy")
    check_refusal(invoke("fit", "--resume", "copy/flow.safetensors", "--epochs", 3, option), option.split("=")[0])
    assert len(checkpoints.read(tmp_path / "copy" / "flow")[1]["history"]) == 2
    assert not (tmp_path / "elsewhere").exists()


def test_other_data_do_not_go_with_resume(flow, data, tmp_path):
    shutil.copytree(flow.parent, tmp_path / "copy")
    pd.read_csv(data / "measures.csv")[:-20].to_csv(tmp_path / "fewer.csv", index=False)
    before = flow.read_bytes()
    check_refusal(invoke("fit", "--resume", tmp_path / "copy" / "flow", "--data", tmp_path / "fewer.csv"), "128 rows")
    check_refusal(invoke("fit", "--resume", tmp_path / "copy" / "flow", "--data", data / "plane.csv"), "plane.csv", "depth")
    assert (tmp_path / "copy" / "flow.safetensors").read_bytes() == before


def test_a_run_that_has_ended_says_so_and_goes_on_with_more_patience(data, tmp_path):
    args = ["--data", data / "plain.csv", "--learning-rate", 0.1, "--patience", 2, "--family", "autoregressive"]
    path = fit(tmp_path, *args, epochs=200)
    epochs = len(checkpoints.read(path)[1]["history"])
    result = invoke("fit", "--resume", path, "--epochs", 1)
    assert f"nothing was trained: the run already has {epochs} epochs" in result.stderr
    result = invoke("fit", "--resume", path, "--epochs", 200, "--patience", 4, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(checkpoints.read(path)[1]["history"]) > epochs
    assert checkpoints.read(path)[1]["notes"]["patience"] == 4


def test_a_folder_is_not_taken_for_a_checkpoint(flow):
    for command in (["fit", "--resume"], ["sample"], ["evaluate"]):
        check_refusal(invoke(*command, flow.parent), "is a folder", flow)


def test_a_command_that_fails_leaves_no_empty_folders(data, tmp_path):
    pd.DataFrame({"a": ["x"] * 20}).to_csv(tmp_path / "text.csv", index=False)
    before = sorted(tmp_path.iterdir())
    for command in ("fit", "compare"):
        check_refusal(invoke(command, "--data", tmp_path / "text.csv", "--out", tmp_path / "new" / "deep"), "not numeric")
        assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "mine").mkdir()
    check_refusal(invoke("fit", "--data", tmp_path / "text.csv", "--out", tmp_path / "mine"), "not numeric")
    assert (tmp_path / "mine").is_dir()


def test_files_are_replaced_only_by_force(flow, tmp_path):
    for command, option, name in (("sample", "--out", "s.csv"), ("evaluate", "--out", "v.csv")):
        (tmp_path / name).write_text("mine")
        check_refusal(invoke(command, flow, option, tmp_path / name), name, "--force")
        assert (tmp_path / name).read_text() == "mine"
        done(command, flow, option, tmp_path / name, "--force")
        assert (tmp_path / name).read_text() != "mine"


def test_steps_of_large_numbers_are_told():
    notes = Notes("flow", None, ["date", "price"], None)
    x = torch.tensor([[1.79e9, 2.5], [1.78e9, -3.0]])
    assert reports.coarse_columns(x, notes) == "those of date are 128 apart"
    assert reports.coarse_columns(x.double(), notes) == reports.coarse_columns(x.long(), notes) == ""


def test_a_run_that_has_ended_stays_as_it_is(data, tmp_path):
    args = ["--data", data / "plain.csv", "--learning-rate", 0.1, "--patience", 2, "--family", "autoregressive"]
    path = fit(tmp_path, *args, epochs=200)
    history = checkpoints.read(path)[1]["history"]
    assert len(history) < 200
    said = verdict(done("evaluate", path))
    text = done("fit", "--resume", path)
    assert verdict(text) == said
    assert checkpoints.read(path)[1]["history"] == history


def test_what_cannot_be_gone_on_with_is_refused(flow, tmp_path):
    shutil.copytree(flow.parent, tmp_path / "copy")
    run_file = tmp_path / "copy" / "flow.training.safetensors"
    run_file.write_bytes(run_file.read_bytes()[:-5])
    check_refusal(invoke("fit", "--resume", tmp_path / "copy" / "flow"), "flow.training.safetensors", "damaged")
    run_file.unlink()
    check_refusal(invoke("fit", "--resume", tmp_path / "copy" / "flow"), "flow.training.safetensors")
    check_refusal(invoke("fit", "--resume", tmp_path / "copy" / "flw"), "flw.safetensors", "flow.safetensors")
    family = Flow((3,), transform=MAF(transforms=1, hidden=(4,)))
    train(family, torch.randn(20, 3), epochs=1, checkpoint=tmp_path / "python", progress=False)
    check_refusal(invoke("fit", "--resume", tmp_path / "python"), "python.safetensors", "command line")


# Checkpoints of Python.


@pytest.mark.parametrize("notes", [None, "of last week", ["a"], {"source": "UCI"}, {"columns": 3}], ids=str)
def test_a_checkpoint_of_python_is_drawn_from_and_judged_by_data_that_are_said(notes, data, tmp_path):
    family = Flow((3,), transform=MAF(transforms=1, hidden=(4,)))
    checkpoints.save(tmp_path / "mine", family, **({} if notes is None else {"notes": notes}))
    done("sample", tmp_path / "mine", "-n", 9, "--out", tmp_path / "draws.csv")
    assert pd.read_csv(tmp_path / "draws.csv").shape == (9, 3)
    check_refusal(invoke("evaluate", tmp_path / "mine"), "--data")
    assert verdict(done("evaluate", tmp_path / "mine", "--data", data / "plain.csv"))["n"] == N


def test_a_family_that_only_python_can_build_is_refused(tmp_path):
    checkpoints.save(tmp_path / "mine", Flow((2,), context=torch.nn.Linear(3, 2), transform=MAF(hidden=(4,))))
    check_refusal(invoke("sample", tmp_path / "mine"), "context", "of your own")
    checkpoints.save(tmp_path / "vector", Flow((2,), context=3, transform=MAF(hidden=(4,))))
    check_refusal(invoke("sample", tmp_path / "vector", "--out", tmp_path / "draws.csv"), "context")


# When it is stopped.


def until(condition, process):
    """Wait until the condition holds, however slow the machine is; fail if the process ends before."""
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"it ended by itself: {process.communicate()}")
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_in_training_keeps_the_run_and_says_where(number, code, data, tmp_path, small_recipes, monkeypatch):
    args = ["--data", data / "plain.csv", "--batch-size", 64, "--patience", 10**6]
    command = [sys.executable, "-m", "pyro_genmodels", "fit", *args, "--epochs", 10**6, "--out", tmp_path / "parts"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what runs behind
    with subprocess.Popen([*map(str, command)], **pipes) as process:
        path = tmp_path / "parts" / "flow.safetensors"
        record = path.with_suffix(".json")
        until(lambda: record.exists() and len(json.loads(record.read_text())["history"]) > 1, process)
        process.send_signal(number)
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert "Traceback" not in stderr
    assert number.name in stderr
    assert str(path) in stderr
    count = len(checkpoints.read(tmp_path / "parts" / "flow.training")[1]["history"])
    assert count >= 1
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]

    monkeypatch.setattr(recipes, "FAMILIES", small_recipes)
    assert verdict(done("evaluate", path))["n"] == N // 10
    done("fit", "--resume", path, "--epochs", count + 2, "--quiet")
    assert len(checkpoints.read(path)[1]["history"]) == count + 2
    if number == signal.SIGTERM:
        done("fit", *args, "--epochs", count + 2, "--out", tmp_path / "whole", "--quiet")
        assert same_run(path, tmp_path / "whole" / "flow.safetensors")


def stop_at(epoch, monkeypatch, error=KeyboardInterrupt):
    original, epochs = loop._train_epoch, []

    def stopped(*args):
        epochs.append(1)
        if len(epochs) == epoch:
            raise error
        return original(*args)

    monkeypatch.setattr(loop, "_train_epoch", stopped)


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stop_is_told_in_a_line_and_where_the_run_is_in_another(command, epoch, data, tmp_path, monkeypatch):
    stop_at(epoch, monkeypatch)
    result = invoke(command, "--data", data / "plain.csv", "--out", tmp_path, "--quiet")
    assert result.exit_code == 130
    assert result.stdout == ""
    stopped, where = result.stderr.strip().splitlines()
    assert stopped == "pyro-genmodels: stopped by SIGINT."
    assert str(tmp_path / "flow.safetensors") in where
    assert f"epoch {epoch - 1}" in where
    assert "resume" in where
    monkeypatch.undo()
    done("fit", "--resume", tmp_path / "flow", "--epochs", epoch + 1)
    assert len(checkpoints.read(tmp_path / "flow")[1]["history"]) == epoch + 1


def test_a_stop_while_data_are_read_is_told_in_a_line(data, tmp_path, monkeypatch):
    def stopped(self, max_bytes):
        raise KeyboardInterrupt

    monkeypatch.setattr(DataSource, "load", stopped)
    result = invoke("fit", "--data", data / "plain.csv", "--out", tmp_path)
    assert (result.exit_code, result.stderr.strip()) == (130, "pyro-genmodels: stopped by SIGINT.")


def test_a_stop_with_traceback_also_says_where_the_run_is(data, tmp_path, monkeypatch):
    stop_at(3, monkeypatch)
    result = invoke("--traceback", "fit", "--data", data / "plain.csv", "--out", tmp_path, "--quiet")
    assert result.exit_code == 130
    assert str(tmp_path / "flow.safetensors") in result.stderr + "".join(getattr(result.exception, "__notes__", []))


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_training_that_diverges_at_once_is_told_in_a_line(data, tmp_path):
    result = invoke("fit", "--data", data / "plain.csv", "--learning-rate", 1e30, "--out", tmp_path, "--quiet")
    check_refusal(result, "step", "learning rate")
    assert not list(tmp_path.glob("*.safetensors"))


def test_training_that_diverges_later_is_told_and_the_best_is_judged(data, tmp_path, monkeypatch):
    stop_at(3, monkeypatch, FloatingPointError("the loss is nan at step 4: lower the learning rate"))
    with pytest.warns(RuntimeWarning, match=r"loss is nan at step 4.*epoch 3.*epoch 2 is kept"):
        text = done("fit", "--data", data / "plain.csv", "--out", tmp_path)
    assert "step 4" in text
    monkeypatch.undo()
    assert verdict(done("evaluate", tmp_path / "flow")) == verdict(text)
    assert len(checkpoints.read(tmp_path / "flow")[1]["history"]) == 2


def test_a_warning_is_a_line_and_nothing_else_is_said_when_quiet(data, tmp_path, monkeypatch):
    original = recipes.fit

    def fit(*args, **kwargs):
        warnings.warn("look out", RuntimeWarning, stacklevel=2)
        return original(*args, **kwargs)

    monkeypatch.setattr(recipes, "fit", fit)
    args = ["fit", "--data", data / "plain.csv", "--epochs", 1, "--out", tmp_path, "--quiet"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console.warn
        result = invoke(*args)
    assert result.exit_code == 0
    assert result.stderr == "pyro-genmodels: warning: look out\n"
    assert len(result.stdout.splitlines()) == 1
    assert verdict(result.stdout)


def test_the_entry_point_shows_warnings_in_a_line_and_takes_sigterm_for_ctrl_c(monkeypatch):
    calls = []
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(app_module, "app", lambda **kwargs: calls.append((warnings.showwarning, kwargs)))
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    before = signal.getsignal(signal.SIGTERM)
    try:
        app_module.main()
        assert signal.getsignal(signal.SIGTERM) is console.terminate
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == [(console.warn, {"prog_name": "pyro-genmodels"})]


# A full disk, and folders that take nothing.


def full_disk(room):
    """Files may have so many bytes in this process; -1 gives back all."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room if room >= 0 else hard, hard))


wants_limits = pytest.mark.skipif(not importlib.util.find_spec("resource"), reason="wants the limits of Unix")


@wants_limits
@pytest.mark.parametrize("room", ["for nothing", "for the parameters alone"])
def test_a_full_disk_is_told_in_a_line_and_leaves_what_was_there(room, data, tmp_path):
    path = fit(tmp_path / "out", "--data", data / "plain.csv", epochs=1)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    sizes = [len(before[f"flow{kind}.safetensors"]) for kind in ("", ".training")]
    assert sizes[0] < sizes[1]
    full_disk(1000 if room == "for nothing" else sum(sizes) // 2)
    try:
        result = invoke(
            "fit", "--data", data / "plain.csv", "--epochs", 2, "--seed", 9, "--out", path.parent, "--force", "--quiet"
        )
    finally:
        full_disk(-1)
    check_refusal(result)
    assert re.search(r"flow(\.training)?\.safetensors", result.stderr)
    after = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert after.keys() == before.keys()
    assert after["flow.training.safetensors"] == before["flow.training.safetensors"]
    checkpoints.load(path)


@wants_limits
@pytest.mark.parametrize("name", ["draws.npy", "draws.npz", "draws.csv", "draws.parquet", "draws.png", "values.csv"])
def test_a_full_disk_leaves_no_half_of_a_file(name, data, tmp_path):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = fit(tmp_path / "out", "--data", data / "plane.csv", epochs=1)
    out = tmp_path / "to" / name
    out.parent.mkdir()
    out.write_bytes(b"old")
    args = ["sample", path, "-n", 5000, "--out", out]
    if name == "draws.png":
        args = ["sample", path, "-n", 3, "--out", tmp_path / "small.npy", "--picture", out]
    if name == "values.csv":
        args = ["evaluate", path, "--split", "all", "--out", out]
    full_disk(2000)
    try:
        result = invoke(*args)
    finally:
        full_disk(-1)
    check_refusal(result, name)
    assert [p.read_bytes() for p in out.parent.iterdir()] == [b"old"]


def test_an_output_folder_that_cannot_be_made_is_refused(data, flow, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for command in (["compare"], ["fit"]):
        args = [*command, "--data", data / "plain.csv", "--out"]
        check_refusal(invoke(*args, tmp_path / "file"), "file")
        check_refusal(invoke(*args, tmp_path / "file" / "below"), "below")
    check_refusal(invoke("sample", flow, "--out", tmp_path / "file" / "draws.csv"), "file")
    check_refusal(invoke("evaluate", flow, "--out", tmp_path / "file" / "values.csv"), "file")
    check_refusal(invoke("sample", flow, "--out", tmp_path), "kind of file")
    (tmp_path / "folder.csv").mkdir()
    check_refusal(invoke("sample", flow, "--out", tmp_path / "folder.csv"), "folder.csv")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files, not even from root")
def test_an_output_folder_that_takes_no_files_is_refused_before_training(data, flow, monkeypatch):
    monkeypatch.setattr(recipes, "fit", lambda *args, **kwargs: pytest.fail("it trained"))
    check_refusal(invoke("compare", "--data", data / "plain.csv", "--out", "/proc"), "/proc")
    check_refusal(invoke("fit", "--data", data / "plain.csv", "--out", "/proc"), "/proc")
    check_refusal(invoke("sample", flow, "--out", "/proc/draws.csv"), "/proc/draws.csv")


def test_a_file_that_cannot_be_written_is_refused_before_drawing(flow, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "draw", lambda *args, **kwargs: pytest.fail("it drew"))
    for out in (tmp_path / "draws.xyz", tmp_path / "draws"):
        check_refusal(invoke("sample", flow, "--out", out), "kind of file", ".csv")


# What it refuses.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--families", "flw"], ["flw", "Did you mean flow", "autoregressive"]),
        (["--families", "vae,autoregresive"], ["autoregresive", "Did you mean autoregressive"]),
        (["--families", "zebra"], ["zebra", *FAMILIES]),
        (["--families", ""], [*FAMILIES]),
        (["--data", "digit"], ["digit", "Did you mean digits"]),
        (["--device", "banana"], ["banana"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--device", "meta"], ["meta"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_refused_in_one_line(args, words, tmp_path):
    known = {"--data": "digits", "--families": "autoregressive", "--out": tmp_path, "--epochs": 1}
    known[args[0]] = args[1]
    result = invoke("compare", *(part for option in known.items() for part in option))
    check_refusal(result, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--family", "Flow"], ["Flow", "Did you mean flow"]),
        (["--family", "zebra"], ["zebra", *FAMILIES]),
        (["--data", "Moons"], ["Moons", "Did you mean moons"]),
        (["--data", "chekerboard"], ["Did you mean checkerboard"]),
        (["--data", "nowhere.csv"], ["nowhere.csv", "no such file"]),
        (["--data", "rows.txt"], [".txt", ".csv"]),
        (["--data", "moons", "--labels", "kind"], ["kind", "label"]),
        (["--data", "moons", "--columns", "x"], ["moons", "columns"]),
        (["--data", "digits", "--levels", "3"], ["digits", "levels"]),
        (["--learning-rate", "0"], ["--learning-rate", "0"]),
        (["--learning-rate", "-1"], ["--learning-rate", "-1"]),
        (["--learning-rate", "nan"], ["--learning-rate", "nan"]),
        (["--learning-rate", "inf"], ["--learning-rate", "inf"]),
        (["--data", "moons", "--device", "banana"], ["banana"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_fitted_is_refused_in_one_line(args, words, tmp_path):
    check_refusal(invoke("fit", *args, "--out", tmp_path, "--epochs", 1), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_without_data_a_usage_line_is_printed_and_nothing_is_trained(command, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "fit", lambda *args, **kwargs: pytest.fail("it trained"))
    monkeypatch.chdir(tmp_path)
    check_refusal(invoke(command), "--data", *DATA, "--data moons")
    assert not list(tmp_path.iterdir())


def test_an_older_run_is_replaced_only_by_force(data, tmp_path):
    args = ["fit", "--data", data / "plane.csv", "--epochs", 1, "--out", tmp_path, "--quiet"]
    done(*args)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    check_refusal(invoke(*args), "flow.safetensors", "--force", f"--resume {tmp_path / 'flow.safetensors'}", "--out")
    check_refusal(invoke("compare", *args[1:], "--families", "vae,flow"), "flow.safetensors", "--force")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    done(*args, "--family", "autoregressive")  # another family's
    done(*args, "--force", "--seed", 4)
    assert checkpoints.read(tmp_path / "flow")[1]["run"]["settings"]["seed"] == 4
    [older] = tmp_path.glob("flow.*Z-*.training.safetensors")
    older = older.with_name(older.name.removesuffix(".training.safetensors"))
    done("fit", "--resume", older, "--epochs", 2)
    assert checkpoints.read(older)[1]["run"]["settings"]["seed"] == 0
    done("fit", "--resume", tmp_path / "flow", "--epochs", 2)
    args = ["--data", data / "plane.csv", "--families", "vae", "--epochs", 1, "--out", tmp_path, "--quiet"]
    done("compare", *args)
    check_refusal(invoke("compare", *args, "--families", "energy"), "run.json", "--force")
    done("compare", *args, "--force")
    check_refusal(invoke("fit", "--resume", tmp_path / "flow", "--force"), "--force")


def test_a_run_of_other_settings_is_not_gone_on_with(data, tmp_path):
    """The parameters and the run of two fits in one folder, as after one that was killed."""
    for name, seed in (("one", 1), ("two", 2)):
        done("fit", "--data", data / "plane.csv", "--epochs", 1, "--out", tmp_path / name, "--seed", seed)
    shutil.copy(tmp_path / "one" / "flow.training.safetensors", tmp_path / "two")
    before = (tmp_path / "two" / "flow.safetensors").read_bytes()
    words = ["flow.training.safetensors", "flow.safetensors", "seed was 1 and is 2"]
    check_refusal(invoke("fit", "--resume", tmp_path / "two" / "flow", "--epochs", 3), *words)
    assert (tmp_path / "two" / "flow.safetensors").read_bytes() == before


def test_columns_that_are_hardly_real_are_warned_of_in_a_line(data, tmp_path):
    args = ["fit", "--data", data / "measures.csv", "--epochs", 1, "--quiet"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = console.warn
        result = invoke(*args, "--out", tmp_path / "a")
        assert result.exit_code == 0, result.output
        [line] = [line for line in result.stderr.splitlines() if "read as real" in line]
        assert "kind (3 values)" in line
        assert "height" not in line
        for more in (["--levels", 0], MEASURES):
            assert "read as real" not in invoke(*args, *more, "--out", tmp_path / more[0]).stderr


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv"])
def test_the_largest_size_of_data_is_an_option(suffix, flow, tmp_path):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes({".npy": b"\x93NUMPY", ".npz": b"PK\x03\x04", ".csv": b"a,b\n"}[suffix])
    os.truncate(path, 3_000_000_000)
    for command in (["fit", "--out", tmp_path / "out"], ["compare", "--out", tmp_path / "out"], ["evaluate", flow]):
        check_refusal(invoke(*command, "--data", path), path.name, "3,000,000,000 bytes", "--max-size 3.")


def test_the_largest_size_of_a_checkpoint_is_an_option(flow, data, tmp_path):
    raw = flow.read_bytes()
    path = tmp_path / "flow.safetensors"
    path.write_bytes(raw)
    os.truncate(path, 3_000_000_000)
    for command in (["sample"], ["evaluate"]):
        check_refusal(invoke(*command, path), "3,000,000,000 bytes", "--max-size 3.")
        check_refusal(invoke(*command, flow, "--max-size", 1e-6), "--max-size 0.0")
    rows = ["--data", data / "plain.csv"]
    check_refusal(invoke("fit", *rows, "--out", tmp_path / "out", "--max-size", 1e-6), "plain.csv", "--max-size 0.0")
    assert "--max-size" in invoke("fit", *rows, "--max-size", -1).stderr


@pytest.mark.parametrize("threads", [None, 3])
def test_small_families_take_one_thread_unless_another_number_is_said(threads, data, tmp_path, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs["threads"])
        return train(*args, **kwargs)

    monkeypatch.setattr(recipes, "train", spy)
    args = [] if threads is None else ["--threads", threads]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        done("fit", "--data", data / "plane.csv", "--epochs", 1, "--out", tmp_path, *args)
        assert torch.get_num_threads() == (threads or 1)
        torch.set_num_threads(2)
        done("sample", tmp_path / "flow", "--out", tmp_path / "draws.npy", "--force", *args)
        assert torch.get_num_threads() == (threads or 1)
        monkeypatch.setattr(recipes, "SMALL_FAMILY", 10)
        torch.set_num_threads(2)
        done("fit", "--data", data / "plane.csv", "--epochs", 1, "--out", tmp_path, "--force", *args)
        assert torch.get_num_threads() == (threads or 2)
    finally:
        torch.set_num_threads(before)
    assert seen == [threads or 1, threads]


TABLES = {
    "a missing value": ("height,width\n1.0,2.0\n,3.0\n", [], ["row 2", "height"]),
    "NaN": ("height,width\n1.0,2.0\n" * 1 + "nan,3.0\n", [], ["row 2", "height"]),
    "infinity": ("height,width\n1.0,2.0\n1.0,inf\n", [], ["row 2", "width"]),
    "nothing": ("", [], ["empty"]),
    "a header alone": ("height,width\n", [], ["0 rows"]),
    "few rows": ("height,width\n" + "1.0,2.0\n" * 9, [], ["9 rows", "10"]),
    "ragged rows": ("height,width\n1.0,2.0\n1.0\n", [], ["line 3"]),
    "text": ("height,name\n" + "1.0,ann\n" * 20, [], ["name", "--columns"]),
    "semicolons": ("height;width\n1;2\n", [], ["';'"]),
    "an unknown column": ("height,width\n" + "1.0,2.0\n" * 20, ["--columns", "heigth"], ["heigth", "Did you mean height"]),
    "an unknown label": ("height,kind\n" + "1.0,0\n" * 20, ["--labels", "kin"], ["kin", "Did you mean kind"]),
    "negative labels": ("height,kind\n" + "1.0,-1\n" * 20, ["--labels", "kind"], ["-1", "row 1"]),
    "broken labels": ("height,kind\n" + "1.0,0.5\n" * 20, ["--labels", "kind"], ["0.5"]),
    "labels too large": ("height,kind\n" + "1.0,99\n" * 20, ["--labels", "kind"], ["99"]),
    "values beyond the levels": ("height,width\n" + "1,7\n" * 20, ["--levels", "5"], ["7", "0 to 4"]),
    "negative integers": ("height,width\n" + "1,-7\n" * 20, [], ["-7", "--levels 0"]),
    "one level": ("height,width\n" + "1,0\n" * 20, ["--levels", "1"], ["levels", "1"]),
    "beyond float32": ("height,width\n" + "1.0,1e39\n" * 20, [], ["1e+39"]),
}


@pytest.mark.parametrize("command", ["fit", "compare"])
@pytest.mark.parametrize("kind", TABLES)
def test_data_that_cannot_be_fitted_are_refused_in_one_line(kind, command, tmp_path):
    text, args, words = TABLES[kind]
    (tmp_path / "rows.csv").write_text(text)
    result = invoke(command, "--data", tmp_path / "rows.csv", *args, "--out", tmp_path / "out")
    check_refusal(result, *words)
    assert ("rows.csv" in result.stderr) == (kind != "one level")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("value", ["object", "complex", "text", "empty", "scalar", "damaged"])
def test_arrays_that_cannot_be_fitted_are_refused_in_one_line(value, tmp_path):
    path, target = tmp_path / "rows.npy", tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return Path.touch, (target,)

    arrays = {"object": np.array([Trap()] * 20, dtype=object), "complex": np.ones((20, 2), complex), "empty": np.ones((0, 2))}
    arrays |= {"text": np.array(["a"] * 20), "scalar": np.array(1.0), "damaged": np.ones((20, 2))}
    np.save(path, arrays[value], allow_pickle=True)
    if value == "damaged":
        path.write_bytes(path.read_bytes()[:-9])
    check_refusal(invoke("fit", "--data", path, "--out", tmp_path / "out"), "rows.npy")
    path.write_bytes(pickle.dumps(Trap()))
    check_refusal(invoke("fit", "--data", path, "--out", tmp_path / "out"), "rows.npy", "pickle")
    assert not target.exists()


WRONG_ROWS = {
    "a column is missing": ("flow", lambda t: t.drop(columns="depth"), [], ["rows.csv", "depth"]),
    "columns are too few": ("flow", lambda t: t, ["--columns", "height,width"], ["(N, 3)", "2"]),
    "a column is unknown": ("flow", lambda t: t, ["--columns", "height,width,dept"], ["Did you mean depth"]),
    "NaN": ("flow", lambda t: t.assign(width=np.nan), [], ["rows.csv", "width"]),
    "infinity": ("flow", lambda t: t.assign(width=np.inf), [], ["rows.csv", "width"]),
    "text": ("flow", lambda t: t.assign(width="a"), [], ["rows.csv", "width"]),
    "no rows": ("flow", lambda t: t[:0], [], ["rows.csv", "0 rows"]),
    "a label too large": ("labelled", lambda t: t.assign(kind=7), [], ["0 to 2", "7"]),
    "a label once too large": ("labelled", lambda t: t.assign(kind=np.r_[t.kind[:-1], 3]), [], ["0 to 2", "3"]),
    "a negative label": ("labelled", lambda t: t.assign(kind=-1), [], ["rows.csv", "-1"]),
    "no labels": ("labelled", lambda t: t.drop(columns="kind"), [], ["rows.csv", "kind"]),
    "unknown labels": ("labelled", lambda t: t, ["--labels", "kinds"], ["Did you mean kind"]),
}


@pytest.mark.parametrize("kind", WRONG_ROWS)
def test_rows_that_are_not_data_of_the_family_are_refused_in_one_line(kind, data, tmp_path, request):
    checkpoint, change, args, words = WRONG_ROWS[kind]
    change(pd.read_csv(data / "measures.csv")).to_csv(tmp_path / "rows.csv", index=False)
    path = request.getfixturevalue(checkpoint)
    check_refusal(invoke("evaluate", path, "--data", tmp_path / "rows.csv", *args), *words)


WRONG_IMAGES = {
    "a level too high": (lambda x, label: {"x": x + 1, "label": label}, ["0 to 4", "5"]),
    "a negative level": (lambda x, label: {"x": x - 1, "label": label}, ["0 to 4", "-1"]),
    "another shape": (lambda x, label: {"x": x[:, :2], "label": label}, ["4, 4"]),
    "no whole numbers": (lambda x, label: {"x": x + 0.5, "label": label}, ["0 to 4"]),
    "no labels": (lambda x, label: {"x": x}, ["label"]),
    "too few labels": (lambda x, label: {"x": x, "label": label[:9]}, ["label", "9"]),
    "another array": (lambda x, label: {"a": x, "b": x, "label": label}, ["--columns"]),
}


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_images_that_are_not_data_of_the_family_are_refused_in_one_line(kind, images, data, tmp_path):
    change, words = WRONG_IMAGES[kind]
    with np.load(data / "images.npz") as file:
        np.savez(tmp_path / "other.npz", **change(file["x"], file["label"]))
    check_refusal(invoke("evaluate", images, "--data", tmp_path / "other.npz"), *words)


def test_data_that_are_not_there_are_refused_in_one_line(flow, tmp_path):
    check_refusal(invoke("evaluate", flow, "--data", tmp_path / "none.csv"), "none.csv")
    check_refusal(invoke("evaluate", flow, "--data", "digit"), "digit", "Did you mean digits")


def test_integers_are_not_judged_by_a_family_of_reals_but_as_reals(flow, data):
    for split in ("all", "test"):
        said = verdict(done("evaluate", flow, "--data", data / "counts.csv", "--split", split))
        assert (said["split"], said["bits"]) == (split, None)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--label", "3"], ["--label", "0 to 2", "3"]),
        (["--out", "draws.pkl"], ["pkl", ".csv"]),
        (["--picture", "draws.jpg"], ["jpg", ".png"]),
        (["--picture", "draws.png"], ["--picture", "(3,)"]),
        (["--device", "banana"], ["banana"]),
    ],
    ids=" ".join,
)
def test_draws_that_cannot_be_made_are_refused(args, words, labelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_refusal(invoke("sample", labelled, *args), *words)
    assert not list(tmp_path.iterdir())


def test_a_label_where_there_are_none_is_refused(flow):
    check_refusal(invoke("sample", flow, "--label", 0), "--label")


def test_an_unknown_split_and_another_kind_of_table_are_refused(flow, tmp_path):
    check_refusal(invoke("evaluate", flow, "--split", "tests"), "tests", "Did you mean test")
    check_refusal(invoke("evaluate", flow, "--out", tmp_path / "values.json"), "values.json", ".csv")


def trained_state():
    return Flow((2,), transform=MAF(transforms=1, hidden=(4,))).state_dict()


def record_of_another_version(path):
    checkpoints.write(path, trained_state(), {"format": 99, "pyro_genmodels": "9.9"})


def record_of_another_family(path):
    checkpoints.write(path, trained_state(), {"class": "Diffusion", "arguments": {"event_shape": [2]}})


def record_with_other_arguments(path):
    described = checkpoints.describe(Flow((3,), transform=MAF(transforms=1, hidden=(4,))))
    checkpoints.write(path, trained_state(), described)


BAD = {
    "missing": (lambda path: None, ["no checkpoint"]),
    "empty": (lambda path: path.write_bytes(b""), []),
    "text": (lambda path: path.write_text("not a checkpoint\n" * 9), ["no checkpoint"]),
    "a folder": (Path.mkdir, ["no checkpoint"]),
    "of others": (lambda path: safetensors.torch.save_file(trained_state(), path), ["pyro_genmodels"]),
    "a pickle": (lambda path: torch.save(trained_state(), path), ["no checkpoint"]),
    "another version": (record_of_another_version, ["9.9", "Update"]),
    "another family": (record_of_another_family, ["Diffusion"]),
    "other arguments": (record_with_other_arguments, ["differ"]),
}


@pytest.mark.parametrize("command", [["sample"], ["evaluate"], ["fit", "--resume"]], ids=" ".join)
@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_checkpoint_is_refused_in_one_line(kind, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, words = BAD[kind]
    make(tmp_path / "mine.safetensors")
    before = sorted(tmp_path.iterdir())
    words = words if command[0] != "fit" or kind not in ("another family", "other arguments") else ["command line"]
    check_refusal(invoke(*command, tmp_path / "mine.safetensors"), "mine", *words)
    assert sorted(tmp_path.iterdir()) == before


def test_a_checkpoint_that_was_changed_is_refused_in_one_line(flow, tmp_path):
    raw = flow.read_bytes()
    for at, path in ((len(raw) - 1, tmp_path / "last.safetensors"), (300, tmp_path / "early.safetensors")):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        for command in (["sample"], ["evaluate"], ["fit", "--resume"]):
            check_refusal(invoke(*command, path), path.name, "damaged")


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_a_path_without_a_name_is_refused_in_plain_words(path):
    for command in (["sample"], ["evaluate"], ["fit", "--resume"]):
        result = invoke(*command, path)
        check_refusal(result)
        assert "PosixPath" not in result.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["compare", "--seed", "-1"], "seed"),
        (["compare", "--epochs", "0"], "epochs"),
        (["fit", "--epochs", "many"], "epochs"),
        (["fit", "--batch-size", "0"], "batch-size"),
        (["fit", "--patience", "0"], "patience"),
        (["sample"], "CHECKPOINT"),
        (["sample", "x", "-n", "0"], "num-samples"),
        (["sample", "x", "--label", "-1"], "label"),
        (["evaluate", "x", "--seed", "-1"], "seed"),
        (["evalute"], "evaluate"),
        (["fit", "--famly", "flow"], "--family"),
    ],
    ids=" ".join,
)
def test_options_of_the_wrong_kind_are_refused(args, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.stderr
    assert word.lower() in result.stderr.lower()
    assert not list(tmp_path.iterdir())


def test_the_error_itself_comes_through_if_asked(tmp_path):
    args = ["fit", "--data", "nowhere.csv", "--out", tmp_path]
    result = invoke("--traceback", *args)
    assert isinstance(result.exception, FileNotFoundError)
    assert result.exit_code != 0
    assert not isinstance(invoke(*args).exception, FileNotFoundError)


# How it starts.


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert pyro_genmodels.__version__ in result.stdout


@pytest.mark.parametrize("command", ["compare", "fit", "sample", "evaluate"])
def test_help_names_the_options_and_has_examples(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = done(command, "--help")
    assert "For example" in text
    examples = [line.strip(" │") for line in text.splitlines() if line.strip(" │").startswith("pyro-genmodels ")]
    assert len(examples) >= 2
    assert all(example.split()[1] == command for example in examples)
    known = set(re.findall(r"--[a-z-]+", text.split("Options", 1)[1]))
    assert set(re.findall(r"--[a-z-]+", " ".join(examples))) <= known
    options = {
        "compare": "data families out columns labels levels seed device epochs force quiet",
        "fit": "data family out columns labels levels seed device epochs batch-size learning-rate patience resume compile "
        "force quiet",
        "sample": "out num-samples label picture seed resume device force quiet",
        "evaluate": "data split columns labels num-samples out seed resume device force",
    }
    assert {f"--{option}" for option in options[command].split()} | {"--help", "--threads", "--max-size"} == known


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_can_be_taught(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # whatever runs the tests
    result = invoke("--show-completion", shell)
    assert result.exit_code == 0
    assert "complete" in result.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ["compare", "fit", "sample", "evaluate"]),
        ("e", ["evaluate"]),
        ("fit --family ", list(FAMILIES)),
        ("fit --family v", ["vae"]),
        ("fit --data m", ["moons"]),
        ("compare --data ", list(DATA)),
        ("compare --families ", list(FAMILIES)),
        ("fit --res", ["--resume"]),
    ],
)
def test_names_are_completed(words, expected):
    environment = {
        "_PYRO_GENMODELS_COMPLETE": "complete_bash",
        "COMP_WORDS": f"pyro-genmodels {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="pyro-genmodels")
    assert result.stdout.split() == expected
    assert result.stderr == ""


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "pyro", "zuko", "arviz", "numpy", "matplotlib", "sklearn", "typer"]
    code = f"import sys, pyro_genmodels; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_importing_compiled_programs_imports_no_compiler_and_no_sampler():
    code = (
        "import sys, pyro_genmodels.infer.compiled;"
        "print([m for m in ('torch._inductor', 'torch._dynamo', 'nutpie', 'arviz') if m in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"


def test_at_most_sixty_names_are_at_the_top_level():
    assert len(pyro_genmodels.__all__) <= 60


def test_refusing_a_name_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from pyro_genmodels.cli.app import app;"
        "CliRunner().invoke(app, ['compare', '--families', 'flw']); print('torch' in sys.modules)"
    )
    assert python("-c", code).stdout.strip() == "False"


@pytest.mark.parametrize("name", pyro_genmodels.__all__)
def test_public_name_resolves(name):
    assert getattr(pyro_genmodels, name) is not None
    assert name in dir(pyro_genmodels)


def test_every_submodule_of_the_face_can_be_reached_and_imported_by_star():
    namespace = {}
    exec("from pyro_genmodels import *", namespace)
    assert set(pyro_genmodels.__all__) <= set(namespace)


ROOMS = (
    "distributions",
    "divergences",
    "datasets",
    "families",
    "infer",
    "infer.adversarial",
    "infer.compiled",
    "evaluation",
    "training",
)


@pytest.mark.parametrize("room", ["", *ROOMS, "inference_data"])
def test_a_name_that_is_misspelt_is_an_attribute_error_with_the_nearest(room):
    module = importlib.import_module(f"pyro_genmodels.{room}".rstrip("."))
    for name in module.__all__:
        assert getattr(module, name) is not None
        if len(name) > 4:
            wrong = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name + "x"
            with pytest.raises(
                AttributeError, match=rf"^module '{module.__name__}' has no attribute '{wrong}'. Did you mean \w+\?$"
            ):
                getattr(module, wrong)
    for name in ("zebra", "__wrapped__", "_Flow"):
        assert not hasattr(module, name)
    with pytest.raises(AttributeError, match=r"no attribute 'zebra'$"):
        _ = module.zebra


def test_the_nearest_name_is_found_whatever_its_case():
    for wrong, name in [("Flwo", "Flow"), ("flow", "Flow"), ("Gan", "GAN"), ("family", "Family"), ("familes", "families")]:
        with pytest.raises(AttributeError, match=f"Did you mean {name}"):
            getattr(pyro_genmodels, wrong)


@pytest.mark.parametrize(
    "code",
    ["import pyro_genmodels.cli", "import runpy; runpy.run_module('pyro_genmodels', run_name='__main__')"],
    ids=["import", "run"],
)
def test_without_typer_the_line_that_installs_it_is_named(code):
    result = python("-c", f"import sys; sys.modules['typer'] = None\n{code}")
    assert result.returncode != 0
    assert "pip install 'pyro-genmodels[cli]'" in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("modules", [["sklearn", "sklearn.datasets"], ["safetensors", "safetensors.torch"]], ids=lambda m: m[0])
def test_a_missing_extra_names_the_line_that_installs_it(modules, tmp_path, monkeypatch):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    flow, x = Flow((1,), transform=MAF(transforms=1, hidden=(4,))), torch.randn(9, 1)
    uses = {
        "sklearn": [lambda: pyro_genmodels.datasets.digits()],
        "safetensors": [
            lambda: train(flow, x, epochs=1, progress=False, checkpoint=tmp_path / "c"),
            lambda: checkpoints.save(tmp_path / "c", flow),
            lambda: checkpoints.load(tmp_path / "c"),
        ],
    }
    for use in uses[modules[0]]:
        with pytest.raises(ImportError, match=r"pip install 'pyro-genmodels\["):
            use()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["sklearn", "safetensors", "matplotlib", "h5netcdf"])
def test_a_missing_extra_is_told_in_a_line_before_training(missing, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "fit", lambda *args, **kwargs: pytest.fail("it trained"))
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "sklearn":
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    check_refusal(invoke(*QUICK, "--out", tmp_path), missing if missing != "sklearn" else "", "pip install 'pyro-genmodels[")


def test_a_missing_parquet_is_told_in_a_line(flow, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    words = ["pyarrow", "pip install 'pyro-genmodels[parquet]'"]
    check_refusal(invoke("sample", flow, "--out", tmp_path / "draws.parquet"), *words)
    check_refusal(invoke("fit", "--data", tmp_path / "rows.parquet", "--out", tmp_path / "out"), *words)
    check_refusal(invoke("evaluate", flow, "--data", tmp_path / "rows.parquet"), *words)
    assert not (tmp_path / "draws.parquet").exists()


@pytest.mark.filterwarnings("ignore:.*are combinations of one another")
def test_an_energy_is_fitted_where_columns_depend_on_each_other(tmp_path):
    a, c = torch.randn(2, 60)
    np.savetxt(tmp_path / "d.csv", torch.stack([a, 2 * a, c], 1), delimiter=",", header="a,b,c", comments="")
    result = invoke("fit", "--data", tmp_path / "d.csv", "--family", "energy", "--epochs", 1, "--out", tmp_path, "--quiet")
    assert result.exit_code == 0, result.output


def test_reports_say_where_k_hat_is_too_large_or_unknown(capsys):
    k = torch.tensor([0.1, 0.9, 1.2])
    found = LogLikelihood(torch.arange(3.0), torch.ones(3), "unreliable", 100, pareto_k=k)
    x = torch.zeros(3, 2)
    note = "Pareto k-hat is above 0.7 (largest 1.20) in 2 of 3 rows"
    assert console.describe(found, None, x, lambda: None).endswith(f"(unreliable, k=100, n=3); {note}")
    console.print_table(compare({"vae": found}), SimpleNamespace(name="plane", levels=None, test=x, density=None))
    assert f"vae: {note}" in capsys.readouterr().out
