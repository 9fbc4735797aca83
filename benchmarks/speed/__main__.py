"""Benchmark of speed against Pyro, NumPyro, PyTorch, zuko, nflows, normflows and torchebm: `make bench`.

python -m benchmarks.speed                                  everything, in some 25 minutes on two quiet cores
python -m benchmarks.speed --only flow-eager --only vae     some sections

Calls are measured turn by turn, each for a block of some milliseconds; a row gives the median of both and of their ratio. Peers
with an environment of their own (`make bench-peers`) answer from a second process, which waits while this one measures.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Annotated

import pyro
import torch
import typer

from benchmarks.speed.measure import Bench, Peers, TableRow, elapsed
from benchmarks.speed.report import head, line, write
from benchmarks.speed.sections import SECTIONS


def main(
    *,
    only: Annotated[list[str] | None, typer.Option(help=f"Section; may be given again: {', '.join(SECTIONS)}.")] = None,
    rounds: Annotated[int, typer.Option(help="Turns of each comparison.")] = 30,
    seconds: Annotated[float, typer.Option(help="Length of the block of calls that is measured in a turn.")] = 0.05,
    threads: Annotated[int, typer.Option(help="Threads of every call.")] = 1,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    data_dir: Annotated[Path | None, typer.Option(envvar="PYRO_GENMODELS_DATA", help="Folder that holds posteriordb/.")] = None,
    out: Annotated[Path | None, typer.Option(help="Markdown file whose tables are written anew.")] = None,
) -> None:
    """Measure speed, print a row for each pair, and exit with 1 if a section failed."""
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(
            f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}", param_hint="--only"
        )
    if data_dir is not None:
        os.environ["PYRO_GENMODELS_DATA"] = str(data_dir)
    torch.set_num_threads(threads)
    said: list[tuple[str, ...]] = []

    def say(row: TableRow) -> None:
        """Print a row, and its head if it is another one than before."""
        if said[-1:] != [row.header]:
            said.append(row.header)
            typer.echo(head(row.header))
        typer.echo(line(row.cells()))

    peers, failed = Peers(threads), False
    for name in only or SECTIONS:
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        pyro.enable_validation(True)  # as Pyro has it, until zuko is imported
        start, bench = time.perf_counter(), Bench(rounds, seconds, threads, peers, memory, say)
        try:
            SECTIONS[name](bench)
        except Exception as error:  # the other sections are measured all the same
            failed = True
            typer.echo(traceback.format_exc(), err=True)
            bench.notes.append(f"{name} failed: {type(error).__name__}")
        notes, how = (
            list(dict.fromkeys(bench.notes)),
            f"`--only {name} --rounds {rounds} --threads {threads}`, {elapsed(start)}",
        )
        typer.echo("\n".join([*notes, how]), err=True)
        if out is not None:
            write(out, name, bench.rows, notes, how)
    peers.close()
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
