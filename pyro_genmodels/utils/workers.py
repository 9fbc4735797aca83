"""A function on its way to other processes: how it gets there, what state it finds, and what happens if one of them is lost.

Each process unpickles a function once, and runs it for one seed after another. It sets the parameters and global flags of the
process that sent it for as long as a run takes, so that a worker of a cluster is left as it was found.
"""

from __future__ import annotations

__all__ = ["Job", "is_worker", "stays_here"]

import pickle
import threading
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.util import is_validation_enabled

from pyro_genmodels.utils.errors import import_extra, one_line, warn_caller

MAX_LOSSES = 3
"""Largest number of times that runs are repeated because a worker was lost."""
LARGE = 100_000
"""Bytes from which a function is sent once to each worker, and not with each run."""


def is_worker() -> bool:
    """Return True inside of a run of a `Job`: other runs use the other cores."""
    return getattr(_thread, "is_in_run", False)


def stays_here(n_jobs: int) -> bool:
    """Return True if runs cannot leave this process: inside of a run, or where joblib would take threads.

    Args:
        n_jobs: number of processes that are wanted.
    """
    joblib = import_extra("joblib", extra="parallel", by=f"n_jobs={n_jobs}")
    backend, _ = joblib.parallel.get_active_backend()
    return is_worker() or getattr(backend, "uses_threads", False)


class Job:
    """A function of a seed, and its runs in other processes. In a block this process may run it, too.

    Args:
        function: the function.
        description: what runs, for messages.

    Raises:
        TypeError: if the function cannot be pickled.

    Example:
        >>> import joblib
        >>> from tqdm.auto import tqdm
        >>> with joblib.parallel_config(backend="sequential"), Job(lambda seed: 2 * seed, "doubles") as job:
        ...     list(job.results([1, 2], -1, tqdm(total=2, disable=True)))
        [2, 4]
    """

    def __init__(self, function: Callable[[int], Any], description: str) -> None:
        cloudpickle = import_extra("cloudpickle", extra="parallel", by="n_jobs=")
        self.key, self.description, self._sent = uuid.uuid4().hex, description, (function, _Settings.here())
        try:
            pickled = cloudpickle.dumps(self._sent)
        except Exception as error:
            raise TypeError(
                f"{description}: the model and its data cannot be sent to other processes: {one_line(error)}. Leave out what "
                "cannot be pickled, such as an open file, a lock or a generator, or take n_jobs=1."
            ) from error
        # joblib sends an array once to each worker, by a file or by Dask's scatter, and bytes with each run
        self._pickled = np.frombuffer(pickled, np.uint8) if len(pickled) >= LARGE else pickled

    def __enter__(self) -> Job:
        _received[self.key] = self._sent
        return self

    def __exit__(self, *_: Any) -> None:
        _received.pop(self.key, None)

    def results(self, seeds: Sequence[int], n_jobs: int, bar: Any) -> Iterator[Any]:
        """Yield the result for each seed when it and those before it are there. If a worker is lost, the others are repeated.

        Args:
            seeds: the seeds.
            n_jobs: number of processes, as joblib takes it.
            bar: progress bar, which counts the runs as they end.

        Raises:
            RuntimeError: if workers are lost again and again.

        Warns:
            RuntimeWarning: if runs are repeated, because a worker was lost.
        """
        done, losses = 0, 0
        while done < len(seeds):
            try:
                with closing(self._dispatched(seeds[done:], n_jobs, bar)) as results:
                    for result in results:
                        done += 1
                        yield result
            except Exception as error:
                if not _is_loss(error):
                    raise
                losses += 1
                after = f"after {done} of {len(seeds)} runs, most often for want of memory ({type(error).__name__})"
                if losses > MAX_LOSSES or type(error).__name__ == "KilledWorker":  # Dask has tried several workers by then
                    raise RuntimeError(
                        f"{self.description}: workers were lost again and again, {after}. Lower n_jobs={n_jobs}, or give each "
                        "worker more memory; from the same seed the runs are the same."
                    ) from error
                warn_caller(f"{self.description}: a worker was lost {after}. The other runs are repeated.")

    def _dispatched(self, seeds: Sequence[int], n_jobs: int, bar: Any) -> Generator[Any, None, None]:
        """Yield results as joblib has them."""
        joblib = import_extra("joblib", extra="parallel", by=f"n_jobs={n_jobs}")
        before = bar.total - len(seeds)

        class Parallel(joblib.Parallel):  # type: ignore[name-defined]
            def print_progress(self) -> None:  # called when a run ends, also where results are returned together
                bar.update(before + self.n_completed_tasks - bar.n)

        backend, _ = joblib.parallel.get_active_backend()
        one_by_one = getattr(backend, "supports_return_generator", False)  # loky and Dask do, Ray does not
        parallel = Parallel(n_jobs=n_jobs, return_as="generator" if one_by_one else "list")
        with _errors_reported(backend):
            results = parallel(joblib.delayed(_run)(self.key, self._pickled, seed) for seed in seeds)
            try:
                for result in results:  # noqa: UP028 - `yield from` would close them without the filter below
                    yield result
            finally:
                if one_by_one:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UserWarning)  # of runs that nobody waits for any more
                        results.close()


@contextmanager
def _errors_reported(backend: Any) -> Iterator[None]:
    """Tell joblib in a block when Dask gives up a run whose workers have died, for which joblib 1.6 waits for ever.

    Its backend for Dask sets the error in the future of the run, but calls back only for runs that have ended.
    """
    if type(backend).__name__ != "DaskDistributedBackend":
        yield
        return
    submit = backend.submit

    def reporting(function: Any, callback: Any = None) -> Any:
        def report(ended: Any) -> None:
            if not ended.cancelled() and ended.exception() is not None:
                callback(ended.exception())

        future = submit(function, callback)
        future.add_done_callback(report)
        return future

    backend.submit = reporting
    try:
        yield
    finally:
        del backend.submit


def _is_loss(error: Exception) -> bool:
    """Return True if an error says that a worker was lost, in the words of loky, Dask or Ray."""
    if isinstance(error, CancelledError):  # data on a lost worker of Dask
        return True
    lost = ("TerminatedWorkerError", "KilledWorker", "WorkerCrashedError", "ActorDiedError", "OutOfMemoryError")
    return type(error).__module__.partition(".")[0] in ("joblib", "loky", "distributed", "ray") and type(error).__name__ in lost


@dataclass(frozen=True)
class _Settings:
    """The state that a model may depend on beside its arguments: parameters and global flags."""

    dtype: torch.dtype
    validates: bool
    params: Any

    @classmethod
    def here(cls) -> _Settings:
        """Return those of this process."""
        return cls(torch.get_default_dtype(), is_validation_enabled(), pyro.get_param_store().get_state())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make them those of this process in a block, with one thread of torch, since there is a process for each core."""
        before, threads = _Settings.here(), torch.get_num_threads()
        torch.set_num_threads(1)
        self._apply()
        try:
            yield
        finally:
            before._apply()
            torch.set_num_threads(threads)

    def _apply(self) -> None:
        torch.set_default_dtype(self.dtype)
        pyro.enable_validation(self.validates)
        store = pyro.get_param_store()
        store.clear()
        store.set_state(self.params)


def _run(key: str, pickled: Any, seed: int) -> Any:
    """Return the result of a function for a seed, in the process that this is. Threads of a worker wait for one another."""
    with _lock:
        if key not in _received:
            _received.clear()
            _received[key] = _load(pickled)
        function, settings = _received[key]
        _thread.is_in_run = True
        try:
            with settings.applied():
                return function(seed)
        finally:
            _thread.is_in_run = False


def _load(pickled: Any) -> tuple[Any, ...]:
    """Return a function and its settings.

    Raises:
        ImportError: if this process lacks a module.
    """
    try:
        return pickle.loads(pickled)
    except (AttributeError, ImportError) as error:
        raise ImportError(
            f"A worker cannot load the model: {one_line(error)}. Install its module where the workers are, or send it there: "
            "client.upload_file(...) of Dask, or cloudpickle.register_pickle_by_value(module)."
        ) from error


_received: dict[str, tuple[Any, ...]] = {}
"""The last function of this process and its settings, by the key of its job."""
_lock = threading.Lock()
_thread = threading.local()
