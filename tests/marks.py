"""Marks of tests that repeat a truth: `make test` runs a few of their parameters, `make test-slow` all."""

import pytest


def slow_unless(kept, values):
    """Return the values as parameters of a test, all but the kept ones marked slow."""
    names = {_name(value) for value in kept}
    assert names <= {_name(value) for value in values}, f"{kept} are not among {values}"
    return [value if _name(value) in names else pytest.param(value, marks=pytest.mark.slow) for value in values]


def _name(value):
    return getattr(value, "__name__", None) or str(value)
