"""Execution of the tutorials: each script in jupytext's percent format is run and written as a notebook with its outputs.

Times, random cell ids and the temporary paths of cells, which differ from run to run, are left out, so that the files change
little.
"""

import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def execute(script: Path) -> None:
    """Run a script and write its notebook beside it. The first cell that fails raises an error."""
    notebook = jupytext.read(script)
    NotebookClient(notebook, record_timing=False, coalesce_streams=True).execute(cwd=str(script.parent))
    notebook.metadata["language_info"] = {"name": "python"}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    nbformat.validate(notebook)
    target = script.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    target.write_text(re.sub(r"/\S*ipykernel_\d+/\d+\.py", "cell", target.read_text()))


os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm asks notebooks for a package that nothing here needs
os.environ.pop("PYRO_GENMODELS_SMOKE", None)
for name in sys.argv[1:]:
    start = time.perf_counter()
    execute(Path(name))
    print(f"{name}: {time.perf_counter() - start:.0f} s")
