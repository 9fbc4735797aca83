r"""The base of learned likelihoods and likelihood ratios, which take the place of the likelihood for chains of the posterior.

The posterior is the prior times the likelihood, of which a constant factor does not matter:

.. math:: p(z \mid x_1, \dots, x_n) \propto p(z) \prod_i p(x_i \mid z) \propto p(z) \prod_i \frac{p(x_i \mid z)}{p(x_i)}.
"""

from __future__ import annotations

__all__ = ["Surrogate"]

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_genmodels.posteriors.choose import posterior
from pyro_genmodels.posteriors.fits import NUM_SAMPLES, Posterior
from pyro_genmodels.posteriors.method import Method
from pyro_genmodels.posteriors.simulation_trained import SimulationTrained
from pyro_genmodels.utils.errors import check_positive_int
from pyro_genmodels.utils.parallel import run_values, seeded, spawn_seeds


class Surrogate(SimulationTrained):
    """Base class of a learned function of latent variables and observations that takes the place of the likelihood."""

    def __repr__(self) -> str:
        """Return the names, the number of simulations, and if it has been trained."""
        names = f"{', '.join(self.simulator.observed)} given {', '.join(self.simulator.coordinates.names)}"
        state = f"{len(self._made)} simulations, {'not ' if self._trained is None else ''}trained"
        return f"<{type(self).__name__} of {names}: {state}>"

    def given(self, *, method: Method | None = None, progress: bool = True, **observations: Any) -> Posterior:
        """Return the posterior given observations: a fit, by Markov chains if no other method is named.

        Args:
            method: how the posterior is drawn from the prior and what was learned; None chooses as `posterior` does, which is
                `NoUTurn` where the extra ``nuts`` is installed. A learned density is hundreds of operations, which take half a
                minute to compile, and then a tenth of the time; torch keeps the compiled code on disk for other observations.
            progress: True for progress bars.
            observations: value of each observed site, by name, in the shape of the simulations; or several independent ones of
                the same latent variables, (observation, ...).

        Raises:
            ValueError: if nothing has been trained, a name or shape is wrong, or an observation is not finite.
        """
        if self._trained is None:
            raise ValueError(f"This {type(self).__name__} has not been trained: call its train(num_simulations=...) first.")
        with torch.no_grad():
            prepared = self._prepared(self._trained, self._checked(observations, batch=None))
        model = _SurrogateModel(self, self._trained, prepared)
        return posterior(model, method=method, progress=progress)

    def samples_given(
        self, num_samples: int = NUM_SAMPLES, *, method: Method | None = None, n_jobs: int = 1, **observations: Any
    ) -> dict[str, Tensor]:
        """Return draws given each of many observations, one fit after another, (draw, observation, ...) by name.

        Args:
            num_samples: number of draws for each.
            method: see `given`.
            n_jobs: number of processes; the extra ``parallel`` runs more than one, by joblib. Draws do not depend on it.
            observations: values of each observed site, (observation, ...) by name.

        Raises:
            ValueError: as `given`.
        """
        check_positive_int("samples_given", num_samples=num_samples)
        rows = self._checked(observations, batch=True)
        number = len(next(iter(rows.values())))
        task = _RowFits(self, method, rows, num_samples, spawn_seeds(None, number))
        draws = run_values(task, range(number), n_jobs=n_jobs, progress=False, description="observations")
        return {name: torch.stack([part[name] for part in draws], 1) for name in self.simulator.coordinates.names}

    @abstractmethod
    def _prepared(self, trained: Any, values: Mapping[str, Tensor]) -> Tensor:
        """Return what `_observe` needs of observations, (n, ...) by name, as vectors, (n, numbers)."""

    @abstractmethod
    def _observe(self, trained: Any, z: Tensor, prepared: Tensor) -> None:
        """Make the statements of Pyro by which coordinates z, (..., dim), explain observations.

        Args:
            trained: the learned function.
            z: the coordinates.
            prepared: what `_prepared` made of the observations, (n, numbers).
        """


@dataclass(frozen=True)
class _RowFits:
    """Draws given each of many observations, from a seed each.

    Attributes:
        surrogate: what was learned.
        method: how the posterior is drawn.
        rows: the observations, (observation, ...) by name.
        num_samples: number of draws for each.
        seeds: a seed for each.
    """

    surrogate: Surrogate
    method: Method | None
    rows: Mapping[str, Tensor]
    num_samples: int
    seeds: Sequence[int]

    def __call__(self, i: int) -> dict[str, Tensor]:
        """Return draws given observation i, (draw, ...) by name."""
        with seeded(self.seeds[i]):
            fit = self.surrogate.given(method=self.method, progress=False, **{name: x[i] for name, x in self.rows.items()})
            return fit.get_samples(self.num_samples)


class _SurrogateModel:
    """The prior of a simulator with a learned function in place of its likelihood, as a model.

    Args:
        surrogate: what makes the statements about the observations.
        trained: the learned function.
        prepared: what the surrogate needs of the observations, (n, numbers).
    """

    def __init__(self, surrogate: Surrogate, trained: nn.Module, prepared: Tensor) -> None:
        self.surrogate, self.trained, self.prepared = surrogate, trained, prepared

    def __call__(self) -> None:
        simulator = self.surrogate.simulator
        z = simulator.coordinates.unconstrain(poutine.block(simulator.run_latents, hide=simulator.observed)())
        self.surrogate._observe(self.trained, z.to(torch.get_default_dtype()), self.prepared)
