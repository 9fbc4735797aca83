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
    cached = plain = 0.0
    compared, different, error = 0, 0, 0.0
    with torch.no_grad():
        start = time.perf_counter()
        steps = network.steps(shape, None, family.order)
        params = next(steps)
        for place in range(d):
            x = (uniform[:, place, None] < params.sigmoid()).float()
            cached += time.perf_counter() - start
            if place % every == every // 2:
                start = time.perf_counter()
                again = network(features[:, : place + 1], None, family.order[: place + 1])[:, -1]
                y = (uniform[:, place, None] < again.sigmoid()).float()
                plain += time.perf_counter() - start
                compared, different = compared + events, different + int((x != y).sum())
                error = max(error, float((params - again).abs().max()))
            features[:, place] = family.likelihood.encode(x.squeeze(-1))
            start = time.perf_counter()
            params = steps.send(features[:, place]) if place < d - 1 else params
    plain *= d / (compared / events)
    print("| samples | coordinates | with a cache, s | without, s | ratio | values compared | different | error of logits |")
    print("|---" * 8 + "|")
    print(
        f"| {events} | {d} | {cached:.1f} | {plain:.0f} | {plain / cached:.0f} | {compared} | {different} | {error:.1g} |"
    )


if __name__ == "__main__":
    app()
