"""Training on data larger than memory: peak memory and rows per second against the number of rows.

    python benchmarks/large_data.py
    python benchmarks/large_data.py --folder large_data --rows 1000000 100000000 --kinds parquet

Each row of the table is a fresh process. Another one writes files of 10 columns of float32; then a small flow is standardised
by all rows and trained for one epoch, and the operating system says the peak of the resident memory. Times are CPU time.
Files are deleted afterwards. 10^8 rows take 4 GB of disk.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

COLUMNS, FILES, ROWS_OF_GROUP, BATCH_SIZE = 10, 8, 2**18, 16_384


def write(folder, kind, rows):
    """Write correlated columns far from 0, in parts of a row group."""
    import numpy as np

    rng = np.random.default_rng(0)
    for number in range(FILES):
        left = rows // FILES + (number < rows % FILES)
        path, shape = folder / f"part-{number}.{kind}", (left, COLUMNS)
        sink = None
        while left:
            n = min(left, ROWS_OF_GROUP)
            x = rng.standard_normal((n, COLUMNS), np.float32)
            x = x.cumsum(1) + np.arange(COLUMNS, dtype=np.float32) * 10
            sink = append(sink, path, kind, shape, x)
            left -= n
        sink.close()


def append(sink, path, kind, shape, x):
    """Append rows to a file, which the first ones open."""
    if kind == "npy":
        import numpy as np

        if sink is None:
            sink = path.open("wb")
            np.lib.format.write_array_header_1_0(sink, {"descr": "<f4", "fortran_order": False, "shape": shape})
        sink.write(x.tobytes())
        return sink
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = pa.table({f"x{i}": x[:, i] for i in range(x.shape[1])})
    sink = parquet.ParquetWriter(path, table.schema) if sink is None else sink
    sink.write_table(table, row_group_size=ROWS_OF_GROUP)
    return sink


def train_once(folder):
    """Train on the files in a folder for one epoch, and print what it took as JSON."""
    import torch

    from pyro_genmodels import MAF, Flow, train
    from pyro_genmodels.datasets import stream

    torch.set_num_threads(1)
    imported = peak_bytes()
    rows = stream(folder)
    begun = time.process_time()
    rows.statistics()
    measured = time.process_time() - begun
    begun = time.process_time()
    for _ in rows.batches(BATCH_SIZE, epoch=1):
        pass
    read = time.process_time() - begun
    flow = Flow((COLUMNS,), transform=MAF(transforms=1, hidden=(8,)))
    begun = time.process_time()
    fit = train(flow, rows, epochs=1, batch_size=BATCH_SIZE, seed=0, progress=False)
    trained = time.process_time() - begun
    found = {"imported": imported, "peak": peak_bytes(), "statistics": measured, "read": read, "train": trained}
    print(json.dumps({"rows": len(rows), "loss": fit.history[-1]["train"], **found}))


def peak_bytes():
    """Return the peak of the resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "large_data")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--kinds", nargs="+", default=["npy", "parquet"])
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # of a fresh process: what, kind, rows
    args = parser.parse_args()
    if args.step is not None:
        what, kind, rows = args.step
        write(args.folder, kind, int(rows)) if what == "write" else train_once(args.folder)
        return
    print("| files | rows | on disk | peak memory | above import | statistics, rows per CPU second | reading | training |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in args.kinds:
        results = []
        for rows in args.rows:
            args.folder.mkdir(parents=True)
            try:
                command = [sys.executable, __file__, "--folder", str(args.folder), "--step"]
                subprocess.run([*command, "write", kind, str(rows)], check=True)
                size = sum(path.stat().st_size for path in args.folder.iterdir())
                found = json.loads(subprocess.run([*command, "train", kind, "0"], check=True, stdout=subprocess.PIPE).stdout)
            finally:
                shutil.rmtree(args.folder)
            results.append(found)
            speeds = " | ".join(f"{rows / found[name]:,.0f}" for name in ("statistics", "read", "train"))
            memory = f"{found['peak'] / 1e6:,.0f} MB | {(found['peak'] - found['imported']) / 1e6:,.0f} MB"
            print(f"| {kind} | {rows:,} | {size / 1e6:,.0f} MB | {memory} | {speeds} |", flush=True)
        for first, last in pairwise(results):
            slope = (last["peak"] - first["peak"]) / (last["rows"] - first["rows"])
            print(f"{kind}: {slope:.1f} bytes of peak memory a row from {first['rows']:,} to {last['rows']:,}", flush=True)


if __name__ == "__main__":
    main()
