"""A base for runs of Markov chains that do not come from Pyro's kernels, for use wherever Pyro's `MCMC` is taken.

Readers of an `MCMC` run, such as `to_arviz` and `arviz.from_pyro`, ask for its private attributes too.
"""

from __future__ import annotations

__all__ = ["ChainRun"]

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pyro.infer.mcmc.api import AbstractMCMC
from pyro.infer.mcmc.util import diagnostics, print_summary, select_samples
from torch import Tensor

from pyro_genmodels._pyro.kernels import _KEY


class ChainRun(AbstractMCMC):
    """A run of Markov chains with the results, and the ways to ask for them, of Pyro's `MCMC`.

    Args:
        kernel: an object with the attribute ``model``.
        num_chains: number of chains.
        num_samples: number of draws of each chain.
        warmup_steps: number of draws of each chain before these, which are not used.
    """

    def __init__(self, kernel: Any, num_chains: int, num_samples: int, warmup_steps: int) -> None:
        super().__init__(kernel, num_chains, {})
        self.num_samples, self.warmup_steps = num_samples, warmup_steps
        self._samples: dict[str, Tensor] | None = None
        self._args: tuple = ()
        self._kwargs: Mapping[str, Any] = {}
        self._diagnostics: Sequence[Mapping[str, Any]] = [{}] * num_chains

    def keep(
        self, samples: dict[str, Tensor], statistics: Mapping[str, np.ndarray], args: tuple, kwargs: Mapping[str, Any]
    ) -> None:
        """Keep the results of a run.

        Args:
            samples: draws of each variable, (chain, draw, ...).
            statistics: statistics of each draw, (chain, draw), among them ``diverging`` and ``acceptance_rate``.
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.
        """
        self._samples, self._args, self._kwargs = samples, args, kwargs
        self._diagnostics = [
            {
                "divergences": np.flatnonzero(statistics["diverging"][chain]).tolist(),
                "acceptance rate": float(statistics["acceptance_rate"][chain].mean()),
                _KEY: {name: values[chain] for name, values in statistics.items()},
            }
            for chain in range(self.num_chains)
        ]

    def get_samples(self, num_samples: int | None = None, group_by_chain: bool = False) -> dict[str, Tensor]:  # noqa: FBT001, FBT002 - as in Pyro
        """Return the draws of each variable, (draw, ...), or (chain, draw, ...) if they are grouped by chain.

        Args:
            num_samples: number of draws to choose at random, with replacement; None returns all.
            group_by_chain: True to keep the chains apart.

        Raises:
            ValueError: if the chains have not run.
        """
        return select_samples(self._drawn(), num_samples, group_by_chain)

    def diagnostics(self) -> dict[str, Any]:
        """Return, for each variable, its effective sample size ``n_eff`` and ``r_hat``; and what is known of each chain.

        Raises:
            ValueError: if the chains have not run.
        """
        found: dict[str, Any] = diagnostics(self._drawn())
        for name in self._diagnostics[0]:
            found[name] = {f"chain {i}": chain[name] for i, chain in enumerate(self._diagnostics)}
        return found

    def summary(self, prob: float = 0.9) -> None:
        """Print a table with mean, deviation, median, credible interval, ``n_eff`` and ``r_hat``, and the divergences.

        Args:
            prob: probability of the credible interval.

        Raises:
            ValueError: if the chains have not run.
        """
        print_summary(self._drawn(), prob=prob)
        print(f"Number of divergences: {sum(len(chain['divergences']) for chain in self._diagnostics)}")

    def _drawn(self) -> dict[str, Tensor]:
        """Return the draws, (chain, draw, ...)."""
        if self._samples is None:
            raise ValueError(f"This {type(self).__name__} has not been run. Call its .run(...) first.")
        return self._samples
