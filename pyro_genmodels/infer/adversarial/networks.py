"""Trained networks: parameters and optimisers of a generator and a critic, with copies of their state."""

from __future__ import annotations

__all__ = ["CRITIC", "GENERATOR", "TrainedNetworks"]

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from pyro_genmodels.optim.adapters import Optim, make_optimizer
from pyro_genmodels.optim.averaging import TrainedWeights
from pyro_genmodels.utils.ranks import current_ranks
from pyro_genmodels.utils.tensors import copied_like

GENERATOR, CRITIC = "generator", "critic"
BETAS = (0.0, 0.99)
"""Betas of the default Adam: no momentum."""


class TrainedNetworks:
    """Parameters, optimisers and moving average of a generator and a critic.

    Args:
        generator: parameters of the model and its guide by name.
        critic: parameters of the critic by name.
        modules: modules of the model and its guide.
        critic_module: the critic.
        optims: optimisers of generator and critic; see `make_optimizer`.
        ema_decay: decay per step of a moving average of the generator, or None.

    Attributes:
        parameters: parameters by name, under "generator" and "critic".
        optimisers: torch optimisers under "generator" and "critic".
        weights: the generator's parameters with their moving average.
    """

    def __init__(
        self,
        generator: dict[str, Any],
        critic: dict[str, Any],
        modules: list[nn.Module],
        critic_module: nn.Module,
        optims: Sequence[Optim],
        ema_decay: float | None,
    ) -> None:
        self.parameters: dict[str, dict[str, Any]] = {GENERATOR: generator, CRITIC: critic}
        self.optimisers: dict[str, Optimizer] = {
            name: make_optimizer(optim, list(parameters.values()), betas=BETAS)
            for (name, parameters), optim in zip(self.parameters.items(), optims, strict=True)
        }
        self.weights = TrainedWeights(generator, modules, ema_decay)
        self.modules = [*modules, critic_module]

    @property
    def finite(self) -> bool:
        """True if every parameter is finite."""
        return all(bool(p.isfinite().all()) for parameters in self.parameters.values() for p in parameters.values())

    def update(self, name: str, loss: Tensor) -> str | None:
        """Take a step of one network down the gradient of its loss.

        Returns:
            A message, without a step, if the loss or the norm of its gradient is not finite.
        """
        parameters = list(self.parameters[name].values())
        grads: list[Any] = list(torch.autograd.grad(loss, parameters, allow_unused=True))
        used = [i for i, grad in enumerate(grads) if grad is not None]
        loss, *means = current_ranks().mean([loss, *(grads[i] for i in used)])
        for i, mean in zip(used, means, strict=True):
            grads[i] = mean
        norm = get_total_norm([grad for grad in grads if grad is not None])
        if not (loss + norm).isfinite():
            return f"the {name}'s loss is {loss.item():g} and the norm of its gradient {norm.item():g}"
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = None if grad is None else copied_like(grad, p)
        self.optimisers[name].step()
        for p in parameters:
            p.grad = None
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of parameters, buffers, optimisers, average and random state: all that resuming needs."""
        average = self.weights.average
        device = next(iter(self.parameters[CRITIC].values())).device
        return copy.deepcopy(
            {
                "parameters": {name: [p.detach() for p in parameters.values()] for name, parameters in self.parameters.items()},
                "buffers": [b.detach() for b in self._buffers()],
                "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
                "average": None if average is None else average.state_dict(),
                "random": torch.get_rng_state(),
                "random.cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            }
        )

    def load_state_dict(self, state: Mapping[str, Any], *, random: bool = True) -> None:
        """Load a state.

        Args:
            state: result of `state_dict`.
            random: True if the random state is loaded too.

        Raises:
            ValueError: if the state has other parameters or other shapes.
        """
        for name, parameters in self.parameters.items():
            shapes, saved = ([tuple(p.shape) for p in ps] for ps in (parameters.values(), state["parameters"][name]))
            if shapes != saved:
                raise ValueError(
                    f"The saved {name} has {len(saved)} parameters, or other shapes than the {len(shapes)} parameters here."
                )
        state = copy.deepcopy(dict(state))
        with torch.no_grad():
            for name, parameters in self.parameters.items():
                for p, value in zip(parameters.values(), state["parameters"][name], strict=True):
                    p.copy_(value)
                self.optimisers[name].load_state_dict(state["optimisers"][name])
            for buffer, value in zip(self._buffers(), state["buffers"], strict=True):
                buffer.copy_(value)
        self.weights.reread()
        if self.weights.average is not None and state["average"] is not None:
            self.weights.average.load_state_dict(state["average"])
        if random:
            torch.set_rng_state(state["random"])
            if state["random.cuda"] is not None:
                torch.cuda.set_rng_state(state["random.cuda"])

    def _buffers(self) -> list[Tensor]:
        return [buffer for module in self.modules for buffer in module.buffers()]
