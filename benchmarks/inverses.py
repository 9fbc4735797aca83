"""Benchmark of the inverse of each flow: round-trip error in float32 on two-dimensional data, before and after training.

python benchmarks/inverses.py
"""

from __future__ import annotations

import time

import torch

from pyro_genmodels import train
from pyro_genmodels.families import BPF, MAF, NAF, NCSF, NICE, NSF, SOSPF, UNAF, Flow, RealNVP


def ring(n: int) -> torch.Tensor:
    """Return points around a circle, (n, 2)."""
    angle = 6.28 * torch.rand(n)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(n, 2)


def round_trip(flow: Flow, x: torch.Tensor) -> float:
    """Return the largest error of the mapping data -> base -> data."""
    flow.eval()
    with torch.no_grad():
        y = x if flow.pretransform is None else flow.pretransform(x)
        transform = flow.transform(None)
        return (transform.inv(transform(y)) - y).abs().max().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'choice':8} {'fresh':>8} {'trained':>8} {'round trip of 200, ms':>23}")
    for choice in (NICE, RealNVP, MAF, NSF, NCSF, NAF, UNAF, SOSPF, BPF):
        errors: list[tuple[float, float]] = []
        for seed in range(3):
            torch.manual_seed(seed)
            flow, x = Flow((2,), transform=choice(hidden=(32, 32))), ring(500)
            fresh = round_trip(flow, x[:200])
            train(flow, x, epochs=10, batch_size=100, progress=False)
            start = time.perf_counter()
            errors.append((fresh, round_trip(flow, x[:200])))
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(f"{choice.__name__:8} {max(e[0] for e in errors):8.1e} {max(e[1] for e in errors):8.1e} {milliseconds:23.0f}")
