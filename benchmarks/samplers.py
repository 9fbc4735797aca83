"""Benchmark of Langevin dynamics against torchebm: chain steps per second, on the same energy of two layers of 128.

pip install --no-deps torchebm && python benchmarks/samplers.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from pyro_genmodels.samplers import Langevin, run
from pyro_genmodels.samplers.target import check_target

STEP_SIZE = 0.01


def median_seconds(fns: dict[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Return the median seconds of each function; the functions alternate, and the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in fns}
    for i in range(rounds + 1):
        for name, fn in fns.items():
            start = time.perf_counter()
            fn()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def compare(chains: int, dims: int, steps: int) -> None:
    """Print a row with the chain steps per second of each sampler."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Energy(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(dims, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 1)]
            self.net = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(-1)

    energy, x = Energy(), torch.randn(chains, dims)
    theirs = LangevinDynamics(energy, step_size=STEP_SIZE)
    target, size = check_target(lambda x: -energy(x), 1), torch.tensor(STEP_SIZE)
    unadjusted, adjusted = Langevin(STEP_SIZE, adjusted=False), Langevin(STEP_SIZE)
    seconds = median_seconds(
        {
            "ours": lambda: run(unadjusted, target, x, steps, step_size=size),
            "torchebm": lambda: theirs.sample(x=x.clone(), n_steps=steps),
            "adjusted": lambda: run(adjusted, target, x, steps, step_size=size),
        }
    )
    rates = [chains * steps / seconds[name] for name in ("ours", "torchebm", "adjusted")]
    ratio = seconds["torchebm"] / seconds["ours"]
    print(f"{chains:>6} chains in {dims:>3}-D {rates[0]:>12.3g} {rates[1]:>12.3g} {ratio:>7.2f} {rates[2]:>16.3g}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(f"{'chain steps per second':22} {'ours':>12} {'torchebm':>12} {'ratio':>7} {'ours, adjusted':>16}")
    for size in ((10_000, 2, 60), (200, 2, 600), (64, 784, 600)):
        compare(*size)
