"""Training on simulations of a model: the part that amortised posteriors, likelihoods and ratios share."""

from __future__ import annotations

__all__ = ["SimulationTrained", "report_failures"]

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from pyro_genmodels.posteriors.conditional import Training, train_conditional
from pyro_genmodels.posteriors.embeddings import Embedding
from pyro_genmodels.posteriors.simulations import SimulatedModel, Simulations
from pyro_genmodels.utils.errors import check_positive_int, listed, warn_caller
from pyro_genmodels.utils.tensors import as_tensor

MIN_SIMULATIONS = 20
"""Smallest number of simulations to train on."""
MAX_BEYOND = 0.1
"""Distance from the range of the simulations, in units of it, from which observations are unlike them."""
SHAPES = {
    False: "in the shape of the simulations, {}",
    True: "(observation, ...) of the shape {}",
    None: "in the shape of the simulations, {}, or (observation, ...) of it",
}
"""Words for the shapes of one observation, of several, and of either."""


class SimulationTrained(ABC):
    """Base class of what is trained on simulations of a model.

    Args:
        model: function with Pyro statements.
        args: its positional arguments.
        kwargs: its keyword arguments.
        observed: names of the sites that are observed.
        simulations: simulations that were made before, (simulation, ...) by name; None if there are none.

    Attributes:
        simulator: the model, as a simulator.
        simulations: all simulations so far, (simulation, ...) by name.
        failures: number of simulations that were left out, by the reason.
        history: loss of held-out simulations after each epoch of the last training.
        seconds: seconds of simulation and training.
    """

    _embeddings: Mapping[str, Any] = MappingProxyType({})
    _trained: nn.Module | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple,
        kwargs: Mapping[str, Any],
        observed: Sequence[str],
        simulations: Mapping[str, Any] | None,
    ) -> None:
        if isinstance(observed, str) or not observed:
            raise TypeError(f'{type(self).__name__} wants observed as names, such as observed=["x"], but found {observed!r}.')
        self.simulator = SimulatedModel(model, args, kwargs, observed)
        self.history: list[float] = []
        self.seconds = 0.0
        self._made = Simulations({}, Counter()) if simulations is None else self.simulator.from_table(simulations)
        report_failures(self._made)

    @property
    def simulations(self) -> dict[str, Tensor]:
        return {name: self._made.values[name] for name in self._names} if len(self._made) else {}

    @property
    def failures(self) -> Counter[str]:
        return self._made.failures

    @property
    def _names(self) -> list[str]:
        return [*self.simulator.coordinates.names, *self.simulator.observed]

    @abstractmethod
    def _task(self) -> tuple[nn.Module, Callable[[Any], Any], Tensor, Tensor]:
        """Return a module to train, its loss, and the rows and contexts to train it on, as `train_conditional` takes them."""

    def _fit(self, options: Training) -> None:
        """Train on the simulations. What an interrupted training came to is kept."""
        module, objective, rows, contexts = self._task()
        history: list[float] = []
        try:
            train_conditional(module, objective, rows, contexts, options, history)
        finally:
            if any(map(isfinite, history)):
                self.history, self._trained = history, module.eval().requires_grad_(False)

    def _pairs(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return unconstrained coordinates, (simulation, dim), and the observations that belong to them, by name."""
        values = self._made.values
        z = self.simulator.coordinates.unconstrain(values).to(torch.get_default_dtype())
        finite = z.isfinite().all(1)  # a value that was rounded to the end of its support has no coordinates
        return z[finite], {name: values[name][finite] for name in self.simulator.observed}

    def _checked(self, observations: Mapping[str, Any], *, batch: bool | None) -> dict[str, Tensor]:
        """Return observations as tensors, (observation, ...) by name.

        Args:
            observations: values of each observed site, by name.
            batch: True for several observations, (observation, ...), False for one, None for either.

        Raises:
            ValueError: if a name or shape is wrong, or values are not finite that may not be missing.
        """
        wanted = {name: tuple(self.simulator.shapes[name]) for name in self.simulator.observed}
        if set(observations) != set(wanted):
            raise ValueError(
                f"{type(self).__name__} wants the observations {listed(wanted)} by name, but found {listed(observations)}."
            )
        found = {}
        for name, shape in wanted.items():
            x = as_tensor(observations[name], f"given({name}=)", floats=torch.get_default_dtype())
            choice = self._embeddings.get(name)
            if not (x.dim() > len(shape) if batch is None else batch):
                x = (choice.completed(x, torch.Size(shape)) if isinstance(choice, Embedding) else x)[None]
            if x.shape[1:] != shape or x.dim() != len(shape) + 1 or not len(x):
                raise ValueError(
                    f"{name!r} is wanted {SHAPES[batch].format(shape)}, but found {tuple(x.shape if batch else x.shape[1:])}. "
                    "Other numbers of rows need embedding=SetEmbedding(min_rows=...)."
                )
            takes_missing = isinstance(choice, Embedding) and choice.takes_missing
            if bool(x.isinf().any()) or (bool(x.isnan().any()) and not takes_missing):
                raise ValueError(
                    f"{name!r} has NaN or infinite values. Missing ones need embedding=DenseEmbedding(missing=...) of "
                    "AmortizedPosterior or AmortizedRatio, by which training knows of them."
                )
            found[name] = x
        if len(set((numbers := {name: len(x) for name, x in found.items()}).values())) > 1:
            raise ValueError(f"As many observations of each site are wanted, but found {numbers}.")
        for name, x in found.items() if len(self._made) and not batch else ():
            self._check_likeness(name, x)
        return found

    def _check_likeness(self, name: str, x: Tensor) -> None:
        """Compare observations with the simulations, (simulation, ...).

        Raises:
            ValueError: if all simulations are whole numbers, and the observations are not.

        Warns:
            RuntimeWarning: if observations are far outside of the range of the simulations, or of a sign that none of them has.
        """
        made = self._made.values[name].to(x.dtype)
        known = x[~x.isnan()]
        if bool((made == made.round()).all()) and not bool((known == known.round()).all()):
            raise ValueError(f"All simulations of {name!r} are whole numbers, but observations are not.")
        low, high = made.amin(0), made.amax(0)
        margin = MAX_BEYOND * (high - low)
        beyond = (x < low - margin) | (x > high + margin) | ((x < 0) & (low >= 0)) | ((x > 0) & (high <= 0))
        if bool(beyond.any()):
            number = int(beyond.reshape(len(x), -1).any(1).sum())
            warn_caller(
                f"{number} of {len(x)} observations of {name!r} are outside of the range of the {len(made)} simulations, where "
                "what was learned is a guess: look whether the model can make such data, or widen its prior."
            )

    def simulate(self, num_simulations: int, *, parallel: bool | None = None, n_jobs: int = 1, progress: bool = True) -> Self:
        """Add simulations, and return self. Those that fail or return NaN are left out and counted.

        The random numbers follow from Pyro's seed, and do not depend on the number of processes.

        Args:
            num_simulations: how many.
            parallel: True to make many in one run, in a plate, which the model must allow. None finds out if it does.
            n_jobs: number of processes, as joblib takes it; useful for a simulator that is slow.
            progress: True for a progress bar.

        Warns:
            RuntimeWarning: if simulations were left out.

        Raises:
            ValueError: if all of them failed.
            KeyboardInterrupt: at Ctrl-C. Simulations that were made before are kept.
        """
        check_positive_int("simulate", num_simulations=num_simulations)
        self._simulate(num_simulations, None, parallel=parallel, n_jobs=n_jobs, progress=progress)
        return self

    def _simulate(self, number: int, latents: Mapping[str, Tensor] | None, **options: Any) -> None:
        """Add simulations, with `latents` or from the prior, also those that were made before an interruption."""
        parts: list[Simulations] = []
        try:
            for part in self.simulator.simulate(number, latents, **options):
                parts.append(part)
        except KeyboardInterrupt as interrupt:
            made = Simulations.joined(parts)
            self._add(made)
            raise KeyboardInterrupt(
                f"Simulation was interrupted. {len(made)} of {number} are kept, and train() makes those that are missing only."
            ) from interrupt
        made = Simulations.joined(parts)
        report_failures(made, number)
        self._add(made)

    def _add(self, made: Simulations) -> None:
        if not len(made):
            return
        made = Simulations({name: made.values[name] for name in self._names}, made.failures)
        self._made = Simulations.joined([self._made, made])

    def train(
        self,
        num_simulations: int = 10_000,
        *,
        max_epochs: int = 1000,
        batch_size: int = 100,
        step_size: float = 1e-3,
        patience: int = 20,
        parallel: bool | None = None,
        n_jobs: int = 1,
        progress: bool = True,
    ) -> Self:
        """Train on simulations until the loss of held-out ones stops to fall, and return self.

        A second call goes on from the parameters of the first. Fits that were made before do not change.

        Args:
            num_simulations: number of simulations to train on. Those that are there are used, also if there are more, and only
                the missing ones are made.
            max_epochs: largest number of passes through the simulations.
            batch_size: number of simulations per step.
            step_size: step size of Adam.
            patience: number of epochs without a smaller loss of held-out simulations after which training stops.
            parallel: see `simulate`.
            n_jobs: see `simulate`.
            progress: True for progress bars.

        Raises:
            ValueError: if all simulations failed, or fewer than 20 are there.
            KeyboardInterrupt: at Ctrl-C. Simulations and the parameters of the best epoch are kept.
        """
        check_positive_int(
            "train",
            num_simulations=num_simulations,
            max_epochs=max_epochs,
            batch_size=batch_size,
            patience=patience,
        )
        if not 0 < step_size < float("inf"):
            raise ValueError(f"train wants a positive step_size, but found {step_size!r}.")
        start = time.perf_counter()
        if (lacking := num_simulations - len(self._made)) > 0:
            self.simulate(lacking, parallel=parallel, n_jobs=n_jobs, progress=progress)
        if len(self._made) < MIN_SIMULATIONS:
            raise ValueError(f"Training wants {MIN_SIMULATIONS} simulations or more, but there are {len(self._made)}.")
        try:
            self._fit(Training(max_epochs, batch_size, step_size, patience, progress))
        except KeyboardInterrupt as interrupt:
            kept = "No epoch had ended" if self._trained is None else "Parameters of the best epoch are kept"
            raise KeyboardInterrupt(f"Training was interrupted. {kept}, and train() goes on from there.") from interrupt
        finally:
            self.seconds += time.perf_counter() - start
        return self


def report_failures(made: Simulations, number: int | None = None) -> None:
    """Warn of simulations that were left out.

    Raises:
        ValueError: if all were.
    """
    if not made.failures:
        return
    lost = made.failures.total()
    reasons = ", ".join(f"{count} with {reason}" for reason, count in made.failures.most_common(3))
    if not len(made):
        raise ValueError(f"All {lost} simulations failed: {reasons}.")
    warn_caller(f"{lost} of {number or lost + len(made)} simulations were left out: {reasons}.")
