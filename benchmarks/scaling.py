"""How costs grow: operations, memory, network evaluations and bytes sent, against dimension, rows, width, steps and devices.

python -m benchmarks.scaling                  all tables of docs/scaling.md, in about ten minutes on one core
python -m benchmarks.scaling --only memory    one of them

A slope is that of the logarithm of a cost against the logarithm of a size, by least squares over all sizes, with its standard
error: 1 is proportional, 2 is quadratic, 0 is constant. "Last" is the slope between the two largest sizes, where fixed costs
count least. Operations are those of matrix products, convolutions and attention, by the formulas of `torch.utils.flop_counter`
(a multiplication and an addition are two). Kept bytes are those of the tensors that autograd keeps for the gradient. Times are
CPU time of this process (`time.process_time`), which a busy machine changes less than the time on the clock.
"""

from __future__ import annotations

import argparse
import gc
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from pyro_genmodels import (
    GAN,
    MAF,
    NSF,
    VAE,
    Autoregressive,
    ContrastiveDivergence,
    DenoisingScoreMatching,
    DenseCritic,
    DenseEnergy,
    DenseField,
    DenseGenerator,
    Diffusion,
    EnergyModel,
    Flow,
    FlowMatching,
    MaximumLikelihood,
    ODEFlow,
    RealNVP,
    log_likelihood,
    train,
)
from pyro_genmodels.families import RK4, Dopri5, DPMSolver, Family, FlowDensity, Hutchinson, Persistent, Transformer
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.compiled import Eager

ROWS = 32
"""Rows of a batch where something else grows."""


# Slopes and tables.


def slope(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float, float]:
    """Return the slope of log costs against log sizes, its standard error, and the slope between the last two sizes.

    Example:
        >>> slope([1, 2, 4], [3, 6, 12])
        (1.0, 0.0, 1.0)
    """
    x, y = np.log(sizes), np.log(costs)
    x, y = x - x.mean(), y - y.mean()
    found = (x * y).sum() / (x * x).sum()
    rest = y - found * x
    error = (rest @ rest / max(len(x) - 2, 1) / (x @ x)) ** 0.5
    return round(float(found), 3), round(float(error), 3), round(float((y[-1] - y[-2]) / (x[-1] - x[-2])), 3)


def table(header: Sequence[str]) -> None:
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)


def row(name: str, sizes: Sequence[float], costs: Sequence[float], form: Callable[[float], str]) -> None:
    """Print the costs at each size, and their slope."""
    found, error, last = slope(sizes, costs)
    print(f"| {name} | {', '.join(map(form, costs))} | {found:.2f} ± {error:.2f} | {last:.2f} |", flush=True)


def short(value: float) -> str:
    """Return a number with three digits and a unit of thousands.

    Example:
        >>> short(1234567.0), short(12.0)
        ('1.23 M', '12')
    """
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


# What is measured.


FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q.shape, k.shape, v.shape)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(out.shape, q.shape, k.shape, v.shape)
    ),
}
"""Torch's formulas for the operations of its functions, and those of attention on a CPU, which it lacks."""


class Operations(TorchDispatchMode):
    """A count of the operations in a `with` block. Torch's `FlopCounterMode` cannot count gradient penalties."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def operations(call: Callable[[], object]) -> int:
    """Return the operations of a call in matrix products, convolutions and attention."""
    with Operations() as counter:
        call()
    return counter.total


class Ledger:
    """The bytes of the storages that autograd keeps, each counted once while anything refers to it, and their peak."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.held = self.peak = 0

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.holders[storage.data_ptr()] = self.holders.get(storage.data_ptr(), 0) + 1
        if self.holders[storage.data_ptr()] == 1:
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)

    def remove(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.holders[storage.data_ptr()] -= 1
        if not self.holders[storage.data_ptr()]:
            self.held -= storage.nbytes()


class Kept:
    """A tensor that autograd keeps, entered in a ledger until autograd lets it go."""

    def __init__(self, tensor: Tensor, ledger: Ledger) -> None:
        self.tensor, self.ledger = tensor.detach(), ledger  # detached, so that its graph does not hold itself
        ledger.add(tensor)

    def __del__(self) -> None:
        self.ledger.remove(self.tensor)


def kept_bytes(call: Callable[[], object]) -> int:
    """Return the largest number of bytes that autograd keeps at once during a call, parameters aside."""
    ledger = Ledger()

    def pack(tensor: Tensor) -> Tensor | Kept:
        return tensor if isinstance(tensor, nn.Parameter) else Kept(tensor, ledger)

    with saved_tensors_hooks(pack, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        call()
    return ledger.peak


def cpu_seconds(call: Callable[[], object], least: float = 0.06) -> float:
    """Return the CPU time of a call after a first one: the median of three blocks of calls, or of one call if it is long."""
    call()
    blocks = []
    for _ in range(3):
        start, count = time.process_time(), 0
        while time.process_time() - start < least / 3:
            call()
            count += 1
        blocks.append((time.process_time() - start) / count)
        if blocks[0] > 1:
            break
    return float(np.median(blocks))


class Evaluations:
    """A count of the calls of a network inside a `with` block."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.count = network, 0

    def __enter__(self) -> Evaluations:
        self._hook = self.network.register_forward_hook(self._note)
        return self

    def _note(self, *_: Any) -> None:
        self.count += 1

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()


def live_bytes() -> int:
    """Return the bytes of all tensors that Python holds, each storage counted once."""
    gc.collect()
    found = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]  # isinstance would ask the objects themselves
    grads = [t.grad for t in found if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*found, *grads)}
    return sum(storages.values())


# Families.


@dataclass(frozen=True)
class Kind:
    """A family and its training.

    Attributes:
        name: family and network.
        build: function of the dimension and the width of the network.
        objective: function that makes the loss; None for an adversarial one.
    """

    name: str
    build: Callable[[int, int], Family]
    objective: Callable[[], ELBO] | None

    def ready(self, d: int, width: int = 256) -> Family:
        """Return a family of that size in evaluation mode, whose data are standardised and whose chains have begun."""
        pyro.set_rng_seed(0)
        family = self.build(d, width)
        family.standardize(data(256, d))
        return started(family).eval() if isinstance(family, EnergyModel) else family.eval()

    def step(self, family: Family, x: Tensor) -> Callable[[], object]:
        """Return a function that computes the loss of a batch and its gradient, for a GAN those of both networks."""
        family.train()
        if self.objective is None:
            trainer = Adversarial(family.model, family.critic, mode=Eager())
            trainer.prepare(x)
            return lambda: trainer.step(x)
        objective = self.objective()
        return lambda: objective.loss_and_grads(family.model, family.guide, x)


def started(family: EnergyModel) -> EnergyModel:
    """Return an energy whose buffer holds chains, as in training."""
    ContrastiveDivergence().loss_and_grads(family.model, family.guide, data(ROWS, family.event_shape.numel()))
    return family


def data(rows: int, d: int) -> Tensor:
    """Return rows of correlated coordinates, (rows, d)."""
    x = torch.randn(rows, d)
    return 1 + 2 * x + x.roll(1, -1)


def energy(d: int, width: int) -> EnergyModel:
    return EnergyModel((d,), energy=DenseEnergy((width, width)), negatives=Persistent(ROWS, steps=10), num_steps=50)


def ode(d: int, width: int) -> ODEFlow:
    return ODEFlow((d,), network=DenseField(width), solver=RK4(5), trace=Hutchinson())


def diffusion(d: int, width: int) -> Diffusion:
    return Diffusion((d,), network=DenseField(width), sampler=DPMSolver(20), likelihood=FlowDensity(RK4(5), Hutchinson()))


def gan(d: int, width: int) -> GAN:
    return GAN((d,), generator=DenseGenerator((width,) * 3), critic=DenseCritic((width,) * 3))


KINDS = [
    Kind("Autoregressive (MADE)", lambda d, w: Autoregressive((d,), hidden=(w, w)), MaximumLikelihood),
    Kind("Flow (NSF, 3 autoregressive layers)", lambda d, w: Flow((d,), transform=NSF(3, hidden=(w, w))), MaximumLikelihood),
    Kind("Flow (RealNVP, 4 coupling layers)", lambda d, w: Flow((d,), transform=RealNVP(4, hidden=(w, w))), MaximumLikelihood),
    Kind("ODEFlow (RK4, 5 steps, 1 probe)", ode, FlowMatching),
    Kind("VAE", lambda d, w: VAE((d,), hidden=(w, w)), Trace_ELBO),
    Kind("EnergyModel (10 steps of chains)", energy, ContrastiveDivergence),
    Kind("Diffusion (20 steps; RK4, 5 steps)", diffusion, DenoisingScoreMatching),
    Kind("GAN (R3GAN)", gan, None),
]


def calls(kind: Kind, family: Family, x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a training step, a log density and a draw of as many rows as x has; a VAE and a GAN have no density."""
    yield "step", kind.step(family, x)
    family.eval()
    if kind.name.split()[0] not in ("VAE", "GAN"):
        yield "log_prob", without_gradients(lambda: family().log_prob(x))
    yield "sample", without_gradients(lambda: family().sample((len(x),)))


def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


# The tables.


def dimension() -> None:
    """Print operations of each row against the number of coordinates."""
    n = 2  # rows
    against_dimension("operations for each row", (4, 16, 64, 256), n, lambda call: operations(call) / n, short)


def times() -> None:
    """Print CPU time against the number of coordinates."""
    against_dimension(f"CPU time, {ROWS} rows", (4, 16, 64, 256), ROWS, cpu_seconds, milliseconds)


def against_dimension(
    title: str, sizes: Sequence[int], n: int, measure: Callable[[Callable[[], object]], float], form: Callable[[float], str]
) -> None:
    """Print a measure of the steps, log densities and draws of all families against the number of coordinates."""
    table((f"{title}, at {', '.join(map(str, sizes))} coordinates", "cost", "slope", "last"))
    for kind in KINDS:
        found: dict[str, list[float]] = {}
        for d in sizes:
            for name, call in calls(kind, kind.ready(d), data(n, d)):
                found.setdefault(name, []).append(measure(call))
        for name, costs in found.items():
            row(f"{kind.name}: {name}", sizes, costs, form)


def rows() -> None:
    """Print CPU time and kept bytes of a training step against the rows of a batch."""
    sizes = (16, 128, 1024, 4096)
    for title, measure, form in (
        ("CPU time of a step", cpu_seconds, milliseconds),
        ("bytes kept for the gradient", kept_bytes, short),
    ):
        table((f"{title}, 16 coordinates, at {', '.join(map(str, sizes))} rows", "cost", "slope", "last"))
        for kind in KINDS:
            family = kind.ready(16)
            row(kind.name, sizes, [measure(kind.step(family, data(n, 16))) for n in sizes], form)


def width() -> None:
    """Print parameters and operations of a training step against the width of the networks."""
    sizes = (64, 128, 256, 512)
    table((f"16 coordinates, at width {', '.join(map(str, sizes))}", "cost", "slope", "last"))
    for kind in KINDS:
        families = [kind.ready(16, w) for w in sizes]
        row(f"{kind.name}: parameters", sizes, [sum(p.numel() for p in f.parameters()) for f in families], short)
        row(f"{kind.name}: operations", sizes, [operations(kind.step(f, data(ROWS, 16))) / ROWS for f in families], short)


def steps() -> None:
    """Print evaluations of the network against the steps of solvers, samplers and chains, or their tolerance."""
    sizes: Sequence[float] = (5, 10, 20, 40, 80)
    table((f"evaluations of the network, at {', '.join(map(str, sizes))} steps", "cost", "slope", "last"))
    x, d = data(ROWS, 8), 8
    made: Mapping[str, Callable[[int], tuple[Family, str]]] = {
        "ODEFlow, RK4: log_prob": lambda n: (ODEFlow((d,), solver=RK4(n)), "log_prob"),
        "ODEFlow, RK4: sample": lambda n: (ODEFlow((d,), solver=RK4(n)), "sample"),
        "Diffusion, DPMSolver: sample": lambda n: (Diffusion((d,), sampler=DPMSolver(n)), "sample"),
        "EnergyModel, annealed chains: sample": lambda n: (EnergyModel((d,), num_steps=n), "sample"),
        "EnergyModel, chains of its buffer: sample": lambda n: (
            started(EnergyModel((d,), num_steps=n, negatives=Persistent(ROWS, steps=1))),
            "sample",
        ),
    }
    for name, make in made.items():
        counts = []
        for n in sizes:
            pyro.set_rng_seed(0)
            family, method = make(int(n))
            family.standardize(data(256, d))
            network = family.energy if isinstance(family, EnergyModel) else family.network
            family.eval()
            with torch.no_grad(), Evaluations(network) as evaluations:
                _ = family().log_prob(x) if method == "log_prob" else family().sample((ROWS,))
            counts.append(float(evaluations.count))
        row(name, sizes, counts, short)


def tolerance() -> None:
    """Print evaluations of the network of an ODE against the tolerance of an adaptive solver."""
    sizes = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    header = f"evaluations of a trained flow's network, at tolerances {', '.join(f'{s:g}' for s in sizes)}"
    table((header, "cost", "slope", "last"))
    trained = two_moons_flow()
    counts = []
    for size in sizes:
        trained.solver = Dopri5(rtol=size, atol=size)
        with torch.no_grad():
            trained().log_prob(data(ROWS, 2))
        counts.append(float(trained.evaluations.last))
    row("ODEFlow, Dopri5: log_prob, against 1 / tolerance", [1 / s for s in sizes], counts, short)


def adjoint() -> None:
    """Print the bytes kept for the gradient of an ODE's density against its steps, with and without the adjoint equation."""
    numbers, x = (2, 4, 8, 16, 32), data(ROWS, 8)
    at = ", ".join(map(str, numbers))
    table((f"bytes kept for the gradient of log_prob, {ROWS} rows, at {at} steps", "cost", "slope", "last"))
    for adjoint in (False, True):
        family = ODEFlow((8,))
        costs = []
        for n in numbers:
            family.solver = RK4(n, adjoint=adjoint)
            costs.append(kept_bytes(lambda: family().log_prob(x).sum()))  # noqa: B023
        row(f"ODEFlow, RK4{', adjoint' if adjoint else ''}", numbers, costs, short)


def two_moons_flow() -> ODEFlow:
    """Return a flow of two coordinates that was trained by flow matching for a moment, so that its paths bend."""
    pyro.set_rng_seed(0)
    flow = ODEFlow((2,))
    angle = torch.pi * torch.rand(512)
    sign = torch.randint(2, (512,)) * 2.0 - 1
    x = torch.stack([angle.cos() + (sign - 1) / 2, sign * angle.sin() + (1 - sign) / 4], -1)
    train(flow, x + 0.05 * torch.randn(512, 2), objective=FlowMatching(), epochs=60, seed=0, progress=False, mode=Eager())
    return flow


def length() -> None:
    """Print operations of a draw from autoregressive models against the length, with and without a cached state."""
    sizes = (16, 64, 256, 512)
    table((f"operations of a draw, at lengths {', '.join(map(str, sizes))}", "cost", "slope", "last"))
    networks: Mapping[str, Mapping[str, Any]] = {
        "MADE 2 x 256": {},
        "Transformer 2 x 64": {"network": Transformer(layers=2, width=64, heads=4)},
    }
    for name, options in networks.items():
        drawn, naive = [], []
        for d in sizes:
            family = Autoregressive((d,), **options).eval()
            x = data(1, d)
            drawn.append(operations(without_gradients(lambda: family().sample((1,)))))  # noqa: B023
            naive.append(d * operations(without_gradients(lambda: family().log_prob(x))))  # noqa: B023
        row(f"{name}, cached state", sizes, drawn, short)
        row(f"{name}, a density for each coordinate, as without a cache", sizes, naive, short)


NOTED_STEPS = (9, 39)
"""Steps after which memory is noted; there are four in an epoch."""


class CountedAdam(torch.optim.Adam):
    """Adam that notes the bytes of all tensors that Python holds after some of its steps, before gradients are freed."""

    noted: list[int] = []  # noqa: RUF012
    steps = 0

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        found = super().step(closure)
        CountedAdam.steps += 1
        if CountedAdam.steps in NOTED_STEPS:
            CountedAdam.noted.append(live_bytes())
        return found


def memory() -> None:
    """Print the memory of a fit in multiples of its parameters, and its growth over epochs."""
    widths = (512, 1024, 2048)
    sizes = [sum(p.numel() for p in VAE((16,), hidden=(w, w)).parameters()) for w in widths]
    table((f"bytes held in training / bytes of {', '.join(map(short, sizes))} parameters", "multiple", "after 30 more steps"))
    with TemporaryDirectory() as folder:
        for name, options in {
            "no average": {"ema_decay": None},
            "an average (ema_decay)": {"ema_decay": 0.99},
            "an average and a checkpoint": {"ema_decay": 0.99, "checkpoint": Path(folder)},
        }.items():
            multiples, later = [], []
            for w in widths:
                pyro.clear_param_store()
                before, family, x = live_bytes(), VAE((16,), hidden=(w, w)), data(256, 16)
                own = sum(p.nbytes for p in family.parameters())
                CountedAdam.noted, CountedAdam.steps = [], 0
                train(family, x, epochs=10, batch_size=64, optim=CountedAdam, progress=False, mode=Eager(), seed=0, **options)  # type: ignore[arg-type]
                multiples.append((CountedAdam.noted[0] - before) / own)
                later.append((CountedAdam.noted[1] - before) / own)
                del family
            cells = [", ".join(f"{m:.2f}" for m in found) for found in (multiples, later)]
            print(f"| {name} | {cells[0]} | {cells[1]} |", flush=True)


PEAK_SCRIPT = """
import resource, sys, torch
import pyro_genmodels as g
from pyro_genmodels.infer.compiled import Eager
rows, columns, task = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
x = torch.randn(rows, columns)
flow = g.Flow((columns,), transform=g.MAF(1, hidden=(16,)))
if task == "data":
    x.sum()
elif task == "standardize":
    flow.standardize(x)
elif task == "epoch":
    g.train(flow, x, epochs=1, batch_size=10_000, progress=False, mode=Eager())
elif task == "log_likelihood":
    g.log_likelihood(flow, x, batch_size=10_000, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_of(rows: int, columns: int, task: str) -> int:
    """Return the peak of a fresh process's memory in bytes, for a task on so many rows of float32."""
    command = [sys.executable, "-c", PEAK_SCRIPT, str(rows), str(columns), task]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def large() -> None:
    """Print the peak of the memory of a process against the rows in memory, for each task."""
    sizes, columns = (200_000, 1_000_000), 10
    at = ", ".join(f"{n:,}" for n in sizes)
    table((f"peak memory in MiB, rows of 10 float32, at {at} rows", "peak", "bytes for each byte of data"))
    for task in ("data", "standardize", "epoch", "log_likelihood"):
        peaks = [peak_of(n, columns, task) for n in sizes]
        per_byte = np.polyfit([4 * columns * n for n in sizes], peaks, 1)[0]
        print(f"| {task} | {', '.join(f'{p / 2**20:.0f}' for p in peaks)} | {per_byte:.2f} |", flush=True)


def epochs() -> None:
    """Print the CPU time of `train` for each row, and of its first look at the data, against the rows."""
    sizes = (2_000, 20_000, 200_000)
    table((f"CPU time, {', '.join(f'{n:,}' for n in sizes)} rows of 10, batches of 1,000", "cost", "slope", "last"))
    times: dict[str, list[float]] = {"standardize": [], "an epoch": [], "log_likelihood": []}
    train(Flow((10,), transform=MAF(1, hidden=(32,))), data(2_000, 10), epochs=1, progress=False)  # what is loaded once
    for n in sizes:
        x, flow = data(n, 10), Flow((10,), transform=MAF(1, hidden=(32,)))
        start = time.process_time()
        flow.standardize(x)
        times["standardize"].append(time.process_time() - start)
        ends: list[float] = []
        more = max(1, 40_000 // n)
        for count in (1, 1 + more):
            start = time.process_time()
            train(flow, x, epochs=count, batch_size=1_000, progress=False, mode=Eager(), seed=0)
            ends.append(time.process_time() - start)
        times["an epoch"].append((ends[1] - ends[0]) / more)
        start = time.process_time()
        log_likelihood(flow, x)
        times["log_likelihood"].append(time.process_time() - start)
    for name, costs in times.items():
        row(name, sizes, costs, milliseconds)


def devices() -> None:
    """Print the bytes that a rank sends in a step, and the CPU time of a step, against the number of ranks."""
    table(
        ("ranks, bytes of parameters", "gradients averaged in a step", "buckets", "other bytes", "calls", "CPU time of a step")
    )
    for ranks, w in ((1, 512), (2, 512), (2, 2048), (4, 512)):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29577"]
        script = [str(Path(__file__).with_name("scaling_ranks.py")), str(w)]
        done = subprocess.run([*command, *script], check=True, capture_output=True, text=True)
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("counts"))
        size, gradients, buckets, others, count, seconds = map(float, line.split()[1:])
        cells = [short(gradients), f"{buckets:.1f}", short(others), f"{count:.1f}", milliseconds(seconds)]
        print(f"| {ranks}, {short(size)} | {' | '.join(cells)} |", flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "dimension": dimension,
    "times": times,
    "rows": rows,
    "width": width,
    "steps": steps,
    "tolerance": tolerance,
    "adjoint": adjoint,
    "length": length,
    "memory": memory,
    "large": large,
    "epochs": epochs,
    "devices": devices,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="tables to print")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    for part in arguments.only:
        begun = time.process_time()
        PARTS[part]()
        print(f"\n{part}: {time.process_time() - begun:.0f} s of CPU time", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPeak of this process: {peak:.0f} MiB.")


if __name__ == "__main__":
    main()
