"""The layout of the package: six floors computed from the imports, no circle, and one file for each door to a library.

Private names of Pyro and torch are used in `_pyro/` only; `tests/pyro_internals` asserts that each does what is relied on.
"""

import ast
import importlib
import pkgutil
import re
from functools import cache
from pathlib import Path

import pytest

import pyro_genmodels

ROOT = Path(__file__).parent.parent / "pyro_genmodels"
MAX_FLOORS = 6
DOORS = {"zuko": "nn/zuko_layers.py", "torchdiffeq": "dynamics/ode.py", "arviz": "inference_data/export.py"}
SHARED_BY_FAMILIES = {
    "angles", "family", "context", "continuous", "coordinates", "decoding", "input_warnings", "latents", "standardization",
    "validation",
}  # fmt: skip
ARCHITECTURE = ROOT.parent / "docs" / "architecture.md"
PRIVATE_ATTRIBUTES = {"_mask", "_params", "_pyro_context", "_pyro_name", "_pyro_samples", "_pyro_set_supermodule"}
PRIVATE_KEYS = {"$$$", "_deterministic", "_enumerate_dim", "_pyro_samples", "_unconstrained", "was_observed"}
FILES = {p.relative_to(ROOT).as_posix(): p.read_text() for p in sorted(ROOT.rglob("*.py"))}


@cache
def imports(source):
    """Return (full name, True if it runs when the file is imported) for every import of a file, wherever it stands."""
    return list(_imports(source))


def _imports(source):
    tree = ast.parse(source)
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for n in ast.walk(f)}
    guarded = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    late |= {id(n) for block in guarded for n in ast.walk(block)}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{'.' * node.level}{node.module or ''}.{name}" for name in names]
        yield from ((name, id(node) not in late) for name in names)


def target_file(name, files):
    """Return the file that an import of this package leads to, or None for another package and for `__version__`."""
    top, *parts = name.split(".")
    if top != "pyro_genmodels" or parts == ["__version__"]:
        return None
    while parts:
        for path in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
            if path in files:
                return path
        parts = parts[:-1]
    return "__init__.py"


def room(path):
    """Return the room of a file: its folder at the top level, or the file itself if it lies in none."""
    return path.split("/")[0]


def arrows(files):
    """Return {file: files it imports}."""
    return {path: {t for name, _ in imports(source) if (t := target_file(name, files))} for path, source in files.items()}


def floors(graph):
    """Return {node: its floor}, which is 1 for a node that imports nothing.

    Raises:
        ValueError: naming a circle of imports.
    """
    found = {}

    def visit(node, above):
        if node in above:
            raise ValueError("circle: " + " -> ".join([*above[above.index(node) :], node]))
        if node not in found:
            found[node] = 1 + max((visit(below, [*above, node]) for below in graph[node]), default=0)
        return found[node]

    for node in graph:
        visit(node, [])
    return found


def between_rooms(graph):
    """Return {room: rooms it imports}, without the package's own `__init__`, which imports names when they are used."""
    rooms = {room(path): set() for path in graph if path != "__init__.py"}
    for path, below in graph.items():
        if path != "__init__.py":
            rooms[room(path)] |= {room(t) for t in below} - {room(path)}
    return rooms


def complaints(path, source):
    """Yield the rules about doors that one file breaks."""
    yield from private_uses(path, source)
    for name, at_once in imports(source):
        top, *parts = name.split(".")
        if top == "":
            yield f"{path} imports {name} by a relative name"
        if top in DOORS and path != DOORS[top]:
            yield f"{path} imports {top}, whose door is {DOORS[top]}"
        if top == "arviz" and at_once:
            yield f"{path} imports arviz outside a function"
        private = [part for part in parts if part.startswith("_") and not part.startswith("__")]
        if top in ("pyro", "torch") and private and room(path) != "_pyro":
            yield f"{path} imports the private name {name}, whose door is _pyro/"
        if top != "pyro_genmodels":
            continue
        if parts[:1] == ["nn"] and room(path) not in ("families", "nn"):
            yield f"{path} opens nn/"
        if (
            parts[:1] == ["families"]
            and room(path) == "families"
            and path != "families/__init__.py"
            and parts[1] not in SHARED_BY_FAMILIES
        ):
            yield f"{path} knows a sibling: {name}"


def private_uses(path, source):
    """Yield the private attributes and keys of Pyro and torch that a file outside `_pyro/` uses."""
    for node in ast.walk(ast.parse(source)) if room(path) != "_pyro" else ():
        if isinstance(node, ast.Attribute) and (node.attr in PRIVATE_ATTRIBUTES or node.attr.startswith("_foreach_")):
            yield f"{path} uses the private attribute {node.attr}, whose door is _pyro/"
        if isinstance(node, ast.Constant) and node.value in PRIVATE_KEYS:
            yield f"{path} uses the private key {node.value}, whose door is _pyro/"
        if isinstance(node, ast.Subscript) and ast.unparse(node).endswith("['infer']['obs']"):
            yield f"{path} uses the private key obs, whose door is _pyro/"


def test_rooms_stand_on_six_floors_without_a_circle():
    assert max(floors(between_rooms(arrows(FILES))).values()) <= MAX_FLOORS


@pytest.mark.parametrize("folder", sorted({p.rsplit("/", 1)[0] for p in FILES if "/" in p}))
def test_files_of_a_folder_import_each_other_without_a_circle(folder):
    graph = arrows(FILES)
    inside = {p for p in graph if p.startswith(folder + "/") and not p.endswith("__init__.py")}
    floors({p: graph[p] & inside for p in inside})


@pytest.mark.parametrize("path", FILES)
def test_each_library_is_used_through_its_door(path):
    assert list(complaints(path, FILES[path])) == []


def test_the_top_level_has_no_loose_module():
    loose = {path for path in FILES if "/" not in path}
    assert loose <= {"__init__.py", "__main__.py"}


def test_nothing_imports_the_contracts_for_test_suites():
    assert [p for p, below in arrows(FILES).items() if room(p) != "testing" and any(room(t) == "testing" for t in below)] == []


def test_the_architecture_page_names_every_file():
    named = set(re.findall(r"^\| \d? ?\| `([\w/]+\.py)` \|", ARCHITECTURE.read_text(), flags=re.MULTILINE))
    files = {path for path in FILES if path.rsplit("/")[-1] != "__init__.py"}
    assert named == files, f"missing: {sorted(files - named)}; no longer there: {sorted(named - files)}"


def test_the_architecture_page_gives_every_room_its_floor():
    rows = re.findall(r"^\| (\d) \| `([\w.]+?)/?` \|", ARCHITECTURE.read_text(), flags=re.MULTILINE)
    assert {name: int(floor) for floor, name in rows} == floors(between_rooms(arrows(FILES)))


def test_the_package_itself_imports_nothing_of_its_rooms():
    names = [name for name, _ in imports(FILES["__init__.py"])]
    assert not [name for name in names if not name.startswith(("importlib", "typing"))]


def test_no_module_is_named_after_what_its_package_exports():
    """Otherwise ``import pyro_genmodels.divergences.mmd as m`` would give the function."""
    for package in pkgutil.walk_packages(pyro_genmodels.__path__, "pyro_genmodels."):
        if not package.ispkg:
            continue
        module = importlib.import_module(package.name)
        for inner in pkgutil.iter_modules(module.__path__):
            found = importlib.import_module(f"{package.name}.{inner.name}")
            assert getattr(module, inner.name) is found, f"{package.name}.{inner.name}"


@pytest.mark.parametrize(
    ("path", "source", "found"),
    [
        ("families/flow.py", "import zuko", "zuko"),
        ("families/flow.py", "from zuko.flows import NSF", "zuko"),
        ("distributions/ode.py", "from torchdiffeq import odeint", "torchdiffeq"),
        ("families/flow.py", "from pyro_genmodels.families.vae import VAE", "sibling"),
        ("families/flow.py", "from ..infer import MaximumLikelihood", "relative"),
        ("distributions/flow.py", "def f():\n    from pyro_genmodels.nn.mlp import MLP", "opens nn"),
        ("evaluation/comparison.py", "def f():\n    import arviz", "arviz"),
        ("inference_data/export.py", "import arviz as az", "outside a function"),
        ("families/flow.py", "from pyro.poutine.runtime import _PYRO_STACK", "private"),
        ("families/family.py", "name = self._pyro_name", "private"),
        ("infer/objective.py", "mask = fn._mask", "private"),
        ("optim/averaging.py", "torch._foreach_lerp_(a, b, 0.1)", "private"),
        ("infer/objective.py", "data = site['infer']['obs']", "private"),
        ("infer/objective.py", "drawn = site['infer'].get('was_observed')", "private"),
    ],
)
def test_a_broken_rule_is_noticed(path, source, found):
    assert any(found in complaint for complaint in complaints(path, source))


def test_floors_are_counted_and_a_circle_is_named():
    files = {
        "a/one.py": "from pyro_genmodels.b import two",
        "b/two.py": "from pyro_genmodels.c.three import x",
        "c/three.py": "",
    }
    assert floors(between_rooms(arrows(files))) == {"a": 3, "b": 2, "c": 1}
    files["c/three.py"] = "def late():\n    import pyro_genmodels.a.one"
    with pytest.raises(ValueError, match="circle: a -> b -> c -> a"):
        floors(between_rooms(arrows(files)))


def test_what_is_allowed_passes():
    allowed = {
        "families/flow.py": "from pyro_genmodels.families.family import Family\nfrom pyro_genmodels.nn.mlp import MLP",
        "families/__init__.py": "from pyro_genmodels.families.vae import VAE",
        "inference_data/export.py": "def f():\n    import arviz as az",
        "nn/zuko_layers.py": "import zuko",
        "dynamics/ode.py": "from torchdiffeq import odeint",
        "_pyro/handlers.py": "from pyro.poutine.runtime import _PYRO_STACK",
    }
    assert not [c for path, source in allowed.items() for c in complaints(path, source)]
