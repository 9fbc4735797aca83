"""The documentation builds without a warning, its code runs, its tables are true and its names resolve."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from html import unescape
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases import CASES
from pyro.infer import Predictive, Trace_ELBO
from teachers import Mixture, integral, perturb
from torch.distributions import constraints

import pyro_genmodels
from pyro_genmodels import GAN, Adversarial, ContrastiveDivergence, DenoisingScoreMatching, MaximumLikelihood, to_arviz
from pyro_genmodels.testing import check_distribution, check_family

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
ALONE = ("examples", "recipes")  # pages whose sections run by themselves
SLOW = {  # pages and sections that train for seconds; `make test-docs` runs them
    "adversarial",
    "energies",
    "speed",
    "examples, An energy-based model and its normalising constant",
    "examples, A diffusion as prior",
    "examples, A flow as likelihood",
    "examples, A flow as prior under NUTS",
    "examples, An ODE flow by flow matching",
    "examples, An SVI posterior in ArviZ",
    "recipes, A frozen flow as a prior, under NUTS",
    "recipes, Compare fits, and mix them by stacking",
    "recipes, The distance of samples from data",
}


# Code.


def blocks(page):
    """Yield (section, code) for each block of Python of a page; the code has the page's line numbers."""
    text = PAGES[page]
    headings = [(m.start(), m[1]) for m in re.finditer(r"^## (.+)$", text, flags=re.M)]
    for found in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.M | re.S):
        section = next((title for start, title in reversed(headings) if start < found.start()), "")
        lines = text.count("\n", 0, found.start(1))
        yield section, compile("\n" * lines + found[1], f"docs/{page}.md", "exec")


@cache
def run(page, section=None):
    """Run the blocks of a page, or of one section of it, in order; return the module they make."""
    name = f"docs_{page}"
    sys.modules[name] = module = ModuleType(name)
    for title, code in blocks(page):
        if section in (None, title):
            exec(code, vars(module))
    return module


def runs():
    for page in PAGES:
        sections = dict.fromkeys(section for section, _ in blocks(page))
        for section in sections if page in ALONE else [None] * bool(sections):
            name = f"{page}, {section}" if section else page
            yield pytest.param(page, section, id=name, marks=pytest.mark.slow if name in SLOW else ())


@pytest.mark.filterwarnings("ignore:.*Pareto k-hat:RuntimeWarning")  # of fits that are trained for seconds
@pytest.mark.parametrize(("page", "section"), list(runs()))
def test_code_runs(page, section):
    run(page, section)


def test_slow_pages_exist():
    assert {param.id for param in runs()} >= SLOW


# The page on adding a family.


def test_the_example_family_keeps_the_contract():
    page = run("adding_a_family")
    for case in page.ROWS + page.ROWS_OF_ITS_OWN:
        check_family(case.build, case.data, context=case.context if case.conditional else None)


def test_the_example_distribution_keeps_the_contract():
    for case in run("adding_a_family").ROWS_OF_ITS_OWN:

        def make(context=None, build=case.build):
            return build().eval()(context)

        check_distribution(make, case.data, context=case.context if case.conditional else None)


@pytest.mark.parametrize("name", ["MixtureDensity", "MixtureDensityNetwork"])
def test_the_example_density_is_that_of_the_mixture(name, float64):
    family = perturb(getattr(run("adding_a_family"), name)((), components=3))
    family.standardize(2 * torch.randn(50) - 5)
    x, mixture = 10 * torch.randn(20) - 5, family.mixture(None)
    loc, scale = mixture.component_distribution.loc, mixture.component_distribution.scale
    truth = Mixture(mixture.mixture_distribution.probs, family.loc + family.scale * loc, family.scale * scale)
    torch.testing.assert_close(family().log_prob(x), truth.log_prob(x))


@pytest.mark.parametrize("name", ["MixtureDensity", "MixtureDensityNetwork"])
@pytest.mark.parametrize("support", [constraints.real, constraints.interval(-1.0, 3.0)], ids=["reals", "interval"])
def test_the_example_density_integrates_to_one(name, support, float64):
    family = getattr(run("adding_a_family"), name)((2,), context=2, components=3, support=support)
    family.standardize(4 * torch.distributions.Beta(2.0, 3.0).sample((200, 2)) - 1)
    low, high = (-20.0, 22.0) if support is constraints.real else (-1.0, 3.0)
    with torch.no_grad():
        d = family(torch.randn(2))
        assert abs(integral(lambda x: d.log_prob(x).exp(), low, high, n=300, dims=2) - 1) < 2e-3


def test_the_example_family_goes_to_predictive_and_arviz():
    for case in run("adding_a_family").ROWS:
        family, context = case.build(), case.context(4)
        assert Predictive(family.model, num_samples=3)(None, context, size=4)["x"].shape == (3, 4, *case.event_shape)
        drawn = to_arviz(family, context=context, size=4, num_samples=5).posterior_predictive["x"]
        assert drawn.shape == (1, 5, 4, *case.event_shape)


# What the pages say.


def table(page, first):
    """Return the rows of the table whose first column has that title, without backquotes."""
    lines = PAGES[page].partition(f"\n| {first} |")[2].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows]


def built(expression):
    """Evaluate an expression over the names of the package."""
    packages = (pyro_genmodels.divergences, pyro_genmodels.infer.adversarial, pyro_genmodels.families, pyro_genmodels)
    known = {name: getattr(package, name) for package in packages for name in package.__all__}
    return eval(expression, {**known, "constraints": constraints})


@pytest.mark.parametrize("row", table("choosing_a_family", "family"), ids=lambda row: row[0])
def test_the_table_of_families_is_true(row):
    expression, density, rsample, trained_by = row
    family = built(expression)
    assert family().density == density
    assert family().has_rsample == {"yes": True, "no": False}[rsample]
    support = family.data_support
    if support.is_discrete:
        x = torch.randint(2, (4, 3)).to(torch.float32 if support is constraints.boolean else torch.long)
    else:
        x = torch.rand(4, 3)
    if trained_by == "Adversarial":
        losses = Adversarial(family.model, family.critic).evaluate_loss(x)
        assert torch.tensor(list(losses.values())).isfinite().all()
    else:
        losses = (MaximumLikelihood, Trace_ELBO, ContrastiveDivergence, DenoisingScoreMatching)
        loss = {loss.__name__: loss for loss in losses}[trained_by]()
        assert torch.tensor(loss.loss(family.model, family.guide, x)).isfinite()
    if trained_by in ("Adversarial", "Trace_ELBO", "ContrastiveDivergence"):
        with pytest.raises(ValueError, match=trained_by):
            MaximumLikelihood().loss(family.model, family.guide, x)


def test_the_table_of_transforms_is_true():
    rows = {name: (draw, rsample) for name, _, draw, rsample, _ in table("choosing_a_family", "transform")}
    cases = {case.name: case for case in CASES if case.name in rows}
    assert cases.keys() == rows.keys()
    choices = {name for name in pyro_genmodels.families.__all__ if hasattr(getattr(pyro_genmodels.families, name), "tolerance")}
    assert rows.keys() == choices - {"GF"}
    for name, (draw, rsample) in rows.items():
        assert ("bisection" in draw) == cases[name].bisection
        assert (rsample == "yes") == cases[name].has_rsample


@pytest.mark.parametrize("row", table("choosing_a_family", "likelihood"), ids=lambda row: row[0])
def test_the_table_of_likelihoods_is_true(row):
    assert built(row[0]).num_outputs == int(row[2])


@pytest.mark.parametrize("row", table("adversarial", "loss"), ids=lambda row: row[0])
def test_the_table_of_adversarial_losses_is_true(row):
    expression, _, log_ratio, divergence, penalties = row
    loss = built(expression)
    assert loss.estimates_ratio == {"yes": True, "no": False}[log_ratio]
    assert loss.bounds_divergence == (divergence != "-")
    assert loss.penalties == (() if penalties == "-" else built(f"({penalties},)"))


def test_the_default_loss_and_pairings_are_those_on_the_page():
    gan = GAN((2,))
    plain, guided = Adversarial(gan.model, gan.critic), Adversarial(gan.model, gan.critic, guide=gan.guide)
    assert type(plain.loss).__name__ == "Relativistic"
    by_default = {name.partition("(")[0]: what for name, _, what in table("adversarial", "pairing") if "default" in what}
    assert by_default.keys() == {type(plain.pairing).__name__, type(guided.pairing).__name__}


@pytest.mark.parametrize("row", table("extending", "base class"), ids=lambda row: row[0])
def test_the_table_of_extension_points_names_what_is_abstract(row):
    """Penalty is the only base class without an abstract method: it may also only constrain parameters."""
    name, required, _ = row
    modules = [module for path, module in sys.modules.items() if path.startswith("pyro_genmodels.") and hasattr(module, name)]
    (base,) = {getattr(module, name) for module in modules if getattr(module, name).__module__ == module.__name__}
    abstract = {name for name in dir(base) if getattr(inspect.getattr_static(base, name), "__isabstractmethod__", False)}
    assert set(required.split(", ")) == (abstract or {"__call__"})
    assert re.search(rf"class \w+\({name}\)|class RoundedPairing", PAGES["extending"])


def test_every_extra_is_named():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {row[0] for row in table("getting_started", "extra")} == extras.keys() - {"all"}


def test_the_theory_names_every_test_of_it_under_its_number():
    tests = [node.name for node in ast.parse((ROOT / "tests/test_theory.py").read_text()).body if hasattr(node, "name")]
    numbered = [name for name in tests if name.startswith("test_T")]
    statements = re.split(r"^### (T\d+)\. ", PAGES["theory"], flags=re.M)
    parts = zip(statements[1::2], statements[2::2], strict=True)
    named = {statement: re.findall(r"tests/test_theory\.py::(\w+)", text) for statement, text in parts}
    assert sorted(name for names in named.values() for name in names) == sorted(numbered)
    assert all(name.startswith(f"test_{statement}_") for statement, names in named.items() for name in names)
    assert all(named.values())


# What the pages quote.


def is_in(quote, text):
    """Return True if the parts of a quote between dots, which stand for anything, are in a text, one after another."""
    start = 0
    for part in quote.split("..."):
        if (found := text.find(part, start)) < 0:
            return False
        start = found + len(part)
    return True


@cache
def messages():
    """Return the strings of the package, with dots for what is put in, and those of its warnings by their place."""
    strings, warned = set(), {}
    for path in (ROOT / "pyro_genmodels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node.func, "attr", getattr(node.func, "id", None)) if isinstance(node, ast.Call) else None
            calls = name in ("warn", "_warn", "warn_caller") and path.parent.name != "cli"
            for found in [node, *(node.args[:1] if calls else ())]:
                if isinstance(found, ast.JoinedStr):
                    text = "".join(part.value if isinstance(part, ast.Constant) else "..." for part in found.values)
                elif isinstance(found, ast.Constant) and isinstance(found.value, str):
                    text = found.value
                else:
                    continue
                strings.add(text)
                if found is not node and len(text.replace("...", "")) > 12:
                    warned[f"{path.name}:{node.lineno}"] = text
    return strings, warned


def quotes():
    """Return the messages that begin an entry of the page of warnings: one, or two joined by "and"."""
    joined = PAGES["warnings"].replace("\n  ", " ")
    entries = re.findall(r"^- `([^`\n]+)`(?: and `([^`\n]+)`)?", joined, flags=re.M)
    return [quote for entry in entries for quote in entry if quote]


def test_every_warning_is_on_the_page_of_warnings():
    _, warned = messages()
    missing = [text for text in warned.values() if not any(is_in(quote, text) for quote in quotes())]
    assert len(warned) > 15
    assert missing == []


def test_every_quoted_message_is_in_the_code():
    strings, _ = messages()
    assert len(quotes()) > 25
    assert [quote for quote in quotes() if not any(is_in(quote, text) for text in strings)] == []


# What the pages name.


WITHOUT_NAMES = ("pyro_genmodels.dynamics", "pyro_genmodels.optim")  # packages whose names are on the pages of others
LISTED = re.findall(r"^   (pyro_genmodels\.[\w.]+)$", PAGES["api"], flags=re.M)


def references():
    for page, text in PAGES.items():
        for role, target in re.findall(r"\{py:(\w+)\}`(?:[^`<]+<)?~?([\w.]+)>?`", text):
            yield pytest.param(role, target, id=f"{page}, {target}")


@pytest.mark.parametrize(("role", "target"), list(references()))
def test_names_resolve(role, target):
    assert role in ("class", "func", "meth", "mod", "attr")
    (*_, name) = sorted((name for name in LISTED if target.startswith(name)), key=len)
    found = import_module(name)
    for i, part in enumerate(target.removeprefix(name).split(".")[1:]):
        assert i > 0 or part in found.__all__
        found = getattr(found, part)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", PAGES[page]) + re.findall(r"^\[\w+\]: (\S+)$", PAGES[page], flags=re.M)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_page_is_in_the_table_of_contents():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```$", PAGES["index"], flags=re.M | re.S)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(entries) == sorted([*PAGES.keys() - {"index"}, "tutorials/index"])
    assert all(f"({page}.md)" in PAGES["index"] for page in PAGES.keys() - {"index"})


def test_every_public_module_is_on_the_page_of_the_api():
    modules = {name for name in dir(pyro_genmodels) if isinstance(getattr(pyro_genmodels, name), ModuleType)}
    assert {f"pyro_genmodels.{name}" for name in modules} <= {*LISTED, *WITHOUT_NAMES}
    assert all(import_module(name).__all__ for name in LISTED)


# What is built.


WITHOUT_SPHINX = any(find_spec(name) is None for name in ("sphinx", "myst_nb", "furo", "latex2mathml"))
needs_sphinx = pytest.mark.skipif(WITHOUT_SPHINX, reason="wants the extra docs")
NOTEBOOKS = [path.stem for path in sorted((ROOT / "tutorials").glob("*.ipynb"))]


@pytest.fixture
def mathml(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs/_extensions")
    return import_module("mathml").mathml


@needs_sphinx
@pytest.mark.parametrize(
    ("tex", "shown"),
    [
        (r"\tfrac12 F", "<mfrac><mn>1</mn><mn>2</mn></mfrac></mstyle><mi>F</mi>"),
        (r"\frac18 \sum", "<mfrac><mn>1</mn><mn>8</mn></mfrac><mo>∑</mo>"),
        (r"\hat\theta_N", "</mover><mi>N</mi></msub>"),
        (r"\log_2 p", '<msub><mi>log</mi><mn>2</mn></msub><mspace width="0.167em" /><mi>p</mi>'),
        (r"u \log(u)", '<mi>u</mi><mspace width="0.167em" /><mi>log</mi><mo stretchy="false">(</mo>'),
        (r"[-1, x - 1]", '<mo form="prefix">\u2212</mo><mn>1</mn><mo>,</mo><mi>x</mi><mo>\u2212</mo><mn>1</mn>'),
        (r"|x| - 1", '<mo stretchy="false" lspace="0" rspace="0">|</mo><mo>\u2212</mo><mn>1</mn>'),
        (r"= \infty", "<mo>=</mo><mi>\u221e</mi>"),
        (r"a < b", "<mi>a</mi><mo>&lt;</mo><mi>b</mi>"),
    ],
)
def test_equations_are_shown_as_meant(mathml, tex, shown):
    assert shown in mathml(tex, block=False)


@needs_sphinx
@pytest.mark.parametrize("tex", [r"\foo x", r"\frac{a}{", "a_b_c", r"\begin{aligned} a &= b \end{aligned}"])
def test_equations_that_cannot_be_shown_are_refused(mathml, tex):
    with pytest.raises(ValueError, match="in the equation"):
        mathml(tex, block=False)


@pytest.mark.slow
@needs_sphinx
def test_it_builds_without_a_warning_and_shows_what_it_should(tmp_path):
    made = shutil.ignore_patterns("_build", "api", "tutorials")
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=made)
    for path in ROOT.iterdir():
        if path.name != "docs":
            (tmp_path / path.name).symlink_to(path)
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "docs", "html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = tmp_path / "html"
    for page in (*PAGES, "api/pyro_genmodels.families", "tutorials/index", *(f"tutorials/{name}" for name in NOTEBOOKS)):
        assert (html / f"{page}.html").exists()
    pages = {path: path.read_text() for path in html.rglob("*.html") if "_modules" not in path.parts}
    for path, page in pages.items():
        assert loaded_from_elsewhere(page) == [], path
        assert latex_shown(page) == [], path
        assert not re.search(r"&lt;factory&gt;|<li><p>It cannot", page), path
    assert sum(page.count("<math ") for page in pages.values()) > 250
    assert all(not re.search(r"(url\(|@import)[^;)]*//", path.read_text()) for path in html.rglob("*.css"))
    for module in LISTED:
        assert hidden_constructors(module, pages[html / f"api/{module}.html"]) == []
    landing = pages[html / "index.html"].partition('<article role="main"')[2]
    assert families() > {pyro_genmodels.ODEFlow, pyro_genmodels.Flow}
    assert all(f'href="api/pyro_genmodels.families.html#pyro_genmodels.families.{f.__name__}"' in landing for f in families())
    assert all(f'href="tutorials/{name}.html"' in landing for name in NOTEBOOKS)


def families():
    """Return the families that can be built."""
    names = (getattr(pyro_genmodels.families, name) for name in pyro_genmodels.families.__all__)
    base = pyro_genmodels.families.Family
    return {f for f in names if isinstance(f, type) and issubclass(f, base) and not inspect.isabstract(f) and f is not base}


def loaded_from_elsewhere(page):
    """Return the addresses that a browser loads something from when it opens the page: neither links nor files beside it."""
    tags = re.findall(r"<(?:script|img|link|iframe|source|object|embed)\b[^>]*>", page)
    found = [address for tag in tags for address in re.findall(r"(?:src|href|data)=\"((?:https?:)?//[^\"]*)\"", tag)]
    return found + re.findall(r"(?:url\(|@import|import\()\s*[\"']?((?:https?:)?//[^\"')]*)", page)


def latex_shown(page):
    """Return the LaTeX that stands in the text of a page, outside of code."""
    text = re.sub(r"<(pre|code|script|style|title)\b.*?</\1>|<[^>]+>", " ", page, flags=re.S)
    return re.findall(r"\\[(\[][^\n]*|\\(?:frac|tfrac|log|sum|int|mathbb|mathrm|theta|sigma|alpha)\b[^\n]*|\$\$?\\[^\n]*", text)


def hidden_constructors(module, page):
    """Return the classes of a module whose constructor the page does not show with the names of its arguments."""
    hidden = []
    for target, heading in re.findall(r'<dt class="sig sig-object py" id="([\w.]+)">\s*(.*?)</dt>', page, flags=re.S):
        found = getattr(import_module(module), target.removeprefix(f"{module}."), None)
        if not inspect.isclass(found) or issubclass(found, Exception):
            continue
        text = html_text(heading)
        shown = set(re.findall(r"(?:^|[(,])\s*\**(\w+)(?=\s*[:=,)])", text.partition(found.__name__)[2]))
        wanted = set(inspect.signature(found).parameters)
        if not wanted <= shown or wanted == {"args", "kwargs"}:
            hidden.append(f"{found.__name__}: {text}")
    return hidden


def html_text(html):
    return unescape(re.sub("<[^>]+>", "", html))
