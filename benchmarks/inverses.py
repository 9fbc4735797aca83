"""Benchmark of the inverse of each flow: round-trip error in float32 on two-dimensional data, before and after training.

That of `Glow` is measured on images of 8 x 8 pixels.

python benchmarks/inverses.py
"""

from __future__ import annotations

import time

import torch

from pyro_genmodels import train
from pyro_genmodels.families import BPF, MAF, NAF, NCSF, NICE, NSF, SOSPF, UNAF, Flow, Glow, RealNVP


def ring(n: int) -> torch.Tensor:
    """Return points around a circle, (n, 2)."""
    angle = 6.28 * torch.rand(n)
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(n, 2)


def waves(n: int) -> torch.Tensor:
    """Return images of plane waves with noise, (n, 1, 8, 8)."""
    place = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    phase = torch.einsum("nd,dhw->nhw", torch.randn(n, 2), place) + 6.28 * torch.rand(n, 1, 1)
    return (phase.sin() + 0.2 * torch.randn(n, 8, 8)).unsqueeze(1)


def round_trip(flow: Flow, x: torch.Tensor) -> float:
    """Return the largest error of the mapping data -> base -> data."""
    flow.eval()
    with torch.no_grad():
        y = x if flow.pretransform is None else flow.pretransform(x)
        y, transform = y.flatten(1), flow.transform(None)
        return (transform.inv(transform(y)) - y).abs().max().item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'choice':8} {'fresh':>8} {'trained':>8} {'round trip of 200, ms':>23}")
    vectors = [choice(hidden=(32, 32)) for choice in (NICE, RealNVP, MAF, NSF, NCSF, NAF, UNAF, SOSPF, BPF)]
    images = [Glow(levels=2, steps=4, channels=32), Glow(levels=2, steps=4, channels=32, bins=8)]
    for choice, draw in [*((c, ring) for c in vectors), *((c, waves) for c in images)]:
        errors: list[tuple[float, float]] = []
        for seed in range(3):
            torch.manual_seed(seed)
            x = draw(500)
            flow = Flow(x.shape[1:], transform=choice)
            fresh = round_trip(flow, x[:200])
            train(flow, x, epochs=10, batch_size=100, progress=False)
            start = time.perf_counter()
            errors.append((fresh, round_trip(flow, x[:200])))
        milliseconds = 1e3 * (time.perf_counter() - start)
        print(
            f"{type(choice).__name__:8} {max(e[0] for e in errors):8.1e} {max(e[1] for e in errors):8.1e} {milliseconds:23.0f}"
        )
