"""A hierarchical model of 5,000 groups under a subsampled plate: `AmortizedGuide` beside Pyro's guides, in equal CPU time.

    python -m benchmarks.amortized_guide --seconds 20

Counts of each group are Poisson, so that the posterior of its level is not normal, and depends on the shared mean and spread.
Printed for each guide: steps, the evidence lower bound in nats with its standard error, by fresh draws and of all rows where
the guide has latent variables for all, and of rows the median k-hat and the share above 0.7.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal, AutoNormalizingFlow
from torch import Tensor

from pyro_genmodels._pyro.subsampling import fixed_rows
from pyro_genmodels.posteriors import AmortizedGuide
from pyro_genmodels.utils.pareto import pareto_k

GROUPS, COUNTS, ROWS = 5000, 3, 100
MEAN, SPREAD = 0.5, 1.0
NUM_BOUNDS, NUM_DRAWS = 200, 500


def model(y: Tensor, rows: int | None = ROWS) -> None:
    """Sample the counts of groups."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(2.0))
    with pyro.plate("groups", GROUPS, subsample_size=rows) as chosen:
        level = pyro.sample("level", dist.Normal(mean, spread))
        rate = level.clamp(max=20.0).exp()[..., None].expand(*level.shape, COUNTS)
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y[chosen])


def train(guide: Any, y: Tensor, rows: int | None, seconds: float, step_size: float = 0.02) -> int:
    """Train a guide for some CPU seconds, with a step size that falls to zero, and return the number of steps."""
    elbo = Trace_ELBO(max_plate_nesting=1)
    guide(y, rows)
    optimizer = torch.optim.Adam(guide.parameters(), lr=step_size)
    start, steps = time.process_time(), 0
    while (passed := (time.process_time() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = step_size * (1 + math.cos(math.pi * passed)) / 2
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide, y, rows).backward()
        torch.nn.utils.clip_grad_norm_(guide.parameters(), 1e4)
        optimizer.step()
        steps += 1
    return steps


@torch.no_grad()
def bound(guide: Any, y: Tensor, rows: int | None) -> tuple[float, float]:
    """Return the evidence lower bound and its standard error, in nats."""
    elbo = Trace_ELBO(max_plate_nesting=1)
    values = -torch.tensor([elbo.loss(model, guide, y, rows) for _ in range(NUM_BOUNDS)])
    return float(values.mean()), float(values.std() / NUM_BOUNDS**0.5)


@torch.no_grad()
def local_pareto_k(guide: Any, y: Tensor, rows: int) -> Tensor:
    """Return k-hat of p(y_i, level_i | shared) / q(level_i | ...) for the rows of one subsample."""
    log_weights = []
    chosen = torch.arange(rows)
    for _ in range(NUM_DRAWS):
        with fixed_rows({"groups": chosen}):
            trace = poutine.trace(guide).get_trace(y, rows)
            both = [poutine.trace(poutine.replay(model, trace=trace)).get_trace(y, rows), trace]
        sums = []
        for each in both:
            each.compute_log_prob()
            local = [s for s in each.nodes.values() if s["type"] == "sample" and s["cond_indep_stack"]]
            sums.append(sum(site["unscaled_log_prob"] for site in local))
        log_weights.append(sums[0] - sums[1])
    return pareto_k(torch.stack(log_weights))


GUIDES: dict[str, tuple[Callable[[Tensor, int | None], Any], int | None]] = {
    "AmortizedGuide, 100 rows a step": (lambda y, rows: AmortizedGuide(model, y, rows), ROWS),
    "AutoNormal, 100 rows a step": (lambda y, rows: AutoNormal(model), ROWS),
    "AutoNormal, all rows": (lambda y, rows: AutoNormal(model), None),
    "AutoLowRankMultivariateNormal, all rows": (lambda y, rows: AutoLowRankMultivariateNormal(model, rank=10), None),
    "AutoNormalizingFlow, 100 rows a step": (
        lambda y, rows: AutoNormalizingFlow(model, partial(affine_autoregressive, hidden_dims=[128])),
        ROWS,
    ),
}


def main() -> None:
    """Train and judge all guides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=20.0, help="CPU seconds of training for each guide")
    parser.add_argument("--only", default="", help="beginning of the names of the guides")
    options = parser.parse_args()
    seconds = options.seconds
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    level = MEAN + SPREAD * torch.randn(GROUPS)
    y = torch.poisson(level.exp()[:, None].expand(GROUPS, COUNTS))
    print("| guide | steps | ELBO, nats | median k-hat of a row | rows above 0.7 |\n|---|---|---|---|---|")
    for name, (build, rows) in GUIDES.items():
        if not name.startswith(options.only):
            continue
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = build(y, rows)
        steps = train(guide, y, rows, seconds)
        whole, all_rows = guide, rows
        if isinstance(guide, (AmortizedGuide, AutoNormal)):  # the others have no latent variables of all rows then
            pyro.clear_param_store()
            whole, all_rows = build(y, None), None
            whole(y, None)
            whole.load_state_dict(guide.state_dict())
        value, error = bound(whole, y, all_rows)
        judged = "- | -"
        if isinstance(guide, (AmortizedGuide, AutoNormal)):
            k = local_pareto_k(guide, y, rows or GROUPS)
            judged = f"{float(k.median()):.2f} | {float((k > 0.7).float().mean()):.0%}"
        print(f"| `{name.split(',')[0]}`,{name.split(',')[1]} | {steps} | {value:.0f} ± {error:.0f} | {judged} |", flush=True)


if __name__ == "__main__":
    main()
