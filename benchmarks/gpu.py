"""Benchmark of captured programs on a GPU, with CUDA graphs, against stock Pyro and PyTorch on the same GPU.

python -m benchmarks.gpu
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from statistics import median

import pyro
import torch
import zuko
from pyro.infer import SVI

from benchmarks.speed import programs
from benchmarks.speed.rows import adam
from pyro_genmodels import NSF, Flow, MaximumLikelihood
from pyro_genmodels.infer.compiled import CapturedLoss, Compiled, CompiledSVI

SECONDS = 0.1
ROUNDS = 7
Step = Callable[[], object]


def seconds_per_call(step: Step) -> float:
    """Return the seconds of a call, of as many as fit into a turn."""
    torch.cuda.synchronize()
    start, calls = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step()
        calls += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def compare(name: str, ours: Step, other: Step) -> None:
    """Print a row: microseconds of both, and the median of their ratio; they alternate."""
    for step in (ours, other):
        for _ in range(3):
            step()
    turns = [(seconds_per_call(ours), seconds_per_call(other)) for _ in range(ROUNDS)]
    a, b, ratio = median(t[0] for t in turns), median(t[1] for t in turns), median(t[0] / t[1] for t in turns)
    print(f"| {name} | {1e6 * a:.0f} us | {1e6 * b:.0f} us | {ratio:.3f} |", flush=True)


def svi_rows(name: str, make: Callable[[], programs.Program]) -> None:
    """Compare a step, and a step of a run, with stock SVI."""
    program, other = make(), make()
    stock = SVI(other.model, other.guide, adam(), other.loss)
    for label, mode in (("CUDA graph", Compiled()), ("no CUDA graph", Compiled(cuda_graphs=False))):
        svi = CompiledSVI(program.model, program.guide, adam(), program.loss, mode=mode)
        svi.step(*program.args)
        start = time.perf_counter()
        svi.step(*program.args)
        print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
        compare(f"{name}, step, {label}", lambda: svi.step(*program.args), lambda: stock.step(*other.args))  # noqa: B023


def flow() -> None:
    """Compare loss and gradients of an NSF with zuko's."""
    x = torch.randn(512, 8)
    family = Flow((8,), transform=NSF(transforms=5))
    captured = CapturedLoss(family.model, family.guide, MaximumLikelihood(), mode=Compiled())
    theirs = zuko.flows.NSF(8, transforms=5, hidden_features=(128, 128))
    compare("NSF, batch 512", lambda: captured(x), lambda: (-theirs().log_prob(x).sum()).backward())


def main() -> None:
    torch.set_default_device("cuda")
    pyro.set_rng_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    print("| work | ours | other | ratio |\n|---|---|---|---|")
    jobs: list[tuple[str, Callable[[], None]]] = [
        *((name, lambda name=name: svi_rows(name, lambda: on_gpu(programs.with_normal_guide(name)))) for name in NAMES),
        ("flow", flow),
        *((f"VAE {n}", lambda n=n: svi_rows(f"VAE, batch {n}", lambda: on_gpu(programs.vae(n)))) for n in (32, 256)),
    ]
    for name, job in jobs:
        try:
            job()
        except Exception:
            print(f"{name} failed:")
            traceback.print_exc()


NAMES = ("eight schools", "hierarchical", "logistic")


def on_gpu(program: programs.Program) -> programs.Program:
    """Return a program with its arguments on the GPU."""
    return programs.Program(program.model, program.guide, program.loss, tuple(x.cuda() for x in program.args))


if __name__ == "__main__":
    main()
