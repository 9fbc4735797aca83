"""Rows as tables of Markdown, and the part of a file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.speed.measure import TableRow

BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"


def line(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str]) -> str:
    """Return the head of a table."""
    return f"{line(cells)}\n|{'---|' * len(cells)}"


def write(path: Path, rows: Sequence[TableRow], notes: Sequence[str], how: str) -> None:
    """Write tables between the two marks of a file, or at its end if it has none."""
    tables = [
        "\n".join([head(header), *(line(row.cells()) for row in group)])
        for header, group in groupby(rows, key=lambda r: r.header)
    ]
    block = "\n\n".join([BEGIN, f"{how}.", *tables, *(f"{note}." for note in notes), END])
    before, mark, rest = (path.read_text() if path.exists() else "").partition(BEGIN)
    after = rest.partition(END)[2] if mark else "\n"
    path.write_text(f"{before}{block}{after}")
