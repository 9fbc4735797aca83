"""Runs in other processes have the results of one process, bit for bit, also if a worker is killed; errors say the way out."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pyro
import pytest
import torch
from tqdm.auto import tqdm

from pyro_genmodels.infer.compiled.processes import can_fork
from pyro_genmodels.utils import workers
from pyro_genmodels.utils.parallel import run_all, run_each, run_values, seeded, spawn_seeds

QUIET = {"progress": False, "description": "numbers"}
WAIT = 120
"""Seconds that a cluster may take to start a worker, which imports torch."""


def number(seed):
    """Return a random number, and the process that drew it."""
    with seeded(seed):
        return float(torch.rand(())), os.getpid()


def slow_number(data, seed):
    time.sleep(0.3)
    return *number(seed), float(data.sum())


def numbers(found):
    return [run[0] for run in found]


# In this process.


@pytest.mark.parametrize("n_jobs", [0, 1.5, True, None])
def test_a_number_of_processes_is_an_integer_but_0(n_jobs):
    with pytest.raises(ValueError, match=f"numbers wants n_jobs as a number of processes, or -1 .*, but found {n_jobs}"):
        run_values(number, [0], n_jobs=n_jobs, **QUIET)


def test_errors_are_outcomes_or_raised_and_warnings_given_once():
    def inverse(seed):
        warnings.warn("near 0", RuntimeWarning, stacklevel=1)
        warnings.warn(f"{'x' * 300} of {seed}", UserWarning, stacklevel=1)
        return 1 / seed

    outcomes = run_all(inverse, [2, 0], **QUIET)
    assert [(run.value, run.error) for run in outcomes] == [(0.5, None), (None, "ZeroDivisionError: division by zero")]
    assert outcomes[0].warnings[0] == "near 0"
    assert len(outcomes[0].warnings[1]) == 200
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        run_values(inverse, [2, 0], **QUIET)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run_values(inverse, [2, 4], **QUIET) == [0.5, 0.25]
    assert [(w.category, len(str(w.message))) for w in caught] == [(RuntimeWarning, 6), (UserWarning, 305), (UserWarning, 305)]
    assert {w.filename for w in caught} == {__file__}


@pytest.mark.parametrize("backend", ["threading", "sequential"])
def test_runs_stay_in_this_process_where_joblib_would_take_threads(backend):
    expected = run_values(number, range(3), **QUIET)
    with joblib.parallel_config(backend=backend):
        assert run_values(number, range(3), n_jobs=4, **QUIET) == expected
    assert expected[0][1] == os.getpid()


def test_runs_inside_of_a_run_stay_in_its_process():
    def outer(seed):
        assert workers.is_worker()
        assert not can_fork()
        return run_values(number, range(seed, seed + 2), n_jobs=2, **QUIET)

    with joblib.parallel_config(backend="sequential"), workers.Job(outer, "outer") as job:
        joblib_runs = list(job.results([0, 1], -1, tqdm(total=2, disable=True)))
    assert joblib_runs == [[number(0), number(1)], [number(1), number(2)]]


def test_what_cannot_be_pickled_is_named():
    lock = threading.Lock()
    with pytest.raises(TypeError, match=r"cannot be sent to other .*: cannot pickle '_thread.lock' object.*n_jobs=1"):
        run_values(lambda seed: lock, [0], n_jobs=2, **QUIET)


def test_a_run_finds_the_state_of_the_sender_and_leaves_that_of_the_worker():
    def state(seed):
        return torch.get_default_dtype(), sorted(pyro.get_param_store()), torch.get_num_threads()

    pyro.param("sent", torch.zeros(1))
    torch.set_default_dtype(torch.float64)
    with joblib.parallel_config(backend="sequential"), workers.Job(state, "states") as job:
        torch.set_default_dtype(torch.float32)
        pyro.param("of the worker", torch.zeros(1))
        pyro.get_param_store().__delitem__("sent")
        torch.set_num_threads(2)
        found = list(job.results([0], -1, tqdm(total=1, disable=True)))
        assert found == [(torch.float64, ["sent"], 1)]
        assert state(0) == (torch.float32, ["of the worker"], 2)
    torch.set_num_threads(1)


def test_a_module_that_a_worker_lacks_is_named():
    with pytest.raises(ImportError, match=r"A worker cannot load the model: No module named 'of_mine'.*upload_file"):
        workers._run("a key", b"cof_mine\nmodel\n.", 0)


class Losing(workers.Job):
    """Runs in this process, of which the worker is lost after the runs of `losses`."""

    losses = ()

    def _dispatched(self, seeds, n_jobs, bar):
        for seed in seeds:
            if seed in self.losses:
                self.losses = [x for x in self.losses if x != seed] if isinstance(self.losses, list) else self.losses
                raise CancelledError(seed)
            yield seed
            bar.update()


def test_runs_whose_worker_is_lost_are_repeated_until_they_are_lost_again_and_again():
    job, bar = Losing(number, "numbers"), tqdm(total=4, disable=True)
    job.losses = [1, 3]  # lost once each
    with pytest.warns(
        RuntimeWarning, match=r"numbers: a worker was lost after \d of 4 runs, .*The other runs are repeated"
    ) as w:
        assert list(job.results(range(4), 2, bar)) == [0, 1, 2, 3]
    assert len(w) == 2
    job.losses = {2}  # whenever it is tried
    with (
        pytest.warns(RuntimeWarning, match="after 2 of 4 runs"),
        pytest.raises(RuntimeError, match=r"lost again and again, after 2 of 4 runs, .*Lower n_jobs=2, or .* more memory"),
    ):
        list(job.results(range(4), 2, bar))


# In several processes.


def killed_in_the_middle(seeds, task, n_jobs):
    """Return the results of runs; the worker of the third is killed when its result is there."""
    found = []
    for outcome in run_each(task, seeds, n_jobs=n_jobs, **QUIET):
        found.append(outcome.value)
        if len(found) == 3:
            os.kill(outcome.value[1], signal.SIGKILL)
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a worker was lost:RuntimeWarning")
@pytest.mark.parametrize("size", [10, 300_000])  # sent with each run, and once by a file
def test_processes_that_are_killed_lose_nothing(size):
    task = partial(slow_number, np.ones(size))
    found = killed_in_the_middle(range(10), task, 2)
    assert numbers(found) == numbers(map(number, range(10)))
    assert {run[2] for run in found} == {size}
    assert os.getpid() not in {run[1] for run in found}


@pytest.mark.slow
def test_an_interrupt_ends_the_processes(tmp_path):
    """Each run writes the number of its process before it sleeps; none of these lives on."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, sys, time\n"
        "from pyro_genmodels.utils.parallel import run_values\n"
        "def task(seed):\n"
        f"    open(os.path.join({str(tmp_path)!r}, f'{{os.getpid()}}.pid'), 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    run_values(task, range(4), n_jobs=2, description='sleeping')\n"
    )
    root = Path(workers.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE, cwd=root, env=environment) as run:
        waited = time.monotonic()
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < waited + 2 * WAIT:
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=WAIT)
    assert b"KeyboardInterrupt" in error
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    end = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


# On a cluster of Dask.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*a worker was lost:RuntimeWarning")
@pytest.mark.parametrize("size", [10, 300_000])  # sent with each run, and once by Dask's scatter
def test_a_worker_of_a_cluster_that_is_killed_loses_nothing(on_cluster, size):
    """Threads of a worker take turns, since Pyro's handlers are global."""
    found = killed_in_the_middle(range(10), partial(slow_number, np.ones(size)), -1)
    assert numbers(found) == numbers(map(number, range(10)))
    assert {run[2] for run in found} == {size}
    assert os.getpid() not in {run[1] for run in found}


@pytest.mark.slow
def test_a_large_task_is_sent_once_to_each_worker(on_cluster, tmp_path):
    found = run_values(Counted(tmp_path, np.ones(100_000)), range(20), n_jobs=-1, **QUIET)
    assert numbers(found) == numbers(map(number, range(20)))
    assert len(list(tmp_path.iterdir())) == len({run[1] for run in found}) <= 2


class Counted:
    """A task that leaves a file whenever it is unpickled."""

    def __init__(self, folder, data):
        self.folder, self.data = folder, data

    def __setstate__(self, state):
        self.__dict__.update(state)
        (self.folder / f"{os.getpid()} {time.time_ns()}").touch()

    def __call__(self, seed):
        return number(seed)


@pytest.mark.slow
def test_a_run_that_kills_its_workers_says_so(on_cluster, dask_client, monkeypatch):
    def kill(seed):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(dask_client.cluster.scheduler, "allowed_failures", 0)  # for three workers would take long to start
    with pytest.raises(RuntimeError, match=r"after 0 of 1 runs, .*\(KilledWorker\)\. Lower n_jobs=-1"):
        run_values(kill, [0], n_jobs=-1, **QUIET)


def test_seeds_are_those_of_fewer_runs():
    assert spawn_seeds(3, 2) == spawn_seeds(3, 5)[:2]


@pytest.mark.slow
def test_the_code_for_a_cluster_runs(tmp_path):
    root = Path(workers.__file__).parents[2]
    page = (root / "docs" / "parallel.md").read_text()
    script = tmp_path / "on_a_cluster.py"
    script.write_text(page.partition("## On a cluster")[2].split("```\n")[1])
    command, environment = [sys.executable, "-W", "error::RuntimeWarning", script], os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=2 * WAIT, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "no fault found"
