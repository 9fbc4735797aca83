"""Rows as Markdown, and the part of a file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.speed.measure import Row

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
HEADER = """| work | ours | other | time of ours | time of the other | ratio (quartiles) | target | peak MiB, ours / other |
|---|---|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    """Return a row of the table."""
    target = "" if row.target is None else f"{row.target}, {'met' if row.target.met(row.ratio) else 'missed'}"
    memory = " / ".join("-" if mib is None else f"{mib:.1f}" for mib in row.memory)
    ratio = f"{row.ratio:.3g} ({row.low:.3g} to {row.high:.3g})"
    cells = (row.work, row.ours, row.theirs, *row.figures, ratio, target, memory)
    return f"| {' | '.join(cells)} |"


def write(path: Path, rows: Sequence[Row], notes: Sequence[str], how: str) -> None:
    """Write the table between the two marks of a file, or at its end if it has none."""
    text = path.read_text() if path.exists() else ""
    block = "\n".join([BEGIN, how + ".", "", HEADER, *map(line, rows), *(f"\n{note}." for note in notes), END])
    before, mark, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if mark else "\n"
    path.write_text(f"{before}{block}{after}")
