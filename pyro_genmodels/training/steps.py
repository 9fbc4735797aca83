r"""One step of training: of a Pyro loss by one optimiser, or of an adversarial loss by two.

The loss is per datum, and so is the gradient: the model's plate scales each minibatch of B out of N rows by N / B, and the sum
is divided by N here. A model that draws its minibatches itself, by a plate over all rows with ``subsample_size``, is given all
rows.
"""

from __future__ import annotations

__all__ = ["LossStep", "make_step"]

from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, Trace_MMD
from pyro.nn import PyroModule
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from pyro_genmodels._pyro import handlers, traces
from pyro_genmodels.distributions.capabilities import Capabilities, capabilities
from pyro_genmodels.distributions.energy.partition import quick_log_partition
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.infer.compiled import Mode
from pyro_genmodels.infer.compiled.losses import differentiable_loss as differentiable_form
from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import DenoisingScoreMatching
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.infer.sample_losses import SampleLoss
from pyro_genmodels.optim.adapters import make_optimizer
from pyro_genmodels.training.adversarial_steps import AdversarialStep
from pyro_genmodels.training.arguments import Batch
from pyro_genmodels.training.base_step import Step, mean_loss
from pyro_genmodels.training.batches import Batches
from pyro_genmodels.training.gradients import Gradients
from pyro_genmodels.training.options import buffers_restored
from pyro_genmodels.utils.distributions import modules_and_tensors, unwrap
from pyro_genmodels.utils.errors import warn_caller
from pyro_genmodels.utils.rng import forked_rng


def make_step(
    fit: Any, objective: Any, optim: Any, batches: Batches, clip_norm: float | None, mode: Mode | None = None
) -> LossStep | AdversarialStep:
    """Return the training step of a fit by an objective, or by the default objective of the fit if that is None.

    Raises:
        TypeError: if the objective is neither a Pyro loss nor an adversarial one.
        ValueError: if an adversarial loss lacks a critic, or has optimisers already.
    """
    model, guide = traces.as_pair(fit)
    critic, is_own = getattr(fit, "critic", None), not isinstance(objective, Adversarial)
    if objective is None and isinstance(critic, nn.Module):
        objective = Adversarial(model, critic, optim=optim, mode=mode)
    elif isinstance(objective, AdversarialLoss):
        if not isinstance(critic, nn.Module):
            raise ValueError(
                f"{type(objective).__name__} wants a critic, but this fit has none. Pass objective=Adversarial(model, critic, "
                "...)."
            )
        objective = Adversarial(model, critic, objective, optim, mode=mode)
    elif isinstance(objective, Adversarial) and (optim is not None or mode is not None):
        raise ValueError("An Adversarial has optimisers and a mode of its own: pass optim= and mode= to Adversarial(...).")
    if isinstance(objective, Adversarial):
        return AdversarialStep(objective, model, guide, batches, chooses_mode=is_own and mode is None)
    if objective is not None and not isinstance(objective, ELBO):
        found = f"the class {objective.__name__}; call it" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"objective wants a Pyro loss, an object such as MaximumLikelihood(), but found {found}.")
    return LossStep(model, guide, objective, batches, optim, clip_norm, mode)


class LossStep(Step):
    """Training steps by any Pyro loss.

    The fit is run once when the step is built, which shows its parameters, its distributions and its default objective.

    Args:
        model: the fit's model.
        guide: the fit's guide.
        objective: the loss, or None for the default of the fit.
        batches: the data.
        optim: function parameters -> torch optimiser, one of Pyro's optimisers, or None for Adam.
        clip_norm: largest norm of the gradient, or None.
        mode: how loss and gradients are computed; None for the automatic choice.

    Attributes:
        objective: the loss.
        gradients: how loss and gradients are computed.
        parameters: trained parameters by name.
        optimiser: their optimiser.
        excluded: names of parameters that belong to the objective, not to the fit.
        extra_modules: modules that do not belong to the fit.
        wants_average: True if samples take many passes through the network, which the last parameters serve badly.
        smallest_loss: usual size of a loss that is 0 at first: 1, or 0 for losses in the units of the data.
    """

    validates_row_by_row = True

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: ELBO | None,
        batches: Batches,
        optim: Any,
        clip_norm: float | None,
        mode: Mode | None,
    ) -> None:
        super().__init__(model, batches.rows)
        self.guide = guide
        self.clip_norm = inf if clip_norm is None else clip_norm
        own_modules = list(getattr(objective, "own_modules", ()))
        with buffers_restored(own_modules):  # the first run is no step
            self.objective, sites, self._unit = self._with_first_batch(batches, lambda batch: self._examine(objective, batch))
        self.distributions, self.parameters = sites.distributions, sites.trainable()
        if any(p.dtype == torch.float16 for p in self.parameters.values()):  # Adam's 1e-8 is 0 in it
            raise ValueError(
                "float16 is not for training, since small gradients vanish in it: call .float() on the model first, and "
                ".half() afterwards if you like."
            )
        self.gradients = Gradients(model, guide, self.objective, self.parameters, mode)
        self.optimiser = make_optimizer(optim, list(self.parameters.values()))
        self.excluded = getattr(self.objective, "own_parameters", ())
        self.extra_modules = own_modules
        found = map(capabilities, self.distributions)
        self.wants_average = getattr(self.objective, "wants_average", False) and any(
            c.has_noise_error or c.has_velocity for c in found
        )
        self.smallest_loss = 0.0 if isinstance(self.objective, SampleLoss) else 1.0
        self._warned, self._knows_log_partition = False, False

    @property
    def units(self) -> dict[str, str]:
        """Units of the losses, by column of the history."""
        return {"train": getattr(self.objective, "training_unit", None) or self._unit, "valid": self._unit}

    @property
    def mode(self) -> Mode:
        """Present mode of computing loss and gradients: eager, captured or compiled."""
        return self.gradients.mode

    def plan(self, num_steps: int, report: Callable[[str], None]) -> None:
        self.gradients.plan(num_steps, report)

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """Take one step.

        Args:
            batch: arguments of the model.
            number: number of the step in its epoch, for the error.

        Returns:
            The loss of the batch per datum, as "train".

        Raises:
            FloatingPointError: if the loss or its gradient is not finite.
        """
        for p in self.parameters.values():
            p.grad = None
        is_eager, self._knows_log_partition = self._knows_log_partition, False  # a graph cannot know log Z
        loss = self._loss(self.objective.loss_and_grads if is_eager else self.gradients, batch, self.rows)
        rows = self.rows if self.takes_size else batch.rows
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.div_(rows)
        norm = clip_grad_norm_(list(self.parameters.values()), self.clip_norm, foreach=True).item()
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not isfinite(value):
                advice = batch.nonfinite_rows() or "lower the learning rate, or look for outliers"
                raise FloatingPointError(f"the {name} is {value} at step {number}: {advice}")
        self.optimiser.step()
        if is_eager and self.mode.captures:
            for d in self.distributions:
                getattr(d, "log_partition", None)  # forgets log Z of other parameters
        return {"train": loss}

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch per datum, without a step."""
        with torch.no_grad():
            return self._loss(self.objective.loss, batch, self.rows)

    def differentiable_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch per datum with its graph, (). It is NaN where a distribution refuses the parameters.

        Raises:
            CaptureError: if the objective computes its gradients in another way.
        """
        return torch.as_tensor(self._loss(differentiable_form(self.objective), batch, self.rows))

    def validate(self, held_out: Batches) -> float:
        """Return the mean loss of held-out data per datum."""
        self.prepare_validation(held_out.first())
        return mean_loss([(self.validation_loss(batch, held_out.rows), batch.rows) for batch in held_out.in_order()])

    def prepare_validation(self, batch: Batch) -> None:
        """Estimate log Z of energies for the present parameters, if their losses need it, by a run on a batch."""
        if energies := [d for d in self.distributions if capabilities(d).intractable]:
            self._prepare_log_partition(energies, batch)
            self._knows_log_partition = True

    @torch.no_grad()
    def validation_loss(self, batch: Batch, rows: int) -> float:
        """Return the loss per datum of a batch of held-out data, out of this many rows."""
        return self._loss(self.objective.loss, batch, rows)

    def _examine(self, objective: Any, batch: Batch) -> tuple[Any, _Sites, str]:
        """Return the objective, the sites of a first run, and the unit of the loss, which may depend on the sites."""
        objective, sites = self._first_run(objective, batch)
        if hasattr(objective, "unit_of"):
            with handlers.side_effect_free(self.model, self.guide), forked_rng():
                return objective, sites, objective.unit_of(self._traces(batch)[0])
        unit_of_pyro = "loss" if isinstance(objective, Trace_MMD) else "nats"
        return objective, sites, getattr(objective, "unit", unit_of_pyro)

    def _first_run(self, objective: Any, batch: Batch) -> tuple[Any, _Sites]:
        """Run the fit once, or twice if its parameters show only in the loss; return the objective and the recorded sites."""
        with _Sites() as sites:
            if objective is None:
                default = _default_objective(self._traces(batch))
                if not self._hides_parameters(sites.distributions):
                    return default, sites
                objective = default
            self._call(objective.loss_and_grads, batch, self.rows)
        return objective, sites

    def _hides_parameters(self, distributions: list[Any]) -> bool:
        """Return True if scoring may show parameters that a run does not: those of Pyro modules inside a distribution."""
        ours = [d for d in distributions if isinstance(d, Capabilities)]
        modules = [part for d in ours for module in modules_and_tensors(d)[0] for part in module.modules()]
        return any(isinstance(m, PyroModule) for m in modules) or (bool(ours) and not traces.is_family(self.model))

    def _prepare_log_partition(self, energies: list[Any], batch: Batch) -> None:
        """Estimate log Z of the energies in the model, without which losses of different parameters cannot be compared."""
        if any(map(_has_one_constant, energies)):
            with pyro.validation_enabled(is_validate=False), _Sites() as sites:  # NaN will show in the loss
                self._traces(batch)
                for d in filter(_has_one_constant, sites.distributions):
                    quick_log_partition(d)
        knows_constants = isinstance(self.objective, (ContrastiveDivergence, NoiseContrastive))
        if not (knows_constants or self._warned) and any(d.context is not None for d in energies):
            self._warned = True
            warn_caller(
                "The validation losses of energies with a context lack log Z of each context, which changes with the "
                "parameters, so that early stopping cannot rely on them. Use ContrastiveDivergence(), or leave valid out.",
            )

    def _traces(self, batch: Batch) -> tuple[Trace, Trace]:
        """Run model and guide once without gradients, and return their traces."""
        with torch.no_grad():
            return traces.run_pair(self.model, self.guide, batch.args, self._kwargs(batch, self.rows))

    def _loss(self, loss: Callable[..., Any], batch: Batch, rows: int) -> Any:
        """Return the loss, which is NaN or infinite also where a distribution refuses such parameters by a ValueError."""
        try:
            return self._call(loss, batch, rows)
        except ValueError:
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                value = self._call(self.objective.loss, batch, rows)
            if isfinite(value):
                raise
            return value

    def _call(self, loss: Callable[..., Any], batch: Batch, rows: int) -> Any:
        loss_of_all = loss(self.model, self.guide, *batch.args, **self._kwargs(batch, rows))
        return loss_of_all / (rows if self.takes_size else batch.rows)


class _Sites(Messenger):
    """Handler that records the distributions and parameters that a run meets."""

    def __init__(self) -> None:
        super().__init__()
        self.distributions: list[Any] = []
        self.parameters: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.distributions.append(unwrap(msg["fn"]))

    def _pyro_post_param(self, msg: Any) -> None:
        self.parameters[msg["name"]] = msg["value"]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the recorded parameters that require a gradient, unconstrained, by name."""
        values = self.parameters.items()
        unconstrained = {name: v.unconstrained() if hasattr(v, "unconstrained") else v for name, v in values}
        found = {name: p for name, p in unconstrained.items() if p.requires_grad}
        if not found:
            raise ValueError("The fit has nothing to train: its model and guide have no parameter that requires a gradient.")
        return found


def _has_one_constant(fn: Any) -> bool:
    """Return True for an energy whose log Z is one number, which its sampler can estimate."""
    return capabilities(fn).intractable and fn.context is None and getattr(fn, "sampler", None) is not None


def _default_objective(pair: tuple[Trace, Trace]) -> Any:
    """Return the objective for the traces of a fit: for diffusions, energies, latent variables, or a density alone."""
    model_trace, _ = pair
    sites: Any = traces.sample_sites(model_trace)
    if any(capabilities(unwrap(site["fn"])).has_noise_error for site in sites.values()):
        return DenoisingScoreMatching()
    if any(capabilities(unwrap(sites[name]["fn"])).intractable for name in traces.observed(model_trace)):
        return ContrastiveDivergence()
    return Trace_ELBO() if traces.latents(model_trace) else MaximumLikelihood()
