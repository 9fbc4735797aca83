"""Layers divided among two processes: the fit of whole layers, whole checkpoints, errors.

The processes run `sharded_processes.py`. They talk by gloo on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sharded_processes import data, difference, fitted

from pyro_genmodels.training import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")]
SCRIPT = Path(__file__).parent / "sharded_processes.py"


def found(name, folder):
    """Return what both ranks found."""
    hidden = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), name, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


def test_a_fit_with_sharded_layers_is_that_with_whole_ones(tmp_path):
    """Also with averaged parameters, validation, clipped and accumulated gradients, recomputed activations, and in a U-Net."""
    own, other = found("fits", tmp_path)
    assert {name: run["losses"] for name, run in own.items()} == {name: run["losses"] for name, run in other.items()}
    for run in (*own.values(), *other.values()):
        assert run["difference"] < 1e-13
        torch.testing.assert_close(torch.tensor(run["losses"]), torch.tensor(run["wanted"]), rtol=1e-12, atol=0)
        assert run["held"] < 0.65 * run["total"]
        assert run["types"] == ["Parameter"]


def test_steps_of_all_rows_are_those_of_one_process(tmp_path):
    for run in found("one", tmp_path):
        assert run["difference"] < 1e-12
        torch.testing.assert_close(*map(torch.tensor, run["losses"]), rtol=1e-12, atol=0)


def test_checkpoints_are_whole_and_continued_by_two_processes_or_one(tmp_path):
    own, other = found("checkpoints", tmp_path)
    assert own == other
    assert own["difference"] < 1e-13
    assert own["losses"] == own["wanted"]
    loaded = checkpoints.load(tmp_path / "own" / "autoregressive")
    x, context = data("autoregressive")
    assert loaded.double()(context).log_prob(x).isfinite().all()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        family, fit = fitted("autoregressive", "auto", folder=tmp_path / "left", epochs=3, resume=True, devices=1)
    finally:
        torch.set_default_dtype(before)
    assert len(fit.history) == 3
    assert [record["train"] for record in fit.history[:1]] == [own["losses"][0][0]]
    assert difference(family, checkpoints.load(tmp_path / "left" / "autoregressive").double()) == 0


def test_mixed_precision_keeps_parameters_in_single_precision(tmp_path):
    own, other = found("low", tmp_path)
    assert own == other
    assert own["types"] == ["torch.float32"]


def test_what_cannot_be_sharded_is_refused(tmp_path):
    for rank in found("errors", tmp_path):
        none, adversarial = rank["errors"]
        assert "found no layer of 1,000,000,000 trained parameters" in none
        assert "not adversarial ones" in adversarial
