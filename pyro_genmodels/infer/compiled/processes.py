"""Tasks in forked processes, which share the memory of their parent and so need no copy of a model or of compiled code.

Each process uses one thread of torch, as the workers of a `DataLoader` do: threads of the parent do not exist in a fork.
"""

from __future__ import annotations

__all__ = ["available_cores", "can_fork", "run_forked", "run_in_turn"]

import gc
import multiprocessing as mp
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from pyro_genmodels.utils.workers import is_worker

T = TypeVar("T")
Task = Callable[[Callable[[int], None]], T]
"""Function of another one, which it calls with the number of steps that it has made since the last call."""

REPORT_EVERY = 0.1
"""Seconds between two reports of the steps done."""


def available_cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork() -> bool:
    """Return True if processes can be forked safely: not on Windows or macOS, after CUDA was used, or inside of a worker."""
    forks = "fork" in mp.get_all_start_methods() and sys.platform != "darwin"
    return forks and not torch.cuda.is_initialized() and not mp.current_process().daemon and not is_worker()


def run_in_turn(tasks: Sequence[Task[T]], report: Callable[[int], None]) -> list[T]:
    """Run tasks one after another in this process and return their results.

    Args:
        tasks: the tasks.
        report: function that is called with the number of steps done since its last call.
    """
    return [task(report) for task in tasks]


def run_forked(tasks: Sequence[Task[T]], num_processes: int, report: Callable[[int], None]) -> list[T]:
    """Run tasks in forked processes, a few at a time, and return their results. See `can_fork`.

    An error in one ends all of them.

    Args:
        tasks: the tasks. Their results must pickle.
        num_processes: largest number of processes at a time.
        report: function that is called with the number of steps done since its last call.

    Raises:
        RuntimeError: if a process ends without a result, as when memory runs out.
        Exception: the error of a task, if it pickles, with the traceback as a note.

    Example:
        >>> run_forked([lambda step: 1, lambda step: 2], 2, lambda steps: None)
        [1, 2]
    """
    context = mp.get_context("fork")
    steps = context.RawArray("q", len(tasks))
    waiting = list(range(len(tasks)))
    running: dict[Any, tuple[int, Any]] = {}
    results: dict[int, T] = {}
    reported = 0
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                i = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(tasks[i], i, steps, sender), daemon=True)
                with warnings.catch_warnings():  # of threads in the parent, none of which the tasks use
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                running[receiver] = (i, process)
            for receiver in wait(list(running), timeout=REPORT_EVERY):
                i, process = running.pop(receiver)
                results[i] = _receive(receiver, process)
            done = sum(steps)  # once, since there may be more after the report
            report(done - reported)
            reported = done
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return [results[i] for i in range(len(tasks))]


def _work(task: Task[Any], i: int, steps: Any, sender: Connection) -> None:
    """Run a task in this process, and send (result, None), or (None, error)."""
    gc.freeze()  # garbage of the parent may own threads, and to collect it here would be to wait for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the parent, which ends its processes
    torch.set_num_threads(1)

    def report(count: int) -> None:
        steps[i] += count

    try:
        message = pickle.dumps((task(report), None))
    except Exception as error:  # raised again by the parent
        error.add_note(traceback.format_exc())
        message = _pickled_error(error)
    sender.send_bytes(message)


def _pickled_error(error: Exception) -> bytes:
    """Return (None, error) as bytes; an error that does not pickle becomes a RuntimeError with its text."""
    with suppress(Exception):
        message = pickle.dumps((None, error))
        pickle.loads(message)
        return message
    return pickle.dumps((None, RuntimeError(traceback.format_exc())))


def _receive(receiver: Any, process: Any) -> Any:
    """Return the result of a process that has sent it or ended."""
    try:
        result, error = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"A process ended with exit code {process.exitcode} and without a result. Minus 9 means that it was killed, most "
            "often for want of memory."
        ) from None
    finally:
        receiver.close()
    process.join()
    if error is not None:
        raise error
    return result
