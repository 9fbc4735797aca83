"""Clock and memory gauge that both processes of `benchmarks/speed` use; only the standard library is imported."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds_of(call: Callable[[], object], repeats: int = 1) -> float:
    """Return the seconds that one call takes, as the mean over a block of calls."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def peak_mib(call: Callable[[], object], repeats: int = 3) -> float | None:
    """Return the most memory in MiB that calls need beyond what the process held before, or None where this is unknown.

    Freed memory is first given back to the system, so that what the calls allocate is seen. Linux alone tells.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")  # the peak is counted from here
    except (OSError, AttributeError, TypeError):  # another system
        return None
    before = _status_kib("VmRSS")
    for _ in range(repeats):
        call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
