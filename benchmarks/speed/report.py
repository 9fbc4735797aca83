"""Rows as tables of Markdown, and the part of a file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.speed.measure import TableRow


def line(cells: Sequence[str]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(cells)} |"


def head(cells: Sequence[str]) -> str:
    """Return the head of a table."""
    return f"{line(cells)}\n|{'---|' * len(cells)}"


def write(path: Path, section: str, rows: Sequence[TableRow], notes: Sequence[str], how: str) -> None:
    """Write the tables of a section between its marks in a file, or at the end of a file that has no such marks."""
    begin, end = f"<!-- speed, {section}: begin -->", f"<!-- speed, {section}: end -->"
    groups = groupby(rows, key=lambda row: row.header)
    tables = ["\n".join([head(header), *(line(row.cells()) for row in group)]) for header, group in groups]
    block = "\n\n".join([begin, *tables, *(f"{note}." for note in notes), f"{how}.", end])
    before, mark, rest = (path.read_text() if path.exists() else "").partition(begin)
    after = rest.partition(end)[2] if mark else "\n"
    path.write_text(f"{before}{block}{after}")
