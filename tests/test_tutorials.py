"""The tutorials run, and each notebook is its script, executed in full."""

import ast
import re
from pathlib import Path
from types import ModuleType

import jupytext
import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
SCRIPTS = sorted(FOLDER.glob("[0-9]*.py"))

each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def notebook(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def code_cells(script):
    return [cell for cell in notebook(script).cells if cell.cell_type == "code"]


def test_there_is_a_notebook_of_each_script_and_no_other():
    assert [path.stem for path in SCRIPTS] == sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert len(SCRIPTS) >= 3


@pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping")  # arviz 0.23 under matplotlib 3.11
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")  # and under pandas 3.1
@pytest.mark.slow  # `make test-docs` runs it
@each
def test_it_runs_in_the_small_setting(script, monkeypatch, capsys):
    monkeypatch.setenv("PYRO_GENMODELS_SMOKE", "1")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.get_fignums()))
    module = ModuleType(script.stem)
    try:
        with mpl.rc_context():
            exec(compile(script.read_text(), script.name, "exec"), vars(module))
            for figure in map(plt.figure, plt.get_fignums()):
                figure.draw_without_rendering()
    finally:
        plt.close("all")
    assert vars(module)["SMOKE"]
    assert shown
    assert all(shown)


@each
def test_the_notebook_has_the_cells_of_the_script(script):
    scripts = jupytext.read(script), notebook(script)
    in_script, in_notebook = ([(cell.cell_type, cell.source) for cell in read.cells] for read in scripts)
    assert in_notebook == in_script


@each
def test_the_notebook_was_executed_in_order_without_an_error(script):
    cells = code_cells(script)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")


@each
def test_the_notebook_has_pictures_and_is_small(script):
    outputs = [output for cell in code_cells(script) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert script.with_suffix(".ipynb").stat().st_size < 700_000


@each
def test_nothing_in_the_notebook_tells_of_the_machine_or_the_time_it_was_made(script):
    assert all(not cell.metadata.keys() & {"execution", "ExecuteTime"} for cell in notebook(script).cells)
    shown = [
        text
        for cell in code_cells(script)
        for output in cell.outputs
        for text in (output.get("text", ""), output.get("data", {}).get("text/plain", ""))
    ]
    assert [text for text in shown if re.search(r"(^|[\s'\"])/\w+/|\bat 0x|Warning", text)] == []


@each
def test_the_knob_comes_first_and_public_names_alone_are_used(script):
    cells = [cell.source for cell in jupytext.read(script).cells if cell.cell_type == "code"]
    assert 'SMOKE = bool(os.environ.get("PYRO_GENMODELS_SMOKE"))' in cells[0]
    tree = ast.parse(script.read_text())
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("pyro_genmodels")]
    names = [(node.module, alias.name) for node in ours for alias in node.names]
    modules = {module: __import__(module, fromlist=["__all__"]) for module, _ in names}
    public = {module: {*loaded.__all__, "datasets"} for module, loaded in modules.items()}
    assert [(module, name) for module, name in names if name not in public[module]] == []
    private = [n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and re.match(r"_[a-z]", n.attr)]
    assert private == []
