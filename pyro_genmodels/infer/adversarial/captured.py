"""Rounds of adversarial training as one graph: samples, both losses, gradients with penalties, and both optimisers."""

from __future__ import annotations

__all__ = ["CapturedGame"]

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import SGD, Optimizer

from pyro_genmodels.infer.adversarial.game import Game
from pyro_genmodels.infer.adversarial.networks import CRITIC, GENERATOR, TrainedNetworks
from pyro_genmodels.infer.compiled import CapturedLoss, CaptureError, Mode
from pyro_genmodels.infer.compiled import updates as formulas


class CapturedGame:
    """Rounds of a game, captured as a graph for each shape of the arguments.

    A network whose loss, or the norm of whose gradient, is not finite stays as it is.

    Args:
        game: the losses.
        networks: the networks and their optimisers, each of which has taken a step.
        mode: how the graph is run.

    Raises:
        CaptureError: if an optimiser has no formula.
    """

    def __init__(self, game: Game, networks: TrainedNetworks, mode: Mode) -> None:
        self.game, self.mode, self._networks = game, mode, networks
        self._rates = {name: _rates(_update_of(networks, name)) for name in (CRITIC, GENERATOR)}
        self._captured = CapturedLoss(game.model, game.guide, _Round(game, networks), mode=mode)

    def play(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[float, float, str]:
        """Play a round.

        Returns:
            The losses of model and critic before their last step, and a sentence about a network that was not changed since
            its loss or gradient is not finite; or nothing.

        Raises:
            CaptureError: if the game cannot be captured.
            StaleGraphError: if the graph no longer computes what the game does.
        """
        updates = {name: _update_of(self._networks, name) for name in (CRITIC, GENERATOR)}
        for name, update in updates.items():
            rates = update.rates()
            if self._rates[name].tolist() != rates[0]:
                self._rates[name] = _rates(update)
        program, inputs = self._captured.program((self._rates, args, dict(kwargs)), {}, gradients=False)
        if not program.calls:
            for update in updates.values():
                update.watch(program.watch)
        results = self._captured.call(program, inputs)[0].tolist()
        loss, critic_loss, *sizes = results
        names = [CRITIC] * self.game.num_critic_steps + [GENERATOR]
        for name, value, norm in zip(names, sizes[::2], sizes[1::2], strict=True):
            if not torch.tensor(value + norm).isfinite():
                return loss, critic_loss, f"the {name}'s loss is {value:g} and the norm of its gradient {norm:g}"
        return loss, critic_loss, ""


class _Round:
    """A round as a function of tensors. The networks are hidden from the watch, since their optimisers change at each step."""

    def __init__(self, game: Game, networks: TrainedNetworks) -> None:
        self.game = game
        self._networks = weakref.ref(networks)

    def __call__(self, model: Any, guide: Any, rates: Mapping[str, Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Play a round in place; return both losses, and for each step the loss and the norm of its gradient."""
        networks: Any = self._networks()
        sizes: list[Tensor] = []

        def update(name: str, loss: Tensor) -> None:
            formula = _update_of(networks, name)
            grads = torch.autograd.grad(loss, list(formula.parameters), allow_unused=True)
            norm = get_total_norm([grad for grad in grads if grad is not None], foreach=False)
            _step_in_place(formula, grads, rates[name], (loss + norm).isfinite())
            sizes.extend((loss.detach(), norm))

        with torch.enable_grad():
            losses = self.game.play(update, args, kwargs)
        return torch.stack([*losses, *sizes])


@torch.no_grad()
def _step_in_place(update: formulas.Update, grads: Any, rates: Tensor, is_wanted: Tensor) -> None:
    """Take the step of an optimiser in place, where that is wanted."""
    values, states = [p.detach() for p in update.parameters], update.states()
    new_values, new_states = update.step(values, grads, states, rates)
    for value, new in zip(values, new_values, strict=True):
        if new is not value:
            value.copy_(torch.where(is_wanted, new, value))
    for state, new_state in zip(states, new_states, strict=True):
        for key, old in state.items():
            if new_state[key] is not old:
                old.copy_(torch.where(is_wanted, new_state[key], old))


def _rates(update: formulas.Update) -> Tensor:
    return torch.tensor(update.rates()[0], dtype=torch.float64)


def _update_of(networks: TrainedNetworks, name: str) -> formulas.Update:
    """Return the step of a network's optimiser as a formula.

    Raises:
        CaptureError: if there is none.
    """
    optimizer: Optimizer = networks.optimisers[name]
    group, kind = optimizer.param_groups[0], type(optimizer)
    problem = ""
    if kind not in formulas.FORMULAS or kind is ClippedAdam:  # which counts its steps in Python
        problem = f"{kind.__name__} has no formula here"
    elif len(optimizer.param_groups) > 1 or group.get("differentiable") or isinstance(group["lr"], Tensor):
        problem = f"{kind.__name__} has several groups of parameters, is differentiable, or has a tensor as its learning rate"
    if problem:
        raise CaptureError(
            f"The optimiser of the {name} cannot be a part of a graph: {problem}. Use Adam, AdamW, SGD, RMSprop or Adagrad, or "
            "mode=Eager()."
        )
    needs_state = not (kind is SGD and not group["momentum"])
    parameters = [p for p in networks.parameters[name].values() if optimizer.state[p] or not needs_state]
    return formulas.Update(parameters, [optimizer] * len(parameters), [{}] * len(parameters))
