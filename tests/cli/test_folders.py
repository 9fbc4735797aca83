"""Samples and log-likelihoods of the command line in folders, and rows that it reads batch by batch."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

from pyro_genmodels import MAF, Flow, log_likelihood
from pyro_genmodels.cli import folders
from pyro_genmodels.cli.app import app
from pyro_genmodels.training import checkpoints


@pytest.fixture
def flow(tmp_path):
    flow = Flow((2,), transform=MAF(transforms=1, hidden=(8,)))
    checkpoints.save(tmp_path / "flow", flow)
    return flow


def run(*args):
    return CliRunner().invoke(app, list(map(str, args)))


def done(*args):
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def refused(text, *args):
    result = run(*args)
    assert result.exit_code == 2, (result.output, result.exception)
    assert text in result.stderr


def test_many_samples_go_to_folders(flow, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MAX_IN_ONE_FILE", 100)
    path, out = tmp_path / "flow.safetensors", tmp_path / "a.parquet"
    assert str(out) in done("sample", path, "-n", 150, "--out", out)
    assert out.is_dir()
    assert pd.read_parquet(out).shape == (150, 2)
    done("sample", path, "-n", 150, "--out", tmp_path / "a.zarr")
    zarr = xr.open_zarr(tmp_path / "a.zarr", chunks=None)
    np.testing.assert_array_equal(zarr["x"], pd.read_parquet(out))
    refused("pass --resume to go on with it, --force to replace it", "sample", path, "-n", 150, "--out", out)
    done("sample", path, "-n", 150, "--out", out, "--resume")
    refused("different number of draws", "sample", path, "-n", 151, "--out", out, "--resume")
    done("sample", path, "-n", 151, "--out", out, "--force")
    assert len(pd.read_parquet(out)) == 151
    xr.Dataset({"x": ("draw", np.zeros(3))}).to_zarr(tmp_path / "own.zarr", zarr_format=2)
    refused("that no run has written", "sample", path, "--out", tmp_path / "own.zarr", "--force")
    refused("--picture plots samples in memory", "sample", path, "--out", tmp_path / "b.zarr", "--picture", "a.png")
    refused("--resume goes on with a folder", "sample", path, "--out", tmp_path / "b.npy", "--resume")
    done("sample", path, "-n", 100, "--out", tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").is_file()


def test_rows_are_evaluated_batch_by_batch(flow, tmp_path):
    path, out, x = tmp_path / "flow.safetensors", tmp_path / "scores.parquet", torch.randn(300, 2)
    (tmp_path / "rows").mkdir()
    for i, part in enumerate(x.split(100)):
        np.save(tmp_path / "rows" / f"{i}.npy", part.numpy())
    expected = log_likelihood(flow, x)
    said = done("evaluate", path, "--data", tmp_path / "rows", "--out", out)
    assert f"{expected.nats:.3f}" in said
    assert "n=300" in said
    np.testing.assert_allclose(pd.read_parquet(out)["log_likelihood"], expected.values, rtol=1e-5)
    assert f"{expected.nats:.3f}" in done("evaluate", path, "--data", tmp_path / "rows")
    done("evaluate", path, "--data", tmp_path / "rows", "--out", out, "--resume")
    refused("exists: pass --resume", "evaluate", path, "--data", tmp_path / "rows", "--out", out)
    refused("pass it as --data", "evaluate", path, "--data", "moons", "--out", tmp_path / "b.parquet")
    refused("are not split", "evaluate", path, "--data", tmp_path / "rows", "--split", "test")
    refused("in a .parquet folder", "evaluate", path, "--data", tmp_path / "rows", "--out", tmp_path / "a.csv")
