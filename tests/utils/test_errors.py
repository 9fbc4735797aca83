"""Errors name what was found, what is known or wanted, and the nearest known name."""

import copy
import pickle
import re
import tomllib
import warnings
from pathlib import Path
from types import FunctionType, SimpleNamespace

import numpy as np
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_genmodels import NSF, Flow
from pyro_genmodels.dynamics.spacing import check_num_steps
from pyro_genmodels.nn.checks import check_count, check_widths
from pyro_genmodels.samplers import sample_chains
from pyro_genmodels.samplers.kernel import check_counts
from pyro_genmodels.training import TrainingInterrupted
from pyro_genmodels.utils.errors import (
    ArgumentError,
    check_choice,
    check_positive_int,
    import_extra,
    listed,
    one_line,
    unknown_name,
    warn_caller,
)

NAMES = ["digits", "moons", "ring", "grid"]


def test_the_found_and_the_known_names_are_listed():
    error = unknown_name("data set", "spiral", NAMES)
    assert type(error) is ValueError
    assert str(error) == "unknown data set 'spiral': choose from digits, moons, ring, grid."


@pytest.mark.parametrize(
    ("found", "nearest"),
    [("mons", "moons"), ("MOONS", "moons"), ("Digit", "digits"), ("grind", "grid"), ("Height", None), ("", None)],
)
def test_the_nearest_name_is_suggested(found, nearest):
    message = str(unknown_name("data set", found, NAMES))
    assert message.endswith(f" Did you mean {nearest}?" if nearest else "grid.")


def test_the_suggestion_keeps_its_case():
    assert str(unknown_name("column", "sepal length", ["Sepal Length", "Kind"])).endswith("Did you mean Sepal Length?")


def test_at_most_twenty_names_are_listed():
    names = [f"column_{i}" for i in range(1000)]
    message = str(unknown_name("column", "column_99x", names))
    assert "column_19 and 980 more" in message
    assert "column_20" not in message
    assert "Did you mean column_99" in message  # also if it is not listed
    assert listed(names[:20]).endswith("column_19")


def test_no_names_at_all():
    assert str(unknown_name("array", "x", [])) == "unknown array 'x': choose from none."


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\x1b[31mred", "x" * 10_000])
def test_odd_names_give_one_short_line(name):
    for message in (
        str(unknown_name("column", name, ["a"])),
        str(unknown_name("column", "a", [name])),
        str(unknown_name("column", name, [name])),
    ):
        assert message.isprintable()
        assert len(message) < 300


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "2", float("nan")])
def test_only_positive_integers_pass(value):
    check_positive_int("Owner", first=1, second=10**9)
    with pytest.raises(ValueError, match=r"^Owner wants an integer count of 1 or more, but found "):
        check_positive_int("Owner", first=1, count=value)


def test_a_choice_is_checked_and_defaults():
    assert check_choice("Owner", "number", None, 2, int) == 2
    assert check_choice("Owner", "number", 3, 2, int | str) == 3
    with pytest.raises(TypeError, match=r"Owner wants an option such as 2, but found 'x'\.$"):
        check_choice("Owner", "option", "x", 2, int)
    with pytest.raises(TypeError, match=r"found the class int; call it\.$"):
        check_choice("Owner", "option", int, 2, int)


def test_a_missing_library_is_named_as_the_registry_names_it():
    with pytest.raises(ImportError, match=r"A plan needs POT: pip install 'pyro-genmodels\[plots\]'\.$"):
        import_extra("ot.nothing_of_this_name", extra="plots", by="A plan")


def test_every_extra_that_an_error_names_can_be_installed():
    root = Path(__file__).parents[2]
    known = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for path in (root / "pyro_genmodels").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r'extra="(\w+)"', source)}
    assert named
    assert named <= set(known)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain", "plain"),
        (" two\n\tlines \r\n", "two lines"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\u202egnp.exe", r"a\u202egnp.exe"),
        ("zero\u200bwidth \ud800 \x00", r"zero\u200bwidth \ud800 \x00"),
        ("größe €", "größe €"),
        ("", ""),
        (3, "3"),
        ("x" * 201, "x" * 197 + "..."),
        ("x" * 10**7, "x" * 197 + "..."),
        ("\n" * 10**7 + "x", "..."),
        ("\x07" * 200, r"\x07" * 49 + r"\..."),
    ],
    ids=range(12),
)
def test_a_text_from_elsewhere_is_one_printable_line(text, line):
    found = one_line(text)
    assert found == line
    assert found.isprintable()
    assert len(found) <= 200
    found.encode()


@pytest.mark.parametrize(
    "error",
    [ArgumentError("too many", argument="max_bytes", example="11"), TrainingInterrupted(Path("a.safetensors"), 3)],
    ids=["ArgumentError", "TrainingInterrupted"],
)
@pytest.mark.parametrize("transfer", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickle", "copy"])
def test_an_error_reaches_the_user_from_a_worker_process(error, transfer):
    again = transfer(error)
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_warning_names_the_line_of_the_user_also_behind_modules_of_torch_and_handlers_of_pyro():
    def as_of_the_library(function):
        return FunctionType(function.__code__, {"warn_caller": warn_caller, "__name__": "pyro_genmodels.infer"})

    class Warns(nn.Module):
        forward = as_of_the_library(lambda self: warn_caller("found"))

    calls = {
        "function": as_of_the_library(lambda: warn_caller("found")),
        "module of torch": Warns(),
        "handler of Pyro": poutine.block(as_of_the_library(lambda: warn_caller("found"))),
    }
    for name, call in calls.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert [(w.filename, w.category) for w in caught] == [(__file__, RuntimeWarning)], name


@pytest.mark.parametrize("count", [3, np.int64(3), np.uint8(3)])
def test_a_count_is_an_integer_of_python_or_numpy(count):
    check_positive_int("f", n=count)
    check_count("NSF", n=count)
    check_widths("NSF", hidden=(count, 8))
    check_num_steps(None, count)
    assert Flow((2,), transform=NSF(transforms=count, hidden=(count,)))().sample((np.int64(2),)).shape == (2, 2)
    assert sample_chains(lambda x: -x.square().sum(-1), torch.zeros(2, 1), num_samples=count, progress=False).draws.shape[
        :2
    ] == (2, 3)


@pytest.mark.parametrize("count", [0, np.int64(0), True, np.bool_(1), 2.0, "2", None])
def test_what_is_no_count_is_refused_in_the_same_words_everywhere(count):
    words = rf"an integer n of 1 or more, but found {re.escape(repr(count))}"
    with pytest.raises(ValueError, match=words):
        check_positive_int("f", n=count)
    with pytest.raises(ValueError, match=words):
        check_count("f", n=count)
    with pytest.raises(ValueError, match=words):
        check_counts(SimpleNamespace(n=count), "n")
    with pytest.raises(ValueError, match="an integer n of 2 or more, but found 1"):
        check_positive_int("f", least=2, n=1)
