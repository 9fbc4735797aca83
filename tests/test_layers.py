"""The house stands: imports go strictly down its floors, and zuko, arviz and the networks have one door each."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "pyro_genmodels"
# the floors of docs/architecture.md
FLOORS = {
    "_zuko": 0, "errors": 0, "nn": 1, "ops": 1, "files": 1, "tables": 1, "batches": 1, "naming": 1, "weights": 1,
    "optimisers": 1, "datasets": 2, "traces": 2, "samplers": 2, "distributions": 3, "draws": 4, "divergences": 4,
    "partition": 4, "families": 5, "infer": 5, "evaluation": 5, "inference_data": 5, "posterior": 6, "checkpoints": 6,
    "plots": 6, "snapshots": 7, "turns": 7, "training": 8, "recipes": 9, "console": 9, "reports": 10, "cli": 11, "__main__": 12,
}  # fmt: skip


def imports(tree):
    """Every import of a file, wherever it stands: (full name, whether it runs when the file is imported)."""
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    guarded = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    late |= {id(n) for block in guarded for n in ast.walk(block)}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{name}" for name in names]
        yield from ((name, id(node) not in late) for name in names)


def complaints(path, source):
    """What the imports of one file, say "families/flow.py", break of the rules."""
    room = path.removesuffix(".py").split("/")[0]
    for name, at_once in imports(ast.parse(source)):
        top, *parts = name.split(".")
        if top == "":
            yield f"{path} imports {name} by a relative name"
        if top == "zuko" and path != "_zuko.py":
            yield f"{path} imports zuko"
        if top == "torchdiffeq" and path != "ops/ode.py":
            yield f"{path} imports torchdiffeq"
        if top.startswith("arviz") and (path != "inference_data.py" or at_once):
            yield f"{path} imports arviz" + (" outside a function" if path == "inference_data.py" else "")
        if top != "pyro_genmodels" or parts == ["__version__"]:
            continue
        target = parts[0] if parts else ""
        if target == room:
            if room == "families" and path != "families/__init__.py" and parts[1] not in ("family", "continuous"):
                yield f"{path} knows a sibling: {name}"
        elif FLOORS.get(target, 99) >= FLOORS[room]:
            yield f"{path} (floor {FLOORS[room]}) imports {name} (floor {FLOORS.get(target)}), which does not lie below"
        if target == "nn" and room not in ("families", "nn"):
            yield f"{path} opens nn/"


FILES = [p.relative_to(ROOT).as_posix() for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", FILES)
def test_imports_go_down(path):
    assert list(complaints(path, (ROOT / path).read_text())) == []


def test_the_face_imports_nothing_of_the_house():
    names = [name for name, _ in imports(ast.parse((ROOT / "__init__.py").read_text()))]
    assert not [name for name in names if not name.startswith(("importlib", "typing"))]


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("families/flow.py", "import zuko", "zuko"),
        ("families/flow.py", "from zuko.flows import NSF", "zuko"),
        ("distributions/ode.py", "from torchdiffeq import odeint", "torchdiffeq"),
        ("families/flow.py", "from pyro_genmodels.families.vae import VAE", "sibling"),
        ("families/flow.py", "from pyro_genmodels.infer import MaximumLikelihood", "below"),
        ("families/flow.py", "from pyro_genmodels import Flow", "below"),
        ("families/flow.py", "from ..infer import MaximumLikelihood", "relative"),
        ("distributions/flow.py", "def f():\n    from pyro_genmodels.nn.mlp import MLP", "opens nn"),
        ("distributions/flow.py", "from pyro_genmodels import training", "below"),
        ("traces.py", "import pyro_genmodels.samplers.langevin", "below"),
        ("evaluation/compare.py", "def f():\n    import arviz", "arviz"),
        ("inference_data.py", "import arviz as az", "outside a function"),
    ],
)
def test_a_broken_rule_is_noticed(path, source, found):
    assert any(found in complaint for complaint in complaints(path, source))


def test_what_is_allowed_is_not_complained_of():
    allowed = {
        "families/flow.py": "from pyro_genmodels.families.family import Family\nfrom pyro_genmodels.nn.mlp import MLP",
        "families/__init__.py": "from pyro_genmodels.families.vae import VAE",
        "distributions/flow.py": "from pyro_genmodels.distributions.base import unwrap\nfrom pyro_genmodels import traces",
        "inference_data.py": "def f():\n    import arviz as az",
        "cli.py": "from pyro_genmodels import __version__\nfrom pyro_genmodels.recipes import learn",
        "_zuko.py": "import zuko",
        "ops/ode.py": "from torchdiffeq import odeint",
    }
    assert not [c for path, source in allowed.items() for c in complaints(path, source)]
