"""Where the time of a step goes: the line that runs is looked at every millisecond of processor time."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import ClassVar

from benchmarks.speed import programs
from benchmarks.speed.measure import Bench
from benchmarks.speed.rows import compiled, stock

INTERVAL = 0.001

STOCK_PARTS = {
    "gradient": ("torch/autograd/", "torch/_tensor.py"),
    "optimiser": ("torch/optim/", "pyro/optim/"),
    "distributions": ("torch/distributions/", "pyro/distributions/"),
    "guide": ("pyro/infer/autoguide/",),
    "parameters": ("pyro/params/", "pyro/nn/"),
    "handlers and traces": ("pyro/poutine/", "pyro/primitives.py", "pyro/infer/", "pyro/ops/", "pyro/util.py", "networkx/"),
    "model and networks": ("torch/nn/", "benchmarks/"),
}
COMPILED_PARTS = {
    "audit": ("audit",),
    "watch": ("compiled/watch.py",),
    "compiled graph": ("torch/_inductor/", "torchinductor", "torch/_functorch/", "torch/_higher_order_ops/"),
    "step around it": ("infer/compiled/", "_pyro/", "torch/"),
}


@dataclass(frozen=True)
class Shares:
    """Shares of the time of a call.

    Attributes:
        work: what is computed.
        call: name of the call.
        shares: share of each part.
    """

    work: str
    call: str
    shares: dict[str, float]

    header: ClassVar[tuple[str, ...]] = ("work", "call", "where its time goes")

    def cells(self) -> tuple[str, ...]:
        parts = sorted(self.shares.items(), key=lambda item: -item[1])
        return (self.work, self.call, ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005))


def shares(call: Callable[[], object], parts: dict[str, tuple[str, ...]], seconds: float) -> dict[str, float]:
    """Return the share of each part; a part is known by the innermost file that one of its fragments occurs in."""
    counts: Counter[str] = Counter()

    def look(_: int, frame: FrameType | None) -> None:
        if any(code == "audit" for code in names(frame)) and "audit" in parts:
            counts["audit"] += 1
            return
        while frame is not None:
            file = frame.f_code.co_filename
            for part, fragments in parts.items():
                if any(fragment in file for fragment in fragments):
                    counts[part] += 1
                    return
            frame = frame.f_back
        counts["rest"] += 1

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, INTERVAL, INTERVAL)
    try:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    total = sum(counts.values())
    return {part: n / total for part, n in counts.items()}


def names(frame: FrameType | None) -> list[str]:
    """Return the names of the functions that run."""
    found = []
    while frame is not None:
        found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def profile(bench: Bench) -> None:
    """Look at steps of four programs."""
    makers: dict[str, Callable[[], programs.Program]] = {
        "eight schools": lambda: programs.with_normal_guide("eight schools"),
        "logistic": lambda: programs.with_normal_guide("logistic"),
        "VAE, batch 128": lambda: programs.vae(128),
    }
    for work, make in makers.items():
        for call, parts in ((stock(make()), STOCK_PARTS), (compiled(make()), COMPILED_PARTS)):
            for _ in range(100):
                call.function()
            bench.add(Shares(f"{work}, step", call.name, shares(call.function, parts, 3.0)))
