"""Benchmark on a GPU: every family trains, draws, scores, saves and resumes; its speed against the CPU and plain PyTorch.

python -m benchmarks.gpu                        all parts, in less than 10 minutes on one GPU
python -m benchmarks.gpu --only speed captured  some of them
python -m benchmarks.gpu --device cpu --quick   the whole script on a CPU, with small networks, in about a minute

It prints the tables of benchmarks/RESULTS.md. A row that fails prints its error, and the next one follows.

- families: small networks of each family, trained, drawn from, scored, saved, and resumed from the file.
- speed: steps per second of `train` on the device and on the CPU of the same machine, and of a loop in plain PyTorch with the
  same networks, loss and batches (`benchmarks/gpu_loops.py`); the peak of the device's memory; the same in bfloat16.
- captured: programs as CUDA graphs, against stock Pyro and PyTorch on the same GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
import zuko
from pyro.infer import SVI

from benchmarks.gpu_loops import Work, works
from benchmarks.speed import programs
from benchmarks.speed.rows import adam
from pyro_genmodels import GAN, NSF, Flow, MaximumLikelihood, log_likelihood, train
from pyro_genmodels.divergences import sliced_wasserstein
from pyro_genmodels.infer.compiled import CapturedLoss, Compiled, CompiledSVI, Eager
from pyro_genmodels.training import Checkpoint, checkpoints

SECONDS = 0.1
ROUNDS = 7
LIMIT = 570.0
"""Seconds after which no further row is begun."""
Step = Callable[[], object]


class Bench:
    """The device, the sizes, and the time that is left.

    Args:
        device: device that is measured.
        quick: True for small networks and few steps.
    """

    def __init__(self, device: str, *, quick: bool) -> None:
        self.device, self.quick, self.start = torch.device(device), quick, time.perf_counter()
        self.seconds, self.steps = (0.2, 2) if quick else (2.0, 40)

    def rows(self, jobs: Sequence[tuple[str, Callable[[], object]]]) -> None:
        """Run the jobs of a table, and go on after those that fail."""
        for name, job in jobs:
            if time.perf_counter() - self.start > LIMIT:
                print(f"{name}: not run, for lack of time", flush=True)
                continue
            try:
                job()
            except Exception:
                print(f"{name}: failed", flush=True)
                traceback.print_exc(file=sys.stdout)


# Every family does everything.


def families(bench: Bench) -> None:
    """Train, draw, score, save and resume each family."""
    print("\n| family | trains: loss of the first and last epoch | draws | scores | resumes at epoch | s |")
    print("|---|---|---|---|---|---|")
    bench.rows([(work.name, lambda work=work: do_everything(bench, work)) for work in works(quick=True)])  # type: ignore[misc]


def do_everything(bench: Bench, work: Work) -> None:
    """Print a row, after checks that nothing left the device and nothing was lost."""
    begun = time.perf_counter()
    pyro.set_rng_seed(0)
    family, x = work.build().to(bench.device), work.data(4 * work.batch)
    options: dict[str, Any] = {"objective": work.objective(), "batch_size": work.batch, "progress": False, "seed": 0}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        train(family, x, epochs=2, checkpoint=path, **options)
        resumed = train(work.build().to(bench.device), x, epochs=4, checkpoint=Checkpoint(path, resume=True), **options)
        loaded = checkpoints.load(path)
    if [record["epoch"] for record in resumed.history] != [1, 2, 3, 4]:
        raise AssertionError(f"a run was resumed with the history {resumed.history}")
    family = resumed.family
    for name, tensor in family.state_dict().items():
        if tensor.device.type != bench.device.type:
            raise AssertionError(f"{name} is on {tensor.device}")
        torch.testing.assert_close(loaded.state_dict()[name].cpu(), tensor.cpu())
    draws = family().sample((100,))
    if draws.device.type != bench.device.type or not draws.isfinite().all():
        raise AssertionError(f"the draws are on {draws.device}, and {int((~draws.isfinite()).sum())} numbers are not finite")
    value = score(family, x[:100].to(bench.device), draws)
    first, last = (resumed.history[i]["train"] for i in (0, -1))
    seconds = time.perf_counter() - begun
    print(f"| {work.name} | {first:.3f}, {last:.3f} | {tuple(draws.shape)} | {value} | 3 | {seconds:.1f} |", flush=True)


def score(family: Any, x: torch.Tensor, draws: torch.Tensor) -> str:
    """Return the mean log-likelihood of data with its kind, or the distance of draws from them for a GAN."""
    if isinstance(family, GAN):
        return f"distance {sliced_wasserstein(x, draws, seed=0).value.item():.2f}"
    found = log_likelihood(family, x, num_samples=20)
    return f"{found.values.mean().item():.2f} nats ({found.kind})"


# Steps per second.


def speed(bench: Bench) -> None:
    """Compare the steps of `train` with those of a loop in plain PyTorch, of the CPU, and in bfloat16."""
    print(
        "\n| family, rows of a step | `train`, steps/s | plain PyTorch, steps/s | ratio | peak MiB, both | CPU, steps/s "
        "| bfloat16, steps/s | its peak MiB | its loss / that of float32 |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    bench.rows([(work.name, lambda work=work: speed_row(bench, work)) for work in works(quick=bench.quick)])  # type: ignore[misc]


def speed_row(bench: Bench, work: Work) -> None:
    """Print a row. A cell that fails says so, and its error comes first."""
    device = bench.device
    ours = attempted(lambda: rate_of_train(bench, work, device))
    plain = attempted(lambda: rate_by_hand(bench, work, device))
    low = attempted(lambda: rate_of_train(bench, work, device, autocast=True))
    cpu = ours if device.type == "cpu" else attempted(lambda: rate_of_train(bench, work, torch.device("cpu")))
    ratio = f"{ours[0] / plain[0]:.2f}" if ours and plain else ""
    relative = f"{low[2] / ours[2]:.4f}" if ours and low else ""
    cells = [
        f"{work.name}, {work.batch}",
        rate(ours), rate(plain), ratio, f"{memory(ours)}, {memory(plain)}", rate(cpu), rate(low), memory(low), relative,
    ]  # fmt: skip
    print(f"| {' | '.join(cells)} |", flush=True)


Measured = tuple[float, float | None, float]
"""Steps per second, peak MiB of the device's memory, and the loss of the first epoch."""


def attempted(measure: Callable[[], Measured]) -> Measured | None:
    """Return what a function measures, or None with its error printed."""
    try:
        return measure()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rate(found: Measured | None) -> str:
    return "failed" if found is None else f"{found[0]:.3g}"


def memory(found: Measured | None) -> str:
    return "failed" if found is None else "-" if found[1] is None else f"{found[1]:.0f}"


def rate_of_train(bench: Bench, work: Work, device: torch.device, *, autocast: bool = False) -> Measured:
    """Measure eager steps of `train`, after an epoch in which memory is reserved and kernels are chosen."""
    steps = bench.steps if device.type == "cuda" else 2
    pyro.set_rng_seed(0)
    family, x = work.build().to(device), work.data(steps * work.batch).to(device)
    options: dict[str, Any] = {"objective": work.objective(), "batch_size": work.batch, "ema_decay": None, "progress": False}
    block: AbstractContextManager[Any] = torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext()
    with block:
        first = train(family, x, epochs=1, mode=Eager(), seed=0, **options).history[0]["train"]
        reset_peak(device)
        history = train(family, x, epochs=10**6, mode=Eager(), max_seconds=bench.seconds, **options).history
    elapsed = history[-1]["seconds"]  # in all epochs
    return steps * len(history) / elapsed, peak(device), first


def rate_by_hand(bench: Bench, work: Work, device: torch.device) -> Measured:
    """Measure the loop in plain PyTorch in the same way."""
    steps = bench.steps if device.type == "cuda" else 2
    pyro.set_rng_seed(0)
    family, x = work.build().to(device), work.data(steps * work.batch).to(device)
    family.prepare(x)
    loop = work.by_hand(family.train())

    def epoch() -> float:
        batches = torch.randperm(len(x), device=device).split(work.batch)
        return sum(loop.step(x[rows]) for rows in batches) / len(batches)

    first = epoch()
    reset_peak(device)
    begun, epochs = time.perf_counter(), 0
    while time.perf_counter() - begun < bench.seconds:
        epoch()
        epochs += 1
    return steps * epochs / (time.perf_counter() - begun), peak(device), first


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float | None:
    """Return the most memory of the device in MiB since `reset_peak`, or None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None


# Programs as graphs.


def captured(bench: Bench) -> None:
    """Compare captured programs with stock ones."""
    if bench.device.type != "cuda":
        print("\ncaptured: not run, since CUDA graphs need a GPU")
        return
    torch.set_default_device("cuda")
    try:
        print("\n| work | ours | other | ratio |\n|---|---|---|---|")
        bench.rows(list(captured_jobs()))
    finally:
        torch.set_default_device(None)


def captured_jobs() -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the names and functions of the rows."""
    for name in NAMES:
        yield name, lambda name=name: svi_rows(name, lambda: on_gpu(programs.with_normal_guide(name)))  # type: ignore[misc]
    yield "flow", flow
    for n in (32, 256):
        yield f"VAE {n}", lambda n=n: svi_rows(f"VAE, batch {n}", lambda: on_gpu(programs.vae(n)))  # type: ignore[misc]


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


NAMES = ("eight schools", "hierarchical", "logistic")


def on_gpu(program: programs.Program) -> programs.Program:
    """Return a program with its arguments on the GPU."""
    return programs.Program(program.model, program.guide, program.loss, tuple(x.cuda() for x in program.args))


PARTS: dict[str, Callable[[Bench], None]] = {"families": families, "speed": speed, "captured": captured}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--device", default="cuda", help="device to measure; cuda by default")
    parser.add_argument("--quick", action="store_true", help="small networks and few steps")
    arguments = parser.parse_args(argv)
    bench = Bench(arguments.device, quick=arguments.quick)
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    print(f"{name}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads on the CPU", flush=True)
    for part in arguments.only:
        begun = time.perf_counter()
        bench.rows([(part, lambda part=part: PARTS[part](bench))])
        print(f"\n{part}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
