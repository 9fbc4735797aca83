r"""Steps of optimisers as formulas of tensors, so that they can be a part of a captured graph.

Each formula takes a parameter :math:`\theta`, its gradient :math:`g` and the state of the optimiser, and returns the next ones.
They are those of `torch.optim` and of `pyro.optim.ClippedAdam`, whose state they read and write: a program may go back and
forth between these and the graph, and save the optimiser as usual.

Kingma and Ba, *Adam* (arXiv 1412.6980); Loshchilov and Hutter, *Decoupled weight decay* (arXiv 1711.05101); Reddi et al., *On
the convergence of Adam* (AMSGrad, arXiv 1904.09237); Duchi et al., *Adaptive subgradient methods* (2011).
"""

from __future__ import annotations

__all__ = ["State", "Update", "has_stepped", "load_optimizer", "moved_by", "update_of", "watch_others"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.optim import PyroOptim
from pyro.optim.clipped_adam import ClippedAdam
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from pyro_genmodels.infer.compiled.watch import Watch

State = dict[str, Tensor]
Formula = Callable[[Tensor, Tensor, State, Mapping[str, Any], Tensor], tuple[Tensor, State]]


def _adam(
    p: Tensor, g: Tensor, state: State, group: Mapping[str, Any], lr: Tensor, *, decoupled: bool = False
) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    step = state["step"] + 1
    if group["weight_decay"] and group.get("decoupled_weight_decay", decoupled):
        p = p * (1 - lr * group["weight_decay"]).to(p.dtype)
    elif group["weight_decay"]:
        g = g + group["weight_decay"] * p
    mean = state["exp_avg"].lerp(g, 1 - beta1)
    square = beta2 * state["exp_avg_sq"] + (1 - beta2) * g * g
    new = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
    if group["amsgrad"]:
        square = new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    size = lr / _bias(beta1, step)
    root = _bias(beta2, step).sqrt()
    return p - size.to(p.dtype) * mean / (square.sqrt() / root.to(p.dtype) + group["eps"]), new


def _clipped_adam(p: Tensor, g: Tensor, state: State, group: Mapping[str, Any], lr: Tensor) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    step, lr = state["step"] + 1, lr * group["lrd"]
    g = g.clamp(-group["clip_norm"], group["clip_norm"])
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    mean = beta1 * state["exp_avg"] + (1 - beta1) * g
    deviation = g - mean if group["centered_variance"] else g
    square = beta2 * state["exp_avg_sq"] + (1 - beta2) * deviation * deviation
    size = lr * _bias(beta2, step).sqrt() / _bias(beta1, step)
    return p - size.to(p.dtype) * mean / (square.sqrt() + group["eps"]), {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _sgd(p: Tensor, g: Tensor, state: State, group: Mapping[str, Any], lr: Tensor) -> tuple[Tensor, State]:
    new: State = {}
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    if group["momentum"]:
        velocity = group["momentum"] * state["momentum_buffer"] + (1 - group["dampening"]) * g
        new["momentum_buffer"] = velocity
        g = g + group["momentum"] * velocity if group["nesterov"] else velocity
    return p - lr.to(p.dtype) * g, new


def _rmsprop(p: Tensor, g: Tensor, state: State, group: Mapping[str, Any], lr: Tensor) -> tuple[Tensor, State]:
    new = {"step": state["step"] + 1}
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    square = new["square_avg"] = group["alpha"] * state["square_avg"] + (1 - group["alpha"]) * g * g
    if group["centered"]:
        mean = new["grad_avg"] = state["grad_avg"].lerp(g, 1 - group["alpha"])
        square = square - mean * mean
    direction = g / (square.sqrt() + group["eps"])
    if group["momentum"]:
        direction = new["momentum_buffer"] = group["momentum"] * state["momentum_buffer"] + direction
    return p - lr.to(p.dtype) * direction, new


def _adagrad(p: Tensor, g: Tensor, state: State, group: Mapping[str, Any], lr: Tensor) -> tuple[Tensor, State]:
    step = state["step"] + 1
    if group["weight_decay"]:
        g = g + group["weight_decay"] * p
    total = state["sum"] + g * g
    size = lr / (1 + (step.double() - 1) * group["lr_decay"])
    return p - size.to(p.dtype) * g / (total.sqrt() + group["eps"]), {"step": step, "sum": total}


def _bias(beta: float, step: Tensor) -> Tensor:
    """Return :math:`1 - \\beta^t`, the share of gradients in an average that began with 0, in float64."""
    bias = 1 - torch.pow(beta, step.double())
    return bias.as_strided((), ())  # a compiler computes it once; else it would be a part of the loop over the parameter


FORMULAS: Mapping[type[Optimizer], Formula] = {
    Adam: _adam,
    AdamW: partial(_adam, decoupled=True),
    ClippedAdam: _clipped_adam,
    SGD: _sgd,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
}
"""Formulas by the class of the optimiser. A subclass of one of these is another optimiser."""


@dataclass(frozen=True)
class Update:
    """The step of an optimiser for some parameters, in a graph.

    Attributes:
        parameters: parameters that the optimiser moves.
        optimizers: torch's optimiser of each.
        clips: largest norm and largest value of each gradient, or None.
    """

    parameters: Sequence[Tensor]
    optimizers: Sequence[Optimizer]
    clips: Sequence[Mapping[str, float | None]]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parameters[0].device if self.parameters else torch.get_default_device()

    @property
    def is_counted(self) -> bool:
        """True if an optimiser counts its steps in Python."""
        return bool(self._counted())

    def rates(self, num_steps: int = 1) -> list[list[float]]:
        """Return, for some steps, the learning rates, and the numbers of steps that an optimiser counts in Python."""
        groups = [optimizer.param_groups[0] for optimizer in self.optimizers]
        counted = self._counted()
        if not counted:
            return [[float(group["lr"]) for group in groups]] * num_steps
        return [
            [float(group["lr"]) * group.get("lrd", 1.0) ** k for group in groups]
            + [float(self._state(i)["step"] + k) for i in counted]
            for k in range(num_steps)
        ]

    def states(self) -> list[State]:
        """Return the tensors of each optimiser's state, by identity."""
        states = [self._state(i) for i in range(len(self.parameters))]
        return [{name: x for name, x in state.items() if isinstance(x, Tensor)} for state in states]

    def step(
        self, values: Sequence[Tensor], gradients: Sequence[Tensor | None], states: Sequence[State], rates: Tensor
    ) -> tuple[list[Tensor], list[State]]:
        """Return the next parameters and states.

        Args:
            values: parameters.
            gradients: their gradients.
            states: states of the optimisers.
            rates: what `rates` returns for this step, in float64, as a tensor.
        """
        counted = self._counted()
        new_values, new_states = [], []
        for i, (p, g, state, optimizer, clip) in enumerate(
            zip(values, gradients, states, self.optimizers, self.clips, strict=True)
        ):
            if g is None:
                new_values.append(p)
                new_states.append(state)
                continue
            if (largest := clip.get("clip_norm")) is not None:
                g = g * (largest / (torch.linalg.vector_norm(g) + 1e-6)).clamp(max=1.0)
            if (largest := clip.get("clip_value")) is not None:
                g = g.clamp(-largest, largest)
            group = optimizer.param_groups[0]
            given = {"step": rates[len(values) + counted.index(i)]} | state if i in counted else state
            g = -g if group.get("maximize", False) else g
            p, state = FORMULAS[type(optimizer)](p, g, given, group, rates[i])
            new_values.append(p)
            new_states.append({name: x for name, x in state.items() if i not in counted or name != "step"})
        return new_values, new_states

    def count(self, steps: int = 1) -> None:
        """Advance what optimisers count in Python."""
        for i in self._counted():
            self._state(i)["step"] += steps
            group = self.optimizers[i].param_groups[0]
            group["lr"] *= group["lrd"] ** steps

    def watch(self, watch: Watch) -> None:
        """Watch the options of the optimisers, and the identity of their states."""
        for i, optimizer in enumerate(self.optimizers):
            group = optimizer.param_groups[0]
            for name in ("state", "param_groups"):
                watch.add(vars(optimizer), name, f"{name} of the optimiser")
            for name in group:
                if name not in ("lr", "params", "initial_lr", "foreach", "fused", "capturable", "differentiable"):
                    watch.add(group, name, f"the option {name} of the optimiser")
            for name, x in self._state(i).items():
                if isinstance(x, Tensor):
                    watch.add(self._state(i), name, f"{name} of the optimiser")
            watch.add(optimizer.state, self.parameters[i], "the state of the optimiser")

    def _state(self, i: int) -> dict[str, Any]:
        return self.optimizers[i].state[self.parameters[i]]

    def _counted(self) -> list[int]:
        """Return the numbers of those parameters whose optimiser counts its steps in Python."""
        return [i for i, optimizer in enumerate(self.optimizers) if type(optimizer) is ClippedAdam]


def moved_by(optim: PyroOptim, parameters: Sequence[Tensor], trained: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters of a program that an optimiser moves at a step, in their order.

    These are the ones with a gradient, and those that have had one before: Pyro gives them a gradient of zeros, so that
    momentum and weight decay go on.

    Args:
        optim: optimiser.
        parameters: unconstrained parameters of the program.
        trained: those that have a gradient in the program.
    """
    known = set(map(id, trained))
    return [p for p in parameters if id(p) in known or (p.requires_grad and p.grad is not None and p in optim.optim_objs)]


def has_stepped(optim: PyroOptim, parameters: Sequence[Tensor]) -> bool:
    """Return True if an optimiser has made a step for each of the parameters, and so has their state."""
    found = [optim.optim_objs.get(p) for p in parameters]
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in found]
    return all(
        optimizer is not None and (optimizer.state[p] or _is_without_state(optimizer))
        for p, optimizer in zip(parameters, optimizers, strict=True)
    )


def watch_others(optim: PyroOptim, watch: Watch, parameters: Sequence[Tensor], moved: Sequence[Tensor]) -> None:
    """Watch the parameters that are not moved: once they have a state of the optimiser, they are."""
    known = set(map(id, moved))
    for p in parameters:
        optimizer = optim.optim_objs.get(p)
        if id(p) not in known and optimizer is not None:
            watch.add(getattr(optimizer, "optimizer", optimizer).state, p, "the state of the optimiser")


def load_optimizer(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Set the state of an optimiser of torch, or of a schedule with its optimiser, as `PyroOptim.get_state` returned it."""
    if "scheduler" in state:
        optimizer.load_state_dict(state["scheduler"])
        optimizer.optimizer.load_state_dict(state["optimizer"])
    else:
        optimizer.load_state_dict(state)


def update_of(optim: PyroOptim, parameters: Sequence[Tensor]) -> Update | str:
    """Return the step of a Pyro optimiser for some parameters, or a text that says why it cannot be in a graph.

    Args:
        optim: optimiser or scheduler that has made a step for each of the parameters.
        parameters: unconstrained parameters that have gradients.
    """
    optimizers, clips = [], []
    for p in parameters:
        schedule = optim.optim_objs[p]
        optimizer = getattr(schedule, "optimizer", schedule)
        if getattr(schedule, "cycle_momentum", False):
            return f"{type(schedule).__name__} changes the momentum at each step (cycle_momentum=False leaves it)"
        if type(optimizer) not in FORMULAS:
            return f"{type(optimizer).__name__} has no formula here"
        group = optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            return "its learning rate is a tensor"
        if group.get("differentiable"):
            return "it is differentiable"
        for name, x in optimizer.state[p].items():  # torch counts steps on the CPU, where a CUDA graph cannot read them
            if isinstance(x, Tensor):
                optimizer.state[p][name] = x.to(p.device)
        optimizers.append(optimizer)
        clips.append(
            optim._get_grad_clip_args(p)  # type: ignore[arg-type]
            if optim.grad_clip.get(p) is not None
            else {}
        )
    return Update(parameters, optimizers, clips)


def _is_without_state(optimizer: Optimizer) -> bool:
    return type(optimizer) is SGD and not optimizer.param_groups[0]["momentum"]
