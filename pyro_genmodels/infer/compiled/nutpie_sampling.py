"""One Markov chain of NUTS by nutpie, a sampler in Rust. This is the only file that imports nutpie.

Hoffman and Gelman, *The No-U-Turn Sampler* (arXiv 1111.4246); Seyboldt et al., *Preconditioning Hamiltonian Monte Carlo by
Minimizing Fisher Divergence* (arXiv 2603.18845), for the adaptation of the mass matrix to gradients.
"""

from __future__ import annotations

__all__ = ["ChainDraws", "NutsSettings", "import_nutpie", "sample_chain"]

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.infer.compiled.native import NativeDensity
from pyro_genmodels.utils.errors import check_positive_int, import_extra, one_line

STATISTICS = {
    "energy": "energy",
    "logp": "lp",
    "mean_tree_accept": "acceptance_rate",
    "step_size": "step_size",
    "depth": "tree_depth",
    "n_steps": "n_steps",
    "diverging": "diverging",
}
"""Names of statistics: nutpie's, and those of ArviZ."""

REPORT_EVERY = 0.1
"""Seconds between two reports of draws that native code has counted."""


@dataclass(frozen=True)
class NutsSettings:
    """Settings of NUTS.

    Attributes:
        num_warmup: number of draws during which step size and mass matrix adapt.
        num_samples: number of draws after these.
        target_accept_prob: mean acceptance probability that the step size adapts to; a larger one makes smaller steps.
        max_tree_depth: largest number of doublings of a trajectory, which has at most 2 to that power gradients.
        low_rank: True for a mass matrix that also adapts to some correlations. It is diagonal otherwise.
    """

    num_warmup: int
    num_samples: int
    target_accept_prob: float
    max_tree_depth: int
    low_rank: bool

    def __post_init__(self) -> None:
        counts = {"num_warmup": self.num_warmup, "num_samples": self.num_samples, "max_tree_depth": self.max_tree_depth}
        check_positive_int("CompiledNUTS", **counts)
        if not 0 < self.target_accept_prob < 1:
            raise ValueError(f"CompiledNUTS wants a target_accept_prob between 0 and 1, but found {self.target_accept_prob!r}.")


class ChainDraws(NamedTuple):
    """A chain, its warm-up first.

    Attributes:
        z: unconstrained coordinates of each draw, (num_warmup + num_samples, dim).
        statistics: statistics of each draw by ArviZ's names, (num_warmup + num_samples,). Energy and ``lp`` are in nats.
    """

    z: np.ndarray
    statistics: dict[str, np.ndarray]


def import_nutpie() -> Any:
    """Import and return nutpie.

    Raises:
        ImportError: if it is not installed, with the line that installs it and another way to sample.
    """
    try:
        for module in ("nutpie.compiled_pyfunc", "nutpie.compile_pymc"):
            import_extra(module, extra="nuts", by="CompiledNUTS")
        return import_extra("nutpie", extra="nuts", by="CompiledNUTS")
    except ImportError as error:
        error.msg += (
            " Without it, Pyro's own NUTS takes the captured density: NUTS(potential_fn=log_density(model).potential_fn)."
        )
        raise


def sample_chain(
    function: Callable[[Tensor], Sequence[Tensor]],
    start: Tensor,
    settings: NutsSettings,
    seed: int,
    report: Callable[[int], None],
) -> ChainDraws:
    """Return one chain.

    Args:
        function: map from coordinates, (dim,), to log density, (), and its gradient, (dim,), as of `LogDensity.capture`. A
            `NativeDensity` is called without Python.
        start: coordinates of the first point, (dim,), of the dtype and device that the function wants.
        settings: settings.
        seed: seed of the chain.
        report: function to call with the number of draws made since its last call.

    Raises:
        Exception: what the function raises.
    """
    nutpie = import_nutpie()
    errors: list[Exception] = []
    if isinstance(function, NativeDensity):
        model, reports = _native_model(nutpie, function, start), _reported(function.draws, report)
    else:
        model, reports = _python_model(nutpie, function, start, report, errors), nullcontext()
    sampler = nutpie.sample(
        model,
        draws=settings.num_samples,
        tune=settings.num_warmup,
        chains=1,
        cores=1,
        seed=seed,
        low_rank_modified_mass_matrix=settings.low_rank,
        target_accept=settings.target_accept_prob,
        maxdepth=settings.max_tree_depth,
        progress_bar=False,
        blocking=False,
        return_raw_trace=True,
    )
    try:
        with reports:
            trace = sampler.wait()
    except (KeyboardInterrupt, SystemExit):
        sampler.cancel()
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        reason = one_line(str(error).partition("Stack backtrace")[0])  # of Rust
        raise (errors[0] if errors else RuntimeError(f"nutpie failed: {reason}")) from None
    finally:
        del sampler  # an error keeps this frame alive, and with it the sampler's threads
    if errors:
        raise errors[0]
    (draws,), (statistics,) = trace.get_arrow_trace()
    return ChainDraws(
        _column(draws, "z").reshape(-1, len(start)),
        {name: _column(statistics, key) for key, name in STATISTICS.items()},
    )


def _python_model(
    nutpie: Any,
    function: Callable[[Tensor], Sequence[Tensor]],
    start: Tensor,
    report: Callable[[int], None],
    errors: list[Exception],
) -> Any:
    """Return a model of nutpie that calls a function of Python, whose first error is added to a list."""

    def log_density(x: np.ndarray) -> tuple[float, np.ndarray]:
        if errors:  # nutpie would print a page of its own at an error, so the rest of the chain is rejected
            return np.nan, x
        try:
            with torch.no_grad():
                value, gradient = function(torch.from_numpy(x).to(start))
        except Exception as error:  # raised at the end
            errors.append(error)
            return np.nan, x
        return value.item(), gradient.to("cpu", torch.float64).numpy()

    def expand(x: np.ndarray) -> dict[str, np.ndarray]:
        report(1)
        return {"z": x}

    return nutpie.compiled_pyfunc.from_pyfunc(
        ndim=len(start),
        make_logp_fn=lambda: log_density,
        make_expand_fn=lambda *seeds_and_chain: expand,
        expanded_dtypes=[np.dtype("float64")],
        expanded_shapes=[(len(start),)],
        expanded_names=["z"],
        make_initial_point_fn=partial(_initial_point, start),
    )


def _native_model(nutpie: Any, function: NativeDensity, start: Tensor) -> Any:
    """Return a model of nutpie that calls native code, as its models of PyMC do."""
    dim = len(start)
    return nutpie.compile_pymc.CompiledPyMCModel(
        dims={"z": ("coordinate",)},
        compiled_logp_func=_Code(function.address),
        compiled_expand_func=_Code(function.draw_address),
        initial_point_func=partial(_initial_point, start),
        shared_data={},
        user_data=function.memory,
        n_expanded=dim,
        shape_info=(["z"], [slice(0, dim)], [(dim,)]),
        logp_func=None,
        expand_func=None,
        _n_dim=dim,
        _shapes={"z": (dim,)},
        _coords={"coordinate": np.arange(dim)},
    )


def _initial_point(start: Tensor, seed: Any) -> np.ndarray:
    """Return the coordinates of the first point.

    The sampler calls this in the thread that evaluates the density afterwards. Libraries of matrix products have a number of
    threads for each thread, so it is set here to that of torch.
    """
    torch.set_num_threads(torch.get_num_threads())
    return start.to("cpu", torch.float64).numpy()


class _Code(NamedTuple):
    """Native code as nutpie takes it."""

    address: int


@contextmanager
def _reported(draws: np.ndarray, report: Callable[[int], None]) -> Iterator[None]:
    """Report the growth of a number of draws, (1,), from time to time and at the end of the block."""
    end = Event()
    seen = int(draws[0])

    def watch() -> None:
        nonlocal seen
        ended = False
        while not ended:
            ended = end.wait(REPORT_EVERY)
            now = int(draws[0])
            report(now - seen)
            seen = now

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _column(table: Any, name: str) -> np.ndarray:
    """Return a column of a table of pyarrow, flat."""
    column = import_extra("pyarrow", extra="nuts", by="CompiledNUTS").array(table.column(name))
    values: np.ndarray = (column.flatten() if hasattr(column, "flatten") else column).to_numpy(zero_copy_only=False)
    return values
