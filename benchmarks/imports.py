"""What importing the package adds to importing torch and pyro, as a ratio: python benchmarks/imports.py

Each import runs in a fresh process. The three are measured in turn, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import subprocess
import sys
import time
from statistics import median

IMPORTS = {
    "torch and pyro": "import torch, pyro",
    "the package": "import torch, pyro, pyro_genmodels",
    "all public names": "import torch, pyro; from pyro_genmodels import *",
}


def seconds(code: str) -> float:
    """Return the seconds that a fresh process takes to run code."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def measure(rounds: int = 9) -> dict[str, list[float]]:
    """Return the seconds of each import in every round, after one round that does not count."""
    times = [{name: seconds(code) for name, code in IMPORTS.items()} for _ in range(rounds + 1)]
    return {name: [found[name] for found in times[1:]] for name in IMPORTS}


if __name__ == "__main__":
    found = measure()
    base = found["torch and pyro"]
    print(f"{'import':20} {'seconds':>8} {'added to torch and pyro':>24}")
    for name, values in found.items():
        added = median(value / reference for value, reference in zip(values, base, strict=True)) - 1
        print(f"{name:20} {median(values):8.2f} {added:24.1%}")
