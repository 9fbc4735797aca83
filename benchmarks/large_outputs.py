"""Peak memory, seconds and size on disk of results larger than memory, each in a fresh process.

    python -m benchmarks.large_outputs [--rows 1000000 10000000] [--only sample_parquet] [--folder FOLDER]

Prints a table, which is the section "Large outputs" of RESULTS.md. Peak memory is the largest resident set of the process; what
the imports alone take is in the first row.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory


def family():
    import torch

    from pyro_genmodels import MAF, Flow

    torch.manual_seed(0)
    return Flow((2,), transform=MAF(transforms=1, hidden=(8,)))


def batches(rows, size=100_000):
    import torch

    for start in range(0, rows, size):
        generator = torch.Generator().manual_seed(start)
        yield torch.randn(min(size, rows - start), 2, generator=generator)


def imports(rows, folder):
    import pyarrow.parquet  # noqa: F401
    import zarr  # noqa: F401

    family()


def log_likelihood(rows, folder):
    from pyro_genmodels import log_likelihood

    return str(log_likelihood(family(), batches(rows), out=folder / "scores.parquet"))


def compare(rows, folder):
    from pyro_genmodels import compare

    return str(compare({"a": family(), "b": family()}, batches(rows)).table["elpd"].iloc[0])


def sample_parquet(rows, folder):
    from pyro_genmodels.inference_data import sample_to

    sample_to(family(), rows, folder / "draws.parquet", progress=False)


def sample_zarr(rows, folder):
    from pyro_genmodels.inference_data import sample_to

    sample_to(family(), rows, folder / "draws.zarr", progress=False)


def to_arviz(rows, folder):
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal

    from pyro_genmodels import to_arviz

    def model(x):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    x, groups = torch.zeros(3), ["posterior", "log_likelihood", "sample_stats"]
    guide = AutoNormal(model)
    guide(x)
    to_arviz((model, guide), x, num_samples=rows, batch_size=10_000, groups=groups, out=folder / "p.zarr", progress=False)


TASKS = {f.__name__: f for f in (imports, log_likelihood, compare, sample_parquet, sample_zarr, to_arviz)}


def measure(task, rows, folder):
    """Run a task in this process, and print what it took as JSON."""
    import torch

    torch.set_num_threads(1)
    begun = time.perf_counter()
    TASKS[task](rows, folder)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
    print(json.dumps({"seconds": seconds, "peak": peak, "disk": size}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--only", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--folder", default=None, help="where results are written, and removed")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], int(args.measure[1]), Path(args.measure[2]))
        return
    print("| result | rows or draws | peak memory (MiB) | seconds | on disk (MiB) |\n|---|---|---|---|---|")
    for task in args.only:
        for rows in args.rows[:1] if task == "imports" else args.rows:
            with TemporaryDirectory(dir=args.folder) as folder:
                command = [sys.executable, "-m", "benchmarks.large_outputs", "--measure", task, str(rows), folder]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                shutil.rmtree(folder, ignore_errors=True)
                Path(folder).mkdir()
            number = "" if task == "imports" else f"{rows:,}"
            print(f"| {task} | {number} | {found['peak']:.0f} | {found['seconds']:.0f} | {found['disk']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
