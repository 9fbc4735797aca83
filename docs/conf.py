"""How Sphinx makes the documentation: `make docs`. It needs no network."""

import re
import shutil
from pathlib import Path

from pyro_genmodels import __version__, families

project = "pyro_genmodels"
author = "The pyro_genmodels authors"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # docstrings name things in single backquotes
unlisted = (  # what public ones derive from
    "FlowTransform|Likelihood|EnergyChoice|Negatives|State|Run|_ScoreMatching|ScoreMatching|_ByParts|Process|Prediction|Trace|"
    "Solver|_Adaptive|_Fixed|_OnGrid|_OneStep|ReverseSampler|TimeWeighting|Coupling|Interpolant|_Linear|Denoiser|Evaluations|Assessed|Walked|Particles|"
    "ContinuousFamily|GeneratorChoice|CriticChoice|Sides|_Logistic|_SquaredSlope"
)
nitpick_ignore_regex = [("py:.*", rf"(?!pyro_genmodels\.).*|.*\.({unlisted})")]  # our public names must resolve

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_inherit_docstrings = False  # what overrides is documented where it is declared
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"pyro_genmodels {release}"


def tutorials() -> None:
    """Brings the notebooks below Sphinx's own folder, which is all it reads, their links mended, and a page that lists them."""
    docs = Path(__file__).resolve().parent
    here = docs / "tutorials"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    notebooks = sorted((docs.parent / "tutorials").glob("*.ipynb"))
    for notebook in notebooks:
        mended = re.sub(r"\]\(\.\./(docs/)?", lambda m: "](../" if m[1] else "](../../", notebook.read_text())
        (here / notebook.name).write_text(mended)
    listed = "\n".join(notebook.stem for notebook in notebooks)
    (here / "index.md").write_text(f"# Tutorials\n\n```{{toctree}}\n{listed}\n```\n")


def escape_shapes(app, what, name, obj, options, lines) -> None:  # noqa: D103
    # In (N, *event_shape) the star opens no emphasis.
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"``.*?``|(?<=[( ])\*(?=[a-z_]+[,)])", lambda m: m[0] if m[0] != "*" else r"\*", line)


def skip_choices(app, what, name, obj, skip, options) -> bool | None:  # noqa: D103
    # Samplers are choices of a family, and described there once.
    on_samplers = app.env.docname == "api/pyro_genmodels.samplers"
    return True if on_samplers and getattr(families, name, None) is obj else None


def setup(app) -> None:  # noqa: D103
    app.connect("autodoc-process-docstring", escape_shapes)
    app.connect("autodoc-skip-member", skip_choices)
    app.connect("config-inited", lambda app, config: tutorials())
