r"""What a step of training is: one of a Pyro loss by an optimiser, or a turn of each player of a game.

The loss is nats per datum, and so is the gradient: each minibatch of B out of N rows is scaled by N / B by the model's plate,
and the sum divided by N here.
"""

from __future__ import annotations

__all__ = ["AdversarialStep", "LossStep", "step_of"]

import inspect
import warnings
from collections.abc import Callable
from math import inf, isfinite
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from pyro_genmodels._pyro import traces
from pyro_genmodels.distributions.energy import Energy
from pyro_genmodels.distributions.energy.partition import quick_log_partition
from pyro_genmodels.divergences import EnergyKernel, mmd
from pyro_genmodels.infer.adversarial import Adversarial
from pyro_genmodels.infer.adversarial.losses import AdversarialLoss
from pyro_genmodels.infer.adversarial.pairings import JointPairing, ObservationsPairing
from pyro_genmodels.infer.contrastive import ContrastiveDivergence, NoiseContrastive
from pyro_genmodels.infer.denoising import DenoisingScoreMatching, is_diffusion
from pyro_genmodels.infer.flow_matching import FlowMatching
from pyro_genmodels.infer.likelihood import MaximumLikelihood
from pyro_genmodels.optim.adapters import make_optimizer
from pyro_genmodels.training.batches import Batch, Batches
from pyro_genmodels.utils.distributions import unwrap


def step_of(fit: Any, objective: Any, optim: Any, batches: Batches, clip_norm: float | None) -> LossStep | AdversarialStep:
    """What a step is, for this fit by this objective.

    Raises:
        TypeError: if the objective is none.
        ValueError: if a game lacks its critic, or has optimisers already.
    """
    model, guide = traces.as_pair(fit)
    if objective is None and isinstance(getattr(fit, "critic", None), nn.Module):
        objective = Adversarial(model, fit.critic, optim=optim)
    elif isinstance(objective, AdversarialLoss):
        critic = getattr(fit, "critic", None)
        if not isinstance(critic, nn.Module):
            raise ValueError(
                f"{type(objective).__name__} is a game against a critic, which this fit does not bring. Pass "
                "objective=Adversarial(model, critic, ...)."
            )
        objective = Adversarial(model, critic, objective, optim)
    elif isinstance(objective, Adversarial) and optim is not None:
        raise ValueError("An Adversarial has its optimisers already: pass optim= there.")
    if isinstance(objective, Adversarial):
        return AdversarialStep(objective, model, guide, batches)
    if objective is not None and not isinstance(objective, ELBO):
        found = f"the class {objective.__name__}" if isinstance(objective, type) else type(objective).__name__
        raise TypeError(f"objective wants a Pyro loss, an object such as MaximumLikelihood(), but found {found}.")
    return LossStep(model, guide, objective or _default_objective(model, guide, batches.first()), batches, optim, clip_norm)


class LossStep:
    """Steps by whatever Pyro loss."""

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        objective: Any,
        batches: Batches,
        optim: Any,
        clip_norm: float | None,
    ) -> None:
        self.model, self.guide, self.objective, self.rows = model, guide, objective, batches.rows
        self.sized = "size" in inspect.signature(model).parameters
        self.clip_norm = clip_norm
        self.warned = False
        self.averages = self._needs_average(batches.first())
        self.parameters = self._find_parameters(batches.first())
        self.optimiser = make_optimizer(optim, list(self.parameters.values()))
        self.aside = getattr(objective, "own", ())
        self.modules = traces.modules_of(model, guide)
        self.others: list[nn.Module] = []

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """A step, of that number in its epoch; returns the loss of the batch.

        Raises:
            FloatingPointError: if the loss or its gradient is not finite, as where a distribution refused what it was given.
        """
        for p in self.parameters.values():
            p.grad = None
        loss = self._guarded(self.objective.loss_and_grads, batch, self.rows)
        rows = self.rows if self.sized else len(batch[0])
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad.div_(rows)
        bound = inf if self.clip_norm is None else self.clip_norm
        norm = clip_grad_norm_(list(self.parameters.values()), bound, foreach=True).item()
        for name, value in (("loss", loss), ("norm of the gradient", norm)):
            if not isfinite(value):
                raise FloatingPointError(
                    f"the {name} is {value} at step {number}: lower the learning rate, or look for outliers"
                )
        self.optimiser.step()
        return {"train": loss}

    def validate(self, held_out: Batches) -> float:
        """The loss of held-out data."""
        self._know_constants(held_out.first())
        with torch.no_grad():
            return _mean([(self._guarded(self.objective.loss, b, held_out.rows), len(b[0])) for b in held_out.in_order()])

    def _know_constants(self, batch: Batch) -> None:
        """Has the energies in the model know their log Z, or losses of different parameters could not be compared."""
        with pyro.validation_enabled(is_validate=False):  # what is not finite shows in the loss
            dists = _distributions(self.model, self.guide, batch)
            for dist in dists:
                if isinstance(dist, Energy) and dist.context is None and dist.sampler is not None:
                    quick_log_partition(dist)
        known = isinstance(self.objective, (ContrastiveDivergence, NoiseContrastive))
        if not (known or self.warned) and any(isinstance(d, Energy) and d.context is not None for d in dists):
            self.warned = True
            warnings.warn(
                "The validation losses of energies with a context lack log Z of each, which changes with the parameters, so "
                "that early stopping cannot rely on them. Use ContrastiveDivergence(), or leave valid out.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _guarded(self, loss: Callable[..., float], batch: Batch, rows: int) -> float:
        try:
            return self._call(loss, batch, rows)
        except ValueError:  # NaN parameters of a distribution are refused before the loss can be NaN
            with torch.no_grad(), pyro.validation_enabled(is_validate=False):
                value = self._call(self.objective.loss, batch, rows)
            if isfinite(value):
                raise
            return value

    def _call(self, loss: Callable[..., float], batch: Batch, rows: int) -> float:
        kwargs = {"size": rows} if self.sized else {}
        return loss(self.model, self.guide, *_args(batch), **kwargs) / (rows if self.sized else len(batch[0]))

    def _needs_average(self, batch: Batch) -> bool:
        """Whether the loss is of networks that are drawn from by many steps, which last weights alone serve badly."""
        if not isinstance(self.objective, DenoisingScoreMatching):
            return isinstance(self.objective, FlowMatching)
        return any(map(is_diffusion, _distributions(self.model, self.guide, batch)))

    def _find_parameters(self, batch: Batch) -> dict[str, nn.Parameter]:
        """What a step trains: the parameters Pyro sees in one, by its names."""
        with poutine.trace(param_only=True) as capture:
            self._call(self.objective.loss_and_grads, batch, self.rows)
        sites = capture.trace.nodes.items()
        values: dict[str, Any] = {name: site["value"] for name, site in sites}
        found = {name: v.unconstrained() if hasattr(v, "unconstrained") else v for name, v in values.items()}
        found = {name: p for name, p in found.items() if p.requires_grad}
        if not found:
            raise ValueError(
                "The fit has nothing to train: no parameter that requires a gradient is met in its model and guide."
            )
        return found


class AdversarialStep:
    """Turns of the players of a game."""

    def __init__(self, game: Adversarial, model: Callable[..., Any], guide: Callable[..., Any], batches: Batches) -> None:
        own = traces.modules_of(model, guide)
        players = traces.modules_of(game.model, game.guide)
        if own and not any(part is player for module in own for part in module.modules() for player in players):
            raise ValueError("The objective is an Adversarial of another model than this fit: build it of fit.model.")
        self.game, self.rows = game, batches.rows
        self.sized = "size" in inspect.signature(game.model).parameters
        within = any(game.critic is m for module in own for m in module.modules())
        self.others: list[nn.Module] = [] if within else [game.critic]
        self.modules = [*own, *self.others]
        game.prepare(*_args(batches.first()), **self._size(self.rows))
        critic = {f"critic.{name}": p for name, p in game.players["critic"].items()}
        self.parameters = {**game.players["generator"], **critic}
        self.optimiser: Any = _Both([game.optimisers[player] for player in game.players])
        self.aside = () if within else tuple(critic)
        self.averages = True

    def step(self, batch: Batch, number: int) -> dict[str, float]:
        """A turn of each; returns what each lost."""
        lost = self.game.step(*_args(batch), **self._size(self.rows))
        return {"train": lost["generator"], "critic": lost["critic"]}

    @torch.no_grad()
    def validate(self, held_out: Batches) -> float:
        """How far draws are from held-out data: the squared energy distance, where draws are what is matched.

        Else it is what the model loses, by the critic of the day.
        """
        game, size = self.game, self._size(held_out.rows)
        if not isinstance(game.pairing, ObservationsPairing | JointPairing) or game.beside is not None:
            return _mean([(game.evaluate_loss(*_args(b), **size)["generator"], len(b[0])) for b in held_out.in_order()])
        sides = [game.pairing.sides(game.model, game.guide, _args(batch), size) for batch in held_out.in_order()]
        real, fake = (torch.cat([getattr(side, name)[0] for side in sides]) for name in ("real", "fake"))
        return mmd(real, fake, kernel=EnergyKernel()).value.item() if fake.isfinite().all() else float("nan")

    def _size(self, rows: int) -> dict[str, int]:
        return {"size": rows} if self.sized else {}


class _Both:
    """Two optimisers as one, for what is kept of a run."""

    def __init__(self, optimisers: list[Optimizer]) -> None:
        self.optimisers = optimisers

    def state_dict(self) -> dict[str, Any]:
        """Of both, the parameters of the second counted on from those of the first."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimiser in self.optimisers:
            first = sum(len(group["params"]) for group in groups)
            found = optimiser.state_dict()
            state |= {first + i: values for i, values in found["state"].items()}
            groups += [{**group, "params": [first + i for i in group["params"]]} for group in found["param_groups"]]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what was told."""
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


def _mean(losses: list[tuple[float, int]]) -> float:
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def _args(batch: Batch) -> tuple[Tensor, ...]:
    return (batch[0],) if batch[1] is None else (batch[0], batch[1])


def _distributions(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> list[Any]:
    """Out of Pyro's wrappers, those at the sites of model and guide."""
    with torch.no_grad(), poutine.block():
        pair: Any = traces.run_pair(model, guide, _args(batch), {})
    return [unwrap(site["fn"]) for trace in pair for site in traces.sample_sites(trace).values()]


def _default_objective(model: Callable[..., Any], guide: Callable[..., Any], batch: Batch) -> ELBO:
    """What the fit offers decides: energies, diffusions, latent variables, or a density alone."""
    with torch.no_grad(), poutine.block():
        model_trace, _ = traces.run_pair(model, guide, _args(batch), {})
    sites: Any = traces.sample_sites(model_trace)
    if any(is_diffusion(site["fn"]) for site in sites.values()):
        return DenoisingScoreMatching()
    if any(getattr(unwrap(sites[name]["fn"]), "intractable", False) for name in traces.observed(model_trace)):
        return ContrastiveDivergence()
    return Trace_ELBO() if traces.latents(model_trace) else MaximumLikelihood()
