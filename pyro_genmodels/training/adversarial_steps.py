"""One step of adversarial training: of a generator and of its critic, by two optimisers."""

from __future__ import annotations

__all__ = ["AdversarialStep"]

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from pyro_genmodels._pyro import traces
from pyro_genmodels.divergences import EnergyKernel, mmd
from pyro_genmodels.infer.adversarial import Adversarial, LostGameError
from pyro_genmodels.infer.adversarial.inputs import draw_observations
from pyro_genmodels.infer.compiled import CaptureError, Compiled, Eager, Mode, StaleGraphError
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.base_step import Step, mean_loss
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.gradients import automatic_mode, is_well_known, warn_of_stale_graph

MIN_SAMPLES = 900
"""Number of samples from which on the distance from held-out data depends little on chance."""
MAX_PASSES = 10
"""Largest number of passes over the held-out rows in which they are drawn."""


class AdversarialStep(Step):
    """Training steps of a generator and its critic.

    Args:
        trainer: the adversarial training, of the fit's model.
        model: the fit's model.
        guide: the fit's guide.
        batches: the data.
        chooses_mode: True if the mode of the training is chosen by the number of steps to come, for a family on a CPU.

    Attributes:
        objective: the adversarial loss.
        parameters: trained parameters of both by name; those of the critic begin with ``critic.``.
        optimiser: both optimisers as one.
        excluded: names of the critic's parameters, if the critic does not belong to the fit.
        extra_modules: the critic, if it does not belong to the fit.
        wants_average: True: the generator's parameters circle around their optimum.
        smallest_loss: usual size of a loss that is 0 at first.
    """

    validates_row_by_row = False

    def __init__(
        self,
        trainer: Adversarial,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        batches: Batches,
        *,
        chooses_mode: bool,
    ) -> None:
        fit_modules = {m for module in traces.modules_of(model, guide) for m in module.modules()}
        if fit_modules and not fit_modules.intersection(traces.modules_of(trainer.model, trainer.guide)):
            raise ValueError("The objective is an Adversarial of another model than this fit: build it of fit.model.")
        super().__init__(trainer.model, batches.rows)
        self.trainer, self.objective = trainer, trainer.loss
        self._with_first_batch(batches, lambda batch: trainer.prepare(*batch.args, **self._kwargs(batch, self.rows)))
        critic = {f"critic.{name}": p for name, p in trainer.parameters["critic"].items()}
        self.parameters = {**trainer.parameters["generator"], **critic}
        self.optimiser: Any = _TwoOptimizers(list(trainer.optimisers.values()))
        owns_critic = trainer.critic in fit_modules
        self.excluded = () if owns_critic else tuple(critic)
        self.extra_modules: list[nn.Module] = [] if owns_critic else [trainer.critic]
        self.wants_average = True
        self.smallest_loss = 1.0
        self._is_reported = False
        self._chooses_mode = chooses_mode and is_well_known(model, guide, self.parameters.values())

    @property
    def units(self) -> dict[str, str]:
        """Units of the losses, by column of the history."""
        valid = "squared energy distance" if self._compares_samples else "adversarial loss"
        return {"train": "adversarial loss", "critic": "adversarial loss", "valid": valid}

    @property
    def _compares_samples(self) -> bool:
        return self.trainer.pairing.compares_data and self.trainer.extra_loss is None

    @property
    def mode(self) -> Mode:
        return self.trainer.mode

    def plan(self, num_steps: int, report: Callable[[str], None]) -> None:
        if self._chooses_mode and self.trainer.steps and not self.mode.captures:
            self.trainer.mode = automatic_mode(num_steps)
        if self.mode.captures and not self._is_reported:
            report("compiling" if isinstance(self.mode, Compiled) else "capturing")
            self._is_reported = True

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """Take one step of each, and return the loss of the generator as "train" and of the critic as "critic".

        Raises:
            FloatingPointError: if a loss or gradient is not finite, or the data are not.
        """
        try:
            losses = self._losses(batch)
        except (LostGameError, ValueError) as error:
            if found := batch.nonfinite_rows():
                raise FloatingPointError(f"the loss is nan at step {number}: {found}") from error
            raise
        return {"train": losses["generator"], "critic": losses["critic"]}

    def _losses(self, batch: Batch) -> dict[str, float]:
        """Take one step of each. What a graph cannot do, an eager step can, unless a graph was asked for."""
        kwargs = self._kwargs(batch, self.rows)
        try:
            return self.trainer.step(*batch.args, **kwargs)
        except (CaptureError, NotImplementedError, StaleGraphError) as error:
            if not (self._chooses_mode and self.mode.captures):
                raise
            warn_of_stale_graph(error)
        self._chooses_mode, self.trainer.mode = False, Eager()
        return self.trainer.step(*batch.args, **kwargs)

    def loss(self, batch: Batch) -> float:
        """Return the loss of the generator on a batch, without a step."""
        return self.trainer.evaluate_loss(*batch.args, **self._kwargs(batch, self.rows))["generator"]

    @torch.no_grad()
    def validate(self, held_out: Batches) -> float:
        """Return the squared energy distance of samples from held-out data, if the critic compares samples with data.

        Integers are compared after rounding, which can move samples far that the critic cannot tell from data. Samples are
        drawn for few held-out rows several times, since few samples would make the distance noisy.

        Otherwise return the loss of the generator by the present critic.
        """
        try:
            return self._validation_loss(held_out)
        except ValueError:  # of a loader's rows that are not finite
            if any(batch.nonfinite_rows() for batch in held_out.in_order()):
                return float("nan")
            raise

    def _validation_loss(self, held_out: Batches) -> float:
        trainer = self.trainer
        runs = [(batch.args, self._kwargs(batch, held_out.rows), batch.rows) for batch in held_out.in_order()]
        if not self._compares_samples:
            return mean_loss([(trainer.evaluate_loss(*args, **kwargs)["generator"], rows) for args, kwargs, rows in runs])
        passes = min(ceil(MIN_SAMPLES / sum(rows for *_, rows in runs)), MAX_PASSES)
        drawn = [
            draw_observations(trainer.model, args, kwargs, rounded=True) for _ in range(passes) for args, kwargs, _ in runs
        ]
        real, fake = torch.cat([run.real for run in drawn[: len(runs)]]), torch.cat([run.fake for run in drawn])
        return mmd(real, fake, kernel=EnergyKernel()).value.item() if fake.isfinite().all() else float("nan")


class _TwoOptimizers:
    """Two optimisers whose state is saved and loaded as that of one."""

    def __init__(self, optimisers: list[Optimizer]) -> None:
        self.optimisers = optimisers

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both, with the second's parameters numbered after the first's."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimiser in self.optimisers:
            first = sum(len(group["params"]) for group in groups)
            own = optimiser.state_dict()
            state |= {first + i: values for i, values in own["state"].items()}
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in own["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned."""
        groups, first = list(state["param_groups"]), 0
        for optimiser in self.optimisers:
            own, groups = groups[: len(optimiser.param_groups)], groups[len(optimiser.param_groups) :]
            count = sum(len(group["params"]) for group in own)
            optimiser.load_state_dict(
                {
                    "state": {i - first: v for i, v in state["state"].items() if first <= i < first + count},
                    "param_groups": [{**group, "params": [i - first for i in group["params"]]} for group in own],
                }
            )
            first += count
