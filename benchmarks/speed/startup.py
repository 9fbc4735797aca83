"""Steps after which compiling has paid.

Each program is compiled in a process of its own, with an empty cache of compiled code (cold) and with a full one (warm).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from benchmarks.clock import peak_mib
from benchmarks.speed import programs
from benchmarks.speed.measure import ROOT, Bench, Peers, duration
from benchmarks.speed.programs import Program
from benchmarks.speed.rows import compiled, flow_program, stock
from pyro_genmodels.infer.compiled import Captured, Compiled

PROGRAMS: dict[str, Callable[[], Program]] = {
    "eight schools": lambda: programs.with_normal_guide("eight schools"),
    "logistic": lambda: programs.with_normal_guide("logistic"),
    "GMM": lambda: programs.enumerated("GMM"),
    "VAE, batch 128": lambda: programs.vae(128),
    "NSF, batch 512": flow_program,
}


@dataclass(frozen=True)
class BreakEven:
    """The time to compile a step, and how soon it is won back.

    Attributes:
        work: the program.
        how: the mode, and its cache.
        build: seconds of the first captured step more than of others.
        stock: seconds of a step of Pyro's SVI.
        step: seconds of a captured step.
        mib: memory that capturing and compiling need.
    """

    work: str
    how: str
    build: float
    stock: float
    step: float
    mib: float | None

    header: ClassVar[tuple[str, ...]] = (
        "work",
        "mode",
        "capture and compile",
        "peak MiB of it",
        "stock step",
        "step",
        "pays after",
    )

    def cells(self) -> tuple[str, ...]:
        won = self.stock - self.step
        pays = f"{self.build / won:,.0f} steps, {duration(self.build / won * self.stock)} of stock" if won > 0 else "never"
        mib = "-" if self.mib is None else f"{self.mib:.0f}"
        return (self.work, self.how, duration(self.build), mib, duration(self.stock), duration(self.step), pays)


def startup(bench: Bench) -> None:
    """Measure how soon compiling pays."""
    for work in PROGRAMS:
        with tempfile.TemporaryDirectory() as cache:
            for mode, how in (("compiled", "compiled, cold"), ("compiled", "compiled, warm"), ("captured", "captured")):
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                command = [sys.executable, "-m", "benchmarks.speed.startup", work, mode, str(bench.threads)]
                answer = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
                bench.add(BreakEven(work, how, **json.loads(answer.stdout.splitlines()[-1])))


def main(work: str, mode: str, threads: int) -> None:
    """Print the figures of one program and mode."""
    torch.set_num_threads(threads)
    call = compiled(PROGRAMS[work](), mode=Captured() if mode == "captured" else Compiled())
    start = time.perf_counter()
    mib = peak_mib(call.function, repeats=1)
    build = time.perf_counter() - start
    bench = Bench(10, 0.05, threads, Peers(threads))
    step, other = bench.medians([call, stock(PROGRAMS[work]())])
    print(json.dumps({"build": build - step, "stock": other, "step": step, "mib": mib}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
