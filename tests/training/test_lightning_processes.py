"""Training by a `lightning.Trainer` in two processes: the same fit on both, the gradient of the joint batch, a process killed.

The processes run `two_processes.py`. They talk by gloo on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_processes import run

from pyro_genmodels.training import checkpoints

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent / "two_processes.py"
DETERMINISTIC = {"Autoregressive, scalar", "SOSPF", "Flow, on an interval", "Autoregressive, labels"}
"""Names of rows whose loss has no random numbers."""


def two(name, folder, *, timeout=1500):
    """Run a function of the script by two processes, and return the finished process of rank 0."""
    hidden = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), name, str(folder)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def found(name, folder):
    """Return what both ranks found."""
    done = two(name, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", ["gradients", "more_gradients"])
def test_the_gradient_of_two_ranks_is_the_mean_of_theirs_for_every_family_and_objective(name, tmp_path):
    own, other = found(name, tmp_path)
    for row, result in own.items():
        assert result.get("checksum") == other[row].get("checksum"), row
        if "error" in result:
            assert result["error"] < 1e-10, row
            assert not result["others"], row
            assert result["joint"] < 1e-10 or row not in DETERMINISTIC, row


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return found("runs", tmp_path_factory.mktemp("runs"))


def test_both_ranks_end_with_the_same_fit(runs):
    own, other = runs
    for name in ("regression", "flow", "energy", "loader"):
        assert own[name]["history"] == other[name]["history"], name
    assert own["flow"] == other["flow"]
    assert own["poisoned"] == other["poisoned"]
    for name in ("scale", "guide"):
        assert own["regression"][name] == other["regression"][name]
    assert own["regression"]["scale"] != 0.5


def test_fewer_rows_than_ranks_are_refused_by_all_ranks(runs):
    for own in runs:
        assert "A batch of 1 rows cannot be divided among 2 devices" in own["one row"]


def test_every_row_is_on_one_rank_in_each_epoch(runs):
    own, other = runs
    for epoch, rest in zip(own["regression"]["rows"], other["regression"]["rows"], strict=True):
        assert sorted(epoch + rest) == own["regression"]["kept"]
    for epoch, rest in zip(own["loader"]["rows"], other["loader"]["rows"], strict=True):
        assert sorted(epoch + rest) == sorted(own["column"])
    orders = [epoch + rest for epoch, rest in zip(own["regression"]["rows"], other["regression"]["rows"], strict=True)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_every_held_out_row_counts_once(runs):
    assert runs[0]["flow"]["valid"] == pytest.approx(runs[0]["flow"]["loss"], rel=1e-5)


def test_accumulated_gradients_are_those_of_the_joint_rows_of_two_ranks(runs):
    assert runs[0]["accumulated"] < 1e-5


def test_codebooks_learn_from_the_joint_batch(runs):
    assert runs[0]["codebook"] < 1e-10


def test_chains_differ_by_rank_and_nothing_else(runs):
    own, other = (run["energy"] for run in runs)
    assert own["chains"] != other["chains"]
    assert own["others"] == other["others"]
    assert own["sum"] == other["sum"]


def test_a_gradient_that_is_not_finite_on_one_rank_ends_training_on_both(runs):
    assert runs[0]["poisoned"]["epochs"] == 2
    assert "the norm of the gradient is nan at step 1" in runs[0]["poisoned"]["stopped"]


def test_a_killed_rank_ends_the_run_and_any_number_of_ranks_resumes_it(tmp_path):
    killed = two("killed", tmp_path)
    assert killed.returncode != 0
    assert "Another process of this run has ended" in killed.stderr
    assert "The state after epoch 3 is in" in killed.stderr
    assert not (tmp_path / "killed.0.json").exists()
    family = checkpoints.load(tmp_path / "killed")
    record, whole = (checkpoints.read_record(tmp_path / f"{name}.safetensors") for name in ("killed", "whole"))
    assert [epoch["valid"] for epoch in record["history"]] == [epoch["valid"] for epoch in whole["history"]][:3]

    run(tmp_path, "one", epochs=2)
    resumed = found("resumed", tmp_path)
    assert resumed[0] == resumed[1]
    after = resumed[0]["killed"]["history"]
    assert [epoch["epoch"] for epoch in after] == [1, 2, 3, 4, 5, 6]
    assert [epoch["valid"] for epoch in after[:5]] == [epoch["valid"] for epoch in whole["history"]]  # as if nothing had been
    assert len(resumed[0]["one"]["history"]) == 6  # of one process, then of two

    flow, fit = run(tmp_path, "killed", epochs=7, resume=True)  # of two processes, then of one
    assert len(fit.history) == 7
    assert all(p.isfinite().all() for p in flow.parameters())
    assert torch.isfinite(family().log_prob(torch.zeros(2)))
