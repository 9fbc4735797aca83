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

from benchmarks.speed.measure import Bench, Peers, SkippedError, TableRow, elapsed
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
    out: Annotated[Path | None, typer.Option(help="Markdown file whose part on speed is written anew.")] = None,
) -> None:
    """Measure speed, print a row for each pair, and exit with 1 if a section failed."""
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(
            f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}", param_hint="--only"
        )
    if data_dir is not None:
        os.environ["PYRO_GENMODELS_DATA"] = str(data_dir)
    torch.set_num_threads(threads)
    start, rows, notes = time.perf_counter(), [], []
    said: list[tuple[str, ...]] = []

    def say(row: TableRow) -> None:
        """Print a row, and its head if it is another one than before."""
        if said[-1:] != [row.header]:
            said.append(row.header)
            typer.echo(head(row.header))
        typer.echo(line(row.cells()))

    bench = Bench(rounds, seconds, threads, Peers(threads), say, memory)
    failed = False
    for name in only or SECTIONS:
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        try:
            rows += SECTIONS[name](bench)
        except SkippedError as reason:
            notes.append(f"{name} skipped: {reason}")
        except Exception as error:
            failed = True
            notes.append(f"{name} failed: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}")
            typer.echo(traceback.format_exc(), err=True)
        typer.echo(f"{notes[-1] if notes and notes[-1].startswith(name) else name} after {elapsed(start)}", err=True)
    bench.peers.close()
    if out is not None:
        write(out, rows, notes, f"`python -m benchmarks.speed --rounds {rounds} --threads {threads}`, {elapsed(start)}")
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
