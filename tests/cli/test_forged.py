"""Checkpoints that are well formed, have a right checksum, and say anything: each command does its work or ends in one line."""

import copy
import json
import random
import shutil
import time
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from pyro_genmodels import MAF, Flow
from pyro_genmodels.cli import recipes
from pyro_genmodels.cli.app import app
from pyro_genmodels.training import checkpoints

OTHERS = (
    None,
    True,
    0,
    -1,
    3,
    10**9,
    10**30,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x1b[2J\n\0",
    "x" * 10_000,
    [],
    [None],
    ["x"],
    [-1],
    [[]],
    {},
    {"x": 1},
    {"class": "NSF", "arguments": {"bins": 10**9}},
    {"tensor": [1.0], "dtype": "float32"},
    KeyError,
)
"""Values that an entry is replaced by; the last removes it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of the command line, with its checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(60, 2)))
    small = partial(Flow, transform=MAF(transforms=1, hidden=(4,)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes, "FAMILIES", {"flow": recipes.Recipe(lambda data, context: small((2,), context=context))})
        patch.setattr("pyro_genmodels.cli.reports.plot_fits", lambda *args, **kwargs: None)
        args = ["fit", "--data", folder / "rows.npy", "--epochs", 2, "--out", folder, "--quiet"]
        result = CliRunner().invoke(app, [*map(str, args)], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        yield folder


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def places(value, at=()):
    """The keys that lead to each value in JSON."""
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*at, key))


def changed(value, way, new):
    value = copy.deepcopy(value)
    inside = value
    for key in way[:-1]:
        inside = inside[key]
    if new is KeyError:
        del inside[way[-1]]
    else:
        inside[way[-1]] = copy.deepcopy(new)
    return value


def forge(path, record, state):
    text = json.dumps(record)
    metadata = {"pyro_genmodels": text, "sha256": checkpoints._digest(state, text)}
    safetensors.torch.save_file(state, path, metadata=metadata)


def check_ends_well(run, tmp_path, command):
    """Check that a command succeeds, or is refused by exit code 2 and one printable line, in a short time."""
    commands = {
        "sample": ["sample", run / "flow", "-n", 3, "--out", tmp_path / "draws.npy", "--force", "--quiet"],
        "evaluate": ["evaluate", run / "flow", "--split", "test"],
        "resume": ["fit", "--resume", run / "flow", "--epochs", 2, "--quiet"],
    }
    begun = time.process_time()
    result = CliRunner().invoke(app, [*map(str, commands[command])])
    assert time.process_time() - begun < 20, "a command without end"
    assert result.exit_code in (0, 2), (result.output, result.exception)
    if result.exit_code == 2:
        lines = result.stderr.rstrip("\n").split("\n")
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("pyro-genmodels: ")
        assert lines[0].isprintable()
        assert len(lines[0]) < 1500
    return result.exit_code


@pytest.mark.filterwarnings("ignore")  # of numbers that are no sensible options
@pytest.mark.parametrize("number", [20, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", ["flow", "flow.training"])
def test_each_command_ends_well_whatever_a_record_says(file, number, run, tmp_path):
    files = {path: path.read_bytes() for path in run.iterdir()}
    path = run / f"{file}.safetensors"
    state, record = checkpoints.read(path)
    rng = random.Random(file)
    ways = [way for way in places(record) if way[0] != "history"] + [("history",), ("history", 1), ("history", 0, "epoch")]
    commands = ("sample", "evaluate", "resume") if file == "flow" else ("resume",)
    refused, count = 0, 0
    for way in [*{way[:2] for way in ways}, *rng.sample(ways, min(number // 2, len(ways)))]:
        record_now = changed(record, way, new := rng.choice(OTHERS)) if isinstance(way[-1], str) else changed(record, way, 3)
        if way[-1] == "epochs" and isinstance(new, int | float):
            continue  # as many epochs as one likes
        forge(path, record_now, state)
        command = rng.choice(commands)
        refused += check_ends_well(run, tmp_path, command) == 2
        count += 1
        for other, raw in files.items():
            other.write_bytes(raw)
    assert count > 20
    assert refused > count / 4
    for command in ("sample", "evaluate", "resume"):
        assert check_ends_well(run, tmp_path, command) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", ["flow", "flow.training"])
def test_each_command_ends_well_whatever_the_tensors_are(file, run, tmp_path):
    files = {path: path.read_bytes() for path in run.iterdir()}
    path = run / f"{file}.safetensors"
    state, record = checkpoints.read(path)
    rng = random.Random(file)
    for name in rng.sample(sorted(state), min(12, len(state))):
        t = state[name]
        others = {n: other for n, other in state.items() if n != name}
        news = [torch.zeros(0), torch.zeros(7, 7), torch.full_like(t, 3), t.to(torch.int8), t.to(torch.complex64)]
        news += [t[..., None], torch.full_like(t, float("nan"))] if t.is_floating_point() else [t[..., None]]
        new = rng.choice(news)
        forge(path, record, others if rng.random() < 0.2 else {**others, name: new})
        check_ends_well(run, tmp_path, "resume" if file != "flow" else rng.choice(("sample", "evaluate", "resume")))
        for other, raw in files.items():
            other.write_bytes(raw)


@pytest.mark.parametrize(
    "notes",
    [
        {"family": "zebra"},
        {"family": 3},
        {"batch_size": 0},
        {"batch_size": "x"},
        {"learning_rate": float("nan")},
        {"learning_rate": -1},
        {"learning_rate": "x"},
        {"patience": None},
        {"epochs": 1.5},
        {"levels": 3},
        {"levels": "x"},
        {"columns": "ab"},
        {"columns": [3]},
        {"source": None},
        {"source": {"data": 3}},
        {"source": {"data": "\0"}},
        {"source": {"data": "/nowhere/rows.npy"}},
        {"source": {"data": "rows.npy", "seed": -1}},
        {"source": {"data": "rows.npy", "columns": 3}},
        {"source": {"data": "moons", "labels": ["x"]}},
        {"source": {"data": "\x1b[2J.csv"}},
        {"source": {"data": "rows.npy", "novelty": 1}},
    ],
    ids=str,
)
def test_notes_of_the_wrong_type_end_well(notes, run, tmp_path):
    for name in ("flow", "flow.training"):
        state, record = checkpoints.read(run / name)
        forge(run / f"{name}.safetensors", {**record, "notes": {**record["notes"], **notes}}, state)
    codes = [check_ends_well(run, tmp_path, command) for command in ("sample", "evaluate", "resume")]
    assert codes[2] == 2 or notes == {"levels": 3}  # the family says them too, and is evaluated by its own
    assert codes[0] == 0 or "levels" in notes
