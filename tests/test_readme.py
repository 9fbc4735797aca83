"""The README's code runs."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks():
    """Yield the blocks of Python; those that compile take seconds, and `make test-docs` runs them."""
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)):
        yield pytest.param(code, id=str(i), marks=pytest.mark.slow if "Compiled" in code else ())


@pytest.mark.parametrize("code", list(blocks()))
def test_code_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out
