"""The process of the peers: answers requests of `benchmarks/speed`, a line of JSON each, turn by turn.

It runs in an environment of its own (`make bench-peers`). While it answers, the other process waits, and the other way round.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clock import peak_mib, seconds_of

calls: dict[str, Callable[[], object]] = {}
draws: dict[str, Callable[[], dict[str, np.ndarray]]] = {}


def build(key: str, module: str, name: str, arguments: dict[str, Any]) -> dict[str, float]:
    """Build a call, make it once and return the seconds of both, which hold the time of compiling."""
    make = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)

    def first() -> None:
        made: Any = make(**arguments)
        calls[key], draws[key] = made if isinstance(made, tuple) else (made, dict)
        calls[key]()

    return {"seconds": seconds_of(first)}


def measure(key: str, repeats: int) -> dict[str, float]:
    """Return the seconds of a call."""
    return {"seconds": seconds_of(calls[key], repeats)}


def memory(key: str) -> dict[str, float | None]:
    """Return the memory that a call needs at most."""
    return {"mib": peak_mib(calls[key])}


def save_draws(key: str, path: str) -> dict[str, str]:
    """Save the draws of the last call as a file of NumPy."""
    np.savez(path, **draws[key]())
    return {"path": path}


def drop(key: str) -> dict[str, str]:
    """Forget a call."""
    del calls[key], draws[key]
    return {}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the libraries print is no answer
    if threads := os.environ.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    verbs = {"build": build, "measure": measure, "memory": memory, "save_draws": save_draws, "drop": drop}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = verbs[request.pop("verb")](**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers)
