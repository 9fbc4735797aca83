"""`CompiledNUTS`: NUTS over a captured log density, in place of Pyro's ``MCMC(NUTS(model))``.

Pyro's NUTS runs the model, its handlers and autograd for each of thousands of gradients. Here the model is captured as a graph
once, and nutpie, a sampler in Rust, asks the graph for gradients.
"""

from __future__ import annotations

__all__ = ["CompiledNUTS"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide.initialization import init_to_uniform
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor
from tqdm.auto import tqdm

from pyro_genmodels._pyro.mcmc import ChainRun
from pyro_genmodels.infer.compiled.density import LogDensity
from pyro_genmodels.infer.compiled.modes import Mode, check_mode
from pyro_genmodels.infer.compiled.nutpie_sampling import ChainDraws, NutsSettings, import_nutpie, sample_chain
from pyro_genmodels.infer.compiled.processes import available_cores, can_fork, run_forked, run_in_turn
from pyro_genmodels.utils.errors import check_positive_int, type_with_article
from pyro_genmodels.utils.precision import in_doubles

CHECKED = 8
"""Number of draws of each chain at which coordinates that the density does not depend on are looked at again."""

OPTIONS = {
    "warmup_steps": "num_warmup",
    "initial_params": "init (values in the support of each variable)",
    "init_strategy": "init",
    "disable_progbar": "progress",
    "full_mass": "low_rank",
    "jit_compile": "mode",
}
"""Options of Pyro's `MCMC` and `NUTS`, and those of `CompiledNUTS` in their place."""


@dataclass(frozen=True)
class _Kernel:
    """A kernel of `MCMC` with the one attribute that `to_arviz`, `Predictive` and ArviZ read."""

    model: Callable[..., Any]


class CompiledNUTS(ChainRun):
    """Markov chains of NUTS on a model's latent variables, with the model captured as a graph.

    It has the verbs of Pyro's `MCMC`: ``run``, ``get_samples``, ``summary``, ``diagnostics``. `to_arviz`, `Predictive` and
    `arviz.from_pyro` take it as they take an `MCMC` run. Discrete latent variables are summed out.

    Each chain has a process of its own, with one thread of torch, where there are cores and processes can be forked (not on
    Windows or macOS, nor after CUDA was used). Otherwise the chains run one after another. Draws follow `pyro.set_rng_seed`. If
    torch uses one thread anyway, they do not depend on the number of processes.

    The extra ``nuts`` is needed: ``pip install 'pyro-genmodels[nuts]'``.

    Args:
        model: function with Pyro statements.
        num_chains: number of chains.
        num_warmup: number of draws of each chain during which step size and mass matrix adapt. They are kept apart.
        num_samples: number of draws of each chain after these.
        target_accept_prob: mean acceptance probability that the step size adapts to. A larger one makes smaller steps, which
            helps against divergences.
        max_tree_depth: largest number of doublings of a trajectory.
        low_rank: True for a mass matrix that also adapts to some correlations between variables. It is diagonal otherwise.
        init: initial values: a strategy of Pyro's, such as `init_to_median`; values by name; or a fit: an `SVI` or a pair
            (model, guide), whose guide is sampled, or an earlier run with draws.
        mode: how the model is captured, such as `Compiled` or `Captured`; `Eager` runs it anew for each gradient. None chooses.
        num_processes: largest number of processes. None uses all cores where processes can be forked; 1 forks none.
        progress: True for a progress bar.

    Raises:
        TypeError: if the model is a kernel or run of Pyro's, the mode is not one, or an option is unknown.
        ValueError: if a count is not positive, or a probability not between 0 and 1.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> from pyro_genmodels.infer.compiled.modes import Eager
        >>> nuts = CompiledNUTS(model, num_chains=2, num_warmup=20, num_samples=10, mode=Eager(), progress=False)
        >>> nuts.run(torch.tensor([1.0, 2.0, 3.0]))
        >>> nuts.get_samples(group_by_chain=True)["loc"].shape
        torch.Size([2, 10])
        >>> nuts.statistics["tree_depth"].shape
        (2, 10)
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_chains: int = 4,
        num_warmup: int = 500,
        num_samples: int = 1000,
        target_accept_prob: float = 0.8,
        max_tree_depth: int = 10,
        low_rank: bool = False,
        init: Any = init_to_uniform,
        mode: Mode | None = None,
        num_processes: int | None = None,
        progress: bool = True,
        **unknown: Any,
    ) -> None:
        _check_options(model, unknown)
        check_mode("CompiledNUTS", mode)
        check_positive_int("CompiledNUTS", num_chains=num_chains)
        if num_processes is not None:
            check_positive_int("CompiledNUTS", num_processes=num_processes)
        self.settings = NutsSettings(num_warmup, num_samples, target_accept_prob, max_tree_depth, low_rank)
        super().__init__(_Kernel(model), num_chains, num_samples, num_warmup)
        self.model, self.init, self.mode, self.num_processes, self.progress = model, init, mode, num_processes, progress
        self._statistics: dict[str, np.ndarray] = {}
        self._z: Tensor | None = None
        self._density: LogDensity | None = None

    def __repr__(self) -> str:
        """Return the numbers of chains and draws, and whether they have run."""
        draws = f"{self.num_chains} chains of {self.warmup_steps} + {self.num_samples} draws"
        return f"CompiledNUTS({getattr(self.model, '__name__', type(self.model).__name__)}: {draws}, {self._state()})"

    def _state(self) -> str:
        """Return what is known of the draws."""
        if self._density is None:
            return "not run"
        return f"run over {self._density.dim} coordinates, with {self.statistics['diverging'].sum()} divergences"

    @poutine.block
    def run(self, *args: Any, **kwargs: Any) -> None:
        """Capture the model with these arguments, and run the chains from new initial values.

        The captured density is compared with the model at the start and the last draw of each chain. Handlers around the call
        have no effect, as around Pyro's `MCMC`, and plates are refused. Put them around the model.

        Coordinates that the model says nothing about, such as those of ``y_unobserved`` where ``obs_mask`` is True, are drawn
        from a standard normal distribution in unconstrained coordinates, which is part of ``lp`` and ``energy`` then.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.

        Raises:
            ImportError: if nutpie is not installed.
            ValueError: as `log_density` does; or if the model has no continuous latent variable, no initial point has a finite
                density, or processes are wanted that cannot be forked here.
            CaptureError: if the model cannot be captured.
            StaleGraphError: if the captured density differs from the model's.
        """
        import_nutpie()
        self._processes()  # or an error, before the model runs
        self.run_on(LogDensity(self.model, args, kwargs, self.mode))

    @poutine.block
    def run_on(self, density: LogDensity) -> None:
        """Run the chains over a log density of the model, from new initial values.

        The density keeps its captured graph. So a second run, after data were changed in place, captures nothing.

        Args:
            density: the log density. If the model says nothing about some coordinates, it gets a standard normal distribution
                of these.

        Raises:
            ImportError: see `run`.
            ValueError: see `run`.
            CaptureError: see `run`.
            StaleGraphError: see `run`.
        """
        import_nutpie()
        num_processes = self._processes()
        if not density.dim:
            raise ValueError("The model has no continuous latent variable, so there is nothing to sample.")
        with _one_thread() if num_processes > 1 else nullcontext():
            starts = density.prepare_starts(in_doubles(density.initial_points(self.num_chains, init=self.init)))
            captured = density.captured(starts[0])
            function = captured.native(starts[0]) or captured
        density.audit(function, starts)
        seeds = torch.randint(2**31, (self.num_chains,)).tolist()
        tasks = [partial(sample_chain, function, start, self.settings, seed) for start, seed in zip(starts, seeds, strict=True)]
        total = self.num_chains * (self.warmup_steps + self.num_samples)
        with tqdm(total=total, desc="NUTS", unit="draw", disable=not self.progress) as bar:
            run = run_in_turn if num_processes == 1 else partial(run_forked, num_processes=num_processes)
            chains: list[ChainDraws] = run(tasks, report=bar.update)
        self._density = None
        self._z = torch.from_numpy(np.stack([chain.z for chain in chains])).to(density.device)
        self._statistics = {name: np.stack([chain.statistics[name] for chain in chains]) for name in chains[0].statistics}
        density.audit(function, self._z[:, -1])
        density.check_flat(self._z[:, self.warmup_steps :: max(1, self.num_samples // CHECKED)].flatten(0, 1))
        self._density = density
        self.keep(density.constrain(self._z[:, self.warmup_steps :]), self.statistics, density.args, density.kwargs)

    @property
    def statistics(self) -> dict[str, np.ndarray]:
        """Statistics of each draw by ArviZ's names, (chain, draw).

        They are ``energy`` and ``lp`` (nats, in unconstrained coordinates), ``acceptance_rate``, ``step_size``, ``tree_depth``,
        ``n_steps`` (the number of gradients) and ``diverging``.
        """
        return {name: values[:, self.warmup_steps :] for name, values in self._statistics.items()}

    @property
    def warmup_statistics(self) -> dict[str, np.ndarray]:
        """Statistics of each draw of the warm-up, (chain, num_warmup)."""
        return {name: values[:, : self.warmup_steps] for name, values in self._statistics.items()}

    @property
    def warmup_samples(self) -> dict[str, Tensor]:
        """Draws of each variable during the warm-up, (chain, num_warmup, ...). They are not from the posterior.

        Raises:
            ValueError: if the chains have not run.
        """
        self._drawn()
        return self._density.constrain(self._z[:, : self.warmup_steps])  # type: ignore[union-attr, index]

    def _processes(self) -> int:
        """Return the number of processes to use.

        Raises:
            ValueError: if several are wanted and cannot be forked.
        """
        wanted = self.num_processes
        if not can_fork() and (wanted or 1) > 1:
            raise ValueError(
                f"CompiledNUTS cannot fork {wanted} processes: not on Windows or macOS, after CUDA was used, or inside of a "
                "worker. Leave num_processes out, and the chains run one after another."
            )
        return min(self.num_chains, wanted or available_cores()) if can_fork() else 1


def _check_options(model: Any, unknown: dict[str, Any]) -> None:
    """Check that a model is no kernel, and that there are no unknown options.

    Raises:
        TypeError: with what to write.
    """
    if isinstance(model, MCMCKernel | MCMC):
        raise TypeError(
            f"CompiledNUTS wants the model itself, but found {type_with_article(model)}: write CompiledNUTS(model, ...) in "
            "place of MCMC(NUTS(model), ...)."
        )
    for name in unknown:
        instead = f": write {OPTIONS[name]} in its place" if name in OPTIONS else ""
        raise TypeError(f"CompiledNUTS has no option {name!r}{instead}.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread of torch, also in code that is compiled: a forked process has none of the others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
