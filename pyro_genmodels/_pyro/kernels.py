r"""Statistics of each transition of Pyro's HMC and NUTS, which Pyro computes and does not keep.

A transition begins at q with a new momentum p. Its energy is

.. math:: E = U(q) + K(p), \qquad U = -\log \pi(q), \quad K = |p|^2 / 2,

in unconstrained coordinates. Chains whose energies change little from one transition to the next explore the tails slowly
(Betancourt, *Diagnosing Suboptimal Cotangent Disintegrations in Hamiltonian Monte Carlo*, arXiv 1604.00695).
"""

from __future__ import annotations

__all__ = ["NOT_RECORDED", "arguments_of_run", "has_not_run", "record_statistics", "recorded_statistics"]

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pyro.infer import HMC
from pyro.poutine.messenger import Messenger

from pyro_genmodels.utils.precision import in_doubles

_KEY = "statistics"

NOT_RECORDED = (
    "energy, lp, acceptance_rate, step_size, tree_depth: Pyro's kernels do not keep them. For plot_energy and bfmi sample with "
    "MCMC(record_statistics(NUTS(model)), ...), from pyro_genmodels.inference_data"
)
"""Note on a run whose kernel has not recorded its statistics."""


def record_statistics(kernel: HMC) -> HMC:
    """Make a kernel keep statistics of its transitions, which `to_arviz` puts into ``sample_stats``, and return it.

    These are ``energy`` and ``lp`` (nats, in unconstrained coordinates), ``acceptance_rate``, ``step_size`` and for NUTS
    ``tree_depth``. They come back from chains in other processes too.

    Args:
        kernel: `pyro.infer.NUTS` or `pyro.infer.HMC`, before it has run.

    Raises:
        TypeError: if it is another kernel.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro_genmodels import to_arviz
        >>> kernel = record_statistics(NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))
        >>> mcmc = MCMC(kernel, num_samples=4, warmup_steps=4, disable_progbar=True)
        >>> mcmc.run()
        >>> to_arviz(mcmc).sample_stats["energy"].shape
        (1, 4)
    """
    if not isinstance(kernel, HMC):
        raise TypeError(f"record_statistics wants pyro.infer.NUTS or HMC, but found {type(kernel).__name__}.")
    recorder = _Recorder(kernel)
    kernel.sample, kernel.diagnostics = recorder.sample, recorder.diagnostics  # type: ignore[method-assign]
    return kernel


def recorded_statistics(mcmc: Any) -> dict[str, np.ndarray] | None:
    """Return the statistics of all chains of a run, (chains, draws) each, or None if its kernel has kept none."""
    chains = [diagnostics.get(_KEY) for diagnostics in getattr(mcmc, "_diagnostics", ())]
    if not chains or any(chain is None for chain in chains):
        return None
    return {name: np.stack([chain[name] for chain in chains]) for name in chains[0]}


def has_not_run(mcmc: Any) -> bool:
    """Return True for an `MCMC` whose ``run`` has not been called."""
    return getattr(mcmc, "_samples", {}) is None


def arguments_of_run(mcmc: Any) -> tuple[tuple, Mapping[str, Any]]:
    """Return the arguments of the model with which `MCMC.run` was called."""
    return tuple(getattr(mcmc, "_args", None) or ()), dict(getattr(mcmc, "_kwargs", None) or {})


class _Recorder:
    """Methods of a kernel that also keep its statistics.

    Args:
        kernel: the kernel.
    """

    def __init__(self, kernel: HMC) -> None:
        self.kernel = kernel
        self.kept: defaultdict[str, list[Any]] = defaultdict(list)

    def sample(self, params: Any) -> Any:
        """Make a transition, and keep its statistics."""
        kernel = self.kernel
        before, potential = kernel._mean_accept_prob, kernel._potential_energy_last
        with _TransitionSites() as sites:
            params = type(kernel).sample(kernel, params)
        n = kernel._t - int(kernel._warmup_steps or 0)
        if n <= 0:
            return params
        kept = {
            "energy": sites.kinetic_energy + (0.0 if potential is None else float(potential)),
            "lp": float("nan") if kernel._potential_energy_last is None else -float(kernel._potential_energy_last),
            "acceptance_rate": n * kernel._mean_accept_prob - (n - 1) * (before if n > 1 else 0.0),
            "step_size": float(kernel.step_size),
        }
        if sites.tree_depth is not None:
            kept["tree_depth"] = sites.tree_depth
        for name, value in kept.items():
            self.kept[name].append(value)
        return params

    def diagnostics(self) -> dict[str, Any]:
        """Return the kernel's own diagnostics, with the statistics of the chain that ends here."""
        chain = {name: np.array(values) for name, values in self.kept.items()}
        self.kept.clear()
        return {**type(self.kernel).diagnostics(self.kernel), _KEY: chain}


class _TransitionSites(Messenger):
    """Handler that reads the random numbers of a transition, which Pyro samples at sites.

    Attributes:
        kinetic_energy: that of the new momentum.
        tree_depth: number of doublings of NUTS, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinetic_energy = 0.0
        self.tree_depth: int | None = None

    def _pyro_post_sample(self, msg: Any) -> None:
        name = str(msg["name"])
        if name.startswith("r_t="):
            self.kinetic_energy += float(in_doubles(msg["value"]).square().sum()) / 2
        elif name.startswith("direction_t="):
            self.tree_depth = int(name.rpartition("treedepth=")[2]) + 1
