"""Configuration of Sphinx, which `make docs` runs. Neither it nor the pages need a network."""

import re
import shutil
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from pyro_genmodels import __version__, families, infer

project = "pyro_genmodels"
author = "The pyro_genmodels authors"
release = version = __version__

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))
extensions = [
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "py:obj"  # names in docstrings are in single backquotes
unlisted = (  # on no page
    r"Approximation|BatchedDensity|CapturedDensity|CoordinateFamily|DecodedFamily|Particles|SimulationTrained|"
    r"QuasiNewtonNormal|Surrogate|Batches|ColumnStatistics|Epochs|PairedValues|Ranks|RowCounts|"
    r"RowTotals|Source|TrainedWeights|"
    r"_\w+|ChainRun|ContinuousFamily|Game|Graph|GridSampler|LogProbWithError|Program|ScoreMatching|Trajectory|Units|Update"
)
nitpick_ignore_regex = [("py:.*", rf"(?!pyro_genmodels\.).*|.*\.({unlisted})")]  # public names of this package must resolve

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

autodoc_inherit_docstrings = False  # a method that overrides is documented where it is declared
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100

html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["mathematics.css"]
html_show_copyright = False
html_theme = "furo"
html_title = f"pyro_genmodels {release}"


def tutorials() -> None:
    """Copy the notebooks into Sphinx's folder, adapt their links, and write a page that lists them."""
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
    # The star of (N, *event_shape) does not begin emphasis.
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"``.*?``|(?<=[( ])\*(?=[a-z_ ]+[,)])", lambda m: m[0] if m[0] != "*" else r"\*", line)


def skip_duplicates(app, what, name, obj, skip, options) -> bool | None:  # noqa: D103
    # Samplers are choices of a family, and are documented there; the trainer `Adversarial` is among the objectives.
    other = {"api/pyro_genmodels.samplers": families, "api/pyro_genmodels.infer.adversarial": infer}.get(app.env.docname)
    return True if other is not None and getattr(other, name, None) is obj else None


def begin_sentences(app, what, name, obj, options, lines) -> None:  # noqa: D103
    # Napoleon takes the words before a colon in a property's first line for its type, unless a comment stands before.
    if what in ("attribute", "property") and lines:
        lines[:0] = ["..", ""]


def link_tutorials(app, docname, source) -> None:  # noqa: D103
    # The notebooks stand beside docs/, where GitHub finds them. Sphinx reads its own copies of them.
    source[0] = source[0].replace("](../tutorials/", "](tutorials/")


def show_defaults(app, what, name, obj, options, signature, returned) -> tuple[str, str] | None:  # noqa: D103
    # Dataclasses say `<factory>` for a default that is made anew for each object, which Sphinx cannot parse.
    if signature is None or "<factory>" not in signature or not is_dataclass(obj):
        return None
    made = (repr(field.default_factory()) for field in fields(obj) if field.init and field.default_factory is not MISSING)
    shown = re.sub("<factory>", lambda _: next(made), signature)
    return re.sub(r"~(?:\w+\.)*(?=\w)", "", shown), returned


def setup(app) -> None:  # noqa: D103
    app.connect("source-read", link_tutorials)
    app.connect("autodoc-process-signature", show_defaults)
    app.connect("autodoc-process-docstring", begin_sentences, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", escape_shapes)
    app.connect("autodoc-skip-member", skip_duplicates)
    app.connect("config-inited", lambda app, config: tutorials())
