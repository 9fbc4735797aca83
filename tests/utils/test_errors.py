"""A name that nobody knows is answered with those that are known, and the nearest."""

import pytest

from pyro_genmodels.utils.errors import listed, unknown_name

NAMES = ["digits", "moons", "ring", "grid"]


def test_what_was_found_and_what_is_known_are_named():
    error = unknown_name("data set", "spiral", NAMES)
    assert type(error) is ValueError
    assert str(error) == "unknown data set 'spiral': known are digits, moons, ring, grid."


@pytest.mark.parametrize(
    ("found", "nearest"),
    [("mons", "moons"), ("MOONS", "moons"), ("Digit", "digits"), ("grind", "grid"), ("Height", None), ("", None)],
)
def test_the_nearest_is_asked_for(found, nearest):
    message = str(unknown_name("data set", found, NAMES))
    assert message.endswith(f" Did you mean {nearest}?" if nearest else "grid.")


def test_the_nearest_is_given_in_its_own_case():
    assert str(unknown_name("column", "sepal length", ["Sepal Length", "Kind"])).endswith("Did you mean Sepal Length?")


def test_of_more_than_twenty_names_twenty_are_shown():
    names = [f"column_{i}" for i in range(1000)]
    message = str(unknown_name("column", "column_99x", names))
    assert "column_19 and 980 more" in message
    assert "column_20" not in message
    assert "Did you mean column_99" in message  # also where it is not among those shown
    assert listed(names[:20]).endswith("column_19")


def test_no_names_at_all():
    assert str(unknown_name("array", "x", [])) == "unknown array 'x': known are none."


@pytest.mark.parametrize("name", ["", " ", "two\nlines", "\x1b[31mred", "x" * 10_000])
def test_odd_names_make_one_short_line(name):
    for message in (
        str(unknown_name("column", name, ["a"])),
        str(unknown_name("column", "a", [name])),
        str(unknown_name("column", name, [name])),
    ):
        assert message.isprintable()
        assert len(message) < 300
