"""Benchmarks of autoregressive models: python benchmarks/autoregressive.py draws

Each command prints rows for RESULTS.md.
"""

from __future__ import annotations

import time
from typing import Annotated

import pyro
import torch
import typer

from pyro_genmodels import Autoregressive, BernoulliLikelihood
from pyro_genmodels.families import Transformer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def root(threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2) -> None:
    """Run benchmarks of autoregressive models."""
    torch.set_num_threads(threads)


@app.command()
def draws(
    events: int = 64,
    side: int = 28,
    layers: int = 4,
    width: int = 128,
    every: Annotated[int, typer.Option(help="Steps without a cache: each of these, as a sample of all.")] = 28,
) -> None:
    """Time samples of a transformer with cached keys and values, and without: a pass over all coordinates so far for each.

    Both take turns in one run and see the same uniform numbers. Without a cache, the time of a step depends on the number of
    coordinates so far alone, so that all steps take `every` times as long as those at the middle of each `every` steps.
    """
    pyro.set_rng_seed(0)
    family = Autoregressive((side, side), likelihood=BernoulliLikelihood(), network=Transformer(layers, width)).eval()
    network, d, shape = family.conditionals, side * side, torch.Size([events])
    uniform, features = torch.rand(events, d), torch.zeros(events, d, 1)
    cached, plain = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    compared, different, error = 0, 0, 0.0
    with torch.no_grad():
        start = clocks()
        steps = network.steps(shape, None, family.order)
        params = next(steps)
        for place in range(d):
            x = (uniform[:, place, None] < params.sigmoid()).float()
            cached += clocks() - start
            if place % every == every // 2:
                start = clocks()
                again = network(features[:, : place + 1], None, family.order[: place + 1])[:, -1]
                y = (uniform[:, place, None] < again.sigmoid()).float()
                plain += clocks() - start
                compared, different = compared + events, different + int((x != y).sum())
                error = max(error, float((params - again).abs().max()))
            features[:, place] = family.likelihood.encode(x.squeeze(-1))
            start = clocks()
            params = steps.send(features[:, place]) if place < d - 1 else params
    plain *= d * events / compared
    print("| samples | coordinates | clock | with a cache, s | without, s | ratio | compared | different | error of logits |")
    print("|---" * 9 + "|")
    for name, one, other in zip(("wall", "CPU"), cached.tolist(), plain.tolist(), strict=True):
        times = f"{name} | {one:.1f} | {other:.0f} | {other / one:.0f}"
        print(f"| {events} | {d} | {times} | {compared} | {different} | {error:.1g} |")


def clocks() -> torch.Tensor:
    """Return the seconds of the wall clock and those of this process on all cores."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


if __name__ == "__main__":
    app()
