"""The command line does its main job, refuses what it cannot do in one line, and starts at once."""

import csv
import importlib.util
import json
import subprocess
import sys
import time

import arviz as az
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import pyro_genmodels
from pyro_genmodels.cli import FAMILIES, app

PNG = b"\x89PNG"
QUICK = ["compare", "--data", "digits", "--epochs", "1", "--families", "autoregressive"]


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def python(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300)


def rows(out):
    with (out / "table.csv").open() as file:
        return list(csv.DictReader(file))


def check_outputs(out, families):
    assert {row["family"] for row in rows(out)} == set(families)
    assert set(rows(out)[0]) >= {"family", "kind", "nats", "se", "bits_per_dim", "seconds"}
    pictures = ["loss.png", "compare.png", *(f"samples_{family}.png" for family in families)]
    assert all((out / picture).read_bytes().startswith(PNG) for picture in pictures)
    for family in families:
        draws = az.from_netcdf(out / f"{family}.nc").posterior_predictive["x"]
        assert draws.dims[:2] == ("chain", "draw")
        assert draws.shape[2:] == (8, 8)
        assert set(draws.to_numpy().ravel()) <= set(range(17))
        assert load_file(out / f"{family}.safetensors")
        assert json.loads((out / f"{family}.json").read_text())["best"]["epoch"] == 1
    assert not list(out.glob("*.part"))


def check_refusal(result, *words):
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "made" / "here"
    result = invoke(*QUICK[:-1], "vae,autoregressive", "--seed", 3, "--out", out)
    return result, out


def test_compare_writes_what_it_promises(run):
    result, out = run
    assert result.exit_code == 0, result.output
    check_outputs(out, ["vae", "autoregressive"])


def test_compare_says_what_it_knows_and_of_what_kind(run):
    result, out = run
    for row in rows(out):
        assert row["family"] in result.stdout
        assert f"{float(row['nats']):.2f}" in result.stdout
    assert {row["family"]: row["kind"] for row in rows(out)} == {"vae": "lower bound", "autoregressive": "exact"}
    assert "lower bound" in result.stdout
    assert "exact" in result.stdout
    assert "held-out" in result.stdout
    assert "loo" not in result.stdout.lower()


def test_bits_per_dimension_are_nats_over_64_log_2(run):
    for row in rows(run[1]):
        assert float(row["bits_per_dim"]) == pytest.approx(float(row["nats"]) / (64 * 0.6931472), rel=1e-4)


def test_rows_are_best_first(run):
    nats = [float(row["nats"]) for row in rows(run[1])]
    assert nats == sorted(nats)


def test_run_json_tells_how_it_was_run(run):
    record = json.loads((run[1] / "run.json").read_text())
    expected = {"data": "digits", "families": ["vae", "autoregressive"], "seed": 3, "device": "cpu", "epochs": 1}
    assert record["arguments"].items() >= expected.items()
    assert record["versions"].keys() >= {"python", "torch", "pyro-ppl", "zuko", "arviz", "numpy", "scikit-learn"}
    assert record["versions"]["pyro-genmodels"] == pyro_genmodels.__version__


def test_checkpoint_is_the_state_of_the_best_epoch(run):
    record = json.loads((run[1] / "run.json").read_text())
    for family in ("vae", "autoregressive"):
        saved = json.loads((run[1] / f"{family}.json").read_text())
        assert saved["best"] == record["fits"][family]["best"]


def test_a_seed_says_everything(run, tmp_path):
    def nats(seed, out):
        assert invoke(*QUICK, "--seed", seed, "--out", out, "--quiet").exit_code == 0
        return rows(out)[0]["nats"]

    before = next(row["nats"] for row in rows(run[1]) if row["family"] == "autoregressive")
    assert nats(3, tmp_path / "again") == before
    assert nats(4, tmp_path / "other") != before


def test_quiet_prints_the_table_alone(tmp_path):
    result = python("-m", "pyro_genmodels", *QUICK, "--out", tmp_path, "--quiet")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "autoregressive" in result.stdout
    assert "epoch" not in result.stdout
    assert str(tmp_path) not in result.stdout


def test_progress_goes_to_stderr_and_the_folder_is_named(tmp_path):
    result = invoke(*QUICK, "--out", tmp_path)
    assert "epoch" in result.stderr
    assert "epoch" not in result.stdout
    assert str(tmp_path) in result.stdout.replace("\n", "")


def test_a_family_named_twice_is_fitted_once(tmp_path):
    result = invoke(*QUICK[:-1], "autoregressive, autoregressive,", "--out", tmp_path)
    assert result.exit_code == 0
    assert len(rows(tmp_path)) == 1
    assert len(json.loads((tmp_path / "run.json").read_text())["arguments"]["families"]) == 1


@pytest.mark.slow
def test_compare_by_default_fits_every_family(tmp_path):
    result = python("-m", "pyro_genmodels", "compare", "--data", "digits", "--epochs", "1", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    check_outputs(tmp_path, FAMILIES)


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
        (["--seed", "-1"], ["-1"]),
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_refused_in_one_line(args, words, tmp_path):
    known = {"--families": "autoregressive", "--out": tmp_path, "--epochs": 1}
    known[args[0]] = args[1]
    result = invoke("compare", *(part for option in known.items() for part in option))
    if args[0] == "--seed":
        assert result.exit_code == 2
        assert "Traceback" not in result.stderr
        assert "-1" in result.stderr
    else:
        check_refusal(result, *words)
    assert not list(tmp_path.iterdir())


def test_no_epochs_are_refused(tmp_path):
    result = invoke("compare", "--epochs", 0, "--out", tmp_path)
    assert result.exit_code == 2
    assert "epochs" in result.stderr


def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    check_refusal(invoke(*QUICK, "--out", tmp_path / "file"), "file")
    check_refusal(invoke(*QUICK, "--out", tmp_path / "file" / "below"), "below")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc takes no files, not even from root")
def test_an_output_folder_that_takes_no_files_is_refused_before_training():
    result = invoke(*QUICK, "--out", "/proc")
    check_refusal(result, "/proc")


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0
    assert pyro_genmodels.__version__ in result.stdout


def test_help_answers_at_once():
    start = time.perf_counter()
    result = python("-m", "pyro_genmodels", "--help")
    assert time.perf_counter() - start < 3
    assert result.returncode == 0
    assert "compare" in result.stdout


def test_help_of_compare_names_its_options():
    result = python("-m", "pyro_genmodels", "compare", "--help")
    assert result.returncode == 0
    for option in ("--data", "--families", "--out", "--seed", "--device", "--epochs", "--quiet"):
        assert option in result.stdout


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "pyro", "zuko", "arviz", "numpy", "matplotlib", "sklearn", "typer"]
    code = f"import sys, pyro_genmodels; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_refusing_a_name_imports_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from pyro_genmodels.cli import app;"
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


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Flwo'"):
        _ = pyro_genmodels.Flwo
    assert not hasattr(pyro_genmodels, "nonsense")


@pytest.mark.parametrize(
    ("missing", "code"),
    [
        ("typer", "import pyro_genmodels.cli"),
        ("typer", "import runpy; runpy.run_module('pyro_genmodels', run_name='__main__')"),
        ("sklearn", "from pyro_genmodels.datasets import digits; digits()"),
        (
            "safetensors",
            "import torch; from pyro_genmodels import Flow, train;"
            "train(Flow((1,)), torch.randn(9, 1), epochs=1, progress=False, checkpoint='nowhere/c')",
        ),
    ],
    ids=["typer", "typer-main", "sklearn", "safetensors"],
)
def test_a_missing_extra_names_the_line_that_installs_it(missing, code, tmp_path):
    assert importlib.util.find_spec(missing)
    block = f"import sys, os; os.chdir({str(tmp_path)!r}); sys.modules[{missing!r}] = None\n"
    if missing in ("safetensors", "sklearn"):
        block += f"sys.modules['{missing}.torch'] = sys.modules['{missing}.datasets'] = None\n"
    result = python("-c", block + code)
    assert result.returncode != 0
    assert "pip install 'pyro-genmodels[" in result.stderr.strip().splitlines()[-1]


def test_a_missing_extra_is_no_traceback_on_the_command_line(tmp_path):
    code = (
        "import sys; sys.modules['sklearn'] = sys.modules['sklearn.datasets'] = None; from pyro_genmodels.cli import main;"
        f"sys.argv = ['pyro-genmodels', *{QUICK}, '--out', {str(tmp_path)!r}]; main()"
    )
    result = python("-c", code)
    assert result.returncode != 0
    assert "pip install 'pyro-genmodels[" in result.stderr
    assert "Traceback" not in result.stderr
