"""Effective draws per second of NUTS: the bulk effective sample size of the worst parameter, compile time apart.

A chain is a warm-up and draws, of the same lengths everywhere, on one core. Effective draws and seconds are summed over rounds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import torch
from pyro.infer import MCMC, NUTS

from benchmarks.speed import programs
from benchmarks.speed.measure import ROOT, AtLeast, Bench, Peers, Row, Target, There, duration
from pyro_genmodels.infer.compiled import CompiledNUTS, log_density
from pyro_genmodels.infer.compiled.nutpie_sampling import NutsSettings, sample_chain

WARMUP, SAMPLES = 300, 500
NAMES = ("eight schools", "logistic", "gaussian process")
STOCK_ROUNDS = 2
"""Rounds in which Pyro's NUTS takes part: one takes half a minute."""

Chain = Callable[[], tuple[float, Mapping[str, Any]]]


def worst_ess(draws: Mapping[str, Any]) -> float:
    """Return the smallest bulk effective sample size of all scalars; draws are (num_samples, ...)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # arviz announces its own split
        import arviz
    flat = np.concatenate([np.asarray(x, float).reshape(len(x), -1) for x in draws.values()], axis=1)
    return min(float(arviz.ess(column[None], method="bulk")) for column in flat.T)


def ours(name: str) -> Chain:
    """Return a chain of CompiledNUTS, whose density is compiled now and whose first run is made."""
    model, args = programs.named(name)
    density = log_density(model, *args)
    start = density.initial_points(1)[0].double()
    captured = density.capture(start)
    function = captured.native(start) or captured
    settings = NutsSettings(WARMUP, SAMPLES, 0.8, 10, False)

    def chain() -> tuple[float, Mapping[str, Any]]:
        point, seed = density.initial_points(1)[0].double(), int(torch.randint(2**31, ()))
        start = time.perf_counter()
        draws = sample_chain(function, point, settings, seed, lambda count: None)
        return time.perf_counter() - start, {"z": draws.z[WARMUP:]}

    chain()  # imports the sampler
    return chain


def stock(name: str) -> Chain:
    """Return a chain of Pyro's NUTS."""
    model, args = programs.named(name)

    def chain() -> tuple[float, Mapping[str, Any]]:
        mcmc = MCMC(NUTS(model), num_samples=SAMPLES, warmup_steps=WARMUP, disable_progbar=True)
        start = time.perf_counter()
        mcmc.run(*args)
        return time.perf_counter() - start, mcmc.get_samples()

    return chain


def numpyro_call(peers: Peers, name: str) -> There:
    """Return a chain of NumPyro's NUTS as a call."""
    arguments = {"name": name, "num_warmup": WARMUP, "num_samples": SAMPLES}
    return There("NumPyro", peers, "numpyro_programs", "nuts", arguments)


def numpyro(bench: Bench, name: str) -> Chain:
    """Return a chain of NumPyro's NUTS, compiled now."""
    call = numpyro_call(bench.peers, name)
    call.build()

    def chain() -> tuple[float, Mapping[str, Any]]:
        seconds = call.seconds(1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "draws.npz"
            bench.peers.ask("save_draws", key=call.key, path=str(path))
            with np.load(path) as file:
                return seconds, dict(file)

    return chain


def nuts(bench: Bench) -> None:
    """Measure chains of NUTS; ratios are of effective draws per second."""
    for name in NAMES:
        try:
            compare(bench, name, max(2, bench.rounds // 3))
        except FileNotFoundError as reason:  # data that are not part of the package
            bench.notes.append(f"The {name} is left out: {reason}")


def compare(bench: Bench, name: str, rounds: int) -> None:
    """Run chains turn by turn and add a row for each pair."""
    chains: dict[str, Chain] = {"CompiledNUTS": ours(name), "MCMC(NUTS)": stock(name)}
    targets: dict[str, Target] = {"MCMC(NUTS)": AtLeast(20)}
    if bench.can(numpyro_call(bench.peers, name)):
        chains["NumPyro"], targets["NumPyro"] = numpyro(bench, name), AtLeast(1)
    turns: dict[str, list[tuple[float, float]]] = {who: [] for who in chains}
    for i in range(rounds):
        for who, chain in chains.items():
            if who != "MCMC(NUTS)" or i < STOCK_ROUNDS:
                seconds, draws = chain()
                turns[who].append((worst_ess(draws), seconds))
    rate = {who: sum(ess for ess, _ in turn) / sum(s for _, s in turn) for who, turn in turns.items()}
    for other, target in targets.items():
        pairs = zip(turns["CompiledNUTS"], turns[other], strict=False)
        low, _, high = quantiles([a / s / (b / t) for (a, s), (b, t) in pairs], n=4, method="inclusive")
        figures = (f"{rate['CompiledNUTS']:.3g} ESS/s", f"{rate[other]:.3g} ESS/s")
        ratio = rate["CompiledNUTS"] / rate[other]
        bench.add(Row(f"{name}, NUTS, {WARMUP} + {SAMPLES}", "CompiledNUTS", other, figures, ratio, low, high, target))


def first_chain(bench: Bench) -> None:
    """Measure the first chain, compiling included; ours with an empty cache of compiled code (cold) and a full one (warm)."""
    for name in NAMES[:2]:
        peers = Peers(bench.threads)
        theirs = numpyro_call(peers, name)
        seconds = {"MCMC(NUTS)": stock(name)()[0]} | ({"NumPyro": theirs.build()} if bench.can(theirs) else {})
        peers.close()
        with tempfile.TemporaryDirectory() as cache:
            for how in ("cold", "warm"):
                command = [sys.executable, "-m", "benchmarks.speed.nuts", name, str(bench.threads)]
                environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                answer = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True, text=True)
                ours = float(answer.stdout.splitlines()[-1])
                for other, taken in seconds.items():
                    ratio, figures = ours / taken, (duration(ours), duration(taken))
                    work = f"{name}, NUTS, first chain, compiling included"
                    bench.add(Row(work, f"CompiledNUTS, {how}", other, figures, ratio, ratio, ratio))


def main(name: str, threads: int) -> None:
    """Print the seconds of the first chain in this process."""
    torch.set_num_threads(threads)
    model, args = programs.named(name)
    start = time.perf_counter()
    CompiledNUTS(model, num_chains=1, num_warmup=WARMUP, num_samples=SAMPLES, num_processes=1, progress=False).run(*args)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
