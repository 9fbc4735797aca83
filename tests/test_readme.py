"""The README's examples run, and are short."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = dict(re.findall(r"\*\*(.+?)\*\*[^`]*?```python\n(.*?)```", README, flags=re.S))


@pytest.mark.parametrize("title", EXAMPLES)
def test_example_runs(title, capsys):
    exec(compile(EXAMPLES[title], title, "exec"), {})


def test_there_is_an_example_of_each_and_none_is_long():
    in_pyro = ["A flow as likelihood", "A VAE by SVI", "An energy, and its constant"]
    by_paths = ["An ODE flow by flow matching", "A diffusion as prior"]
    by_draws = ["A simulator against a critic", "A GAN, and divergences"]
    assert list(EXAMPLES) == [*in_pyro, *by_paths, *by_draws, "A flow as prior, under NUTS", "An SVI posterior into ArviZ."]
    assert all(len([line for line in code.splitlines() if line.strip()]) <= 15 for code in EXAMPLES.values())
