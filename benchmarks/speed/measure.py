"""Pairs of calls measured turn by turn: medians of seconds, and the median of the ratio within each turn.

A machine that others use is slower at one time than at another. What a call takes is therefore compared only with what another
took in the same turn; the figures of different rows are not to be divided by each other.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, ClassVar, Protocol

from benchmarks.clock import peak_mib, seconds_of

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class AtMost:
    """A target for ratios of seconds."""

    limit: float

    def met(self, ratio: float) -> bool:
        return ratio <= self.limit

    def __str__(self) -> str:
        return f"<= {self.limit:.3g}"


@dataclass(frozen=True)
class AtLeast:
    """A target for ratios of rates."""

    limit: float

    def met(self, ratio: float) -> bool:
        return ratio >= self.limit

    def __str__(self) -> str:
        return f">= {self.limit:.3g}"


Target = AtMost | AtLeast


@dataclass(frozen=True)
class Row:
    """A comparison of two calls.

    Attributes:
        work: what is computed.
        ours: name of the call of this package.
        theirs: name of the other call.
        figures: figure of each, with its unit, such as "133 us".
        ratio: median of the ratios of all turns.
        low: lower quartile of these ratios.
        high: upper quartile of these ratios.
        target: what the ratio should be, if anything was aimed at.
        memory: MiB that each needs at most beside what the process holds.
    """

    work: str
    ours: str
    theirs: str
    figures: tuple[str, str]
    ratio: float
    low: float
    high: float
    target: Target | None = None
    memory: tuple[float | None, float | None] = (None, None)

    header: ClassVar[tuple[str, ...]] = (
        "work",
        "ours",
        "other",
        "ours takes",
        "other takes",
        "ratio (quartiles)",
        "target",
        "peak MiB, ours / other",
    )

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row in a table."""
        target = "" if self.target is None else f"{self.target}, {'met' if self.target.met(self.ratio) else 'missed'}"
        memory = " / ".join("-" if mib is None else f"{mib:.1f}" for mib in self.memory)
        ratio = f"{self.ratio:.3g} ({self.low:.3g} to {self.high:.3g})"
        return (self.work, self.ours, self.theirs, *self.figures, ratio, target, memory)


class TableRow(Protocol):
    """A row of a table of any kind."""

    header: ClassVar[tuple[str, ...]]

    def cells(self) -> tuple[str, ...]:
        """Return the cells of the row in a table."""


class Call(Protocol):
    """A call that can be measured, here or in the process of the peers."""

    name: str
    steps: int

    @property
    def available(self) -> bool:
        """True if the call can be made."""

    def build(self) -> float:
        """Make the first call and return its seconds."""

    def seconds(self, repeats: int) -> float:
        """Return the seconds of one call, the mean over a block."""

    def mib(self) -> float | None:
        """Return the memory that a call needs at most."""


@dataclass
class Here:
    """A call in this process; `steps` is the number of steps that it makes."""

    name: str
    function: Callable[[], object]
    steps: int = 1
    available: bool = True

    def build(self) -> float:
        return seconds_of(self.function)

    def seconds(self, repeats: int) -> float:
        return seconds_of(self.function, repeats)

    def mib(self) -> float | None:
        return peak_mib(self.function)


class Peers:
    """The process of the peers (see `benchmarks/peers`), started when first asked."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises:
            RuntimeError: The peer failed.
        """
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"verb": verb, **request}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the peers has ended; its last words are above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._threads),
            "MKL_NUM_THREADS": str(self._threads),
            "JAX_PLATFORMS": "cpu",
        }
        if self._threads == 1:
            environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        return subprocess.Popen(
            [PEERS, "-m", "benchmarks.peers"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def available(self) -> bool:
        """True if the environment of the peers was made."""
        return PEERS.exists()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


@dataclass
class There:
    """A call in the process of the peers."""

    name: str
    peers: Peers
    module: str
    function: str
    arguments: dict[str, Any]
    steps: int = 1

    @property
    def available(self) -> bool:
        return self.peers.available

    @property
    def key(self) -> str:
        return f"{self.function} {self.arguments}"

    def build(self) -> float:
        answer = self.peers.ask("build", key=self.key, module=self.module, name=self.function, arguments=self.arguments)
        return float(answer["seconds"])

    def seconds(self, repeats: int) -> float:
        return float(self.peers.ask("measure", key=self.key, repeats=repeats)["seconds"])

    def mib(self) -> float | None:
        value: float | None = self.peers.ask("memory", key=self.key)["mib"]
        return value


@dataclass
class Bench:
    """Settings of a run, and the rows of a section.

    Attributes:
        rounds: number of turns of each comparison.
        seconds: length of the block of calls that is measured in a turn; one call at least.
        threads: number of threads of every call.
        peers: process of the peers.
        memory: True if peak memory is measured too.
        say: prints a row as soon as it is known.
        rows: rows so far.
        notes: what was left out, and why.
    """

    rounds: int
    seconds: float
    threads: int
    peers: Peers
    memory: bool = True
    say: Callable[[TableRow], None] = lambda row: None
    rows: list[TableRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: TableRow) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        self.say(row)

    def can(self, call: Call) -> bool:
        """Return True if a call can be made, and make a note if not."""
        if not call.available:
            self.notes.append(f"{call.name} is left out, as there is no .venv-peers; `make bench-peers` makes it")
        return call.available

    def compare(self, work: str, ours: Call, others: Sequence[tuple[Call, Target | None]]) -> None:
        """Measure calls turn by turn and add a row for each pair; the first is this package's."""
        others = [(call, target) for call, target in others if self.can(call)]
        calls = [ours, *(call for call, _ in others)]
        turns = self.turns(calls)
        memory = [call.mib() if self.memory else None for call in calls]
        for j, (call, target) in enumerate(others, start=1):
            ratios = [turn[0] / turn[j] for turn in turns]
            low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
            figures = tuple(duration(median(turn[k] for turn in turns)) for k in (0, j))
            self.add(Row(work, ours.name, call.name, figures, median(ratios), low, high, target, (memory[0], memory[j])))

    def turns(self, calls: Sequence[Call]) -> list[list[float]]:
        """Return the seconds of a step of each call, for each turn; the turn before the first is not counted."""
        repeats = [self._block(call) for call in calls]
        turns = [[call.seconds(n) / call.steps for call, n in zip(calls, repeats, strict=True)] for _ in range(self.rounds + 1)]
        return turns[1:]

    def medians(self, calls: Sequence[Call]) -> list[float]:
        """Return the median seconds of calls measured turn by turn."""
        return [median(column) for column in zip(*self.turns(calls), strict=True)]

    def _block(self, call: Call) -> int:
        """Make the first calls, which compile and audit, and return how many fill the time of a block."""
        call.build()
        repeats = 1
        while call.seconds(repeats) * repeats < self.seconds:
            repeats *= 2
        return max(1, round(self.seconds / min(call.seconds(repeats) for _ in range(3))))


def duration(seconds: float) -> str:
    """Return seconds as text, with a unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError("unreachable")


def elapsed(start: float) -> str:
    """Return the minutes since a start, as text."""
    return f"{(time.perf_counter() - start) / 60:.1f} min"
