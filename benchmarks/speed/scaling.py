"""The cost of a step against the size of a problem: slopes of log seconds against log size, and the time of compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from benchmarks.speed import programs
from benchmarks.speed.measure import Bench, duration
from benchmarks.speed.programs import Program
from benchmarks.speed.rows import compiled, stock

SIZES: dict[str, tuple[tuple[int, ...], Callable[[int], Program]]] = {
    "rows of a logistic regression": ((100, 1_000, 10_000, 100_000), lambda n: programs.logistic_of(n, 20)),
    "columns of a logistic regression": ((10, 100, 1_000), lambda d: programs.logistic_of(1_000, d)),
    "latent sites": ((2, 8, 32), programs.chain_of_sites),
    "levels of nested plates": ((1, 2, 4, 8), programs.nested_plates),
}


@dataclass(frozen=True)
class Slope:
    """Seconds of one kind of call at several sizes.

    Attributes:
        size: what grows.
        sizes: its values.
        call: name of the call.
        seconds: seconds of a call at each size.
    """

    size: str
    sizes: tuple[int, ...]
    call: str
    seconds: tuple[float, ...]

    header: ClassVar[tuple[str, ...]] = ("cost against", "sizes", "of", "it takes", "slope of log against log")

    def cells(self) -> tuple[str, ...]:
        slope = np.polyfit(np.log(self.sizes), np.log(self.seconds), 1)[0]
        sizes = ", ".join(f"{n:,}" for n in self.sizes)
        return (self.size, sizes, self.call, ", ".join(map(duration, self.seconds)), f"{slope:.2f}")


def scaling(bench: Bench) -> None:
    """Measure steps of growing problems."""
    for size, (sizes, make) in SIZES.items():
        found: dict[str, list[float]] = {"CompiledSVI.step": [], "stock SVI": [], "its first steps, which compile": []}
        for n in sizes:
            ours, theirs = compiled(make(n)), stock(make(n))
            found["its first steps, which compile"].append(ours.build())
            pairs = bench.medians([ours, theirs])
            found[ours.name].append(pairs[0])
            found[theirs.name].append(pairs[1])
        for name, seconds in found.items():
            bench.add(Slope(size, sizes, name, tuple(seconds)))
