"""Draws in files: functions of the seed alone, resumed after an interruption, and in ArviZ what they are in memory."""

import errno
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoNormal

from pyro_genmodels import MAF, EnergyModel, Flow, Labels, Persistent, to_arviz
from pyro_genmodels.evaluation import Output
from pyro_genmodels.inference_data import draws as draws_module
from pyro_genmodels.inference_data import sample_to, zarr_export
from pyro_genmodels.utils.pareto import pareto_k, smooth_log_weights, tail_length
from pyro_genmodels.utils.parts import part_seed
from pyro_genmodels.utils.rng import forked_rng
from pyro_genmodels.utils.zarr_arrays import ZarrArrays


@pytest.fixture
def flow():
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)))


def opened(path):
    return xr.open_zarr(path, chunks=None)


# Samples of families.


def test_samples_are_a_function_of_seed_and_part(flow, tmp_path):
    before = torch.get_rng_state()
    path = sample_to(flow, 250, Output(tmp_path / "a.parquet", rows=100, seed=4), batch_size=60, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    table = pd.read_parquet(path)
    assert list(table) == ["x0", "x1"]
    with forked_rng(part_seed(4, 2)), torch.no_grad():  # that of the second part, from draw 100 on
        expected = torch.cat([flow().sample((60,)), flow().sample((40,))])
    np.testing.assert_array_equal(table.to_numpy()[100:200], expected)
    zarr = opened(sample_to(flow, 250, Output(tmp_path / "a.zarr", rows=100, seed=4), batch_size=60, progress=False))
    np.testing.assert_array_equal(zarr["x"], table)
    assert zarr["x"].dims == ("draw", "x_dim_0")


@pytest.mark.parametrize("suffix", [".parquet", ".zarr"])
def test_an_interruption_leaves_no_trace(flow, tmp_path, monkeypatch, suffix):
    whole = sample_to(flow, 250, Output(tmp_path / f"whole{suffix}", rows=100), progress=False)
    draw, calls = draws_module._Source.draw, []

    def interrupted(self, number, draws):
        calls.append(number)
        if calls == [-1, 0, 1]:
            raise KeyboardInterrupt
        return draw(self, number, draws)

    monkeypatch.setattr(draws_module._Source, "draw", interrupted)
    out = Output(tmp_path / f"a{suffix}", rows=100, resume=True)
    with pytest.raises(KeyboardInterrupt):
        sample_to(flow, 250, out, progress=False)
    found = sample_to(flow, 250, out, progress=False)
    assert calls == [-1, 0, 1, -1, 1, 2]
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.name != ".zmetadata"]
    assert files
    for path in files:
        assert (found / path).read_bytes() == (whole / path).read_bytes(), path
    with pytest.raises(FileExistsError, match="To go on with an interrupted run"):
        sample_to(flow, 250, found)
    with pytest.raises(ValueError, match=re.escape("different number of draws (250, and now 251)")):
        sample_to(flow, 251, out)
    with pytest.raises(ValueError, match="holds a run with different fit"):
        sample_to(Flow((2,), transform=MAF(transforms=1, hidden=(8,))), 250, out)


def test_a_fit_with_another_standardisation_is_another_fit(flow, tmp_path):
    out = Output(tmp_path / "a.parquet", rows=100, resume=True)
    sample_to(flow, 100, out, progress=False)
    flow.prepare(5 + 2 * torch.randn(100, 2))
    with pytest.raises(ValueError, match="holds a run with different fit"):
        sample_to(flow, 100, out, progress=False)


def test_an_energy_is_the_same_fit_after_its_chains_have_moved(tmp_path):
    energy = EnergyModel((2,), negatives=Persistent(8, steps=1))
    out = Output(tmp_path / "a.parquet", rows=10, resume=True)
    sample_to(energy, 10, out, progress=False)
    energy.replay_buffer.chains.add_(1.0)
    sample_to(energy, 10, out, progress=False)


def test_contexts_are_taken_in_turn(tmp_path):
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,)), context=Labels(3))
    context = torch.arange(3)
    table = pd.read_parquet(sample_to(flow, 25, Output(tmp_path / "a.parquet", rows=10), context=context, progress=False))
    assert table["label"].tolist() == [n % 3 for n in range(25)]
    zarr = opened(sample_to(flow, 25, Output(tmp_path / "a.zarr", rows=10), context=context, label="kind", progress=False))
    np.testing.assert_array_equal(zarr["kind"], table["label"])
    one = sample_to(flow, 5, tmp_path / "b.parquet", context=2, columns=["height", "weight"], progress=False)
    assert list(pd.read_parquet(one)) == ["height", "weight", "label"]


def test_distributions_and_scalars_are_sampled_too(tmp_path):
    path = sample_to(dist.Normal(3.0, 0.1), 1000, tmp_path / "a.parquet", progress=False)
    table = pd.read_parquet(path)
    assert list(table) == ["x"]
    assert abs(table["x"].mean() - 3) < 5 * 0.1 / 1000**0.5  # false alarm: 6e-7


def test_what_cannot_be_sampled_is_refused(flow, tmp_path):
    for error, text, call in [
        (TypeError, "draws from a family, a result of train or a distribution", lambda: sample_to("flow", 5, "a.parquet")),
        (ValueError, "found the batch shape (3,)", lambda: sample_to(dist.Normal(torch.zeros(3), 1.0), 5, "a.parquet")),
        (ValueError, "wants the names of 2 columns, but found 1", lambda: sample_to(flow, 5, "a.parquet", columns=["a"])),
        (ValueError, "columns of different names", lambda: sample_to(flow, 5, "a.parquet", columns=["a", "a"])),
        (ValueError, "'name.parquet' or 'name.zarr'", lambda: sample_to(flow, 5, "a.csv")),
        (ValueError, "an integer num_samples of 1 or more", lambda: sample_to(flow, 0, "a.parquet")),
        (ValueError, "leave columns out", lambda: sample_to(flow, 5, tmp_path / "a.zarr", columns=["a", "b"])),
    ]:
        with pytest.raises(error, match=re.escape(text)):
            call()


def test_labels_do_not_take_the_place_of_a_column(tmp_path):
    with pytest.raises(ValueError, match="columns of different names"):
        sample_to(Flow((2,), context=Labels(2)), 5, tmp_path / "a.parquet", context=torch.arange(2), label="x0")


def test_a_full_disk_leaves_the_blocks_before(flow, tmp_path, monkeypatch):
    put, calls = ZarrArrays.put, []

    def full(self, *args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        put(self, *args, **options)

    monkeypatch.setattr(ZarrArrays, "put", full)
    out = Output(tmp_path / "a.zarr", rows=100, resume=True)
    with pytest.raises(OSError, match="No space left on device"):
        sample_to(flow, 250, out, progress=False)
    done = json.loads((tmp_path / "a.zarr" / ".zattrs").read_text())["pyro_genmodels"]["done"]
    assert done == 1
    np.testing.assert_array_equal(
        opened(sample_to(flow, 250, out, progress=False))["x"],
        opened(sample_to(flow, 250, Output(tmp_path / "b.zarr", rows=100), progress=False))["x"],
    )


def test_a_damaged_chunk_is_an_error_when_it_is_read(flow, tmp_path):
    path = sample_to(flow, 250, Output(tmp_path / "a.zarr", rows=100), progress=False)
    chunk = path / "x" / "1.0"
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    data = opened(path)
    assert np.isfinite(data["x"][:100].values).all()
    with pytest.raises(RuntimeError):
        data["x"][100:200].load()


def test_a_folder_of_something_else_is_not_resumed(flow, tmp_path):
    xr.Dataset({"x": ("draw", np.zeros(3))}).to_zarr(tmp_path / "a.zarr", zarr_format=2)
    with pytest.raises(ValueError, match="holds no run that this version reads"):
        sample_to(flow, 5, Output(tmp_path / "a.zarr", resume=True))


# ArviZ data.


def model(x):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)


@pytest.fixture
def fit():
    guide = AutoNormal(model, init_scale=0.2)
    guide(torch.zeros(20))
    return model, guide, torch.randn(20)


def test_arviz_data_in_blocks_are_those_of_the_draws_in_memory(fit, tmp_path):
    model, guide, x = fit
    found = to_arviz((model, guide), x, num_samples=250, out=Output(tmp_path / "a.zarr", rows=100), progress=False)
    draws = {"loc": torch.as_tensor(found.posterior["loc"].values)}
    expected = to_arviz(draws, x, model=model, progress=False)
    for group, name in (("log_likelihood", "x"), ("log_prior", "loc"), ("sample_stats", "log_p"), ("observed_data", "x")):
        np.testing.assert_allclose(found[group][name], expected[group][name], rtol=1e-6)
        assert found[group][name].dims == expected[group][name].dims
    stats = found.sample_stats
    weights = torch.as_tensor(stats["log_weight"].values)
    np.testing.assert_allclose(weights, stats["log_p"] - stats["log_q"])
    assert stats["log_weight"].attrs["pareto_k"] == pytest.approx(float(pareto_k(weights.flatten())), rel=1e-9)
    smoothed = smooth_log_weights(weights.flatten())[0].log_softmax(0)
    np.testing.assert_allclose(stats["smoothed_log_weight"].values.ravel(), smoothed, rtol=1e-9, atol=1e-9)
    assert found.posterior_predictive["x"].shape == (1, 250, 20)
    assert found.prior["loc"].shape == (1, 250)
    assert np.unique(found.posterior["loc"]).size == 250


def test_blocks_of_draws_are_resumed(fit, tmp_path, monkeypatch):
    model, guide, x = fit
    options = {"num_samples": 250, "groups": ["posterior", "sample_stats"], "progress": False}
    whole = to_arviz((model, guide), x, out=Output(tmp_path / "whole.zarr", rows=100), **options)
    put, calls = zarr_export._put, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(*args)

    monkeypatch.setattr(zarr_export, "_put", interrupted)
    out = Output(tmp_path / "a.zarr", rows=100, resume=True)
    with pytest.raises(KeyboardInterrupt):
        to_arviz((model, guide), x, out=out, **options)
    found = to_arviz((model, guide), x, out=out, **options)
    assert len(calls) == 4
    for group in ("posterior", "sample_stats"):
        for name in whole[group].data_vars:
            np.testing.assert_array_equal(found[group][name], whole[group][name])
    with pytest.raises(ValueError, match="holds a run with different data"):
        to_arviz((model, guide), x + 1, out=out, **options)
    with pytest.raises(FileExistsError, match="To go on"):
        to_arviz((model, guide), x, out=tmp_path / "a.zarr", **options)
    with pytest.raises(ValueError, match="leave 'draw' out of coords"):
        to_arviz((model, guide), x, out=tmp_path / "b.zarr", coords={"draw": range(250)}, **options)


@pytest.mark.parametrize("kind", [torch.as_tensor, np.asarray, list, pd.Series])
def test_other_arguments_of_any_kind_are_not_resumed_with(kind, tmp_path):
    """Arrays and numbers were not compared, so that blocks of two data sets came into one folder; lists of them failed."""

    def model(y, scale):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=torch.tensor(list(map(float, y))))

    y, guide = np.arange(3.0), AutoNormal(model)
    guide(y, 1.0)
    options = {"num_samples": 10, "groups": ["posterior"], "progress": False, "out": Output(tmp_path / "a.zarr", resume=True)}
    to_arviz((model, guide), kind(y), 1.0, **options)
    to_arviz((model, guide), kind(y), 1.0, **options)
    for other in ((kind(y + 1), 1.0), (kind(y), 2.0)):
        with pytest.raises(ValueError, match="holds a run with different data"):
            to_arviz((model, guide), *other, **options)


def test_draws_that_are_given_keep_their_chains(fit, tmp_path):
    model, _, x = fit
    draws = {"loc": torch.randn(2, 50)}
    expected = to_arviz(draws, x, model=model, progress=False)
    coords = {"rows": [f"row {i}" for i in range(20)]}
    found = to_arviz(draws, x, model=model, out=Output(tmp_path / "a.zarr", rows=20), progress=False, coords=coords)
    np.testing.assert_array_equal(found.posterior["loc"], draws["loc"])
    np.testing.assert_allclose(found.log_likelihood["x"], expected.log_likelihood["x"])
    assert found.log_likelihood["rows"].values.tolist() == coords["rows"]


def test_a_family_without_data_is_exported_in_blocks(flow, tmp_path):
    found = to_arviz(flow, num_samples=25, out=Output(tmp_path / "a.zarr", rows=10), progress=False)
    assert found.posterior_predictive["x"].shape == (1, 25, 2)
    assert Path(tmp_path / "a.zarr" / ".zmetadata").is_file()


@pytest.mark.parametrize("number", [10, 30, 1000])
def test_the_largest_weights_are_smoothed_like_all(number):
    weights = 2 * torch.randn(number, dtype=torch.float64)
    smoothed, k = smooth_log_weights(weights)
    top = weights.topk(tail_length(number) + 1)
    of_top, k_of_top = smooth_log_weights(top.values, num_draws=number)
    assert torch.equal(k, k_of_top) or (k.isnan() and k_of_top.isnan())
    torch.testing.assert_close(smoothed[top.indices], of_top, rtol=1e-12, atol=1e-12)


# In processes of their own.

ROOT = Path(__file__).parents[2]
DRAW = """
import sys, torch
from pyro_genmodels import MAF, Flow
from pyro_genmodels.evaluation import Output
from pyro_genmodels.inference_data import sample_to
torch.manual_seed(0)
sample_to(Flow((2,), transform=MAF(transforms=1, hidden=(8,))), 200_000, Output(sys.argv[1], rows=1000, resume=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".zarr"])
def test_a_process_that_is_killed_is_resumed(tmp_path, suffix):
    path, mark = tmp_path / f"a{suffix}", "part-00003.parquet" if suffix == ".parquet" else "x/3.0"
    with subprocess.Popen([sys.executable, "-c", DRAW, path], cwd=ROOT) as process:
        while not (path / mark).is_file():
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.01)
        process.kill()
    for folder in (path, tmp_path / f"whole{suffix}"):
        subprocess.run([sys.executable, "-c", DRAW, folder], check=True, cwd=ROOT)
    files = [file.relative_to(path) for file in path.rglob("*") if file.suffix == ".parquet" or file.parent.name == "x"]
    assert len(files) >= 200
    for file in (file for file in files if not file.name.startswith(".") and not file.name.endswith(".partial")):
        assert (path / file).read_bytes() == (tmp_path / f"whole{suffix}" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["log_likelihood", "compare", "sample_parquet", "sample_zarr"])
def test_memory_does_not_grow_with_rows(tmp_path, task):
    peaks = []
    for rows in (300_000, 3_000_000):  # 3 million rows of two numbers and their results would be 60 MiB or more
        (tmp_path / f"{rows}").mkdir()
        command = [sys.executable, "-m", "benchmarks.large_outputs", "--measure", task, f"{rows}", tmp_path / f"{rows}"]
        found = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
        peaks.append(json.loads(found.splitlines()[-1])["peak"])
    assert peaks[1] - peaks[0] < 30, peaks  # MiB
